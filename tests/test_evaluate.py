import json
import re
import signal
import socket
import time
from pathlib import Path

import datasets
import evaluate
import numpy as np
import PIL.Image
import pytest
import soundfile
import torch
from conftest import assert_near, generator, photograph, rounding_error
from evaluate_scores import COLUMNS, mismatched_mean
from evaluate_systems import ImageCaptioner, digest_components, make_clip, picture_encoder, shuffle_pictures
from extractor_checkpoints import save_ast, save_blip, save_clap, save_clip
from processes import start_script
from untrained import untrained_components

from melfusion_pipeline import MelFusionPipeline, metrics
from melfusion_pipeline.audio import load_audio, resample, waveform_to_latents
from melfusion_pipeline.data import open_image
from melfusion_pipeline.extractors import AstExtractor, ClapExtractor, ClipExtractor

SCRIPT = Path(evaluate.__file__)
PICTURES = ["forest", "forest", "harbour", "harbour", "street", "fire"]
CAPTIONS = ["a calm piano", "loud drums", "a slow cello", "a harp", "a fast fiddle", "a choir"]
SECONDS = 1.12
STEPS = ("--num_inference_steps", "2", "--num_inversion_steps", "2")


def tone(frequency, rate=16000, seconds=1.2):
    time = np.arange(round(seconds * rate)) / rate
    return 0.4 * np.sin(2 * np.pi * frequency * time) * np.exp(-3 * (time % 0.31))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    MelFusionPipeline(**untrained_components(mel_bands=64, latent_frames=28)).save_pretrained(folder)
    return str(folder)


def write_triplets(folder, count=6):
    lines = []
    for row in range(count):
        photograph(seed=PICTURES.index(PICTURES[row])).save(folder / f"{PICTURES[row]}.png")
        rate = 44100 if row == 4 else 16000
        soundfile.write(folder / f"{row}.wav", tone(110 * (row + 1), rate), rate)
        line = {"image": f"{PICTURES[row]}.png", "audio": f"{row}.wav", "caption": CAPTIONS[row]}
        lines.append(json.dumps(line))
    (folder / "set.jsonl").write_text("\n".join(lines))
    return str(folder / "set.jsonl")


@pytest.fixture(scope="module")
def triplets(tmp_path_factory):
    return write_triplets(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    savers = {"clap": save_clap, "clip": save_clip, "ast": save_ast, "blip": save_blip}
    return {name: str(save(tmp_path_factory.mktemp(name))) for name, save in savers.items()}


def run(triplets, output, *arguments):
    evaluate.main(["--triplets", triplets, "--output", str(output), *map(str, arguments)])
    return json.loads((output / "results.json").read_text())


def write_clips(folder):
    folder.mkdir()
    for row in range(6):
        soundfile.write(folder / f"{row}.wav", tone(150 * (row + 1)), 16000)
    return folder


@pytest.fixture(scope="module")
def complete(checkpoint, triplets, models, tmp_path_factory):
    """All five systems and a foreign one, with all extractors."""
    folder = tmp_path_factory.mktemp("complete")
    write_clips(folder / "tones")
    arguments = ("--checkpoint", checkpoint, *STEPS, "--caption_model", models["blip"], "--clap_model", models["clap"])
    arguments += ("--clip_model", models["clip"], "--classifier", f"ast={models['ast']}")
    arguments += ("--score", f"tones={folder / 'tones'}", "--subjective", folder / "test")
    return folder, run(triplets, folder / "output", *arguments)


def test_all_systems_come_into_one_table(complete):
    folder, results = complete
    assert list(results["systems"]) == ["melfusion", "text-only", "caption", "shuffled", "reference", "tones"]
    for system in results["systems"].values():
        assert (system["n"], system["sampling_rate"]) == (6, 16000)
        assert set(system["scores"]) == set(COLUMNS)
        for estimate, low, high in system["scores"].values():
            assert low < estimate < high
    table = (folder / "output" / "results.md").read_text()
    for name, system in results["systems"].items():
        assert f"| {name} | 6 | 16000 | {system['scores']['FAD'][0]:.4g} [" in table
    for setting in ("- rows: 6", "- pictures: 4", "- seed: 0", "- num_inference_steps: 2", "resampled to 16000 Hz"):
        assert setting in table
    assert PIL.Image.open(folder / "output" / "results.png").width > 1000
    assert "1 of 6" in (folder / "test" / "page" / "index.html").read_text()


def assert_written(found, expected):
    """What is in a file of 16 bits is the waveform, turned down where it would clip."""
    assert np.abs(found - expected / max(1, np.abs(expected).max())).max() < 2**-15 + rounding_error(expected)


def test_each_system_gets_its_own_picture_and_prompt(complete, checkpoint, triplets, models):
    folder, _ = complete
    pipe = MelFusionPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    seed = np.random.SeedSequence([0, 5]).generate_state(1, np.uint64)[0]
    own = open_image(Path(triplets).parent / "fire.png")
    other = Path(triplets).parent / shuffle_pictures([f"{name}.png" for name in PICTURES], 0)[5]
    described = ImageCaptioner(models["blip"], "cpu")(own)
    inputs = {
        "melfusion": (own, "a choir"),
        "text-only": (None, "a choir"),
        "caption": (None, f"a choir. {described}"),
        "shuffled": (open_image(other), "a choir"),
    }
    found = {name: soundfile.read(folder / "output" / name / "5.flac")[0] for name in inputs}
    for name, (image, prompt) in inputs.items():
        call = {"num_inference_steps": 2, "num_inversion_steps": 2, "audio_length_in_s": SECONDS}
        expected = pipe(image, prompt, generator=generator(int(seed)), **call).audios[0]
        assert_written(found[name], expected)
    assert len({waveform.tobytes() for waveform in found.values()}) == 4 and described


@torch.no_grad()
def test_reference_is_the_real_clip_through_autoencoder_and_vocoder(complete, checkpoint, triplets):
    folder, _ = complete
    pipe = MelFusionPipeline.from_pretrained(checkpoint)
    audio, rate = load_audio(Path(triplets).parent / "3.wav")
    latents = waveform_to_latents(audio, rate, pipe.vae, SECONDS)
    expected = pipe.mel_spectrogram_to_waveform(pipe.decode_latents(latents))[0, : round(SECONDS * 16000)].numpy()
    found, rate = soundfile.read(folder / "output" / "reference" / "3.flac")
    assert rate == 16000 and len(found) == round(SECONDS * 16000)
    assert_written(found, expected)


def audio_of(paths):
    """What is scored of files, read by other means than the script's."""
    clips = []
    for path in paths:
        waveform, rate = load_audio(path)
        waveform = resample(waveform[0].double(), rate)[: round(SECONDS * 16000)]
        clips.append(0.5 * (waveform - waveform.mean()) / (waveform - waveform.mean()).abs().max())
    return {"audio": torch.stack(clips).float().numpy(), "sampling_rate": 16000}


def test_figures_are_those_of_the_extractors_on_the_files(complete, triplets, models):
    folder, results = complete
    scores = {name: interval[0] for name, interval in results["systems"]["melfusion"]["scores"].items()}
    clips = audio_of(folder / "output" / "melfusion" / f"{row}.flac" for row in range(6))
    real = audio_of(Path(triplets).parent / f"{row}.wav" for row in range(6))
    clap, clip = ClapExtractor.from_pretrained(models["clap"]), ClipExtractor.from_pretrained(models["clip"])
    ast = AstExtractor.from_pretrained(models["ast"])
    images = [photograph(seed=PICTURES.index(name)) for name in PICTURES]
    similarity = clip.probabilities(images=images, text=CAPTIONS) @ clap.probabilities(text=CAPTIONS, **clips).T
    pairs = [(i, j) for i in range(6) for j in range(6) if PICTURES[i] != PICTURES[j]]
    expected = {
        "FAD": metrics.frechet_distance(clap.embed(**clips), clap.embed(**real)),
        "FAD-inf": metrics.frechet_distance_infinity(clap.embed(**clips), clap.embed(**real)),
        "FD": metrics.frechet_distance(ast.embed(**clips), ast.embed(**real)),
        "KL": metrics.kl_divergence(ast.probabilities(**clips), ast.probabilities(**real)).mean(),
        "KAD": metrics.kernel_audio_distance(clap.embed(**clips), clap.embed(**real)),
        "CLAP": (clap.embed(**clips) * clap.embed(text=CAPTIONS)).sum(1).mean(),
        "IMSM matched": np.trace(similarity) / 6,
        "IMSM mismatched": np.mean([similarity[pair] for pair in pairs]),
    }
    assert scores == pytest.approx(expected, rel=1e-4)
    assert abs(scores["IMSM matched"] - scores["IMSM mismatched"]) > 1e-4


def test_the_real_clips_themselves_are_at_no_distance(triplets, models, tmp_path):
    clips = tmp_path / "real"
    clips.mkdir()
    for row in range(6):
        (clips / f"{row}.wav").write_bytes((Path(triplets).parent / f"{row}.wav").read_bytes())
        if row == 4:
            soundfile.write(clips / "4.wav", tone(550), 16000)
    results = run(triplets, tmp_path / "output", "--score", f"real={clips}", "--audio_length_in_s", SECONDS,
                  "--classifier", f"ast={models['ast']}")  # fmt: skip
    scores = results["systems"]["real"]["scores"]
    assert scores["FAD"][0] < 1 and scores["FD"][0] < 0.1 and abs(scores["KL"][0]) < 0.01
    assert set(COLUMNS) - set(scores) == {"CLAP", "IMSM matched", "IMSM mismatched"}
    table = (tmp_path / "output" / "results.md").read_text()
    assert "| - | - | - |" in table and "- FAD, FAD-inf, KAD: log-mel (fixed, no learned weights)" in table
    assert "- CLAP: needs --clap_model\n" in table and "needs --clap_model and --clip_model" in table
    assert "FAD-inf: comes out too low: 6 clips" in table


def test_a_set_of_datasets_is_scored_as_its_files(triplets, tmp_path):
    folder, lines = Path(triplets).parent, Path(triplets).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    files = [
        {key: {"bytes": (folder / row[key]).read_bytes(), "path": row[key]} for key in ("image", "audio")}
        for row in rows
    ]
    embedded = [file | {"text": row["caption"]} for row, file in zip(rows, files)]
    datasets.Dataset.from_list(embedded).save_to_disk(str(tmp_path / "set"))
    clips = write_clips(tmp_path / "tones")
    given = ("--score", f"tones={clips}", "--audio_length_in_s", "1")
    expected = run(triplets, tmp_path / "files", *given)
    output = tmp_path / "set-scored"
    flags = ["--dataset_name", str(tmp_path / "set"), "--caption_column", "text", "--output", str(output)]
    evaluate.main([*flags, *given])
    results = json.loads((output / "results.json").read_text())
    assert results["systems"] == expected["systems"]
    assert results["settings"]["triplets"] == f"{tmp_path / 'set'} (test)"
    with pytest.raises(SystemExit):
        evaluate.main([*flags, *given, "--triplets", triplets])


def test_imsm_takes_a_fixed_list_of_captions(complete, triplets, models, tmp_path):
    folder, results = complete
    (tmp_path / "captions.txt").write_text("a march\n\na waltz\na march\n")
    arguments = (
        "--score",
        f"tones={folder / 'tones'}",
        "--audio_length_in_s",
        SECONDS,
        "--clap_model",
        models["clap"],
    )
    found = run(triplets, tmp_path, *arguments, "--clip_model", models["clip"], "--imsm_captions",
                tmp_path / "captions.txt")  # fmt: skip
    assert "2 captions of" in found["settings"]["IMSM"]
    fixed, own = (table["systems"]["tones"]["scores"]["IMSM matched"][0] for table in (found, results))
    assert fixed > 1.2 * own


def test_a_picture_is_encoded_once_for_all_systems_and_rows(checkpoint, triplets, tmp_path, monkeypatch):
    encoded, encode = [], MelFusionPipeline._encode_images

    def count(pipe, images, *arguments):
        encoded.extend(image.tobytes() for image in images)
        return encode(pipe, images, *arguments)

    monkeypatch.setattr(MelFusionPipeline, "_encode_images", count)
    run(triplets, tmp_path, "--checkpoint", checkpoint, *STEPS, "--systems", "melfusion", "shuffled", "text-only")
    assert len(encoded) == len(set(encoded)) == 4
    assert len(list(tmp_path.glob("*/*.flac"))) == 18


def test_what_is_there_is_not_made_again_and_other_settings_are_refused(checkpoint, triplets, tmp_path):
    arguments = ("--checkpoint", checkpoint, *STEPS, "--systems", "text-only")
    first = run(triplets, tmp_path, *arguments)
    clips = sorted((tmp_path / "text-only").glob("*.flac"))
    times = [clip.stat().st_mtime_ns for clip in clips]
    clips[2].unlink()
    assert run(triplets, tmp_path, *arguments) == first
    again = [clip.stat().st_mtime_ns for clip in clips]
    assert [row for row in range(6) if again[row] != times[row]] == [2]
    with pytest.raises(ValueError, match="made otherwise .seed: 0 there, 1 now.: give another"):
        run(triplets, tmp_path, *arguments, "--seed", "1")
    (tmp_path / "text-only" / "settings.json").unlink()
    with pytest.raises(ValueError, match="holds files, but no settings.json"):
        run(triplets, tmp_path, *arguments)
    assert [clip.stat().st_mtime_ns for clip in clips] == again


def test_retrained_weights_and_other_schedules_are_noticed():
    components = untrained_components()
    digest = digest_components(components)
    assert digest == digest_components(untrained_components()) != digest_components(untrained_components(seed=1))
    components["scheduler"].register_to_config(beta_end=0.03)
    assert digest_components(components) != digest
    with torch.no_grad():
        components["synapse"].alphas[0] += 1e-3
    changed = digest_components(components)
    assert changed not in (digest, digest_components({**components, "synapse": untrained_components()["synapse"]}))


def command(checkpoint, triplets, output):
    arguments = ("--checkpoint", checkpoint, "--triplets", triplets, "--output", output, *STEPS)
    return [str(SCRIPT), *map(str, arguments), "--systems", "melfusion", "reference"]


@pytest.fixture(scope="module")
def undisturbed(checkpoint, triplets, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    evaluate.main(command(checkpoint, triplets, output)[1:])
    return json.loads((output / "results.json").read_text())


def assert_same_table(output, expected):
    """Equal but for the last bit of a sample: processes read weights to other addresses, and add in another order."""
    found = json.loads((output / "results.json").read_text())
    assert found["settings"] == expected["settings"] and list(found["systems"]) == list(expected["systems"])
    for name, system in expected["systems"].items():
        scores = found["systems"][name]["scores"]
        assert scores.keys() == system["scores"].keys()
        for column, interval in system["scores"].items():
            assert_near(np.float32(scores[column]), np.float32(interval))


def test_killed_in_the_middle_and_resumed_gives_the_same_table(checkpoint, triplets, undisturbed, tmp_path):
    arguments = command(checkpoint, triplets, tmp_path)
    process = start_script(*arguments, output=tmp_path / "printed")
    while not (tmp_path / "melfusion" / "1.flac").exists():
        assert process.is_alive()
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    survivors = {clip: clip.stat().st_mtime_ns for clip in tmp_path.glob("*/*.flac")}
    assert 2 <= len(survivors) < 12 and not (tmp_path / "results.json").exists()
    evaluate.main(arguments[1:])
    assert_same_table(tmp_path, undisturbed)
    assert {clip: clip.stat().st_mtime_ns for clip in survivors} == survivors


def test_two_processes_give_the_same_table_as_one(checkpoint, triplets, undisturbed, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `accelerate launch` gives to each of two processes; the README's test starts one by it.
    launch = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    printed, errors = tmp_path / "printed", tmp_path / "errors"
    processes = [
        start_script(*command(checkpoint, triplets, tmp_path), output=printed, errors=errors, **launch, **rank)
        for rank in ({"RANK": str(index), "LOCAL_RANK": str(index)} for index in range(2))
    ]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0], errors.read_text()
    # The four pictures of the six rows are shared out.
    assert re.search(r"Making clips: 100%.* 2/2 ", errors.read_text())
    assert printed.read_text().count("| reference | 6 |") == 1
    assert_same_table(tmp_path, undisturbed)


def remove(folder, name):
    (folder / name).unlink()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda folder: [clip.unlink() for clip in folder.iterdir()], "clips' holds no sound files"),
        (lambda folder: remove(folder, "5.wav"), r"holds 5 clips for 6 rows: it lacks rows \[5\]"),
        (lambda folder: [remove(folder, f"{row}.wav") for row in range(1, 6)], "holds 1 clips for 6 rows"),
        (lambda folder: soundfile.write(folder / "6.wav", tone(99), 16000), r"has no use for \['6.wav'\]"),
        (lambda folder: soundfile.write(folder / "05.flac", tone(99), 16000), "are for the same row"),
        (lambda folder: soundfile.write(folder / "song.wav", tone(99), 16000), "song.wav' is not named by its row"),
        (lambda folder: soundfile.write(folder / "3.wav", 0 * tone(99), 16000), "3.wav' is silent"),
        (lambda folder: soundfile.write(folder / "3.wav", np.nan * tone(99), 16000, "FLOAT"), "3.wav' holds NaN"),
        (
            lambda folder: soundfile.write(folder / "3.wav", tone(99, seconds=1), 16000),
            "3.wav' lasts 1 s, not the 1.12",
        ),
        (lambda folder: soundfile.write(folder / "3.wav", tone(99, 8000), 8000), "16000 Hz and .*3.wav' has 8000 Hz"),
        (lambda folder: (folder / "3.wav").write_bytes(b"music"), "3.wav' cannot be read as a sound file"),
    ],
)
def test_unusable_folders_of_clips_are_refused(triplets, tmp_path, change, message):
    clips = write_clips(tmp_path / "clips")
    change(clips)
    with pytest.raises(ValueError, match=message):
        run(triplets, tmp_path / "output", "--score", f"other={clips}", "--audio_length_in_s", SECONDS)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda folder: (folder / "set.jsonl").write_text(""), "holds no rows"),
        (lambda folder: soundfile.write(folder / "3.wav", 0 * tone(99), 16000), "3.wav' is silent"),
        (lambda folder: soundfile.write(folder / "3.wav", np.nan * tone(99), 16000, "FLOAT"), "3.wav' holds NaN"),
        (lambda folder: soundfile.write(folder / "3.wav", tone(99, seconds=1), 16000), "3.wav' is too short"),
        (lambda folder: (folder / "fire.png").unlink(), "fire.png' is missing"),
    ],
)
def test_sets_with_bad_rows_are_refused(tmp_path, change, message):
    triplets, clips = write_triplets(tmp_path), write_clips(tmp_path / "clips")
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        run(triplets, tmp_path / "output", "--score", f"other={clips}", "--audio_length_in_s", SECONDS)


@pytest.mark.parametrize("count", [1, 4])
def test_sets_too_small_for_intervals_are_refused(tmp_path, count):
    triplets, clips = write_triplets(tmp_path, count), write_clips(tmp_path / "clips")
    with pytest.raises(ValueError, match=f"The set has {count} rows .*give at least 5 rows"):
        run(triplets, tmp_path / "output", "--score", f"other={clips}", "--audio_length_in_s", SECONDS)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "There must be systems to score"),
        (["--systems", "melfusion"], "cannot be made: give `--checkpoint`"),
        (["--score", "a=b", "a=c"], "each with a name of its own"),
        (["--score", "a=b"], "`--audio_length_in_s` is needed"),
    ],
)
def test_contradictory_arguments_are_refused(triplets, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(triplets, tmp_path, *arguments)


def test_unknown_extractors_are_refused(complete, triplets, tmp_path):
    arguments = ("--score", f"tones={complete[0] / 'tones'}", "--audio_length_in_s", SECONDS)
    with pytest.raises(ValueError, match="classifier extractor must be one of .*, but is 'vggish'"):
        run(triplets, tmp_path, *arguments, "--classifier", "vggish=folder")


@pytest.mark.parametrize("pictures", [list("abcdef"), list("aabbcd"), list("aaabbc"), list("ab" * 50)])
def test_shuffled_pictures_are_a_fixed_derangement(pictures):
    found = {tuple(shuffle_pictures(pictures, seed)) for seed in range(20)}
    for shuffled in found:
        assert sorted(shuffled) == sorted(pictures)
        assert all(other != own for other, own in zip(shuffled, pictures))
    assert shuffle_pictures(pictures, 3) == shuffle_pictures(pictures, 3)
    assert len(found) > 1 or len(set(pictures)) == 2


def test_a_picture_of_most_rows_cannot_be_shuffled():
    with pytest.raises(ValueError, match="`shuffled` is impossible: a serves 3 of 5 rows"):
        shuffle_pictures(list("aaabc"), 0)


def test_rows_of_one_picture_are_no_mismatch():
    similarity = np.array([[9.0, 9, 1], [9, 9, 2], [3, 4, 9]])
    assert mismatched_mean(similarity, np.array([0, 0, 1]), np.arange(3)) == 2.5


def test_the_picture_guides_only_where_there_is_one(pipe, tmp_path):
    photograph().save(tmp_path / "picture.png")
    row = {"row": 0, "image": str(tmp_path / "picture.png"), "caption": "a waltz"}
    call = {"num_inference_steps": 2, "num_inversion_steps": 2, "audio_length_in_s": 0.32}

    def clip(system, scale):
        options = {"seed": 0, "call": call | {"image_guidance_scale": scale}}
        return make_clip(pipe, system, row, None, options, picture_encoder(pipe, options))

    assert torch.equal(clip("text-only", 5.0), clip("text-only", None))
    assert not torch.equal(clip("melfusion", 5.0), clip("melfusion", None))

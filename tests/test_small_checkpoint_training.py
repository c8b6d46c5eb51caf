"""The rule, the music, the measurements and the loop from which the small checkpoint is made."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest
import soundfile
import torch
from build_data import CLIPS_PER_VARIED_CROP, combine, vary, write_varied
from build_story_set import Screen, clean, read_screens
from conftest import photograph
from diffusers import AutoencoderKL
from evaluate_base import frame_rate_share, griffin_lim
from judge import format_judgement, judge, rank_correlation
from measure_music import harmonic_to_noise, major_minor, measure_music, onset_rate, register, spectral_flatness
from mood import AROUSAL, VALENCE, MoodRule, measure_picture, mood_bin
from music import DRUM_CHANNEL, DURATION, GENRES, INSTRUMENTS, SAMPLING_RATE, compose, tempo_of
from pictures import Picture
from safetensors.torch import load_file
from train_classifier import create_classifier, create_feature_extractor
from train_clip import create_clip, create_processor
from train_image_unet import create_scheduler, noise_loss
from train_image_unet import create_unet as create_image_unet
from train_image_vae import create_vae as create_image_vae
from train_mel_vae import create_vae
from train_mel_vae import main as train_mel_vae
from train_music_unet import create_unet
from train_vocoder import create_vocoder, draw_segments, spectral_losses
from train_vocoder import main as train_vocoder
from training_loop import Training, run
from transformers import CLIPTextModel
from untrained import untrained_components

from melfusion_pipeline import MelFusionPipeline, MusicVocoder, VisualSynapse
from melfusion_pipeline.audio import log_mel_spectrogram

TIME = np.arange(int(DURATION * SAMPLING_RATE)) / SAMPLING_RATE


def tones(*keys: int) -> np.ndarray:
    return sum(np.sin(2 * np.pi * 440 * 2 ** ((key - 69) / 12) * TIME) for key in keys).astype(np.float32)


# ---------------------------------------------------------------------------------------------------- the mood rule


def solid(red: int, green: int, blue: int) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (80, 60), (red, green, blue))


def test_what_the_rule_looks_at_is_what_it_says():
    dark, bright = measure_picture(solid(20, 20, 20)), measure_picture(solid(230, 230, 230))
    assert dark["brightness"] == pytest.approx(20 / 255) and bright["brightness"] == pytest.approx(230 / 255)
    assert [dark[name] for name in AROUSAL] == pytest.approx([0, 0, 0], abs=1e-9)
    assert measure_picture(solid(200, 100, 50))["warmth"] == pytest.approx(150 / 255)
    assert measure_picture(solid(200, 100, 50))["saturation"] == pytest.approx(150 / 255)
    checks = PIL.Image.fromarray(np.uint8(255 * (np.indices((64, 64)).sum(axis=0) // 8 % 2))).convert("RGB")
    assert measure_picture(checks)["contrast"] == pytest.approx(0.5, abs=0.02)
    assert measure_picture(checks)["edge_density"] > 0.1


def test_arousal_and_valence_are_ranks_and_survive_saving(tmp_path):
    generator = np.random.default_rng(0)
    measured = [dict(zip(AROUSAL + VALENCE, generator.random(5), strict=True)) for _ in range(400)]
    rule = MoodRule.fit(measured)
    rule.save(tmp_path / "mood.json")
    loaded = MoodRule.load(tmp_path / "mood.json")
    image = photograph()
    assert loaded(image) == rule(image)
    assert all(0 <= value <= 1 for value in rule(image))
    assert rule(solid(250, 245, 230))[1] > rule(solid(5, 5, 30))[1]
    assert [mood_bin(arousal, 0.5)[0] for arousal in (0.0, 0.32, 0.34, 0.67, 1.0)] == [0, 0, 1, 2, 2]


# -------------------------------------------------------------------------------------------------------- the music


def pieces(arousal: float, valence: float) -> list[list]:
    return [
        compose(genre, arousal, valence, np.random.default_rng(seed))
        for seed, genre in enumerate(len(INSTRUMENTS) * [*GENRES])
    ]


def test_varied_crops_meet_clips_of_nearly_their_mood_and_leave_the_picture_behind(tmp_path):
    pictures = [Picture(tmp_path / f"{seed}.png", "package", "1", "me", "CC0", "a place") for seed in range(3)]
    for seed, picture in enumerate(pictures):
        photograph(seed, 90, 70).save(picture.path)
    moods = np.random.default_rng(0).random((2000, 2)).tolist()
    clips = [{"audio": f"{i}.flac", "arousal": a, "valence": v, "picture": "0"} for i, (a, v) in enumerate(moods)]
    generator = np.random.default_rng(1)
    rule = MoodRule.fit([dict(zip(AROUSAL + VALENCE, generator.random(5) * 0.7, strict=True)) for _ in range(400)])
    rows = write_varied(pictures, clips, rule, Namespace(output=tmp_path, varied_crops=60, seed=0))
    assert len(rows) == 60 * CLIPS_PER_VARIED_CROP
    assert [json.loads(line) for line in (tmp_path / "train_varied.jsonl").read_text().splitlines()] == rows
    moods = []
    for row in rows:
        with PIL.Image.open(tmp_path / row["image"]) as crop:
            moods.append(rule(crop))
        assert moods[-1] == pytest.approx((row["arousal"], row["valence"]), abs=0.1)
        assert row["audio"] == clips[int(row["audio"].removesuffix(".flac"))]["audio"]
    alone = {f"package/{seed}" for seed in range(3)}
    shown = {row["picture"] for row in rows}
    assert alone <= shown and all(set(names.split(" and ")) <= alone for names in shown - alone)
    assert any(" and " in names for names in shown)
    # One picture, many moods.
    own = [mood for mood, row in zip(moods, rows, strict=True) if row["picture"] == "package/1"]
    assert np.std(own, axis=0).min() > 0.05


def test_a_combined_crop_shows_both_and_repeats():
    white, black = solid(255, 255, 255), solid(0, 0, 0)
    combined = [combine(white, black, np.random.default_rng(seed)) for seed in range(20)]
    shares = [np.asarray(image).mean() / 255 for image in combined]
    assert all(image.size == white.size for image in combined)
    assert 0.3 < np.mean(shares) < 0.7 and np.mean([0.05 < share < 0.95 for share in shares]) > 0.6
    assert combined[3] == combine(white, black, np.random.default_rng(3))


def test_a_crop_is_varied_from_barely_to_strongly():
    crop = photograph().convert("RGB")
    varied = [np.asarray(vary(crop, np.random.default_rng(seed)), dtype=float) for seed in range(40)]
    changes = [np.abs(image - np.asarray(crop)).mean() for image in varied]
    assert min(changes) < 8 and max(changes) > 25


def test_arousal_decides_tempo_density_drums_and_velocity():
    calm, stirred = pieces(0.1, 0.5), pieces(0.9, 0.5)
    assert tempo_of(0) == 60 and tempo_of(1) == 160
    assert min(map(len, stirred)) > max(map(len, calm))
    assert not any(note.channel == DRUM_CHANNEL for piece in calm for note in piece)
    assert all(any(note.channel == DRUM_CHANNEL for note in piece) for piece in stirred)
    velocities = [np.mean([note.velocity for piece in some for note in piece]) for some in (calm, stirred)]
    assert velocities[1] > velocities[0] + 20


def test_valence_decides_mode_and_register():
    def mean_key(valence):
        return np.mean([note.key for piece in pieces(0.1, valence) for note in piece])

    assert mean_key(1.0) - mean_key(0.0) == pytest.approx(36, abs=4)
    for valence, third in ((0.9, 4), (0.1, 3)):
        keys = [note.key % 12 for note in compose("waltz", 0.1, valence, np.random.default_rng(3))]
        # Every progression starts with the tonic triad, whose bass comes first.
        tonic = min(compose("waltz", 0.1, valence, np.random.default_rng(3)), key=lambda n: (n.start, n.key))
        assert (tonic.key + third) % 12 in keys and (tonic.key + 7 - third) % 12 not in keys


def test_the_same_seed_composes_the_same_piece_and_nothing_starts_after_the_end():
    first, again = (compose("blues", 0.6, 0.4, np.random.default_rng(7)) for _ in range(2))
    assert first == again != compose("blues", 0.6, 0.4, np.random.default_rng(8))
    assert all(0 <= note.start < DURATION and note.start < note.end for note in first)


# --------------------------------------------------------------------------------------------------- what is measured


def test_measurements_of_known_signals():
    clicks = np.zeros_like(TIME, dtype=np.float32)
    for start in np.arange(0.25, 5.0, 0.5):
        index = int(start * SAMPLING_RATE)
        decay = np.exp(-40 * TIME[: len(TIME) - index])
        clicks[index:] += (decay * np.sin(2 * np.pi * 880 * TIME[: len(decay)])).astype(np.float32)
    assert onset_rate(clicks, SAMPLING_RATE) == pytest.approx(2.0, abs=0.25)
    assert register(tones(60), SAMPLING_RATE) == pytest.approx(60, abs=1)
    assert register(tones(84), SAMPLING_RATE) == pytest.approx(84, abs=1)
    assert major_minor(tones(60, 64, 67, 72), SAMPLING_RATE) > 0.02
    assert major_minor(tones(57, 60, 64, 69), SAMPLING_RATE) < -0.02


def test_noise_and_tones_are_told_apart():
    noise = np.random.default_rng(0).standard_normal(len(TIME)).astype(np.float32)
    assert spectral_flatness(noise) == pytest.approx(0.56, abs=0.03) and spectral_flatness(tones(69)) < 1e-3
    assert harmonic_to_noise(noise, SAMPLING_RATE) < 3 < 20 < harmonic_to_noise(tones(69), SAMPLING_RATE)
    # A tone in noise of a tenth of its power has a ratio of 10 dB.
    mixed = tones(69) + noise * np.sqrt(0.05)
    assert harmonic_to_noise(mixed.astype(np.float32), SAMPLING_RATE) == pytest.approx(10, abs=2)
    assert set(measure_music(tones(60), SAMPLING_RATE)) >= {"onset_rate", "drum_presence", "loudness"}


# ---------------------------------------------------------------------------------------------------------- training


def loop(path, steps: int, until: int) -> Training:
    torch.manual_seed(0)
    args = Namespace(learning_rate=1e-2, steps=steps, minutes=float("inf"), seed=0)
    training = Training(torch.nn.Linear(3, 2), path, args)

    def take_step(generator):
        if training.step == until:
            raise KeyboardInterrupt
        loss = training.module(torch.randn(8, 3, generator=generator)).square().mean()
        training.update(loss)
        return {"loss": loss}

    try:
        assert run(training, take_step)
    except KeyboardInterrupt:
        training.save()
    return training


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path):
    whole = loop(tmp_path / "whole.safetensors", 60, until=-1)
    loop(tmp_path / "parts.safetensors", 60, until=23)
    parts = loop(tmp_path / "parts.safetensors", 60, until=-1)
    assert whole.step == parts.step == 60
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, parts.parameters[name])
        assert torch.equal(whole.average[name], parts.average[name])
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_zero_for_the_right_prediction(prediction_type):
    scheduler = create_scheduler(0.0015, 0.0195, prediction_type)
    latents = torch.randn(4, 8, 64, 8)

    class Oracle(torch.nn.Module):
        def forward(self, noisy, timesteps):
            alpha = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
            noise = (noisy - alpha.sqrt() * latents) / (1 - alpha).sqrt()
            velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
            return Namespace(sample=velocity if prediction_type == "v_prediction" else noise)

    assert noise_loss(Oracle(), scheduler, latents, torch.Generator().manual_seed(0)) < 1e-4


def test_the_small_models_fit_together():
    torch.manual_seed(0)
    components = untrained_components(mel_bands=64)
    processor = create_processor(["a photograph of the sky", "slow dark music"])
    clip = create_clip(processor.tokenizer)
    components["image_tokenizer"] = processor.tokenizer
    components["image_text_encoder"] = CLIPTextModel(clip.config.text_config).eval()
    components |= {
        "vae": create_vae(),
        "image_vae": create_image_vae(),
        "vocoder": create_vocoder(torch.randn(4, 40, 64)),
    }
    components |= {"image_unet": create_image_unet(128), "unet": create_unet(32)}
    components["scheduler"] = create_scheduler(0.0015, 0.0195, "v_prediction")
    components["synapse"] = VisualSynapse.from_unets(components["image_unet"], components["unet"])
    pipe = MelFusionPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    audio = pipe(photograph(), "a waltz", num_inference_steps=2, num_inversion_steps=2).audios
    assert audio.shape == (1, int(DURATION * SAMPLING_RATE)) and np.isfinite(audio).all()
    assert sum(model.num_parameters() for model in (components["unet"], components["image_unet"])) < 12e6


# ---------------------------------------------------------------------------------------------------- the real set

SCENARIO = """
[scenario]
    {SCENARIO_MUSIC "wanderer.ogg"}
    [story]
        [part]
            story= _ "Without a painting."
        [/part]
        [part]
            background=story/winter.jpg
            story= _ "The <i>snow</i>
 lay deep."
        [/part]
        [part]
            music=sad.ogg
            [background_layer]
                image="story/king.png~O(50%)"
            [/background_layer]
            story="The king was dead."
        [/part]
        [part]
            background=story/fall.jpg
            story= _ "Music plays on."
        [/part]
    [/story]
    [event]
        image=story/winter.jpg
    [/event]
    [story]
        [part]
            background=story/fall.jpg
            story= _ "Another story."
        [/part]
    [/story]
[/scenario]
"""


def write_clips(folder, count=3):
    """A data set of `count` short chords, the same for training and validation."""
    folder.mkdir()
    rows = [{"audio": f"{index}.flac"} for index in range(count)]
    for index, row in enumerate(rows):
        soundfile.write(folder / row["audio"], 0.1 * tones(60 + index, 64 + index, 67 + index), SAMPLING_RATE)
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_stage(main, monkeypatch, folder, *options):
    arguments = ("--data", folder / "data", "--output", folder / "out", *options)
    monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments)])
    main()


def test_the_decoder_learns_while_the_latents_are_kept(tmp_path, monkeypatch, capsys):
    write_clips(tmp_path / "data")
    torch.manual_seed(1)
    start = create_vae()
    start.register_to_config(scaling_factor=0.7)
    start.save_pretrained(tmp_path / "start")
    options = ("--start_from", tmp_path / "start", "--keep_latents", "--steps", 2, "--discriminator_from", 1)
    run_stage(train_mel_vae, monkeypatch, tmp_path, *options)
    trained = AutoencoderKL.from_pretrained(tmp_path / "out/components/vae")
    assert trained.config.scaling_factor == 0.7 and "done: validation log-mel L1" in capsys.readouterr().out
    before, after = start.state_dict(), trained.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith(("encoder.", "quant_conv."))}


def test_the_vocoder_learns_with_and_without_a_discriminator(tmp_path, monkeypatch, capsys):
    write_clips(tmp_path / "data")
    options = ("--batch_size", 2, "--discriminator_from", 1)
    run_stage(train_vocoder, monkeypatch, tmp_path, *options, "--steps", 2)
    assert "done: validation log-mel L1" in capsys.readouterr().out
    create_vae().save_pretrained(tmp_path / "vae")
    run_stage(train_vocoder, monkeypatch, tmp_path, *options, "--steps", 3, "--vae", tmp_path / "vae")
    steps = [load_file(tmp_path / f"out/state/{name}.safetensors")["step"] for name in ("vocoder", "discriminator")]
    assert [int(step) for step in steps] == [3, 2]
    MusicVocoder.from_pretrained(tmp_path / "out/components/vocoder")


def test_griffin_lim_gives_a_sound_of_that_spectrogram():
    noise = 0.01 * torch.randn(1, 32000, generator=torch.Generator().manual_seed(0))
    mels = log_mel_spectrogram(noise + torch.from_numpy(0.1 * tones(60, 63, 67))[None, :32000])
    again = griffin_lim(mels)
    errors = [(log_mel_spectrogram(again) - expected).abs().mean().item() for expected in (mels, mels.flip(-1))]
    assert again.shape == (1, 32000) and errors[0] < 0.5 < 0.8 < errors[1]


def test_what_repeats_with_each_frame_is_told_from_notes():
    time = torch.arange(48000) / SAMPLING_RATE
    buzz, note = (sum(torch.sin(2 * np.pi * n * hz * time) for n in (1, 2, 3)) for hz in (400, 440))
    assert frame_rate_share(buzz[None]) > 0.99 and frame_rate_share(note[None]) < 0.01
    assert frame_rate_share(torch.randn(4, 48000)) == pytest.approx(0.05, abs=0.01)


def test_segments_sound_as_their_spectrograms_say():
    waveforms = torch.from_numpy(np.stack([0.2 * tones(60, 64), 0.2 * tones(57, 72)])) + 0.01 * torch.randn(2, 81920)
    mels = log_mel_spectrogram(waveforms)
    segments, sounds = draw_segments(2, mels, (waveforms * 32767).short(), torch.Generator().manual_seed(0))
    assert segments.shape == (2, 144, 64) and sounds.shape == (2, 96 * 160)
    # The outer frames of a cut see its edge.
    torch.testing.assert_close(log_mel_spectrogram(sounds)[:, 4:-4], segments[:, 28:-28], atol=0.02, rtol=0)


def test_the_wrong_third_costs_more_than_the_wrong_phase():
    major, minor = (torch.from_numpy(0.2 * tones(*keys))[None, :15360] for keys in ((60, 64, 67), (60, 63, 67)))
    later = torch.from_numpy(0.2 * tones(60, 64, 67))[None, 5000:20360]
    assert spectral_losses(major, major)["spectral"] == 0
    wrong, shifted = (spectral_losses(other, major) for other in (minor, later))
    assert wrong["spectral"] > 2 * shifted["spectral"]


def test_clips_are_judged_in_all_and_instrument_by_instrument(tmp_path, monkeypatch):
    # New processes import for longer than they measure sixteen clips.
    monkeypatch.setattr("judge.ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(workers))
    create_classifier().save_pretrained(tmp_path)
    create_feature_extractor().save_pretrained(tmp_path)
    rows, waveforms = [], []
    for index in range(16):
        mood = {"arousal": index % 8 / 7, "valence": float(index % 2)}
        rows.append({"picture": f"{index // 2}", "instrument": ("organ", "piano")[index // 8]} | mood)
        beats = np.floor(TIME * (1 + index % 8)) / (1 + index % 8)
        # Ever more notes; the organ's pieces all sound alike.
        keys = (60, 64 if index % 2 else 63, 67)
        waveforms.append(0.1 * tones(*keys) * (np.exp(-8 * (TIME - beats)) if index > 7 else 1))
    found = judge(tmp_path, torch.from_numpy(np.stack(waveforms)).float(), rows)
    estimates = {name: values[0] for name, values in found.items()}
    assert estimates["onset_rate ~ arousal, piano"] > 0.9 > estimates["onset_rate ~ arousal, organ"]
    assert estimates["mode agreement"] == 1 and "onset_rate ~ arousal, flute" not in found
    assert rank_correlation(np.array([[1.0, 2.0], [1.0, 3.0]])) == 0
    lines = format_judgement(found, found).splitlines()
    assert len(lines) == len(found) and sum("100% of real" in line for line in lines) >= 4


def test_story_screens_are_read_with_their_music():
    screens = read_screens(SCENARIO)
    assert screens == [
        Screen("story/winter.jpg", "wanderer.ogg", "The <i>snow</i>\n lay deep."),
        Screen("story/king.png", "sad.ogg", "The king was dead."),
        Screen("story/fall.jpg", "sad.ogg", "Music plays on."),
        Screen("story/fall.jpg", "wanderer.ogg", "Another story."),
    ]
    assert clean(screens[0].text) == "The snow lay deep."


def test_a_scenario_without_music_has_no_triplets():
    assert read_screens(SCENARIO.replace("wanderer.ogg", "").replace("music=sad.ogg", "")) == []


# A convolution as in the small checkpoint's music UNet, its output one column wide.
NARROW_CONVOLUTION = """
import torch
torch.set_num_threads(2)
torch.manual_seed(0)
convolution, inputs = torch.nn.Conv2d(96, 96, 3, stride=2, padding=1), torch.randn(2, 96, 16, 2)
with torch.no_grad():
    expected = convolution(inputs)
    found = convolution.bfloat16()(inputs.bfloat16()).float()
print(float((found - expected).abs().max() / expected.abs().max()), flush=True)
"""
SETUPS = {
    "the small checkpoint's stages": "training_loop.stage_parser('', 1, 1, 1.0)",
    "train_melfusion.py": "train_melfusion.make_accelerator(train_melfusion.parse_arguments('', ["
    "'--train_data=' + train_melfusion.__file__, '--output_dir=y', '--mixed_precision=bf16',"
    "'--pretrained_model_name_or_path=z']))",
}
# A new process, in which nothing has been computed yet; each setup in a copy of it.
EACH_SETUP = f"""
import os, sys
import train_melfusion, training_loop

for setup in sys.argv[1:]:
    if not os.fork():
        exec(setup)
        exec({NARROW_CONVOLUTION!r})
        os._exit(0)
    os.wait()
"""


def test_training_in_bfloat16_computes_narrow_convolutions_also_on_processors_with_amx():
    """Without the environment variable that the scripts set, the error there is as large as the values."""
    environment = {name: value for name, value in os.environ.items() if name != "ONEDNN_MAX_CPU_ISA"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-c", EACH_SETUP, *SETUPS.values()]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    errors = [float(line) for line in result.stdout.splitlines()]
    assert len(errors) == len(SETUPS) and max(errors) < 0.02, result.stdout + result.stderr

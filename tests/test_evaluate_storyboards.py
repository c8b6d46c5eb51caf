import json

import evaluate
import numpy as np
import pytest
import soundfile
from conftest import assert_near, photograph, rounding_error
from evaluate_storyboards import BLOCK, group_rows, score_boundaries
from evaluate_systems import row_generator
from untrained import untrained_components

from melfusion_pipeline import MelFusionPipeline

SECONDS, RATE = 1.12, 16000
CAPTIONS = ["a calm piano", "loud drums", "a slow cello", "a harp", "a choir"]
STEPS = {"num_inference_steps": 2, "num_inversion_steps": 2}


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A set of five rows in storyboards of two: two pieces with a boundary, and one of a single picture."""
    folder = tmp_path_factory.mktemp("storyboards")
    MelFusionPipeline(**untrained_components(mel_bands=64, latent_frames=28)).save_pretrained(folder / "checkpoint")
    lines = []
    for row, caption in enumerate(CAPTIONS):
        photograph(seed=row).save(folder / f"{row}.png")
        noise = np.random.default_rng(row).uniform(-0.4, 0.4, round(1.2 * RATE))
        soundfile.write(folder / f"{row}.wav", noise, RATE)
        lines.append(json.dumps({"image": f"{row}.png", "audio": f"{row}.wav", "caption": caption}))
    (folder / "set.jsonl").write_text("\n".join(lines))
    encoded, encode = [], MelFusionPipeline._encode_images

    def count(pipe, images, *arguments, **kwargs):
        encoded.extend(image.tobytes() for image in images)
        return encode(pipe, images, *arguments, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MelFusionPipeline, "_encode_images", count)
        return folder, run(folder), encoded


def run(folder, *arguments, systems=("melfusion", "storyboard"), pictures=("--storyboard_pictures", "2")):
    named = {
        "checkpoint": folder / "checkpoint",
        "triplets": folder / "set.jsonl",
        "output": folder / "output",
    } | STEPS
    evaluate.main([*(f"--{name}={value}" for name, value in named.items()), *pictures, *arguments,
                   "--systems", *systems])  # fmt: skip
    return json.loads((folder / "output" / "results.json").read_text())


def test_a_picture_is_encoded_once_for_its_clip_and_its_storyboard(scored):
    encoded = scored[2]
    assert len(encoded) == len(set(encoded)) == 5


def test_stretches_of_one_piece_are_scored_like_clips_of_single_pictures(scored):
    folder, results, _ = scored
    assert set(results["systems"]["storyboard"]["scores"]) == set(results["systems"]["melfusion"]["scores"])
    assert results["systems"]["storyboard"]["n"] == 5 and results["settings"]["storyboard_pictures"] == 2
    table = (folder / "output" / "results.md").read_text()
    for name in ("melfusion", "storyboard"):
        estimate, low, high = results["boundaries"][name]["contrast"]
        assert low <= estimate <= high
        assert f"| {name} | {estimate:.4g} [{low:.4g}, {high:.4g}] |" in table


def test_clips_of_a_storyboard_are_the_piece_cut_where_its_pictures_change(scored):
    folder = scored[0]
    pipe = MelFusionPipeline.from_pretrained(folder / "checkpoint")
    piece = pipe(
        [photograph(seed=2), photograph(seed=3)],
        CAPTIONS[2:4],
        image_start_in_s=[0.0, SECONDS],
        audio_length_in_s=2 * SECONDS,
        generator=row_generator(0, 2),
        **STEPS,
    ).audios[0]
    found = [soundfile.read(folder / "output" / "storyboard" / f"{row}.flac")[0] for row in (2, 3)]
    assert [len(clip) for clip in found] == 2 * [round(SECONDS * RATE)]
    # A step of 16 bits, in which FLAC is written.
    found_piece, expected = np.concatenate(found), piece / max(1, np.abs(piece).max())
    assert np.abs(found_piece - expected).max() < 2**-15 + rounding_error(piece)
    alone = soundfile.read(folder / "output" / "melfusion" / "3.flac")[0]
    assert np.abs(alone - found[1]).max() > 0.01


def test_a_storyboard_that_lacks_a_stretch_is_made_again_and_the_others_are_not(scored):
    folder, results, _ = scored
    clips = sorted((folder / "output" / "storyboard").glob("*.flac"))
    times = [clip.stat().st_mtime_ns for clip in clips]
    clips[1].unlink()
    again = run(folder)
    assert [clip.stat().st_mtime_ns != time for clip, time in zip(clips, times)] == [True, True, False, False, False]
    contrasts = [each["boundaries"]["storyboard"]["contrast"] for each in (again, results)]
    assert_near(*np.array(contrasts, np.float32))
    with pytest.raises(ValueError, match="made otherwise .storyboard_pictures: 2 there, 3 now"):
        run(folder, pictures=("--storyboard_pictures", "3"))


@pytest.mark.parametrize(
    "pictures, message",
    [
        ((), r"\['storyboard'\] cannot be made: give .*`--storyboard_pictures`"),
        (("--storyboard_pictures", "1"), "must be at least 2, but is 1"),
        (("--storyboard_pictures", "4"), "scored in at least 2 storyboards, but there are 1: give more rows"),
    ],
)
def test_numbers_of_pictures_that_make_no_storyboards_are_refused(scored, pictures, message):
    with pytest.raises(ValueError, match=message):
        run(scored[0], "--output", str(scored[0] / "refused"), pictures=pictures)
    assert not (scored[0] / "refused").exists()


def test_neighbours_with_the_same_picture_are_refused():
    rows = [{"row": row, "image": image} for row, image in enumerate("abcaabb")]
    assert [len(group) for group in group_rows(rows, 2)] == [2, 2, 2, 1]
    with pytest.raises(
        ValueError, match="Rows 3 and 4 are neighbours in a storyboard, but have the same picture, 'a'"
    ):
        group_rows(rows, 3)


def crossing(folder, index, rise, centre, seconds=5.12):
    """Two clips of noise whose low half dies away as its high half arises, on a logistic curve."""
    time = (np.arange(round(2 * seconds * RATE)) + 0.5) / RATE - seconds
    share = 0.5 + 0.5 * np.tanh((time - centre) * np.log(9) / rise)
    spectrum = np.fft.rfft(np.random.default_rng(index).normal(size=len(time)))
    low, high = np.where(np.fft.rfftfreq(len(time), 1 / RATE) < 1000, [[1], [0]], [[0], [1]])
    low, high = np.fft.irfft(low * spectrum), np.fft.irfft(high * spectrum)
    # The logarithm of either level is a straight line in the share, as log-mel spectra see it.
    sound = 0.1 * (low * np.exp(-3 * share) + high * np.exp(-3 * (1 - share)))
    paths = [folder / f"{index}-{part}.wav" for part in range(2)]
    for path, stretch in zip(paths, np.split(sound, 2)):
        soundfile.write(path, stretch, RATE, "FLOAT")
    return paths


@pytest.mark.parametrize("rise, centre", [(0.5, 0.0), (2.0, 0.0), (2.0, 0.8), (1.0, -0.4)])
def test_rise_and_centre_of_a_known_change_are_found(tmp_path, rise, centre):
    scores = score_boundaries([crossing(tmp_path, index, rise, centre) for index in range(6)], 5.12, seed=0)
    assert scores["contrast"].low > 2
    assert abs(scores["centre, s"].estimate - centre) <= 2 * BLOCK
    assert rise / 1.3 < scores["rise, s"].estimate < 1.3 * rise


def test_music_that_stays_the_same_has_no_contrast(tmp_path):
    paths = [crossing(tmp_path, index, 0.5, 99.0) for index in range(12)]
    estimate, low, high = score_boundaries(paths, 5.12, seed=0)["contrast"]
    assert low < 1 < high and 0.7 < estimate < 1.4

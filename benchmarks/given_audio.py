"""Measures what becomes of music that is there: variations, stretches made anew, going on, and the best of eight.

python benchmarks/given_audio.py --data build/small/data --components build/small/components

On unseen clips with the small checkpoint's judges. Intervals are of 95%, resampled by clip. Clips that are there are
not made again.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import librosa
import numpy as np
import PIL.Image
import torch
from diffusers.utils.logging import tqdm
from matplotlib.figure import Figure
from transformers import ASTFeatureExtractor, ASTForAudioClassification
from transformers.utils import logging

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.audio import load_audio
from melfusion_pipeline.extractors import ClapExtractor, ClipExtractor
from melfusion_pipeline.metrics import bootstrap_interval
from melfusion_pipeline.waveforms_melfusion import normalize_waveform

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "examples" / "small_checkpoint")]
from best_of import best_first, score_variations  # noqa: E402
from contrastive import mood_texts  # noqa: E402
from judge import rank_correlation  # noqa: E402
from measure_music import onset_rate  # noqa: E402
from train_classifier import labels_of, marginals  # noqa: E402

RATE, CLIP = 16000, 81920
STRENGTHS, STEPS = (0.04, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0), 25
STRETCH, LONGER, VARIATIONS = (2.0, 4.0), 30.0, 8
UNGUIDED = {"guidance_scale": 1.0, "image_guidance_scale": 1.0}
PARTS = ("variations", "stretches", "choosing", "going_on")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=str(ROOT), help="folder or Hub id; default: the bundled one")
    parser.add_argument("--data", type=Path, default=Path("build/small/data"), help="folder that build_data.py wrote")
    parser.add_argument("--components", type=Path, default=Path("build/small/components"), help="has the judges")
    parser.add_argument("--output", type=Path, default=Path("build/given_audio"), help="folder for clips and results")
    parser.add_argument("--clips", type=int, default=100, help="whose stretches are made anew")
    parser.add_argument("--chosen", type=int, default=40, help="of which the best of eight is chosen")
    parser.add_argument("--longer", type=int, default=24, help="that go on")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    return parser.parse_args()


class Music:
    """The clips, and what the pipeline makes of each, kept in files.

    Args:
        arguments: Of the command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.data, self.output = arguments.data, arguments.output
        self.rows = [json.loads(line) for line in (self.data / "test.jsonl").read_text().splitlines()]
        self.rows = self.rows[: max(arguments.clips, arguments.chosen, arguments.longer)]
        self.pipe = MelFusionPipeline.from_pretrained(arguments.checkpoint)
        self.pipe.set_progress_bar_config(disable=True)
        by_arousal = sorted({row["image"]: row["arousal"] for row in self.rows}.items(), key=lambda pair: pair[1])
        third = max(1, len(by_arousal) // 3)
        self.pictures = {"calm": by_arousal[:third], "stirring": by_arousal[-third:]}
        self.features = {}

    def given(self, row: int) -> np.ndarray:
        """The clip of a row: `[samples]`."""
        return load_audio(self.data / self.rows[row]["audio"])[0].mean(dim=0).numpy()

    def picture(self, mood: str, row: int) -> str:
        """A picture of another mood for each row, the same in every run."""
        return self.pictures[mood][(7 * row) % len(self.pictures[mood])][0]

    def make(self, name: str, row: int, image: str, **arguments) -> np.ndarray:
        """What the call makes with the row's caption and a picture, `[variations, samples]`; its row is its seed."""
        path = self.output / name / f"{row}.npy"
        if not path.exists():
            if image not in self.features:
                self.features[image] = self.pipe.encode_image(PIL.Image.open(self.data / image))
            made = self.pipe(
                prompt=self.rows[row]["caption"],
                image_features=self.features[image],
                generator=torch.Generator().manual_seed(row),
                **arguments,
            ).audios
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, made)
        return np.load(path)


class Judge:
    """The classifier, trained on real clips only: which instrument it hears, and which mood.

    It hears all at the level of its training, and what is shorter than its clips again and again: of two seconds
    followed by silence it tells the instrument of a third of real clips, of the same repeated that of nearly all.

    Args:
        folder: Of the classifier.
    """

    def __init__(self, folder: Path) -> None:
        self.model = ASTForAudioClassification.from_pretrained(folder).eval()
        self.extractor = ASTFeatureExtractor.from_pretrained(folder)

    @torch.no_grad()
    def __call__(self, waveforms: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities `[clips, 8]` of the instruments and `[clips, 9]` of the mood bins."""
        filled = [np.resize(waveform, CLIP) for waveform in waveforms]
        waveforms = list(normalize_waveform(torch.from_numpy(np.stack(filled))).numpy())
        inputs = self.extractor(waveforms, sampling_rate=RATE, return_tensors="pt").input_values
        return marginals(torch.cat([self.model(batch).logits for batch in inputs.split(32)]))

    def instruments(self, waveforms: list[np.ndarray]) -> np.ndarray:
        """The instrument heard in each clip, `[clips]`."""
        return self(waveforms)[0].argmax(dim=1).numpy()


def show(name: str, values: np.ndarray, statistic: Callable = np.mean) -> None:
    found = bootstrap_interval(np.asarray(values, dtype=float), statistic)
    print(f"{name:58s} {found.estimate:8.3f} [{found.low:.3f}, {found.high:.3f}]", flush=True)


def between(waveform: np.ndarray, start: float, end: float) -> np.ndarray:
    return waveform[..., round(start * RATE) : round(end * RATE)]


# ------------------------------------------------------------------------------------------------------- variations


def measure_variations(music: Music) -> None:
    """How far variations are from what the VAE keeps of the music, against strength; a PNG."""
    errors = []
    for row in range(4):
        waveform = torch.from_numpy(music.given(row))
        kept = music.pipe.encode_audio(waveform[None])
        arguments = {"audio": waveform, "audio_sampling_rate": RATE, "num_inference_steps": STEPS}
        made = [
            music.make(f"strength{strength}", row, music.rows[row]["image"], strength=strength, output_type="latent",
                       **arguments)
            for strength in STRENGTHS
        ]  # fmt: skip
        errors.append([float((torch.from_numpy(one) - kept).square().mean().sqrt() / kept.std()) for one in made])
    errors = np.array(errors)
    print(
        "strength and the error of the latents over their spread, four clips; monotone:", (np.diff(errors) > 0).all()
    )
    for strength, column in zip(STRENGTHS, errors.T):
        print(f"{strength:5.2f}  {' '.join(f'{error:.3f}' for error in column)}")
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(STRENGTHS, errors.T, marker="o")
    axes.set(xlabel="strength", ylabel="error / spread", title="variation against the VAE's reconstruction", ylim=0)
    figure.savefig(music.output / "strength.png", dpi=120)


# ------------------------------------------------------------------------------------------------------- stretches


def jump(waveform: np.ndarray, place: int, length: int) -> float:
    """The change of level at a place in dB, either side `length` samples, 1e-3 counting as silence."""
    sides = (waveform[place - length : place], waveform[place : place + length])
    before, after = (np.sqrt(np.mean(np.square(side, dtype=np.float64))) + 1e-3 for side in sides)
    return abs(20 * np.log10(after / before))


def describe_place(waveform: np.ndarray, place: int) -> list[float]:
    """The largest step within 5 ms over the level around, and the changes of level over 0.1 s and 0.5 s."""
    step = np.abs(np.diff(waveform[place - 80 : place + 80])).max()
    level = np.sqrt(np.mean(np.square(waveform[place - 1600 : place + 1600], dtype=np.float64))) + 1e-4
    return [step / level, jump(waveform, place, 1600), jump(waveform, place, 8000)]


def measure_joins(given: list[np.ndarray], made: list[np.ndarray]) -> None:
    """Joins beside random places of the real clips."""
    generator = np.random.default_rng(0)
    real = [describe_place(one, place) for one in given for place in generator.integers(8000, len(one) - 8000, 20)]
    joins = [describe_place(one, round(bound * RATE)) for one in made for bound in STRETCH]
    print(f"{len(joins)} joins, {len(real)} random places of real clips: median, 95%, 99%, largest")
    for column, name in enumerate(("largest step over level", "level, 0.1 s, dB", "level, 0.5 s, dB")):
        for what, found in (("joins", joins), ("real clips", real)):
            figures = np.percentile(np.array(found)[:, column], (50, 95, 99, 100))
            print(f"  {name:25s} {what:11s} {' '.join(f'{figure:7.2f}' for figure in figures)}")


def measure_stretches(music: Music, judge: Judge, clips: int) -> None:
    """Seconds 2 to 4 anew with a calm and a stirring picture."""
    given, made = [music.given(row) for row in range(clips)], {}
    for mood in ("calm", "stirring"):
        masks = {"mask_start_in_s": STRETCH[0], "mask_end_in_s": STRETCH[1], "audio_sampling_rate": RATE}
        made[mood] = [
            music.make(f"anew_{mood}", row, music.picture(mood, row), audio=given[row], **masks)[0]
            for row in tqdm(range(clips), desc=f"anew, {mood}")
        ]
    changed = [
        np.abs(np.delete(one - other, np.s_[round(STRETCH[0] * RATE) : round(STRETCH[1] * RATE)])).max()
        for mood in made
        for one, other in zip(made[mood], given)
    ]
    print(f"\nseconds {STRETCH} of {clips} clips anew; largest change of a sample outside: {max(changed)}")
    measure_joins(given, [*made["calm"], *made["stirring"]])
    inside = {mood: [onset_rate(between(one, *STRETCH), RATE) for one in made[mood]] for mood in made}
    show("onsets a second inside, calm picture", inside["calm"])
    show("onsets a second inside, stirring picture", inside["stirring"])
    show("difference", np.subtract(inside["stirring"], inside["calm"]))
    heard_before = judge.instruments([between(one, 0, STRETCH[0]) for one in given])
    for mood in made:
        heard = judge.instruments([between(one, *STRETCH) for one in made[mood]])
        show(f"instrument of the stretch is that of seconds 0 to 2, {mood}", heard == heard_before)
    heard = judge.instruments([between(one, *STRETCH) for one in given])
    show("the same of the given clips themselves", heard == heard_before)


# -------------------------------------------------------------------------------------------------- the best of eight


def measure_choosing(music: Music, judge: Judge, components: Path, clips: int) -> None:
    """The best of eight, chosen by CLAP and IMSM, against the first and, by what did not choose, against all eight."""
    clap, clip = (
        extractor.from_pretrained(components / name)
        for name, extractor in (("clap", ClapExtractor), ("clip", ClipExtractor))
    )
    captions, rows = mood_texts()[0], music.rows[:clips]
    scores, pairs, eights, chosen = [], [], [], []
    for index, row in enumerate(tqdm(rows, desc="eight of each")):
        made = music.make("eight", index, row["image"], num_waveforms_per_prompt=VARIATIONS)
        picture = PIL.Image.open(music.data / row["image"])
        found = score_variations(made, RATE, row["caption"], picture, clap, clip, captions)
        best = best_first(found)[0]
        scores.append([[values[0], values[best]] for values in found.values()])
        pairs.append((made[0], made[best]))
        eights += list(made)
        chosen.append(best)
    print(f"\nbest of {VARIATIONS} against the first, {clips} captions and pictures of their own")
    for name, values in zip(("CLAP", "IMSM"), np.array(scores).transpose(1, 0, 2)):
        show(f"{name} (which chose), first", values[:, 0])
        show(f"{name} (which chose), best minus first", values[:, 1] - values[:, 0])
    truth = labels_of(rows)
    heard = [told.unflatten(0, (-1, VARIATIONS)) for told in judge(eights)]
    for name, told, true in zip(("instrument", "mood bin"), heard, (truth // 9, truth % 9)):
        likely = told.gather(2, true[:, None, None].expand(-1, VARIATIONS, 1))[..., 0]
        right = told.argmax(dim=2) == true[:, None]
        for what, values in (("classifier hears", right.double()), ("log-probability of", likely.double())):
            values = values.numpy()
            best = values[range(len(rows)), chosen]
            show(f"{what} the {name}, all", values.mean(axis=1))
            show(f"{what} the {name}, best minus first", best - values[:, 0])
            show(f"{what} the {name}, best minus all", best - values.mean(axis=1))
    arousal = [row["arousal"] for row in rows]
    for which, name in enumerate(("first", "best")):
        rates = [onset_rate(pair[which], RATE) for pair in pairs]
        show(f"Spearman of onset rate and arousal, {name}", np.c_[rates, arousal], rank_correlation)
    halves = [judge.instruments([between(pair[0], *span) for pair in pairs]) for span in ((0, 2), STRETCH)]
    show("two stretches of 2 s of a generated clip: same instrument", halves[0] == halves[1])


# ------------------------------------------------------------------------------------------------------- going on


def chroma(waveform: np.ndarray) -> np.ndarray:
    """The mean energy of the twelve notes, without its own mean, of length 1: `[12]`."""
    harmonic = librosa.effects.harmonic(waveform, margin=2.0)
    notes = (np.abs(librosa.cqt(harmonic, sr=RATE, fmin=librosa.midi_to_hz(36), n_bins=60)) ** 2).mean(axis=1)
    notes = np.sqrt(notes.reshape(5, 12).sum(axis=0))
    return (notes - notes.mean()) / np.linalg.norm(notes - notes.mean())


def measure_keys(music: Music, clips: int) -> None:
    """Do generated clips have a key of their own? Two of each caption and picture, with the guidance and without."""
    print(f"\nchroma correlation in {clips} generated clips of 5.12 s")
    for name, scales in (("guided", {}), ("unguided", UNGUIDED)):
        keys = []
        for row in tqdm(range(clips), desc=f"keys, {name}"):
            made = music.make(f"keys_{name}", row, music.rows[row]["image"], num_waveforms_per_prompt=2, **scales)
            keys.append([chroma(half) for one in made for half in np.array_split(one, 2)])
        show(f"{name}: halves of a clip", [np.dot(first, second) for first, second, _, _ in keys])
        show("halves of two clips of one caption and picture", [np.dot(key[0], key[3]) for key in keys])


def measure_going_on(music: Music, judge: Judge, clips: int) -> None:
    """From 5 to 30 s: key and instrument of what goes on against the given part, beside unrelated pieces."""
    given = [music.given(row) for row in range(clips)]
    keys, heard = np.array([chroma(one) for one in given]), judge.instruments(given)
    print(f"\n{clips} clips go on to {LONGER} s")
    halves = [[chroma(half) for half in np.array_split(one, 2)] for one in given]
    show("chroma correlation of the given parts' halves", [np.dot(*pair) for pair in halves])
    show("instruments of two given parts are the same", (heard[:, None] == heard).mean(axis=1) - 1 / clips)
    for folder, scales in (("longer", {}), ("longer_unguided", UNGUIDED)):
        print(f"{folder}: {scales or 'the defaults'}")
        further = []
        for row in tqdm(range(clips), desc=folder):
            arguments = {"audio": given[row], "audio_sampling_rate": RATE, "audio_length_in_s": LONGER, **scales}
            made = music.make(folder, row, music.rows[row]["image"], **arguments)[0]
            assert np.array_equal(made[: len(given[row])], given[row])
            further.append(made[len(given[row]) :])
        for name, seconds in (("the first 2.5 s", 2.5), ("all", LONGER)):
            correlations = np.array([chroma(between(one, 0, seconds)) for one in further]) @ keys.T
            own = np.diagonal(correlations)
            others = (correlations.sum(axis=1) - own) / (clips - 1)
            show(f"chroma correlation of {name} with the given part", own)
            show("with other pieces' given parts", others)
            show("difference", own - others)
        parts = [judge.instruments([one[start * RATE :][: 5 * RATE] for one in further]) for start in (0, 10, 19)]
        for name, part in zip(("first", "middle", "last"), parts):
            show(f"instrument of the {name} five seconds is the given part's", part == heard)


def main() -> None:
    arguments = parse_arguments()
    # Those of the extractors, of which each clip has six.
    logging.disable_progress_bar()
    music, judge = Music(arguments), Judge(arguments.components / "classifier")
    if "variations" in arguments.parts:
        measure_variations(music)
    if "stretches" in arguments.parts:
        measure_stretches(music, judge, arguments.clips)
    if "choosing" in arguments.parts:
        measure_choosing(music, judge, arguments.components, arguments.chosen)
    if "going_on" in arguments.parts:
        measure_keys(music, arguments.longer)
        measure_going_on(music, judge, arguments.longer)


if __name__ == "__main__":
    main()

"""Measures whether windows leave seams in long pieces, beside what any place in a real clip is like.

python benchmarks/seams.py --data build/small/data --output build/seams

Pieces of one picture each, decoded in one pass, so that only the denoising is cut. A seam is the middle half of an
overlap, where neighbouring windows mix about equally; beside it stands the rest within 2.56 s. Three measures, then a
logistic regression that looks for seams in pieces it has not seen. Also says how far epsilon prediction is from v
prediction, and draws spectrograms. Needs the extra `demo`. The same command resumes.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
import PIL.Image
import torch
from accelerate.utils import tqdm
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.audio import load_audio, log_mel_spectrogram, save_audio
from melfusion_pipeline.metrics import bootstrap_interval
from melfusion_pipeline.windows_melfusion import Windows

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))
from evaluate_systems import claim_folder, digest_components, row_generator  # noqa: E402

PROMPTS = ("a waltz for piano", "guitar playing a march")
SECONDS, AROUND = 25.6, 2.56
# Frames of 10 ms, and how many make a block of the detector.
FRAME, BLOCK, WINDOW = 0.01, 8, 512
SHIFTS = 12
OVERLAPS = (0.125, 0.25, 0.5)
MEASURES = ("log-mel above band 40", "level, log", "spectral flux, log ratio")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=str(ROOT), help="folder or Hub id; default: the bundled one")
    parser.add_argument("--data", type=Path, default=Path("build/small/data"), help="folder that build_data.py wrote")
    parser.add_argument("--output", type=Path, default=Path("build/seams"), help="folder for the pieces and figures")
    parser.add_argument("--pieces", type=int, default=12)
    parser.add_argument("--overlaps", type=float, nargs="+", default=OVERLAPS)
    parser.add_argument("--clips", type=int, default=200, help="real ones, from the test set")
    return parser.parse_args()


def comb_weight(windows: Windows, index: int) -> torch.Tensor:
    """In place of `Windows.weight`: frames are taken whole, by turns, from the windows that hold them."""
    first = windows.starts[index]
    frames = torch.arange(first, first + windows.length)
    holders = torch.stack([(frames >= start) & (frames < start + windows.length) for start in windows.starts])
    rank = holders[:index].sum(dim=0)
    return (frames % holders.sum(dim=0) == rank).to(torch.float64)


@contextmanager
def predicting_epsilon(pipe: MelFusionPipeline) -> Iterator[None]:
    """Lets a UNet that predicts v predict epsilon, and tells the scheduler: exact, but for rounding."""

    def convert(module, arguments, output):
        noisy, timestep = arguments[:2]
        alpha = pipe.scheduler.alphas_cumprod[timestep].sqrt()
        # The decoder may have a guidance branch more than the encoder; all branches see the same latents.
        of_one = math.gcd(len(noisy), len(output.sample))
        noisy = noisy[:of_one].repeat(len(output.sample) // of_one, 1, 1, 1)
        output.sample = alpha * output.sample + (1 - alpha**2).sqrt() * noisy
        return output

    hook, before = pipe.unet.register_forward_hook(convert), pipe.scheduler
    pipe.scheduler = type(before).from_config(before.config, prediction_type="epsilon")
    try:
        yield
    finally:
        pipe.scheduler = before
        hook.remove()


def make_latents(pipe: MelFusionPipeline, features, index: int, weights: str, overlap: float) -> torch.Tensor:
    """Denoises piece `index`: `weights` is triangle, comb or, for a single pass, none."""
    with patch.object(Windows, "weight", comb_weight) if weights == "comb" else nullcontext():
        return pipe(
            prompt=PROMPTS[index % 2],
            image_features=features,
            audio_length_in_s=SECONDS,
            window_length_in_s=SECONDS if weights == "none" else None,
            window_overlap=overlap,
            generator=row_generator(0, index),
            output_type="latent",
        ).audios


@torch.no_grad()
def make_pieces(arguments: argparse.Namespace, cells: list[tuple[str, float]]) -> None:
    """Makes the pieces that are not there yet, and prints how far epsilon prediction is from v prediction."""
    pipe = MelFusionPipeline.from_pretrained(arguments.checkpoint)
    pipe.set_progress_bar_config(disable=True)
    rows = [json.loads(line) for line in (arguments.data / "test.jsonl").read_text().splitlines()]
    pictures = {row["picture"]: row["image"] for row in sorted(rows, key=lambda row: row["image"])}
    chosen = np.random.default_rng(0).permutation(sorted(pictures.values()))[: arguments.pieces].tolist()
    settings = {"weights": digest_components(pipe.components), "seconds": SECONDS, "prompts": PROMPTS}
    for cell in cells:
        claim_folder(folder_of(arguments, cell), settings)
    for index, name in enumerate(tqdm(chosen, desc="Making pieces")):
        missing = [cell for cell in cells if not (folder_of(arguments, cell) / f"{index}.flac").exists()]
        features = pipe.encode_image(PIL.Image.open(arguments.data / name)) if missing or index == 0 else None
        for cell in missing:
            latents = make_latents(pipe, features, index, *cell)
            mel = pipe.decode_latents(latents, SECONDS)
            waveform = pipe.mel_spectrogram_to_waveform(mel, SECONDS, SECONDS)[0]
            save_audio(folder_of(arguments, cell) / f"{index}.flac", waveform, pipe.sampling_rate)
        if index == 0 and pipe.scheduler.config.prediction_type == "v_prediction":
            for weights in ("triangle", "comb"):
                by_v = make_latents(pipe, features, index, weights, 0.25)
                with predicting_epsilon(pipe):
                    by_epsilon = make_latents(pipe, features, index, weights, 0.25)
                difference = ((by_epsilon - by_v).abs().max() / by_v.abs().max()).item()
                print(f"{weights}: epsilon and v prediction differ by {difference:.1e} of the latents' largest")


def folder_of(arguments: argparse.Namespace, cell: tuple[str, float]) -> Path:
    return arguments.output / f"{cell[0]}-{cell[1]:g}"


def seams(overlap: float, length: int = WINDOW) -> list[slice]:
    """The middle halves of overlaps in frames of 10 ms."""
    windows = Windows.lay_out(round(SECONDS / FRAME), length, round(overlap * length))
    found = []
    for start, before in zip(windows.starts[1:], windows.starts):
        shared = before + length - start
        found.append(slice(start + shared // 4, start + shared - shared // 4))
    return found


def describe(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Measures a clip in frames of 10 ms: its log-mel spectrum `[frames, 64]` and its flux `[frames]`."""
    waveform, _ = load_audio(path)
    mel = log_mel_spectrogram(waveform.mean(dim=0)).double().numpy()
    rises = np.diff(mel, axis=0, prepend=mel[:1]).clip(min=0)
    return mel, rises.mean(axis=1)


def compare(mel: np.ndarray, flux: np.ndarray, places: list[slice]) -> np.ndarray:
    """What each place has more than the rest within 2.56 s of its middle, `[places, measures]`."""
    level = np.log(np.exp(2 * mel).mean(axis=1)) / 2
    anywhere = np.zeros(len(mel), bool)
    for place in places:
        anywhere[place] = True
    rows = []
    for place in places:
        middle, reach = (place.start + place.stop) // 2, round(AROUND / FRAME)
        rest = np.flatnonzero(~anywhere[max(0, middle - reach) : middle + reach]) + max(0, middle - reach)
        high, loud = (values[place].mean() - values[rest].mean() for values in (mel[:, 40:], level))
        rows.append([high, loud, math.log(flux[place].mean() / flux[rest].mean())])
    return np.array(rows)


def at_random_places(clips: list[tuple], length: int) -> np.ndarray:
    """The same comparison at one random place in each real clip, `[clips, measures]`."""
    generator, rows = np.random.default_rng(0), []
    for mel, flux in clips:
        start = int(generator.integers(len(mel) // 4, len(mel) * 3 // 4 - length // 2)) - length // 2
        rows.append(compare(mel, flux, [slice(max(0, start), max(0, start) + length)])[0])
    return np.array(rows)


def detect(pieces: list[tuple], places: list[slice], moved: int = 0) -> np.ndarray:
    """Looks for seams with what is learned from other pieces; gives each piece's area under the curve.

    With `moved` it looks for places that are as many blocks away from the seams, as far apart from each other.

    A block of 80 ms is described by its spectrum, level and flux and those of its two neighbours, less the piece's
    mean. Half a window at either end is left out: there are no seams, and beginnings sound like beginnings.
    """
    inside = np.zeros(len(pieces[0][0]))
    for place in places:
        inside[place] = 1
    inside = np.roll(inside.reshape(-1, BLOCK).mean(axis=1) > 0.5, moved)
    edge = round(AROUND / FRAME) // BLOCK
    features, labels, groups = [], [], []
    for index, (mel, flux) in enumerate(pieces):
        level = np.log(np.exp(2 * mel).mean(axis=1)) / 2
        blocks = np.column_stack([mel, np.log(flux + 1e-3), level])
        blocks = blocks.reshape(-1, BLOCK, blocks.shape[1]).mean(axis=1)
        blocks = blocks - blocks.mean(axis=0)
        near = np.column_stack([np.roll(blocks, 1, axis=0), blocks, np.roll(blocks, -1, axis=0)])
        features.append(near[edge:-edge])
        labels.append(inside[edge:-edge])
        groups += [index] * len(labels[-1])
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000, class_weight="balanced"))
    features, folds = np.concatenate(features), GroupKFold(min(6, len(pieces)))
    found = cross_val_predict(
        model, features, np.concatenate(labels), groups=groups, cv=folds, method="decision_function"
    )
    return np.array([roc_auc_score(label, part) for label, part in zip(labels, np.split(found, len(pieces)))])


def print_table(arguments: argparse.Namespace, cells: list[tuple[str, float]], clips: list[tuple]) -> None:
    print(f"\nSeams less the rest within {AROUND} s; 'within': in the middle 95% of {len(clips)} places in real clips")
    print(f"| weights | overlap | {' | '.join(f'{name} | within' for name in MEASURES)} | detector, AUC | moved |")
    print("|---" * (4 + 2 * len(MEASURES)) + "|")
    for cell in cells:
        places = seams(cell[1])
        pieces = [describe(folder_of(arguments, cell) / f"{index}.flac") for index in range(arguments.pieces)]
        found = np.stack([compare(*piece, places) for piece in pieces])
        low, high = np.quantile(at_random_places(clips, places[0].stop - places[0].start), [0.025, 0.975], axis=0)
        row = [cell[0], f"{cell[1]:g}"]
        for measure in range(len(MEASURES)):
            interval = bootstrap_interval(found[:, :, measure].mean(axis=1))
            within = ((found >= low) & (found <= high))[:, :, measure].mean()
            row += ["{:+.3f} [{:+.3f}, {:+.3f}]".format(*interval), f"{within:.0%}"]
        row.append("{:.3f} [{:.3f}, {:.3f}]".format(*bootstrap_interval(detect(pieces, places))))
        # A quarter to three quarters of the way to the next seam.
        step = round((1 - cell[1]) * WINDOW / BLOCK)
        shifts = np.linspace(step / 4, step * 3 / 4, SHIFTS).round().astype(int)
        chance = [detect(pieces, places, shift).mean() for shift in shifts]
        row.append(f"{np.mean(chance):.3f} ± {np.std(chance):.3f}")
        print(f"| {' | '.join(row)} |", flush=True)
    for overlap in arguments.overlaps:
        place = seams(overlap)[0]
        real = at_random_places(clips, place.stop - place.start)
        spread = [f"{mean:+.3f} ± {deviation:.3f} | " for mean, deviation in zip(real.mean(axis=0), real.std(axis=0))]
        print(f"| real clips, anywhere (mean ± deviation) | {overlap:g} | {' | '.join(spread)} | | |")


def draw(arguments: argparse.Namespace, cell: tuple[str, float], count: int = 4) -> None:
    """Draws the spectrograms of the first pieces with their seams marked above them."""
    figure = Figure(figsize=(16, 3 * count), layout="constrained")
    for index, axes in enumerate(figure.subplots(count, 1)):
        mel, _ = describe(folder_of(arguments, cell) / f"{index}.flac")
        axes.imshow(mel.T, origin="lower", aspect="auto", extent=(0, SECONDS, 0, mel.shape[1]), cmap="magma")
        for place in seams(cell[1]):
            axes.plot([place.start * FRAME, place.stop * FRAME], [66, 66], color="C0", linewidth=4)
        axes.set(ylim=(0, 68), ylabel="mel band", title=f"piece {index}, {cell[0]}, overlap {cell[1]:g}; blue: seams")
    figure.savefig(arguments.output / f"seams-{cell[0]}.png", dpi=80)


def main() -> None:
    arguments = parse_arguments()
    cells = [(weights, overlap) for overlap in arguments.overlaps for weights in ("triangle", "comb")]
    cells.append(("none", 0.25))
    make_pieces(arguments, cells)
    rows = [json.loads(line) for line in (arguments.data / "test.jsonl").read_text().splitlines()]
    order = np.random.default_rng(0).permutation(len(rows))[: arguments.clips]
    print_table(arguments, cells, [describe(arguments.data / rows[index]["audio"]) for index in order])
    for cell in (("triangle", 0.25), ("none", 0.25)):
        draw(arguments, cell)


if __name__ == "__main__":
    main()

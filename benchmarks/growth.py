"""Measures how the cost of a call grows: audio length, prompts a picture, pictures, steps, inversion steps.

python benchmarks/growth.py --output build

Every call is a real one, its operations counted and its time taken (median), with the bundled small checkpoint; beside
it the same call without a picture. Prints a table and the slope of a straight line for each sweep; writes growth.png.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

from melfusion_pipeline import MelFusionPipeline

ROOT = Path(__file__).parents[1]
PROMPT = "a waltz for piano"
# What grows: its values, and the arguments of the call for one of them.
SWEEPS: dict[str, tuple[tuple, Callable]] = {
    "audio_length_in_s": (
        # Up to one window; for what is longer see `long_pieces.py`.
        (1.28, 2.56, 3.84, 5.12),
        lambda value, image: {"image": image, "audio_length_in_s": value},
    ),
    "prompts a picture": ((1, 2, 4, 8), lambda value, image: {"image": image, "prompt": [PROMPT] * value}),
    "pictures": ((1, 2, 4, 8), lambda value, image: {"image": [image] * value, "prompt": [PROMPT] * value}),
    "num_inference_steps": ((10, 20, 40, 80), lambda value, image: {"image": image, "num_inference_steps": value}),
    "num_inversion_steps": ((2, 5, 10, 20), lambda value, image: {"image": image, "num_inversion_steps": value}),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=ROOT, help="folder or Hub id; default: the bundled one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("build"))
    return parser.parse_args()


def measure(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Gives a call's GFLOP and its median seconds, after one call to warm up."""
    with FlopCounterMode(display=False) as counter:
        call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return counter.get_total_flops() / 1e9, statistics.median(times)


def sweep(pipe: MelFusionPipeline, values: tuple, arguments: Callable, image, repeats: int) -> np.ndarray:
    """Gives for each value the GFLOP and seconds of text-to-music, of the picture's stage and of the whole call."""
    rows = []
    for value in values:
        call = {"prompt": PROMPT, "generator": torch.Generator().manual_seed(0)}
        call |= arguments(value, image)
        steps = {"num_inversion_steps": call.pop("num_inversion_steps", None)}
        pictures = call.pop("image")
        runs = (
            functools.partial(pipe, **call),
            functools.partial(pipe.encode_image, pictures, **steps),
            functools.partial(pipe, pictures, **steps, **call),
        )
        rows.append([figure for run in runs for figure in measure(run, repeats)])
    return np.array(rows)


def draw(results: dict[str, np.ndarray]) -> Figure:
    figure = Figure(figsize=(4 * len(results), 6.5), layout="constrained")
    panels = figure.subplots(2, len(results), squeeze=False)
    for column, (name, rows) in enumerate(results.items()):
        for row, unit in enumerate(("GFLOP", "seconds")):
            axes, values = panels[row, column], SWEEPS[name][0]
            for index, label in enumerate(("text-to-music", "the picture's stage", "with the picture")):
                axes.plot(values, rows[:, 2 * index + row], "o-", label=label)
            axes.set(xlabel=name, ylabel=unit, ylim=(0, None))
            axes.grid(alpha=0.3)
    panels[0, 0].legend()
    return figure


def main() -> None:
    arguments = parse_arguments()
    pipe = MelFusionPipeline.from_pretrained(arguments.checkpoint)
    pipe.set_progress_bar_config(disable=True)
    image = PIL.Image.open(ROOT / "examples" / "images" / "fog.jpg")
    results = {}
    for name, (values, call) in SWEEPS.items():
        rows = results[name] = sweep(pipe, values, call, image, arguments.repeats)
        print(f"\n| {name} | text-to-music, GFLOP (s) | the picture's stage | with the picture | ratio, GFLOP (s) |")
        print("|---|---|---|---|---|")
        for value, row in zip(values, rows, strict=True):
            cells = " | ".join(f"{row[index]:.2f} ({row[index + 1]:.2f})" for index in (0, 2, 4))
            print(f"| {value} | {cells} | {row[4] / row[0]:.3f} ({row[5] / row[1]:.3f}) |")
        for index, what in ((2, "the picture's stage"), (4, "with the picture")):
            slope, constant = np.polyfit(values, rows[:, index], 1)
            residual = np.abs(np.polyval((slope, constant), values) - rows[:, index]).max() / rows[:, index].max()
            print(
                f"{what}: {constant:.3f} + {slope:.4f} x {name} GFLOP, off a straight line by at most {residual:.2%}"
            )
    arguments.output.mkdir(parents=True, exist_ok=True)
    draw(results).savefig(arguments.output / "growth.png", dpi=100)


if __name__ == "__main__":
    main()

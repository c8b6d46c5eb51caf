"""Measures what fewer operations cost in quality: a table and a curve, with the shipped setting marked.

Every setting differs from the checkpoint's defaults in what it names. Operations are those of one clip with a fresh
picture, decoding left out; quality is judged as `evaluate_checkpoint.py` does it.
"""

import argparse
import json
from pathlib import Path

import torch
from corpus import read_rows
from judge import judge
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from melfusion_pipeline import MelFusionPipeline

SHIPPED = "shipped"
SETTINGS = {
    SHIPPED: {},
    "1 inversion step": {"num_inversion_steps": 1},
    "5 inversion steps": {"num_inversion_steps": 5},
    "10 inversion steps": {"num_inversion_steps": 10},
    **{f"{steps} steps": {"num_inference_steps": steps} for steps in (3, 4, 5, 6, 7, 10, 15, 25)},
    "no picture guidance": {"image_guidance_end": 0.0},
    "guided up to 0.3": {"image_guidance_end": 0.3},
    "guided up to 1": {"image_guidance_end": 1.0},
    # As 384 are to the 512 of Stable Diffusion.
    "48 px": {"image_size": 48},
}
SHOWN = ("instrument", "onset_rate ~ arousal", "drum_presence ~ arousal", "register ~ valence")
BATCH_SIZE = 8


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder of the pipeline")
    parser.add_argument("--data", type=Path, default=Path("build/small/data"), help="folder that build_data.py wrote")
    parser.add_argument("--components", type=Path, default=Path("build/small/components"), help="has the judge")
    parser.add_argument("--output", type=Path, required=True, help="folder for cost.json and cost.png")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--settings", nargs="*", choices=tuple(SETTINGS), default=tuple(SETTINGS))
    return parser.parse_args()


def make_clips(pipe: MelFusionPipeline, images: list, rows: list[dict], setting: dict) -> torch.Tensor:
    """Makes a clip for each row, its noise from the row's number: `[rows, samples]`, at most at full scale."""
    parts = []
    for first in range(0, len(rows), BATCH_SIZE):
        captions = [row["caption"] for row in rows[first : first + BATCH_SIZE]]
        generators = [torch.Generator().manual_seed(first + index) for index in range(len(captions))]
        part = images[first : first + BATCH_SIZE]
        parts.append(pipe(part, captions, generator=generators, output_type="pt", **setting).audios)
    waveforms = torch.cat(parts)
    return waveforms / waveforms.abs().amax(dim=1, keepdim=True).clamp(min=1)


def count_gflop(pipe: MelFusionPipeline, image: Image.Image, setting: dict) -> float:
    with FlopCounterMode(display=False) as counter:
        pipe(image, "a waltz for piano", output_type="latent", **setting)
    return counter.get_total_flops() / 1e9


def plot(results: dict[str, dict]) -> Figure:
    """Draws each quality against the operations, a point a setting with its 95% interval."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    for axes, name in zip(figure.subplots(2, 2).flat, SHOWN):
        for setting, found in results.items():
            value, low, high = found[name]
            # In front of the setting that comes to the same.
            colour, order, place = ("tab:red", 3, (4, -9)) if setting == SHIPPED else ("tab:blue", 2, (4, 4))
            point, interval = (found["gflop"], value), [[value - low], [high - value]]
            axes.errorbar(*point, interval, fmt="o", color=colour, alpha=0.7, zorder=order)
            axes.annotate(setting, point, xytext=place, textcoords="offset points", fontsize=7, color=colour)
        axes.set(title=name, xlabel="GFLOP a clip, without decoding", xscale="log")
        axes.set_xticks((5, 10, 20), labels=("5", "10", "20"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    return figure


def main() -> None:
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    pipe = MelFusionPipeline.from_pretrained(args.checkpoint)
    pipe.set_progress_bar_config(disable=True)
    rows = read_rows(args.data, args.split)[: args.clips]
    images = [Image.open(args.data / row["image"]).convert("RGB") for row in rows]
    print(f"{len(rows)} clips of {len({row['picture'] for row in rows})} pictures, estimate [95% interval]\n")
    print(f"| setting | GFLOP | {' | '.join(SHOWN)} |\n|---|---|{'---|' * len(SHOWN)}", flush=True)
    path = args.output / "cost.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    for name in args.settings:
        if name not in results:
            clips = make_clips(pipe, images, rows, SETTINGS[name])
            gflop = count_gflop(pipe, images[0], SETTINGS[name])
            results[name] = {"gflop": gflop, **judge(args.components / "classifier", clips, rows)}
            path.write_text(json.dumps(results, indent=2))
        cells = [f"{value:.2f} [{low:.2f}, {high:.2f}]" for value, low, high in (results[name][one] for one in SHOWN)]
        print(f"| {name} | {results[name]['gflop']:.2f} | {' | '.join(cells)} |", flush=True)
    plot(results).savefig(args.output / "cost.png", dpi=100)


if __name__ == "__main__":
    main()

"""Times one training step of MeLFusion against plain fine-tuning of the same music UNet, side by side.

python benchmarks/training_throughput.py --size small
python benchmarks/training_throughput.py --size full --steps 2      # SD 1.5 + AudioLDM-S, random weights, about 14 GB
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from full_size import build_components

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.caches import ImageFeaturesCache, TrajectoryCache
from melfusion_pipeline.training import MelFusionObjective, freeze

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from untrained import untrained_components  # noqa: E402


def plain_loss(objective: MelFusionObjective, batch: dict, step: int) -> torch.Tensor:
    """AudioLDM's own objective on the same batch: no picture."""
    pipe, draw = objective.pipe, objective.draw(batch["indices"], step)
    latents, noise = objective._music_latents(batch, draw)
    prompt_embeds, _ = pipe.encode_prompt(batch["captions"], do_classifier_free_guidance=False)
    noisy_latents = objective.scheduler.add_noise(latents, noise, draw.timesteps)
    noise_pred = pipe.unet(noisy_latents, draw.timesteps, None, class_labels=prompt_embeds.float()).sample
    return (noise_pred - noise).square().mean()


def seconds(loss: Callable[[int], torch.Tensor], objective: MelFusionObjective, step: int) -> float:
    """Times one forward and backward pass."""
    start = time.perf_counter()
    loss(step).backward()
    objective.zero_grad()
    return time.perf_counter() - start


def picture_share(objective: MelFusionObjective, batch: dict) -> float:
    """Times the picture's part of a step alone: reading or noising, its UNet (not with features), the synapse."""
    draw = objective.draw(batch["indices"], 0)
    latents, _ = objective._music_latents(batch, draw)
    prompts = objective.prompts.read(batch["captions"], draw.keeps_text)
    start = time.perf_counter()
    with torch.no_grad():
        objective._read_image(batch, draw, latents.shape, prompts, 1.0)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("small", "full"), default="small")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=1)
    args = parser.parse_args()
    small = args.size == "small"
    components = untrained_components(mel_bands=64, latent_frames=128) if small else build_components()
    pipe = MelFusionPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    freeze(pipe, "unet")
    paths = sorted((ROOT / "examples" / "images").glob("*.jpg"))[: args.batch_size]
    side = pipe.default_image_size
    batch = {
        "waveforms": torch.randn(args.batch_size, 81920 if small else 163840) * 0.1,
        "captions": ["music"] * args.batch_size,
        "indices": torch.arange(args.batch_size),
        "image_files": [str(path) for path in paths],
        "pixel_values": torch.rand(args.batch_size, 3, side, side) * 2 - 1,
    }
    with tempfile.TemporaryDirectory() as folder:
        trajectories = TrajectoryCache(folder, pipe, 2, side)
        trajectories.build(batch["image_files"])
        features = ImageFeaturesCache(folder, pipe, 2, side)
        features.build(batch["image_files"])
        objectives = {
            "inversion": MelFusionObjective(pipe, "unet", trajectories).train(),
            "noising": MelFusionObjective(pipe, "unet").train(),
            "features": MelFusionObjective(pipe, "unet", image_features=features).train(),
        }
        times = {name: [] for name in ("plain", *objectives)}
        shares = {name: [] for name in objectives}
        for step in range(args.steps + 1):
            plain = objectives["noising"]
            timed = {"plain": seconds(lambda at, run=plain: plain_loss(run, batch, at), plain, step)}
            for name, objective in objectives.items():
                with objective.attached():
                    timed[name] = seconds(lambda at, run=objective: run(batch, at), objective, step)
                    share = picture_share(objective, batch)
                if step:
                    shares[name].append(share)
            for name, spent in timed.items() if step else ():
                times[name].append(spent)
    plain = statistics.median(times["plain"])
    print(f"{args.size}, batch of {args.batch_size}, median of {args.steps} interleaved steps: plain {plain:.3f} s")
    for name in objectives:
        median, share = statistics.median(times[name]), statistics.median(shares[name])
        print(
            f"picture from {name}: {median:.3f} s, {median / plain:.2f} times plain fine-tuning;"
            f" the picture's part takes {100 * share / median:.0f}% of the step"
        )


if __name__ == "__main__":
    main()

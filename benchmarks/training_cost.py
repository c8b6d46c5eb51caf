"""Measures a training step at full size (random weights): operations, processor time and peak memory.

python benchmarks/training_cost.py          # SD 1.5 with AudioLDM-S, 10.24 s, batch of 1; about 15 GB

Each line is a process of its own: what is trained, the side of the picture, gradient checkpointing. The picture is
noised, not inverted beforehand, so one pass of its UNet is part of the step as in training on cached trajectories.
"""

import argparse
import itertools
import resource
import subprocess
import sys
import time

import torch
from full_size import build_components
from torch.utils.flop_counter import FlopCounterMode

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.adapters_melfusion import add_lora
from melfusion_pipeline.training import TRAINABLE, MelFusionObjective, enable_gradient_checkpointing, freeze

SAMPLES = 163840
# In the optimizer's first step memory is at its peak; the second is timed.
STEPS = 2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", choices=tuple(TRAINABLE), nargs="+", default=tuple(TRAINABLE))
    parser.add_argument("--image_size", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--gradient_checkpointing", type=int, choices=(0, 1), nargs="+", default=[0, 1])
    parser.add_argument("--here", action="store_true", help="measure in this process (used by the script itself)")
    return parser.parse_args()


def build_objective(train: str, checkpointing: bool) -> MelFusionObjective:
    pipe = MelFusionPipeline(**build_components())
    if train == "lora":
        add_lora(pipe.unet)
    if checkpointing:
        enable_gradient_checkpointing(pipe)
    freeze(pipe, train)
    return MelFusionObjective(pipe, train).train()


def measure(train: str, image_size: int, checkpointing: bool) -> None:
    objective = build_objective(train, checkpointing)
    optimizer = torch.optim.AdamW(objective.trained.parameters(), lr=1e-5, fused=True)
    batch = {
        "waveforms": torch.randn(1, SAMPLES) * 0.1,
        "captions": ["a calm piano"],
        "indices": torch.zeros(1, dtype=torch.long),
        "image_files": ["noise"],
        "pixel_values": torch.rand(1, 3, image_size, image_size) * 2 - 1,
    }
    with objective.attached():
        for step in range(STEPS):
            start = time.process_time()
            with FlopCounterMode(display=False) as counter:
                objective(batch, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            spent = time.process_time() - start
    numbers = sum(parameter.numel() for parameter in objective.trained.parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{numbers / 1e6:.2f} M | {counter.get_total_flops() / 1e12:.2f} | {spent:.1f} s | {peak:.1f} GiB")


def main() -> None:
    args = parse_arguments()
    if args.here:
        measure(args.train[0], args.image_size[0], bool(args.gradient_checkpointing[0]))
        return
    print("| --train | picture | gradient checkpointing | trained | TFLOP a step | processor time | peak memory |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for train, size, checkpointing in itertools.product(args.train, args.image_size, args.gradient_checkpointing):
        command = [sys.executable, sys.argv[0], "--here", "--train", train, "--image_size", str(size)]
        command += ["--gradient_checkpointing", str(checkpointing)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        figures = output.strip().splitlines()[-1]
        print(f"| {train} | {size} px | {'yes' if checkpointing else 'no'} | {figures} |", flush=True)


if __name__ == "__main__":
    main()

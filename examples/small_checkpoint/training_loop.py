"""What every training stage shares: optimiser, averaged weights, and saving that a killed run goes on from."""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from melfusion_pipeline.files_melfusion import atomic_write

CHECKPOINT_INTERVAL = 180.0


def stage_parser(description: str, steps: int, batch_size: int, learning_rate: float) -> argparse.ArgumentParser:
    """Returns a parser with the options that all training stages have; call it before anything runs on torch."""
    # On processors with AMX, torch 2.13 computes bfloat16 convolutions with narrow outputs wrongly.
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/small/data"), help="folder that build_data.py wrote")
    parser.add_argument("--output", type=Path, default=Path("build/small"), help="gets components/, state/ and cache/")
    parser.add_argument("--steps", type=int, default=steps, help="optimiser steps in all, over every resumed run")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop this run earlier; it can be resumed")
    parser.add_argument("--batch_size", type=int, default=batch_size)
    parser.add_argument("--learning_rate", type=float, default=learning_rate)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def save_atomically(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Writes a safetensors file whole, in a folder that is made if it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


class Training:
    """A module in training, with AdamW, an exponential average of its weights, and the step it has reached.

    Args:
        module: what is trained; every parameter that requires a gradient.
        path: safetensors file of the state; read if it exists.
        args: `learning_rate` and `steps`. The rate rises over 200 steps and falls to zero over the last fifth.
        betas: of AdamW.
        decay: of the average, smaller in the first steps.
    """

    def __init__(self, module, path: Path, args: argparse.Namespace, betas=(0.9, 0.99), decay: float = 0.999):
        self.module, self.path, self.args, self.decay, self.step = module, path, args, decay, 0
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=args.learning_rate, betas=betas)
        self.average = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        if path.exists():
            self.load()

    def update(self, loss: torch.Tensor) -> None:
        """Takes one optimiser step on `loss`."""
        left = (self.args.steps - self.step) / max(1, self.args.steps // 5)
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.learning_rate * min(1.0, (self.step + 1) / 200, max(left, 0.0))
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.step += 1
        weight = 1 - min(self.decay, (1 + self.step) / (10 + self.step))
        for name, parameter in self.parameters.items():
            self.average[name].lerp_(parameter.detach(), weight)

    def use_average(self) -> None:
        """Puts the averaged weights into the module, which is then in evaluation mode and no longer trained."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.average[name])
        self.module.eval()

    def save(self) -> None:
        """Writes weights, buffers, averages, moments and step."""
        tensors = {f"module.{name}": tensor for name, tensor in self.module.state_dict().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.items()}
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state[parameter]
            tensors |= {f"{key}.{name}": moments[key] for key in ("exp_avg", "exp_avg_sq", "step") if key in moments}
        save_atomically({k: t.clone() for k, t in tensors.items()} | {"step": torch.tensor(self.step)}, self.path)

    def load(self) -> None:
        """Reads what `save` wrote."""
        tensors = load_file(self.path)
        self.step = int(tensors["step"])
        self.module.load_state_dict({name: tensors[f"module.{name}"] for name in self.module.state_dict()})
        self.average = {name: tensors[f"average.{name}"] for name in self.average}
        for name, parameter in self.parameters.items():
            if f"exp_avg.{name}" in tensors:
                moments = {key: tensors[f"{key}.{name}"] for key in ("exp_avg", "exp_avg_sq", "step")}
                self.optimizer.state[parameter] = moments


def run(
    training: Training, take_step: Callable[[torch.Generator], dict[str, torch.Tensor]], also: list[Training] = ()
) -> bool:
    """Runs steps until `args.steps` are done or `args.minutes` are over, saving every three minutes and at the end.

    Args:
        training: decides how far the run is.
        take_step: makes one update and returns what to print. Its generator is seeded by the step, so a resumed run
            draws what an uninterrupted one would have drawn.
        also: further states to save with it (a discriminator's).

    Returns:
        Whether all steps are done.
    """
    args, started = training.args, time.monotonic()
    saved, sums, count, first = started, {}, 0, training.step
    while training.step < args.steps and time.monotonic() - started < args.minutes * 60:
        generator = torch.Generator().manual_seed(args.seed * 10_000_000 + training.step)
        for name, value in take_step(generator).items():
            sums[name] = sums.get(name, 0.0) + value.item()
        count += 1
        now = time.monotonic()
        if count == 100 or training.step == args.steps:
            means = "  ".join(f"{name} {total / count:.4f}" for name, total in sums.items())
            rate = (training.step - first) / (now - started)
            print(f"step {training.step}  {means}  ({rate:.2f} steps/s, {now - started:.0f} s)", flush=True)
            sums, count = {}, 0
        if now - saved > CHECKPOINT_INTERVAL:
            for each in (training, *also):
                each.save()
            saved = now
    for each in (training, *also):
        each.save()
    return training.step >= args.steps

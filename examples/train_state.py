"""What the stages of `train_melfusion.py` share."""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from train_data import Position

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.training import MelFusionObjective


@dataclass
class State:
    """Everything that the stages of training share."""

    args: argparse.Namespace
    accelerator: Accelerator
    pipe: MelFusionPipeline
    objective: torch.nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    loader: DataLoader
    ema: EMAModel | None = None
    position: Position = field(default_factory=Position)
    validation_rows: Iterable[dict] = ()

    @property
    def bare_objective(self) -> MelFusionObjective:
        return self.accelerator.unwrap_model(self.objective)


def describe_memory(state: State) -> str:
    """Counts what lies on each device throughout the training; activations come on top, and grow with the batch."""
    trained = {id(parameter): parameter for parameter in state.bare_objective.trained.parameters()}
    models = [part for part in state.pipe.components.values() if isinstance(part, torch.nn.Module)]
    everything = {id(parameter): parameter for model in models for parameter in model.parameters()}
    frozen = sum(parameter.nbytes for key, parameter in everything.items() if key not in trained)
    # The weights themselves, their gradients, and AdamW's two moments.
    copies = 4 + (state.ema is not None)
    share = state.accelerator.num_processes if state.accelerator.is_fsdp2 else 1
    numbers = sum(parameter.numel() for parameter in trained.values())
    size = sum(parameter.nbytes for parameter in trained.values()) * copies / share
    return (
        f"On each device, before activations: {frozen / 2**30:.3f} GiB of frozen weights, {size / 2**30:.3f} GiB for"
        f" {numbers:,} trained parameters ({copies} numbers each{f', shared by {share}' if share > 1 else ''})."
    )


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Gives all of a tensor of which FSDP keeps a part in each process; then every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

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


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Gives all of a tensor of which FSDP keeps a part in each process; then every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

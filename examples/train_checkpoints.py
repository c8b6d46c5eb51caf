"""The checkpoints of `train_melfusion.py`: complete or absent, and all processes go on from the same one."""

import argparse
import json
import os
import re
import shutil
import socket
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from diffusers.training_utils import EMAModel
from torch.distributed.tensor import DTensor, distribute_tensor
from train_state import State, whole

ARGUMENTS = "arguments.json"
# accelerate's name of what `register_for_checkpointing` was given second. No other script's checkpoint has it.
POSITION = "custom_checkpoint_1.pkl"
UNTOLD = {"output_dir", "resume_from_checkpoint"}
# A checkpoint has other weights and averages than these describe, if they change.
FIXED = ("train", "use_ema", "rank", "lora_alpha", "lora_targets")


class EMA(EMAModel):
    """diffusers' moving average of the weights; in checkpoints it is whole, also where FSDP shards the weights."""

    def state_dict(self) -> dict:
        return super().state_dict() | {"shadow_params": [whole(tensor).cpu() for tensor in self.shadow_params]}

    def load_state_dict(self, state: dict) -> None:
        shards = self.shadow_params
        # What the command says holds, not what it said when the checkpoint was written.
        super().load_state_dict(state | {"decay": self.decay})
        self.shadow_params = [laid_out_as(shard, own) for shard, own in zip(self.shadow_params, shards, strict=True)]


def laid_out_as(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Moves a tensor to the device of another, and shards it as that is."""
    tensor = tensor.to(other.device)
    return distribute_tensor(tensor, other.device_mesh, other.placements) if isinstance(other, DTensor) else tensor


def is_checkpoint(folder: Path) -> bool:
    return (folder / POSITION).is_file()


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Lists complete checkpoints, oldest first; a copy with a name of its own, such as `checkpoint-best`, is none."""
    steps = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in output_dir.glob("checkpoint-*")}
    found = (path for path, match in steps.items() if match and is_checkpoint(path))
    return sorted(found, key=lambda path: int(steps[path][1]))


def save_checkpoint(state: State) -> None:
    """Writes a checkpoint beside its final name, then renames it: a kill leaves the previous ones as they were."""
    accelerator, output_dir = state.accelerator, state.args.output_dir
    final = output_dir / f"checkpoint-{state.position.step}"
    partial = output_dir / f".partial-{final.name}"
    # By all processes, here and at the end: machines may have disks of their own.
    shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial))
        if accelerator.is_main_process:
            (partial / ARGUMENTS).write_text(json.dumps(describe_arguments(state), indent=2) + "\n")
    except BaseException:
        # Half a checkpoint is of no use, and a full disk stays full while it lies there.
        shutil.rmtree(partial, ignore_errors=True)
        raise
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        limit = state.args.checkpoints_total_limit
        for old in list_checkpoints(output_dir)[:-limit] if limit else []:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    shutil.rmtree(partial, ignore_errors=True)


def find_checkpoint(args: argparse.Namespace, accelerator: Accelerator) -> Path | None:
    """Finds what to go on from: the main process chooses, and all others must have that folder too.

    Raises:
        ValueError: On all processes, if it is missing on one: they would train different weights.
    """
    source = args.resume_from_checkpoint
    chosen = [Path(source) if source != "latest" else next(reversed(list_checkpoints(args.output_dir)), None)]
    broadcast_object_list(chosen)
    (checkpoint,) = chosen
    found = checkpoint is None or is_checkpoint(checkpoint)
    place = f"process {accelerator.process_index} on {socket.gethostname()}"
    lacking = gather_object([] if found else [place])
    if lacking:
        raise ValueError(
            f"The main process resumes from {checkpoint}, which is missing for {', '.join(lacking)}: give --output_dir"
            " a disk that all machines share, or copy this folder to them."
        )
    return checkpoint


def resume(state: State) -> None:
    args, accelerator = state.args, state.accelerator
    if args.resume_from_checkpoint is None:
        return
    checkpoint = find_checkpoint(args, accelerator)
    if checkpoint is None:
        accelerator.print("No checkpoint to resume from: training starts anew.")
        return
    earlier = read_arguments(checkpoint)
    changed = {name: value for name, value in describe_arguments(state).items() if earlier.get(name, value) != value}
    if fixed := [f"--{name} {earlier[name]}" for name in FIXED if name in changed]:
        raise ValueError(f"{checkpoint} was trained with {', '.join(fixed)}: give the same, or start anew.")
    load_checkpoint(state, checkpoint)
    if earlier and not args.streaming:
        keep_place(state, earlier)
    accelerator.print(f"Resumed at step {state.position.step}.")
    for name in sorted(changed.keys() - UNTOLD):
        accelerator.print(f"--{name} is {changed[name]} from here on, no longer {earlier[name]}.")
    if state.position.step >= args.max_train_steps:
        accelerator.print(f"Nothing is left to train: --max_train_steps is {args.max_train_steps}.")


def describe_arguments(state: State) -> dict:
    """The arguments of this training as JSON has them, with the number of processes."""
    described = vars(state.args) | {"num_processes": state.accelerator.num_processes}
    return json.loads(json.dumps(described, default=str))


def read_arguments(checkpoint: Path) -> dict:
    """Those that a checkpoint was written with; none of a checkpoint from before they were kept."""
    path = checkpoint / ARGUMENTS
    return json.loads(path.read_text()) if path.is_file() else {}


def load_checkpoint(state: State, checkpoint: Path) -> None:
    """Loads weights, moments, averages and position; rates and the other settings stay those of the command."""
    optimizer, schedule = state.optimizer, state.lr_scheduler
    settings = [{name: group[name] for name in group if name != "params"} for group in optimizer.param_groups]
    base_lrs = schedule.base_lrs
    state.accelerator.load_state(str(checkpoint))
    schedule.base_lrs = base_lrs
    rates = [base * factor(schedule.last_epoch) for base, factor in zip(base_lrs, schedule.lr_lambdas)]
    schedule._last_lr = rates
    for group, own, rate in zip(optimizer.param_groups, settings, rates, strict=True):
        group.update(own, lr=rate)


def keep_place(state: State, earlier: dict) -> None:
    """Counts the batches of the epoch anew if they have another size now: no row is left out, few are repeated."""
    sizes = [each["train_batch_size"] * each["num_processes"] for each in (earlier, describe_arguments(state))]
    state.position.batch = state.position.batch * sizes[0] // sizes[1]

"""What `train_melfusion.py` says of memory and time before its first step."""

import time
from contextlib import suppress
from pathlib import Path

import torch
from train_state import State

# Linux: what was the most memory of a process, and the file by which that is forgotten.
STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


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


def describe_step(state: State, batch: dict) -> str:
    """Runs a batch forward and backward, as a step does, without taking one, and says what that took.

    Every process must call it, and within `attached()`.
    """
    args, device = state.args, state.accelerator.device
    # On an accelerator a first pass also chooses kernels, and of a stream it may invert the pictures.
    for _ in range(1 if device.type == "cpu" and not args.streaming else 2):
        forget_peak_memory(device)
        start = time.perf_counter()
        with state.accelerator.autocast():
            loss = state.objective(batch, state.position.step)
        state.accelerator.backward(loss)
        torch.get_device_module(device).synchronize()
        seconds, memory = time.perf_counter() - start, peak_memory(device)
        state.optimizer.zero_grad()
    most = "" if memory is None else f" and at most {memory / 2**30:.2f} GiB"
    if most and not state.optimizer.state:
        most += ", before AdamW has its moments,"
    steps = args.max_train_steps - state.position.step
    hours = seconds * args.gradient_accumulation_steps * steps / 3600
    return (
        f"Forward and backward of a batch take {seconds:.2f} s{most} in this process: {steps} steps of"
        f" {args.gradient_accumulation_steps} batches about {hours:.1f} h, without loading, saving and validation."
    )


def forget_peak_memory(device: torch.device) -> None:
    """Lets `peak_memory` count from here on."""
    module = torch.get_device_module(device)
    if hasattr(module, "reset_peak_memory_stats"):
        module.reset_peak_memory_stats()
    elif FORGET.exists():
        # proc(5): resets the peak of the resident set. Where that is forbidden it is the peak since the beginning.
        with suppress(OSError):
            FORGET.write_text("5")


def peak_memory(device: torch.device) -> int | None:
    """Gives the most memory in bytes, of an accelerator's tensors or else of this process, if anything tells."""
    module = torch.get_device_module(device)
    if hasattr(module, "max_memory_allocated"):
        return module.max_memory_allocated()
    if device.type != "cpu" or not FORGET.exists():
        return None
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024

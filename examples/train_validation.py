"""What `train_melfusion.py` says of its weights on the way: validation loss, alphas, and music to listen to."""

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from accelerate.tracking import GeneralTracker
from accelerate.utils import gather_object, send_to_device
from torch.distributed.fsdp import FSDPModule
from train_data import data_root, reader
from train_state import State, whole

from melfusion_pipeline.audio import load_audio, save_audio
from melfusion_pipeline.data import ImageFiles, collate_triplets, locate, open_image
from melfusion_pipeline.plotting import plot_mel_spectrogram

# The validation loss is the mean over this many fixed draws of timestep and noise a row.
VALIDATION_DRAWS = 4
VALIDATION_BATCH_SIZE = 4
# What a sample has of its picture.
PICTURE = ("image_files", "pixel_values")
# The pictures with which a row's loss is computed, and how its mean is logged.
COMPARED = {"its own": "", "another row's": "/another_picture", "none": "/no_picture"}


@contextmanager
def published_weights(state: State) -> Iterator[None]:
    """Holds the weights that will be published: the moving average where there is one, whole where FSDP shards."""
    parameters, objective = list(state.bare_objective.trained.parameters()), state.objective
    objective.eval()
    if state.ema is not None:
        state.ema.store(parameters)
        state.ema.copy_to(parameters)
    if isinstance(objective, FSDPModule):
        # The pipeline calls the UNet, not the objective whose forward would gather what no block holds.
        objective.unshard()
    try:
        yield
    finally:
        if isinstance(objective, FSDPModule):
            objective.reshard()
        if state.ema is not None:
            state.ema.restore(parameters)
        objective.train()


@torch.no_grad()
def validation_losses(state: State) -> torch.Tensor:
    """Gives the losses of all validation rows, nothing dropped, on fixed timesteps and noise.

    Returns:
        `[rows, 3]`: with the row's own picture, with that of the row before it, and with none; the same noise for all.
    """
    accelerator = state.accelerator
    read = functools.partial(reader(state.args.validation_data, state.args), random_image_crops=False)
    losses, last = [], None
    rows = iter(state.validation_rows)
    while shared := list(islice(rows, VALIDATION_BATCH_SIZE * accelerator.num_processes)):
        own = shared[accelerator.process_index :: accelerator.num_processes]
        # Where FSDP shards the weights every process takes part in every pass: one without rows repeats the first.
        samples = [read(row) for row in own or shared[:1]]
        pictures = [{name: sample[name] for name in PICTURE if name in sample} for sample in samples]
        others = [last or pictures[-1], *pictures[:-1]]
        last = pictures[-1]
        shuffled = [sample | other for sample, other in zip(samples, others)]
        found = [mean_loss(state, samples), mean_loss(state, shuffled), mean_loss(state, samples, synapse_scale=0.0)]
        losses += torch.stack(found, dim=1).tolist() if own else []
    return torch.tensor(gather_object(losses), dtype=torch.float64)


def mean_loss(state: State, samples: list[dict], synapse_scale: float = 1.0) -> torch.Tensor:
    """Gives each row's loss, `[B]`, as the mean over the validation's draws."""
    batch = send_to_device(collate_triplets(samples), state.accelerator.device)
    with state.accelerator.autocast():
        draws = [state.bare_objective.per_sample_loss(batch, draw, synapse_scale) for draw in range(VALIDATION_DRAWS)]
    return torch.stack(draws).mean(dim=0)


def compare_pictures(losses: torch.Tensor) -> tuple[dict[str, float], str]:
    """Says what the picture does for the loss, of `validation_losses`: figures to log, and a table.

    The interval of a difference is 1.96 standard errors over the rows; one row has none.
    """
    figures, lines = {}, [f"{'picture':>14}      loss   above its own (95%)"]
    for column, (name, tag) in enumerate(COMPARED.items()):
        above = losses[:, column] - losses[:, 0]
        figures[f"validation_loss{tag}"] = losses[:, column].mean().item()
        text = f"   {above.mean():+.5f}" if column else ""
        if column and len(losses) > 1:
            text += f" +- {1.96 * above.std().item() / len(losses) ** 0.5:.5f}"
        lines.append(f"{name:>14}   {losses[:, column].mean():.5f}{text}")
    return figures, "\n".join(lines)


def validate(state: State) -> None:
    """Logs the validation loss, what the picture does for it, the alphas, and music for the first validation rows."""
    accelerator, step = state.accelerator, state.position.step
    with published_weights(state):
        figures, table = compare_pictures(validation_losses(state))
        alphas = whole(state.pipe.synapse.alphas).tolist()
        figures |= {f"alpha/{layer:02d}": alpha for layer, alpha in enumerate(alphas)}
        accelerator.log(figures, step=step)
        accelerator.print(f"step {step}: validation loss {figures['validation_loss']:.5f}\n{table}")
        for index, row in enumerate(islice(state.validation_rows, state.args.num_validation_samples)):
            try:
                generate_sample(state, index, row)
            except FloatingPointError as error:
                # Days of training are worth more than this piece; the weights may recover, and the loss tells.
                accelerator.print(f"step {step}: no music for validation row {index}: {error}")
                accelerator.log({f"audio_failed/{index}": 1}, step=step)


def generate_sample(state: State, index: int, row: dict) -> None:
    """Makes music for a validation row; writes and logs it with its mel spectrogram.

    Raises:
        FloatingPointError: If the weights lead to NaN or infinity.
    """
    pipe, args, step = state.pipe, state.args, state.position.step
    with state.accelerator.autocast():
        mel_spectrogram = pipe(
            prompt=row["caption"],
            **picture_arguments(state, index, row),
            audio_length_in_s=args.audio_length_in_s,
            generator=torch.Generator().manual_seed(args.seed),
            output_type="mel",
        ).audios
        waveform = pipe.mel_spectrogram_to_waveform(mel_spectrogram)[0]
    if not state.accelerator.is_main_process:
        return
    folder = args.output_dir / "validation" / f"step-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    figure = plot_mel_spectrogram(mel_spectrogram[0], title=row["caption"])
    figure.savefig(folder / f"{index}.png")
    save_audio(folder / f"{index}.wav", waveform, pipe.sampling_rate)
    for tracker in state.accelerator.trackers:
        log_piece(tracker, index, folder / f"{index}.wav", folder / f"{index}.png", step)


def picture_arguments(state: State, index: int, row: dict) -> dict:
    """What a call is told of a row's picture: its cached features, or itself and how it is encoded in training."""
    args, root = state.args, data_root(state.args.validation_data, state.args)
    if (cache := state.bare_objective.image_features) is not None:
        return {"image_features": cache.features(ImageFiles(state.validation_rows, root)[index])}
    return {
        "image": open_image(locate(row["image"], root)),
        "num_inversion_steps": args.num_inversion_steps,
        "image_size": args.resolution,
        "feature_source": args.image_latents,
    }


def log_piece(tracker: GeneralTracker, index: int, audio: Path, mel: Path, step: int) -> None:
    """Shows a piece and its mel spectrogram, as they were written, where a tracker has a place for them."""
    if tracker.name == "tensorboard":
        waveform, sampling_rate = load_audio(audio)
        tracker.writer.add_audio(f"audio/{index}", waveform[0], step, sampling_rate)
        tracker.writer.add_image(f"mel/{index}", np.asarray(open_image(mel).convert("RGB")), step, dataformats="HWC")
    elif tracker.name in ("wandb", "trackio"):
        media = importlib.import_module(tracker.name)
        tracker.log({f"audio/{index}": media.Audio(str(audio)), f"mel/{index}": media.Image(str(mel))}, step=step)

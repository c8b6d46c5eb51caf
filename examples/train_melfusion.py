"""Trains MeLFusion on triplets of picture, caption and music.

accelerate launch examples/train_melfusion.py \
    --pretrained_image_model stable-diffusion-v1-5/stable-diffusion-v1-5 \
    --pretrained_music_model cvssp/audioldm-s-full-v2 \
    --train_data melbench/train.jsonl --output_dir my-melfusion --train synapse --mixed_precision bf16
"""

import argparse
import functools
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, send_to_device, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from publish import Publication, read_training, upload, write_model_card, write_training
from torch.utils.data import DataLoader, default_collate
from tqdm.auto import tqdm
from train_arguments import parse_arguments
from train_data import Position, endless_batches, load_checked_rows, make_loader, reader

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.audio import Spectrogram, save_audio
from melfusion_pipeline.data import open_image
from melfusion_pipeline.files_melfusion import atomic_write, staged_folder
from melfusion_pipeline.plotting import plot_mel_spectrogram
from melfusion_pipeline.training import (
    TRAINABLE,
    MelFusionObjective,
    MusicLatentCache,
    TrajectoryCache,
    enable_gradient_checkpointing,
    freeze,
)

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# The validation loss is the mean over this many fixed draws of timestep and noise a row.
VALIDATION_DRAWS = 4
VALIDATION_BATCH_SIZE = 4


# ---------------------------------------- state


@dataclass
class State:
    """Everything that the stages of training share."""

    args: argparse.Namespace
    accelerator: Accelerator
    pipe: MelFusionPipeline
    objective: torch.nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    ema: EMAModel | None
    loader: DataLoader
    position: Position = field(default_factory=Position)
    validation_rows: Iterable[dict] = ()

    @property
    def bare_objective(self) -> MelFusionObjective:
        return self.accelerator.unwrap_model(self.objective)


def load_pipeline(args: argparse.Namespace) -> MelFusionPipeline:
    if args.pretrained_model_name_or_path:
        return MelFusionPipeline.from_pretrained(args.pretrained_model_name_or_path, variant=args.variant)
    return MelFusionPipeline.from_base_models(
        args.pretrained_image_model, args.pretrained_music_model, synapse=args.synapse, variant=args.variant
    )


# ---------------------------------------- setup


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    if args.mixed_precision == "bf16":
        # On processors with AMX, torch 2.13 computes bfloat16 convolutions with narrow outputs wrongly.
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    plugin = GradientAccumulationPlugin(num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False)
    return Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_plugin=plugin,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=args.output_dir / "logs"),
    )


def make_trajectories(
    rows: Iterable[dict], args: argparse.Namespace, accelerator: Accelerator, pipe: MelFusionPipeline
) -> TrajectoryCache | None:
    """Opens the cache of inverted pictures and, unless the rows are streamed, fills it; processes share the work."""
    if args.image_latents == "noising":
        return None
    folder = args.trajectory_cache or args.output_dir / "trajectories"
    cache = TrajectoryCache(folder, pipe, args.num_inversion_steps, args.resolution)
    if not args.streaming:
        paths = [os.path.realpath(row["image"]) for row in rows]
        missing = len(cache.missing(paths))
        size = cache.nbytes(missing) / 2**20
        accelerator.print(
            f"Trajectories: {missing} of {len(set(paths))} pictures to invert, {size:.1f} MiB in {folder}"
        )
        cache.build(paths, process_index=accelerator.process_index, num_processes=accelerator.num_processes)
        accelerator.wait_for_everyone()
    return cache


def make_objective(args: argparse.Namespace, pipe: MelFusionPipeline, trajectories) -> MelFusionObjective:
    music_latents = None
    if args.music_latents_cache:
        music_latents = MusicLatentCache(args.music_latents_cache, pipe.vae, Spectrogram.of(pipe))
    return MelFusionObjective(
        pipe,
        args.train,
        trajectories,
        music_latents,
        snr_gamma=args.snr_gamma,
        logit_mean=args.logit_mean,
        text_dropout=args.text_dropout,
        image_dropout=args.image_dropout,
        seed=args.seed,
    ).train()


def set_up(args: argparse.Namespace, accelerator: Accelerator) -> State | None:
    """Loads everything and puts it on its device; None after `--check_data`."""
    set_seed(args.seed)
    rows = load_checked_rows(args.train_data, args.train_split, args, accelerator)
    validation_rows = ()
    if args.validation_data:
        validation_rows = load_checked_rows(args.validation_data, args.validation_split, args, accelerator)
    if args.check_data:
        return None
    pipe = load_pipeline(args)
    if args.gradient_checkpointing:
        enable_gradient_checkpointing(pipe)
    args.resolution, args.sampling_rate = args.resolution or pipe.default_image_size, pipe.sampling_rate
    freeze(pipe, args.train, DTYPES[args.mixed_precision])
    pipe.to(accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    objective = make_objective(args, pipe, make_trajectories(rows, args, accelerator, pipe))
    rates = {"synapse": args.synapse_learning_rate, "unet": args.learning_rate}
    groups = [{"params": list(part.parameters()), "lr": rates[name]} for name, part in objective.trained.items()]
    betas = (args.adam_beta1, args.adam_beta2)
    optimizer = torch.optim.AdamW(groups, betas=betas, weight_decay=args.adam_weight_decay)
    steps = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": args.max_train_steps}
    lr_scheduler = get_scheduler(args.lr_scheduler, optimizer, **steps)
    ema = EMAModel(objective.trained.parameters(), args.ema_decay, use_ema_warmup=True) if args.use_ema else None
    loader = make_loader(rows, args, accelerator)
    objective, optimizer = accelerator.prepare(objective, optimizer)
    state = State(args, accelerator, pipe, objective, optimizer, lr_scheduler, ema, loader)
    state.validation_rows = validation_rows
    accelerator.register_for_checkpointing(lr_scheduler, state.position, *([ema] if ema else []))
    accelerator.init_trackers("melfusion", config={name: str(value) for name, value in vars(args).items()})
    return state


# ---------------------------------------- checkpoints


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Lists complete checkpoints, oldest first."""
    return sorted(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def save_checkpoint(state: State) -> None:
    """Writes a checkpoint beside its final name, then renames it: a kill leaves the previous ones as they were."""
    accelerator, output_dir = state.accelerator, state.args.output_dir
    final = output_dir / f"checkpoint-{state.position.step}"
    partial = output_dir / f".partial-{final.name}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial))
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


def resume(state: State) -> None:
    source = state.args.resume_from_checkpoint
    if source is None:
        return
    checkpoints = list_checkpoints(state.args.output_dir)
    if source == "latest" and not checkpoints:
        state.accelerator.print("No checkpoint to resume from: training starts anew.")
        return
    state.accelerator.load_state(str(checkpoints[-1] if source == "latest" else source))
    if state.ema is not None:
        state.ema.to(state.accelerator.device)
    state.accelerator.print(f"Resumed at step {state.position.step}.")


# ---------------------------------------- training


def mean_alpha(state: State) -> float:
    return state.pipe.synapse.alphas.detach().abs().mean().item()


def train_step(state: State, batches: Iterator[dict]) -> float:
    """Takes one optimisation step, over as many batches as are accumulated, and gives the mean loss of all devices."""
    accelerator, objective = state.accelerator, state.objective
    losses = []
    for _ in range(state.args.gradient_accumulation_steps):
        batch = next(batches)
        with accelerator.accumulate(objective):
            loss = objective(batch, state.position.step)
            losses.append(loss.detach())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(objective.parameters(), state.args.max_grad_norm)
            state.optimizer.step()
            state.optimizer.zero_grad()
    state.lr_scheduler.step()
    if state.ema is not None:
        state.ema.step(state.bare_objective.trained.parameters())
    state.position.step += 1
    return accelerator.reduce(torch.stack(losses).mean(), "mean").item()


def train(state: State) -> None:
    args, accelerator = state.args, state.accelerator
    log = open_log(state) if accelerator.is_main_process else None
    batches = endless_batches(state.loader, state.position, accelerator.device)
    bar = tqdm(total=args.max_train_steps, initial=state.position.step, disable=not accelerator.is_local_main_process)
    with state.bare_objective.attached(), bar:
        while state.position.step < args.max_train_steps:
            figures = {"loss": train_step(state, batches), "mean_alpha": mean_alpha(state)}
            step = state.position.step
            bar.update()
            bar.set_postfix(loss=f"{figures['loss']:.4f}", alpha=f"{figures['mean_alpha']:.4f}")
            if log is not None:
                log.write(json.dumps({"step": step, **figures}) + "\n")
                log.flush()
            accelerator.log({**figures, "lr": state.lr_scheduler.get_last_lr()[0]}, step=step)
            if step % args.checkpointing_steps == 0 or step == args.max_train_steps:
                save_checkpoint(state)
            if args.validation_data and (step % args.validation_steps == 0 or step == args.max_train_steps):
                validate(state)
    if log is not None:
        log.close()


def open_log(state: State):
    """Opens `losses.jsonl`, cut back to the step from which training goes on."""
    path = state.args.output_dir / "losses.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= state.position.step]
    with atomic_write(path) as temporary:
        temporary.write_text("".join(kept))
    return path.open("a")


# ---------------------------------------- validation


@torch.no_grad()
def validation_loss(state: State) -> float:
    """The mean loss over the validation rows, nothing dropped, on fixed timesteps and noise."""
    accelerator, objective = state.accelerator, state.bare_objective
    read = functools.partial(reader(state.args.validation_data, state.args), random_image_crops=False)
    own = islice(state.validation_rows, accelerator.process_index, None, accelerator.num_processes)
    totals = torch.zeros(2, device=accelerator.device)
    while rows := list(islice(own, VALIDATION_BATCH_SIZE)):
        batch = send_to_device(default_collate([read(row) for row in rows]), accelerator.device)
        for draw in range(VALIDATION_DRAWS):
            with accelerator.autocast():
                losses = objective.per_sample_loss(batch, draw)
            totals += torch.stack([losses.sum(), losses.new_tensor(len(losses))])
    total, count = accelerator.reduce(totals, "sum").tolist()
    return total / count


def validate(state: State) -> None:
    """Logs the validation loss, the alphas of each layer, and music for the first validation rows."""
    accelerator, step = state.accelerator, state.position.step
    state.objective.eval()
    figures = {"validation_loss": validation_loss(state)}
    figures |= {f"alpha/{layer:02d}": alpha for layer, alpha in enumerate(state.pipe.synapse.alphas.tolist())}
    accelerator.log(figures, step=step)
    accelerator.print(f"step {step}: validation loss {figures['validation_loss']:.5f}")
    for index, row in enumerate(islice(state.validation_rows, state.args.num_validation_samples)):
        generate_sample(state, index, row)
    state.objective.train()


def generate_sample(state: State, index: int, row: dict) -> None:
    """Makes music for a validation row; writes and logs it with its mel spectrogram."""
    pipe, args, step = state.pipe, state.args, state.position.step
    with state.accelerator.autocast():
        mel_spectrogram = pipe(
            open_image(Path(row["image"])),
            row["caption"],
            audio_length_in_s=args.audio_length_in_s,
            num_inversion_steps=args.num_inversion_steps,
            image_size=args.resolution,
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
        if tracker.name == "tensorboard":
            tracker.writer.add_audio(f"audio/{index}", waveform, step, pipe.sampling_rate)
            tracker.writer.add_figure(f"mel/{index}", figure, step)


# ---------------------------------------- publishing


def finish(state: State) -> None:
    """Saves the trained pipeline with its card and, where wanted, publishes it."""
    args, accelerator = state.args, state.accelerator
    if state.ema is not None:
        state.ema.copy_to(state.bare_objective.trained.parameters())
    weights = accelerator.get_state_dict(state.objective)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        # Loaded anew: the frozen parts of the pipeline that was trained have been cast.
        pipe = load_pipeline(args)
        for name in TRAINABLE[args.train]:
            prefix = f"trained.{name}."
            part = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
            getattr(pipe, name).load_state_dict(part)
        pipe.synapse.register_to_config(
            image_latents=args.image_latents,
            num_inversion_steps=args.num_inversion_steps if args.image_latents == "inversion" else None,
            image_size=args.resolution,
        )
        pipe.save_pretrained(args.output_dir)
        describe_pipeline(args, pipe)
        if args.push_to_hub:
            upload(args.output_dir, args.hub_model_id)
    accelerator.end_training()


def describe_pipeline(args: argparse.Namespace, pipe: MelFusionPipeline) -> None:
    """Writes what is told of the training, and the model card; on a full disk both stay as they were."""
    name = args.hub_model_id or args.output_dir.name
    with staged_folder(args.output_dir) as folder:
        write_training(folder, *describe_training(args))
        training = read_training(folder)
        write_model_card(folder, pipe, Publication(name, training["base_models"], training["facts"]))


def describe_training(args: argparse.Namespace) -> tuple[list[str], dict]:
    """The models on the Hub that training started from, and what the model card tells of it."""
    sources = [args.pretrained_model_name_or_path, args.pretrained_image_model, args.pretrained_music_model]
    sources = list(filter(None, [*sources, args.synapse]))
    facts = {
        "trained": "the synapse" if args.train == "synapse" else "the synapse and the music UNet",
        "starting from": " and ".join(sources),
        "training data": Path(args.train_data).name,
        "steps": args.max_train_steps,
        "batch size on each device": args.train_batch_size,
        "gradient accumulation": args.gradient_accumulation_steps,
        "picture latents": f"{args.image_latents}, {args.resolution} px",
        "music length": f"{args.audio_length_in_s} s",
        "seed": args.seed,
    }
    return [source for source in sources if not Path(source).exists()], facts


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(__doc__, arguments)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    accelerator = make_accelerator(args)
    state = set_up(args, accelerator)
    if state is not None:
        resume(state)
        train(state)
        finish(state)


if __name__ == "__main__":
    main()

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
from accelerate.utils import (
    GradientAccumulationPlugin,
    ProjectConfiguration,
    broadcast_object_list,
    send_to_device,
    set_seed,
)
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from publish import Publication, read_training, upload, write_model_card, write_training
from torch.utils.data import DataLoader, Sampler, default_collate
from tqdm.auto import tqdm

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.audio import Spectrogram, save_audio
from melfusion_pipeline.data import (
    COLUMNS,
    TripletDataset,
    TripletStream,
    check_rows,
    format_problems,
    load_rows,
    open_image,
    read_triplet,
    select_good_rows,
)
from melfusion_pipeline.files_melfusion import atomic_write, staged_folder
from melfusion_pipeline.pictures_melfusion import prepare_image
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


# ---------------------------------------- arguments


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser.add_argument_group("models"))
    add_data_arguments(parser.add_argument_group("data"))
    add_training_arguments(parser.add_argument_group("training"))
    add_output_arguments(parser.add_argument_group("checkpoints, validation, publishing"))
    args = parser.parse_args(arguments)
    if problems := list(find_problems(args)):
        parser.error("\n  ".join(["wrong arguments:", *problems]))
    return args


def add_model_arguments(group) -> None:
    group.add_argument("--pretrained_model_name_or_path", help="a MeLFusion pipeline (id or folder) to go on from")
    group.add_argument("--pretrained_image_model", help="Stable Diffusion 1 or 2 (id or folder)")
    group.add_argument("--pretrained_music_model", help="AudioLDM, MusicLDM, AudioLDM 2, ... (id or folder)")
    group.add_argument("--synapse", help="a trained synapse (id or folder) to go on from, with the two base models")
    group.add_argument("--variant", help="of the weights, such as fp16")


def add_data_arguments(group) -> None:
    group.add_argument("--train_data", required=True, help=".jsonl, .json, .csv or .tsv, one triplet a row")
    group.add_argument("--data_root", help="folder that no file may lie outside of (default: that of --train_data)")
    for column in COLUMNS:
        group.add_argument(f"--{column}_column", default=column, help="its name in the file")
    group.add_argument("--train_split", help="use only the rows with this value in the split column")
    group.add_argument("--streaming", action="store_true", help="read the rows while training, with flat memory")
    group.add_argument("--check_data", action="store_true", help="check every row, print the problems and stop")
    group.add_argument("--skip_bad_rows", action="store_true", help="train without the rows that have problems")
    group.add_argument("--resolution", type=int, help="side of the pictures in pixels (default: the image UNet's)")
    group.add_argument("--audio_length_in_s", type=float, default=10.24)
    group.add_argument("--image_latents", choices=("inversion", "noising"), default="inversion")
    group.add_argument("--num_inversion_steps", type=int, default=10, help="of the cached trajectories")
    group.add_argument("--trajectory_cache", help="folder (default: trajectories in --output_dir)")
    group.add_argument("--music_latents_cache", help="folder for encoded clips, if none is longer than trained on")
    group.add_argument("--random_image_crops", action="store_true", help="only with --image_latents noising")
    group.add_argument("--dataloader_num_workers", type=int, default=0)


def add_training_arguments(group) -> None:
    group.add_argument("--train", choices=tuple(TRAINABLE), default="synapse", help="unet: synapse and music UNet")
    group.add_argument("--train_batch_size", type=int, default=4, help="on each device")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1)
    group.add_argument("--max_train_steps", type=int, default=10_000)
    group.add_argument("--learning_rate", type=float, default=3e-5, help="of the music UNet")
    group.add_argument("--synapse_learning_rate", type=float, default=1e-3)
    group.add_argument("--lr_scheduler", choices=[kind.value for kind in SchedulerType], default="constant")
    group.add_argument("--lr_warmup_steps", type=int, default=0)
    group.add_argument("--adam_beta1", type=float, default=0.9)
    group.add_argument("--adam_beta2", type=float, default=0.999)
    group.add_argument("--adam_weight_decay", type=float, default=0.0)
    group.add_argument("--max_grad_norm", type=float, default=1.0)
    group.add_argument("--snr_gamma", type=float, help="min-SNR weighting; 5.0 is recommended")
    group.add_argument(
        "--logit_mean", type=float, help="logit-normal timesteps; above 0: more of the high noise levels"
    )
    group.add_argument("--text_dropout", type=float, default=0.1)
    group.add_argument("--image_dropout", type=float, default=0.1)
    group.add_argument("--use_ema", action="store_true")
    group.add_argument("--ema_decay", type=float, default=0.9999)
    group.add_argument("--mixed_precision", choices=tuple(DTYPES), default="no")
    group.add_argument("--gradient_checkpointing", action="store_true")
    group.add_argument("--seed", type=int, default=0)


def add_output_arguments(group) -> None:
    group.add_argument("--output_dir", type=Path, required=True)
    group.add_argument("--checkpointing_steps", type=int, default=500)
    group.add_argument("--checkpoints_total_limit", type=int)
    group.add_argument("--resume_from_checkpoint", help="a checkpoint folder, or 'latest'")
    group.add_argument("--validation_data", help="as --train_data")
    group.add_argument("--validation_split", help="as --train_split; --validation_data may then be the same file")
    group.add_argument("--validation_steps", type=int, default=500)
    group.add_argument("--num_validation_samples", type=int, default=2, help="rows to generate music for")
    group.add_argument("--report_to", default="tensorboard", help="tensorboard, wandb, ..., all or none")
    group.add_argument("--push_to_hub", action="store_true")
    group.add_argument("--hub_model_id", help="user/name")


def find_problems(args: argparse.Namespace) -> Iterator[str]:
    base = (args.pretrained_image_model, args.pretrained_music_model)
    if (args.pretrained_model_name_or_path is None) == (None in base):
        yield "give --pretrained_model_name_or_path, or both --pretrained_image_model and --pretrained_music_model"
    if args.pretrained_model_name_or_path and (args.synapse or any(base)):
        yield "--pretrained_model_name_or_path already holds a synapse and both base models"
    if args.push_to_hub and not args.hub_model_id:
        yield "--push_to_hub needs --hub_model_id"
    if args.random_image_crops and args.image_latents != "noising":
        yield "--random_image_crops needs --image_latents noising: a trajectory belongs to one crop"
    if args.validation_split and not args.validation_data:
        yield "--validation_split needs --validation_data"
    for name in ("train_data", "validation_data"):
        path = getattr(args, name)
        if path is not None and not Path(path).is_file():
            yield f"--{name} {path} does not exist"
    if args.resume_from_checkpoint not in (None, "latest") and not Path(args.resume_from_checkpoint).is_dir():
        yield f"--resume_from_checkpoint {args.resume_from_checkpoint} is neither a folder nor 'latest'"
    for name in (
        "train_batch_size gradient_accumulation_steps max_train_steps num_inversion_steps checkpointing_steps"
        " validation_steps audio_length_in_s learning_rate synapse_learning_rate max_grad_norm"
    ).split():
        if not getattr(args, name) > 0:
            yield f"--{name} must be above 0, got {getattr(args, name)}"
    for name in ("text_dropout", "image_dropout", "ema_decay"):
        if not 0 <= getattr(args, name) <= 1:
            yield f"--{name} must lie in [0, 1], got {getattr(args, name)}"
    for name in ("snr_gamma", "checkpoints_total_limit", "resolution"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            yield f"--{name} must be above 0, got {getattr(args, name)}"


# ---------------------------------------- state


@dataclass
class Position:
    """Where training stands; saved in each checkpoint."""

    step: int = 0
    epoch: int = 0
    batch: int = 0

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


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


# ---------------------------------------- data


class GlobalBatches(Sampler[list[int]]):
    """This process's share of shuffled batches; what a step trains on does not depend on the number of processes."""

    def __init__(self, num_rows: int, batch_size: int, process_index: int, num_processes: int, seed: int) -> None:
        self.num_rows, self.seed, self.position = num_rows, seed, Position()
        self.global_batch_size = batch_size * num_processes
        self.own = slice(process_index * batch_size, (process_index + 1) * batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.position.epoch)
        order = torch.randperm(self.num_rows, generator=generator).tolist()
        first = self.position.batch
        for batch in range(first, self.num_rows // self.global_batch_size):
            yield order[batch * self.global_batch_size : (batch + 1) * self.global_batch_size][self.own]


def is_in_split(row_split: str | None, split: str) -> bool:
    """A function, because spawned workers cannot be sent a lambda."""
    return row_split == split


def load_checked_rows(
    path: str, split: str | None, args: argparse.Namespace, accelerator: Accelerator
) -> Iterable[dict]:
    """Opens a set; the main process reads every row once and all leave out what it found wrong."""
    columns = {column: getattr(args, f"{column}_column") for column in COLUMNS}
    rows = load_rows(path, columns, streaming=args.streaming)
    if split is not None:
        rows = rows.filter(functools.partial(is_in_split, split=split), input_columns="split")
        if next(iter(rows), None) is None:
            raise ValueError(f"{path} holds no row of the split {split!r}.")
    problems = [check_rows(rows, data_root(path, args)) if accelerator.is_main_process else None]
    broadcast_object_list(problems)
    if args.check_data:
        accelerator.print(format_problems(problems[0]) if problems[0] else f"{path}: no problems")
    return select_good_rows(rows, problems[0], args.skip_bad_rows or args.check_data)


def data_root(path: str, args: argparse.Namespace) -> str:
    return args.data_root or os.path.dirname(os.path.abspath(path))


def reader(path: str, args: argparse.Namespace):
    """Gives the function that reads one row of a set."""
    prepare = functools.partial(prepare_image, image_size=args.resolution)
    return functools.partial(
        read_triplet,
        data_root=data_root(path, args),
        prepare_image=prepare if args.image_latents == "noising" else None,
        audio_length_in_s=args.audio_length_in_s,
        random_image_crops=args.random_image_crops,
        seed=args.seed,
        sampling_rate=args.sampling_rate,
    )


def make_loader(rows: Iterable[dict], args: argparse.Namespace, accelerator: Accelerator) -> DataLoader:
    share = (args.train_batch_size, accelerator.process_index, accelerator.num_processes)
    if args.streaming:
        stream = TripletStream(rows.shuffle(seed=args.seed), reader(args.train_data, args), *share)
        return DataLoader(stream, batch_size=None, num_workers=args.dataloader_num_workers)
    batches = GlobalBatches(len(rows), *share, args.seed)
    if len(rows) < batches.global_batch_size:
        raise ValueError(
            f"--train_data has {len(rows)} usable rows, fewer than one batch over all devices"
            f" ({batches.global_batch_size}): lower --train_batch_size."
        )
    dataset = TripletDataset(rows, reader(args.train_data, args))
    return DataLoader(dataset, batch_sampler=batches, num_workers=args.dataloader_num_workers)


def endless_batches(state: State) -> Iterator[dict]:
    """Yields batches epoch by epoch, from where `state.position` stands."""
    position = state.position
    while True:
        state.loader.dataset.set_epoch(position.epoch)
        if state.args.streaming:
            batches = islice(state.loader, position.batch, None)
        else:
            state.loader.batch_sampler.position = Position(position.step, position.epoch, position.batch)
            batches = state.loader
        for batch in batches:
            position.batch += 1
            yield send_to_device(batch, state.accelerator.device)
        if position.batch == 0:
            raise ValueError("--train_data holds fewer rows than one batch over all devices.")
        position.epoch, position.batch = position.epoch + 1, 0


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
    batches = endless_batches(state)
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
    args = parse_arguments(arguments)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    accelerator = make_accelerator(args)
    state = set_up(args, accelerator)
    if state is not None:
        resume(state)
        train(state)
        finish(state)


if __name__ == "__main__":
    main()

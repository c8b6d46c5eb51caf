"""Trains MeLFusion on triplets of picture, caption and music.

accelerate launch examples/train_melfusion.py \
    --pretrained_image_model stable-diffusion-v1-5/stable-diffusion-v1-5 \
    --pretrained_music_model cvssp/audioldm-s-full-v2 \
    --train_data melbench/train.jsonl --output_dir my-melfusion --train synapse --mixed_precision bf16
"""

import argparse
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from datetime import timedelta
from itertools import chain
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import (
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    gather_object,
    set_seed,
)
from command_line import errors_in_one_line
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.optimization import get_scheduler
from model_card import TRAINED, WHOLE_PIPELINE, Publication, read_training, write_model_card, write_training
from publish import upload
from tqdm.auto import tqdm
from train_arguments import parse_arguments
from train_checkpoints import EMA, resume, save_checkpoint
from train_data import check_sets, data_root, endless_batches, load_good_rows, make_loader
from train_estimate import describe_memory, describe_step
from train_state import State, whole
from train_validation import validate

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.adapters_melfusion import LORA_TARGETS, add_lora, lora_layers, lora_of_unet
from melfusion_pipeline.audio import Spectrogram
from melfusion_pipeline.caches import ImageFeaturesCache, MusicLatentCache, PictureCache, TrajectoryCache
from melfusion_pipeline.data import ImageFiles
from melfusion_pipeline.files_melfusion import atomic_write, staged_folder
from melfusion_pipeline.training import MelFusionObjective, enable_gradient_checkpointing, freeze, trained_parts

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Devices on which torch 2.6, the oldest that we support, takes AdamW's step in one kernel.
FUSED = ("cpu", "cuda", "mps", "xpu")
# GradScaler begins with 65,536 and halves after each overflow: below this, no scale will help.
SMALLEST_LOSS_SCALE = 2.0**-20


# ---------------------------------------- setup


def load_pipeline(args: argparse.Namespace) -> MelFusionPipeline:
    if args.pretrained_model_name_or_path:
        pipe = MelFusionPipeline.from_pretrained(args.pretrained_model_name_or_path, variant=args.variant)
    else:
        pipe = MelFusionPipeline.from_base_models(
            args.pretrained_image_model, args.pretrained_music_model, synapse=args.synapse, variant=args.variant
        )
    prepare_lora(args, pipe)
    return pipe


def prepare_lora(args: argparse.Namespace, pipe: MelFusionPipeline) -> None:
    """Installs the LoRA that is to be trained, or goes on with the one that came with the synapse."""
    found = next(iter(getattr(pipe.unet, "peft_config", {}).values()), None)
    if args.train == "unet" and found is not None:
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    if args.train != "lora":
        return
    if found is None:
        add_lora(pipe.unet, args.rank or 8, args.lora_alpha, args.lora_targets or LORA_TARGETS, args.seed)
    elif args.lora_targets or args.rank not in (None, found.r) or args.lora_alpha not in (None, found.lora_alpha):
        raise ValueError(
            f"The LoRA beside --synapse has rank {found.r} and alpha {found.lora_alpha}: to go on with it, leave"
            " --rank, --lora_alpha and --lora_targets out."
        )


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """Makes the accelerator; without `--mixed_precision` its config or launch decides, as in diffusers' scripts."""
    plugin = GradientAccumulationPlugin(num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        # The main process writes long and inverts many pictures: ten minutes, gloo's default, are not enough.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=30))],
        gradient_accumulation_plugin=plugin,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=args.output_dir / "logs"),
    )
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        raise ValueError(
            "DeepSpeed would override accumulation and clipping: use examples/accelerate/fsdp.json instead."
        )
    if accelerator.distributed_type is DistributedType.FSDP and args.train != "unet":
        raise ValueError(
            f"FSDP shards the music UNet, but --train {args.train} trains little of it: launch without FSDP, so that"
            " each process keeps a copy, or give --train unet."
        )
    if accelerator.mixed_precision not in DTYPES:
        raise ValueError(f"Mixed precision must be one of {list(DTYPES)}, got {accelerator.mixed_precision!r}.")
    if accelerator.mixed_precision == "bf16":
        # On processors with AMX, torch 2.13 computes bfloat16 convolutions with narrow outputs wrongly.
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
        if accelerator.is_fsdp2:
            # FSDP2 would round the waveforms, before they become spectrograms, to eight bits.
            sharding = accelerator.state.fsdp_plugin
            sharding.mixed_precision_policy = dataclasses.replace(
                sharding.mixed_precision_policy, cast_forward_inputs=False
            )
    if args.allow_tf32:
        torch.set_float32_matmul_precision("high")
    return accelerator


def make_optimizer(objective: MelFusionObjective, args: argparse.Namespace, accelerator: Accelerator):
    rates = {"synapse": args.synapse_learning_rate, "lora": args.learning_rate, "unet": args.learning_rate}
    groups = [{"params": list(part.parameters()), "lr": rates[name]} for name, part in objective.trained.items()]
    # A fused step looks for overflows by itself, and accelerate does not learn that it was skipped.
    fused = accelerator.device.type in FUSED and accelerator.scaler is None
    betas = (args.adam_beta1, args.adam_beta2)
    return torch.optim.AdamW(groups, betas=betas, weight_decay=args.adam_weight_decay, fused=fused)


def make_picture_cache(
    sets: list[ImageFiles], args: argparse.Namespace, accelerator: Accelerator, pipe: MelFusionPipeline
) -> PictureCache | None:
    """Opens the cache of inverted pictures and, unless the rows are streamed, fills it; processes share the work."""
    if args.image_latents == "noising":
        return None
    folder = args.trajectory_cache or args.output_dir / "trajectories"
    kind = ImageFeaturesCache if args.offload_image_side else TrajectoryCache
    cache = kind(folder, pipe, args.num_inversion_steps, args.resolution)
    for pictures in sets:
        fill_picture_cache(cache, pictures, accelerator)
    if args.offload_image_side:
        # Validation reads the cache too, and what is published in the end is loaded anew.
        pipe.register_modules(image_vae=None, image_text_encoder=None, image_unet=None)
    return cache


def fill_picture_cache(cache: PictureCache, pictures: ImageFiles, accelerator: Accelerator) -> None:
    missing = len(cache.missing(pictures))
    needed, free = cache.nbytes(missing), shutil.disk_usage(cache.files.folder).free
    accelerator.print(
        f"{missing} pictures of {len(pictures)} rows to invert: {needed / 2**20:.1f} MiB of"
        f" {'keys and values' if isinstance(cache, ImageFeaturesCache) else 'trajectories'} in {cache.files.folder}"
    )
    if any(gather_object([needed > free])):
        raise ValueError(
            f"--trajectory_cache {cache.files.folder} has {free / 2**30:.1f} GiB free, but {missing} pictures take"
            f" {needed / 2**30:.1f} GiB: give a folder on a larger disk"
            f"{', or leave --offload_image_side out' if isinstance(cache, ImageFeaturesCache) else ''}."
        )
    cache.build(pictures, process_index=accelerator.process_index, num_processes=accelerator.num_processes)
    accelerator.wait_for_everyone()
    # Where a machine has a disk of its own, the shares of the others' are not on it.
    local = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    if local < accelerator.num_processes:
        cache.build(pictures, process_index=accelerator.local_process_index, num_processes=local)
        accelerator.wait_for_everyone()


def make_objective(
    args: argparse.Namespace, pipe: MelFusionPipeline, pictures: PictureCache | None
) -> MelFusionObjective:
    music_latents = None
    if args.music_latents_cache:
        music_latents = MusicLatentCache(args.music_latents_cache, pipe.vae, Spectrogram.of(pipe))
    has_features = isinstance(pictures, ImageFeaturesCache)
    return MelFusionObjective(
        pipe,
        args.train,
        None if has_features else pictures,
        music_latents,
        snr_gamma=args.snr_gamma,
        logit_mean=args.logit_mean,
        text_dropout=args.text_dropout,
        image_dropout=args.image_dropout,
        seed=args.seed,
        image_features=pictures if has_features else None,
    ).train()


def set_up(args: argparse.Namespace, accelerator: Accelerator) -> State:
    """Loads everything and puts it on its device."""
    set_seed(args.seed)
    rows = load_good_rows(args.train_data, args.train_split, args, accelerator)
    validation_rows = ()
    if args.validation_data:
        validation_rows = load_good_rows(args.validation_data, args.validation_split, args, accelerator)
    pipe = load_pipeline(args)
    if args.gradient_checkpointing:
        enable_gradient_checkpointing(pipe)
    args.resolution, args.sampling_rate = args.resolution or pipe.default_image_size, pipe.sampling_rate
    if args.resolution % pipe.image_vae_scale_factor:
        # It would be trained on, but no call takes it, and it becomes the default of all calls.
        raise ValueError(f"--resolution must be a multiple of {pipe.image_vae_scale_factor}, got {args.resolution}.")
    freeze(pipe, args.train, DTYPES[accelerator.mixed_precision])
    pipe.to(accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    sets = [] if args.streaming else [ImageFiles(rows, data_root(args.train_data, args))]
    if args.validation_data and args.offload_image_side:
        sets.append(ImageFiles(validation_rows, data_root(args.validation_data, args)))
    objective = make_objective(args, pipe, make_picture_cache(sets, args, accelerator, pipe))
    optimizer = make_optimizer(objective, args, accelerator)
    steps = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": args.max_train_steps}
    lr_scheduler = get_scheduler(args.lr_scheduler, optimizer, **steps)
    loader = make_loader(rows, args, accelerator, objective.prepared_inputs())
    objective, optimizer = accelerator.prepare(objective, optimizer)
    state = State(args, accelerator, pipe, objective, optimizer, lr_scheduler, loader)
    state.validation_rows = validation_rows
    if args.use_ema:
        # Of the weights as they are now: FSDP may have sharded them.
        state.ema = EMA(state.bare_objective.trained.parameters(), args.ema_decay, use_ema_warmup=True)
    accelerator.print(describe_memory(state))
    accelerator.register_for_checkpointing(lr_scheduler, state.position, *([state.ema] if state.ema else []))
    accelerator.init_trackers("melfusion", config={name: str(value) for name, value in vars(args).items()})
    return state


# ---------------------------------------- training


def mean_alpha(state: State) -> float:
    return whole(state.pipe.synapse.alphas).detach().abs().mean().item()


def train_step(state: State, batches: Iterator[dict]) -> float:
    """Takes one optimisation step, over as many batches as are accumulated, and gives the mean loss of all devices.

    A step whose gradients overflow in float16 is not taken: schedule, moving average and position stay with it.
    """
    accelerator, objective = state.accelerator, state.objective
    losses = []
    for _ in range(state.args.gradient_accumulation_steps):
        batch = next(batches)
        with accelerator.accumulate(objective):
            # FSDP2 leaves to the caller what accelerate does for other models.
            with accelerator.autocast():
                loss = objective(batch, state.position.step)
            losses.append(loss.detach())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(objective.parameters(), state.args.max_grad_norm)
            state.optimizer.step()
            state.optimizer.zero_grad()
    if not accelerator.optimizer_step_was_skipped:
        state.lr_scheduler.step()
        if state.ema is not None:
            state.ema.step(state.bare_objective.trained.parameters())
        state.position.step += 1
    return accelerator.reduce(torch.stack(losses).mean(), "mean").item()


def tell_overflow(state: State) -> None:
    scale = state.accelerator.scaler.get_scale()
    if scale < SMALLEST_LOSS_SCALE:
        raise FloatingPointError(
            f"The gradients are not finite, even where the loss is scaled by {scale:g}: lower --learning_rate and"
            " --synapse_learning_rate, or train with --mixed_precision bf16 or no."
        )
    state.accelerator.print(f"step {state.position.step + 1}: float16 overflowed; taken anew with scale {scale:g}")


def train(state: State) -> None:
    args, accelerator = state.args, state.accelerator
    log = open_log(state) if accelerator.is_main_process else None
    batches = endless_batches(state.loader, state.position, accelerator.device)
    bar = tqdm(total=args.max_train_steps, initial=state.position.step, disable=not accelerator.is_local_main_process)
    with state.bare_objective.attached(), bar:
        if state.position.step < args.max_train_steps:
            first = next(batches)
            accelerator.print(describe_step(state, first))
            batches = chain([first], batches)
        while state.position.step < args.max_train_steps:
            loss = train_step(state, batches)
            if accelerator.optimizer_step_was_skipped:
                tell_overflow(state)
                continue
            figures = {"loss": loss, "mean_alpha": mean_alpha(state)}
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
        for name, part in trained_parts(pipe, args.train).items():
            prefix = f"trained.{name}."
            part.load_state_dict(
                {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
            )
        pipe.synapse.register_to_config(
            image_latents=args.image_latents,
            num_inversion_steps=args.num_inversion_steps if args.image_latents == "inversion" else None,
            image_size=args.resolution,
        )
        save_pipeline(args, pipe)
        describe_pipeline(args, pipe, state.position.step)
        if args.push_to_hub:
            upload(args.output_dir, args.hub_model_id)
    accelerator.end_training()


def save_pipeline(args: argparse.Namespace, pipe: MelFusionPipeline) -> None:
    """Saves the pipeline with its LoRA fused; beside the synapse the LoRA itself, for base models as they were."""
    lora = lora_of_unet(pipe.unet) if lora_layers(pipe.unet) else None
    if lora is not None:
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    pipe.save_pretrained(args.output_dir)
    if lora is not None:
        pipe.save_lora_weights(args.output_dir / "synapse", *lora)
    else:
        # That of a former training in this folder would not belong to what it holds now.
        (args.output_dir / "synapse" / LORA_WEIGHT_NAME_SAFE).unlink(missing_ok=True)


def describe_pipeline(args: argparse.Namespace, pipe: MelFusionPipeline, step: int) -> None:
    """Writes what is told of the training, and the model card; on a full disk both stay as they were."""
    name = args.hub_model_id or args.output_dir.name
    with staged_folder(args.output_dir) as folder:
        write_training(folder, *describe_training(args, step))
        training = read_training(folder)
        write_model_card(folder, pipe, Publication(name, training["base_models"], training["facts"]))


def describe_training(args: argparse.Namespace, step: int) -> tuple[list[str], dict]:
    """The models on the Hub that training started from, and what the model card tells of it."""
    sources = [args.pretrained_model_name_or_path, args.pretrained_image_model, args.pretrained_music_model]
    sources = list(filter(None, [*sources, args.synapse]))
    facts = {
        "trained": TRAINED[args.train],
        "starting from": WHOLE_PIPELINE * bool(args.pretrained_model_name_or_path) + " and ".join(sources),
        "training data": args.train_data if args.dataset_name else Path(args.train_data).name,
        "steps": step,
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
    if args.check_data:
        return check_sets(args, accelerator)
    state = set_up(args, accelerator)
    resume(state)
    train(state)
    finish(state)


if __name__ == "__main__":
    with errors_in_one_line():
        main()

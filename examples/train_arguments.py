"""The arguments of `train_melfusion.py`, and which of them cannot be right."""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

from accelerate.utils import LoggerType
from command_line import existing_folder, new_folder
from diffusers.optimization import SchedulerType
from model_card import is_repo_id
from train_checkpoints import POSITION, is_checkpoint, list_checkpoints

from melfusion_pipeline.adapters_melfusion import LORA_TARGETS
from melfusion_pipeline.checks_melfusion import MAX_AUDIO_LENGTH_IN_S
from melfusion_pipeline.data import COLUMNS
from melfusion_pipeline.training import TRAINABLE

# Of diffusers, but the one that needs rules of its own.
LR_SCHEDULERS = [kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT]


def parse_arguments(description: str, arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser.add_argument_group("models"))
    add_data_arguments(parser.add_argument_group("data"))
    add_training_arguments(parser.add_argument_group("training"))
    add_output_arguments(parser.add_argument_group("checkpoints, validation, publishing"))
    args = parser.parse_args(arguments)
    if args.learning_rate is None:
        args.learning_rate = 1e-4 if args.train == "lora" else 3e-5
    if problems := list(find_problems(args)):
        parser.error("\n  ".join(["wrong arguments:", *problems]))
    args.train_data = args.train_data or args.dataset_name
    if args.validation_split:
        args.validation_data = args.validation_data or args.dataset_name
    return args


def add_model_arguments(group) -> None:
    group.add_argument("--pretrained_model_name_or_path", help="a MeLFusion pipeline (id or folder) to go on from")
    group.add_argument("--pretrained_image_model", help="Stable Diffusion 1 or 2 (id or folder)")
    group.add_argument("--pretrained_music_model", help="AudioLDM, MusicLDM, AudioLDM 2, ... (id or folder)")
    group.add_argument("--synapse", help="a trained synapse (id or folder) to go on from, with the two base models")
    group.add_argument("--variant", help="of the weights, such as fp16")


def add_data_arguments(group) -> None:
    group.add_argument("--train_data", help=".jsonl, .json, .csv or .tsv, one triplet a row")
    group.add_argument("--dataset_name", help="instead: a set on the Hub, or a folder that `datasets` reads")
    group.add_argument("--dataset_config_name", help="one of several configurations of the set")
    group.add_argument("--dataset_split", default="train", help="of the set")
    group.add_argument(
        "--data_root",
        type=existing_folder,
        help="folder that no file may lie outside of (default: that of --train_data)",
    )
    for column in COLUMNS:
        group.add_argument(f"--{column}_column", default=column, help="its name in the file")
    group.add_argument("--train_split", help="use only the rows with this value in the split column")
    group.add_argument("--streaming", action="store_true", help="read the rows while training, with flat memory")
    group.add_argument("--shuffle_buffer_size", type=int, default=1000, help="rows of a stream shuffled at a time")
    group.add_argument("--check_data", action="store_true", help="check every row, print the problems and stop")
    group.add_argument("--skip_bad_rows", action="store_true", help="train without the rows that have problems")
    group.add_argument("--resolution", type=int, help="side of the pictures in pixels (default: the image UNet's)")
    group.add_argument("--audio_length_in_s", type=float, default=10.24)
    group.add_argument("--image_latents", choices=("inversion", "noising"), default="inversion")
    group.add_argument("--num_inversion_steps", type=int, default=10, help="of the cached trajectories")
    group.add_argument("--trajectory_cache", type=new_folder, help="folder (default: trajectories in --output_dir)")
    group.add_argument(
        "--offload_image_side",
        action="store_true",
        help="cache keys and values (157 MB a picture with SD 1.5 at 512 px), and drop the picture's models",
    )
    group.add_argument(
        "--music_latents_cache", type=new_folder, help="folder for encoded clips, if none is longer than trained on"
    )
    group.add_argument("--random_image_crops", action="store_true", help="only with --image_latents noising")
    group.add_argument("--dataloader_num_workers", type=int, help="a core each at most (default: one stays free, 8)")


def add_training_arguments(group) -> None:
    group.add_argument(
        "--train", choices=tuple(TRAINABLE), default="synapse", help="lora or all of the music UNet too"
    )
    group.add_argument("--rank", type=int, help="of the LoRA (default: 8, or that of the one beside --synapse)")
    group.add_argument("--lora_alpha", type=float, help="LoRA's strength is lora_alpha / rank (default: the rank)")
    group.add_argument("--lora_targets", nargs="+", help=f"ends of layers' names (default: {' '.join(LORA_TARGETS)})")
    group.add_argument("--train_batch_size", type=int, default=4, help="on each device")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1)
    group.add_argument("--max_train_steps", type=int, default=10_000)
    group.add_argument("--learning_rate", type=float, help="of the music UNet (default: 3e-5), of its LoRA (1e-4)")
    group.add_argument("--synapse_learning_rate", type=float, default=1e-3)
    group.add_argument("--lr_scheduler", choices=LR_SCHEDULERS, default="constant")
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
    group.add_argument(
        "--mixed_precision", choices=("no", "fp16", "bf16"), help="default: that of accelerate's config"
    )
    group.add_argument("--allow_tf32", action="store_true", help="faster float32 products on Ampere and later GPUs")
    group.add_argument("--gradient_checkpointing", action="store_true")
    group.add_argument("--seed", type=int, default=0)


def add_output_arguments(group) -> None:
    group.add_argument("--output_dir", type=new_folder, required=True)
    group.add_argument("--checkpointing_steps", type=int, default=500)
    group.add_argument("--checkpoints_total_limit", type=int)
    group.add_argument("--resume_from_checkpoint", help="a checkpoint folder, or 'latest'")
    group.add_argument("--validation_data", help="as --train_data")
    group.add_argument("--validation_split", help="as --train_split, or a split of --dataset_name")
    group.add_argument("--validation_steps", type=int, default=500)
    group.add_argument("--num_validation_samples", type=int, default=2, help="rows to generate music for")
    group.add_argument("--report_to", default="tensorboard", help="tensorboard, wandb, trackio, ..., all or none")
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
    if args.hub_model_id and not is_repo_id(args.hub_model_id):
        yield f"--hub_model_id must be like user/name, got {args.hub_model_id!r}"
    if args.random_image_crops and args.image_latents != "noising":
        yield "--random_image_crops needs --image_latents noising: a trajectory belongs to one crop"
    if args.offload_image_side and args.image_latents == "noising":
        yield "--offload_image_side needs --image_latents inversion: noise is new in every step"
    if args.offload_image_side and args.streaming:
        yield "--offload_image_side cannot be used with --streaming: all pictures must be cached before training"
    if (args.train_data is None) == (args.dataset_name is None):
        yield "give --train_data or --dataset_name"
    if args.dataset_name and args.train_split:
        yield "--train_split is a value in the split column of --train_data; with --dataset_name give --dataset_split"
    if (args.dataset_config_name or args.dataset_split != "train") and not args.dataset_name:
        yield "--dataset_config_name and --dataset_split need --dataset_name"
    if args.validation_split and not (args.validation_data or args.dataset_name):
        yield "--validation_split needs --validation_data or --dataset_name"
    for name in ("rank", "lora_alpha", "lora_targets"):
        if getattr(args, name) is not None and args.train != "lora":
            yield f"--{name} needs --train lora"
    for name in ("train_data", "validation_data"):
        path = getattr(args, name)
        if path is not None and not Path(path).is_file():
            yield f"--{name} {path} {'is a folder: see --dataset_name' if Path(path).is_dir() else 'does not exist'}"
    if args.resume_from_checkpoint is None and not args.check_data and list_checkpoints(args.output_dir):
        yield (
            f"--output_dir {args.output_dir} holds {list_checkpoints(args.output_dir)[-1].name} of another run, whose"
            " pipeline this one would replace: give another folder, or --resume_from_checkpoint latest to go on"
        )
    if args.report_to not in (reporters := ["none", *LoggerType.list()]):
        yield f"--report_to must be one of {', '.join(reporters)}, got {args.report_to!r}"
    if args.resume_from_checkpoint not in (None, "latest") and not is_checkpoint(Path(args.resume_from_checkpoint)):
        yield (
            f"--resume_from_checkpoint {args.resume_from_checkpoint} holds no {POSITION}, so it is no checkpoint of"
            " this script: give one of the folders checkpoint-... in --output_dir, or 'latest'"
        )
    for name in (
        "train_batch_size gradient_accumulation_steps max_train_steps num_inversion_steps checkpointing_steps"
        " validation_steps shuffle_buffer_size audio_length_in_s learning_rate synapse_learning_rate max_grad_norm"
    ).split():
        if not getattr(args, name) > 0:
            yield f"--{name} must be above 0, got {getattr(args, name)}"
    for name in "dataloader_num_workers num_validation_samples lr_warmup_steps adam_weight_decay seed".split():
        if getattr(args, name) is not None and not getattr(args, name) >= 0:
            yield f"--{name} must be 0 or above, got {getattr(args, name)}"
    for name in ("audio_length_in_s", "learning_rate", "synapse_learning_rate", "adam_weight_decay", "logit_mean"):
        if getattr(args, name) is not None and not math.isfinite(getattr(args, name)):
            yield f"--{name} must be finite, got {getattr(args, name)}"
    if args.audio_length_in_s > MAX_AUDIO_LENGTH_IN_S:
        yield f"--audio_length_in_s must be at most {MAX_AUDIO_LENGTH_IN_S:g}, got {args.audio_length_in_s:g}"
    if args.seed >= 2**32:
        yield f"--seed must be below {2**32}, got {args.seed}"
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(args, name) < 1:
            yield f"--{name} must lie in [0, 1), got {getattr(args, name)}"
    for name in ("text_dropout", "image_dropout", "ema_decay"):
        if not 0 <= getattr(args, name) <= 1:
            yield f"--{name} must lie in [0, 1], got {getattr(args, name)}"
    for name in ("snr_gamma", "rank", "lora_alpha", "checkpoints_total_limit", "resolution"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            yield f"--{name} must be above 0, got {getattr(args, name)}"

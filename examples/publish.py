"""Publishes a trained pipeline: weights, loading code, samples to listen to, and a complete model card.

python examples/publish.py --checkpoint my-melfusion --hub_model_id you/my-melfusion --results results/results.json \
    --sample examples/images/lightning.jpg "a slow cello" --credits "Photograph: NASA, public domain"

`--only_learned` publishes the synapse, and the LoRA of `--train lora`, in a small repository that names its base
models. `--dry_run` writes the folder and uploads nothing.
"""

import argparse
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from command_line import errors_in_one_line, new_folder, positive_int, positive_seconds, random_seed
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.utils.torch_utils import get_device
from huggingface_hub import create_repo, upload_folder
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from model_card import (
    TRAINED,
    WHOLE_PIPELINE,
    Publication,
    Sample,
    is_repo_id,
    read_training,
    write_model_card,
    write_training,
)

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.adapters_melfusion import read_lora
from melfusion_pipeline.audio import save_audio
from melfusion_pipeline.data import open_image
from melfusion_pipeline.pictures_melfusion import to_rgb
from melfusion_pipeline.sources_melfusion import Source

SAMPLES = "samples"
# What training leaves beside the pipeline, and every format that runs code when it is read.
UNPUBLISHED = ["checkpoint-*", ".*", "logs/*", "trajectories/*", "validation/*"]
UNPUBLISHED += [f"*.{suffix}" for suffix in ("bin", "ckpt", "pickle", "pkl", "pt", "pth")]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# ---------------------------------------- the folder


def make_samples(pipe: MelFusionPipeline, arguments: argparse.Namespace) -> list[Sample]:
    """Makes music for the given pictures and prompts, and writes it below `samples/` with small pictures."""
    folder = arguments.output / SAMPLES
    shutil.rmtree(folder, ignore_errors=True)
    samples = []
    for index, (path, prompt) in enumerate(arguments.sample):
        folder.mkdir(exist_ok=True)
        name = f"{SAMPLES}/{index}-{re.sub('[^A-Za-z0-9]+', '-', Path(path).stem).strip('-').lower()}"
        image = open_image(Path(path))
        waveform = pipe(
            image,
            prompt,
            num_inference_steps=arguments.num_inference_steps,
            audio_length_in_s=arguments.audio_length_in_s,
            image_guidance_scale=arguments.image_guidance_scale,
            generator=torch.Generator().manual_seed(arguments.seed),
        ).audios[0]
        save_audio(arguments.output / f"{name}.wav", waveform, pipe.sampling_rate)
        thumbnail = to_rgb(image)
        thumbnail.thumbnail((384, 384))
        thumbnail.save(arguments.output / f"{name}.jpg", quality=88)
        samples.append(Sample(f"{name}.jpg", prompt, f"{name}.wav"))
    return samples


def save_learned(folder: Path, checkpoint: str, pipe: MelFusionPipeline) -> str:
    """Saves the synapse and, where the checkpoint has one beside it, the LoRA; says what that takes."""
    pipe.synapse.save_pretrained(folder)
    file, lora = folder / LORA_WEIGHT_NAME_SAFE, Source("--checkpoint", checkpoint)
    file.unlink(missing_ok=True)
    if file.name in lora.names("synapse"):
        tensors, settings = read_lora(lora, "synapse", file.name)
        tensors = {name.removeprefix("unet."): rows.to(pipe.synapse.dtype) for name, rows in tensors.items()}
        pipe.save_lora_weights(folder, tensors, settings)
    sizes = {path.name: format_size(path.stat().st_size) for path in folder.glob("*.safetensors")}
    lora_size = sizes.pop(file.name, None)
    learned = f"the synapse ({', '.join(sizes.values())})"
    return learned if lora_size is None else f"{learned} and a LoRA of the music UNet ({lora_size})"


def size_of_pipeline(pipe: MelFusionPipeline) -> int:
    """The bytes of all weights."""
    models = [model for model in pipe.components.values() if isinstance(model, torch.nn.Module)]
    return sum(weight.nbytes for model in models for weight in model.state_dict().values())


def format_size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.2f} MB"


def upload(folder: Path, repo_id: str, private: bool | None = None) -> str:
    """Uploads a folder, without what does not belong on the Hub; returns the repository's full name."""
    repo_id = create_repo(repo_id, private=private, exist_ok=True).repo_id
    upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=UNPUBLISHED)
    return repo_id


# ---------------------------------------- the command


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder or Hub id of the trained pipeline")
    parser.add_argument("--hub_model_id", required=True, help="user/name")
    parser.add_argument(
        "--output", type=new_folder, default=Path("build/published"), help="folder to write and upload"
    )
    parser.add_argument("--only_learned", action="store_true", help="synapse and LoRA, without the base models")
    parser.add_argument("--dry_run", action="store_true", help="write the folder only")
    parser.add_argument("--private", action="store_true", help="if the repository is new")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of the published weights")
    parser.add_argument("--sample", nargs=2, action="append", default=[], metavar=("IMAGE", "PROMPT"))
    parser.add_argument("--credits", default="", help="whose the samples' pictures are, and their licence")
    parser.add_argument("--results", type=Path, help="results.json of evaluate.py")
    parser.add_argument("--license", help="a licence of the Hub's list; default: other, those of the base models")
    parser.add_argument(
        "--base_model",
        nargs="*",
        help="Hub ids; default: those that training started from. With"
        " --only_learned: the picture's and the music's, in this order",
    )
    parser.add_argument("--dataset", nargs="*", default=[], help="Hub ids of the training data")
    parser.add_argument(
        "--num_inference_steps", type=positive_int, help="of the samples; default: the checkpoint's own"
    )
    parser.add_argument(
        "--audio_length_in_s", type=positive_seconds, help="of the samples; default: the checkpoint's own"
    )
    parser.add_argument("--image_guidance_scale", type=float, help="of the samples; default: the checkpoint's own")
    parser.add_argument("--seed", type=random_seed, default=0, help="of the samples")
    args = parser.parse_args(arguments)
    missing = [str(path) for path in (args.results, *(path for path, _ in args.sample)) if path and not is_file(path)]
    if missing:
        parser.error(f"these files do not exist: {', '.join(missing)}")
    args.results = read_results(parser, args.results) if args.results else None
    if not is_repo_id(args.hub_model_id):
        parser.error(f"--hub_model_id must be like user/name, but is {args.hub_model_id!r}")
    try:
        validate_repo_id(args.hub_model_id)
    except HFValidationError as error:
        parser.error(f"--hub_model_id: {error}")
    if args.only_learned:
        check_learned(parser, args)
    if Path(args.checkpoint).resolve() == args.output.resolve():
        parser.error("--output must be another folder than --checkpoint")
    return args


def check_learned(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    training = read_training(args.checkpoint)
    if (args.output / "model_index.json").exists():
        parser.error(f"--output {args.output} holds a whole pipeline: name another folder with --only_learned")
    if training["facts"].get("trained") == TRAINED["unet"]:
        parser.error("--only_learned: the music UNet itself was trained; publish the whole pipeline")
    if training["facts"].get("starting from", "").startswith(WHOLE_PIPELINE):
        parser.error(
            "--only_learned: training started from a whole pipeline, whose music UNet need not be a base model's:"
            " publish all of it, or train with --pretrained_image_model, --pretrained_music_model and --synapse"
        )
    base_models = args.base_model or training["base_models"]
    if len(base_models) < 2 or (args.base_model and len(base_models) > 2):
        parser.error(
            "--only_learned needs --base_model PICTURE_MODEL MUSIC_MODEL, the Hub ids with which it will be loaded;"
            f" the training tells {training['base_models'] or 'none'}"
        )


def read_results(parser: argparse.ArgumentParser, path: Path) -> dict:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(results["systems"], dict) or "triplets" not in results["settings"]:
            raise KeyError("triplets")
    except (ValueError, KeyError, TypeError) as error:
        parser.error(f"--results {path} is no results.json of evaluate.py: {error!r}")
    return results


def is_file(path: str | Path) -> bool:
    return Path(path).is_file()


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    training = read_training(args.checkpoint)
    pipe = MelFusionPipeline.from_pretrained(args.checkpoint)
    args.output.mkdir(parents=True, exist_ok=True)
    samples = make_samples(pipe.to(get_device()), args)
    pipe.to("cpu")
    # Diffusers warns of each component that is asked for a dtype, also for the one that it has.
    if {part.dtype for part in pipe.components.values() if isinstance(part, torch.nn.Module)} != {DTYPES[args.dtype]}:
        pipe.to(DTYPES[args.dtype])
    sizes = save_learned(args.output, args.checkpoint, pipe) if args.only_learned else None
    if sizes is None:
        pipe.save_pretrained(args.output)
    write_training(args.output, training["base_models"], training["facts"])
    publication = Publication(
        name=args.hub_model_id,
        base_models=training["base_models"] if args.base_model is None else args.base_model,
        facts=training["facts"],
        license=args.license,
        datasets=args.dataset,
        samples=samples,
        credits=args.credits,
        results=args.results,
        sizes=sizes,
    )
    write_model_card(args.output, pipe, publication)
    whole = format_size(size_of_pipeline(pipe))
    print(f"wrote {args.output}: {sizes + ', of ' if sizes else ''}a whole pipeline of {whole}")
    if not args.dry_run:
        print(f"published {upload(args.output, args.hub_model_id, args.private or None)}")


if __name__ == "__main__":
    with errors_in_one_line():
        main()

"""Publishes a trained pipeline: weights, loading code, samples to listen to, and a complete model card.

python examples/publish.py --checkpoint my-melfusion --hub_model_id you/my-melfusion --results results/results.json \
    --sample examples/images/lightning.jpg "a slow cello" --credits "Photograph: NASA, public domain"

`--dry_run` writes the folder and uploads nothing. The training script writes its card with the functions below.
"""

import argparse
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers.utils.torch_utils import get_device
from huggingface_hub import EvalResult, ModelCard, ModelCardData, create_repo, hf_hub_url, upload_folder
from huggingface_hub.utils import validate_repo_id

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.audio import save_audio
from melfusion_pipeline.data import open_image
from melfusion_pipeline.pictures_melfusion import to_rgb

TRAINING = "training.json"
SAMPLES = "samples"
LICENSE = "LICENSE.md"
# What training leaves beside the pipeline, and every format that runs code when it is read.
UNPUBLISHED = ["checkpoint-*", ".*", "logs/*", "trajectories/*", "validation/*"]
UNPUBLISHED += [f"*.{suffix}" for suffix in ("bin", "ckpt", "pickle", "pkl", "pt", "pth")]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

TEXT = """# {name}

MeLFusion (CVPR 2024, [arXiv 2406.04673](https://arxiv.org/abs/2406.04673)): a picture and a sentence become music.
{samples}
## Load it

With the package `melfusion_pipeline` installed; no code of this repository runs:

```python
import PIL.Image
from melfusion_pipeline import MelFusionPipeline

pipe = MelFusionPipeline.from_pretrained("{name}")
audio = pipe(PIL.Image.open("picture.jpg"), "{prompt}").audios[0]
```

Without it, with the code of this repository, if you trust it:

```python
import PIL.Image
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)
audio = pipe(PIL.Image.open("picture.jpg"), "{prompt}").audios[0]
```

Either way `audio` is a float32 array at `pipe.sampling_rate` = {sampling_rate} Hz.
{results}
## Training

{facts}

## Licence

{license}

## Cite

```bibtex
@inproceedings{{chowdhury2024melfusion,
  title     = {{MeLFusion: Synthesizing Music from Image and Language Cues using Diffusion Models}},
  author    = {{Chowdhury, Sanjoy and Nag, Sayan and Joseph, K J and Srinivasan, Balaji Vasan and Manocha, Dinesh}},
  booktitle = {{Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition}},
  year      = {{2024}}
}}
```
"""


@dataclass
class Sample:
    """A picture, a prompt and the music made of them, as files of the published folder."""

    picture: str
    prompt: str
    audio: str


@dataclass
class Publication:
    """What a card says beside what the pipeline itself tells."""

    name: str
    base_models: Sequence[str] = ()
    facts: dict = field(default_factory=dict)
    license: str | None = None
    datasets: Sequence[str] = ()
    samples: Sequence[Sample] = ()
    credits: str = ""
    results: dict | None = None


# ---------------------------------------- the card


def write_model_card(folder: Path, pipe: MelFusionPipeline, publication: Publication) -> None:
    """Writes `README.md`, with the front matter that the Hub reads, and `LICENSE.md` beside a saved pipeline."""
    alphas = ", ".join(f"{alpha:.3f}" for alpha in pipe.synapse.alphas.tolist())
    prompt = publication.samples[0].prompt if publication.samples else "a slow cello"
    text = TEXT.format(
        name=publication.name,
        samples=format_samples(publication),
        prompt=prompt.replace("\\", "\\\\").replace('"', '\\"'),
        sampling_rate=pipe.sampling_rate,
        results=format_results_section(publication.results),
        facts=format_facts(publication.facts | {"alphas, deepest layer first": alphas}),
        license=publication.license or f"See [{LICENSE}]({LICENSE}).",
    )
    (folder / LICENSE).write_text(format_license(publication))
    front_matter = describe(publication).to_yaml()
    ModelCard(f"---\n{front_matter}\n---\n\n{text}").save(folder / "README.md")


def format_license(publication: Publication) -> str:
    sources = [f"- [{model}](https://huggingface.co/{model})" for model in publication.base_models]
    about = f"Licence of what was trained: {publication.license}." if publication.license else ""
    about += " The licences of the base models and of the training data apply." if sources or not about else ""
    return "\n".join(["# Licence", "", about.strip(), "", *sources]).rstrip() + "\n"


def describe(publication: Publication) -> ModelCardData:
    """The front matter."""
    widget = [{"text": sample.prompt, "output": {"url": sample.audio}} for sample in publication.samples]
    own_license = {"license": publication.license}
    if publication.license is None:
        own_license = {"license": "other", "license_name": "licences-of-the-base-models", "license_link": LICENSE}
    return ModelCardData(
        **own_license,
        library_name="diffusers",
        pipeline_tag="text-to-audio",
        tags=["melfusion", "image-to-music", "text-to-music", "music"],
        base_model=list(publication.base_models) or None,
        datasets=list(publication.datasets) or None,
        widget=widget or [{"text": "a slow cello"}],
        **list_results(publication),
    )


def list_results(publication: Publication) -> dict:
    """The figures of the system with the picture, as the Hub's evaluation results."""
    systems = publication.results["systems"] if publication.results else {}
    if "melfusion" not in systems:
        return {}
    triplets = Path(publication.results["settings"]["triplets"]).name
    results = [
        EvalResult(
            task_type="text-to-audio",
            dataset_type=Path(triplets).stem,
            dataset_name=triplets,
            metric_type=column.lower().replace(" ", "-"),
            metric_name=column,
            metric_value=interval[0],
        )
        for column, interval in systems["melfusion"]["scores"].items()
    ]
    return {"model_name": publication.name, "eval_results": results}


def format_samples(publication: Publication) -> str:
    if not publication.samples:
        return ""
    lines = ["", "## Listen", "", "| picture | prompt | music |", "|---|---|---|"]
    for sample in publication.samples:
        # Markdown's relative addresses work for pictures on the Hub, but not inside of HTML.
        source = hf_hub_url(publication.name, sample.audio) if is_repo_id(publication.name) else sample.audio
        prompt = sample.prompt.replace("|", "\\|")
        lines.append(f'| ![]({sample.picture}) | {prompt} | <audio controls src="{source}"></audio> |')
    return "\n".join([*lines, *(["", publication.credits] if publication.credits else []), ""])


def format_results_section(results: dict | None) -> str:
    if results is None:
        return ""
    # Its table needs the extra `eval`, which a card without results does not.
    from evaluate_scores import format_results

    about = "Each figure with its 95% interval, as `examples/evaluate.py` wrote them."
    return f"\n## Results\n\n{about}\n\n{hide_folders(format_results(results))}"


def format_facts(facts: dict) -> str:
    rows = (f"| {name} | {value} |" for name, value in facts.items())
    return "\n".join(["| fact | value |", "|---|---|", *rows])


def hide_folders(text: str) -> str:
    """Leaves of every absolute path only its last part: the folders of a machine do not belong on a card."""
    return re.sub(r"(?<![\w./:<])/(?:[^\s/,|]+/)+", "", text)


def is_repo_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


# ---------------------------------------- the folder


def write_training(folder: Path, base_models: Sequence[str], facts: dict) -> None:
    """Keeps what training tells of itself, for cards to come; of folders of this machine only the last name."""
    facts = {name: hide_folders(value) if isinstance(value, str) else value for name, value in facts.items()}
    (folder / TRAINING).write_text(json.dumps({"base_models": list(base_models), "facts": facts}, indent=2) + "\n")


def read_training(checkpoint: str) -> dict:
    """What `write_training` kept, if the checkpoint is a folder that training wrote."""
    path = Path(checkpoint, TRAINING)
    return json.loads(path.read_text()) if path.is_file() else {"base_models": [], "facts": {}}


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
    parser.add_argument("--output", type=Path, default=Path("build/published"), help="folder to write and upload")
    parser.add_argument("--dry_run", action="store_true", help="write the folder only")
    parser.add_argument("--private", action="store_true", help="if the repository is new")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of the published weights")
    parser.add_argument("--sample", nargs=2, action="append", default=[], metavar=("IMAGE", "PROMPT"))
    parser.add_argument("--credits", default="", help="whose the samples' pictures are, and their licence")
    parser.add_argument("--results", type=Path, help="results.json of evaluate.py")
    parser.add_argument("--license", help="a licence of the Hub's list; default: other, those of the base models")
    parser.add_argument("--base_model", nargs="*", help="Hub ids; default: those that training started from")
    parser.add_argument("--dataset", nargs="*", default=[], help="Hub ids of the training data")
    parser.add_argument("--num_inference_steps", type=int, help="of the samples; default: the checkpoint's own")
    parser.add_argument("--audio_length_in_s", type=float, help="of the samples; default: the checkpoint's own")
    parser.add_argument("--image_guidance_scale", type=float, help="of the samples; default: the checkpoint's own")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    args = parser.parse_args(arguments)
    missing = [str(path) for path in (args.results, *(path for path, _ in args.sample)) if path and not is_file(path)]
    if missing:
        parser.error(f"these files do not exist: {', '.join(missing)}")
    if not is_repo_id(args.hub_model_id):
        parser.error(f"--hub_model_id must be like user/name, but is {args.hub_model_id!r}")
    validate_repo_id(args.hub_model_id)
    if Path(args.checkpoint).resolve() == args.output.resolve():
        parser.error("--output must be another folder than --checkpoint")
    return args


def is_file(path: str | Path) -> bool:
    return Path(path).is_file()


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    training = read_training(args.checkpoint)
    pipe = MelFusionPipeline.from_pretrained(args.checkpoint)
    args.output.mkdir(parents=True, exist_ok=True)
    samples = make_samples(pipe.to(get_device()), args)
    pipe.to("cpu", DTYPES[args.dtype]).save_pretrained(args.output)
    write_training(args.output, training["base_models"], training["facts"])
    publication = Publication(
        name=args.hub_model_id,
        base_models=training["base_models"] if args.base_model is None else args.base_model,
        facts=training["facts"],
        license=args.license,
        datasets=args.dataset,
        samples=samples,
        credits=args.credits,
        results=json.loads(args.results.read_text()) if args.results else None,
    )
    write_model_card(args.output, pipe, publication)
    print(f"wrote {args.output}")
    if not args.dry_run:
        print(f"published {upload(args.output, args.hub_model_id, args.private or None)}")


if __name__ == "__main__":
    main()

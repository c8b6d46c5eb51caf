"""Model cards: what is told of a trained pipeline, beside its weights and on the Hub."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_url

from melfusion_pipeline import MelFusionPipeline

TRAINING = "training.json"
LICENSE = "LICENSE.md"
# Before the name of a pipeline that training started from, in place of base models.
WHOLE_PIPELINE = "the whole pipeline "
# What `--train` of the training script trains.
TRAINED = {
    "synapse": "the synapse",
    "lora": "the synapse and a LoRA of the music UNet",
    "unet": "the synapse and the music UNet",
}

TEXT = """# {name}

MeLFusion (CVPR 2024, [arXiv 2406.04673](https://arxiv.org/abs/2406.04673)): a picture and a sentence become music.
{samples}
## Load it

{loading}
`audio` is a float32 array at `pipe.sampling_rate` = {sampling_rate} Hz.
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

LOAD_WHOLE = """With the package `melfusion_pipeline` installed; no code of this repository runs:

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
"""

LOAD_LEARNED = """This repository holds only what was learned: {sizes}. The rest comes from the base models. With
the package `melfusion_pipeline` installed{peft}:

```python
import PIL.Image
from melfusion_pipeline import MelFusionPipeline

pipe = MelFusionPipeline.from_base_models("{image_model}", "{music_model}", synapse="{name}")
audio = pipe(PIL.Image.open("picture.jpg"), "{prompt}").audios[0]
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
    # What the folder holds, in words, if that is not a whole pipeline.
    sizes: str | None = None


# ---------------------------------------- the card


def write_model_card(folder: Path, pipe: MelFusionPipeline, publication: Publication) -> None:
    """Writes `README.md`, with the front matter that the Hub reads, and `LICENSE.md` beside a saved pipeline."""
    alphas = ", ".join(f"{alpha:.3f}" for alpha in pipe.synapse.alphas.tolist())
    text = TEXT.format(
        name=publication.name,
        samples=format_samples(publication),
        loading=format_loading(publication),
        sampling_rate=pipe.sampling_rate,
        results=format_results_section(publication.results),
        facts=format_facts(publication.facts | {"alphas, deepest layer first": alphas}),
        license=publication.license or f"See [{LICENSE}]({LICENSE}).",
    )
    (folder / LICENSE).write_text(format_license(publication))
    front_matter = describe(publication).to_yaml()
    ModelCard(f"---\n{front_matter}\n---\n\n{text}").save(folder / "README.md")


def format_loading(publication: Publication) -> str:
    prompt = publication.samples[0].prompt if publication.samples else "a slow cello"
    prompt = prompt.replace("\\", "\\\\").replace('"', '\\"')
    if publication.sizes is None:
        return LOAD_WHOLE.format(name=publication.name, prompt=prompt)
    image_model, music_model = publication.base_models[:2]
    return LOAD_LEARNED.format(
        name=publication.name,
        prompt=prompt,
        sizes=publication.sizes,
        peft=" and PEFT (`pip install peft`)" if "LoRA" in publication.sizes else "",
        image_model=image_model,
        music_model=music_model,
    )


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


# ---------------------------------------- what training tells of itself


def write_training(folder: Path, base_models: Sequence[str], facts: dict) -> None:
    """Keeps what training tells of itself, for cards to come; of folders of this machine only the last name."""
    facts = {name: hide_folders(value) if isinstance(value, str) else value for name, value in facts.items()}
    (folder / TRAINING).write_text(json.dumps({"base_models": list(base_models), "facts": facts}, indent=2) + "\n")


def read_training(checkpoint: str) -> dict:
    """What `write_training` kept, if the checkpoint is a folder that training wrote."""
    path = Path(checkpoint, TRAINING)
    return json.loads(path.read_text()) if path.is_file() else {"base_models": [], "facts": {}}

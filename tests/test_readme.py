"""Every block of code in README.md, run as a reader runs it: top to bottom, unchanged, with a stand-in for the Hub.

The blocks build on one another, as they do on the page: what one trains the next one evaluates and publishes. Python
blocks share one namespace a section. The Hub's ids are those of small checkpoints with random weights in the layouts
of the real repositories. What differs from a reader's machine is in `as_run`, and nowhere else.
"""

import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
import torch
from conftest import photograph, use_hub
from diffusers import DDIMScheduler, PNDMScheduler
from extractor_checkpoints import save_ast, save_clap, save_clip
from films import clicks, write_film
from full_size import build_components
from hub_standin import HubStandIn
from processes import run_launched, run_script
from safetensors.torch import load_file
from transformers import ClapFeatureExtractor, CLIPImageProcessor
from untrained import (
    audioldm2_components,
    audioldm2_unet,
    autoencoder,
    music_components,
    music_unet,
    picture_components,
    picture_unet,
    untrained_components,
)

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.attention_melfusion import MAX_RECORDED_TOKENS
from melfusion_pipeline.data import load_rows
from melfusion_pipeline.film import read_film
from melfusion_pipeline.inversion_melfusion import record_image_features

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TEXT = README.read_text()
BUNDLED = "checkpoints/small"
LANGUAGES = {"python", "bash", "json", "mermaid", "bibtex"}
# What a reader has in the folder in which the commands are given.
REPOSITORY = ("LICENSE", "Makefile", "README.md", "benchmarks", "examples", "melfusion_pipeline", "model_index.json",
              "pyproject.toml", "setup.cfg", "tests")  # fmt: skip
# Random weights need neither long training nor long music: these flags are appended to the commands as given.
SHORTER = {
    "train_melfusion.py": "--max_train_steps 2 --audio_length_in_s 1.28 --num_validation_samples 1",
    "evaluate.py": "--num_inference_steps 2 --audio_length_in_s 1.28",
    "publish.py": "--num_inference_steps 2",
    "generate.py": "--num_inference_steps 2",
    "slideshow.py": "--num_inference_steps 2 --seconds 1 --size 320x180",
    "score_film.py": "--num_inference_steps 2",
}


class Block(NamedTuple):
    """A block of code: its section, the number of its first line, its language and its text."""

    section: str
    line: int
    language: str
    text: str


def read_blocks(text: str) -> list[Block]:
    """Lists the blocks of a Markdown page."""
    blocks, section, start = [], "", None
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("```") and start is None:
            start = number
        elif line == "```":
            blocks.append(Block(section, start + 2, lines[start][3:], "\n".join(lines[start + 1 : number])))
            start = None
        elif start is None and line.startswith("#"):
            section = line.lstrip("# ")
    assert start is None, f"the block that begins in line {start + 1} has no end"
    return blocks


BLOCKS = read_blocks(TEXT)


def as_run(command: str) -> str:
    """The command as it is run here: all that differs from a reader's machine.

    `pip install` builds the metadata, but neither installs nor downloads (that its extras exist is tested below);
    `make` prints what it would run, since CI runs the targets; our scripts are given flags that make them shorter, and
    `python script` runs in a copy of this process (`processes.py`), which has imported the libraries already, and so
    does the script that `accelerate launch` starts, with the variables that accelerate sets for it.
    """
    if command.startswith("pip install "):
        quick = f"{sys.executable} -m pip install --dry-run --no-deps --no-index --no-build-isolation "
        return command.replace("pip install ", quick, 1)
    if command.startswith("make "):
        return command.replace("make ", "make --dry-run VENV=build/no-venv ", 1)
    for script, flags in SHORTER.items():
        if f"examples/{script} " in command:
            return f"{command} {flags}"
    return command


# ---------------------------------------- what the reader has


def save(folder: Path, components: dict) -> Path:
    """Saves components each to its folder, with an index as diffusers writes it."""
    index = {"_class_name": "DiffusionPipeline"}
    for name, component in components.items():
        component.save_pretrained(folder / name)
        index[name] = [type(component).__module__.split(".")[0], type(component).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def stable_diffusion(folder: Path) -> Path:
    """The layout of stable-diffusion-v1-5: a PNDM scheduler and a processor of pictures that nobody here reads."""
    components = {name.removeprefix("image_"): component for name, component in picture_components().items()}
    scheduler = PNDMScheduler.from_config(components["scheduler"].config, skip_prk_steps=True)
    extra = {"unet": picture_unet(), "scheduler": scheduler, "feature_extractor": CLIPImageProcessor()}
    return save(folder, components | extra)


def audioldm(folder: Path) -> Path:
    """The layout of audioldm-s-full-v2, with its 8 latent channels, 64 mel bands and 5.12 s of default length."""
    size = {"in_channels": 8, "out_channels": 8, "sample_size": 128}
    components = music_components(mel_bands=64)
    components["vae"] = autoencoder(in_channels=1, out_channels=1, latent_channels=8, scaling_factor=0.9)
    save(folder, components | {"unet": music_unet(**size)})
    # As the public AudioLDM repositories are reported to be.
    for name in ("unet", "vae"):
        (file,) = (folder / name).glob("*.safetensors")
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    return folder


def audioldm2(folder: Path) -> Path:
    """The layout of audioldm2, whose default length is 10.24 s."""
    components = audioldm2_components(mel_bands=64)
    components["vae"] = autoencoder(in_channels=1, out_channels=1, latent_channels=8, scaling_factor=0.9)
    unet = audioldm2_unet(in_channels=8, out_channels=8, sample_size=256)
    return save(folder, components | {"unet": unet, "feature_extractor": ClapFeatureExtractor()})


CHECKPOINTS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": stable_diffusion,
    "cvssp/audioldm-s-full-v2": audioldm,
    "cvssp/audioldm2": audioldm2,
    "laion/clap-htsat-unfused": save_clap,
    "openai/clip-vit-large-patch14": save_clip,
    "MIT/ast-finetuned-audioset-10-10-0.4593": save_ast,
}


def write_set(folder: Path) -> None:
    """Writes train, validation and test sets of pictures, captions and decaying tones."""
    folder.mkdir()
    times = np.arange(2 * 16000) / 16000
    for row in range(8):
        photograph(row, 40, 36).save(folder / f"{row}.png")
        tone = 0.4 * np.sin(2 * np.pi * 220 * 2 ** (row / 4) * times) * np.exp(-3 * (times % 0.31))
        soundfile.write(folder / f"{row}.flac", tone, 16000)
    for name, rows in (("train", range(8)), ("validation", range(2)), ("test", range(6))):
        lines = [{"image": f"{row}.png", "audio": f"{row}.flac", "caption": f"music {row}"} for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> HubStandIn:
    """A Hub on the loopback interface that serves small checkpoints under the names on the page."""
    folder = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as monkeypatch, use_hub(folder / "home", monkeypatch) as hub:
        for name, make in CHECKPOINTS.items():
            (folder / name).mkdir(parents=True)
            hub.add_repo(name, make(folder / name))
        yield hub


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, hub) -> Path:
    """A copy of this repository with triplets, a song and a film; it is the folder in which everything runs."""
    folder = tmp_path_factory.mktemp("repository")
    for name in REPOSITORY:
        (folder / name).symlink_to(ROOT / name)
    if (ROOT / BUNDLED).is_dir():
        # A link would lead out of the folder, where an index may not point.
        shutil.copytree(ROOT / BUNDLED, folder / BUNDLED)
    else:
        MelFusionPipeline(**untrained_components(mel_bands=64, latent_frames=128)).save_pretrained(folder / BUNDLED)
    write_set(folder / "set")
    for name, without in (("photographs", "*.flac"), ("songs", "*.png")):
        shutil.copytree(folder / "set", folder / name, ignore=shutil.ignore_patterns("*.jsonl", without))
    song = np.sin(2 * np.pi * 440 * np.arange(45 * 44100) / 44100) * 0.4
    soundfile.write(folder / "song.mp3", song, 44100)
    write_film(folder / "holiday.mp4", sound=clicks([1, 2], 4))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        yield folder


@pytest.fixture(scope="module")
def namespaces() -> dict[str, dict]:
    """What the Python blocks of each section have defined."""
    return {}


# ---------------------------------------- the blocks


def run_python(block: Block, namespaces: dict[str, dict]) -> None:
    # The numbers of lines in an error are then those of the page.
    source = "\n" * (block.line - 1) + block.text
    exec(compile(source, README.name, "exec"), namespaces.setdefault(block.section, {"__name__": "readme"}))


def run_bash(block: Block, folder: Path) -> None:
    for command in re.sub(r"\\\n\s*", "", block.text).splitlines():
        command = command.partition("  #")[0].strip()
        if not command or command.startswith("#"):
            continue
        command = as_run(command)
        if command.startswith("python "):
            result = run_script(*shlex.split(command)[1:], folder=folder)
        elif command.startswith("accelerate launch "):
            result = run_launched(*shlex.split(command)[2:], folder=folder)
        else:
            result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"


def check_triplets(block: Block, workspace: Path) -> None:
    """The rows on the page are rows that `load_rows` takes, with every field."""
    path = workspace / "page.jsonl"
    path.write_text(block.text + "\n")
    for line, row in zip(block.text.splitlines(), load_rows(path), strict=True):
        assert row["problem"] is None
        given = json.loads(line)
        assert all(str(row[column]).endswith(str(value)) for column, value in given.items())


def check_bibtex(block: Block, workspace: Path) -> None:
    assert block.text.startswith("@") and block.text.count("{") == block.text.count("}")


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"line {block.line}, {block.language}")
def test_block_runs(block, workspace, namespaces, tmp_path):
    assert block.language in LANGUAGES
    if block.language == "python":
        run_python(block, namespaces)
    elif block.language == "bash":
        run_bash(block, tmp_path)
    elif block.language == "json":
        check_triplets(block, workspace)
    elif block.language == "bibtex":
        check_bibtex(block, workspace)


def test_the_blocks_made_what_the_page_says(workspace, hub, namespaces):
    assert soundfile.info(workspace / "build" / "lightning.wav").samplerate == 16000
    # Eleven pictures of a second each, and the film's four seconds.
    for name, seconds in (("slideshow", 11), ("holiday", 4)):
        assert read_film(workspace / "build" / f"{name}.mp4").duration == pytest.approx(seconds, abs=0.01)
        assert (workspace / "build" / f"{name}.json").is_file() and (workspace / "build" / f"{name}.png").is_file()
    assert soundfile.info(workspace / "cello.wav").duration == pytest.approx(10.24)
    assert list(namespaces["With a loop of your own"]["latents"].shape) == [1, 8, 256, 16]
    results = json.loads((workspace / "results" / "results.json").read_text())
    assert set(results["systems"]) == {"melfusion", "text-only", "shuffled", "reference"}
    assert all(len(system["scores"]) == 8 for system in results["systems"].values())
    card = hub.files("you/my-melfusion")["README.md"].decode()
    assert "| melfusion | 6 | 16000 |" in card and "| steps | 2 |" in card and "samples/0-lightning.wav" in card
    weights = {name for name in hub.files("you/my-lora") if name.endswith(".safetensors")}
    assert weights == {"diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors"}
    assert namespaces["A LoRA instead of the whole music UNet"]["pipe"].fused_loras == {"default_0", "again"}
    loaded = MelFusionPipeline.from_pretrained("my-melfusion").synapse
    assert torch.equal(namespaces["Publish it, and load it again"]["pipe"].synapse.alphas, loaded.alphas)
    assert loaded.alphas.any()


# ---------------------------------------- the rest of the page


def test_every_file_that_the_page_names_exists():
    links = re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", TEXT)
    paths = {path for pair in links for path in pair if path and not re.match(r"[a-z]+:", path)}
    paths |= set(re.findall(r"(?:examples|benchmarks|tests|checkpoints)/[\w./-]*\w", TEXT))
    assert len(paths) > 5
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_make_demo_is_what_the_page_says():
    commands = subprocess.run(["make", "-n", "demo", "VENV=none"], cwd=ROOT, capture_output=True, text=True).stdout
    assert ("examples/demo.py" in commands) == ("build/demo" in TEXT)


def test_the_extras_on_the_page_are_those_of_the_package():
    named = set(re.findall(r"\.\[(\w+)\]", TEXT))
    extras = re.search(r"\[options.extras_require\]\n(.*?)\n\n", (ROOT / "setup.cfg").read_text(), re.DOTALL)[1]
    assert named and named <= set(re.findall(r"^(\w+) =", extras, re.MULTILINE))


# ---------------------------------------- the sizes in the diagram


def measure_sizes() -> dict[str, list[str]]:
    """The sizes of everything that flows through the pipeline, full size, without a number computed."""
    with torch.device("meta"):
        pipe = MelFusionPipeline(**build_components())
        pixels, seconds = torch.empty(1, 3, pipe.default_image_size, pipe.default_image_size), 10.24
        null = torch.empty(1, 77, pipe.image_unet.config.cross_attention_dim)
        noise = torch.empty(1, *pipe._latent_shape(seconds))
        embeds = torch.empty(1, pipe.unet.config.projection_class_embeddings_input_dim)
    with torch.no_grad():
        image_latents = pipe.image_vae.encode(pixels).latent_dist.mode()
        layers = pipe.synapse.config.image_layers
        features = record_image_features(pipe.image_unet, DDIMScheduler(), image_latents, null, layers, 1)
        fitted, _ = pipe.fit_image_features(features, noise)
        latents = pipe.unet(noise, torch.empty((), device="meta"), None, class_labels=embeds).sample
        mel = pipe.decode_latents(latents)
        samples = pipe.vocoder(mel[0]).shape[-1]
    assert embeds.shape[1] == pipe.text_encoder.config.projection_dim
    exact = round(seconds * pipe.vocoder.config.sampling_rate)
    # The vocoder's first convolution adds a few samples, which the pipeline cuts off.
    assert 0 <= samples - exact < 160
    return {
        "picture": [size(pixels[0])],
        "image_latents": [size(image_latents[0])],
        "recorded": count_sizes(features.keys),
        "fitted": count_sizes(fitted.keys),
        "embedding": [size(embeds[0])],
        "noise": [size(noise[0])],
        "latents": [size(latents[0])],
        "mel": [size(mel[0, 0])],
        "waveform": [str(exact)],
    }


def size(tensor: torch.Tensor) -> str:
    return " x ".join(map(str, tensor.shape))


def count_sizes(by_layer: dict[str, torch.Tensor]) -> list[str]:
    sizes = [size(tensor[0, 0]) for tensor in by_layer.values()]
    return [f"{sizes.count(one)} layers of {one}" for one in dict.fromkeys(sizes)]


def test_the_sizes_in_the_diagram_are_those_of_the_real_models():
    (diagram,) = [block.text for block in BLOCKS if block.language == "mermaid"]
    labels = {name: label.split("<br>") for name, label in re.findall(r'(\w+)\["(.*?)"\]', diagram)}
    number = r"(\d+ layers of )?\d+( x \d+)*"
    shown = {name: [line for line in lines if re.fullmatch(number, line)] for name, lines in labels.items()}
    measured = measure_sizes()
    assert {name: sizes for name, sizes in shown.items() if sizes} == measured
    layers = sum(int(line.split()[0]) for line in measured["recorded"])
    steps = inspect.signature(MelFusionPipeline).parameters["default_num_inference_steps"].default
    with torch.device("meta"):
        inversion_steps = MelFusionPipeline(**build_components()).default_num_inversion_steps
    assert f"keys and values of {layers} layers at {inversion_steps} noise levels" in diagram
    assert f"{inversion_steps} passes" in diagram and f"UNet, {steps} steps" in diagram
    assert max(int(line.split()[3]) for line in measured["recorded"]) == MAX_RECORDED_TOKENS

"""The systems that evaluate.py compares: each one's picture and prompt for a row, and its clips, one file a row.

A clip depends on the seed, its row and its system only, so that it does not matter in how many runs or by how many
processes they are made. All systems start from the same noise.
"""

import argparse
import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import tqdm
from diffusers import SchedulerMixin
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from melfusion_pipeline import ImageFeatures, MelFusionPipeline
from melfusion_pipeline.audio import (
    AV_SUFFIXES,
    Spectrogram,
    load_audio,
    load_random_crop,
    save_audio,
    waveform_to_latents,
)
from melfusion_pipeline.caches import hash_weights
from melfusion_pipeline.data import is_silent, open_image
from melfusion_pipeline.files_melfusion import atomic_write
from melfusion_pipeline.pictures_melfusion import to_rgb

SYSTEMS = ("melfusion", "text-only", "caption", "shuffled", "reference", "storyboard")
# What of a call is the picture's, and goes to `encode_image`.
ENCODING = ("feature_source", "num_inversion_steps")
SUFFIXES = (".flac", ".wav", ".ogg", ".mp3", *AV_SUFFIXES)


class ImageCaptioner:
    """Describes a picture in a sentence: a transformers image-to-text model that needs no prompt (BLIP, BLIP-2, GIT).

    Args:
        name: Hub id, such as `Salesforce/blip-image-captioning-base`, or folder. Only safetensors are read.
        device: Where it runs.
    """

    def __init__(self, name: str, device: torch.device):
        self.processor = AutoProcessor.from_pretrained(name)
        self.model = AutoModelForImageTextToText.from_pretrained(name, use_safetensors=True).to(device).eval()

    def __call__(self, image: Image.Image) -> str:
        inputs = self.processor(images=to_rgb(image), return_tensors="pt").to(self.model.device)
        tokens = self.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=50)
        return self.processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()


def name_and_path(text: str) -> tuple[str, str]:
    """Splits an argument `name=path`."""
    name, _, path = text.partition("=")
    if not (name and path):
        raise argparse.ArgumentTypeError(f"must be like name=path, but is {text!r}")
    return name, path


def digest_components(components: dict[str, object]) -> str:
    """SHA-256 of weights and noise schedules, so that clips of a retrained checkpoint cannot join those there are."""
    digest = hashlib.sha256()
    for name, component in sorted(components.items()):
        if isinstance(component, SchedulerMixin):
            config = {key: value for key, value in component.config.items() if not key.startswith("_")}
            digest.update(f"{name} {json.dumps(config, sort_keys=True, default=str)}".encode())
        elif isinstance(component, torch.nn.Module):
            digest.update(name.encode() + hash_weights(component))
    return digest.hexdigest()


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file as a whole: a reader finds the old content or the new."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def claim_folder(folder: Path, settings: dict) -> None:
    """Writes `settings.json` into a system's folder, or checks that its clips were made with the same settings.

    Raises:
        ValueError: If they were not, or if there are files of unknown origin.
    """
    path, settings = folder / "settings.json", json.loads(json.dumps(settings))
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.glob("[!.]*")):
            raise ValueError(f"{str(folder)!r} holds files, but no settings.json: give another `--output`.")
        return replace_file(path, json.dumps(settings, indent=2).encode())
    found = json.loads(path.read_text())
    names = [name for name in sorted(found | settings) if found.get(name) != settings.get(name)]
    if names:
        changes = "; ".join(f"{name}: {found.get(name)!r} there, {settings.get(name)!r} now" for name in names)
        raise ValueError(f"The clips in {str(folder)!r} were made otherwise ({changes}): give another `--output`.")


def shuffle_pictures(pictures: Sequence[str], seed: int) -> list[str]:
    """A fixed derangement: gives each row the picture of another row, never one equal to its own.

    Raises:
        ValueError: If a picture serves more than half of the rows, so that there is none.
    """
    names, labels, counts = np.unique(pictures, return_inverse=True, return_counts=True)
    largest = counts.max()
    if 2 * largest > len(pictures):
        raise ValueError(
            f"`shuffled` is impossible: {names[counts.argmax()]} serves {largest} of {len(pictures)} rows."
        )
    generator = np.random.default_rng(seed)
    # Rows of one picture lie side by side; a step as long as the longest such run leaves it.
    order = np.lexsort((generator.random(len(pictures)), generator.permutation(len(names))[labels]))
    shuffled = np.empty(len(pictures), int)
    shuffled[order] = np.roll(order, -largest)
    return [pictures[row] for row in shuffled]


def row_generator(seed: int, row: int) -> torch.Generator:
    """The generator of a row's noise, the same in every system and process."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, row]).generate_state(1, np.uint64)[0]))


def read_clip(
    path: str | os.PathLike, seconds: float, start: float = 0.0, sampling_rate: int = Spectrogram.sampling_rate
) -> torch.Tensor:
    """Reads what is scored of a clip: its first seconds, mono, resampled, without mean, peak 0.5 (as AudioLDM's)."""
    # The crop is as long as the stretch that it may be taken from, so the generator has no say.
    return load_random_crop(path, start, seconds, seconds, torch.Generator(), sampling_rate)


def read_picture(path: str | os.PathLike, side: int = 512) -> Image.Image:
    """Reads a picture upright and in RGB, no larger than a square of `side` pixels: many fit into memory."""
    picture = to_rgb(open_image(Path(path)))
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def reconstruct(pipe: MelFusionPipeline, row: dict, seconds: float) -> torch.Tensor:
    """The row's real clip through autoencoder and vocoder, which no system of this pipeline can surpass."""
    spectrogram, rate = Spectrogram.of(pipe), pipe.sampling_rate
    waveform = read_clip(row["audio"], seconds, row["start"] or 0.0, rate)
    latents = waveform_to_latents(waveform, rate, pipe.vae, seconds, spectrogram=spectrogram)
    return pipe.mel_spectrogram_to_waveform(pipe.decode_latents(latents), seconds)[0]


def make_clip(
    pipe: MelFusionPipeline,
    system: str,
    row: dict,
    captioner: Callable | None,
    options: dict,
    encode: Callable[[str], ImageFeatures],
) -> torch.Tensor:
    """Makes the waveform `[T]` of one system for one row; `shuffled` sees the row's `other_image`."""
    if system == "reference":
        return reconstruct(pipe, row, options["call"]["audio_length_in_s"])
    prompt, call = row["caption"], {name: value for name, value in options["call"].items() if name not in ENCODING}
    if system == "caption":
        prompt = f"{prompt.rstrip(' .')}. {captioner(open_image(row['image']))}"
    if system in ("text-only", "caption"):
        call["image_guidance_scale"] = None
    else:
        call["image_features"] = encode(row[picture_column(system)])
    generator = row_generator(options["seed"], row["row"])
    return pipe(prompt=prompt, generator=generator, output_type="pt", **call).audios[0]


def picture_encoder(pipe: MelFusionPipeline, options: dict, kept: int = 1) -> Callable[[str], ImageFeatures]:
    """Gives a function that encodes a picture, unless it is one of the `kept` that it was asked for last."""
    encoding = {name: options["call"][name] for name in ENCODING if name in options["call"]}
    return functools.lru_cache(maxsize=kept)(lambda picture: pipe.encode_image(open_image(picture), **encoding))


def picture_column(system: str) -> str:
    """The column of the picture that a system sees."""
    return "other_image" if system == "shuffled" else "image"


def group_by_picture(systems: Sequence[str], rows: Sequence[dict]) -> dict[str, list[tuple[str, dict]]]:
    """Puts together the clips, system and row each, that are made of one picture, so that it is encoded once."""
    groups = {}
    for row in rows:
        for system in systems:
            groups.setdefault(row[picture_column(system)], []).append((system, row))
    return groups


def make_clips(
    pipe: MelFusionPipeline,
    clips: Sequence[tuple[str, dict]],
    captioner: Callable | None,
    options: dict,
    output: Path,
    encode: Callable[[str], ImageFeatures],
) -> None:
    """Makes those of the clips, system and row each, that are not there yet: `<output>/<system>/<row>.flac`."""
    for system, row in clips:
        path = output / system / f"{row['row']}.flac"
        if path.exists():
            continue
        try:
            waveform = make_clip(pipe, system, row, captioner, options, encode)
            save_audio(path, waveform, pipe.sampling_rate)
        except ValueError as error:
            raise ValueError(f"The system {system} failed at row {row['row']}: {error}") from error


def find_clips(folder: Path, rows: Sequence[dict]) -> list[Path]:
    """Finds one sound file for each row, named by the row's number: `0.flac`, `1.wav`, `0002.mp3`.

    Raises:
        ValueError: If the folder is missing or empty, or its files are not one for each row.
    """
    paths = sorted(path for path in folder.glob("[!.]*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"{str(folder)!r} holds no sound files ({', '.join(SUFFIXES)}).")
    found = {}
    for path in paths:
        if not path.stem.isdecimal():
            raise ValueError(f"{str(path)!r} is not named by its row's number, like '0.wav' for the first row.")
        if found.setdefault(int(path.stem), path) != path:
            raise ValueError(f"{str(path)!r} and {str(found[int(path.stem)])!r} are for the same row: remove one.")
    numbers = [row["row"] for row in rows]
    missing, foreign = sorted(set(numbers) - set(found)), sorted(set(found) - set(numbers))
    if missing or foreign:
        text = f"{str(folder)!r} holds {len(found)} clips for {len(rows)} rows"
        raise ValueError(
            f"{text}: it lacks rows {missing[:5]} and has no use for {[found[number].name for number in foreign[:5]]}."
        )
    return [found[number] for number in numbers]


def check_clips(paths: Sequence[Path], seconds: float) -> None:
    """Reads every clip to its end.

    Raises:
        ValueError: Naming the file that is broken, NaN, silent or too short, or differs in its sampling rate.
    """
    rates = {}
    for path in tqdm(paths, desc=f"Checking {paths[0].parent.name}"):
        waveform, rate = load_audio(path)
        if waveform.shape[-1] < round(seconds * rate):
            length = waveform.shape[-1] / rate
            raise ValueError(f"{str(path)!r} lasts {length:g} s, not the {seconds:g} s of `--audio_length_in_s`.")
        if is_silent(waveform):
            raise ValueError(f"{str(path)!r} is silent: no metric of it means much; make it anew or remove its row.")
        rates.setdefault(rate, path)
        if len(rates) > 1:
            found = " and ".join(f"{str(path)!r} has {rate} Hz" for rate, path in rates.items())
            raise ValueError(f"The clips of one system must share one sampling rate, but {found}.")

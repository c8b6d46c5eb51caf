"""The built data set as training stages read it: rows, waveforms, log-mel spectrograms and pictures, cached once."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from mood import prepare_picture
from PIL import Image
from safetensors.torch import load_file
from training_loop import save_atomically
from transformers import SequenceFeatureExtractor

from melfusion_pipeline.audio import load_audio, log_mel_spectrogram, normalize_waveform


def read_rows(data: Path, split: str) -> list[dict]:
    """Returns the triplets of a split."""
    return [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]


def unique_images(rows: list[dict]) -> list[dict]:
    """Returns the first row of each picture crop, in the order of the crops' file names."""
    return sorted({row["image"]: row for row in reversed(rows)}.values(), key=lambda row: row["image"])


def load_waveform(data: Path, row: dict) -> torch.Tensor:
    """Returns a clip `[81920]` at 16 kHz, zero mean, peak 0.5."""
    waveform, _ = load_audio(data / row["audio"])
    return normalize_waveform(waveform[0])


def cached(path: Path, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Returns the tensor in a safetensors file, which is computed and written on the first call."""
    if not path.exists():
        save_atomically({"tensor": compute()}, path)
    return load_file(path)["tensor"]


def load_waveforms(args: argparse.Namespace, split: str) -> torch.Tensor:
    """Returns the clips of a split, int16 `[N, 81920]` for [-1, 1], not read before they are used."""
    rows = read_rows(args.data, split)
    return cached(
        args.output / "cache" / f"waveforms_{split}.safetensors",
        lambda: torch.stack([(load_waveform(args.data, row) * 32767).round().short() for row in rows]),
    )


def load_mels(args: argparse.Namespace, split: str) -> torch.Tensor:
    """Returns the log-mel spectrograms of a split, float16 `[N, 512, 64]`, computed on the first call."""
    rows = read_rows(args.data, split)
    return cached(
        args.output / "cache" / f"mel_{split}.safetensors",
        lambda: torch.stack([log_mel_spectrogram(load_waveform(args.data, row)).half() for row in rows]),
    )


def load_features(
    args: argparse.Namespace, split: str, extractor: SequenceFeatureExtractor, name: str
) -> torch.Tensor:
    """Returns what a transformers feature extractor makes of a split's clips, float16 `[N, ...]`.

    Args:
        args: `data` and `output`.
        split: of the data.
        extractor: for clips at 16 kHz.
        name: of the model input that it returns; with the extractor's class it names the cache.
    """

    def extract(row: dict) -> torch.Tensor:
        waveform = load_waveform(args.data, row).numpy()
        return extractor(waveform, sampling_rate=extractor.sampling_rate, return_tensors="pt")[name][0].half()

    path = args.output / "cache" / f"{type(extractor).__name__}_{split}.safetensors"
    return cached(path, lambda: torch.stack([extract(row) for row in read_rows(args.data, split)]))


def load_pictures(data: Path, rows: list[dict]) -> torch.Tensor:
    """Returns the rows' pictures, uint8 `[N, 3, 64, 64]`."""
    pictures = [np.asarray(prepare_picture(Image.open(data / row["image"]))) for row in rows]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def pixel_values(pictures: torch.Tensor) -> torch.Tensor:
    """Returns uint8 pictures as floats in [-1, 1]."""
    return pictures.float() / 127.5 - 1

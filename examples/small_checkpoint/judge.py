"""Judges clips by what is measured in them and by the classifier, trained on real clips only; intervals by picture."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from measure_music import measure_music
from music import INSTRUMENTS, SAMPLING_RATE
from scipy.stats import spearmanr
from train_classifier import heard_right, labels_of
from transformers import ASTFeatureExtractor, ASTForAudioClassification

from melfusion_pipeline.metrics import bootstrap_interval

# What is measured, and the side of the mood that the rule lets decide it.
FOLLOWS = {"onset_rate": "arousal", "drum_presence": "arousal", "register": "valence", "major_minor": "valence"}
NOISE = ("spectral_flatness", "harmonic_to_noise")


def rank_correlation(pairs: np.ndarray) -> float:
    """Returns Spearman's correlation of the columns of `[N, 2]`; a column that never changes follows nothing: 0."""
    if (pairs == pairs[0]).all(axis=0).any():
        return 0.0
    return float(spearmanr(pairs[:, 0], pairs[:, 1]).statistic)


def classify(folder: Path, waveforms: torch.Tensor, rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns, clip by clip, whether the classifier of `folder` hears the row's instrument and its mood bin."""
    classifier = ASTForAudioClassification.from_pretrained(folder).eval()
    extractor = ASTFeatureExtractor.from_pretrained(folder)
    inputs = extractor(list(waveforms.numpy()), sampling_rate=SAMPLING_RATE, return_tensors="pt").input_values
    return heard_right(classifier, inputs, labels_of(rows))


def judge(folder: Path, waveforms: torch.Tensor, rows: list[dict], tests: int = 1) -> dict[str, list[float]]:
    """Judges clips.

    Args:
        folder: of the classifier.
        waveforms: one clip a row, `[N, 81920]` at 16 kHz.
        rows: of the triplets; `arousal` and `valence` are those of the row's own picture, whichever the clip followed.
        tests: for the correlations, the number among which each is one (Bonferroni).

    Returns:
        Estimate, low and high end of the 95% interval of everything measured.
    """
    interval = partial(bootstrap_interval, groups=[row["picture"] for row in rows])
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        measure = partial(measure_music, sampling_rate=SAMPLING_RATE)
        measured = list(pool.map(measure, waveforms.numpy(), chunksize=10))
    heard = zip(("instrument", "mood bin"), classify(folder, waveforms, rows), strict=True)
    found = {name: interval(right.float().numpy()) for name, right in heard}
    for name, mood in FOLLOWS.items():
        pairs = np.array([(clip[name], row[mood]) for clip, row in zip(measured, rows, strict=True)])
        found[f"{name} ~ {mood}"] = interval(pairs, rank_correlation, confidence=1 - 0.05 / tests)
    # A tone that swells, an organ's above all, has no sharp onset: how well each instrument follows is a figure each.
    for instrument in INSTRUMENTS:
        own = [index for index, row in enumerate(rows) if row["instrument"] == instrument]
        if len({rows[index]["picture"] for index in own}) < 2:
            continue
        pairs = np.array([(measured[index]["onset_rate"], rows[index]["arousal"]) for index in own])
        groups = [rows[index]["picture"] for index in own]
        found[f"onset_rate ~ arousal, {instrument}"] = bootstrap_interval(pairs, rank_correlation, groups=groups)
    agreement = [(clip["major_minor"] > 0) == (row["valence"] > 0.5) for clip, row in zip(measured, rows, strict=True)]
    found["mode agreement"] = interval(np.array(agreement, float))
    found |= {name: interval(np.array([clip[name] for clip in measured])) for name in NOISE}
    return {name: [float(value) for value in values] for name, values in found.items()}


def format_judgement(found: dict[str, list[float]], real: dict[str, list[float]]) -> str:
    """Formats a judgement, a line each; correlations also as a share of those of the real clips."""
    lines = []
    for name, (estimate, low, high) in found.items():
        share = f"  {estimate / real[name][0]:.0%} of real" if "~" in name else ""
        lines.append(f"  {name:34s} {estimate:7.3f} [{low:.3f}, {high:.3f}]{share}")
    return "\n".join(lines)

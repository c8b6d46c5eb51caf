"""Where the notes of music begin, and how the cuts of a film meet them.

Needs the extra `film`. All times are seconds.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from .arguments_melfusion import check_integer, check_positive, check_real, check_reals
from .film import check_starts
from .waveforms_melfusion import check_sampling_rate, check_waveform

try:
    import librosa
except ImportError as error:
    raise ImportError("Onsets need the extra `film`: pip install .[film]") from error

# How far a slide's change may move to an onset, and how near to an onset a cut counts as met.
REACH = 0.5
TOLERANCE = 0.1
# Spectral flux is computed in blocks of this many seconds, so that an hour fits into the memory.
ONSET_BLOCK = 60


def find_onsets(waveform: np.ndarray | torch.Tensor, sampling_rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds where notes and drums begin.

    Args:
        waveform: `[T]`, mono.
        sampling_rate: The sampling rate of `waveform`, in Hz.

    Returns:
        The onsets' times in seconds `[N]`, ascending, and their strengths `[N]` (the square root of the spectral
        flux, which keeps one loud drum from hiding the soft notes beside it).

    Raises:
        TypeError: If `waveform` is not a floating-point array or tensor.
        ValueError: If it is empty, not finite or not `[T]`.
    """
    samples = _as_mono(waveform, sampling_rate)
    hop = max(1, sampling_rate // 100)
    settings = {"sr": sampling_rate, "hop_length": hop, "n_fft": 1024, "n_mels": 64}
    # A second of neighbours on either side: a block's edge is no onset.
    frames, margin = ONSET_BLOCK * 100, 100
    envelope = []
    for first in range(0, math.ceil(len(samples) / hop), frames):
        skipped = min(first, margin)
        block = samples[(first - skipped) * hop : (first + frames + margin) * hop]
        envelope.append(librosa.onset.onset_strength(y=block, **settings)[skipped : skipped + frames])
    flux = np.sqrt(np.concatenate(envelope))
    if not flux.any():
        return np.zeros(0), np.zeros(0)
    found = librosa.onset.onset_detect(onset_envelope=flux, sr=sampling_rate, hop_length=hop, delta=0.1)
    return found * hop / sampling_rate, flux[found]


def _as_mono(waveform: np.ndarray | torch.Tensor, sampling_rate: int) -> np.ndarray:
    check_sampling_rate(sampling_rate)
    samples = check_waveform(waveform).detach().cpu().float().numpy()
    if samples.ndim != 1:
        raise ValueError(f"`waveform` must be [samples], but its shape is {list(samples.shape)}: pick one piece.")
    return samples


def draw_spectrogram(waveform: np.ndarray | torch.Tensor, sampling_rate: int, num_columns: int = 4000) -> torch.Tensor:
    """Computes a log-mel spectrogram to look at, for `plot_storyboard`.

    Args:
        waveform: `[T]`, mono, of any length.
        sampling_rate: The sampling rate of `waveform`, in Hz.
        num_columns: At most about so many frames; a long piece is looked at now and then.

    Returns:
        `[frames, 64]`, natural logarithm of the magnitude.

    Raises:
        TypeError: If `waveform` is not a floating-point array or tensor, or `num_columns` no int.
        ValueError: If an argument is out of range, or `waveform` not `[T]`.
    """
    check_integer("num_columns", num_columns, 1)
    samples = _as_mono(waveform, sampling_rate)
    hop = max(sampling_rate // 100, len(samples) // num_columns)
    mel = librosa.feature.melspectrogram(y=samples, sr=sampling_rate, hop_length=hop, n_fft=1024, n_mels=64, power=1)
    return torch.from_numpy(np.log(mel.T.clip(1e-5)))


def move_to_onsets(
    starts: Sequence[float], duration: float, onsets: np.ndarray, strengths: np.ndarray, reach: float = REACH
) -> list[float]:
    """Moves each change of a slide show to the strongest onset near it, so that pictures change on the beat.

    Args:
        starts: Where each picture begins, in seconds; the first is 0 and stays.
        duration: The length of the whole in seconds.
        onsets: The music's onsets in seconds, `[N]`.
        strengths: How strong each is, `[N]`.
        reach: How far a change may move, in seconds; at most a third of the stretch on that side, so that changes
            stay in order and every picture keeps a third of its time at least.

    Returns:
        Where each picture begins; a change without an onset near it stays where it was.

    Raises:
        TypeError: If an argument is no number, or no list of numbers.
        ValueError: If a number is not finite, `starts` do not ascend and end before `duration`, `reach` is below 0, or
            there are not as many `strengths` as `onsets`.
    """
    check_starts(starts, duration)
    check_real("reach", reach, 0.0)
    check_reals("onsets", onsets)
    check_reals("strengths", strengths)
    if len(onsets) != len(strengths):
        raise ValueError(f"`strengths` must be one an onset, got {len(strengths)} for {len(onsets)} `onsets`.")
    onsets, strengths = np.asarray(onsets), np.asarray(strengths)
    edges, moved = [*starts, duration], list(starts)
    for index in range(1, len(starts)):
        before, start, end = edges[index - 1 : index + 2]
        earliest, latest = start - min(reach, (start - before) / 3), start + min(reach, (end - start) / 3)
        near = np.flatnonzero((onsets >= earliest) & (onsets <= latest))
        if len(near):
            moved[index] = float(onsets[near[strengths[near].argmax()]])
    return moved


def share_met(cuts: Sequence[float], onsets: np.ndarray, tolerance: float = TOLERANCE) -> float:
    """Counts the cuts that meet the music.

    Args:
        cuts: The times of the cuts in seconds.
        onsets: The times of the onsets in seconds, `[N]`.
        tolerance: How far from a cut an onset may lie, in seconds.

    Returns:
        The share of cuts with an onset near them, in [0, 1]; NaN without cuts.

    Raises:
        TypeError: If an argument is no number, or no list of numbers.
        ValueError: If a number is not finite, or `tolerance` below 0.
    """
    check_reals("cuts", cuts)
    check_reals("onsets", onsets)
    check_real("tolerance", tolerance, 0.0)
    return _share_met(np.asarray(cuts), np.asarray(onsets), tolerance)


def _share_met(cuts: np.ndarray, onsets: np.ndarray, tolerance: float) -> float:
    if not len(cuts):
        return math.nan
    distances = np.abs(cuts[:, None] - onsets[None])
    return float((distances.min(axis=1, initial=math.inf) <= tolerance).mean())


def share_met_by_chance(
    cuts: Sequence[float],
    variations: Sequence[np.ndarray],
    duration: float,
    generator: np.random.Generator,
    num_shifts: int = 1000,
) -> float:
    """Counts the cuts that the best variation meets when all cuts are shifted together, around the end, at random.

    Choosing the best of several is part of it, so that the number stands beside that of a chosen variation.

    Args:
        cuts: The times of the cuts in seconds.
        variations: The onsets of each variation, in seconds, `[N]` each.
        duration: The length of the film in seconds.
        generator: Draws the shifts.
        num_shifts: How many.

    Returns:
        The mean share over the shifts, in [0, 1]; NaN without cuts.

    Raises:
        TypeError: If an argument is no number, no list of numbers or no generator.
        ValueError: If a number is not finite, `duration` not above 0, or there are no variations or shifts.
    """
    check_reals("cuts", cuts)
    for onsets in variations:
        check_reals("variations", onsets)
    check_positive("duration", duration)
    check_integer("num_shifts", num_shifts, 1)
    if not len(variations):
        raise ValueError(f"`variations` must hold one at least, got {variations!r:.80}.")
    if not isinstance(generator, np.random.Generator):
        raise TypeError(f"`generator` must be a numpy.random.Generator, got {generator!r:.80}.")
    variations = [np.asarray(onsets) for onsets in variations]
    shifted = [(np.asarray(cuts) + shift) % duration for shift in generator.uniform(0, duration, num_shifts)]
    return float(np.mean([max(_share_met(one, onsets, TOLERANCE) for onsets in variations) for one in shifted]))

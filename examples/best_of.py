"""Which of several variations follows its sentence and its picture best, by CLAP and by the bridge of IMSM."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from scipy.stats import rankdata

from melfusion_pipeline.extractors import ClapExtractor, ClipExtractor
from melfusion_pipeline.metrics import clap_score, imsm
from melfusion_pipeline.waveforms_melfusion import normalize_waveform


def score_variations(
    waveforms: np.ndarray,
    sampling_rate: int,
    prompt: str,
    image: Image.Image,
    clap: ClapExtractor,
    clip: ClipExtractor | None = None,
    captions: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """Scores variations of one piece, higher is better.

    Args:
        waveforms: `[variations, samples]`, of any level.
        sampling_rate: Their rate, in Hz.
        prompt: What they were made for, as `image`.
        clap: Hears how near each is to the prompt.
        clip: With `clap` and `captions` it tells how near each is to the picture. None: the picture does not count.
        captions: The bridge of IMSM, two at least: it compares which of them picture and music would bear.

    Returns:
        `[variations]` each: `"CLAP"`, and with `clip` `"IMSM"`.
    """
    # Music that was there has its own level; the scores of evaluate.py are those of AudioLDM's.
    waveforms = normalize_waveform(torch.from_numpy(waveforms)).numpy()
    texts = clap.embed(text=[prompt]).repeat(len(waveforms), axis=0)
    scores = {"CLAP": clap_score(clap.embed(audio=waveforms, sampling_rate=sampling_rate), texts)}
    if clip is not None:
        audio = clap.probabilities(audio=waveforms, text=captions, sampling_rate=sampling_rate)
        scores["IMSM"] = imsm(clip.probabilities(images=[image], text=captions), audio)[0]
    return scores


def best_first(scores: dict[str, np.ndarray]) -> np.ndarray:
    """Orders variations by the sum of their ranks, so that no score counts more for being spread wider.

    Args:
        scores: `[variations]` each, higher is better; of equals the first score decides.

    Returns:
        Indices `[variations]`, the best one first.
    """
    ranks = sum(rankdata(-values) for values in scores.values())
    return np.lexsort((-next(iter(scores.values())), ranks))

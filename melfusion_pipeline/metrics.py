"""Metrics of music generation, as pure float64 functions of embeddings and class probabilities.

Rows are clips, pictures or texts; torch tensors on the CPU are read as they are. Every random choice takes a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.spatial.distance import cdist, pdist
from scipy.special import rel_entr
from scipy.stats import t as student_t

from .arguments_melfusion import check_integer, check_real


class Interval(NamedTuple):
    """A figure, `estimate`, and the ends of its confidence interval, `low` and `high`."""

    estimate: float
    low: float
    high: float


def embedding_statistics(embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased covariance of a set of embeddings, accumulated in float64 (Kilgour et al., arXiv 1812.08466).

    Args:
        embeddings: `[N, D]`, one row a clip, or `[N, F, D]`, F frames a clip, each of which counts as a sample.

    Returns:
        Mean `[D]` and covariance `[D, D]`.

    Raises:
        ValueError: If there are fewer than two clips, or a value is NaN or infinite.
    """
    samples = _check_embeddings("embeddings", embeddings, axes=(2, 3), minimum=2)
    samples = samples.reshape(-1, samples.shape[-1])
    return samples.mean(0), np.atleast_2d(np.cov(samples, rowvar=False))


def frechet_distance_from_statistics(
    mean: np.ndarray, covariance: np.ndarray, reference_mean: np.ndarray, reference_covariance: np.ndarray
) -> float:
    """Frechet distance of two Gaussians, `|m1 - m2|^2 + tr(C1 + C2 - 2 sqrt(C1 C2))` (Kilgour et al., equation 2).

    Args:
        mean, reference_mean: `[D]`.
        covariance, reference_covariance: `[D, D]`; they may be singular.

    Returns:
        The squared distance, at least 0, in squared units of the embedding.

    Raises:
        ValueError: If the shapes do not fit, a value is not finite, or a covariance is not one.
    """
    mean = _check_embeddings("mean", mean, axes=(1,))
    reference_mean = _check_embeddings("reference_mean", reference_mean, axes=(1,))
    _check_equal("length", mean=mean.shape, reference_mean=reference_mean.shape)
    factor = _covariance_factor("covariance", covariance, len(mean))
    reference_factor = _covariance_factor("reference_covariance", reference_covariance, len(mean))
    return _distance(mean, factor, reference_mean, reference_factor)


def frechet_distance(embeddings: np.ndarray, reference: np.ndarray) -> float:
    """Frechet distance of two sets of embeddings: FAD with VGGish's, FD with a classifier's.

    It is biased upwards by about 1/N (see `frechet_distance_infinity`): compare only figures of equal N.

    Args:
        embeddings: Generated clips, `[N, D]` or `[N, F, D]`; N may be smaller than D.
        reference: Real clips, `[M, D]` or `[M, F, D]`.

    Returns:
        The squared distance, at least 0.

    Raises:
        ValueError: If a set has fewer than two clips or values that are not finite, or the widths differ.
    """
    embeddings, reference = _check_two_sets(embeddings, reference, axes=(2, 3))
    return _distance(*_mean_and_factor(embeddings), *_mean_and_factor(reference))


def frechet_distance_infinity(
    embeddings: np.ndarray, reference: np.ndarray, steps: int = 8, draws: int = 4, seed: int = 0
) -> float:
    """FAD-infinity: the Frechet distance extrapolated linearly in 1/n to infinitely many generated clips.

    As Gui et al. (arXiv 2311.01616) define it, but with subsets drawn without replacement, since repeated clips
    shrink the covariance. As there, the reference is used whole, so that its own finite size is not corrected. The
    bias is linear in 1/n only if n/2 exceeds the dimensions: the limit of fewer clips than that comes out too low.

    Args:
        embeddings: Generated clips, `[N, D]` or `[N, F, D]`.
        reference: Real clips, `[M, D]` or `[M, F, D]`.
        steps: Number of subset sizes, evenly spaced from N/2 to N.
        draws: Subsets of each size, whose distances are averaged.
        seed: Seed of the subsets.

    Returns:
        The limit, which may be slightly negative.

    Raises:
        ValueError: If there are fewer than four generated clips or two sizes, or as `frechet_distance` does.
    """
    embeddings, reference = _check_two_sets(embeddings, reference, axes=(2, 3), minimum=4)
    check_integer("steps", steps, 2)
    check_integer("draws", draws, 1)
    check_integer("seed", seed, 0)
    sizes = np.unique(np.linspace(len(embeddings) // 2, len(embeddings), steps).astype(int))
    generator, target = np.random.default_rng(seed), _mean_and_factor(reference)

    def subset_distance(size):
        rows = generator.choice(len(embeddings), size, replace=False)
        return _distance(*_mean_and_factor(embeddings[rows]), *target)

    distances = [np.mean([subset_distance(size) for _ in range(draws)]) for size in sizes]
    return float(np.polyfit(1 / sizes, distances, 1)[1])


def kernel_audio_distance(embeddings: np.ndarray, reference: np.ndarray) -> float:
    """KAD: the unbiased estimate of the squared maximum mean discrepancy (Chung et al., arXiv 2502.15602).

    The kernel is `exp(-d^2 / 2 s^2)`, s the median distance between two clips of the reference. No clip is paired with
    itself, so that the figure of equal distributions is 0 on average. The authors' kadtk prints 100 times this value.

    Args:
        embeddings: Generated clips, `[N, D]`.
        reference: Real clips, `[M, D]`.

    Returns:
        The squared discrepancy, at most 2; it may be negative.

    Raises:
        ValueError: As `frechet_distance` does, or if most clips of the reference are identical.
    """
    embeddings, reference = _check_two_sets(embeddings, reference, axes=(2,))
    within = pdist(reference, "sqeuclidean")
    bandwidth = np.median(np.sqrt(within))
    if bandwidth == 0:
        raise ValueError("The median distance within `reference` is 0: remove its duplicate clips.")

    def mean_kernel(squared_distances):
        return np.exp(-squared_distances / (2 * bandwidth**2)).mean()

    across = mean_kernel(cdist(embeddings, reference, "sqeuclidean"))
    return float(mean_kernel(pdist(embeddings, "sqeuclidean")) + mean_kernel(within) - 2 * across)


def kl_divergence(probabilities: np.ndarray, reference_probabilities: np.ndarray) -> np.ndarray:
    """KL(reference || generated) of the class probabilities of each pair; their mean is the score.

    As audioldm_eval and AudioGen (arXiv 2209.15352) compute it, 1e-6 is added to the generated probabilities.

    Args:
        probabilities: Those of the generated clips, `[N, C]`, rows summing to 1.
        reference_probabilities: Those of the real clips with the same prompts in the same order, `[N, C]`.

    Returns:
        `[N]`, in nats.

    Raises:
        ValueError: If the shapes differ, or the rows are not probabilities.
    """
    generated = _check_probabilities("probabilities", probabilities)
    reference = _check_probabilities("reference_probabilities", reference_probabilities)
    _check_equal("shape", probabilities=generated.shape, reference_probabilities=reference.shape)
    return rel_entr(reference, generated + 1e-6).sum(1)


def clap_score(audio_embeddings: np.ndarray, text_embeddings: np.ndarray) -> np.ndarray:
    """CLAP score: cosine of each clip and its own text (CLAP: Wu et al., arXiv 2211.06687); their mean is the score.

    Args:
        audio_embeddings, text_embeddings: `[N, D]`, row i of both belonging together.

    Returns:
        `[N]`, in [-1, 1].

    Raises:
        ValueError: If the shapes differ, a value is not finite, or a row is 0.
    """
    return _cosine(audio_embeddings=audio_embeddings, text_embeddings=text_embeddings)


def clip_score(image_embeddings: np.ndarray, text_embeddings: np.ndarray) -> np.ndarray:
    """CLIPScore, `2.5 max(cos, 0)` of each picture and its own text (Hessel et al., arXiv 2104.08718, equation 1).

    Args:
        image_embeddings, text_embeddings: `[N, D]`, row i of both belonging together.

    Returns:
        `[N]`, in [0, 2.5].

    Raises:
        ValueError: If the shapes differ, a value is not finite, or a row is 0.
    """
    return 2.5 * np.maximum(_cosine(image_embeddings=image_embeddings, text_embeddings=text_embeddings), 0)


def imsm(image_text_probs: np.ndarray, audio_text_probs: np.ndarray) -> np.ndarray:
    """IMSM, image-music similarity bridged by captions: `A_CLIP A_CLAP^T` (MeLFusion, arXiv 2406.04673).

    Args:
        image_text_probs: Softmax over captions of CLIP's logits, `[images, captions]`.
        audio_text_probs: Softmax over the same captions of CLAP's logits, `[audios, captions]`.

    Returns:
        `[images, audios]`, in [0, 1]; it depends on the list of captions.

    Raises:
        ValueError: If the numbers of captions differ, or the rows are not probabilities.
    """
    images = _check_probabilities("image_text_probs", image_text_probs)
    audios = _check_probabilities("audio_text_probs", audio_text_probs)
    _check_equal("number of captions", image_text_probs=images.shape[1], audio_text_probs=audios.shape[1])
    return images @ audios.T


def imsm_score(similarity: np.ndarray) -> tuple[float, float]:
    """The score of a test set: the mean of IMSM's diagonal, and for comparison the mean of its other entries.

    Args:
        similarity: `[N, N]`, of `imsm`, clip i belonging to picture i.

    Returns:
        Matched and mismatched mean, both in [0, 1].

    Raises:
        ValueError: If the matrix is not square with at least two rows, or a value is not finite.
    """
    similarity = _check_embeddings("similarity", similarity, axes=(2,), minimum=2)
    _check_equal("number", images=similarity.shape[0], audios=similarity.shape[1])
    others = ~np.eye(len(similarity), dtype=bool)
    return float(np.diagonal(similarity).mean()), float(similarity[others].mean())


def imsm_pairs(image_text_probs: np.ndarray, audio_text_probs: np.ndarray) -> np.ndarray:
    """IMSM of each matching pair. Over a fixed list of captions it does not depend on what else is in the set.

    Args:
        image_text_probs, audio_text_probs: `[N, captions]`, row i of both belonging together.

    Returns:
        `[N]`, in [0, 1]: the diagonal of `imsm`.

    Raises:
        ValueError: If the shapes differ, or the rows are not probabilities.
    """
    images = _check_probabilities("image_text_probs", image_text_probs)
    audios = _check_probabilities("audio_text_probs", audio_text_probs)
    _check_equal("shape", image_text_probs=images.shape, audio_text_probs=audios.shape)
    return (images * audios).sum(1)


def bootstrap_interval(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], float] = np.mean,
    groups: Sequence | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval for means and correlations (not for distances of sets: duplicates bias them).

    Args:
        values: One value a clip, `[N]`, or K that belong together, `[N, K]`.
        statistic: Function of resampled `values`.
        groups: Label of each row, e.g. its picture: rows of one group are dependent, so groups are resampled whole.
        confidence: Coverage in (0, 1). For one of m tests give `1 - 0.05 / m`.
        resamples: Number of resamples.
        seed: Seed of the resamples.

    Returns:
        The statistic of all values, and the ends of its interval.

    Raises:
        ValueError: If there are fewer than two rows or groups, or a value or a resample's statistic is not finite.
    """
    values = _check_embeddings("values", values, axes=(1, 2), minimum=2)
    _check_confidence(confidence)
    check_integer("resamples", resamples, 1)
    check_integer("seed", seed, 0)
    rows = _rows_by_group(groups, len(values), minimum=2)
    draws = np.random.default_rng(seed).integers(len(rows), size=(resamples, len(rows)))
    estimates = [statistic(values[np.concatenate([rows[group] for group in draw])]) for draw in draws]
    if not np.isfinite(estimates).all():
        raise ValueError(f"`statistic` is not finite on a resample of {len(rows)} groups: give more or varied rows.")
    low, high = np.quantile(estimates, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(statistic(values)), float(low), float(high))


def jackknife_interval(
    statistic: Callable[..., float],
    *samples: np.ndarray,
    groups: Sequence[Sequence] | None = None,
    confidence: float = 0.95,
    blocks: int = 20,
    seed: int = 0,
) -> Interval:
    """Grouped jackknife interval, centred on the point estimate, for distances of sets (FAD, FAD-infinity, KAD).

    Each sample's clips are put into B blocks at random and the statistic is taken without one block at a time, so no
    clip is repeated. The samples' variances, `(B - 1)^2 / B` times those of the B values, add up; Student's t has
    B - 1 degrees of freedom. It is for the statistic's expectation at this number of clips, bias included, and for
    curved statistics wider rather than narrower than need be (Efron and Stein 1981, doi 10.1214/aos/1176345462).
    For rows that belong together, e.g. of `imsm`, the sample is `numpy.arange(N)` and `statistic` indexes with it.

    Args:
        statistic: Function of as many arrays as there are samples, e.g. `frechet_distance`.
        samples: Arrays whose first axis is the clips, independent of each other.
        groups: For each sample the label of each row, e.g. its picture: a group is never split between blocks.
        confidence: Coverage in (0, 1).
        blocks: Number of blocks of each sample, at least 2; its number of groups if that is smaller.
        seed: Seed of the blocks.

    Returns:
        The statistic of the whole samples, and the ends of its interval.

    Raises:
        ValueError: If there are fewer than two blocks or three rows or groups, or as `statistic` does.
    """
    check_integer("blocks", blocks, 2)
    check_integer("seed", seed, 0)
    _check_confidence(confidence)
    groups = [None] * len(samples) if groups is None else groups
    _check_equal("number of samples", samples=len(samples), groups=len(groups))
    samples = [np.asarray(sample) for sample in samples]
    estimate, variance, freedom = float(statistic(*samples)), 0.0, blocks - 1
    generator = np.random.default_rng(seed)
    for index, sample in enumerate(samples):
        rows = _rows_by_group(groups[index], len(sample), minimum=3)
        parts = np.array_split(generator.permutation(len(rows)), min(blocks, len(rows)))
        kept = [np.delete(sample, np.concatenate([rows[group] for group in part]), axis=0) for part in parts]
        values = [statistic(*samples[:index], rest, *samples[index + 1 :]) for rest in kept]
        variance += (len(parts) - 1) ** 2 / len(parts) * np.var(values, ddof=1)
        freedom = min(freedom, len(parts) - 1)
    margin = float(student_t.ppf((1 + confidence) / 2, freedom) * np.sqrt(variance))
    return Interval(estimate, estimate - margin, estimate + margin)


def _distance(mean, factor, reference_mean, reference_factor):
    # With C = F^T F, tr sqrt(C1 C2) is the sum of the singular values of F1 F2^T: unlike the square root of the
    # product this needs no jitter and no complex numbers, however singular the covariances are.
    cross = np.linalg.svd(factor @ reference_factor.T, compute_uv=False).sum()
    spread = np.sum(factor**2) + np.sum(reference_factor**2)
    return max(float(np.sum((mean - reference_mean) ** 2) + spread - 2 * cross), 0.0)


def _mean_and_factor(embeddings):
    samples = embeddings.reshape(-1, embeddings.shape[-1])
    mean = samples.mean(0)
    factor = (samples - mean) / np.sqrt(len(samples) - 1)
    return mean, np.linalg.qr(factor, mode="r") if factor.shape[0] > factor.shape[1] else factor


def _covariance_factor(name, covariance, width):
    covariance = _check_embeddings(name, covariance, axes=(2,))
    _check_equal("shape", **{"mean x mean": (width, width), name: covariance.shape})
    values, vectors = np.linalg.eigh(covariance)
    if not np.allclose(covariance, covariance.T) or values[0] < -1e-6 * max(values[-1], 0):
        raise ValueError(f"`{name}` must be symmetric with no negative eigenvalue, got one of {values[0]:.3g}.")
    return (vectors * np.sqrt(np.clip(values, 0, None))).T


def _cosine(**pair):
    first, second = (_check_embeddings(name, values, axes=(2,)) for name, values in pair.items())
    _check_equal("shape", **dict(zip(pair, (first.shape, second.shape))))
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    if not norms.all():
        raise ValueError(f"The cosine of a zero vector is undefined: row {np.argmin(norms)} of {' or '.join(pair)}.")
    return (first * second).sum(1) / norms


def _rows_by_group(groups, count, minimum):
    labels = np.arange(count) if groups is None else np.asarray(groups)
    _check_equal("number of rows", values=(count,), groups=labels.shape)
    rows = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    if len(rows) < minimum:
        raise ValueError(f"An interval needs at least {minimum} rows or groups, got {len(rows)}.")
    return rows


def _check_confidence(confidence):
    check_real("confidence", confidence)
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must lie between 0 and 1, got {confidence}.")


def _check_embeddings(name, values, axes, minimum=1):
    try:
        if np.iscomplexobj(values := np.asarray(values)):
            raise TypeError("complex numbers")
        values = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`{name}` must be an array of real numbers, its rows of one length, got {error}.") from error
    if values.ndim not in axes or values.size == 0 or len(values) < minimum:
        wanted = " or ".join(map(str, axes))
        raise ValueError(f"`{name}` must have {wanted} axes and at least {minimum} rows, got shape {values.shape}.")
    broken = ~np.isfinite(values).reshape(len(values), -1).all(1)
    if broken.any():
        raise ValueError(f"`{name}` has NaN or infinite values, first in row {np.argmax(broken)}: remove that row.")
    return values


def _check_two_sets(embeddings, reference, axes, minimum=2):
    embeddings = _check_embeddings("embeddings", embeddings, axes, minimum)
    reference = _check_embeddings("reference", reference, axes, minimum=2)
    _check_equal("width", embeddings=embeddings.shape[-1], reference=reference.shape[-1])
    return embeddings, reference


def _check_probabilities(name, values):
    values = _check_embeddings(name, values, axes=(2,))
    wrong = (values < 0).any(1) | (np.abs(values.sum(1) - 1) > 1e-3)
    if wrong.any():
        row = values[np.argmax(wrong)]
        raise ValueError(f"`{name}` must be probabilities; row {np.argmax(wrong)} sums to {row.sum():.4g}, not to 1.")
    return values


def _check_equal(what, **sizes):
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(f"The same {what} is needed, got {found}.")

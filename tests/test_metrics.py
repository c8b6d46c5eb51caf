import functools
from functools import partial

import numpy as np
import pytest
import torch
from scipy.linalg import helmert, sqrtm
from scipy.signal import butter, sosfiltfilt
from scipy.stats import entropy, spearmanr

from melfusion_pipeline.extractors import LogMelExtractor
from melfusion_pipeline.metrics import (
    bootstrap_interval,
    clap_score,
    clip_score,
    embedding_statistics,
    frechet_distance,
    frechet_distance_from_statistics,
    frechet_distance_infinity,
    imsm,
    imsm_pairs,
    imsm_score,
    jackknife_interval,
    kernel_audio_distance,
    kl_divergence,
)

RATE = 16000


def normal(count, width, seed, scale=1.0, shift=0.0):
    return np.random.default_rng(seed).normal(size=(count, width)) * scale * np.linspace(2, 0.5, width) + shift


def probabilities(count, classes, seed):
    return np.random.default_rng(seed).dirichlet(np.full(classes, 0.5), count)


# Frechet distance


def test_frechet_distance_of_commuting_covariances_has_a_closed_form():
    width = 12
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(width, width)))[0]
    first, second = np.geomspace(1e-3, 10, width), np.linspace(0.5, 2, width)
    mean = np.linspace(-1, 1, width)
    covariances = [(rotation * values) @ rotation.T for values in (first, second)]
    found = frechet_distance_from_statistics(mean, covariances[0], 2 * mean, covariances[1])
    expected = np.sum(mean**2) + np.sum((np.sqrt(first) - np.sqrt(second)) ** 2)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("count, width", [(300, 20), (40, 60), (5, 30), (2, 3), (50, 1)])
def test_frechet_distance_agrees_with_sqrtm(count, width):
    generated, reference = normal(count, width, 0, scale=1.3, shift=0.2), normal(count + 7, width, 1)
    mean, covariance = embedding_statistics(generated)
    reference_mean, reference_covariance = embedding_statistics(reference)
    # The ridge keeps scipy's square root defined when there are fewer clips than dimensions; the same goes to ours.
    ridge = 1e-3 * np.eye(width)
    root = sqrtm((covariance + ridge) @ (reference_covariance + ridge)).real
    expected = np.sum((mean - reference_mean) ** 2) + np.trace(
        covariance + reference_covariance + 2 * ridge - 2 * root
    )
    found = frechet_distance_from_statistics(mean, covariance + ridge, reference_mean, reference_covariance + ridge)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    # Without a ridge the two routes, data and covariances, share no factorisation.
    singular = frechet_distance_from_statistics(mean, covariance, reference_mean, reference_covariance)
    np.testing.assert_allclose(frechet_distance(generated, reference), singular, rtol=1e-6)


@pytest.mark.parametrize("count, width", [(40, 512), (10, 20)])
def test_frechet_distance_agrees_with_sqrtm_for_fewer_clips_than_dimensions(count, width):
    generated, reference = normal(count, width, 0, scale=1.3, shift=0.2), normal(count + 7, width, 1)
    (mean, covariance), (reference_mean, reference_covariance) = map(embedding_statistics, (generated, reference))
    # C1 C2 is singular, but its other eigenvalues are those of the small regular matrix A C2 A^T with C1 = A^T A.
    regular = helmert(count) @ generated / np.sqrt(count - 1)
    np.testing.assert_allclose(regular.T @ regular, covariance, atol=1e-10)
    root = sqrtm(regular @ reference_covariance @ regular.T)
    expected = np.sum((mean - reference_mean) ** 2) + np.trace(covariance + reference_covariance) - 2 * np.trace(root)
    np.testing.assert_allclose(frechet_distance(generated, reference), expected, rtol=1e-6)
    found = frechet_distance_from_statistics(mean, covariance, reference_mean, reference_covariance)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("count, width", [(300, 20), (40, 512), (2, 3)])
def test_identical_sets_have_no_distance(count, width):
    embeddings = normal(count, width, 0, scale=10, shift=5).astype(np.float32)
    statistics = embedding_statistics(embeddings)
    assert 0 <= frechet_distance(embeddings, embeddings[::-1]) < 1e-6
    assert 0 <= frechet_distance_from_statistics(*statistics, *statistics) < 1e-6
    assert frechet_distance(np.ones((4, 3)), np.ones((4, 3))) == 0


def test_statistics_are_float64_and_count_every_frame():
    frames = (1e4 + np.random.default_rng(0).normal(size=(50, 7, 3))).astype(np.float32)
    mean, covariance = embedding_statistics(torch.from_numpy(frames))
    assert mean.dtype == covariance.dtype == np.float64
    np.testing.assert_allclose(covariance, np.cov(frames.reshape(350, 3).astype(np.float64).T), rtol=1e-9)
    flat = frames.reshape(350, 3)
    np.testing.assert_allclose(frechet_distance(frames, frames[:20] + 1), frechet_distance(flat, flat[:140] + 1))


def test_frechet_distance_infinity_recovers_the_limit():
    width, limit = 16, 16 * 0.1**2 + 0.2**2 * np.sum(np.linspace(2, 0.5, 16) ** 2)
    reference = normal(20000, width, 0)
    sets = [normal(200, width, seed, scale=0.8, shift=0.1) for seed in range(1, 21)]
    plain = np.mean([frechet_distance(generated, reference) for generated in sets])
    found = np.array([frechet_distance_infinity(generated, reference) for generated in sets])
    error = 2 * found.std(ddof=1) / np.sqrt(len(sets))
    print(f"limit {limit:.3f}, FAD at 200 clips {plain:.3f}, FAD-infinity {found.mean():.3f} +- {error:.3f}")
    assert plain > 1.2 * limit and abs(found.mean() - limit) < min(error, 0.07 * limit)
    assert found[0] == frechet_distance_infinity(sets[0], reference, seed=0)
    assert found[0] != frechet_distance_infinity(sets[0], reference, seed=1)


# KAD, KL and cosine scores


def test_kernel_audio_distance_is_unbiased():
    draws = [kernel_audio_distance(normal(40, 8, seed), normal(60, 8, 1000 + seed)) for seed in range(200)]
    interval = bootstrap_interval(draws)
    print("KAD of 200 draws of equal distributions: mean {:.5f} [{:.5f}, {:.5f}]".format(*interval))
    assert interval.low < 0 < interval.high
    shifted = [kernel_audio_distance(normal(40, 8, seed, shift=1.0), normal(60, 8, 1000 + seed)) for seed in range(20)]
    assert min(shifted) > max(np.abs(interval)) * 5


def test_kernel_audio_distance_agrees_with_the_double_sum():
    generated, reference = normal(5, 3, 0, shift=0.5), normal(6, 3, 1)

    def kernel(a, b):
        distances = [np.linalg.norm(x - y) for i, x in enumerate(reference) for y in reference[:i]]
        return np.exp(-np.sum((a - b) ** 2) / (2 * np.median(distances) ** 2))

    def within(rows):
        return sum(kernel(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j)

    across = sum(kernel(a, b) for a in generated for b in reference)
    expected = within(generated) / 20 + within(reference) / 30 - 2 * across / 30
    np.testing.assert_allclose(kernel_audio_distance(generated, reference), expected, rtol=1e-12)


def test_kl_divergence_agrees_with_scipy_and_has_the_reference_first():
    generated, reference = probabilities(30, 10, 0), probabilities(30, 10, 1)
    found = kl_divergence(generated, reference)
    # scipy rescales its second argument to sum 1, audioldm_eval does not.
    expected = entropy(reference, generated + 1e-6, axis=1) - np.log(1 + 10 * 1e-6)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    half, sure = np.array([[0.5, 0.5]]), np.array([[1.0, 0.0]])
    np.testing.assert_allclose(kl_divergence(half, sure), np.log(2), rtol=1e-5)
    np.testing.assert_allclose(kl_divergence(sure, half), 0.5 * np.log(0.5) + 0.5 * np.log(0.5e6), rtol=1e-5)
    assert np.abs(kl_divergence(reference, reference)).max() < 1e-4


def test_clap_and_clip_scores_are_cosines_of_pairs():
    first, second = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]]), np.array([[4.0, 3.0], [-5.0, 0.0], [7.0, 0.0]])
    np.testing.assert_allclose(clap_score(first, second), [0.96, -1, 0], atol=1e-12)
    np.testing.assert_allclose(clip_score(first, second), [2.4, 0, 0], atol=1e-12)


# IMSM


def test_imsm_of_two_pairs_by_hand():
    images, audios = np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([[0.7, 0.3], [0.4, 0.6]])
    np.testing.assert_allclose(imsm(images, audios), [[0.66, 0.42], [0.38, 0.56]])
    np.testing.assert_allclose(imsm_score(imsm(images, audios)), [0.61, 0.40])
    np.testing.assert_allclose(imsm_pairs(images, audios), [0.66, 0.56])


def test_imsm_is_bounded_and_its_pairs_do_not_depend_on_the_set():
    images, audios = probabilities(20, 6, 0), probabilities(30, 6, 1)
    similarity = imsm(images, audios)
    assert similarity.shape == (20, 30) and similarity.min() >= 0 and similarity.max() <= 1
    assert imsm_score(imsm(np.eye(4), np.eye(4))) == (1, 0)
    np.testing.assert_allclose(imsm(np.full((2, 5), 0.2), probabilities(3, 5, 2)), 0.2)
    np.testing.assert_allclose(imsm_pairs(images, audios[:20])[3:4], imsm_pairs(images[3:4], audios[3:4]))


# Intervals


def test_bootstrap_interval_of_a_mean_covers_it():
    generator = np.random.default_rng(0)
    intervals = [bootstrap_interval(generator.exponential(size=60), resamples=400, seed=i) for i in range(200)]
    coverage = np.mean([low <= 1 <= high for _, low, high in intervals])
    print(f"bootstrap of a mean: coverage {coverage:.3f}")
    assert 0.88 <= coverage <= 0.99


def test_bootstrap_by_group_is_honest_about_dependent_rows():
    generator, covered = np.random.default_rng(0), {"rows": [], "groups": []}
    pictures = np.repeat(np.arange(25), 8)
    for seed in range(100):
        # Clips of one picture share most of their value, and so do both values that are correlated.
        values = generator.normal(size=(25, 2))[pictures] + 0.3 * generator.normal(size=(200, 2))
        for name, groups in (("rows", None), ("groups", pictures)):
            low, high = bootstrap_interval(values[:, 0], groups=groups, resamples=200, seed=seed)[1:]
            covered[name].append(low <= 0 <= high)
    print(f"8 clips a picture: coverage by row {np.mean(covered['rows'])}, by picture {np.mean(covered['groups'])}")
    assert np.mean(covered["rows"]) < 0.7 < 0.86 < np.mean(covered["groups"])


def test_bootstrap_interval_of_a_correlation():
    generator = np.random.default_rng(0)
    values = generator.normal(size=(100, 1)) + 0.5 * generator.normal(size=(100, 2))

    def correlation(rows):
        return spearmanr(rows[:, 0], rows[:, 1]).statistic

    interval = bootstrap_interval(values, correlation, groups=np.arange(100) // 2, resamples=200)
    assert interval.estimate == correlation(values) and interval.low < interval.estimate < interval.high < 1
    wider = bootstrap_interval(values, correlation, groups=np.arange(100) // 2, resamples=200, confidence=0.99)
    assert wider.low < interval.low and interval.high < wider.high
    with pytest.raises(ValueError, match="not finite on a resample"):
        bootstrap_interval(values, lambda rows: np.nan)


@pytest.mark.parametrize(
    "statistic, count, width", [(frechet_distance, 80, 8), (frechet_distance, 40, 64), (kernel_audio_distance, 40, 8)]
)
def test_jackknife_interval_covers_the_expectation(statistic, count, width):
    def trial(seed):
        return normal(count, width, seed, scale=0.8, shift=0.2), normal(count, width, 10**6 + seed)

    expectation = np.mean([statistic(*trial(seed)) for seed in range(1000, 1400)])
    intervals = [jackknife_interval(statistic, *trial(seed), blocks=10) for seed in range(100)]
    coverage = np.mean([low <= expectation <= high for _, low, high in intervals])
    print(f"jackknife of {statistic.__name__}, {count} clips x {width}: coverage {coverage}")
    assert coverage >= 0.9
    for (estimate, low, high), seed in zip(intervals[:5], range(5)):
        assert estimate == statistic(*trial(seed))
        np.testing.assert_allclose((low + high) / 2, estimate)


def test_jackknife_of_a_mean_is_its_standard_error():
    values = normal(400, 1, 0)
    interval = jackknife_interval(np.mean, values, blocks=400)
    margin = 1.96 * values.std(ddof=1) / 20
    np.testing.assert_allclose(interval.high - interval.estimate, margin, rtol=0.01)


def test_jackknife_keeps_groups_and_matching_rows_together():
    values, pictures = np.repeat(normal(30, 4, 0), 6, axis=0), np.repeat(np.arange(30), 6)
    reference = normal(200, 4, 1)
    by_row = jackknife_interval(frechet_distance, values, reference)
    by_picture = jackknife_interval(frechet_distance, values, reference, groups=[pictures, None])
    assert by_picture.high - by_picture.low > 1.3 * (by_row.high - by_row.low)
    similarity = imsm(probabilities(30, 5, 0), probabilities(30, 5, 1))

    def mismatched(rows):
        return imsm_score(similarity[np.ix_(rows, rows)])[1]

    interval = jackknife_interval(mismatched, np.arange(30))
    assert interval.low < interval.estimate == imsm_score(similarity)[1] < interval.high


# Degraded music


@functools.cache
def note(pitch, length=RATE // 2):
    frequencies = np.arange(1, 20)[:, None] * 440 * 2 ** ((pitch - 69) / 12)
    audible = np.where(frequencies < RATE / 2, np.arange(1, 20)[:, None] ** -1.5, 0)
    time = np.arange(length) / RATE
    return np.exp(-5 * time) * np.sum(audible * np.sin(2 * np.pi * frequencies * time), axis=0)


def tune(seed, seconds=2):
    """Chords, melody, bass and drums of decaying partials, in a key and at a tempo of its own."""
    generator = np.random.default_rng(seed)
    key, step, wave = generator.integers(45, 57), int(RATE * 30 / generator.uniform(80, 150)), np.zeros(seconds * RATE)
    for index, start in enumerate(range(0, len(wave) - RATE // 2, step)):
        chord = key + [0, 5, 7, 9][index // 4 % 4]
        pitches = [chord - 12, chord + 12 + generator.choice([0, 2, 4, 7, 9]), chord, chord + 4, chord + 7]
        sound = sum(note(pitch) for pitch in pitches[: 5 if index % 2 == 0 else 2])
        drum = 0.3 * np.exp(-60 * np.arange(len(sound)) / RATE) * generator.normal(size=len(sound))
        wave[start : start + len(sound)] += sound + drum
    return 0.5 * wave / np.abs(wave).max()


def add_noise(clips, decibels):
    noise = np.random.default_rng(0).normal(size=clips.shape)
    return clips + noise * np.sqrt(np.mean(clips**2, axis=1, keepdims=True) / 10 ** (decibels / 10))


def low_pass(clips, frequency):
    return sosfiltfilt(butter(8, frequency, fs=RATE, output="sos"), clips, axis=1)


@pytest.mark.parametrize("degrade, steps", [(add_noise, (20, 10, 0)), (low_pass, (4000, 2000, 1000))])
def test_degrading_music_raises_the_distances_step_by_step(degrade, steps):
    clips, extractor = np.stack([tune(seed) for seed in range(60)]), LogMelExtractor()
    reference = extractor.embed(audio=clips[:30], sampling_rate=RATE)
    degraded = [clips[30:], *(degrade(clips[30:], step) for step in steps)]
    embeddings = [extractor.embed(audio=audio, sampling_rate=RATE) for audio in degraded]
    for distance in (frechet_distance, kernel_audio_distance):
        distances = [distance(embedding, reference) for embedding in embeddings]
        print(distance.__name__, degrade.__name__, np.round(distances, 4))
        assert np.all(np.diff(distances) > 0) and distances[1] > 1.5 * distances[0]


# Bad input

DISTANCES = [frechet_distance, frechet_distance_infinity, kernel_audio_distance]


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(
    "embeddings, reference, message",
    [
        (np.zeros((0, 4)), normal(9, 4, 0), "`embeddings` must have .* rows, got shape \\(0, 4\\)"),
        (normal(1, 4, 0), normal(9, 4, 0), "`embeddings` must have .* rows, got shape \\(1, 4\\)"),
        (normal(9, 4, 0), normal(1, 4, 0), "`reference` must have .* at least 2 rows"),
        (normal(9, 4, 0)[0], normal(9, 4, 0), "`embeddings` must have .* axes"),
        (normal(9, 4, 0), normal(9, 5, 0), "same width is needed, got embeddings 4, reference 5"),
        (np.where(np.arange(36).reshape(9, 4) == 13, np.nan, 1.0), normal(9, 4, 0), "NaN or infinite .* row 3"),
        (normal(9, 4, 0), np.where(np.arange(36).reshape(9, 4) == 0, np.inf, 1.0), "NaN or infinite .* row 0"),
    ],
)
def test_bad_sets_are_refused(distance, embeddings, reference, message):
    with pytest.raises(ValueError, match=message):
        distance(embeddings, reference)


@pytest.mark.parametrize(
    "function, arguments, message",
    [
        (frechet_distance_infinity, (normal(3, 2, 0), normal(9, 2, 0)), "at least 4 rows"),
        (frechet_distance_infinity, (normal(9, 2, 0), normal(9, 2, 0), 1), "`steps` must be at least 2"),
        (kernel_audio_distance, (normal(9, 2, 0), np.ones((9, 2))), "median distance within `reference` is 0"),
        (frechet_distance_from_statistics, (np.zeros(2), np.eye(2), np.zeros(3), np.eye(3)), "same length"),
        (frechet_distance_from_statistics, (np.zeros(2), np.eye(3), np.zeros(2), np.eye(2)), "same shape"),
        (frechet_distance_from_statistics, (np.zeros(2), -np.eye(2), np.zeros(2), np.eye(2)), "negative eigenvalue"),
        (frechet_distance_from_statistics, (np.zeros(2), np.ones((2, 2)).cumsum(1), np.zeros(2), np.eye(2)), "symm"),
        (kl_divergence, (probabilities(3, 4, 0), probabilities(2, 4, 0)), "same shape"),
        (kl_divergence, (probabilities(3, 4, 0), 2 * probabilities(3, 4, 0)), "row 0 sums to 2, not to 1"),
        (kl_divergence, (np.array([[1.5, -0.5]]), np.array([[0.5, 0.5]])), "must be probabilities"),
        (clap_score, (normal(3, 4, 0), normal(4, 4, 0)), "same shape"),
        (clip_score, (normal(3, 4, 0), np.zeros((3, 4))), "zero vector"),
        (imsm, (probabilities(3, 4, 0), probabilities(3, 5, 0)), "same number of captions"),
        (imsm, (probabilities(3, 4, 0), np.full((3, 4), np.nan)), "`audio_text_probs` has NaN"),
        (imsm_score, (normal(3, 4, 0),), "same number is needed, got images 3, audios 4"),
        (imsm_pairs, (probabilities(3, 4, 0), probabilities(2, 4, 0)), "same shape"),
        (bootstrap_interval, ([1.0],), "at least 2 rows"),
        (bootstrap_interval, ([1.0, 2.0], np.mean, ["a", "a"]), "at least 2 rows or groups, got 1"),
        (bootstrap_interval, ([1.0, 2.0], np.mean, ["a"]), "same number of rows"),
        (jackknife_interval, (np.mean, normal(2, 1, 0)), "at least 3 rows or groups, got 2"),
        (partial(jackknife_interval, blocks=1), (np.mean, normal(9, 1, 0)), "`blocks` must be at least 2, got 1"),
    ],
)
def test_bad_input_is_refused(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)

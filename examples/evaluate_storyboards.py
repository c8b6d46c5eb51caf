"""Storyboards in evaluate.py: rows that follow one another become one piece, and how sharply its music changes.

The piece is cut where its pictures change. What is cut out is the clip of its row, scored like that of the picture
alone; the boundaries get figures of their own.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import tqdm
from evaluate_scores import format_interval
from evaluate_systems import ENCODING, make_clips, picture_encoder, row_generator

from melfusion_pipeline import ImageFeatures, MelFusionPipeline
from melfusion_pipeline.audio import Spectrogram, load_audio, log_mel_spectrogram, resample, save_audio
from melfusion_pipeline.metrics import Interval, bootstrap_interval

COLUMNS = {"contrast": "1: none", "rise, s": "lower", "centre, s": "near 0"}
# Spectra are averaged over so many frames of 10 ms.
FRAMES_A_BLOCK = 8
BLOCK = FRAMES_A_BLOCK * Spectrogram.hop_length / Spectrogram.sampling_rate
# From 10% to 90% of a logistic curve, in units of its scale.
RISE = 2 * np.log(9)


def part(items: Sequence, length: int) -> list[Sequence]:
    """Parts items into runs of `length`; the last may be shorter."""
    return [items[first : first + length] for first in range(0, len(items), length)]


def group_rows(rows: Sequence[dict], num_pictures: int) -> list[Sequence[dict]]:
    """Parts the rows into storyboards, in their order; the last may have fewer pictures.

    Raises:
        ValueError: If `num_pictures` is less than 2, or neighbours in a storyboard have the same picture.
    """
    if num_pictures < 2:
        raise ValueError(f"`--storyboard_pictures` must be at least 2, but is {num_pictures}.")
    groups = part(rows, num_pictures)
    for before, after in (pair for group in groups for pair in zip(group, group[1:])):
        if before["image"] == after["image"]:
            raise ValueError(
                f"Rows {before['row']} and {after['row']} are neighbours in a storyboard, but have the same picture,"
                f" {str(after['image'])!r}: put the rows into another order."
            )
    return groups


def check_storyboards(groups: Sequence[Sequence]) -> None:
    """Refuses storyboards that give no interval: what is resampled is the pieces that have a boundary."""
    count = sum(len(group) > 1 for group in groups)
    if count < 2:
        raise ValueError(f"Boundaries are scored in at least 2 storyboards, but there are {count}: give more rows.")


def share_work(
    clips: dict[str, list[tuple[str, dict]]], storyboards: Sequence[Sequence[dict]]
) -> list[tuple[list[tuple[str, dict]], Sequence[dict]]]:
    """Parts what is to be made so that few pictures have to be kept encoded at a time.

    Args:
        clips: By picture, as `group_by_picture` gives them.
        storyboards: As `group_rows` gives them.

    Returns:
        For each storyboard the clips of those of its pictures that no storyboard before it has, and its rows; then for
        each further picture its clips, and no rows.
    """
    clips, parts = dict(clips), []
    for rows in storyboards:
        parts.append(([clip for row in rows for clip in clips.pop(row["image"], [])], rows))
    return parts + [(of_picture, []) for of_picture in clips.values()]


@torch.no_grad()
def make_parts(
    pipe: MelFusionPipeline,
    parts: Sequence[tuple[list[tuple[str, dict]], Sequence[dict]]],
    captioner: Callable | None,
    options: dict,
    output: Path,
) -> None:
    """Makes what is not there yet of parts of `share_work`: `<output>/<system>/<row>.flac`."""
    pipe.set_progress_bar_config(disable=True)
    encode = picture_encoder(pipe, options, kept=max((len(rows) for _, rows in parts), default=0) or 1)
    for clips, rows in tqdm(parts, desc="Making clips", unit=" pictures or storyboards"):
        make_clips(pipe, clips, captioner, options, output, encode)
        if rows:
            make_storyboard(pipe, rows, options, output / "storyboard", encode)


def make_storyboard(
    pipe: MelFusionPipeline,
    rows: Sequence[dict],
    options: dict,
    folder: Path,
    encode: Callable[[str], ImageFeatures],
) -> None:
    """Makes the clips `<folder>/<row>.flac` of a storyboard, one piece, unless all of them are there."""
    call = {name: value for name, value in options["call"].items() if name not in ENCODING}
    rate = pipe.sampling_rate
    num_samples = round(call.pop("audio_length_in_s") * rate)
    paths = [folder / f"{row['row']}.flac" for row in rows]
    if all(path.exists() for path in paths):
        return
    piece = pipe(
        prompt=[row["caption"] for row in rows],
        image_features=ImageFeatures.join([encode(row["image"]) for row in rows]),
        image_start_in_s=[index * num_samples / rate for index in range(len(rows))],
        audio_length_in_s=len(rows) * num_samples / rate,
        generator=row_generator(options["seed"], rows[0]["row"]),
        output_type="pt",
        **call,
    ).audios[0]
    # One gain for the whole piece: a step in the level at a cut would be ours.
    for path, stretch in zip(paths, (piece / piece.abs().max().clamp(min=1)).split(num_samples), strict=True):
        save_audio(path, stretch, rate)


def read_blocks(path: Path, seconds: float) -> np.ndarray:
    """Reads the first seconds of a clip at its own level as log-mel spectra of 80 ms, `[blocks, 64]`."""
    waveform, rate = load_audio(path, 0.0, seconds)
    mel = log_mel_spectrogram(resample(waveform.mean(dim=0), rate)).numpy()
    blocks = mel[: len(mel) // FRAMES_A_BLOCK * FRAMES_A_BLOCK].reshape(-1, FRAMES_A_BLOCK, mel.shape[-1])
    return blocks.mean(axis=1)


def score_boundaries(groups: Sequence[Sequence[Path]], seconds: float, seed: int) -> dict[str, Interval]:
    """Scores how sharply the music changes where the pictures of storyboards do.

    `contrast` is the distance (of mean log-mel spectra, root mean square over boundaries) between the halves of two
    stretches that meet at a boundary, over that between the two halves of one stretch: 1 where a boundary is as any
    other place. For the others, the halves that do not meet give a direction from the one music to the other, and a
    logistic curve is fitted to the way of the music between them, on average over all boundaries: `rise, s` is the
    time from 10% to 90% of it, `centre, s` how long after the boundary its middle comes.

    Args:
        groups: Of each storyboard the clips, in order; one of a single picture has no boundary.
        seconds: Of each clip.
        seed: Of the resamples.

    Returns:
        Each figure with its 95% interval, bootstrapped by storyboard.

    Raises:
        ValueError: If fewer than two storyboards have a boundary.
    """
    check_storyboards(groups)
    distances, ways, labels = [], [], []
    for label, paths in enumerate(groups):
        stretches = [read_blocks(path, seconds) for path in paths]
        for before, after in zip(stretches, stretches[1:]):
            half = len(before) // 2
            near, far = (before[-half:], after[:half]), (before[:-half], after[half:])
            middles = [part.mean(axis=0) for part in (*far, *near)]
            first, last, ending, beginning = middles
            inside = (np.square(first - ending).sum() + np.square(beginning - last).sum()) / 2
            distances.append([np.square(ending - beginning).sum(), inside])
            direction = last - first
            ways.append((np.concatenate(near) - first) @ direction)
            labels.append(label)
    curves = LogisticCurves(len(ways[0]))
    found = (contrast, distances), (curves.rise, ways), (curves.centre, ways)
    intervals = [bootstrap_interval(np.array(rows), figure, groups=labels, seed=seed) for figure, rows in found]
    return dict(zip(COLUMNS, intervals, strict=True))


def contrast(distances: np.ndarray) -> float:
    """The ratio of the root mean squares of two columns of squared distances, `[boundaries, 2]`."""
    across, inside = distances.sum(axis=0)
    return float(np.sqrt(across / inside))


class LogisticCurves:
    """Logistic curves over so many blocks with a boundary in their middle, to be fitted by trying all of them.

    A search that cannot fail to converge, as an optimiser may where the music does not change at all.
    """

    def __init__(self, num_blocks: int):
        times = (np.arange(num_blocks) - (num_blocks - 1) / 2) * BLOCK
        rises, centres = np.geomspace(BLOCK, num_blocks * BLOCK, 60), times[num_blocks // 4 : -(num_blocks // 4)]
        self.rises, self.centres = (grid.ravel() for grid in np.meshgrid(rises, centres))
        curves = np.tanh((times - self.centres[:, None]) * RISE / self.rises[:, None] / 2)
        curves = curves - curves.mean(axis=1, keepdims=True)
        self.curves = curves / np.linalg.norm(curves, axis=1, keepdims=True)

    def best(self, ways: np.ndarray) -> int:
        """The curve that fits the sum of ways `[boundaries, blocks]` best, its two levels free."""
        return int((self.curves @ ways.sum(axis=0)).argmax())

    def rise(self, ways: np.ndarray) -> float:
        """The seconds from 10% to 90% of the best curve."""
        return float(self.rises[self.best(ways)])

    def centre(self, ways: np.ndarray) -> float:
        """How many seconds after the boundary the middle of the best curve comes."""
        return float(self.centres[self.best(ways)])


def format_boundaries(boundaries: dict[str, dict[str, Sequence[float]]]) -> str:
    """Formats the figures of each system's boundaries as a table in Markdown."""
    lines = ["| boundaries | " + " | ".join(f"{name} ({better})" for name, better in COLUMNS.items()) + " |"]
    lines.append("|---" * (1 + len(COLUMNS)) + "|")
    for name, scores in boundaries.items():
        lines.append("| " + " | ".join([name, *(format_interval(scores[column]) for column in COLUMNS)]) + " |")
    return "\n".join(lines) + "\n"

"""Where `pair_triplets.py` finds pictures and music, and the clips that long pieces are cut into."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from melfusion_pipeline.audio import AV_SUFFIXES, audio_duration, load_audio
from melfusion_pipeline.data import export_file, is_silent, locate
from melfusion_pipeline.sets import media_as_files, open_set, set_root
from melfusion_pipeline.tables import find_table_format, local_path, parse_field, read_records

SUFFIXES = {
    "image": tuple(suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN),
    "audio": (".flac", ".wav", ".ogg", ".mp3", *AV_SUFFIXES),
}
# The loudness that cuts look for is measured over stretches of this many seconds.
QUIET_IN_S = 0.1


class Item(NamedTuple):
    """A picture, or a stretch of music with its caption, if it has one; `start` and `duration` are in seconds."""

    path: Path
    caption: str | None = None
    start: float = 0.0
    duration: float | None = None


def find_items(source: str, kind: str, column: str, caption_column: str, split: str, media: Path) -> list[Item]:
    """Lists pictures or music.

    Args:
        source: a folder, a CSV or JSON file with paths relative to it, none outside of its folder (or with MusicCaps'
            `ytid`, whose clips lie somewhere below its folder), or a set that `datasets` reads.
        kind: `"image"` or `"audio"`.
        column: of the paths or files, where the source is no folder of files.
        caption_column: of the captions; a source may have none.
        split: of a set.
        media: the folder into which files are written that lie inside of a set.

    Raises:
        ValueError: If there are none.
    """
    path = Path(source)
    if path.is_file():
        items = list(items_of_table(path, kind, column, caption_column))
    elif path.is_dir() and not is_set(path):
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES[kind])
        items = [Item(file) for file in files if not file.name.startswith(".")]
    else:
        items = list(items_of_set(source, kind, column, caption_column, split, media))
    if not items:
        raise ValueError(f"{source!r} holds no {'pictures' if kind == 'image' else 'music'}.")
    return items


def is_set(folder: Path) -> bool:
    """Whether a folder is a set of `datasets` and not one of pictures or music."""
    markers = ("state.json", "dataset_dict.json", "metadata.*", "**/*.parquet", "**/*.tar", "**/*.arrow")
    return any(next(folder.glob(marker), None) for marker in markers)


def items_of_table(path: Path, kind: str, column: str, caption_column: str) -> Iterator[Item]:
    clips = {file.stem: file for file in path.parent.rglob("*") if file.suffix.lower() in SUFFIXES[kind]}
    table = find_table_format(path)
    decimal_mark = "," if table.get("delimiter") == ";" else "."
    for number, record in enumerate(read_records(path, **table)):
        try:
            record = json.loads(record) if isinstance(record, bytes) else record
            if isinstance(record, dict) and column not in record and "ytid" in record:
                file = clips.get(record["ytid"])
            else:
                file = file_of_table(path.parent, parse_field(record, kind, column), column)
            caption = parse_field(record, "caption", caption_column) if record.get(caption_column) else None
            start, duration = (parse_field(record, name, name, decimal_mark) for name in ("start", "duration"))
        except (ValueError, TypeError) as error:
            raise ValueError(f"Row {number} of {str(path)!r}: {error}") from error
        if file is not None:
            yield Item(file, caption, start or 0.0, duration)


def file_of_table(folder: Path, name: str, column: str) -> Path:
    """Finds the file that a table names; what lies elsewhere is a `ValueError`, for pairs are copied and published."""
    file = Path(local_path(folder, name, column))
    if not file.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name!r} lies outside of the table's folder {str(folder)!r}")
    return file


def items_of_set(name: str, kind: str, column: str, caption_column: str, split: str, media: Path) -> Iterator[Item]:
    records = open_set(name, None, split, streaming=False)
    if column not in records.column_names:
        raise ValueError(f"{name!r} has no column {column!r}, only {records.column_names}: name the {kind}'s.")
    captions = records[caption_column] if caption_column in records.column_names else [None] * len(records)
    media.mkdir(parents=True, exist_ok=True)
    for record, caption in zip(media_as_files(records.select_columns(column), [column]), captions):
        yield Item(media / export_file(locate(record[column], set_root(name)), media), caption or None)


def cut_track(item: Item, length: float) -> list[tuple[float, float]]:
    """Cuts music into clips of `length` to one and a half times `length` seconds, at its quietest places.

    Args:
        item: The music.
        length: In seconds.

    Returns:
        Beginning and duration of each, in seconds of the file. Silent ones are left out, and a rest that is shorter
        than `length`; what is not long enough for two clips stays whole.

    Raises:
        ValueError: If the file cannot be read.
    """
    duration = item.duration or audio_duration(item.path) - item.start
    if duration < 2 * length:
        return [(item.start, duration)]
    waveform, rate = load_audio(item.path, item.start, duration)
    loudness = loudness_curve(waveform.mean(dim=0).numpy(), round(QUIET_IN_S * rate))
    edges, last = [0], len(loudness)
    shortest, longest = (math.ceil(factor * length / QUIET_IN_S) for factor in (1.0, 1.5))
    while (left := last - edges[-1]) >= shortest:
        # Where two clips fit into what is left, the first leaves room for the second.
        most = min(longest, left - shortest if left >= 2 * shortest else left)
        ends = range(edges[-1] + shortest, edges[-1] + most + 1)
        edges.append(min(ends, key=lambda end: loudness[end - 1 : end + 1].max()))
    stretches = []
    for begin, end in zip(edges, edges[1:]):
        clip = waveform[:, round(begin * QUIET_IN_S * rate) : round(end * QUIET_IN_S * rate)]
        if not is_silent(clip):
            stretches.append((item.start + begin * QUIET_IN_S, (end - begin) * QUIET_IN_S))
    return stretches


def loudness_curve(samples: np.ndarray, block: int) -> np.ndarray:
    """The root mean square of every `block` samples of `[T]`; a rest is left out."""
    return np.sqrt(np.square(samples[: len(samples) // block * block].reshape(-1, block)).mean(axis=1))


def clips_of(item: Item, stretches: Sequence[Sequence[float]]) -> list[Item]:
    """The clips that a piece of music was cut into."""
    return [item._replace(start=float(start), duration=float(duration)) for start, duration in stretches]

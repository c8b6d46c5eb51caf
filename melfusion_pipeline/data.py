"""Triplets of picture, caption and music: reading, checking, cropping and collating MeLBench-style sets.

    rows = load_rows("melbench/train.jsonl")
    rows = select_good_rows(rows, check_rows(rows, data_root="melbench"))
    read = functools.partial(read_triplet, data_root="melbench", prepare_image=prepare_image)
    loader = DataLoader(TripletDataset(rows, read), batch_size=4, shuffle=True)

Rows are numbered from 0 in the file's order, without a CSV file's header and empty rows.
"""

import codecs
import csv
import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path, PureWindowsPath

import numpy as np
import torch
from diffusers.utils import logging
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info

from .audio import load_audio, load_random_crop
from .files_melfusion import atomic_write
from .waveforms_melfusion import Spectrogram

logger = logging.get_logger(__name__)

COLUMNS = ("image", "audio", "caption", "start", "duration", "genre", "split")
MELBENCH_COLUMNS = {"image": "img_path", "audio": "location", "caption": "captions"}
SILENCE = 1e-4
# In text decoded with `surrogateescape`: bytes that are not UTF-8, bytes that cp1252 leaves undefined, and characters
# that were decoded well.
NOT_UTF8 = re.compile("[\udc80-\udcff]")
NOT_CP1252 = re.compile("[\udc81\udc8d\udc8f\udc90\udc9d]")
BEYOND_ASCII = re.compile("[^\x00-\x7f\udc80-\udcff]")
CANCELLING = " once its channels are averaged, for they cancel out: keep one of them"
PathLike = str | os.PathLike


def load_rows(path: PathLike, columns: dict[str, str] | None = None, streaming: bool = False) -> Iterable[dict]:
    """Opens a set of triplets, whose files `read_triplet` reads later.

    Args:
        path: `.jsonl`, `.json` (lines, or one list), `.csv` or `.tsv` with the columns `image`, `audio`, `caption`
            and, where wanted, `start`, `duration` (in seconds), `genre`, `split`. Relative paths in it start from its
            folder; their backslashes part folders. A list of strings as caption is joined by commas. A CSV file is
            UTF-8, UTF-16 or cp1252, with commas, semicolons or tabs: what is unusual is found and logged.
        columns: the file's own names of these columns, for example `MELBENCH_COLUMNS` for the authors' files.
        streaming: read while iterating, with flat memory, instead of at once.

    Returns:
        A `datasets.Dataset` or `IterableDataset` of these columns, `row` (its number) and `problem` (if malformed).

    Raises:
        ImportError: if `datasets` is not installed.
        ValueError: if the file is missing, unreadable or without rows, or a key of `columns` is unknown.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Reading a set of triplets needs `datasets`: pip install datasets") from error
    is_file = isinstance(path, PathLike) and Path(path).is_file()
    if not is_file or Path(path).suffix.lower() not in (".jsonl", ".json", ".csv", ".tsv"):
        raise ValueError(f"`path` must be an existing .jsonl, .json, .csv or .tsv file, but is {str(path)!r}.")
    names = columns or {}
    if not isinstance(names, dict) or not set(names) <= set(COLUMNS) or not is_text(*names.values()):
        raise ValueError(f"`columns` must rename some of {list(COLUMNS)}, but is {columns}.")
    arguments = {"path": str(path), "columns": columns, **find_table_format(path)}
    if next(read_rows(**arguments), None) is None:
        raise ValueError(f"`path` {str(path)!r} holds no rows.")
    if streaming:
        return datasets.IterableDataset.from_generator(read_rows, gen_kwargs=arguments)
    return datasets.Dataset.from_list(list(read_rows(**arguments)))


def read_rows(
    path: str, columns: dict[str, str] | None = None, encoding: str | None = None, delimiter: str | None = None
) -> Iterator[dict]:
    """Yields the rows of `load_rows`, one dictionary each; `encoding` and `delimiter` as for `read_records`."""
    names = {column: column for column in COLUMNS} | (columns or {})
    for number, record in enumerate(read_records(path, encoding, delimiter)):
        row = dict.fromkeys(COLUMNS) | {"row": number, "problem": None}
        try:
            record = json.loads(record) if isinstance(record, bytes) else record
            if isinstance(record, dict) and None in record:
                raise ValueError(f"has more fields than the header, from {record[None]!r:.80}: quote a {delimiter!r}")
            # Where semicolons part the columns, spreadsheets write 12,5 for 12.5.
            decimal_mark = "," if delimiter == ";" else "."
            row |= {column: parse_field(record, column, name, decimal_mark) for column, name in names.items()}
            folder = os.path.dirname(path)
            row |= {column: local_path(folder, row[column], names[column]) for column in ("image", "audio")}
        except (ValueError, OverflowError, RecursionError) as error:
            row["problem"] = str(error)
        yield row


def local_path(folder: str, path: str, name: str) -> str:
    """Joins `path`, the field `name` of a row, to `folder`; backslashes part folders unless there is such a file.

    Returns:
        The path, which need not exist.

    Raises:
        ValueError: if the path holds '..', or is one of a Windows drive and this is another system.
    """
    if ".." in PureWindowsPath(path).parts:
        raise ValueError(f"`{name}` may not hold '..', but is {path!r}")
    joined = os.path.join(folder, path)
    if os.sep == "\\" or "\\" not in path or os.path.lexists(joined):
        return joined
    if PureWindowsPath(path).is_absolute():
        raise ValueError(f"`{name}` is {path!r}, on another system's drive: make it relative to the set's file")
    return os.path.join(folder, path.replace("\\", "/"))


def is_text(*values: object) -> bool:
    """Returns whether all of `values` are strings that can be written; lone surrogates, which JSON allows, cannot."""
    try:
        return all(isinstance(value, str) and value.encode() is not None for value in values)
    except UnicodeEncodeError:
        return False


def find_table_format(path: PathLike) -> dict[str, str]:
    """Finds how a CSV file is written, and logs what is unusual.

    Args:
        path: the file.

    Returns:
        `encoding` and `delimiter`, as `read_records` takes them; nothing for a file of another kind.

    Raises:
        ValueError: if the file cannot be read, or is none that a spreadsheet writes.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".csv", ".tsv"):
        return {}
    encoding = find_encoding(path)
    headers = {delimiter: next(read_fields(path, encoding, delimiter), []) for delimiter in ",;\t"}
    delimiter = max(headers, key=lambda delimiter: len(headers[delimiter]))
    if len(headers[delimiter]) == 1:
        header = headers[delimiter][0]
        raise ValueError(f"{str(path)!r} has one column, {header!r:.80}: part columns by commas, semicolons or tabs.")
    usual = "\t" if suffix == ".tsv" else ","
    if headers[delimiter] and (encoding, delimiter) != ("utf-8-sig", usual):
        text = f"Reading {str(path)!r} as {encoding} with {delimiter!r} between columns"
        logger.warning(f"{text}; if its letters come out wrong, save it as UTF-8." if encoding == "cp1252" else text)
    return {"encoding": encoding, "delimiter": delimiter}


def find_encoding(path: PathLike) -> str:
    """Returns which encoding the CSV file `path` has: `"utf-8-sig"`, `"utf-16"` or `"cp1252"`.

    Raises:
        ValueError: if it has none of them, or is UTF-8 with some foreign bytes.
    """
    with open(path, "rb") as file:
        mark = file.read(3)
    if mark[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16"
    is_utf8, foreign, undefined = mark == codecs.BOM_UTF8, None, None
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        for text in iter(functools.partial(file.read, 1 << 20), ""):
            if "\0" in text:
                raise ValueError(
                    f"{str(path)!r} holds null characters, as UTF-16 without its mark does: save it as UTF-8."
                )
            if not text.isascii():
                is_utf8 = is_utf8 or BEYOND_ASCII.search(text)
                foreign = foreign or NOT_UTF8.search(text)
                undefined = undefined or NOT_CP1252.search(text)
    if foreign and (is_utf8 or undefined):
        found = "UTF-8 with a foreign byte" if is_utf8 else "neither UTF-8, UTF-16 nor cp1252, for it holds a byte"
        byte = ord((foreign if is_utf8 else undefined).group()) - 0xDC00
        raise ValueError(f"{str(path)!r} is {found} {byte:#x}: save it anew as UTF-8.")
    return "cp1252" if foreign else "utf-8-sig"


def read_fields(path: PathLike, encoding: str, delimiter: str) -> Iterator[list[str]]:
    """Yields the rows of the CSV file `path` that are not empty; see `find_table_format` for `encoding`, `delimiter`.

    Raises:
        ValueError: if the file cannot be read.
    """
    try:
        with open(path, encoding=encoding, newline="") as file:
            yield from (fields for fields in csv.reader(file, delimiter=delimiter) if any(fields))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from error


def read_records(path: PathLike, encoding: str | None = None, delimiter: str | None = None) -> Iterator[dict | bytes]:
    """Yields the records of the CSV file or JSON list `path`, or the undecoded lines of JSON lines.

    Args:
        path: the file.
        encoding: of a CSV file, see `find_table_format`.
        delimiter: of a CSV file.

    Returns:
        An iterator; a CSV record's fields without a header are the list under the key `None`.

    Raises:
        ValueError: if the file cannot be read as what its suffix says.
    """
    if delimiter:
        table = read_fields(path, encoding, delimiter)
        header = next(table, [])
        for fields in table:
            extra = fields[len(header) :]
            yield dict(zip(header, fields)) | ({None: extra} if any(extra) else {})
        return
    try:
        with open(path, "rb") as file:
            if file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise ValueError("it is UTF-16: save it as UTF-8")
            if file.peek(3)[:3] == codecs.BOM_UTF8:
                file.read(3)
            if file.peek(1)[:1] == b"[":
                yield from json.load(file)
            else:
                yield from (line for line in file if line.strip())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from error


def parse_field(record: dict, column: str, name: str, decimal_mark: str = ".") -> str | float | None:
    """Returns the field `name` of `record` as `column` needs it; a wrong one is a `ValueError`.

    An optional field that is absent is `None`. A caption may be a list of strings. `decimal_mark` is that of numbers
    which are written as text.
    """
    value = record.get(name) if isinstance(record, dict) else None
    if column == "caption" and isinstance(value, list) and is_text(*value):
        value = ", ".join(text.strip() for text in value if text.strip())
    if value is None or value == "":
        if column in ("image", "audio", "caption"):
            raise ValueError(f"`{name}` is missing in {record!r:.80}")
    elif column in ("start", "duration"):
        is_number = isinstance(value, str | int | float) and not isinstance(value, bool)
        value = value.replace(decimal_mark, ".") if isinstance(value, str) else value
        value = float(value) if is_number else math.nan
        if not 0 <= value < math.inf or (value == 0 and column == "duration"):
            raise ValueError(f"`{name}` must be a number of seconds, but is {record[name]!r:.80}")
    elif not is_text(value) or not value.strip():
        raise ValueError(f"`{name}` must be text, but is {value!r:.80}")
    return None if value == "" else value


def contained_path(path: PathLike, data_root: PathLike) -> Path:
    """Resolves `path`; a `ValueError` if it is no file, or it or its link's target is not below `data_root`."""
    try:
        resolved, root = Path(path).resolve(), Path(data_root).resolve()
        is_file = resolved.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        # A name too long, a null byte, links in a circle.
        raise ValueError(f"{str(path)!r} cannot be found: {error}") from error
    if not resolved.is_relative_to(root):
        raise ValueError(f"{str(path)!r} lies outside `data_root` {str(root)!r}")
    if not is_file:
        raise ValueError(f"{str(path)!r} is missing")
    return resolved


def open_image(path: Path) -> Image.Image:
    """Decodes the picture `path` as it is stored (any mode, not rotated); a `ValueError` if broken or oversized."""
    try:
        with Image.open(path) as image:
            image.load()
            image.getexif()
    # Pillow's decoders let anything out that a damaged file provokes: struct.error, SyntaxError, IndexError, ...
    except Exception as error:
        raise ValueError(f"{str(path)!r} cannot be read as a picture: {error}") from error
    return image


def check_rows(rows: Iterable[dict], data_root: PathLike, min_duration_in_s: float = 1.0) -> list[tuple[int, str]]:
    """Reads every row's files, with a progress bar.

    Args:
        rows: of `load_rows`.
        data_root: the folder that all files must lie in.
        min_duration_in_s: music shorter than this many seconds is a problem.

    Returns:
        Row number and message for each malformed, missing, unreadable, silent, too short or repeated triplet.
    """
    problems, first_rows = [], {}
    for row in logging.tqdm(rows, desc="Checking", unit=" rows"):
        problems += [(row["row"], text) for text in check_row(row, data_root, min_duration_in_s, first_rows)]
    return problems


def check_row(row: dict, data_root: PathLike, min_duration_in_s: float, first_rows: dict[bytes, int]) -> Iterator[str]:
    """Yields what is wrong with one row; the arguments beside `row` and `first_rows` are those of `check_rows`.

    `first_rows` collects which row held which contents first.
    """
    if row["problem"]:
        yield row["problem"]
        return
    digest = hashlib.sha256(row["caption"].encode())
    try:
        digest.update(open_image(contained_path(row["image"], data_root)).tobytes())
        path = contained_path(row["audio"], data_root)
        waveform, sampling_rate = load_audio(path, row["start"] or 0.0, row["duration"])
        digest.update(waveform.numpy())
    except ValueError as error:
        yield str(error)
        return
    if waveform.shape[-1] < min_duration_in_s * sampling_rate:
        yield f"{str(path)!r} is too short: {waveform.shape[-1] / sampling_rate:.2f} s"
    if is_silent(waveform):
        yield f"{str(path)!r} is silent" + ("" if all(map(is_silent, waveform.unsqueeze(1))) else CANCELLING)
    if first_rows.setdefault(digest.digest(), row["row"]) != row["row"]:
        yield f"repeats row {first_rows[digest.digest()]}"


def is_silent(waveform: torch.Tensor) -> bool:
    """Returns whether the mean of the channels of `waveform` `[C, T]`, which is what models hear, is silent."""
    mono = waveform.double().mean(dim=0)
    return bool((mono - mono.mean()).abs().max() < SILENCE)


def format_problems(problems: list[tuple[int, str]]) -> str:
    """Formats `problems` (of `check_rows`) as a table of row number and message."""
    return "\n".join(["     row  problem", *(f"{row:>8}  {message}" for row, message in problems)])


def select_good_rows(
    rows: Iterable[dict], problems: list[tuple[int, str]], skip_bad_rows: bool = False
) -> Iterable[dict]:
    """Returns `rows` (of `load_rows`) without those with `problems` (of `check_rows`).

    Raises:
        ValueError: if there are problems and not `skip_bad_rows`; the message lists them.
    """
    if not problems:
        return rows
    report = f"The set has {len(problems)} problems (`skip_bad_rows` leaves them out):\n{format_problems(problems)}"
    if not skip_bad_rows:
        raise ValueError(report)
    logger.warning(report)
    return rows.filter(functools.partial(is_good, bad_rows={row for row, _ in problems}), input_columns="row")


def is_good(row: int, bad_rows: set[int]) -> bool:
    """Returns whether `row` is not among `bad_rows`; a function, because spawned workers cannot be sent a lambda."""
    return row not in bad_rows


def read_triplet(
    row: dict,
    data_root: PathLike,
    prepare_image: Callable[..., torch.Tensor] | None,
    audio_length_in_s: float = 10.24,
    random_image_crops: bool = False,
    seed: int = 0,
    epoch: int = 0,
    sampling_rate: int = Spectrogram.sampling_rate,
) -> dict:
    """Reads a row's picture and a stretch of its music; what is random is keyed by seed, epoch and row number only.

    Args:
        row: from `load_rows`.
        data_root: the folder that all files must lie in.
        prepare_image: called as `prepare_image(image, generator=generator)` with a `PIL.Image.Image` as it is stored
            (any mode, not rotated by its EXIF data) and a `torch.Generator`, or `None` for the centre crop; returns
            float32 `[3, S, S]` in [-1, 1]. `None` leaves the picture unread: its cached trajectory needs no pixels.
        audio_length_in_s: length of the stretch; shorter music is padded with zeros.
        random_image_crops: whether `prepare_image` gets a generator.
        seed: the run's seed.
        epoch: how often the set has been read before.
        sampling_rate: of the music, in Hz: `pipe.sampling_rate`.

    Returns:
        `pixel_values` `[3, S, S]` (unless `prepare_image` is None), `waveforms` `[T]` (of `load_random_crop`),
        `captions`, `indices` (row number) and `image_paths`, named as in the batch that torch's `default_collate`
        makes of them.

    Raises:
        ValueError: if the row cannot be read, naming its number.
    """
    key = np.random.SeedSequence([seed, epoch, row["row"]]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(key[0]))
    try:
        if row["problem"]:
            raise ValueError(row["problem"])
        image_path, audio_path = (contained_path(row[column], data_root) for column in ("image", "audio"))
        stretch = (row["start"] or 0.0, row["duration"], audio_length_in_s)
        waveform = load_random_crop(audio_path, *stretch, generator, sampling_rate)
        image = open_image(image_path) if prepare_image else None
    except ValueError as error:
        raise ValueError(f"Row {row['row']}: {error}") from error
    sample = {"waveforms": waveform, "captions": row["caption"], "indices": row["row"], "image_paths": str(image_path)}
    if prepare_image:
        sample["pixel_values"] = prepare_image(image, generator=generator if random_image_crops else None)
    return sample


class TripletDataset(Dataset):
    """Map-style set of triplets.

    Args:
        rows: of `load_rows`.
        read: `read_triplet` with its arguments bound by `functools.partial`.
    """

    def __init__(self, rows: Sequence[dict], read: Callable[..., dict]) -> None:
        self.rows, self.read, self.epoch = rows, read, 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the crops of `epoch`; call it before an epoch's iterator is made (accelerate does not always)."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.read(self.rows[index], epoch=self.epoch)


class TripletStream(IterableDataset):
    """Streamed set of triplets that yields whole batches, for a `DataLoader` with `batch_size=None`.

    Processes share every `batch_size * num_processes` rows, whichever worker reads; an incomplete rest is left out.

    Args:
        rows: of `load_rows` with `streaming=True`.
        read: `read_triplet` with its arguments bound by `functools.partial`.
        batch_size: of each process.
        process_index: the number of this process, from 0.
        num_processes: how many share the set.
    """

    def __init__(self, rows, read: Callable, batch_size: int, process_index: int = 0, num_processes: int = 1) -> None:
        self.rows, self.read, self.epoch = rows, read, 0
        self.own_rows = slice(process_index * batch_size, (process_index + 1) * batch_size)
        self.shared_batch_size = batch_size * num_processes

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order and the crops of `epoch`; call it before an epoch's iterator is made."""
        self.rows.set_epoch(epoch)
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        shared_batches = self.rows.iter(self.shared_batch_size, drop_last_batch=True)
        for columns in islice(shared_batches, first, None, step):
            rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
            yield default_collate([self.read(row, epoch=self.epoch) for row in rows[self.own_rows]])


def convert_musiccaps(path: PathLike, clips: PathLike, images: PathLike, output: PathLike) -> list[tuple[int, str]]:
    """Joins MusicCaps' CSV file with folders of its clips and of pictures into a set that `load_rows` reads.

    Args:
        path: MusicCaps' CSV file (`ytid,start_s,end_s,...,caption`).
        clips: folder of the clips, already cut from `start_s` to `end_s`, named `<ytid>.wav` (or flac, mp3, m4a, ...).
        images: folder of the pictures, named `<ytid>.jpg` (or png, ...).
        output: the `.jsonl` file to write, in a folder that holds both folders.

    Returns:
        Row number and message of the rows of the CSV file that are left out.
    """
    root, lines, problems = Path(output).resolve().parent, [], []
    folders = {"image": Path(images).resolve(), "audio": Path(clips).resolve()}
    files = {name: {file.stem: str(file.relative_to(root)) for file in folders[name].iterdir()} for name in folders}
    for number, record in enumerate(read_records(path, **find_table_format(path))):
        if not isinstance(record, dict) or not {"ytid", "caption"} <= record.keys():
            raise ValueError(f"{str(path)!r} needs the columns `ytid` and `caption`, row {number} is {record!r:.80}")
        row = {name: files[name].get(record["ytid"]) for name in files} | {"caption": record["caption"]}
        missing = [f"no {name} {record['ytid']}.* in {str(folders[name])!r}" for name in files if not row[name]]
        problems += [(number, message) for message in missing]
        lines += [] if missing else [json.dumps(row) + "\n"]
    with atomic_write(output) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    return problems

"""Sets of triplets as tables: a file whose rows name a picture, a clip and a caption.

    rows = load_rows("melbench/train.jsonl")

Rows are numbered from 0 in the file's order, without a CSV file's header and empty rows.
"""

import codecs
import csv
import functools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path, PureWindowsPath

from diffusers.utils import logging

from .files_melfusion import atomic_write

logger = logging.get_logger(__name__)

COLUMNS = ("image", "audio", "caption", "start", "duration", "genre", "split")
MELBENCH_COLUMNS = {"image": "img_path", "audio": "location", "caption": "captions"}
# In text decoded with `surrogateescape`: bytes that are not UTF-8, bytes that cp1252 leaves undefined, and characters
# that were decoded well.
NOT_UTF8 = re.compile("[\udc80-\udcff]")
NOT_CP1252 = re.compile("[\udc81\udc8d\udc8f\udc90\udc9d]")
BEYOND_ASCII = re.compile("[^\x00-\x7f\udc80-\udcff]")
# So many JSON lines are one shard of a stream: at most so many are read again where a stream goes on.
ROWS_PER_SHARD = 1000
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
        arguments["stretches"] = find_stretches(path)
        return datasets.IterableDataset.from_generator(read_rows, gen_kwargs=arguments)
    return datasets.Dataset.from_list(list(read_rows(**arguments)))


def read_rows(
    path: str,
    columns: dict[str, str] | None = None,
    encoding: str | None = None,
    delimiter: str | None = None,
    stretches: Sequence[tuple[int, int, int | None]] = ((0, 0, None),),
) -> Iterator[dict]:
    """Yields the rows of `load_rows`, one dictionary each.

    Args:
        path: the file.
        columns: as for `load_rows`.
        encoding: as for `read_records`.
        delimiter: as for `read_records`.
        stretches: what to read, of `find_stretches`.
    """
    names = {column: column for column in COLUMNS} | (columns or {})
    for byte, first, length in stretches:
        records = islice(read_records(path, encoding, delimiter, byte), length)
        yield from (_read_row(path, record, number, names, delimiter) for number, record in enumerate(records, first))


def _read_row(path: str, record: dict | bytes, number: int, names: dict[str, str], delimiter: str | None) -> dict:
    """Makes the row `number` of `load_rows` of a record of `read_records`; what is wrong becomes its `problem`."""
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
    return row


def find_stretches(path: PathLike) -> list[tuple[int, int, int | None]]:
    """Finds what of the file `path` can be read alone: the byte and the row where it begins, and its number of rows.

    Only JSON lines can be read from their middle: in CSV a line break may be part of a field.
    """
    stretches, number, byte = [], 0, 0
    with open(path, "rb") as file:
        if Path(path).suffix.lower() in (".csv", ".tsv") or file.peek(4)[:4].lstrip(codecs.BOM_UTF8)[:1] == b"[":
            return [(0, 0, None)]
        for line in file:
            if line.strip():
                stretches += [] if number % ROWS_PER_SHARD else [(byte, number, ROWS_PER_SHARD)]
                number += 1
            byte += len(line)
    return stretches


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


def read_records(
    path: PathLike, encoding: str | None = None, delimiter: str | None = None, byte: int = 0
) -> Iterator[dict | bytes]:
    """Yields the records of the CSV file or JSON list `path`, or the undecoded lines of JSON lines.

    Args:
        path: the file.
        encoding: of a CSV file, see `find_table_format`.
        delimiter: of a CSV file.
        byte: of JSON lines, where to begin.

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
            if byte == 0 and file.peek(1)[:1] == b"[":
                yield from json.load(file)
            else:
                file.seek(byte, os.SEEK_SET if byte else os.SEEK_CUR)
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
            has_others = isinstance(record, dict) and name not in record
            hint = f": `columns`, or --{column}_column, names another" if has_others else ""
            raise ValueError(f"`{name}` is missing in {record!r:.80}{hint}")
    elif column in ("start", "duration"):
        is_number = isinstance(value, str | int | float) and not isinstance(value, bool)
        value = value.replace(decimal_mark, ".") if isinstance(value, str) else value
        value = float(value) if is_number else math.nan
        if not 0 <= value < math.inf or (value == 0 and column == "duration"):
            raise ValueError(f"`{name}` must be a number of seconds, but is {record[name]!r:.80}")
    elif not is_text(value) or not value.strip():
        raise ValueError(f"`{name}` must be text, but is {value!r:.80}")
    return None if value == "" else value


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

"""Sets of triplets as the ecosystem has them: what `datasets` reads, from the Hub or a folder.

    rows = load_set("user/set", split="train", streaming=True)

Nothing is decoded here: `melfusion_pipeline.data.read_triplet` decodes pictures and clips as it does those of files.
`datasets` itself decodes and encodes sound only where torchcodec is installed, which is never needed here.
"""

import functools
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import fsspec

from .tables import COLUMNS, ROWS_PER_SHARD, is_text, parse_field

if TYPE_CHECKING:
    import datasets

MEDIA_COLUMNS = ("image", "audio")
TEXT_COLUMNS = tuple(column for column in COLUMNS if column not in MEDIA_COLUMNS)
NUMBERS = ("start", "duration")


def load_set(
    name: str,
    config_name: str | None = None,
    split: str = "train",
    columns: dict[str, str] | None = None,
    streaming: bool = False,
) -> Iterable[dict]:
    """Opens a set of triplets that `datasets.load_dataset` or `load_from_disk` reads.

    That is Parquet with `Image` and `Audio` features, "imagefolder" and "audiofolder" with a metadata file, tar files
    of WebDataset, JSON and CSV with paths, and what save_to_disk wrote.

    Args:
        name: the id on the Hub, or a folder.
        config_name: one of several configurations.
        split: such as `"train"`.
        columns: the set's own names of `image`, `audio`, `caption`, `start`, `duration`, `genre` and `split`. A dot
            leads into a nested column, such as `"json.caption"` in WebDataset.
        streaming: read while iterating, with flat memory, instead of downloading first. A shard is a row group where
            the set is Parquet.

    Returns:
        A `datasets.Dataset` or `IterableDataset` with the columns of `load_rows`, in which `image` and `audio` hold
        `bytes` and `path`, one of them perhaps None. A streamed row has its number within its shard, `shard_row`,
        instead of `row`.

    Raises:
        ImportError: if `datasets` is not installed.
        TypeError: if `columns` is no dict.
        ValueError: if there is no such set, configuration, split or column, it may not be read, a column holds neither
            pictures nor clips, or there are no rows.
    """
    if not isinstance(columns, dict | None):
        raise TypeError(f"`columns` must be a dict or None, got {columns!r:.80}.")
    names = {column: column for column in COLUMNS} | (columns or {})
    if not is_text(name, split) or not name.strip():
        raise ValueError(
            f"`name` and `split` must be the set's id or folder and one of its splits, got {name!r}, {split!r}."
        )
    if not set(names) <= set(COLUMNS) or not is_text(*names.values()):
        raise ValueError(f"`columns` must rename some of {list(COLUMNS)}, but is {columns}.")
    records = open_set(name, config_name, split, streaming)
    records = _with_features(records)
    _check_columns(records, names, name)
    used = {name_in_set.partition(".")[0] for name_in_set in names.values()} & set(records.column_names)
    records = _undecoded(records.select_columns(sorted(used)), names)
    if next(iter(records), None) is None:
        raise ValueError(f"The split {split!r} of {name!r} holds no rows: name another by `split`.")
    return _stream_rows(records, names) if streaming else _table_rows(records, names)


def set_root(name: str) -> str:
    """Returns where the files of the set `name` must lie: its folder, or its repository on the Hub."""
    return os.path.abspath(name) if os.path.isdir(name) else f"hf://datasets/{name}"


def read_remote(path: str, root: str) -> bytes:
    """Reads a file of a set on the Hub.

    Args:
        path: its address, or its path in the repository.
        root: of `set_root`, below which it must lie.

    Returns:
        Its content.

    Raises:
        ValueError: if it lies elsewhere or cannot be read.
    """
    path = path if "://" in path else f"{root}/{path}"
    segments = path.partition("://")[2].split("/")
    if not path.startswith((f"{root}/", f"{root}@")) or {"", ".."} & set(segments):
        raise ValueError(f"{path!r} lies outside of {root!r}")
    try:
        with fsspec.open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ValueError(f"{path!r} cannot be read: {error}") from error


def open_set(
    name: str, config_name: str | None, split: str, streaming: bool
) -> "datasets.Dataset | datasets.IterableDataset":
    """Opens a set as it is; the arguments and errors are those of `load_set`."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Reading a set of triplets needs `datasets`: pip install datasets") from error
    try:
        if any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):
            return _open_saved(name, split, streaming)
        builder = _open_builder(name, config_name)
        if streaming:
            records = builder.as_streaming_dataset(split=split)
            # Parquet then has a shard a row group: a stream goes on by reading one row group again.
            return records.reshard()
        if isinstance(builder, datasets.ArrowBasedBuilder):
            return datasets.load_dataset(name, config_name, split=split)
        return _copy_set(name, config_name, split, builder)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise ValueError(
            f"{name!r} is neither a folder here nor a set on the Hub that may be read from here: check the spelling;"
            " a private one needs `hf auth login` or the variable HF_TOKEN."
        ) from error
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"The split {split!r} of {name!r} cannot be read: {error.__cause__ or error}") from error


def _with_features(
    records: "datasets.Dataset | datasets.IterableDataset",
) -> "datasets.Dataset | datasets.IterableDataset":
    """Gives `records` the features of their first rows where they have none, as streamed JSON and CSV."""
    import datasets

    if records.features is not None:
        return records
    return records.cast(datasets.Dataset.from_list(list(records.take(100))).features)


def _open_saved(name: str, split: str, streaming: bool) -> "datasets.Dataset | datasets.IterableDataset":
    """Opens what save_to_disk wrote; the arguments are those of `load_set`."""
    import datasets

    records = datasets.load_from_disk(name)
    if isinstance(records, datasets.DatasetDict):
        if split not in records:
            raise ValueError(f"its splits are {list(records)}")
        records = records[split]
    num_shards = max(1, math.ceil(len(records) / ROWS_PER_SHARD))
    return records.to_iterable_dataset(num_shards) if streaming else records


def _open_builder(name: str, config_name: str | None) -> "datasets.DatasetBuilder":
    """Finds out what kind of set `name` is; the arguments are those of `load_set`."""
    import datasets

    builder = datasets.load_dataset_builder(name, config_name)
    if hasattr(builder.config, "decode_num_threads"):
        # Streamed from the Hub, a folder's pictures would be decoded ahead by threads, and its sounds as pictures.
        builder.config.decode_num_threads = 0
    return builder


def _copy_set(
    name: str, config_name: str | None, split: str, builder: "datasets.DatasetBuilder"
) -> "datasets.Dataset":
    """Copies a set that is not stored as a table into the cache of `datasets`, without torchcodec.

    Args:
        name: as for `load_set`.
        config_name: as for `load_set`.
        split: as for `load_set`.
        builder: of this set.
    """
    import datasets

    names = {"name": name, "config_name": config_name, "split": split}
    features = media_as_files(builder.as_streaming_dataset(split=split)).features
    # The folder of the cache is named after the state of the files, so that a set that has changed is copied anew.
    arguments = names | {"version": builder.cache_dir}
    return datasets.Dataset.from_generator(_copied_records, features=features, gen_kwargs=arguments, split=split)


def _copied_records(name: str, config_name: str | None, split: str, version: str) -> Iterator[dict]:
    """Yields the records for `copy_set`; files on the Hub become their content, `version` only names the copy."""
    for record in media_as_files(_open_builder(name, config_name).as_streaming_dataset(split=split)):
        for value in record.values():
            if isinstance(value, dict) and "://" in (value.get("path") or "") and value.get("bytes") is None:
                value["bytes"] = read_remote(value["path"], set_root(name))
        yield record


def media_as_files(
    records: "datasets.Dataset | datasets.IterableDataset", columns: Iterable[str] | None = None
) -> "datasets.Dataset | datasets.IterableDataset":
    """Lets pictures and sounds stay files: `{"bytes": ..., "path": ...}`.

    Args:
        records: a set.
        columns: which; `None` are all that `datasets` knows to be media.

    Returns:
        The set, undecoded.
    """
    import datasets

    # Sounds as well: both are stored alike, but only sounds ask for torchcodec.
    as_files = datasets.Image(decode=False)
    if columns is None:
        features = records.features.items()
        columns = [name for name, feature in features if isinstance(feature, datasets.Image | datasets.Audio)]
    for column in columns:
        records = records.cast_column(column, as_files)
    return records


def _undecoded(
    records: "datasets.Dataset | datasets.IterableDataset", names: dict[str, str]
) -> "datasets.Dataset | datasets.IterableDataset":
    """Renames the media of `records` to `image` and `audio` by `names` and leaves them files."""
    records = media_as_files(records, [names[column] for column in MEDIA_COLUMNS])
    return records.rename_columns({names[column]: column for column in MEDIA_COLUMNS if names[column] != column})


def _check_columns(records: "datasets.Dataset | datasets.IterableDataset", names: dict[str, str], name: str) -> None:
    """Refuses a set without pictures, clips or captions in the columns `names`, or with something else there."""
    found = list(records.column_names)
    missing = [names[column] for column in (*MEDIA_COLUMNS, "caption") if names[column].partition(".")[0] not in found]
    if missing:
        raise ValueError(
            f"{name!r} has no columns {missing}, only {found}: name those that hold picture, music and caption."
        )
    for column in MEDIA_COLUMNS:
        if not _holds_files(feature := records.features[names[column]]):
            raise ValueError(
                f"The column {names[column]!r} of {name!r} holds {feature}: as `{column}` it must hold files (the"
                " features Image or Audio, paths, or bytes)."
            )
    caption = records.features.get(names["caption"])
    if caption is not None and not _holds_text(caption):
        raise ValueError(f"The column {names['caption']!r} of {name!r} holds {caption}, but captions are text.")


def _holds_files(feature: object) -> bool:
    """Returns whether the feature of a column is one of files: media, paths or bytes."""
    import datasets

    is_file = isinstance(feature, datasets.Value) and feature.dtype in (
        "string",
        "large_string",
        "binary",
        "large_binary",
    )
    is_struct = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    return is_file or is_struct or isinstance(feature, datasets.Image | datasets.Audio)


def _holds_text(feature: object) -> bool:
    """Returns whether the feature of a column is text, or a list of texts."""
    import datasets

    feature = getattr(feature, "feature", feature)
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _stream_rows(records: "datasets.IterableDataset", names: dict[str, str]) -> "datasets.IterableDataset":
    """Makes the rows of `load_set` of streamed `records` whose media have been renamed."""
    arguments = {"names": names}
    return records.map(_stream_row, with_indices=True, fn_kwargs=arguments, remove_columns=list(records.column_names))


def _stream_row(record: dict, index: int, names: dict[str, str]) -> dict:
    """Makes one row for `stream_rows`: of the record `index` of its shard."""
    media = {column: record[column] for column in MEDIA_COLUMNS}
    return media | _text_fields(record, names) | {"shard_row": index}


def _table_rows(records: "datasets.Dataset", names: dict[str, str]) -> "datasets.Dataset":
    """Makes the rows of `load_set` of `records` whose media have been renamed; no picture or clip is read."""
    import datasets

    used = {names[column].partition(".")[0] for column in TEXT_COLUMNS} & set(records.column_names)
    texts = records.select_columns(sorted(used))
    fields = [_text_fields(record, names) | {"row": number} for number, record in enumerate(texts)]
    types = {column: "float64" if column in NUMBERS else "string" for column in (*TEXT_COLUMNS, "problem")}
    features = {column: datasets.Value(dtype) for column, dtype in (types | {"row": "int64"}).items()}
    fields = datasets.Dataset.from_list(fields, features=datasets.Features(features))
    return datasets.concatenate_datasets([records.select_columns(list(MEDIA_COLUMNS)), fields], axis=1)


def _text_fields(record: dict, names: dict[str, str]) -> dict:
    """Reads what of a record is no file; what is wrong becomes its `problem`."""
    row = dict.fromkeys((*TEXT_COLUMNS, "problem"))
    try:
        for column in TEXT_COLUMNS:
            value = functools.reduce(_step_into, names[column].split("."), record)
            row[column] = parse_field({names[column]: value}, column, names[column])
    except (ValueError, OverflowError) as error:
        row["problem"] = str(error)
    return row


def _step_into(value: object, key: str) -> object:
    """Returns what a nested value holds under `key`, or None."""
    return value.get(key) if isinstance(value, dict) else None

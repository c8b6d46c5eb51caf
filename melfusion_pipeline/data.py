"""Triplets of picture, caption and music: reading, checking, cropping and collating.

rows = load_rows("melbench/train.jsonl")
rows = select_good_rows(rows, check_rows(rows, data_root="melbench"))
read = functools.partial(read_triplet, data_root="melbench", prepare_image=prepare_image)
loader = DataLoader(TripletDataset(rows, read), batch_size=4, shuffle=True)
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from diffusers.utils import logging
from PIL import Image
from torch.utils.data import Dataset, default_collate

from .arguments_melfusion import check_integer, check_path, check_positive, check_real
from .audio import EmbeddedFile, load_audio, load_random_crop
from .files_melfusion import atomic_write
from .sets import load_set as load_set
from .sets import read_remote
from .sets import set_root as set_root
from .tables import COLUMNS as COLUMNS
from .tables import MELBENCH_COLUMNS as MELBENCH_COLUMNS
from .tables import PathLike
from .tables import convert_musiccaps as convert_musiccaps
from .tables import load_rows as load_rows
from .waveforms_melfusion import Spectrogram, check_sampling_rate

logger = logging.get_logger(__name__)

SILENCE = 1e-4
CANCELLING = " once its channels are averaged, for they cancel out: keep one of them"


def contained_path(path: PathLike, data_root: PathLike) -> Path:
    """Resolves `path`; a `ValueError` if it is no file, or it or its link's target is not below `data_root`."""
    check_path("data_root", data_root)
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


def locate(file: PathLike | dict, data_root: PathLike) -> Path | EmbeddedFile:
    """Finds the file that a row's `image` or `audio` stands for.

    Args:
        file: the path of `load_rows`, or `bytes` and `path` of `load_set`.
        data_root: the folder, or `set_root` of a set, that it must lie in.

    Returns:
        The path of an existing file, or one that lies inside of the set or on the Hub with its content.

    Raises:
        ValueError: if it is missing, or lies elsewhere.
    """
    if not isinstance(file, dict):
        return contained_path(file, data_root)
    content, path = file["bytes"], file["path"]
    if content is None and path is None:
        raise ValueError("a file is missing: the column holds neither bytes nor a path")
    if content is None and not str(data_root).startswith("hf://"):
        return contained_path(Path(data_root, path), data_root)
    return EmbeddedFile(read_remote(path, str(data_root)) if content is None else content, path or "an embedded file")


def open_image(path: PathLike | EmbeddedFile) -> Image.Image:
    """Decodes the picture `path` as it is stored (any mode, not rotated); a `ValueError` if broken or oversized."""
    try:
        with Image.open(BytesIO(path.content) if isinstance(path, EmbeddedFile) else path) as image:
            image.load()
            image.getexif()
    # Pillow's decoders let anything out that a damaged file provokes: struct.error, SyntaxError, IndexError, ...
    except Exception as error:
        raise ValueError(f"{str(path)!r} cannot be read as a picture: {error}") from error
    return image


def check_rows(rows: Iterable[dict], data_root: PathLike, min_duration_in_s: float = 1.0) -> list[tuple[int, str]]:
    """Reads every row's files, with a progress bar.

    Args:
        rows: of `load_rows` or `load_set`.
        data_root: the folder that all files must lie in, or `set_root` of a set.
        min_duration_in_s: music shorter than this many seconds is a problem.

    Returns:
        Row number and message for each malformed, missing, unreadable, silent, too short or repeated triplet.
    """
    return list_problems(examine_rows(rows, data_root, min_duration_in_s))


class ExaminedRow(NamedTuple):
    """What was seen of a row.

    Args:
        number: the row's.
        problems: what is wrong with it, in words.
        digest: of its contents, `None` if they cannot be read.
    """

    number: int
    problems: list[str]
    digest: bytes | None


def examine_rows(rows: Iterable[dict], data_root: PathLike, min_duration_in_s: float = 1.0) -> list[ExaminedRow]:
    """The part of `check_rows` that reads, for any share of a set; `list_problems` takes the shares together.

    Args:
        rows: the share; these are the arguments of `check_rows`.
        data_root: likewise.
        min_duration_in_s: likewise.

    Returns:
        What was seen of each row.
    """
    check_real("min_duration_in_s", min_duration_in_s, 0.0)
    return [
        # Streamed rows of `load_set` have numbers only within their shards.
        examine_row({"row": number} | row, data_root, min_duration_in_s)
        for number, row in enumerate(logging.tqdm(rows, desc="Checking", unit=" rows"))
    ]


def list_problems(examined: Iterable[ExaminedRow]) -> list[tuple[int, str]]:
    """Finds which rows repeat others, and lists all problems.

    Args:
        examined: of `examine_rows`, in any order.

    Returns:
        Row number and message of each problem, by row number.
    """
    problems, first_rows = [], {}
    for row in sorted(examined, key=lambda row: row.number):
        problems += [(row.number, text) for text in row.problems]
        if row.digest is not None and first_rows.setdefault(row.digest, row.number) != row.number:
            problems.append((row.number, f"repeats row {first_rows[row.digest]}"))
    return problems


def examine_row(row: dict, data_root: PathLike, min_duration_in_s: float) -> ExaminedRow:
    """Reads the files of one row.

    Args:
        row: of `load_rows` or `load_set`; these are the arguments of `check_rows`.
        data_root: likewise.
        min_duration_in_s: likewise.

    Returns:
        What was seen of it.
    """
    if row["problem"]:
        return ExaminedRow(row["row"], [row["problem"]], None)
    digest = hashlib.sha256(row["caption"].encode())
    try:
        digest.update(open_image(locate(row["image"], data_root)).tobytes())
        path = locate(row["audio"], data_root)
        waveform, sampling_rate = load_audio(path, row["start"] or 0.0, row["duration"])
        digest.update(waveform.numpy())
    except ValueError as error:
        return ExaminedRow(row["row"], [str(error)], None)
    problems = []
    if waveform.shape[-1] < min_duration_in_s * sampling_rate:
        problems.append(f"{str(path)!r} is too short: {waveform.shape[-1] / sampling_rate:.2f} s")
    if is_silent(waveform):
        cancelling = "" if all(map(is_silent, waveform.unsqueeze(1))) else CANCELLING
        problems.append(f"{str(path)!r} is silent{cancelling}")
    return ExaminedRow(row["row"], problems, digest.digest())


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
        row: from `load_rows` or `load_set`; streamed ones of the latter get their `row` from `TripletStream`.
        data_root: the folder that all files must lie in, or `set_root` of a set.
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
        `captions`, `indices` (row number) and `image_files` (the picture's path, or its encoded bytes where it lies
        inside of the set), named as in the batch that `collate_triplets` makes of them.

    Raises:
        TypeError: if a number has the wrong type.
        ValueError: if a number is out of range, or the row cannot be read, naming its number.
    """
    check_integer("seed", seed, 0)
    check_integer("epoch", epoch, 0)
    check_positive("audio_length_in_s", audio_length_in_s)
    check_sampling_rate(sampling_rate)
    key = np.random.SeedSequence([seed, epoch, row["row"]]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(key[0]))
    try:
        if row["problem"]:
            raise ValueError(row["problem"])
        image_file, audio_file = (locate(row[column], data_root) for column in ("image", "audio"))
        stretch = (row["start"] or 0.0, row["duration"], audio_length_in_s)
        waveform = load_random_crop(audio_file, *stretch, generator, sampling_rate)
        image = open_image(image_file) if prepare_image else None
    except ValueError as error:
        raise ValueError(f"Row {row['row']}: {error}") from error
    image_file = image_file.content if isinstance(image_file, EmbeddedFile) else str(image_file)
    sample = {"waveforms": waveform, "captions": row["caption"], "indices": row["row"], "image_files": image_file}
    if prepare_image:
        sample["pixel_values"] = prepare_image(image, generator=generator if random_image_crops else None)
    return sample


def collate_triplets(samples: list[dict]) -> dict:
    """Makes a batch of samples; what was added to some of them only is left out.

    Args:
        samples: of `read_triplet`.

    Returns:
        Their values by name, tensors stacked: `[B, ...]`.
    """
    shared = set.intersection(*map(set, samples))
    return default_collate([{name: sample[name] for name in sample if name in shared} for sample in samples])


class ImageFiles(Sequence):
    """The pictures of a set, each looked up when it is asked for: its path, or its bytes where it lies inside the set.

    Args:
        rows: of `load_rows` or `load_set`.
        data_root: as for `read_triplet`.
    """

    def __init__(self, rows: Sequence[dict], data_root: PathLike) -> None:
        self.rows, self.data_root = rows.select_columns("image"), data_root

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> str | bytes:
        file = locate(self.rows[index]["image"], self.data_root)
        return file.content if isinstance(file, EmbeddedFile) else str(file)


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


def push_triplets(
    rows: Iterable[dict],
    repo_id: str,
    data_root: PathLike,
    split: str = "train",
    config_name: str = "default",
    max_shard_size: str = "500MB",
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Publishes triplets as a set on the Hub: Parquet with `Image` and `Audio` features, which `load_set` reads.

    Every row is looked up before anything is sent. A clip with `start` or `duration` is cut out, as FLAC of 16 bits;
    all other files are published as they are.

    Args:
        rows: of `load_rows` or `load_set`.
        repo_id: such as `"user/set"`; made if it does not exist.
        data_root: the folder that all files must lie in, or `set_root` of a set.
        split: of the set; others that are there stay.
        config_name: of the set, where it has several.
        max_shard_size: about the size of each file.
        private: whether a new repository is; `None` leaves it to the Hub.
        token: of the Hub; `None` takes the one of `hf auth login`.

    Returns:
        The address of the commit.

    Raises:
        ImportError: if `datasets` is not installed.
        ValueError: if a row has a problem, naming it, or there are no rows.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Publishing a set of triplets needs `datasets`: pip install datasets") from error
    rows = logging.tqdm(rows, desc="Looking up", unit=" rows")
    records = [_published_record({"row": number} | row, data_root) for number, row in enumerate(rows)]
    if not records:
        raise ValueError("`rows` holds no rows: there is nothing to publish.")
    # Of a list `datasets` takes the columns of the first row alone.
    names = [name for name in COLUMNS if any(name in record for record in records)]
    published = datasets.Dataset.from_dict({name: [record.get(name) for record in records] for name in names})
    published = published.cast_column("image", datasets.Image()).cast_column("audio", datasets.Audio())
    options = {"config_name": config_name, "split": split, "max_shard_size": max_shard_size, "private": private}
    return published.push_to_hub(repo_id, token=token, **options).commit_url


def _published_record(row: dict, data_root: PathLike) -> dict:
    """Gives a row of `load_rows` as `push_triplets` publishes it; a `ValueError` names a row with a problem."""
    try:
        if missing := [name for name in (*COLUMNS, "problem") if name not in row]:
            raise ValueError(f"{', '.join(missing)} missing: pass the rows of `load_rows` or `load_set`.")
        if row["problem"]:
            raise ValueError(row["problem"])
        image, audio = (locate(row[column], data_root) for column in ("image", "audio"))
        if row["start"] or row["duration"]:
            audio = _cut_out(audio, row["start"] or 0.0, row["duration"])
    except ValueError as error:
        raise ValueError(f"Row {row['row']}: {error}") from error
    record = {"image": _embeddable(image), "audio": _embeddable(audio), "caption": row["caption"]}
    return record | {column: row[column] for column in ("genre", "split") if row[column] is not None}


def _cut_out(path: Path | EmbeddedFile, start: float, duration: float | None) -> EmbeddedFile:
    """Cuts a stretch, in seconds, out of a sound file, as FLAC of 16 bits."""
    waveform, sampling_rate = load_audio(path, start, duration)
    # Float files and decoded mp3 may go beyond full scale, where 16 bits end; training scales to the peak anyway.
    waveform = waveform / waveform.abs().amax().clamp(min=1)
    file = BytesIO()
    soundfile.write(file, waveform.T.numpy(), sampling_rate, format="FLAC", subtype="PCM_16")
    return EmbeddedFile(file.getvalue(), f"{Path(str(path)).stem}-{start:g}.flac")


def _embeddable(file: Path | EmbeddedFile) -> dict:
    """Gives a file as `datasets` stores it: a path is read when it is published."""
    if isinstance(file, EmbeddedFile):
        return {"bytes": file.content, "path": Path(file.name).name}
    return {"bytes": None, "path": str(file)}


def export_triplets(rows: Iterable[dict], folder: PathLike, data_root: PathLike) -> Path:
    """Writes a set as files: its pictures and clips, named by their content, and `triplets.jsonl`.

    What is there already is not written again.

    Args:
        rows: of `load_set`.
        folder: is made.
        data_root: `set_root` of the set.

    Returns:
        The path of `triplets.jsonl`, which `load_rows` reads; its rows have the numbers that they have in the set.

    Raises:
        ValueError: if a file is missing, naming its row.
    """
    folder, lines = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(logging.tqdm(rows, desc="Writing files", unit=" rows")):
        try:
            files = {column: export_file(locate(row[column], data_root), folder) for column in ("image", "audio")}
        except ValueError as error:
            raise ValueError(f"Row {row.get('row', number)}: {error}") from error
        kept = {name: row[name] for name in ("caption", "start", "duration", "genre", "split")}
        lines.append(json.dumps({name: value for name, value in (kept | files).items() if value is not None}) + "\n")
    with atomic_write(folder / "triplets.jsonl") as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    return folder / "triplets.jsonl"


def export_file(file: Path | EmbeddedFile, folder: Path) -> str:
    """Writes `file`, of `locate`, into `folder` under a name made of its content.

    Returns:
        The name.
    """
    content = file.content if isinstance(file, EmbeddedFile) else file.read_bytes()
    suffix = Path(str(file)).suffix or (".m4a" if content[4:8] == b"ftyp" else "")
    name = hashlib.sha256(content).hexdigest()[:32] + suffix.lower()
    if not (folder / name).is_file():
        with atomic_write(folder / name) as temporary:
            temporary.write_bytes(content)
    return name

"""The triplets of `train_melfusion.py`: opened, checked, given out in batches that any number of processes share."""

import argparse
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from torch.utils.data import DataLoader, Sampler

from melfusion_pipeline.caches import PreparedInputs
from melfusion_pipeline.data import (
    COLUMNS,
    TripletDataset,
    collate_triplets,
    examine_rows,
    format_problems,
    list_problems,
    load_rows,
    load_set,
    read_triplet,
    select_good_rows,
    set_root,
)
from melfusion_pipeline.files_melfusion import atomic_write
from melfusion_pipeline.pictures_melfusion import prepare_image
from melfusion_pipeline.streams import TripletStream


@dataclass
class Position:
    """Where training stands; saved in each checkpoint. `lanes` are where a stream stands."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    lanes: dict[int, dict] = field(default_factory=dict)

    def state_dict(self) -> dict:
        """Called by `accelerator.save_state` on every process; the main one's is written, with the lanes of all."""
        lanes = {number: lane for lanes in gather_object([self.lanes]) for number, lane in lanes.items()}
        return vars(self) | {"lanes": lanes}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


class GlobalBatches(Sampler[list[int]]):
    """This process's share of shuffled batches; what a step trains on does not depend on the number of processes."""

    def __init__(self, num_rows: int, batch_size: int, process_index: int, num_processes: int, seed: int) -> None:
        self.num_rows, self.seed, self.position = num_rows, seed, Position()
        self.global_batch_size = batch_size * num_processes
        self.own = slice(process_index * batch_size, (process_index + 1) * batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.position.epoch)
        order = torch.randperm(self.num_rows, generator=generator).tolist()
        first = self.position.batch
        for batch in range(first, self.num_rows // self.global_batch_size):
            yield order[batch * self.global_batch_size : (batch + 1) * self.global_batch_size][self.own]


def is_in_split(row_split: str | None, split: str) -> bool:
    """A function, because spawned workers cannot be sent a lambda."""
    return row_split == split


def load_checked_rows(
    path: str, split: str | None, args: argparse.Namespace, accelerator: Accelerator
) -> tuple[Iterable[dict], list[tuple[int, str]]]:
    """Opens a set, of which the processes read every row once, and gives it with what they found wrong."""
    columns = {column: getattr(args, f"{column}_column") for column in COLUMNS}
    if path == args.dataset_name:
        # A set to validate on is small and read again and again; a check reads all of it.
        streaming = args.streaming and split is None and not args.check_data
        with accelerator.main_process_first():
            rows = load_set(path, args.dataset_config_name, split or args.dataset_split, columns, streaming)
        if streaming:
            # To check it all would be to download it twice: what is wrong is found when it is met.
            return rows, []
        split = None
    else:
        rows = load_rows(path, columns, streaming=args.streaming)
    if split is not None:
        rows = rows.filter(functools.partial(is_in_split, split=split), input_columns="split")
        if next(iter(rows), None) is None:
            raise ValueError(f"{path} holds no row of the split {split!r}.")
    return rows, check_together(rows, data_root(path, args), args.output_dir, accelerator)


def load_good_rows(path: str, split: str | None, args: argparse.Namespace, accelerator: Accelerator) -> Iterable[dict]:
    """Opens a set without the rows that have problems, which `--skip_bad_rows` must allow."""
    return select_good_rows(*load_checked_rows(path, split, args, accelerator), args.skip_bad_rows)


def check_sets(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Prints what is wrong with the set to train on and the one to validate on.

    Raises:
        SystemExit: With the status 1 on all processes, if something is.
    """
    sets, found = [(args.train_data, args.train_split), (args.validation_data, args.validation_split)], False
    for path, split in sets if args.validation_data else sets[:1]:
        _, problems = load_checked_rows(path, split, args, accelerator)
        accelerator.print(f"{path}:\n{format_problems(problems)}" if problems else f"{path}: no problems")
        found = found or bool(problems)
    if found:
        raise SystemExit(1)


def check_together(
    rows: Iterable[dict], root: str, output_dir: Path, accelerator: Accelerator
) -> list[tuple[int, str]]:
    """Checks a set, each process a share; what was found is kept beside the checkpoints until the set changes."""
    kept, problems = None, [None]
    if accelerator.is_main_process:
        kept = output_dir / f".checked-{digest_rows(rows, root)}.json"
        problems = [json.loads(kept.read_text()) if kept.is_file() else None]
    broadcast_object_list(problems)
    if problems[0] is None:
        first, step = accelerator.process_index, accelerator.num_processes
        # A stream has no length to show progress by.
        sized = hasattr(rows, "__len__")
        own = rows.select(range(first, len(rows), step)) if sized else islice(rows, first, None, step)
        problems = [list_problems(gather_object(examine_rows(own, root)))]
        if accelerator.is_main_process:
            with atomic_write(kept) as temporary:
                temporary.write_text(json.dumps(problems[0]))
    return [(number, text) for number, text in problems[0]]


def digest_rows(rows: Iterable[dict], root: str) -> str:
    """Digests a set: its fields, what lies in it, and of files their size and when they were changed."""
    digest = hashlib.sha256(str(root).encode())
    if cached := [file["filename"] for file in getattr(rows, "cache_files", ())]:
        # What lies in a set lies in these files of `datasets`: their stamps are as good, and need no reading.
        digest.update(b"".join(digest_file(file, root) for file in cached))
        rows = rows.flatten().remove_columns(["image.bytes", "audio.bytes"])
    for row in rows:
        files = [row.pop(name) for name in list(row) if name.partition(".")[0] in ("image", "audio")]
        digest.update(repr(row).encode("utf-8", "surrogatepass"))
        digest.update(b"".join(digest_file(file, root) for file in files))
    return digest.hexdigest()[:16]


def digest_file(file: str | dict | None, root: str) -> bytes:
    embedded = file["bytes"] if isinstance(file, dict) else None
    path = (file["path"] if isinstance(file, dict) else file) or ""
    try:
        stamps = None if embedded else os.stat(os.path.join(root, path))
        text = f"{path} {stamps.st_size} {stamps.st_mtime_ns}" if stamps else path
    except (OSError, ValueError):
        text = path
    return hashlib.sha256(text.encode("utf-8", "surrogatepass") + (embedded or b"")).digest()


def data_root(path: str, args: argparse.Namespace) -> str:
    if args.data_root:
        return args.data_root
    return set_root(path) if path == args.dataset_name else os.path.dirname(os.path.abspath(path))


def reader(path: str, args: argparse.Namespace):
    """Gives the function that reads one row of a set."""
    prepare = functools.partial(prepare_image, image_size=args.resolution)
    return functools.partial(
        read_triplet,
        data_root=data_root(path, args),
        prepare_image=prepare if args.image_latents == "noising" else None,
        audio_length_in_s=args.audio_length_in_s,
        random_image_crops=args.random_image_crops,
        seed=args.seed,
        sampling_rate=args.sampling_rate,
    )


def read_sample(row: dict, read: Callable[..., dict], prepare: PreparedInputs, **arguments) -> dict:
    """Reads and prepares a row; a function, because spawned workers cannot be sent a lambda."""
    return prepare(read(row, **arguments))


def loading(args: argparse.Namespace, accelerator: Accelerator) -> dict:
    """How a `DataLoader` is to load: by workers, into memory that a GPU reads while it computes."""
    num_workers = args.dataloader_num_workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if num_workers is None:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        num_workers = min(max(cores // processes - 1, 0), 8)
    elif num_workers > cores:
        accelerator.print(f"--dataloader_num_workers {num_workers}: there are {cores} cores, so as many load.")
        num_workers = cores
    return {"num_workers": num_workers, "pin_memory": accelerator.device.type == "cuda"}


def make_loader(
    rows: Iterable[dict], args: argparse.Namespace, accelerator: Accelerator, prepare: PreparedInputs
) -> DataLoader:
    read = functools.partial(read_sample, read=reader(args.train_data, args), prepare=prepare)
    share = (args.train_batch_size, accelerator.process_index, accelerator.num_processes)
    if args.streaming:
        skips = {"skip_bad_rows": args.skip_bad_rows and args.train_data == args.dataset_name}
        sizes = {"seed": args.seed, "buffer_size": args.shuffle_buffer_size}
        stream = TripletStream(rows, read, *share, **sizes, **skips)
        return DataLoader(stream, batch_size=None, **loading(args, accelerator))
    batches = GlobalBatches(len(rows), *share, args.seed)
    if len(rows) < batches.global_batch_size:
        raise ValueError(
            f"--train_data has {len(rows)} usable rows, fewer than one batch over all devices"
            f" ({batches.global_batch_size}): lower --train_batch_size."
        )
    options = {"batch_sampler": batches, "collate_fn": collate_triplets}
    return DataLoader(TripletDataset(rows, read), **options, **loading(args, accelerator))


def endless_batches(loader: DataLoader, position: Position, device: torch.device) -> Iterator[dict]:
    """Yields batches on `device`, from where `position` stands, and moves it on; a stream counts no epochs."""
    if isinstance(loader.dataset, TripletStream):
        loader.dataset.go_on(position.batch, position.lanes)
    while True:
        if not isinstance(loader.dataset, TripletStream):
            loader.dataset.set_epoch(position.epoch)
            loader.batch_sampler.position = Position(position.step, position.epoch, position.batch)
        for batch in loader:
            position.batch += 1
            position.lanes = position.lanes | batch.pop("lanes", {})
            yield send_to_device(batch, device, non_blocking=True)
        position.epoch, position.batch = position.epoch + 1, 0

"""Streams of triplets: rows that are read while training, by any number of processes and workers, and gone on with.

A stream's shards are parted into lanes, each read by whoever needs it, again and again. A batch takes its rows from
fixed lanes, whoever makes it, so that training does not depend on the number of processes and workers.
"""

import math
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import TYPE_CHECKING

import torch
from diffusers.utils import logging
from torch.utils.data import IterableDataset, get_worker_info

from .arguments_melfusion import check_integer
from .data import collate_triplets

if TYPE_CHECKING:
    import datasets

logger = logging.get_logger(__name__)

# Batches that follow one another come from so many different lanes at most: workers share them.
MAX_GROUPS = 8


class Lane:
    """A share of a stream's shards, read again and again, each time in another order.

    Rows are shuffled in blocks: where a stream goes on, one block is read again, and what follows is the same.

    Args:
        rows: of `load_rows` or `load_set` with `streaming=True`.
        shards: the numbers of the shards.
        seed: of all orders; `None` leaves rows and shards in theirs.
        block_size: how many rows are shuffled.
        state: where to go on: an earlier `state`.
    """

    def __init__(
        self,
        rows: "datasets.IterableDataset",
        shards: list[int],
        seed: int | None,
        block_size: int,
        state: dict | None = None,
    ) -> None:
        self.rows, self.shards, self.seed, self.block_size = rows, shards, seed, block_size
        self.state = state or {"epoch": 0, "shard": 0, "stream": None, "block": 0, "taken": 0}

    def __iter__(self) -> Iterator[tuple[dict, int]]:
        """Yields rows and their epochs, and keeps `state`."""
        while True:
            num_blocks = self.state["block"]
            yield from self._epoch()
            if self.state["block"] == num_blocks == 0:
                raise ValueError(f"The shards {self.shards} of the set hold no rows: leave them out.")
            self.state = {"epoch": self.state["epoch"] + 1, "shard": 0, "stream": None, "block": 0, "taken": 0}

    def _epoch(self) -> Iterator[tuple[dict, int]]:
        epoch, start = self.state["epoch"], self.state
        position = {"shard": start["shard"], "stream": start["stream"]}
        rows = self._rows(position, self._order(len(self.shards), epoch, -1))
        while block := list(islice(rows, self.block_size)):
            order = self._order(len(block), epoch, start["block"])
            for taken in range(start["taken"], len(block)):
                self.state = start | {"taken": taken + 1}
                yield block[order[taken]], epoch
            stream = position.pop("iterated").state_dict()
            start = position | {"epoch": epoch, "stream": stream, "block": start["block"] + 1, "taken": 0}
            self.state = start

    def _rows(self, position: dict, order: list[int]) -> Iterator[dict]:
        """Yields the rows of one epoch from `position` on, which is kept."""
        num_shards = self.rows.num_shards
        for index in range(position["shard"], len(order)):
            shard = self.shards[order[index]]
            stream = self.rows.shard(num_shards, shard)
            if index == position["shard"] and position["stream"] is not None:
                stream.load_state_dict(position["stream"])
            # `iter` of `datasets` gives every row to whoever asks; `__iter__` would part them among workers itself.
            for values in stream.iter(batch_size=1):
                row = {name: value[0] for name, value in values.items()}
                if "shard_row" in row:
                    row["row"] = row.pop("shard_row") * num_shards + shard
                position |= {"shard": index, "iterated": stream}
                yield row

    def _order(self, length: int, epoch: int, block: int) -> list[int]:
        if self.seed is None:
            return list(range(length))
        # A single block has the order that the set has where it is not streamed. The others differ in high bits.
        key = self.seed + epoch + ((block + 1) << 40 if block else 0) + (self.shards[0] << 20)
        return torch.randperm(length, generator=torch.Generator().manual_seed(key)).tolist()


class TripletStream(IterableDataset):
    """Endless stream of whole batches of triplets, for a `DataLoader` with `batch_size=None`.

    Processes share the rows of a batch, workers share the batches. Where the set has enough shards (a multiple of
    processes times workers, at best), each reads only its own; where it has not, each reads more and decodes its own.
    A batch holds, beside what `read_triplet` gives, the states of its `lanes`: take them out and keep the newest of
    each for `go_on`.

    Args:
        rows: of `load_rows` or `load_set` with `streaming=True`, not shuffled.
        read: `read_triplet` with its arguments bound by `functools.partial`.
        batch_size: of each process.
        process_index: the number of this process, from 0.
        num_processes: how many share the set.
        seed: of the order; `None` leaves the rows in theirs.
        buffer_size: how many rows are shuffled at a time, over all lanes.
        skip_bad_rows: whether a row that cannot be read is reported and replaced by another one of its batch.

    Raises:
        TypeError: if a number is none.
        ValueError: if it is out of range.
    """

    def __init__(
        self,
        rows: "datasets.IterableDataset",
        read: Callable[..., dict],
        batch_size: int,
        process_index: int = 0,
        num_processes: int = 1,
        seed: int | None = None,
        buffer_size: int = 1000,
        skip_bad_rows: bool = False,
    ) -> None:
        check_integer("batch_size", batch_size, 1)
        check_integer("num_processes", num_processes, 1)
        check_integer("process_index", process_index, 0, num_processes - 1)
        check_integer("buffer_size", buffer_size, 1)
        if seed is not None:
            check_integer("seed", seed, 0)
        self.rows, self.read, self.seed, self.skip_bad_rows = rows, read, seed, skip_bad_rows
        shared_batch_size = batch_size * num_processes
        self.lanes_per_batch = _widest(shared_batch_size, 1, rows.num_shards)
        self.num_groups = _widest(MAX_GROUPS, self.lanes_per_batch, rows.num_shards)
        self.num_lanes = self.lanes_per_batch * self.num_groups
        self.rows_per_lane = shared_batch_size // self.lanes_per_batch
        self.block_size = max(1, buffer_size // self.num_lanes)
        first, last = process_index * batch_size, (process_index + 1) * batch_size - 1
        self.own_lanes = range(first // self.rows_per_lane, last // self.rows_per_lane + 1)
        skipped = self.own_lanes.start * self.rows_per_lane
        self.own_rows = slice(first - skipped, last - skipped + 1)
        self.layout = [rows.num_shards, self.num_lanes, self.block_size, seed]
        self.go_on(0, {})

    def go_on(self, batch: int, states: dict[int, dict]) -> None:
        """Begins with the batch of the number `batch`; `states` are the newest of each lane in those before it.

        Raises:
            ValueError: If they are of a stream whose shards, lanes, blocks or seed are others.
        """
        if layouts := [state["layout"] for state in states.values() if state["layout"] != self.layout]:
            raise ValueError(
                f"The stream was left with shards, lanes, rows of a block and seed {layouts[0]}, now {self.layout}:"
                " give the same set, total batch size, shuffle buffer and seed as before, or begin anew."
            )
        self.first_batch, self.states = batch, states

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        number, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        lanes = {}
        for batch in count(self.first_batch):
            group = batch % self.num_groups
            # Of a group in which a worker has no batch it need not read a row.
            if (self.first_batch + number - group) % math.gcd(self.num_groups, num_workers):
                continue
            own = [group * self.lanes_per_batch + lane for lane in self.own_lanes]
            lanes |= {lane: self._open(lane) for lane in own if lane not in lanes}
            rows = [next(lanes[lane][1]) for lane in own for _ in range(self.rows_per_lane)]
            if (batch - self.first_batch) % num_workers == number:
                samples = self._read(rows[self.own_rows])
                states = {lane: lanes[lane][0].state | {"layout": self.layout} for lane in own}
                yield collate_triplets(samples) | {"lanes": states}

    def _open(self, number: int) -> tuple[Lane, Iterator]:
        shards = list(range(number, self.rows.num_shards, self.num_lanes))
        lane = Lane(self.rows, shards, self.seed, self.block_size, self.states.get(number))
        return lane, iter(lane)

    def _read(self, rows: list[tuple[dict, int]]) -> list[dict]:
        samples = []
        for row, epoch in rows:
            try:
                samples.append(self.read(row, epoch=epoch))
            except ValueError as error:
                if not self.skip_bad_rows:
                    raise
                logger.warning(f"{error}; another row takes its place (`skip_bad_rows`).")
                samples.append(None)
        good = [sample for sample in samples if sample is not None]
        if not good:
            raise ValueError(f"No row of a batch can be read: rows {[row['row'] for row, _ in rows]}.")
        return [good[index % len(good)] if sample is None else sample for index, sample in enumerate(samples)]


def _widest(most: int, factor: int, num_shards: int) -> int:
    """Returns the largest divisor of `most` by which, times `factor`, the shards can be parted about evenly."""
    sizes = [size for size in range(1, most + 1) if most % size == 0]
    even = [size for size in sizes if num_shards % (size * factor) == 0 or num_shards >= 8 * size * factor]
    return max(even, default=1)

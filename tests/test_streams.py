"""Streams: shared by processes and workers, shuffled, and gone on with where they were left."""

import json
import pickle
import time
from itertools import islice

import datasets
import pytest
import torch
from torch.utils.data import DataLoader

from melfusion_pipeline.data import load_rows, load_set
from melfusion_pipeline.streams import Lane, TripletStream, _widest


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def write_set(folder, num_rows: int, rows_per_group: int, num_files: int = 1) -> str:
    """A set of Parquet whose pictures and clips are numbers: what is tested here does not look at them."""
    folder.mkdir()
    for file in range(num_files):
        rows = range(file * num_rows // num_files, (file + 1) * num_rows // num_files)
        columns = {"image": [b"%d" % row for row in rows], "audio": [b"-"] * len(rows)}
        table = datasets.Dataset.from_dict(columns | {"caption": [f"row {row}" for row in rows]})
        table.to_parquet(folder / f"train-{file:05d}.parquet", batch_size=rows_per_group)
    return str(folder)


def read(row: dict, epoch: int) -> dict:
    return {"indices": row["row"], "captions": row["caption"], "epochs": epoch}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """240 rows in sixteen shards: four files of four row groups."""
    name = write_set(tmp_path_factory.mktemp("sets") / "set", 240, 15, num_files=4)
    rows = load_set(name, streaming=True)
    assert rows.num_shards == 16
    return rows


def drawn(batches) -> list[list[str]]:
    return [batch["captions"] for batch in batches]


def test_an_epoch_gives_every_row_once_and_the_next_in_another_order(rows):
    stream = TripletStream(rows, read, 8, seed=1, buffer_size=64)
    assert stream.num_lanes == 16 and stream.block_size == 4
    batches = list(islice(stream, 60))
    for part in (batches[:30], batches[30:]):
        assert sorted(caption for batch in part for caption in batch["captions"]) == sorted(
            f"row {row}" for row in range(240)
        )
    assert drawn(batches[:30]) != drawn(batches[30:])
    assert [set(batch["epochs"].tolist()) for batch in (batches[0], batches[-1])] == [{0}, {1}]
    numbers = {caption: index for batch in batches for caption, index in zip(batch["captions"], batch["indices"])}
    assert len(set(map(int, numbers.values()))) == 240
    assert drawn(islice(TripletStream(rows, read, 8, seed=2, buffer_size=64), 5)) != drawn(batches[:5])
    unshuffled = drawn(islice(TripletStream(rows, read, 8), 1))
    assert unshuffled == [[f"row {15 * shard}" for shard in range(8)]]


@pytest.mark.parametrize("num_processes", [1, 2, 3, 4])
def test_batches_do_not_depend_on_processes_and_workers(rows, num_processes):
    expected = drawn(islice(TripletStream(rows, read, 12, seed=1, buffer_size=64), 40))
    shares = []
    for process in range(num_processes):
        stream = TripletStream(rows, read, 12 // num_processes, process, num_processes, seed=1, buffer_size=64)
        for num_workers in (0, 2) if num_processes == 2 else (0,):
            found = drawn(islice(DataLoader(stream, batch_size=None, num_workers=num_workers), 40))
            assert shares[process : process + 1] in ([], [found])
            shares[process:] = [found]
    assert [sum(parts, []) for parts in zip(*shares)] == expected


def test_processes_and_workers_read_only_their_own_shards(rows):
    """Sixteen shards, two processes, two workers: a quarter of the shards each."""
    opened = set()

    def watched(lanes: set):
        class Watched(TripletStream):
            def _open(self, number):
                lanes.add(number)
                return super()._open(number)

        return Watched

    for process in range(2):
        own = set()
        stream = watched(own)(rows, read, 4, process, 2, seed=1)
        list(islice(stream, 40))
        assert len(own) == 8 and not own & opened
        opened |= own
    stream = TripletStream(rows, read, 8, seed=1)
    worker_states = [batch["lanes"] for batch in islice(DataLoader(stream, batch_size=None, num_workers=2), 8)]
    lanes = [set(states) for states in worker_states]
    assert not set().union(*lanes[::2]) & set().union(*lanes[1::2])


# Of more workers than there are cores torch warns; here they are to be several, not fast.
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    "stop, num_workers", [(1, (0, 0)), (29, (0, 0)), (30, (0, 0)), (31, (0, 0)), (47, (2, 0)), (7, (0, 3))]
)
def test_a_stream_goes_on_where_it_was_left_with_any_number_of_workers(rows, stop, num_workers):
    expected = drawn(islice(TripletStream(rows, read, 8, seed=1, buffer_size=64), stop + 40))
    stream = TripletStream(rows, read, 8, seed=1, buffer_size=64)
    lanes = {}
    before = []
    for batch in islice(DataLoader(stream, batch_size=None, num_workers=num_workers[0]), stop):
        lanes |= batch["lanes"]
        before.append(batch["captions"])
    lanes = pickle.loads(pickle.dumps(lanes))
    again = TripletStream(rows, read, 8, seed=1, buffer_size=64)
    again.go_on(stop, lanes)
    after = drawn(islice(DataLoader(again, batch_size=None, num_workers=num_workers[1]), 40))
    assert before + after == expected


def test_a_stream_of_another_layout_is_not_gone_on_with(rows):
    lanes = next(iter(TripletStream(rows, read, 8, seed=1, buffer_size=64)))["lanes"]
    # Two processes that share the same batch go on with what one began.
    TripletStream(rows, read, 4, 1, 2, seed=1, buffer_size=64).go_on(1, lanes)
    for other in ({"buffer_size": 32}, {"seed": 2}, {"batch_size": 1}):
        stream = TripletStream(rows, read, **{"batch_size": 8, "seed": 1, "buffer_size": 64} | other)
        with pytest.raises(ValueError, match="The stream was left with .*same set, total batch size"):
            stream.go_on(1, lanes)


def test_a_set_that_fits_the_buffer_is_shuffled_as_one_that_is_not_streamed(tmp_path):
    lines = [json.dumps({"image": "x.png", "audio": "x.wav", "caption": f"row {row}"}) for row in range(50)]
    (tmp_path / "set.jsonl").write_text("\n".join(lines))
    streamed = load_rows(tmp_path / "set.jsonl", streaming=True)
    batches = list(islice(TripletStream(streamed, read, 5, seed=3), 20))
    for epoch in range(2):
        order = torch.randperm(50, generator=torch.Generator().manual_seed(3 + epoch)).tolist()
        found = torch.cat([batch["indices"] for batch in batches[10 * epoch : 10 * epoch + 10]]).tolist()
        assert found == order


def test_lanes_are_about_equal():
    assert [_widest(8, 1, shards) for shards in (1, 2, 3, 4, 7, 8, 12, 37, 64)] == [1, 2, 1, 4, 1, 8, 4, 4, 8]
    assert _widest(8, 4, 16) == 4 and _widest(6, 1, 9) == 3 and _widest(4, 1, 9) == 1


def test_filtered_streams_and_empty_ones(rows):
    few = rows.filter(lambda row: row["caption"] in ("row 3", "row 5"))
    stream = TripletStream(few.filter(lambda row: False), read, 1)
    with pytest.raises(ValueError, match="hold no rows"):
        next(iter(stream))


def seconds_to_go_on(rows, state: dict) -> float:
    """How long the first row takes a lane of all shards that goes on from `state`."""
    begin = time.perf_counter()
    next(iter(Lane(rows, list(range(rows.num_shards)), 1, 100, state)))
    return time.perf_counter() - begin


@pytest.mark.slow
@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_the_time_to_go_on_does_not_grow_with_the_position(tmp_path, form):
    if form == "parquet":
        rows = load_set(write_set(tmp_path / "set", 110_000, 1000), streaming=True)
    else:
        lines = (json.dumps({"image": "x", "audio": "x", "caption": f"row {row}"}) + "\n" for row in range(110_000))
        with open(tmp_path / "set.jsonl", "w") as file:
            file.writelines(lines)
        rows = load_rows(tmp_path / "set.jsonl", streaming=True)
    lane = Lane(rows, list(range(rows.num_shards)), 1, 100)
    states = {}
    for number, _ in enumerate(islice(lane, 100_500), start=1):
        if number in (1_500, 100_500):
            states[number] = lane.state
    early, late = (min(seconds_to_go_on(rows, state) for _ in range(5)) for state in states.values())
    print(f"{form}: {early:.3f} s after 1,500 rows, {late:.3f} s after 100,500")
    assert late < 2 * early + 0.05

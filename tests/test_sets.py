"""Sets as `datasets` reads them: every form gives the same triplets, what is wrong is named."""

import functools
import json
from io import BytesIO
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader, default_collate
from triplet_forms import FORMS, write_forms

from melfusion_pipeline.data import (
    TripletDataset,
    check_rows,
    export_triplets,
    load_rows,
    load_set,
    locate,
    push_triplets,
    read_triplet,
    select_good_rows,
    set_root,
)
from melfusion_pipeline.pictures_melfusion import prepare_image
from melfusion_pipeline.streams import TripletStream

NUM_ROWS = 24


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """What `datasets` keeps lies in a folder of the tests."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def forms(tmp_path_factory) -> dict[str, dict]:
    return write_forms(tmp_path_factory.mktemp("forms") / "sets", NUM_ROWS)


def open_form(arguments: dict, streaming: bool = False):
    return (load_rows if "path" in arguments else load_set)(**arguments, streaming=streaming)


def root_of(arguments: dict) -> str:
    return str(arguments["path"].parent) if "path" in arguments else set_root(arguments["name"])


def reader(data_root: str, **arguments) -> functools.partial:
    prepare = functools.partial(prepare_image, image_size=16)
    return functools.partial(
        read_triplet, data_root=data_root, prepare_image=prepare, audio_length_in_s=0.64, **arguments
    )


def assert_equal_batches(batches: list[dict], expected: list[dict]) -> None:
    assert len(batches) == len(expected) > 0
    for one, other in zip(batches, expected):
        assert one["captions"] == other["captions"]
        for key in ("pixel_values", "waveforms", "indices"):
            assert torch.equal(one[key], other[key]), key


def content(image_file: str | bytes) -> bytes:
    return image_file if isinstance(image_file, bytes) else Path(image_file).read_bytes()


def in_order(rows, read, seed: int, batch_size: int, epoch: int = 0) -> list[dict]:
    """The batches of an epoch as `train_melfusion.py` makes them of a set that is not streamed."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed + epoch)).tolist()
    parts = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    return [default_collate([read(rows[index], epoch=epoch) for index in part]) for part in parts]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_batches_streamed_and_not(forms, form):
    first, arguments = forms["jsonl"], forms[form]
    expected = in_order(open_form(first), reader(root_of(first)), 7, 4)
    read = reader(root_of(arguments))
    rows = open_form(arguments)
    assert check_rows(rows, root_of(arguments)) == []
    found = in_order(rows, read, 7, 4)
    assert_equal_batches(found, expected)
    pictures = [[content(file) for file in batch["image_files"]] for batch in (found[0], expected[0])]
    assert pictures[0] == pictures[1]
    stream = TripletStream(open_form(arguments, streaming=True), read, 4, seed=7)
    assert_equal_batches(list(islice(stream, 6)), expected)


@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_workers_share_a_stream(forms, form):
    arguments = forms[form]
    stream = TripletStream(open_form(arguments, streaming=True), reader(root_of(arguments)), 4, seed=7)
    expected = list(islice(stream, 5))
    loader = DataLoader(stream, batch_size=None, num_workers=2)
    assert_equal_batches(list(islice(loader, 5)), expected)


def test_a_row_that_is_skipped_keeps_the_numbers_of_the_others(forms):
    rows = open_form(forms["parquet"])
    good = select_good_rows(rows, [(3, "bad")], skip_bad_rows=True)
    assert [row["row"] for row in good] == [number for number in range(NUM_ROWS) if number != 3]
    batch = next(iter(DataLoader(TripletDataset(good, reader(root_of(forms["parquet"]))), batch_size=5)))
    assert batch["indices"].tolist() == [0, 1, 2, 4, 5]


def test_what_is_pushed_is_what_was_read(forms, hub):
    first = forms["jsonl"]
    rows = [row | {"genre": "folk"} for row in open_form(first)]
    address = push_triplets(rows, "tester/tunes", root_of(first), split="validation", max_shard_size="200KB")
    assert address.startswith(f"{hub.endpoint}/datasets/tester/tunes/commit/")
    files = [name for name in hub.files("datasets/tester/tunes") if name.endswith(".parquet")]
    assert len(files) > 1 and all(name.startswith("data/validation-") for name in files)
    assert str(first["path"].parent).encode() not in b"".join(hub.files("datasets/tester/tunes").values())
    expected = in_order(open_form(first), reader(root_of(first)), 7, 4)
    loaded = load_set("tester/tunes", split="validation")
    read = reader(set_root("tester/tunes"))
    assert_equal_batches(in_order(loaded, read, 7, 4), expected)
    assert loaded[0]["genre"] == "folk" and loaded.features["row"].dtype == "int64"
    stream = TripletStream(load_set("tester/tunes", split="validation", streaming=True), read, 4, seed=None)
    captions = [caption for batch in islice(stream, 6) for caption in batch["captions"]]
    assert sorted(captions) == sorted(row["caption"] for row in rows)


def test_stretches_of_long_files_are_cut_before_they_are_pushed(forms, hub):
    first = forms["jsonl"]
    rows = [row | {"start": 0.5, "duration": 0.64} for row in islice(open_form(first), 3)]
    push_triplets(rows, "tester/cut", root_of(first))
    loaded = load_set("tester/cut")
    assert [row["start"] for row in loaded] == [None] * 3
    for row, cut in zip(rows, loaded):
        expected, found = reader(root_of(first))(row), reader(set_root("tester/cut"))(cut)
        # 16 bits of a sound that is then scaled to peak 0.5.
        assert (expected["waveforms"] - found["waveforms"]).abs().max() < 2e-4


def test_rows_that_nobody_has_read_are_not_pushed(tmp_path):
    with pytest.raises(ValueError, match="Row 0: start, duration, .*problem missing: pass the rows of `load_rows`"):
        push_triplets([{"image": "0.png", "audio": "0.wav", "caption": "a"}], "tester/tunes", tmp_path)


def test_what_only_later_rows_have_is_pushed_too(forms, hub):
    first = forms["jsonl"]
    rows = list(islice(open_form(first), 3))
    rows[1] |= {"genre": "folk"}
    push_triplets(rows, "tester/genres", root_of(first))
    assert [row["genre"] for row in load_set("tester/genres")] == [None, "folk", None]


def test_a_stretch_beyond_full_scale_is_not_clipped(forms, tmp_path, hub):
    wave = 2 * np.sin(np.arange(32000) * 0.05)
    soundfile.write(tmp_path / "loud.wav", wave, 16000, subtype="FLOAT")
    (tmp_path / "0.png").write_bytes((Path(forms["imagefolder"]["name"]) / "0.png").read_bytes())
    row = {"image": "0.png", "audio": "loud.wav", "caption": "a", "start": 0.5, "duration": 1.0}
    (tmp_path / "set.jsonl").write_text(json.dumps(row))
    push_triplets(load_rows(tmp_path / "set.jsonl"), "tester/loud", tmp_path)
    pushed, _ = soundfile.read(BytesIO(load_set("tester/loud")[0]["audio"]["bytes"]))
    np.testing.assert_allclose(pushed / np.abs(pushed).max(), wave[8000:24000] / 2, atol=2e-4)


def test_a_set_becomes_files_again(forms, tmp_path):
    arguments = forms["webdataset"]
    for _ in range(2):
        path = export_triplets(open_form(arguments), tmp_path / "files", root_of(arguments))
        written = {file: file.stat().st_mtime_ns for file in path.parent.glob("*.png")}
    assert len(written) == NUM_ROWS and len(list(path.parent.iterdir())) == 2 * NUM_ROWS + 1
    expected = in_order(open_form(arguments), reader(root_of(arguments)), 7, 4)
    assert_equal_batches(in_order(load_rows(path), reader(str(path.parent)), 7, 4), expected)


def parquet(folder: Path, **columns) -> str:
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(columns).to_parquet(folder / "train.parquet")
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_sets_without_pictures_clips_or_captions_are_refused_by_name(tmp_path, streaming):
    good = {"image": ["0.png"], "audio": ["0.wav"], "caption": ["slow"]}
    cases = {
        "no columns \\['music'\\], only \\['image', 'audio', 'caption'\\]": (good, {"audio": "music"}),
        "'image' .*holds Value\\('int64'\\).* must hold files": ({**good, "image": [1]}, None),
        "'audio' .*holds List.* must hold files": ({**good, "audio": [[0.1, 0.2]]}, None),
        "'caption' .*holds Value\\('int64'\\).*captions are text": ({**good, "caption": [1]}, None),
        "split 'train' .*(holds no rows: name another|no data)": ({name: [] for name in good}, None),
    }
    for number, (message, (columns, names)) in enumerate(cases.items()):
        name = parquet(tmp_path / str(number), **columns)
        if "no data" in message:
            schema = {column: datasets.Value("string") for column in columns}
            empty = datasets.Dataset.from_dict(columns, features=datasets.Features(schema))
            empty.to_parquet(tmp_path / str(number) / "train.parquet")
        with pytest.raises(ValueError, match=message):
            load_set(name, columns=names, streaming=streaming)
    for split, message in (("test", "split 'test' .* cannot be read: .*train"),):
        with pytest.raises(ValueError, match=message):
            load_set(parquet(tmp_path / "good", **good), split=split, streaming=streaming)
    with pytest.raises(ValueError, match="config.* cannot be read|cannot be read: .*other"):
        load_set(parquet(tmp_path / "good", **good), config_name="other", streaming=streaming)
    with pytest.raises(ValueError, match="`columns` must rename some of"):
        load_set(parquet(tmp_path / "good", **good), columns={"picture": "image"}, streaming=streaming)
    (tmp_path / "nothing").mkdir()
    for name in (tmp_path / "nothing", tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=f"{name.name}.* (cannot be read|is neither a folder)"):
            load_set(str(name), streaming=streaming)


def test_a_private_set_without_a_token_is_named(forms, hub, monkeypatch):
    hub.add_repo("datasets/tester/secret", forms["parquet"]["name"], private=True)
    token = hub.token
    monkeypatch.delenv("HF_TOKEN")
    for name in ("tester/secret", "tester/unknown"):
        for streaming in (False, True):
            with pytest.raises(ValueError, match=f"{name}.* set on the Hub that may be read.*hf auth login"):
                load_set(name, streaming=streaming)
    monkeypatch.setenv("HF_TOKEN", token)
    assert len(load_set("tester/secret")) == NUM_ROWS


def test_no_file_outside_of_the_set_is_read(forms, tmp_path):
    picture, clip = (tmp_path / name for name in ("outside.png", "outside.wav"))
    inside = Path(forms["imagefolder"]["name"])
    picture.write_bytes((inside / "0.png").read_bytes())
    clip.write_bytes((inside / "0.wav").read_bytes())
    table = {"image": [str(picture), "../outside.png", "in.png"], "audio": ["in.wav"] * 3, "caption": ["x"] * 3}
    name = parquet(tmp_path / "set", **table)
    (tmp_path / "set" / "in.wav").write_bytes(clip.read_bytes())
    (tmp_path / "set" / "in.png").symlink_to(picture)
    for streaming in (False, True):
        rows = list(load_set(name, streaming=streaming))
        for row in rows:
            with pytest.raises(ValueError, match="lies outside `data_root`"):
                reader(set_root(name))({"row": 0} | row)
    problems = check_rows(load_set(name), set_root(name))
    assert len(problems) == 3 and all("lies outside" in text for _, text in problems)
    with pytest.raises(ValueError, match="Row 0: .*lies outside"):
        push_triplets(load_set(name), "tester/leak", set_root(name))


def test_wrong_fields_are_problems_of_their_rows(forms, tmp_path):
    table = {"image": ["0.png"] * 4, "audio": ["0.wav"] * 4, "caption": ["a", "", None, "d"]}
    name = parquet(tmp_path / "set", **table, start=[0.0, 0.0, 0.0, -1.0])
    for file in ("0.png", "0.wav"):
        (tmp_path / "set" / file).write_bytes((Path(forms["imagefolder"]["name"]) / file).read_bytes())
    problems = dict(check_rows(load_set(name), set_root(name)))
    assert list(problems) == [1, 2, 3] and "`caption` is missing" in problems[1] and "`start` must be" in problems[3]
    streamed = list(load_set(name, streaming=True))
    assert [bool(row["problem"]) for row in streamed] == [False, True, True, True]
    streamed = load_set(name, streaming=True)
    assert dict(check_rows(streamed, set_root(name))) == problems
    with pytest.raises(ValueError, match="Row 1: `caption` is missing"):
        push_triplets(streamed, "tester/wrong", set_root(name))


def test_a_damaged_row_in_the_middle_of_a_stream_is_named_or_skipped(forms, tmp_path, caplog):
    rows = datasets.load_from_disk(forms["save_to_disk"]["name"])
    rows = rows.cast_column("image", datasets.Image(decode=False)).cast_column("audio", datasets.Image(decode=False))
    records = list(rows)
    records[13]["audio"]["bytes"] = records[13]["audio"]["bytes"][:40]
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "train.parquet")
    stream = load_set(str(tmp_path), streaming=True)
    read = reader(set_root(str(tmp_path)))
    batches = iter(TripletStream(stream, read, 4))
    list(islice(batches, 3))
    with pytest.raises(ValueError, match=r"Row 13: '13\.flac' cannot be read as a sound file"):
        next(batches)
    skipping = list(islice(TripletStream(stream, read, 4, skip_bad_rows=True), 4))
    assert skipping[3]["indices"].tolist() == [12, 14, 14, 15] and "Row 13" in caplog.text


def test_captions_may_be_lists_and_numbers_come_from_their_columns(forms, tmp_path):
    for file in ("0.png", "0.wav"):
        (tmp_path / file).write_bytes((Path(forms["imagefolder"]["name"]) / file).read_bytes())
    lines = [{"img": "0.png", "wav": "0.wav", "tags": ["slow", "piano"], "start": 0.25, "duration": 1.0}]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    columns = {"image": "img", "audio": "wav", "caption": "tags"}
    for streaming in (False, True):
        (row,) = load_set(str(tmp_path), columns=columns, streaming=streaming)
        assert row["caption"] == "slow, piano" and (row["start"], row["duration"]) == (0.25, 1.0)
        assert row["problem"] is None and reader(set_root(str(tmp_path)))({"row": 0} | row)["captions"]


def test_a_folder_on_the_hub_is_copied_or_streamed_from_there(forms, hub):
    """Its pictures and clips are files of the repository, and no other repository's files are read."""
    hub.add_repo("datasets/tester/folder", forms["imagefolder"]["name"])
    expected = in_order(open_form(forms["jsonl"]), reader(root_of(forms["jsonl"])), 7, 4)
    read = reader(set_root("tester/folder"))
    streamed = load_set("tester/folder", streaming=True)
    assert_equal_batches(list(islice(TripletStream(streamed, read, 4, seed=7), 2)), expected[:2])
    assert_equal_batches(in_order(load_set("tester/folder"), read, 7, 4), expected)
    root = set_root("tester/folder")
    for path in ("hf://datasets/tester/other/0.png", "../other/0.png", "/etc/passwd", "file:///etc/passwd"):
        with pytest.raises(ValueError, match="lies outside of|cannot be read"):
            locate({"bytes": None, "path": path}, root)


def test_a_sound_inside_of_a_set_may_need_pyav_and_have_no_name(tmp_path, forms):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "tone.m4a"), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        wave = (0.3 * np.sin(np.arange(32000) * 0.1)).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    content = (tmp_path / "tone.m4a").read_bytes()
    picture = Path(forms["imagefolder"]["name"], "0.png").read_bytes()
    row = {"image": {"bytes": picture, "path": None}, "audio": {"bytes": content, "path": None}, "caption": "tone"}
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "set" / "train.parquet")
    (tmp_path / "set.jsonl").write_text(json.dumps({"image": "0.png", "audio": "tone.m4a", "caption": "tone"}))
    (tmp_path / "0.png").write_bytes(picture)
    found = reader(set_root(str(tmp_path / "set")))(load_set(str(tmp_path / "set"))[0])
    expected = reader(str(tmp_path))(load_rows(tmp_path / "set.jsonl")[0])
    assert torch.equal(found["waveforms"], expected["waveforms"]) and found["waveforms"].abs().max() == 0.5

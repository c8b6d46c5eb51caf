"""Sets of triplets made of real files, good and bad."""

import csv
import functools
import json
import os
import pickle
import re
from itertools import islice
from pathlib import Path

import numpy as np
import PIL.Image
import psutil
import pytest
import soundfile
import torch
from conftest import assert_near
from torch.utils.data import DataLoader

from melfusion_pipeline.data import (
    MELBENCH_COLUMNS,
    TripletDataset,
    check_rows,
    convert_musiccaps,
    format_problems,
    load_rows,
    read_triplet,
    select_good_rows,
)
from melfusion_pipeline.pictures_melfusion import prepare_image
from melfusion_pipeline.streams import TripletStream


def write_music(path: Path, seconds: float = 2.0, sampling_rate: int = 16000, seed: int = 0) -> None:
    """A rising tone, so that a stretch shows where it was cut, with a little noise of its own."""
    moments = np.arange(round(seconds * sampling_rate)) / sampling_rate
    music = 0.5 * np.sin(2 * np.pi * (200 + 100 * moments) * moments)
    soundfile.write(path, music + 1e-3 * np.random.default_rng(seed).standard_normal(len(music)), sampling_rate)


def write_image(path: Path, size: tuple[int, int] = (24, 20), seed: int = 0) -> None:
    PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path)


def write_lines(path: Path, records: list) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in records))
    return path


@pytest.fixture
def records(tmp_path):
    """Six good triplets in four audio formats, lying in `tmp_path`."""
    for folder in ("images", "music"):
        (tmp_path / folder).mkdir()
    rows = []
    for index, suffix in enumerate(["wav", "flac", "ogg", "mp3", "wav", "wav"]):
        rows.append({"image": f"images/{index}.png", "audio": f"music/{index}.{suffix}", "caption": f"tune {index}"})
        write_image(tmp_path / rows[-1]["image"], seed=index)
        write_music(tmp_path / rows[-1]["audio"], 1.5 + index / 2, [16000, 44100][index % 2], seed=index)
    (tmp_path / "link.png").symlink_to(tmp_path / "images/5.png")
    return rows[:5] + [rows[5] | {"image": "link.png"}]


def reader(data_root: Path, audio_length_in_s: float = 1.28, **arguments) -> functools.partial:
    arguments |= {"data_root": data_root, "audio_length_in_s": audio_length_in_s}
    return functools.partial(read_triplet, prepare_image=functools.partial(prepare_image, image_size=16), **arguments)


def assert_equal_batches(first: list[dict], second: list[dict]) -> None:
    assert len(first) == len(second) > 0
    for one, other in zip(first, second):
        assert one["captions"] == other["captions"] and one["image_files"] == other["image_files"]
        for key in ("pixel_values", "waveforms", "indices"):
            assert torch.equal(one[key], other[key])


def test_without_preparation_the_picture_is_not_read(tmp_path, records):
    rows = load_rows(write_lines(tmp_path / "train.jsonl", records))
    (tmp_path / records[0]["image"]).write_bytes(b"no picture")
    sample = read_triplet(rows[0], tmp_path, None, 1.28)
    assert sample["image_files"] == str(tmp_path / records[0]["image"]) and "pixel_values" not in sample
    assert sample["waveforms"].shape == (20480,)
    with pytest.raises(ValueError, match="Row 0"):
        reader(tmp_path)(rows[0])


def test_batch_of_a_json_lines_set(tmp_path, records):
    rows = load_rows(write_lines(tmp_path / "train.jsonl", records))
    batch = next(iter(DataLoader(TripletDataset(rows, reader(tmp_path)), batch_size=6)))
    assert batch["pixel_values"].shape == (6, 3, 16, 16) and batch["pixel_values"].dtype == torch.float32
    assert -1 <= batch["pixel_values"].min() < -0.5 and 0.5 < batch["pixel_values"].max() <= 1
    assert batch["waveforms"].shape == (6, 20480) and batch["waveforms"].dtype == torch.float32
    assert_near(batch["waveforms"].abs().amax(dim=1), torch.full((6,), 0.5))
    assert batch["captions"] == [record["caption"] for record in records]
    assert batch["indices"].tolist() == list(range(6)) and batch["indices"].dtype == torch.int64
    assert batch["image_files"] == [str((tmp_path / record["image"]).resolve()) for record in records]


def test_csv_melbench_json_and_own_column_names_hold_the_same_rows(tmp_path, records):
    records = [record | {"start": index / 4, "duration": 1.0, "genre": "folk"} for index, record in enumerate(records)]
    expected = list(load_rows(write_lines(tmp_path / "train.jsonl", ["", *records, ""])))
    assert expected[2]["start"] == 0.5 and expected[2]["row"] == 2 and expected[2]["split"] is None
    with open(tmp_path / "train.csv", "w", newline="") as file:
        table = csv.DictWriter(file, ["caption", "extra", *list(records[0])[:2], "start", "duration", "genre"])
        table.writeheader()
        table.writerows([record | {"extra": 'a, "quoted"\nfield'} for record in records])
    assert list(load_rows(tmp_path / "train.csv")) == expected
    renamed = [{MELBENCH_COLUMNS.get(key, key): value for key, value in record.items()} for record in records]
    (tmp_path / "melbench.json").write_text(json.dumps(renamed))
    assert list(load_rows(tmp_path / "melbench.json", columns=MELBENCH_COLUMNS)) == expected
    write_lines(tmp_path / "lines.json", renamed)
    assert list(load_rows(tmp_path / "lines.json", columns=MELBENCH_COLUMNS, streaming=True)) == expected


TABLE = 'image;audio;caption;start\r\nimages/0.png;music/0.wav;"müde, ""langsam""";0,5\r\n;;;\r\n'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("delimiter, suffix", [(",", "csv"), (";", "csv"), ("\t", "csv"), ("\t", "tsv")])
def test_tables_are_read_as_spreadsheets_write_them(tmp_path, records, caplog, encoding, delimiter, suffix):
    text = TABLE if delimiter == ";" else TABLE.replace("0,5", "0.5").replace(";", delimiter)
    (tmp_path / f"set.{suffix}").write_bytes(text.encode(encoding))
    for streaming in (False, True):
        caplog.clear()
        (row,) = load_rows(tmp_path / f"set.{suffix}", streaming=streaming)
        assert row["caption"] == 'müde, "langsam"' and row["start"] == 0.5 and row["problem"] is None
        assert reader(tmp_path)(row)["captions"] == row["caption"]
        usual = encoding.startswith("utf-8") and delimiter == {"csv": ",", "tsv": "\t"}[suffix]
        assert caplog.text.count(f"as {'utf-8-sig' if encoding == 'utf-8' else encoding} with") == (not usual)
        assert caplog.text.count(repr(delimiter)) == (not usual)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"image|audio|caption\na|b|c", r"one column, 'image\|audio\|caption'.* semicolons or tabs"),
        ("image,audio,caption\na,b,c".encode("utf-16-le"), "UTF-16 without its mark.* UTF-8"),
        ("image,audio,caption\nä,b,".encode() + b"\xe4", "UTF-8 with a foreign byte 0xe4.* UTF-8"),
        (b"image,audio,caption\na,b,\x81", "neither UTF-8, UTF-16 nor cp1252.* 0x81.* UTF-8"),
    ],
)
def test_tables_that_nothing_fits_are_refused(tmp_path, content, message):
    (tmp_path / "set.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"set\.csv.*{message}"):
        load_rows(tmp_path / "set.csv")


def test_json_from_windows_is_read_or_refused_by_its_encoding(tmp_path, records):
    (tmp_path / "set.json").write_bytes(json.dumps(records).encode("utf-8-sig"))
    assert [row["caption"] for row in load_rows(tmp_path / "set.json")] == [row["caption"] for row in records]
    (tmp_path / "set.jsonl").write_bytes(json.dumps(records[0]).encode("utf-16"))
    with pytest.raises(ValueError, match=r"set\.jsonl.* UTF-16: save it as UTF-8"):
        load_rows(tmp_path / "set.jsonl")


def test_a_caption_with_an_unquoted_comma_is_not_cut_off(tmp_path):
    (tmp_path / "set.csv").write_text("image,audio,caption\na.png,b.wav,slow, sad\nc.png,d.wav,fast,,\n")
    cut, padded = load_rows(tmp_path / "set.csv")
    assert re.search("more fields than the header.* sad.*quote", cut["problem"])
    assert padded["problem"] is None and padded["caption"] == "fast"


def test_paths_of_windows_and_captions_of_tags_are_read(tmp_path, records):
    windows = {"image": r"images\0.png", "audio": r"music\0.wav", "caption": ["slow", " piano ", ""]}
    cases = [windows, windows | {"caption": ["slow", 5]}, windows | {"caption": []}]
    cases += [windows | {"image": r"..\outside.png"}, windows | {"audio": r"C:\music\0.wav"}, records[1]]
    cases[-1] = records[1] | {"audio": r"music\odd.wav"}
    write_music(tmp_path / r"music\odd.wav")
    rows = list(load_rows(write_lines(tmp_path / "train.jsonl", cases)))
    assert check_rows(rows[:1], tmp_path) == [] and rows[0]["caption"] == "slow, piano"
    assert reader(tmp_path)(rows[0])["image_files"] == str(tmp_path / "images/0.png")
    messages = ("`caption` must be text", "`caption` is missing", "`image` may not hold", "another system's drive")
    for row, message in zip(rows[1:5], messages, strict=True):
        assert message in row["problem"]
    # Elsewhere a backslash may be part of a name.
    assert rows[5]["audio"].endswith("music\\odd.wav") and check_rows(rows[5:], tmp_path) == []


def test_load_rows_refuses_bad_files_and_column_names(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    write_lines(tmp_path / "train.parquet", [{}])
    for name, message in [("missing.jsonl", "existing"), ("train.parquet", "existing"), ("empty.jsonl", "no rows")]:
        with pytest.raises(ValueError, match=f"`path` .*{message}"):
            load_rows(tmp_path / name)
    with pytest.raises(ValueError, match="`columns` .*picture"):
        load_rows(tmp_path / "empty.jsonl", columns={"picture": "img"})


def test_audio_crops_follow_seed_epoch_and_row_only(tmp_path, records):
    rows = load_rows(write_lines(tmp_path / "train.jsonl", records))
    dataset = TripletDataset(rows, reader(tmp_path, 0.64, random_image_crops=True))
    first = dataset[5]
    assert torch.equal(dataset[5]["waveforms"], first["waveforms"])
    dataset.set_epoch(1)
    assert not torch.allclose(dataset[5]["waveforms"], first["waveforms"], atol=1e-2)
    assert not torch.equal(dataset[5]["pixel_values"], first["pixel_values"])
    assert not torch.allclose(reader(tmp_path, 0.64, seed=1)(rows[5])["waveforms"], first["waveforms"], atol=1e-2)
    assert torch.equal(*(reader(tmp_path, epoch=epoch)(rows[5])["pixel_values"] for epoch in range(2)))


def test_crops_stay_between_start_and_duration_and_short_clips_are_padded(tmp_path, records):
    write_music(tmp_path / "long.wav", seconds=10.0)
    long = {"image": "images/0.png", "audio": "long.wav", "caption": "long", "start": 4.0, "duration": 2.0}
    rows = load_rows(write_lines(tmp_path / "train.jsonl", [long, long | {"duration": 0.5}]))
    pitches = []
    for epoch in range(12):
        waveform = reader(tmp_path, 0.5, epoch=epoch)(rows[0])["waveforms"]
        pitches.append(torch.fft.rfft(waveform * torch.hann_window(8000)).abs().argmax().item() * 2)
    assert 200 + 200 * 4.0 < min(pitches) < 200 + 200 * 4.8 and 200 + 200 * 5.2 < max(pitches) < 200 + 200 * 6.0
    padded = reader(tmp_path, 1.0)(rows[1])["waveforms"]
    assert padded.shape == (16000,) and padded[:8000].abs().max() == 0.5 and not padded[8000:].any()


def test_stream_equals_map_style_for_any_number_of_processes_and_workers(tmp_path, records):
    path = write_lines(tmp_path / "train.jsonl", records)
    read, rows = reader(tmp_path), load_rows(path, streaming=True)
    expected = list(DataLoader(TripletDataset(load_rows(path), read), batch_size=2))
    for num_workers in (0, 2):
        stream = TripletStream(rows, read, batch_size=2)
        loader = DataLoader(stream, batch_size=None, num_workers=num_workers)
        assert_equal_batches(list(islice(loader, 3)), expected)
    for batch, *parts in zip(expected, *(TripletStream(rows, read, 1, p, 2) for p in range(2))):
        assert torch.equal(torch.cat([part["waveforms"] for part in parts]), batch["waveforms"])
    # The stream has no end: a batch may hold the last rows of one epoch and the first of the next.
    shares = [[batch["indices"].tolist() for batch in islice(TripletStream(rows, read, 2, p, 2), 2)] for p in range(2)]
    assert shares == [[[0, 1], [4, 5]], [[2, 3], [0, 1]]]


def test_shuffled_stream_changes_order_and_crops_with_the_epoch(tmp_path, records):
    rows = load_rows(write_lines(tmp_path / "train.jsonl", records), streaming=True)
    stream = TripletStream(rows, reader(tmp_path, 0.64), batch_size=6, seed=3)
    orders = list(islice(stream, 2)) + list(islice(stream, 1))
    assert sorted(orders[0]["indices"].tolist()) == list(range(6))
    assert orders[0]["indices"].tolist() != orders[1]["indices"].tolist()
    assert_equal_batches(orders[:1], orders[2:])
    crops = [batch["waveforms"][batch["indices"] == 5] for batch in orders[:2]]
    assert not torch.allclose(*crops, atol=1e-2)


def bad_rows(tmp_path: Path, good: dict) -> list[tuple[object, str]]:
    """Rows with their files, and what must be said about each."""
    truncated, bomb = tmp_path / "truncated.jpg", tmp_path / "bomb.png"
    write_image(truncated, size=(64, 64))
    truncated.write_bytes(truncated.read_bytes()[:-1500])
    PIL.Image.new("1", (20000, 20000)).save(bomb)
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture")
    soundfile.write(tmp_path / "nan.wav", np.array([0.1, np.nan] * 16000), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "silent.wav", np.full(32000, 0.25), 16000)
    music = np.random.default_rng(0).uniform(-0.5, 0.5, 32000)
    soundfile.write(tmp_path / "opposite.wav", np.stack([music, -music], axis=1), 16000)
    write_music(tmp_path / "short.wav", seconds=0.5)
    write_image(tmp_path.parent / "outside.png")
    (tmp_path / "escape.png").symlink_to(tmp_path.parent / "outside.png")
    return [
        (good | {"image": "images/none.png"}, r"none\.png.* is missing"),
        (good | {"audio": "music/none.wav"}, r"none\.wav.* is missing"),
        (good | {"audio": "music"}, r"music.* is missing"),
        (good | {"image": "truncated.jpg"}, r"truncated\.jpg.* cannot be read as a picture.*truncated"),
        (good | {"image": "text.png"}, r"text\.png.* cannot be read as a picture"),
        (good | {"image": "bomb.png"}, r"bomb\.png.* cannot be read as a picture.*decompression bomb"),
        (good | {"audio": "empty.wav"}, r"empty\.wav.*Format not recognised"),
        (good | {"audio": "nan.wav"}, r"nan\.wav.* NaN"),
        (good | {"audio": "music/0.wav", "start": 60.0}, r"0\.wav.* no samples at 60"),
        (good | {"image": "../outside.png"}, r"`image` may not hold '\.\.'"),
        (good | {"image": str(tmp_path.parent / "outside.png")}, r"outside\.png.* lies outside `data_root`"),
        (good | {"image": "escape.png"}, r"escape\.png.* lies outside `data_root`"),
        (good | {"caption": ""}, "`caption` is missing in (?!.*names another)"),
        ({"image": good["image"], "audio": good["audio"]}, "`caption` is missing .* --caption_column, names"),
        (good | {"caption": 5}, "`caption` must be text"),
        (good | {"start": -1}, "`start` must be a number of seconds"),
        (good | {"duration": "long"}, "long"),
        ('{"image": "images/0.png", "audio', "Unterminated|Expecting|Invalid"),
        ("17", "`image` is missing in 17"),
    ]


def test_bad_rows_are_reported_and_refused_by_their_number(tmp_path, records, capsys):
    unreadable = bad_rows(tmp_path, records[0])
    cases = unreadable + [
        (records[0], "repeats row 0"),
        (records[0] | {"audio": "silent.wav"}, r"silent\.wav.* is silent"),
        (
            records[0] | {"audio": "opposite.wav"},
            r"opposite\.wav.* is silent once its channels are averaged.* keep one",
        ),
        (records[0] | {"audio": "short.wav"}, r"short\.wav.* too short: 0.50 s"),
        (records[5], "repeats row 5"),
    ]
    rows = load_rows(path := write_lines(tmp_path / "train.jsonl", records + [row for row, _ in cases]))
    problems = check_rows(rows, tmp_path)
    expected = [(row, message) for row, (_, message) in enumerate(cases, start=len(records))]
    assert [row for row, _ in problems] == [row for row, _ in expected]
    assert all(re.search(message, text) for (_, text), (_, message) in zip(problems, expected))
    assert check_rows(load_rows(path, streaming=True), tmp_path) == problems
    assert "Checking" in capsys.readouterr().err
    lines = format_problems(problems).splitlines()
    assert len(lines) == 1 + len(problems) and lines[1].split()[0] == "6" and lines[1].endswith("is missing")
    for row, (_, message) in enumerate(unreadable, start=len(records)):
        with pytest.raises(ValueError, match=f"(?s)^Row {row}: .*({message})"):
            reader(tmp_path)(rows[row])


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows_are_refused_or_skipped(tmp_path, records, streaming, caplog):
    records.insert(2, records[0] | {"audio": "none.wav"})
    rows = load_rows(write_lines(tmp_path / "train.jsonl", records), streaming=streaming)
    problems = check_rows(rows, tmp_path)
    with pytest.raises(ValueError, match=r"(?s)1 problems.*skip_bad_rows.*\n +2  .*none\.wav.* is missing"):
        select_good_rows(rows, problems)
    good_rows = select_good_rows(rows, problems, skip_bad_rows=True)
    assert "none.wav" in caplog.text and select_good_rows(good_rows, []) is good_rows
    # A spawned worker gets the rows pickled; a forked one would share them.
    sent = DataLoader(pickle.loads(pickle.dumps(good_rows)), batch_size=None, num_workers=1)
    assert [row["row"] for row in good_rows] == [row["row"] for row in sent] == [0, 1, 3, 4, 5, 6]


def test_unusual_pictures_are_read(tmp_path, records):
    colours = np.zeros((8, 12, 3), dtype=np.uint8)
    colours[:, :6] = (250, 20, 30)
    picture = PIL.Image.fromarray(colours)
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    PIL.Image.fromarray(np.linspace(0, 65535, 96).astype(np.uint16).reshape(8, 12)).save(tmp_path / "sixteen.png")
    picture.convert("RGBA").save(tmp_path / "alpha.png")
    picture.convert("P").save(tmp_path / "palette.gif")
    exif = PIL.Image.Exif()
    exif[0x0112] = 3
    picture.save(tmp_path / "rotated.jpg", exif=exif, quality=95)
    picture.save(tmp_path / "rotated.tif", exif=exif)
    PIL.Image.new("L", (1, 1), 255).save(tmp_path / "pixel.png")
    names = ["cmyk.jpg", "sixteen.png", "alpha.png", "palette.gif", "rotated.jpg", "rotated.tif", "pixel.png"]
    rows = load_rows(write_lines(tmp_path / "train.jsonl", [records[0] | {"image": name} for name in names]))
    assert check_rows(rows, tmp_path) == []
    cmyk, sixteen, alpha, palette, jpeg, tiff, pixel = (reader(tmp_path)(row)["pixel_values"] for row in rows)
    for upright in (cmyk, alpha, palette):
        assert upright[0, :, :4].mean() > 0.7 and upright[:, :, -4:].mean() < -0.9
    for rotated in (jpeg, tiff):
        assert rotated[0, :, -4:].mean() > 0.7 and rotated[:, :, :4].mean() < -0.9
    assert sixteen[:, 0].mean() < -0.7 and abs(sixteen.mean()) < 0.05 and sixteen[:, -1].mean() > 0.7
    assert torch.equal(pixel, torch.ones(3, 16, 16))


def test_musiccaps_is_joined_with_folders(tmp_path):
    folders = (tmp_path / "clips", tmp_path / "pictures")
    for folder in folders:
        folder.mkdir()
    with open(tmp_path / "musiccaps-public.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["ytid", "start_s", "end_s", "audioset_positive_labels", "aspect_list", "caption"])
        for name in ("-0Gj8-vB1q4", "-0SdAVK79lg", "-0vPFx-wRRI", "-0xzrMun0Rs"):
            table.writerow([name, 30, 40, "/m/0140xf", "['piano']", f"A slow tune,\nin {name}."])
    for seed, name in enumerate(("-0Gj8-vB1q4.flac", "-0vPFx-wRRI.wav", "-0xzrMun0Rs.wav")):
        write_music(tmp_path / "clips" / name, seed=seed)
    for name in ("-0Gj8-vB1q4.jpg", "-0SdAVK79lg.png", "-0xzrMun0Rs.png"):
        write_image(tmp_path / "pictures" / name)
    missing = convert_musiccaps(tmp_path / "musiccaps-public.csv", *folders, tmp_path / "musiccaps.jsonl")
    assert [row for row, _ in missing] == [1, 2]
    assert "no audio -0SdAVK79lg.*" in missing[0][1] and "no image -0vPFx-wRRI.*" in missing[1][1]
    rows = load_rows(tmp_path / "musiccaps.jsonl")
    assert check_rows(rows, tmp_path) == []
    assert [row["caption"] for row in rows] == ["A slow tune,\nin -0Gj8-vB1q4.", "A slow tune,\nin -0xzrMun0Rs."]
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    with pytest.raises(ValueError, match="clips"):
        convert_musiccaps(tmp_path / "musiccaps-public.csv", *folders, tmp_path / "pictures/set.jsonl")


def test_two_hundred_thousand_rows_stream_with_flat_memory(tmp_path, records):
    line = json.dumps(records[0] | {"caption": "x" * 200, "genre": "NUMBER"})
    with open(tmp_path / "large.jsonl", "w") as file:
        file.writelines(line.replace("NUMBER", str(index)) + "\n" for index in range(200_000))
    list(load_rows(write_lines(tmp_path / "small.jsonl", records), streaming=True))  # imports datasets
    memory = [psutil.Process().memory_info().rss >> 20]
    rows = load_rows(tmp_path / "large.jsonl", streaming=True)
    for row in rows:
        if row["row"] % 20_000 == 10_000:
            memory.append(psutil.Process().memory_info().rss >> 20)
    print("resident memory in MB:", memory)
    assert row["genre"] == "199999" and len(memory) == 11 and max(memory) - memory[0] < 20
    # A thousand lines are a shard, and two rows that follow one another in a batch are of different shards.
    batch = next(iter(TripletStream(rows, reader(tmp_path), batch_size=2)))
    assert batch["indices"].tolist() == [0, 1000]

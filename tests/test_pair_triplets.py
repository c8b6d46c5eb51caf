"""`examples/pair_triplets.py`: what was never paired becomes a set, and a sheet to strike pairs on."""

import csv
import itertools
import json
from pathlib import Path

import datasets
import numpy as np
import pair_triplets
import PIL.Image
import pytest
import soundfile
from conftest import photograph, wait_for
from extractor_checkpoints import save_clap, save_clip
from pair_sources import Item, cut_track, find_items
from test_train_processes import on_two_processes
from transformers.utils import logging
from triplet_forms import as_bytes

from melfusion_pipeline.data import check_rows, load_rows, load_set

RATE = 16000


def tones(seed: int, seconds: float) -> np.ndarray:
    """Notes at random heights and moments."""
    chance = np.random.default_rng(seed)
    music = np.zeros(round(seconds * RATE))
    for begin in np.arange(0, seconds - 0.2, 0.25):
        moments = np.arange(round(0.2 * RATE)) / RATE
        note = np.sin(2 * np.pi * 110 * 2 ** chance.uniform(0, 5) * moments) * np.hanning(len(moments))
        first = round(begin * RATE)
        music[first : first + len(note)] += 0.3 * chance.uniform(0.3, 1) * note
    return music


@pytest.fixture(scope="module", autouse=True)
def progress_bars():
    """The script turns them off for the process, which other files' tests share."""
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    for name, save in (("clip", save_clip), ("clap", save_clap)):
        (folder / name).mkdir()
        save(folder / name)
    return ["--clip_model", str(folder / "clip"), "--clap_model", str(folder / "clap")]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """Five pictures and four pieces of music, one of them long, and what cannot be paired."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("pictures/more", "music"):
        (folder / name).mkdir(parents=True)
    for seed in range(5):
        photograph(seed, 60, 40).save(folder / "pictures" / ("more" if seed == 4 else ".") / f"{seed}.png")
    photograph(0, 60, 40).resize((90, 60)).save(folder / "pictures" / "zero-again.jpg", quality=80)
    (folder / "pictures" / "broken.png").write_bytes(b"no picture")
    for seed in range(3):
        soundfile.write(folder / "music" / f"{seed}.wav", tones(seed, 2.0), RATE)
    soundfile.write(folder / "music" / "zero-again.mp3", tones(0, 2.0), RATE)
    soundfile.write(folder / "music" / "long.flac", tones(9, 7.0), RATE)
    soundfile.write(folder / "music" / "short.wav", tones(3, 0.5), RATE)
    return folder


def run(sources: Path, output: Path, models: list[str], *more: str) -> list[dict]:
    given = ["--pictures", str(sources / "pictures"), "--music", str(sources / "music"), "--output", str(output)]
    pair_triplets.main([*given, *models, "--audio_length_in_s", "2", *more])
    return [json.loads(line) for line in (output / "pairs.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def paired(sources, models, tmp_path_factory) -> tuple[Path, list[dict]]:
    output = tmp_path_factory.mktemp("paired")
    return output, run(sources, output, models)


def test_folders_become_a_set_that_training_reads(paired, sources):
    output, pairs = paired
    rows = load_rows(output / "pairs.jsonl")
    assert check_rows(rows, output) == []
    # Five pictures, and clips of three short pieces and of a long one: each once.
    assert len(pairs) == 5 == len({row["image"] for row in pairs})
    clips = {(row["audio"], row["start"]) for row in pairs}
    assert len(clips) == 5 and all(row["duration"] >= 2 for row in pairs)
    assert [row["score"] for row in pairs] == sorted((row["score"] for row in pairs), reverse=True)
    phrases = {
        phrase: category
        for category, phrase in pair_triplets.read_phrases(pair_triplets.HERE / "bridging_captions.txt")
    }
    for row in pairs:
        assert row["caption_source"] == "phrases"
        assert row["caption"].count(", ") >= 2 and any(phrase in row["caption"] for phrase in phrases)
    names = {path.name for path in (output / "media").iterdir()}
    assert len(names) == len({row["image"] for row in pairs} | {row["audio"] for row in pairs})
    assert not [row for row in pairs if str(sources) in json.dumps(row)]


def test_what_cannot_be_read_is_named_and_near_duplicates_are_left_out(sources, models, tmp_path, capsys):
    run(sources, tmp_path, models)
    printed = capsys.readouterr().out
    assert "left out: " in printed and "broken.png" in printed and "short.wav" in printed
    assert "7 found, 6 can be read, 5 are no near duplicates" in printed
    assert printed.count("are no near duplicates") == 2
    kept = run(sources, tmp_path, models, "--duplicates", "1")
    assert len(kept) == 6 > 5


def test_nothing_is_looked_at_or_listened_to_twice(paired, sources, models, monkeypatch):
    output, pairs = paired
    cache = {path: path.stat().st_mtime_ns for path in (output / "embeddings").iterdir()}
    (output / "pairs.jsonl").rename(output / "before.jsonl")
    broken = pair_triplets.key_of(Item(sources / "pictures" / "broken.png"))

    def fail(item, *_):
        if item.path.name not in ("broken.png", "short.wav"):
            raise AssertionError(f"{item} again")
        raise ValueError("cannot be read")

    monkeypatch.setattr(pair_triplets, "look_at", fail)
    monkeypatch.setattr(pair_triplets, "listen_to", fail)
    assert run(sources, output, models) == pairs and broken
    assert {path: path.stat().st_mtime_ns for path in (output / "embeddings").iterdir()} == cache


def test_a_threshold_and_another_list_of_phrases(paired, sources, models, tmp_path):
    output, pairs = paired
    cache = ["--cache", str(output / "embeddings")]
    threshold = pairs[2]["score"]
    good = run(sources, tmp_path / "some", models, *cache, "--min_score", str(threshold))
    assert [row["score"] for row in good] == [row["score"] for row in pairs[:3]]
    with pytest.raises(ValueError, match="No pair reaches --min_score 2.0: the best has"):
        run(sources, tmp_path / "none", models, *cache, "--min_score", "2")
    assert not list((tmp_path / "none").glob("*"))
    (tmp_path / "phrases.txt").write_text("calm\nwild\ndark\nbright\n")
    other = run(sources, tmp_path / "other", models, *cache, "--bridge", str(tmp_path / "phrases.txt"))
    assert all(set(row["caption"].split(", ")) < {"calm", "wild", "dark", "bright"} for row in other)
    (tmp_path / "phrases.txt").write_text("calm\n")
    with pytest.raises(ValueError, match="holds 1 phrases"):
        run(sources, tmp_path / "other", models, *cache, "--bridge", str(tmp_path / "phrases.txt"))


def test_the_assignment_is_the_best_of_all():
    similarity = np.random.default_rng(0).random((4, 6))
    best = max(
        itertools.permutations(range(6), 4),
        key=lambda clips: sum(similarity[row, clip] for row, clip in enumerate(clips)),
    )
    assert pair_triplets.match(similarity) == list(enumerate(best))
    assert sorted(pair_triplets.match(similarity.T)) == sorted((clip, row) for row, clip in enumerate(best))
    twice = pair_triplets.match(similarity[:3], reuse=2)
    assert len(twice) == len(set(twice)) == 6 and sorted(clip for _, clip in twice) == list(range(6))
    assert [sum(row == picture for row, _ in twice) for picture in range(3)] == [2, 2, 2]
    with pytest.raises(ValueError, match="too many: pair them in parts"):
        pair_triplets.match(np.broadcast_to(0.5, (20_000, 20_000)))


def test_captions_are_made_of_one_phrase_of_each_category_but_scenes():
    phrases = [("scene", "a lake"), ("mood", "calm"), ("mood", "wild"), ("instrument", "piano"), ("genre", "jazz")]
    caption = pair_triplets.make_caption(np.array([0.4, 0.1, 0.2, 0.05, 0.25]), phrases)
    assert caption == "jazz, wild, piano"


def test_long_music_is_cut_at_quiet_places(tmp_path):
    music = np.random.default_rng(0).uniform(-0.3, 0.3, 30 * RATE)
    quiet = [4.6, 9.2, 13.9, 19.5]
    for moment in quiet:
        music[round((moment - 0.15) * RATE) : round((moment + 0.15) * RATE)] *= 0.01
    music[25 * RATE :] = 0
    soundfile.write(tmp_path / "long.wav", music, RATE)
    cuts = cut_track(Item(tmp_path / "long.wav"), 4.0)
    ends = [start + duration for start, duration in cuts]
    assert all(min(abs(end - moment) for end in ends) < 0.2 for moment in quiet)
    assert all(4.0 <= duration <= 6.01 for _, duration in cuts) and max(ends) <= 30
    # What begins in the silence at the end is no clip.
    assert max(start for start, _ in cuts) < 25
    part = cut_track(Item(tmp_path / "long.wav", start=3.0, duration=9.0), 4.0)
    assert part[0][0] == 3.0 and sum(duration for _, duration in part) <= 9.0 and len(part) == 2
    assert cut_track(Item(tmp_path / "long.wav", start=3.0, duration=7.0), 4.0) == [(3.0, 7.0)]


def test_tables_musiccaps_and_sets_are_sources_too(sources, tmp_path):
    rows = [{"image": f"pictures/{seed}.png", "note": "x"} for seed in range(2)]
    (sources / "pictures.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = find_items(str(sources / "pictures.jsonl"), "image", "image", "caption", "train", tmp_path)
    assert [item.path for item in found] == [sources / "pictures" / f"{seed}.png" for seed in range(2)]
    with open(sources / "musiccaps-public.csv", "w", newline="") as file:
        table = csv.DictWriter(file, ["ytid", "start_s", "end_s", "caption"])
        table.writeheader()
        for name in ("0", "absent", "2"):
            table.writerow({"ytid": name, "start_s": 30, "end_s": 40, "caption": f"tune, {name}"})
    clips = find_items(str(sources / "musiccaps-public.csv"), "audio", "audio", "caption", "train", tmp_path)
    assert [(item.path.name, item.caption, item.start, item.duration) for item in clips] == [
        ("0.wav", "tune, 0", 0.0, None),
        ("2.wav", "tune, 2", 0.0, None),
    ]
    with pytest.raises(ValueError, match="Row 0 .*`song` is missing"):
        find_items(str(sources / "pictures.jsonl"), "audio", "song", "caption", "train", tmp_path)
    (sources / "musiccaps-public.csv").unlink()
    records = [{"song": as_bytes(sources / "music" / f"{seed}.wav"), "text": f"tune {seed}"} for seed in range(3)]
    datasets.Dataset.from_list(records).save_to_disk(str(tmp_path / "set"))
    clips = find_items(str(tmp_path / "set"), "audio", "song", "text", "train", tmp_path / "media")
    assert [item.caption for item in clips] == ["tune 0", "tune 1", "tune 2"]
    assert clips[1].path.read_bytes() == (sources / "music" / "1.wav").read_bytes()
    with pytest.raises(ValueError, match="has no column 'audio', only"):
        find_items(str(tmp_path / "set"), "audio", "audio", "text", "train", tmp_path / "media")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        find_items(str(tmp_path / "empty"), "image", "image", "text", "train", tmp_path / "media")


@pytest.mark.parametrize(
    "table, message",
    [
        ('{"audio": "../music/0.wav"}', "may not hold '..'"),
        ('{"audio": "/etc/hostname"}', "lies outside of the table's folder"),
        ('{"audio": 5}', "`audio` must be text"),
        ('["0.wav"]', "`audio` is missing"),
        ('{"audio": "0.wav", "caption": 5}', "`caption` must be text"),
        ('{"audio": "0.wav", "start": -1}', "`start` must be a number of seconds"),
        ("0.wav", "Expecting value|Extra data"),
    ],
)
def test_wrong_rows_of_tables_are_named_before_anything_is_read(tmp_path, table, message):
    (tmp_path / "0.wav").touch()
    (tmp_path / "set.jsonl").write_text(f'{{"audio": "0.wav"}}\n{table}\n')
    with pytest.raises(ValueError, match=f"Row 1 of .*set.jsonl.*({message})"):
        find_items(str(tmp_path / "set.jsonl"), "audio", "audio", "caption", "train", tmp_path)


def test_tables_are_read_as_training_reads_them(tmp_path):
    (tmp_path / "set.csv").write_text("audio;start;duration;caption\nmusic\\0.wav;0,5;1,25;a tune\n")
    (tmp_path / "set.jsonl").write_text('{"audio": "0.wav", "caption": ["slow", "sad"]}')
    (csv_item,), (json_item,) = (
        find_items(str(tmp_path / name), "audio", "audio", "caption", "train", tmp_path)
        for name in ("set.csv", "set.jsonl")
    )
    assert csv_item == Item(tmp_path / "music" / "0.wav", "a tune", 0.5, 1.25)
    assert json_item.caption == "slow, sad"


def test_given_captions_stay_and_pairs_are_published(sources, models, tmp_path, hub):
    lines = [{"audio": str(sources / "music" / f"{seed}.wav"), "caption": f"tune {seed}"} for seed in range(3)]
    (sources / "music.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = ["--music", str(sources / "music.jsonl"), "--hub_dataset_id", "tester/pairs"]
    pairs = run(sources, tmp_path / "out", models, *flags)
    assert {row["caption"]: row["caption_source"] for row in pairs} == {f"tune {seed}": "given" for seed in range(3)}
    published = load_set("tester/pairs")
    assert [row["caption"] for row in published] == [row["caption"] for row in pairs]


@pytest.mark.parametrize(
    "flags", [["--pictures", "x"], ["--drop"], ["--reuse", "0"], ["--duplicates", "0"], ["--audio_length_in_s", "0.5"]]
)
def test_wrong_arguments_are_refused(models, tmp_path, flags):
    complete = [] if flags == ["--pictures", "x"] else ["--pictures", "x", "--music", "y", *models]
    with pytest.raises(SystemExit):
        pair_triplets.main([*complete, "--output", str(tmp_path), *flags])


def test_struck_pairs_are_dropped(paired, tmp_path):
    output = tmp_path / "copy"
    output.mkdir()
    lines = (paired[0] / "pairs.jsonl").read_text().splitlines()
    pair_triplets.write_pairs([json.loads(line) for line in lines], output)
    sheet = (output / "sheet.html").read_text()
    assert sheet.count("<article>") == 5 and sheet.index(f"score {paired[1][-1]['score']:.4g}") < sheet.index(
        f"score {paired[1][0]['score']:.4g}"
    )
    struck = {"struck": [pair_triplets.name_pair(lines[index]) for index in (1, 3)]}
    (tmp_path / "struck.json").write_text(json.dumps(struck))
    pair_triplets.main(["--output", str(output), "--drop", str(tmp_path / "struck.json")])
    assert (output / "pairs.jsonl").read_text().splitlines() == [lines[0], lines[2], lines[4]]
    assert (output / "sheet.html").read_text().count("<article>") == 3
    with pytest.raises(ValueError, match="2 of the struck pairs are not in"):
        pair_triplets.main(["--output", str(output), "--drop", str(tmp_path / "struck.json")])
    (tmp_path / "struck.json").write_text("[]")
    with pytest.raises(ValueError, match=r"struck\.json.* is no list that the sheet saved"):
        pair_triplets.main(["--output", str(output), "--drop", str(tmp_path / "struck.json")])


def test_the_sheet_quotes_what_it_shows():
    row = {"image": 'a"b.png', "audio": "c&d.wav", "caption": "<script>alert(1)</script>", "caption_source": "given"}
    sheet = pair_triplets.format_sheet([json.dumps(row | {"start": 1.0, "duration": 2.0, "score": 0.5})])
    assert "<script>alert" not in sheet and "a&quot;b.png" in sheet and "c&amp;d.wav#t=1,3" in sheet


@pytest.mark.browser
def test_pairs_are_struck_in_a_browser(paired, tmp_path, browser):
    from selenium.webdriver.common.by import By

    output, pairs = paired
    browser.get((output / "sheet.html").as_uri())
    loaded = "return [...document.images].filter(i => { i.loading = 'eager'; return !i.naturalWidth }).length"
    wait_for(lambda: browser.execute_script(loaded) == 0)
    browser.execute_script("document.querySelectorAll('audio').forEach(a => { a.preload = 'metadata'; a.load() })")
    wait_for(
        lambda: browser.execute_script("return [...document.querySelectorAll('audio')].every(a => a.duration > 1)")
    )
    for width in (390, 1200):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    boxes = browser.find_elements(By.CSS_SELECTOR, "input[type=checkbox]")
    save = browser.find_element(By.ID, "save")
    assert len(boxes) == len(pairs) and not save.is_enabled()
    for box in (boxes[0], boxes[2], boxes[4], boxes[4]):
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", box)
        box.click()
    assert browser.find_element(By.ID, "progress").text == "2 of 5 struck"
    browser.save_screenshot(str(tmp_path / "sheet.png"))
    save.click()
    wait_for((tmp_path / "downloads" / "struck.json").exists)
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "pairs.jsonl").write_text((output / "pairs.jsonl").read_text())
    pair_triplets.main(["--output", str(copy), "--drop", str(tmp_path / "downloads" / "struck.json")])
    kept = [json.loads(line) for line in (copy / "pairs.jsonl").read_text().splitlines()]
    # The worst pairs come first on the sheet and last in the file.
    assert kept == [pairs[0], pairs[1], pairs[3]]
    assert PIL.Image.open(tmp_path / "sheet.png").width >= 1000


def test_two_processes_make_the_same_pairs(paired, sources, models, tmp_path):
    """Each looks at half of the pictures and listens to half of the clips."""
    output = tmp_path / "two"
    given = ["--pictures", str(sources / "pictures"), "--music", str(sources / "music"), "--output", str(output)]
    given += ["--audio_length_in_s", "2", *models]
    results = on_two_processes(tmp_path, lambda rank: pair_triplets.main(given))
    assert [status for status, _ in results] == [0, 0], results
    pairs = [json.loads(line) for line in (output / "pairs.jsonl").read_text().splitlines()]
    for one, other in zip(pairs, paired[1], strict=True):
        assert one.pop("score") == pytest.approx(other["score"], rel=1e-6)
        assert one == {name: value for name, value in other.items() if name != "score"}
    assert {path.name for path in (output / "embeddings").iterdir()} == {
        path.name for path in (paired[0] / "embeddings").iterdir()
    }

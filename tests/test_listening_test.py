import json
import re
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import listening_test
import numpy as np
import PIL.Image
import pytest
import soundfile
from conftest import photograph, wait_for

SYSTEMS = ["melfusion", "text-only", "shuffled"]
CAPTIONS = ["a calm <b>piano</b> & $bells", "loud drums", "a slow cello", "a harp"]


def tone(frequency, seconds=1.5):
    return 0.2 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * 16000)) / 16000)


@pytest.fixture
def systems(tmp_path):
    """Folders of clips, whose pitch says system and row, and the set."""
    lines = []
    for row, caption in enumerate(CAPTIONS):
        photograph(row, width=300 if row else 1200, height=700).save(tmp_path / f"{row}.png")
        soundfile.write(tmp_path / f"{row}.wav", tone(50), 16000)
        lines.append(json.dumps({"image": f"{row}.png", "audio": f"{row}.wav", "caption": caption}))
        for position, system in enumerate(SYSTEMS):
            (tmp_path / system).mkdir(exist_ok=True)
            clip = tone(pitch(system, row)) * (1 + position)
            soundfile.write(tmp_path / system / f"{row}.flac", clip, 16000)
    (tmp_path / "set.jsonl").write_text("\n".join(lines))
    return tmp_path


def pitch(system, row):
    return 200 * (1 + SYSTEMS.index(system)) + 1000 * row


def export(folder, output, *arguments):
    named = [f"{system}={folder / system}" for system in SYSTEMS]
    command = ["export", "--triplets", folder / "set.jsonl", "--systems", *named, "--audio_length_in_s", "1"]
    listening_test.main([*map(str, command), "--output", str(output), *arguments])
    return json.loads((output / "key.json").read_text())


def heard_pitch(path):
    waveform, rate = soundfile.read(path)
    assert len(waveform) == rate == 16000
    assert np.abs(waveform).max() == pytest.approx(0.5, abs=1e-3)
    return np.abs(np.fft.rfft(waveform)).argmax()


def test_clips_are_blind_and_the_key_unblinds_them(systems, tmp_path):
    key = export(systems, tmp_path / "test")
    page = tmp_path / "test" / "page"
    assert len(key["clips"]) == 12
    for clip, source in key["clips"].items():
        assert heard_pitch(page / "clips" / f"{clip}.wav") == pitch(source["system"], source["row"])
    orders = {tuple(key["clips"][f"{number}-{letter}"]["system"] for letter in "ABC") for number in range(1, 5)}
    assert len(orders) > 1 and all(sorted(order) == sorted(SYSTEMS) for order in orders)
    for path in page.rglob("*"):
        assert not any(system in path.name for system in SYSTEMS)
        if path.is_file():
            assert not any(system.encode() in path.read_bytes() for system in SYSTEMS)


def test_page_is_complete_and_self_contained(systems, tmp_path):
    export(systems, tmp_path / "test")
    page = tmp_path / "test" / "page"
    text = (page / "index.html").read_text()
    sources = re.findall(r'src="([^"]*)"', text)
    assert len(sources) == 16 and all((page / source).is_file() for source in sources)
    assert "http" not in text and "a calm &lt;b&gt;piano&lt;/b&gt; &amp; $bells" in text
    assert PIL.Image.open(page / "pictures" / "1.jpg").size == (1024, 597)


def test_the_order_depends_on_the_seed_only(systems, tmp_path):
    first, same, other = (
        export(systems, tmp_path / name, "--seed", seed) for name, seed in (("1", "3"), ("2", "3"), ("3", "4"))
    )
    assert first == same and first["clips"] != other["clips"] and first["test"] != other["test"]
    assert export(systems, tmp_path / "4", "--num_items", "2")["clips"].keys() == {
        "1-A", "1-B", "1-C", "2-A", "2-B", "2-C"
    }  # fmt: skip


def test_a_test_that_was_given_away_is_not_changed(systems, tmp_path):
    key = export(systems, tmp_path / "test")
    written = (tmp_path / "test" / "key.json").stat().st_mtime_ns
    assert export(systems, tmp_path / "test") == key
    with pytest.raises(ValueError, match="a test that was given away must not change"):
        export(systems, tmp_path / "test", "--seed", "1")
    shutil.copy(systems / "shuffled" / "1.flac", systems / "shuffled" / "2.flac")
    with pytest.raises(ValueError, match="a test that was given away must not change"):
        export(systems, tmp_path / "test")
    assert (tmp_path / "test" / "key.json").stat().st_mtime_ns == written


def test_nothing_half_written_is_left_of_a_failed_export(systems, tmp_path):
    (systems / "3.png").write_bytes(b"no picture")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="3.png' cannot be read as a picture"):
        export(systems, tmp_path / "test")
    assert sorted(tmp_path.iterdir()) == before


KEY = {
    "test": "abc",
    "clips": {
        "1-A": {"row": 4, "system": "melfusion"},
        "1-B": {"row": 4, "system": "text-only"},
        "2-A": {"row": 7, "system": "text-only"},
        "2-B": {"row": 7, "system": "melfusion"},
    },
}


def save_ratings(path, rater, overall, test="abc"):
    ratings = [{"clip": clip, "OVL": value, "REL": value / 2} for clip, value in zip(KEY["clips"], overall)]
    path.write_text(json.dumps({"test": test, "rater": rater, "ratings": ratings}))
    return path


def test_ratings_become_means_with_intervals_over_raters_and_rows(tmp_path):
    paths = [
        save_ratings(tmp_path / "1", "ann", [80, 40, 20, 60]),
        save_ratings(tmp_path / "2", "bob", [90, 50, 10, 70]),
    ]
    table = listening_test.aggregate_ratings(KEY, paths)
    # Of two groups that are resampled whole, a quarter of the draws is twice the lower and a quarter twice the higher.
    assert table["melfusion"]["OVL"] == {"mean": 75, "raters": [70, 80], "rows": [65, 85]}
    assert table["text-only"]["OVL"] == {"mean": 30, "raters": [30, 30], "rows": [15, 45]}
    assert table["melfusion"]["REL"] == {"mean": 37.5, "raters": [35, 40], "rows": [32.5, 42.5]}
    assert listening_test.aggregate_ratings(KEY, paths[:1])["melfusion"]["OVL"]["raters"] is None


def test_the_table_is_printed(tmp_path, capsys):
    (tmp_path / "key.json").write_text(json.dumps(KEY))
    ratings = save_ratings(tmp_path / "1.json", "ann", [80, 40, 20, 60])
    listening_test.main(["read", "--key", str(tmp_path / "key.json"), str(ratings)])
    printed = capsys.readouterr().out
    assert "| melfusion | 70.0 | - | [60.0, 80.0] | 35.0 | - | [30.0, 40.0] |" in printed
    assert "1 raters, 2 rows, 95% bootstrap intervals" in printed


def edit(change):
    def rewrite(path):
        saved = json.loads(path.read_text())
        change(saved)
        path.write_text(json.dumps(saved))

    return rewrite


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda path: path.unlink(), "1.json' holds no ratings that the page saved"),
        (lambda path: path.write_text("{"), "1.json' holds no ratings that the page saved"),
        (lambda path: path.write_text("[]"), "1.json' holds no ratings that the page saved"),
        (edit(lambda saved: saved["ratings"][0].pop("REL")), "1.json' holds no ratings that the page saved"),
        (edit(lambda saved: saved.update(test="xyz")), "1.json' is of another test .xyz. than the key .abc."),
        (edit(lambda saved: saved["ratings"].pop()), "1.json' does not rate every clip of the key once"),
        (edit(lambda saved: saved["ratings"].append(saved["ratings"][0])), "does not rate every clip of the key once"),
        (edit(lambda saved: saved["ratings"][1].update(OVL=101)), "rates OVL of clip 1-B as 101, not from 0 to 100"),
        (edit(lambda saved: saved["ratings"][1].update(REL="9")), "rates REL of clip 1-B as '9', not from 0 to 100"),
        (edit(lambda saved: saved["ratings"][1].update(REL=float("nan"))), "rates REL of clip 1-B as nan"),
    ],
)
def test_unusable_ratings_are_refused(tmp_path, spoil, message):
    path = save_ratings(tmp_path / "1.json", "ann", [80, 40, 20, 60])
    spoil(path)
    with pytest.raises(ValueError, match=message):
        listening_test.aggregate_ratings(KEY, [path])


def test_a_rater_counts_once(tmp_path):
    paths = [save_ratings(tmp_path / name, "ann", [80, 40, 20, 60]) for name in ("1.json", "2.json")]
    with pytest.raises(ValueError, match="2.json' is another file of the rater 'ann'"):
        listening_test.aggregate_ratings(KEY, paths)


MOST_SLIDERS = {"melfusion": {"OVL": True, "REL": True}, "text-only": {"OVL": True, "REL": False}, "shuffled": {}}


def set_sliders(browser, key, wanted):
    """Sets every slider as a user does, by the keyboard: to an end, then a step inwards."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    for clip, source in key["clips"].items():
        for scale, high in wanted[source["system"]].items():
            slider = browser.find_element(By.CSS_SELECTOR, f'[data-clip="{clip}"] [data-scale="{scale}"]')
            slider.send_keys(*((Keys.END, Keys.ARROW_LEFT) if high else (Keys.HOME, Keys.ARROW_RIGHT)))


@pytest.mark.browser
def test_the_page_is_rated_in_a_browser_and_read_back(systems, tmp_path, browser):
    from selenium.webdriver.common.by import By

    key = export(systems, tmp_path / "test")
    browser.get((tmp_path / "test" / "page" / "index.html").as_uri())
    loaded = "return [...document.images].every(i => i.naturalWidth) && [...document.querySelectorAll('audio')]"
    wait_for(lambda: browser.execute_script(loaded + ".every(a => Math.abs(a.duration - 1) < 0.01)"))
    for width in (390, 1200):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        widths = "return [...document.querySelectorAll('[type=range]')].map(s => s.clientWidth)"
        assert min(browser.execute_script(widths)) > 180
    set_sliders(browser, key, MOST_SLIDERS)
    save, rater = (browser.find_element(By.ID, name) for name in ("save", "rater"))
    rater.send_keys("Zoë B/c")
    assert browser.find_element(By.ID, "progress").text == "16 of 24 sliders set" and not save.is_enabled()
    set_sliders(browser, key, {"melfusion": {}, "text-only": {}, "shuffled": {"OVL": False, "REL": False}})
    save.click()
    saved = tmp_path / "downloads" / "ratings-Zoë-B-c.json"
    wait_for(saved.exists)
    table = listening_test.aggregate_ratings(key, [saved])
    means = {system: [table[system][scale]["mean"] for scale in ("OVL", "REL")] for system in SYSTEMS}
    assert means == {"melfusion": [99, 99], "text-only": [99, 1], "shuffled": [1, 1]}
    assert json.loads(saved.read_text())["rater"] == "Zoë B/c"


@pytest.mark.browser
def test_what_was_rated_is_there_on_a_second_visit_until_it_is_saved(systems, tmp_path, browser):
    """Over HTTP, where every browser stores what a page keeps; for files it may store nothing. The second visit is of
    the first one's process, so that nothing depends on when Chromium passes on what was stored."""
    from selenium.webdriver.common.by import By

    key = export(systems, tmp_path / "test")
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path / "test" / "page")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser.get(f"http://127.0.0.1:{server.server_port}/index.html")
        set_sliders(browser, key, MOST_SLIDERS)
        browser.find_element(By.ID, "rater").send_keys("Zoë B/c")
        stored = "return JSON.stringify({...localStorage})"
        kept, first_visit = browser.execute_script(stored), browser.current_window_handle
        browser.execute_script("window.open(location.href)")
        browser.switch_to.window(next(handle for handle in browser.window_handles if handle != first_visit))
        progress = wait_for(lambda: browser.execute_script("return document.querySelector('#progress')?.textContent"))
        assert progress == "16 of 24 sliders set", f"the first visit had kept {kept}"
        assert browser.find_element(By.ID, "rater").get_property("value") == "Zoë B/c"
        set_sliders(browser, key, {"melfusion": {}, "text-only": {}, "shuffled": {"OVL": False, "REL": False}})
        browser.find_element(By.ID, "save").click()
        wait_for((tmp_path / "downloads" / "ratings-Zoë-B-c.json").exists)
        assert browser.execute_script(stored) == "{}"
        server.shutdown()

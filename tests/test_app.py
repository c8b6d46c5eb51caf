"""The web demo: its functions, its page over HTTP, and (marked browser) the page in headless Chromium."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import app
import app_given_audio
import gradio as gr
import gradio_client
import httpx
import numpy as np
import PIL.Image
import pytest
import soundfile
import torch
from conftest import assert_near, photograph, wait_for
from gradio.data_classes import ImageData
from test_audio import polyphonic_music
from untrained import untrained_components

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.film import read_film, read_frames

ROOT = Path(__file__).parents[1]


class Recorder:
    """Keeps what a progress bar is told."""

    def __init__(self):
        self.told = []

    def __call__(self, progress, desc):
        self.told.append((progress, desc))


def make(pipe, image, seeds=(0,), progress=None, **changes):
    settings = {"audio_length_in_s": 0.32, "num_inference_steps": 3, "guidance_scale": 3.0}
    settings |= {"image_guidance_scale": 1.0, "synapse_scale": 1.0}
    progress = progress or Recorder()
    cache = app.FeatureCache(pipe)
    return app.make_music(pipe, cache, image, "a", **{**settings, **changes}, seeds=list(seeds), progress=progress)


def test_equal_pixels_and_settings_are_encoded_once(pipe, image):
    cache = app.FeatureCache(pipe)
    features = cache(image, num_inversion_steps=2)
    assert cache(image.copy(), num_inversion_steps=2) is features
    expected = pipe.encode_image(image, num_inversion_steps=2)
    assert all(torch.equal(key, expected.keys[layer]) for layer, key in features.keys.items())
    assert len(cache(image, num_inversion_steps=3).timesteps) == 3
    assert cache(photograph(1), num_inversion_steps=2) is not features
    # The same bytes in another shape are another picture.
    tall, wide = (PIL.Image.new("RGB", size, "red") for size in ((40, 48), (48, 40)))
    assert cache(tall, num_inversion_steps=2) is not cache(wide, num_inversion_steps=2)
    assert len(cache.features) == 5


def test_the_features_of_the_picture_used_longest_ago_are_dropped(pipe):
    pictures = [photograph(seed) for seed in range(3)]
    size = pipe.encode_image(pictures[0]).nbytes
    cache = app.FeatureCache(pipe, max_bytes=2 * size)
    first, second = cache(pictures[0]), cache(pictures[1])
    assert cache(pictures[0]) is first
    cache(pictures[2])
    assert sum(features.nbytes for features in cache.features.values()) == 2 * size
    assert cache(pictures[0]) is first and cache(pictures[1]) is not second
    assert len(app.FeatureCache(pipe, max_bytes=1)(pictures[0]).keys) == 6


def test_a_variation_depends_on_its_own_seed_and_the_picture(pipe, image):
    progress = Recorder()
    mels, waveforms = make(pipe, image, seeds=(3, 4), progress=progress)
    assert mels.shape == (2, 32, 8) and waveforms.shape == (2, 5120)
    assert_near(make(pipe, image, seeds=(4,))[0], mels[1:])
    assert not torch.allclose(mels[0], mels[1], atol=1e-2)
    without = make(pipe, None, seeds=(3, 4))[0]
    assert not torch.allclose(without, mels, atol=1e-3)
    assert torch.equal(make(pipe, image, seeds=(3, 4), synapse_scale=0.0)[0], without)
    looking, making = "Looking at the picture", "Making music"
    assert progress.told == [((0, 3), looking), ((1, 3), making), ((2, 3), making), ((3, 3), making)]


def test_the_picture_may_guide(pipe, image):
    plain, guided = (make(pipe, image, image_guidance_scale=scale)[0] for scale in (1.0, 6.0))
    expected = pipe(
        image, "a", audio_length_in_s=0.32, num_inference_steps=3, guidance_scale=3.0, image_guidance_scale=6.0,
        generator=torch.Generator().manual_seed(0), output_type="mel",
    ).audios  # fmt: skip
    assert_near(guided, expected)
    assert not torch.allclose(guided, plain, atol=1e-3)
    without = make(pipe, None)[0]
    assert torch.equal(make(pipe, None, image_guidance_scale=6.0)[0], without)


def respond(pipe, image, prompt, *changes):
    """Calls what the button calls; the files are there until the generator goes on."""
    settings = (0.32, 2, 3.0, 1.0, 1.0, 7, 2)
    function = app.responder(pipe, app.FeatureCache(pipe))
    return function(image, prompt, *changes, *settings[len(changes) :], progress=Recorder())


def test_the_button_gives_files_for_each_variation_and_hides_the_others(pipe, image):
    generator = respond(pipe, image, "A waltz, / for <piano>!")
    outputs = next(generator)
    assert len(outputs) == 4 * app.MAX_VARIATIONS
    for index, seed in enumerate((7, 8)):
        column, audio, download, drawing = outputs[4 * index : 4 * index + 4]
        assert (
            column["visible"]
            and audio["label"] == f"Variation with seed {seed}"
            and audio["value"] == download["value"]
        )
        assert download["visible"] and drawing["visible"]
        download, drawing = download["value"], drawing["value"]
        assert Path(download).name == f"a-waltz-for-piano-{seed}.wav"
        waveform, rate = soundfile.read(download)
        assert rate == 16000 and len(waveform) == 5120 and np.abs(waveform).max() > 1e-3
        assert PIL.Image.open(drawing).size == (880, 400)
    for index in (2, 3):
        assert outputs[4 * index]["visible"] is False and outputs[4 * index + 1 : 4 * index + 4] == [None] * 3
    assert next(generator, None) is None
    assert not Path(outputs[1]["value"]).exists()


@pytest.mark.parametrize(
    "prompt, changes, message",
    [
        ("  ", (), "choose a picture, write a sentence, or both"),
        ("a" * 301, (), "longer than 300 characters"),
        ("a", (0.001,), "`audio_length_in_s` must be finite and in"),
        ("a", (float("nan"),), "`audio_length_in_s` must be finite"),
        ("a", (0.32, 2, 3.0, 1.0, 1.0, float("nan")), "cannot convert float NaN"),
        ("a", (0.32, 0), "`num_inference_steps` must be in"),
    ],
)
def test_what_cannot_work_is_told_nicely(pipe, prompt, changes, message):
    with pytest.raises(gr.Error, match=re.escape(message)):
        next(respond(pipe, None, prompt, *changes))


def test_damaged_weights_are_told_and_names_are_no_html(pipe, image):
    with torch.no_grad():
        pipe.unet.conv_out.weight[0, 0] = float("nan")
    with pytest.raises(gr.Error, match="NaN or infinite values appeared in denoising"):
        next(respond(pipe, image, "a"))
    assert app.user_error("<script>").message == "&lt;script&gt;"


def open_upload(path):
    picture = app.PictureInput(type="pil", image_mode=None)
    return picture.preprocess(ImageData(path=str(path), orig_name=path.name))


def test_uploads_are_opened_upright(tmp_path):
    picture = photograph(width=48, height=32)
    exif = PIL.Image.Exif()
    exif[274] = 6
    picture.save(tmp_path / "turned.png", exif=exif)
    opened = open_upload(tmp_path / "turned.png")
    assert opened.size == (32, 48)
    assert np.array_equal(np.asarray(opened), np.rot90(np.asarray(picture), -1))
    assert app.PictureInput(type="pil").preprocess(None) is None


def test_uploads_that_are_no_usable_picture_are_told_nicely(tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    photograph(width=400, height=300).save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:9000])
    (tmp_path / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    for name in ("text.jpg", "half.jpg", "drawing.svg"):
        with pytest.raises(gr.Error, match="cannot be read as a picture"):
            open_upload(tmp_path / name)
    for side in (8_000, 20_000):
        PIL.Image.new("1", (side, side)).save(tmp_path / "huge.png")
        with pytest.raises(gr.Error, match="more than 50,000,000 pixels"):
            open_upload(tmp_path / "huge.png")


@pytest.fixture
def served(pipe, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    page = app.build_app(pipe)
    yield page, app.launch_app(page, prevent_thread_lock=True, quiet=True)
    page.close()


def test_the_page_is_served_with_its_limits(served, pipe, tmp_path):
    page, address = served
    sliders = {block.label: block for block in page.blocks.values() if isinstance(block, gr.Slider)}
    assert list(sliders) == [
        *("Length (s)", "Steps", "Guidance", "Picture guidance", "Synapse scale", "Seed", "Variations"),
        "Seconds for each picture",
        *("From (s)", "To (s)", "Until (s)", "Strength"),
    ]
    assert sliders["Length (s)"].value == 0.32 and sliders["Variations"].maximum == app.MAX_VARIATIONS
    config = httpx.get(f"{address}config").json()
    labelled = [part["props"] for part in config["components"] if part["props"].get("label") == "Picture"]
    # A tab has that name too.
    (picture,) = [props for props in labelled if "sources" in props]
    assert picture["sources"] == ["upload", "webcam"]
    (examples,) = [part["props"] for part in config["components"] if part["type"] == "dataset"]
    assert len(examples["samples"]) == len(list((ROOT / "examples" / "images").glob("*.jpg")))
    assert page._queue.max_size == app.MAX_QUEUE and page.delete_cache == (60, app.KEPT_SECONDS)
    names = ("make_music", "make_slideshow", "change_music")
    events = [function for function in page.fns.values() if function.api_name in names]
    assert len(events) == 3 and {(event.concurrency_limit, event.concurrency_id) for event in events} == {
        (1, "pipeline")
    }

    upload = {"files": ("large.jpg", b"x" * 10_500_000)}
    assert httpx.post(f"{address}gradio_api/upload", files=upload).status_code == 413
    assert httpx.post(f"{address}gradio_api/upload", files={"files": ("small.jpg", b"x")}).status_code == 200


def test_music_is_made_over_http_and_errors_arrive(served, tmp_path):
    _, address = served
    photograph().save(tmp_path / "picture.png")
    client = gradio_client.Client(address, verbose=False, download_files=tmp_path)
    picture = gradio_client.handle_file(tmp_path / "picture.png")
    result = client.predict(picture, "a harp", 1.0, 2, 3.0, 1.0, 1.0, 5, 1, api_name="/make_music")
    audio, download = result[0], result[1]
    waveform, rate = soundfile.read(audio["value"])
    assert rate == 16000 and len(waveform) == 16000 and audio["label"] == "Variation with seed 5"
    assert Path(download["value"]).read_bytes() == Path(audio["value"]).read_bytes()
    (tmp_path / "text.png").write_text("no picture")
    for file, prompt, variations, message in (
        (None, "", 1, "There is nothing to make music of"),
        (None, "a", 5, "greater than maximum"),
        (gradio_client.handle_file(tmp_path / "text.png"), "a", 1, "cannot be read as a picture"),
    ):
        with pytest.raises(gradio_client.exceptions.AppError, match=message):
            client.predict(file, prompt, 1.0, 2, 3.0, 1.0, 1.0, 5, variations, api_name="/make_music")


def test_a_slide_show_is_made_over_http_in_the_order_of_the_files(served, pipe, tmp_path):
    _, address = served
    pipe.register_to_config(default_num_inference_steps=2)
    for name, colour in (("b", "red"), ("a", "blue")):
        PIL.Image.new("RGB", (60, 40), colour).save(tmp_path / f"{name}.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "films").mkdir()
    client = gradio_client.Client(address, verbose=False, download_files=tmp_path / "films")

    def make(*names, prompt="a harp", seconds=2.0):
        files = [gradio_client.handle_file(tmp_path / f"{name}.png") for name in names]
        return client.predict(files, prompt, seconds, 3, api_name="/make_slideshow")

    video, download = make("b", "a")
    path = video["video"] if isinstance(video, dict) else video
    film = read_film(path)
    assert Path(path).name == "a-harp.mp4" and film.duration == pytest.approx(4, abs=0.01)
    first, last = read_frames(film, [0.5, 3.5])
    assert first.size == (1280, 720)
    assert first.getpixel((640, 360))[0] > 200 and last.getpixel((640, 360))[2] > 200
    for arguments, message in (
        ({"names": []}, "takes 1 to 24 pictures, and there are 0"),
        ({"names": ["a"] * 25}, "takes 1 to 24 pictures, and there are 25"),
        ({"names": ["a", "text"]}, "text.png cannot be read as a picture"),
        ({"names": ["a"], "prompt": " "}, "Say in 1 to 300 characters what should play"),
        ({"names": ["a"], "seconds": 60.0}, "greater than maximum"),
    ):
        with pytest.raises(gradio_client.exceptions.AppError, match=message):
            make(*arguments.pop("names"), **arguments)


@pytest.mark.parametrize("seconds", [5.996, 5.991, 6.0, 119.999, 120.0])
def test_sliders_end_within_the_music_and_go_on_from_its_end(seconds):
    most, least = app_given_audio.slider_limits(seconds)
    assert seconds - 0.01 < most <= seconds <= least < seconds + 0.01 and least <= app_given_audio.MAX_SECONDS


def test_music_of_the_user_is_changed_over_http(served, pipe, tmp_path):
    _, address = served
    pipe.register_to_config(default_num_inference_steps=2)
    given = polyphonic_music(16000, 1.2).astype(np.float32) / 3
    soundfile.write(tmp_path / "song.wav", given, 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "long.flac", np.zeros(121 * 8000), 8000)
    (tmp_path / "text.wav").write_text("no music")
    soundfile.write(tmp_path / "whole.flac", given, 16000)
    content = (tmp_path / "whole.flac").read_bytes()
    (tmp_path / "damaged.flac").write_bytes(content[: len(content) // 2] + bytes(len(content) // 2))
    photograph().save(tmp_path / "picture.png")
    (tmp_path / "made").mkdir()
    client = gradio_client.Client(address, verbose=False, download_files=tmp_path / "made")

    def change(choice, name="song.wav", start=0.4, end=0.8, prompt="a harp", seed=3):
        file = None if name is None else gradio_client.handle_file(tmp_path / name)
        arguments = (file, choice, start, end, 2.0, 0.5, gradio_client.handle_file(tmp_path / "picture.png"), prompt)
        changed, download, drawing = client.predict(*arguments, seed, api_name="/change_music")
        assert Path(download["value"]).name == "song-3.wav" and PIL.Image.open(drawing["value"]).size == (880, 400)
        return soundfile.read(changed, dtype="float32")[0]

    anew = change(app_given_audio.ANEW)
    assert len(anew) == 19200
    # Written and read again with 16 bits.
    differs = np.abs(anew - given) > 2**-15
    assert differs[6400:12800].any() and not differs[:6400].any() and not differs[12800:].any()
    longer = change(app_given_audio.GO_ON)
    assert len(longer) == 32000 and np.abs(longer[:19200] - given).max() <= 2**-15 and longer[19200:].any()
    varied = change(app_given_audio.VARY)
    assert len(varied) == 19200 and np.abs(varied - given).max() > 0.01
    for arguments, message in (
        ({"name": None}, "There is no music to begin with"),
        ({"name": "text.wav"}, "text.wav cannot be read as music"),
        ({"name": "long.flac"}, "long.flac lasts 121 s, more than 120 s"),
        ({"name": "damaged.flac"}, "damaged.flac cannot be read as music"),
        ({"start": 0.8, "end": 0.4}, "The stretch from 0.8 to 0.4 s must end after it begins, and within 1.20 s"),
        ({"end": 1.5}, "must end after it begins, and within 1.20 s"),
        ({"prompt": "a" * 301}, "longer than 300 characters"),
        ({"seed": None}, "The seed is empty: write a whole number"),
    ):
        with pytest.raises(gradio_client.exceptions.AppError, match=message):
            change(app_given_audio.ANEW, **arguments)


@pytest.fixture
def running(tmp_path):
    """The app as a user starts it; gives its address."""
    MelFusionPipeline(**untrained_components(mel_bands=64, latent_frames=64)).save_pretrained(tmp_path / "checkpoint")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / "examples" / "app.py", "--checkpoint", tmp_path / "checkpoint", "--port", port]
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(tmp_path / "gradio")}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(list(map(str, command)), env=environment, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}/"
    try:
        wait_for(lambda: process.poll() is not None or answers(address))
        assert process.poll() is None, (tmp_path / "log").read_text()
        yield address
    finally:
        process.terminate()
        process.wait()


def answers(address):
    try:
        return httpx.get(address).status_code == 200
    except httpx.TransportError:
        return False


class Page:
    """The page as a user handles it."""

    def __init__(self, browser, tmp_path):
        self.browser, self.downloads = browser, tmp_path / "downloads"

    def find(self, selector, text=None):
        """The visible elements of a CSS selector whose text starts with `text`; none while they are drawn anew."""
        from selenium.common.exceptions import StaleElementReferenceException

        found = self.browser.find_elements("css selector", selector)
        try:
            return [each for each in found if each.is_displayed() and (text is None or each.text.startswith(text))]
        except StaleElementReferenceException:
            return []

    def click(self, selector, text=None, index=0):
        from selenium.common.exceptions import StaleElementReferenceException

        def click_once():
            if len(elements := self.find(selector, text)) <= index:
                return False
            try:
                # Out of the way of messages, which lie above.
                self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", elements[index])
                elements[index].click()
            except StaleElementReferenceException:
                return False
            return True

        wait_for(click_once)

    def choose(self, path):
        """Uploads a file where there is no picture yet."""
        wait_for(lambda: self.browser.find_elements("css selector", "input[type=file]"))
        self.browser.find_element("css selector", "input[type=file]").send_keys(str(path))

    def remove_picture(self):
        self.click("button[aria-label='Remove Image']")

    def reads(self, text):
        return text in self.browser.find_element("css selector", "body").text

    def wait_for_message(self, text):
        wait_for(lambda: any(text in message.text for message in self.find("[data-testid=toast-body]")))

    def make_music(self):
        self.click("button", "Make music")
        wait_for(lambda: self.reads("Making music"))
        wait_for(lambda: not self.reads("Making music") and self.find("button[aria-label=Play]"))

    def download(self, index=0):
        before = set(self.downloads.glob("*.wav"))
        self.click("button", "Download WAV", index)
        (path,) = wait_for(lambda: set(self.downloads.glob("*.wav")) - before)
        return soundfile.read(path)

    def resize(self, width, height, mobile):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def fits(self):
        """Whether nothing sticks out at the side."""
        return self.browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")

    def photograph(self, name, position=0):
        """Keeps a screenshot for people, from `position` pixels below the top."""
        folder = ROOT / "build" / "screenshots"
        folder.mkdir(parents=True, exist_ok=True)
        self.browser.execute_script(f"window.scrollTo(0, {position})")
        self.browser.save_screenshot(str(folder / f"{name}.png"))


@pytest.mark.browser
def test_the_page_in_a_browser(running, browser, tmp_path):
    page = Page(browser, tmp_path)
    page.resize(1280, 900, mobile=False)
    browser.get(running)
    page.click("button", "Make music")
    page.wait_for_message("There is nothing to make music of")

    images = ROOT / "examples" / "images"
    page.choose(images / "fog.jpg")
    wait_for(lambda: page.find("button[aria-label='Remove Image']"))
    browser.find_element("css selector", "textarea").send_keys("a waltz for piano")
    page.make_music()
    page.click("button[aria-label=Play]")
    wait_for(lambda: page.find("#time", "0:01"))
    first, rate = page.download()
    assert rate == 16000 and len(first) == 2.56 * rate and np.abs(first).max() > 1e-3
    assert page.fits()
    page.photograph("desktop")

    page.remove_picture()
    page.click("button.gallery-item")
    wait_for(lambda: page.find("button[aria-label='Remove Image']"))
    page.make_music()
    second, _ = page.download()
    assert np.abs(second - first).max() > 1e-3

    page.remove_picture()
    (tmp_path / "text.jpg").write_text("no picture")
    page.choose(tmp_path / "text.jpg")
    page.wait_for_message("This file cannot be read as a picture")
    # It is taken away again.
    wait_for(lambda: not page.find("button[aria-label='Remove Image']"))
    page.photograph("desktop_error")
    (tmp_path / "large.jpg").write_bytes(b"x" * 10_500_000)
    page.choose(tmp_path / "large.jpg")
    page.wait_for_message("exceed the maximum allowed size")


@pytest.mark.browser
def test_the_page_on_a_phone(running, browser, tmp_path):
    from selenium.webdriver.common.keys import Keys

    page = Page(browser, tmp_path)
    page.resize(390, 844, mobile=True)
    browser.get(running)
    page.click("button.gallery-item", index=4)
    wait_for(lambda: page.find("button[aria-label='Remove Image']"))
    page.photograph("phone")
    page.click("button", "Settings")
    sliders = wait_for(lambda: page.find("input[type=range]"))
    assert len(sliders) == 7 and min(slider.size["width"] for slider in sliders) > 180
    sliders[-1].send_keys(Keys.ARROW_RIGHT)
    page.photograph("phone_settings", position=700)
    page.make_music()
    wait_for(lambda: len(page.find("button", "Download WAV")) == 2)
    waveforms = [page.download(index)[0] for index in range(2)]
    assert np.abs(waveforms[0] - waveforms[1]).max() > 1e-3
    assert page.fits() and browser.execute_script("return window.innerWidth") == 390
    page.photograph("phone_music", position=1250)
    page.remove_picture()
    (tmp_path / "text.jpg").write_text("no picture")
    page.choose(tmp_path / "text.jpg")
    page.wait_for_message("This file cannot be read as a picture")
    wait_for(lambda: not page.find("button[aria-label='Remove Image']"))
    page.photograph("phone_error")


@pytest.mark.browser
@pytest.mark.parametrize("width, height, name", [(1280, 900, "desktop"), (390, 844, "phone")])
def test_a_slide_show_is_made_and_watched_in_a_browser(running, browser, tmp_path, width, height, name):
    page = Page(browser, tmp_path)
    page.resize(width, height, mobile=name == "phone")
    browser.get(running)
    page.click("button[role=tab]", "Slide show")
    page.click("button", "Make a slide show")
    page.wait_for_message("A slide show takes 1 to 24 pictures, and there are 0")
    images = [ROOT / "examples" / "images" / f"{one}.jpg" for one in ("fog", "lightning", "dandelions")]
    wait_for(lambda: browser.find_elements("css selector", "input[type=file][multiple]"))
    browser.find_element("css selector", "input[type=file][multiple]").send_keys("\n".join(map(str, images)))
    wait_for(lambda: len(page.find(".grid-container img")) == 3)
    (sentence,) = page.find("textarea")
    sentence.send_keys("a waltz for piano")
    page.click("button", "Make a slide show")
    wait_for(lambda: page.find("button", "Download MP4"))
    video = "document.querySelector('video')"
    wait_for(lambda: browser.execute_script(f"return {video} && {video}.readyState >= 2"))
    assert browser.execute_script(f"return {video}.duration") == pytest.approx(15, abs=0.1)
    browser.execute_script(f"{video}.muted = true; {video}.play()")
    wait_for(lambda: browser.execute_script(f"return {video}.currentTime > 0.5"))
    assert page.fits()
    page.photograph(f"{name}_slideshow", position=0 if name == "desktop" else 700)
    page.click("button", "Download MP4")
    (path,) = wait_for(lambda: set(page.downloads.glob("*.mp4")))
    assert read_film(path).duration == pytest.approx(15, abs=0.1)


@pytest.mark.browser
@pytest.mark.parametrize("width, height, name", [(1280, 900, "desktop"), (390, 844, "phone")])
def test_a_stretch_of_music_is_marked_and_made_anew_in_a_browser(running, browser, tmp_path, width, height, name):
    given = polyphonic_music(16000, 6.0).astype(np.float32) / 3
    soundfile.write(tmp_path / "song.wav", given, 16000)
    page = Page(browser, tmp_path)
    page.resize(width, height, mobile=name == "phone")
    browser.get(running)
    page.click("button[role=tab]", "Your music")
    page.click("button", "Change the music")
    page.wait_for_message("There is no music to begin with")
    music = "input[type=file][accept*=audio]"
    wait_for(lambda: browser.find_elements("css selector", music))
    browser.find_element("css selector", music).send_keys(str(tmp_path / "song.wav"))
    wait_for(lambda: [slider.get_attribute("value") for slider in page.find("input[type=range]")][:2] == ["2", "4"])
    (sentence,) = page.find("textarea")
    sentence.send_keys("a waltz for piano")
    page.click("button", "Change the music")
    wait_for(lambda: page.find("button", "Download WAV"))
    assert page.fits()
    page.photograph(f"{name}_own_music", position=0 if name == "desktop" else 900)
    changed, rate = page.download()
    differs = np.abs(changed - given) > 2**-14
    assert rate == 16000 and len(changed) == 96000
    assert differs[32000:64000].mean() > 0.9 and not differs[:32000].any() and not differs[64000:].any()

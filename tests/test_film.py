"""Slide shows and films: real files of a few seconds, made here with PyAV and read back with it."""

import io
import math
import signal
import sys
import time

import av
import numpy as np
import PIL.Image
import PIL.ImageStat
import pytest
from conftest import wait_for
from films import COLOURS, RATE, RGB, clicks, write_film
from processes import prints, start

from melfusion_pipeline import film as film_module
from melfusion_pipeline.film import choose_frame, find_shots, read_film, read_frames, read_shots, split_shots
from melfusion_pipeline.onsets import find_onsets, move_to_onsets, share_met, share_met_by_chance
from melfusion_pipeline.scoring import check_container, write_scored_film, write_slideshow


def read_sound(path, rate=RATE):
    """The sound of a file, mono, on the clock of the file."""
    resampler = av.AudioResampler("fltp", "mono", rate)
    with av.open(str(path)) as container:
        blocks = []
        for frame in container.decode(audio=0):
            if not blocks:
                blocks.append(np.zeros(max(0, round(frame.time * rate)), np.float32))
            blocks += [one.to_ndarray()[0] for one in resampler.resample(frame)]
        blocks += [one.to_ndarray()[0] for one in resampler.resample(None)]
    return np.concatenate(blocks)


def packets(path):
    with av.open(str(path)) as container:
        return [(round(float(packet.pts * packet.time_base), 3), bytes(packet))
                for packet in container.demux(video=0) if packet.size]  # fmt: skip


def colour_of(picture, box=None):
    """The name of the nearest colour, of the lower right quarter unless `box` is given as shares of the sides."""
    left, top, right, bottom = box or (0.6, 0.6, 0.9, 0.9)
    part = picture.crop([round(left * picture.width), round(top * picture.height), round(right * picture.width),
                         round(bottom * picture.height)])  # fmt: skip
    mean = PIL.ImageStat.Stat(part).mean
    known = RGB | {"white": (255, 255, 255), "black": (0, 0, 0)}
    name, value = min(known.items(), key=lambda item: math.dist(item[1], mean))
    assert math.dist(value, mean) < 40, (name, mean)
    return name


# ---------------------------------------- reading


def test_a_film_is_looked_through_and_its_pictures_read_at_any_second(tmp_path):
    film = read_film(write_film(tmp_path / "film.mp4", sound=clicks([1], 6)))
    # The sound lasts longer; the pictures count.
    assert film.duration == pytest.approx(4, abs=0.001) and film.num_frames == 100 and film.has_sound
    assert film.start == 0 and film.keyframes[0] == 0 and len(film.keyframes) >= 5
    times = (0.0, 0.98, 1.0, 1.5, 3.99, 2.5, 0.5, 9.0)
    seen = [colour_of(picture) for picture in read_frames(film, times)]
    assert seen == ["red", "red", "lime", "lime", "yellow", "blue", "red", "yellow"]
    (picture,) = read_frames(film, [0.5])
    assert picture.size == (64, 48) and colour_of(picture, (0.1, 0.1, 0.4, 0.4)) == "white"


CORNERS = {
    "upper left": (0.1, 0.1, 0.4, 0.4),
    "upper right": (0.6, 0.1, 0.9, 0.4),
    "lower left": (0.1, 0.6, 0.4, 0.9),
    "lower right": (0.6, 0.6, 0.9, 0.9),
}


def white_corners(picture):
    return [name for name, box in CORNERS.items() if colour_of(picture, box) == "white"]


# `test_films_play_in_a_browser` shows that Chromium turns them the same way.
@pytest.mark.parametrize("rotation, corner", [(90, "lower left"), (180, "lower right"), (270, "upper right")])
def test_a_film_turned_by_its_metadata_is_read_upright_and_stays_turned(tmp_path, rotation, corner):
    source = read_film(write_film(tmp_path / "film.mp4", rotation=rotation))
    write_scored_film(tmp_path / "scored.mp4", source, clicks([1], 4), RATE)
    for film in (source, read_film(tmp_path / "scored.mp4")):
        (picture,) = read_frames(film, [0.5])
        assert picture.size == ((64, 48) if rotation == 180 else (48, 64))
        assert white_corners(picture) == [corner]


def test_a_film_whose_frame_rate_varies_keeps_its_times(tmp_path):
    rng = np.random.default_rng(0)
    times = np.concatenate([[0], np.cumsum(rng.uniform(0.012, 0.15, 60))]).round(3)
    times = times[times < 4]
    film = read_film(write_film(tmp_path / "film.mp4", times))
    assert film.num_frames == len(times) and times[-1] < film.duration < times[-1] + 0.2
    assert find_shots(film) == pytest.approx(
        [0, *(times[np.searchsorted(times, cut)] for cut in (1, 2, 3))], abs=0.002
    )
    between = (times[:-1] + times[1:]) / 2
    seen = [colour_of(picture) for picture in read_frames(film, between)]
    assert seen == [COLOURS[int(begin) % 4] for begin in times[:-1]]
    write_scored_film(tmp_path / "scored.mp4", film, clicks([1], 4), RATE)
    assert packets(tmp_path / "scored.mp4") == packets(film.path)


def test_a_clock_that_does_not_begin_at_zero_is_put_right(tmp_path):
    sound = clicks([1, 2.5], 4)
    film = read_film(write_film(tmp_path / "film.mkv", start=1.4, sound=sound))
    assert film.start == pytest.approx(1.4, abs=0.001) and film.duration == pytest.approx(4, abs=0.05)
    assert [colour_of(picture) for picture in read_frames(film, [0.5, 1.5, 2.5])] == ["red", "lime", "blue"]
    assert find_shots(film) == pytest.approx([0, 1, 2, 3], abs=0.005)
    write_scored_film(tmp_path / "scored.mp4", film, np.zeros(4 * RATE, np.float32), RATE, old_sound="keep")
    scored = read_film(tmp_path / "scored.mp4")
    assert scored.start == 0 and scored.duration == pytest.approx(4, abs=0.05)
    assert find_onsets(read_sound(scored.path), RATE)[0] == pytest.approx([1, 2.5], abs=0.03)


def test_pictures_are_found_in_a_stream_without_an_index(tmp_path):
    film = read_film(write_film(tmp_path / "camcorder.mts"))
    times = (0.0, 0.5, 1.5, 3.9, 2.5, 0.5, 3.02)
    seen = [colour_of(picture) for picture in read_frames(film, times)]
    assert seen == ["red", "red", "lime", "yellow", "blue", "red", "yellow"]


def test_pixels_that_are_not_square_are_made_square(tmp_path):
    film = read_film(write_film(tmp_path / "film.mp4", vf="", **{"x264-params": "sar=2/1"}))
    (picture,) = read_frames(film, [0.5])
    assert picture.size == (128, 48)


def test_files_without_pictures_are_refused_by_name(tmp_path):
    (tmp_path / "text.mp4").write_text("no film")
    with pytest.raises(ValueError, match=r"text.mp4' cannot be read as a film"):
        read_film(tmp_path / "text.mp4")
    with pytest.raises(FileNotFoundError):
        read_film(tmp_path / "none.mp4")
    for name in ("picture.jpg", "picture.png"):
        PIL.Image.new("RGB", (32, 32), "red").save(tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name}' is a picture and no film: make a slide show"):
            read_film(tmp_path / name)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        track = container.add_stream("aac", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(clicks([0], 1)[None], format="fltp", layout="mono")
        frame.sample_rate = RATE
        container.mux(track.encode(frame))
        container.mux(track.encode(None))
    with pytest.raises(ValueError, match=r"sound.mp4' has no video stream"):
        read_film(tmp_path / "sound.mp4")
    write_film(tmp_path / "empty.mkv", times=[], sound=clicks([0], 1))
    with pytest.raises(ValueError, match=r"empty.mkv' has a video stream without a picture in it"):
        read_film(tmp_path / "empty.mkv")
    whole = write_film(tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half.mp4' cannot be read as a film"):
        read_film(tmp_path / "half.mp4")


def test_the_cover_of_a_song_is_no_film(tmp_path):
    PIL.Image.new("RGB", (32, 32), "red").save(tmp_path / "cover.png")
    with av.open(str(tmp_path / "song.mp3"), "w") as container:
        track = container.add_stream("libmp3lame", rate=44100, layout="mono")
        cover = container.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(clicks([0], 1, 44100)[None], format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(cover.encode(av.VideoFrame.from_image(PIL.Image.open(tmp_path / "cover.png").convert("RGB"))))
        container.mux(track.encode(frame))
        container.mux(track.encode(None))
    with pytest.raises(ValueError, match="has no video stream"):
        read_film(tmp_path / "song.mp3")


def test_a_film_of_one_picture_lasts_one_picture(tmp_path):
    film = read_film(write_film(tmp_path / "film.mkv", times=[0.0]))
    assert film.num_frames == 1 and 0 < film.duration <= 0.1
    assert find_shots(film) == [0.0]


# ---------------------------------------- shots


def test_cuts_are_found_and_a_film_without_one_is_one_shot(tmp_path):
    assert find_shots(read_film(write_film(tmp_path / "film.mp4"))) == pytest.approx([0, 1, 2, 3], abs=0.001)
    assert find_shots(read_film(write_film(tmp_path / "one.mp4", shot=10))) == [0.0]
    assert av.logging.get_level() is None


@pytest.mark.parametrize(
    "text, starts",
    [
        ("start\n0\n1.5\n3\n", [0, 1.5, 3]),
        ("\ufeffshot,start,note\n1,1.5,a kiss\n2,3.25,\n", [0, 1.5, 3.25]),
        ("Scene Number,Start Time (seconds)\n1,0.000\n2,2.500\n", [0, 2.5]),
        ("start\n", [0]),
    ],
)
def test_shots_may_come_from_a_table(tmp_path, text, starts):
    (tmp_path / "shots.csv").write_text(text, encoding="utf-8")
    assert read_shots(tmp_path / "shots.csv", 4.0) == starts


@pytest.mark.parametrize(
    "text, message",
    [
        ("begin\n1\n", r"has no column 'start': its header is \['begin'\]"),
        ("", "has no column 'start': its header is None"),
        ("start\n0,5\n", "row 1 has more columns than the header: .* decimals have a point"),
        ("start\n1\none\n", "row 2: the shot begins at 'one'"),
        ("start\n1\nnan\n", "row 2: the shot begins at 'nan'"),
        ("start\n1\n1\n", "row 2: the shot begins at '1', but must begin after the one before it"),
        ("start\n-1\n", "row 1: the shot begins at '-1'"),
        ("start\n1\n4.0\n", r"row 2: the shot begins at '4.0'.*before the film ends \(4.00 s\)"),
    ],
)
def test_tables_that_do_not_fit_the_film_are_refused_by_row(tmp_path, text, message):
    (tmp_path / "shots.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_shots(tmp_path / "shots.csv", 4.0)


def test_long_shots_get_several_pictures():
    assert split_shots([0, 5], 35, 10) == ([0, 5, 15, 25], [0, 1, 1, 1])
    assert split_shots([0.0], 10, 10) == ([0], [0])


def test_the_picture_of_a_stretch_is_like_the_others_in_it(tmp_path):
    film = read_film(write_film(tmp_path / "film.mp4", shot=2))
    # Of the five pictures one is of the shot before.
    second, picture = choose_frame(film, 1.5, 3.9)
    assert 2 < second < 3.9 and colour_of(picture) == "lime"


# ---------------------------------------- onsets


def test_onsets_are_found_where_they_are_also_across_blocks():
    times = np.arange(0.4, 123, 0.73)
    onsets, strengths = find_onsets(clicks(times, 124), RATE)
    assert len(onsets) == len(times) and onsets == pytest.approx(times, abs=0.025)
    assert (strengths > 0).all()
    for rate in (22050, 48000):
        assert find_onsets(clicks([0.5, 1.5], 3, rate), rate)[0] == pytest.approx([0.5, 1.5], abs=0.03)
    assert len(find_onsets(np.zeros(RATE, np.float32), RATE)[0]) == 0


def test_changes_move_to_the_strongest_onset_within_reach():
    onsets, strengths = np.array([4.7, 5.3, 9.4, 14.6]), np.array([1.0, 2.0, 9.0, 1.0])
    assert move_to_onsets([0, 5, 10, 15], 20, onsets, strengths) == [0, 5.3, 10, 14.6]
    assert move_to_onsets([0, 5, 10, 15], 20, onsets, strengths, reach=0.7) == [0, 5.3, 9.4, 14.6]
    assert move_to_onsets([0.0], 20, onsets, strengths) == [0.0]
    assert move_to_onsets([0.0, 5], 20, np.zeros(0), np.zeros(0)) == [0, 5]


def test_changes_stay_in_order_however_short_the_stretches():
    rng = np.random.default_rng(0)
    for _ in range(200):
        starts = np.concatenate([[0], np.cumsum(rng.uniform(0.05, 1.5, 20))])
        onsets = np.sort(rng.uniform(0, starts[-1] + 1, 100))
        moved = move_to_onsets(starts.tolist(), starts[-1] + 1, onsets, rng.uniform(size=100))
        lengths = np.diff([*starts, starts[-1] + 1])
        assert moved[0] == 0 and (np.diff([*moved, starts[-1] + 1]) >= lengths / 3 - 1e-9).all()


def test_cuts_met_are_counted_beside_chance():
    cuts, onsets = [1.0, 2.0, 3.0, 4.0], np.array([1.09, 1.95, 3.2, 9.0])
    assert share_met(cuts, onsets) == 0.5 and share_met(cuts, np.zeros(0)) == 0
    assert math.isnan(share_met([], onsets))
    # One onset a second: a window of 0.2 s around it is met by a fifth of all shifts, by all cuts at once.
    arguments = (10, np.random.default_rng(0), 5000)
    whole, halves = np.arange(11.0), np.arange(10) + 0.5
    assert share_met_by_chance(cuts, [whole], *arguments) == pytest.approx(0.2, abs=0.02)
    assert share_met_by_chance(cuts, [whole, halves], *arguments) == pytest.approx(0.4, abs=0.025)


# ---------------------------------------- writing


def test_a_slide_show_shows_each_picture_in_its_time_and_sounds_as_given(tmp_path):
    waveform = clicks([0.5, 1.5, 2.5], 4)
    pictures = (PIL.Image.new("RGB", (300, 200), colour) for colour in COLOURS)
    path = tmp_path / "show.mp4"
    write_slideshow(path, pictures, [0, 0.98, 2, 3], waveform, RATE, size=(128, 128), fade_in_s=0.2)
    assert [file.name for file in tmp_path.iterdir()] == ["show.mp4"]
    film = read_film(path)
    assert film.duration == pytest.approx(4, abs=0.001) and film.num_frames == 100
    times = (0.5, 0.86, 1.1, 1.5, 2.5, 3.5, 3.99)
    seen = [colour_of(picture, (0.3, 0.4, 0.7, 0.6)) for picture in read_frames(film, times)]
    assert seen == ["red", "red", "lime", "lime", "blue", "yellow", "yellow"]
    (picture,) = read_frames(film, [0.5])
    assert picture.size == (128, 128) and colour_of(picture, (0.1, 0.02, 0.9, 0.12)) == "black"
    # In the middle of a fade both pictures are seen.
    (middle,) = read_frames(film, [2.0])
    red, green, blue = PIL.ImageStat.Stat(middle.crop((40, 50, 88, 78))).mean
    assert 90 < green < 165 and 90 < blue < 165 and red < 30
    sound = read_sound(path)
    assert len(sound) == pytest.approx(4 * RATE, abs=0.05 * RATE)
    assert np.corrcoef(sound[: len(waveform)], waveform[: len(sound)])[0, 1] > 0.98
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert container.streams.audio[0].codec_context.name == "aac"
        assert (packet := next(container.demux())).size and packet.pts is not None
    # The index comes first.
    assert path.read_bytes().find(b"moov") < path.read_bytes().find(b"mdat")


def test_cropped_pictures_fill_the_size_and_without_a_fade_they_change_at_once(tmp_path):
    waveform = clicks([0.5], 2)
    pictures = [PIL.Image.new("RGB", (40, 200), "red"), PIL.Image.new("L", (500, 100), 255)]
    write_slideshow(tmp_path / "a.mp4", pictures, [0, 1], waveform, RATE, (128, 64), crop=True, fade_in_s=0)
    before, after = read_frames(read_film(tmp_path / "a.mp4"), [0.98, 1.0])
    for box in ((0, 0, 0.2, 0.2), (0.8, 0.8, 1, 1)):
        assert colour_of(before, box) == "red" and colour_of(after, box) == "white"


def test_fades_are_no_longer_than_the_pictures_last(tmp_path):
    pictures = [PIL.Image.new("RGB", (64, 64), colour) for colour in COLOURS]
    write_slideshow(tmp_path / "a.mp4", pictures, [0, 0.2, 0.4, 0.6], clicks([0], 0.8), RATE, (64, 64), fade_in_s=9)
    seen = [colour_of(picture) for picture in read_frames(read_film(tmp_path / "a.mp4"), [0.0, 0.28, 0.48, 0.76])]
    assert seen == list(COLOURS)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"path": "show.avi"}, r"`path` must end in .mp4, got '.*show.avi'"),
        ({"size": (127, 64)}, r"`size` must be even, got \(127, 64\)"),
        ({"starts": [1, 2]}, r"`starts` must begin at 0, ascend and end before 2.00 s, got \[1, 2\]"),
        ({"starts": [0, 2]}, "`starts` must begin at 0"),
        ({"starts": [0, math.nan]}, "`starts` must be finite, got nan"),
        ({"starts": []}, "`starts` must begin at 0"),
        ({"starts": [0, 0.5, 1]}, "`pictures` must be as many as `starts`, got 2 for 3"),
        ({"fade_in_s": -1}, "`fade_in_s` must be finite and at least 0, got -1"),
        ({"fade_in_s": math.nan}, "`fade_in_s` must be finite and at least 0, got nan"),
        ({"waveform": np.zeros((3, 100), np.float32)}, r"`waveform` must be \[samples\] or"),
        ({"waveform": np.full(100, np.nan, np.float32)}, "NaN"),
        ({"sampling_rate": 0}, "`sampling_rate`"),
    ],
)
def test_slide_shows_that_cannot_be_written_are_refused(tmp_path, changes, message):
    arguments = {"path": "show.mp4", "starts": [0, 1], "waveform": clicks([0], 2), "sampling_rate": RATE} | changes
    arguments["path"] = tmp_path / arguments["path"]
    pictures = [PIL.Image.new("RGB", (8, 8))] * 2
    for given in (pictures, iter(pictures)):
        with pytest.raises(ValueError, match=message):
            write_slideshow(pictures=given, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_film_gets_new_music_and_keeps_every_bit_of_its_pictures(tmp_path):
    old, music = clicks([0.5, 2.5], 4), clicks([1, 2, 3], 4, pitch=1000)
    film = read_film(write_film(tmp_path / "film.mp4", sound=old, bf="2"))
    for suffix in (".mp4", ".mkv", ".mov"):
        path = tmp_path / f"scored{suffix}"
        write_scored_film(path, film, music, RATE)
        assert packets(path) == packets(film.path)
        sound = read_sound(path)
        assert find_onsets(sound, RATE)[0] == pytest.approx([1, 2, 3], abs=0.03)
        assert np.corrcoef(sound[: len(music)], music[: len(sound)])[0, 1] > 0.98
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "film.mp4", "scored.mkv", "scored.mov", "scored.mp4"]  # fmt: skip


def test_the_old_sound_is_kept_at_the_level_asked_for(tmp_path):
    old, music = clicks([0.5, 2.5], 4), clicks([1.5], 4)
    film = read_film(write_film(tmp_path / "film.mp4", sound=old))
    for gain in (0, -12):
        write_scored_film(tmp_path / "scored.mp4", film, music, RATE, "keep", gain)
        sound = read_sound(tmp_path / "scored.mp4")
        expected = music + old * 10 ** (gain / 20)
        length = min(len(sound), len(expected))
        assert np.abs(sound[:length] - expected[:length]).mean() < 0.15 * np.abs(expected).mean()


def test_the_music_steps_back_where_the_old_sound_is_loud(tmp_path):
    times = np.arange(6 * RATE) / RATE
    speech = (0.3 * np.sin(2 * np.pi * 300 * times) * ((times > 2) & (times < 4))).astype(np.float32)
    music = (0.2 * np.sin(2 * np.pi * 2000 * times)).astype(np.float32)
    film = read_film(write_film(tmp_path / "film.mp4", times=np.arange(0, 6, 0.04), sound=speech))
    write_scored_film(tmp_path / "scored.mp4", film, music, RATE, "duck")
    sound = read_sound(tmp_path / "scored.mp4")

    def level(pitch, first, last):
        part = sound[round(first * RATE) : round(last * RATE)]
        return 2 * abs(np.mean(part * np.exp(-2j * np.pi * pitch * np.arange(len(part)) / RATE)))

    assert level(2000, 0.5, 1.5) == pytest.approx(0.2, rel=0.1)
    assert level(2000, 2.5, 3.5) < 0.1
    assert level(300, 2.5, 3.5) == pytest.approx(0.3, rel=0.1)
    assert level(2000, 5.5, 5.9) == pytest.approx(0.2, rel=0.2)


def test_music_is_cut_or_followed_by_silence_and_silent_films_have_nothing_to_keep(tmp_path):
    film = read_film(write_film(tmp_path / "film.mp4"))
    assert not film.has_sound
    for seconds in (1, 9):
        write_scored_film(tmp_path / "scored.mp4", film, clicks([0.5], seconds), RATE, "keep")
        assert len(read_sound(tmp_path / "scored.mp4")) == pytest.approx(4 * RATE, abs=0.05 * RATE)
    stereo = np.stack([clicks([0.5], 4), np.zeros(4 * RATE, np.float32)])
    write_scored_film(tmp_path / "scored.mp4", film, stereo, RATE)
    with av.open(str(tmp_path / "scored.mp4")) as container:
        left, right = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)
    assert np.abs(left).max() > 0.2 and np.abs(right).max() < 0.01


def test_films_that_cannot_be_written_are_refused(tmp_path):
    film = read_film(write_film(tmp_path / "film.mp4"))
    music = clicks([0.5], 4)
    for changes, message in (
        ({"old_sound": "mute"}, "`old_sound` must be 'drop', 'keep' or 'duck', got 'mute'"),
        ({"old_sound_gain_in_db": math.nan}, r"`old_sound_gain_in_db` must be finite and in \[-120, 40\], got nan"),
        ({"path": film.path}, "`path` is the film itself"),
        ({"path": tmp_path / "scored.webm"}, r"the pictures \(h264\) cannot be copied into .*scored.webm'"),
        ({"path": tmp_path / "scored.txt"}, "'.txt' is no suffix of a film"),
    ):
        arguments = {"path": tmp_path / "scored.mp4", "film": film, "waveform": music, "sampling_rate": RATE}
        with pytest.raises(ValueError, match=message):
            write_scored_film(**arguments | changes)
    for name, message in (
        ("scored.webm", r"\(h264\) cannot be copied into .*scored.webm'"),
        ("a.txt", "is no suffix"),
        ("a.gif", "'.gif' holds no sound: write .mp4, .mov or .mkv"),
    ):
        with pytest.raises(ValueError, match=message):
            check_container(tmp_path / name, film)
    check_container(tmp_path / "scored.mkv", film)
    assert [file.name for file in tmp_path.iterdir()] == ["film.mp4"]


def test_films_are_copied_whose_decoder_has_no_encoder_of_its_name(tmp_path):
    """AV1 is decoded by dav1d, which writes nothing."""
    film = read_film(write_film(tmp_path / "film.mp4", codec="libsvtav1"))
    for suffix in (".mp4", ".mkv"):
        write_scored_film(tmp_path / f"scored{suffix}", film, clicks([1], 4), RATE)
        assert packets(tmp_path / f"scored{suffix}") == packets(film.path)


def test_a_film_of_a_phone_keeps_the_tag_without_which_apple_does_not_play_it(tmp_path):
    hevc = {"codec": "libx265", "tag": "hvc1", "x265-params": "log-level=none"}
    film = read_film(write_film(tmp_path / "phone.mov", np.arange(10) / 25, **hevc))
    tags = []
    for name in ("scored.mov", "scored.mp4", "scored.mkv"):
        write_scored_film(tmp_path / name, film, clicks([0.1], 0.4), RATE)
        with av.open(str(tmp_path / name)) as container:
            tags.append(container.streams.video[0].codec_context.codec_tag)
    assert tags == ["hvc1", "hvc1", "\0\0\0\0"]


def test_a_webm_is_scored_with_opus(tmp_path):
    film = read_film(write_film(tmp_path / "film.webm", codec="libvpx"))
    write_scored_film(tmp_path / "scored.webm", film, clicks([1], 4), RATE)
    assert packets(tmp_path / "scored.webm") == packets(film.path)
    assert find_onsets(read_sound(tmp_path / "scored.webm"), RATE)[0] == pytest.approx([1], abs=0.03)


def write_for_long(path):
    def pictures():
        for index in range(1000):
            if index == 3:
                print("writing")
            yield PIL.Image.effect_noise((640, 360), 90)

    write_slideshow(path, pictures(), list(range(1000)), np.zeros(16000 * 1000, np.float32), 16000, (640, 360))


def test_a_kill_while_writing_leaves_the_old_film_or_none(tmp_path):
    path = tmp_path / "show.mp4"
    for printed, before in ((tmp_path / "first", None), (tmp_path / "second", b"the film of yesterday")):
        if before is not None:
            path.write_bytes(before)
        process = start(lambda: write_for_long(path), printed)
        assert prints(process, printed, lines=1)
        partial = wait_for(lambda: [file for file in tmp_path.glob(".partial-*/show.mp4") if file.stat().st_size])
        process.kill()
        process.join()
        assert partial and process.exitcode == -signal.SIGKILL
        assert (path.read_bytes() if path.exists() else None) == before


def test_without_the_extra_the_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.delitem(sys.modules, film_module.__name__)
    with pytest.raises(ImportError, match=r"pip install .\[film\]"):
        __import__(film_module.__name__)


# ---------------------------------------- in a browser


class Player:
    """A film in a page of its own."""

    def __init__(self, browser, path):
        self.browser = browser
        page = path.with_suffix(".html")
        page.write_text(f"<body style='margin: 0'><video id=film muted src={path.name}></video>")
        browser.get(page.as_uri())
        wait_for(lambda: self.ask("film.readyState >= 3"), seconds=60)

    def ask(self, expression):
        return self.browser.execute_script(f"return {expression}")

    def play_until(self, second):
        self.browser.execute_script("film.play()")
        wait_for(lambda: self.ask(f"film.currentTime > {second}"), seconds=60)
        self.browser.execute_script("film.pause()")

    def picture_at(self, second):
        """What the browser shows at a second."""
        self.browser.execute_script(f"film.currentTime = {second}")
        wait_for(lambda: self.ask("!film.seeking && film.readyState >= 2"), seconds=60)
        # What was decoded is drawn with the next picture of the page.
        self.browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
        time.sleep(0.2)
        shot = PIL.Image.open(io.BytesIO(self.browser.get_screenshot_as_png())).convert("RGB")
        return shot.crop((0, 0, self.ask("film.clientWidth"), self.ask("film.clientHeight")))


@pytest.mark.browser
def test_films_play_in_a_browser(tmp_path, browser):
    music = clicks(np.arange(0, 6, 0.5), 6)
    pictures = [PIL.Image.new("RGB", (300, 200), colour) for colour in COLOURS]
    write_slideshow(tmp_path / "show.mp4", pictures, [0, 1.5, 3, 4.5], music, RATE, size=(640, 360))
    times = np.arange(0, 6, 0.04)
    film = read_film(write_film(tmp_path / "film.mp4", times, size=(160, 120), rotation=90, sound=clicks([1], 6)))
    write_scored_film(tmp_path / "scored.mp4", film, music, RATE, "duck")
    for name, colours in (("show", {1: "red", 5.5: "yellow"}), ("scored", {0.5: "red", 2.5: "blue"})):
        player = Player(browser, tmp_path / f"{name}.mp4")
        assert player.ask("film.duration") == pytest.approx(6, abs=0.1)
        player.play_until(0.7)
        assert player.ask("film.error") is None and player.ask("film.webkitAudioDecodedByteCount") > 1000
        for second, colour in colours.items():
            assert colour_of(player.picture_at(second), (0.55, 0.55, 0.65, 0.65)) == colour
    (read,) = read_frames(film, [0.5])
    shown = player.picture_at(0.5)
    assert shown.size == read.size == (120, 160) and white_corners(shown) == white_corners(read)

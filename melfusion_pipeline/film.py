"""Films: pictures out of a film, and its shots.

    film = read_film("holiday.mp4")
    starts = find_shots(film)
    pictures = [choose_frame(film, start, end)[1] for start, end in stretches(starts, film.duration)]
    waveform = pipe(pictures, "a waltz for piano", image_start_in_s=starts, audio_length_in_s=film.duration).audios[0]
    write_scored_film("scored.mp4", film, waveform, pipe.sampling_rate)

`melfusion_pipeline.scoring` writes. Needs the extra `film`. All times are seconds from the first picture; a film's own
clock may begin elsewhere.
"""

import bisect
import csv
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import PIL.Image
from diffusers.utils import logging

from .arguments_melfusion import check_path, check_positive, check_real, check_reals

try:
    import av
    import scenedetect
except ImportError as error:
    raise ImportError("Slide shows and films need the extra `film`: pip install .[film]") from error

FRAME_RATE = 25
# In seconds: where the frame rate varies, PySceneDetect's default of 15 pictures stands for no fixed time.
SHORTEST_SHOT = 0.5
# In seconds: times are rounded on their way; no frame of a film is so short.
ROUNDING = 0.0005
# The column with the shots' beginnings, as we and as PySceneDetect (`list-scenes --skip-cuts`) write it.
SHOT_COLUMNS = ("start", "Start Time (seconds)")

# ---------------------------------------- reading a film


@dataclass(frozen=True)
class Film:
    """What is known of a film before a picture of it is decoded.

    Args:
        path: The file.
        start: The time of the first picture on the file's own clock, in seconds.
        duration: How long the pictures last, in seconds.
        num_frames: How many pictures there are.
        keyframes: The times of the pictures that decoding can begin at.
        has_sound: Whether there is a sound stream.
    """

    path: Path
    start: float
    duration: float
    num_frames: int
    keyframes: tuple[float, ...]
    has_sound: bool


def read_film(path: str | os.PathLike) -> Film:
    """Looks a film through without decoding it: any container, codec and frame rate that FFmpeg reads.

    Args:
        path: The file.

    Returns:
        What was found. The duration is that of the pictures, from the packets, whatever the file's header says.

    Raises:
        ValueError: If the file is no film (a single picture is none), has no video stream (the cover of a song is
            none), or no picture in it.
    """
    with open_film(path) as container:
        # FFmpeg takes a picture for a film of one frame.
        if container.format.name == "image2" or container.format.name.endswith("_pipe"):
            raise ValueError(f"{str(path)!r} is a picture and no film: make a slide show of it.")
        stream = picture_stream(container, path)
        times, ends, keyframes = [], [], []
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard and (packet.pts is not None or packet.dts is not None):
                times.append(packet.pts if packet.pts is not None else packet.dts)
                ends.append(times[-1] + (packet.duration or 0))
                if packet.is_keyframe:
                    keyframes.append(times[-1])
        if not times:
            raise ValueError(f"{str(path)!r} has a video stream without a picture in it: nothing can be scored.")
        start, unit = min(times), float(stream.time_base)
        if max(ends) == max(times):
            rate = stream.average_rate or stream.guessed_rate or FRAME_RATE
            ends.append(max(times) + round(1 / (rate * stream.time_base)))
        return Film(
            path=Path(path),
            start=start * unit,
            duration=(max(ends) - start) * unit,
            num_frames=len(times),
            keyframes=tuple(sorted((time - start) * unit for time in keyframes)),
            has_sound=bool(container.streams.audio),
        )


def read_frames(film: Film, times: Iterable[float]) -> Iterator[PIL.Image.Image]:
    """Reads the pictures that are on screen at given times.

    Args:
        film: The film.
        times: Times in seconds from the first picture; ascending times are read fastest.

    Yields:
        RGB pictures as a player shows them: turned as the file's metadata says, with square pixels.

    Raises:
        TypeError: If `film` is no `Film`, or a time no number.
        ValueError: If a time is not finite, or a picture cannot be decoded.
    """
    check_film(film)
    with open_film(film.path) as container:
        stream = picture_stream(container, film.path)
        stream.thread_type = "AUTO"
        frames, shown, coming = container.decode(stream), None, None
        for time in times:
            check_real("times", time)
            try:
                since = -math.inf if shown is None else shown.time - film.start
                passed = bisect.bisect(film.keyframes, since) != bisect.bisect(film.keyframes, time)
                if time < since or passed:
                    shown, (coming, frames) = None, _decode_from(container, stream, film, time)
                while shown is None or (coming is not None and coming.time - film.start <= time + ROUNDING):
                    shown = coming if coming is not None else next(frames)
                    coming = next(frames, None)
            except (StopIteration, av.error.FFmpegError) as error:
                message = f"{str(film.path)!r} cannot be decoded at {time:.2f} s: the file is damaged."
                raise ValueError(message) from error
            yield _upright(shown, stream.sample_aspect_ratio)


def _decode_from(
    container: "av.container.InputContainer", stream: "av.VideoStream", film: Film, time: float
) -> tuple["av.VideoFrame | None", Iterator["av.VideoFrame"]]:
    """Gives a frame that is shown at `time` (seconds) or, where there is one, before it, and the frames behind it."""
    frame, frames = None, iter(())
    passed = film.keyframes[: bisect.bisect(film.keyframes, time + ROUNDING)]
    # MPEG streams (camcorders, television) have no index and are searched by the time of decoding, which comes before
    # that of showing: a search for a keyframe ends behind it. Behind the first one as well, hence the last position.
    for position in (*reversed(passed), 0.0, -10.0):
        try:
            container.seek(round((film.start + position) / stream.time_base), stream=stream)
        # AVI takes no time before its beginning.
        except av.error.FFmpegError:
            break
        frames = container.decode(stream)
        frame = next(frames, None)
        if frame is not None and frame.time - film.start <= time + ROUNDING:
            break
    return frame, frames


def choose_frame(film: Film, start: float, end: float) -> tuple[float, PIL.Image.Image]:
    """Chooses the picture that stands for a stretch: of five that are spread over it the one most like the others.

    A fade, a flash or somebody passing in front is not like the others.

    Args:
        film: The film.
        start: Where the stretch begins, in seconds.
        end: Where it ends.

    Returns:
        The picture's second and the picture.

    Raises:
        TypeError: If `film` is no `Film`, or `start` or `end` no number.
        ValueError: If they do not ascend, or a picture cannot be decoded.
    """
    check_film(film)
    check_real("start", start)
    check_real("end", end)
    if not start < end:
        raise ValueError(f"`start` and `end` must ascend, got {start} and {end}.")
    times = np.linspace(start, end, 7)[1:-1].tolist()
    pictures = list(read_frames(film, times))
    small = np.stack([np.asarray(picture.resize((16, 16)), dtype=np.float32) for picture in pictures])
    distances = np.abs(small[:, None] - small[None]).mean(axis=(1, 2, 3, 4))
    best = int(distances.argmin())
    return times[best], pictures[best]


def check_film(film: Film) -> None:
    """Raises `TypeError` unless `film` is a `Film`, such as for the path of one."""
    if not isinstance(film, Film):
        raise TypeError(f"`film` must be what `read_film` returns, got {film!r:.80}.")


@contextmanager
def open_film(path: str | os.PathLike) -> Iterator["av.container.InputContainer"]:
    """Opens a film for reading and closes it afterwards.

    Args:
        path: The file.

    Yields:
        The open file.

    Raises:
        TypeError: If `path` is no path.
        FileNotFoundError: If there is no such file.
        ValueError: If it is no film.
    """
    check_path("path", path)
    try:
        container = av.open(os.fspath(path))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{str(path)!r} cannot be read as a film: there is no such file.") from error
    except (av.error.FFmpegError, OSError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as a film: {error}") from error
    with container:
        yield container


def picture_stream(container: "av.container.InputContainer", path: str | os.PathLike) -> "av.VideoStream":
    """Gives the stream of pictures of a film, which the cover of its music is not.

    Args:
        container: The open file.
        path: Its path, for the message.

    Returns:
        The first such stream.

    Raises:
        ValueError: If there is none.
    """
    cover = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        raise ValueError(f"{str(path)!r} has no video stream: pass a film, or make a slide show of pictures.")
    return streams[0]


def _upright(frame: "av.VideoFrame", sample_aspect_ratio: Fraction | None) -> PIL.Image.Image:
    picture = frame.to_image()
    if sample_aspect_ratio and sample_aspect_ratio != 1:
        picture = picture.resize((max(1, round(picture.width * sample_aspect_ratio)), picture.height))
    return picture.rotate(frame.rotation, expand=True) if frame.rotation else picture


# ---------------------------------------- shots


def find_shots(film: Film) -> list[float]:
    """Finds the cuts of a film with PySceneDetect's adaptive detector, which forgives a moving camera.

    Args:
        film: The film.

    Returns:
        The second at which each shot begins; the first is 0. A film without a cut is one shot.

    Raises:
        TypeError: If `film` is no `Film`.
    """
    check_film(film)
    # Without `suppress_output` FFmpeg would print its log for the rest of the process.
    video = scenedetect.open_video(os.fspath(film.path), backend="pyav", suppress_output=True)
    manager = scenedetect.SceneManager()
    manager.add_detector(scenedetect.AdaptiveDetector(min_scene_len=SHORTEST_SHOT))
    manager.detect_scenes(video, show_progress=logging.is_progress_bar_enabled())
    starts = [start.seconds for start, _ in manager.get_scene_list()]
    return [0.0] + [start for start in starts if 0 < start < film.duration]


def read_shots(path: str | os.PathLike, duration: float) -> list[float]:
    """Reads the shots of a film from a CSV file.

    Args:
        path: A table with a header and a column `start`, in seconds, a row a shot. A table that PySceneDetect wrote
            (`list-scenes --skip-cuts`) will do.
        duration: The length of the film in seconds.

    Returns:
        The second at which each shot begins; 0 is put before them where it is missing.

    Raises:
        TypeError: If `path` is no path, or `duration` no number.
        OSError: If there is no such file.
        ValueError: If there is no such column, or a row has more columns than the header, or a beginning is no
            number, not after the one before it or not within the film; the row is named.
    """
    check_path("path", path)
    check_real("duration", duration, 0.0)
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        column = next((name for name in SHOT_COLUMNS if name in (rows.fieldnames or ())), None)
        if column is None:
            raise ValueError(f"{str(path)!r} has no column {SHOT_COLUMNS[0]!r}: its header is {rows.fieldnames}.")
        starts: list[float] = []
        for number, row in enumerate(rows, start=1):
            # "3,2" would be 3 seconds.
            if any(row.get(None, ())):
                raise ValueError(
                    f"{str(path)!r}, row {number} has more columns than the header: columns are parted by a comma, and"
                    " decimals have a point."
                )
            try:
                start = float(row[column])
            except (TypeError, ValueError):
                start = math.nan
            # `not` catches NaN too.
            if not (starts[-1] if starts else -1e-9) < start < duration:
                raise ValueError(
                    f"{str(path)!r}, row {number}: the shot begins at {row[column]!r}, but must begin after the one"
                    f" before it and before the film ends ({duration:.2f} s)."
                )
            starts.append(start)
    return starts if starts and starts[0] == 0 else [0.0, *starts]


def check_starts(starts: Sequence[float], duration: float) -> None:
    """Raises `TypeError` or `ValueError` unless `starts` are seconds that ascend and end before `duration`."""
    check_reals("starts", starts)
    check_real("duration", duration)
    if not all(before < after for before, after in pairwise([*starts, duration])):
        raise ValueError(f"`starts` must ascend and end before `duration`, {duration} s, got {list(starts)!r:.80}.")


def stretches(starts: Sequence[float], duration: float) -> list[tuple[float, float]]:
    """Pairs each of `starts` with its end: the next start, or `duration` for the last."""
    return list(pairwise([*starts, duration]))


def split_shots(starts: Sequence[float], duration: float, longest: float) -> tuple[list[float], list[int]]:
    """Cuts shots that are longer than `longest` into equal stretches, each of which gets a picture of its own.

    Args:
        starts: Where each shot begins, in seconds.
        duration: The length of the film in seconds.
        longest: The longest stretch, in seconds.

    Returns:
        Where each stretch begins, and the index of its shot.

    Raises:
        TypeError: If `starts` is no list of numbers, or another argument no number.
        ValueError: If a number is not finite, `starts` do not ascend and end before `duration`, or `longest` is not
            above 0.
    """
    check_positive("longest", longest)
    check_starts(starts, duration)
    begins, shots = [], []
    for shot, (start, end) in enumerate(stretches(starts, duration)):
        count = math.ceil((end - start) / longest - 1e-9)
        begins += [start + (end - start) * part / count for part in range(count)]
        shots += [shot] * count
    return begins, shots

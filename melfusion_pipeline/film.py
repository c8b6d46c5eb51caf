"""Slide shows and films: pictures out of a film, its shots, the music's onsets, and pictures and music as one file.

    film = read_film("holiday.mp4")
    starts = find_shots(film)
    pictures = [choose_frame(film, start, end)[1] for start, end in stretches(starts, film.duration)]
    waveform = pipe(pictures, "a waltz for piano", image_start_in_s=starts, audio_length_in_s=film.duration).audios[0]
    write_scored_film("scored.mp4", film, waveform, pipe.sampling_rate)

Needs the extra `film`. All times are seconds from the first picture; a film's own clock may begin elsewhere.
"""

import bisect
import csv
import heapq
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
import PIL.ImageOps
import torch
from diffusers.utils import logging

from .audio import check_sampling_rate, check_waveform
from .files_melfusion import atomic_write
from .pictures_melfusion import to_rgb

try:
    import av
    import librosa
    import scenedetect
except ImportError as error:
    raise ImportError("Slide shows and films need the extra `film`: pip install .[film]") from error

FRAME_RATE = 25
# What every player takes, whatever the music's own rate is.
SOUND_RATE = 48000
# In seconds: how far a slide's change may move to an onset, and how near to an onset a cut counts as met.
REACH = 0.5
TOLERANCE = 0.1
# Spectral flux is computed in blocks of this many seconds, so that an hour fits into the memory.
ONSET_BLOCK = 60
# PySceneDetect's own default is 15 pictures, which is no time where the frame rate varies.
SHORTEST_SHOT = 0.5
# The column with the shots' beginnings, as we and as PySceneDetect (`list-scenes --skip-cuts`) write it.
SHOT_COLUMNS = ("start", "Start Time (seconds)")
LAYOUTS = {1: "mono", 2: "stereo"}
STEREO = ("aformat", "sample_fmts=fltp:channel_layouts=stereo")
# Above -30 dB of old sound the music steps back, at most by about 15 dB, and takes its time to come back.
DUCKING = {"threshold": "0.03", "ratio": "6", "attack": "40", "release": "700"}


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
        ValueError: If the file is no film, has no video stream (the cover of a song is none), or no picture in it.
    """
    with _open(path) as container:
        stream = _picture_stream(container, path)
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
        times: In seconds from the first picture; ascending times are read fastest.

    Yields:
        RGB pictures as a player shows them: turned as the file's metadata says, with square pixels.

    Raises:
        ValueError: If a picture cannot be decoded.
    """
    with _open(film.path) as container:
        stream = _picture_stream(container, film.path)
        stream.thread_type = "AUTO"
        frames, shown, coming = container.decode(stream), None, None
        for time in times:
            try:
                since = -math.inf if shown is None else shown.time - film.start
                passed = bisect.bisect(film.keyframes, since) != bisect.bisect(film.keyframes, time)
                if time < since or passed:
                    container.seek(round((film.start + time) / stream.time_base), stream=stream)
                    frames, shown, coming = container.decode(stream), None, None
                # Half a frame of a film with 1,000 a second: times are rounded on their way.
                while shown is None or (coming is not None and coming.time - film.start <= time + 0.0005):
                    shown = coming if coming is not None else next(frames)
                    coming = next(frames, None)
            except (StopIteration, av.error.FFmpegError) as error:
                message = f"{str(film.path)!r} cannot be decoded at {time:.2f} s: the file is damaged."
                raise ValueError(message) from error
            yield _upright(shown, stream.sample_aspect_ratio)


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
        ValueError: If a picture cannot be decoded.
    """
    times = np.linspace(start, end, 7)[1:-1].tolist()
    pictures = list(read_frames(film, times))
    small = np.stack([np.asarray(picture.resize((16, 16)), dtype=np.float32) for picture in pictures])
    distances = np.abs(small[:, None] - small[None]).mean(axis=(1, 2, 3, 4))
    best = int(distances.argmin())
    return times[best], pictures[best]


@contextmanager
def _open(path: str | os.PathLike) -> Iterator["av.container.InputContainer"]:
    try:
        container = av.open(os.fspath(path))
    except FileNotFoundError:
        raise
    except (av.error.FFmpegError, OSError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as a film: {error}") from error
    with container:
        yield container


def _picture_stream(container: "av.container.InputContainer", path: str | os.PathLike) -> "av.VideoStream":
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
    """
    # Otherwise FFmpeg's log would be let loose for the rest of the process.
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
        duration: Of the film, in seconds.

    Returns:
        The second at which each shot begins; 0 is put before them where it is missing.

    Raises:
        ValueError: If there is no such column, or a beginning is no number, not after the one before it or not
            within the film; the row is named.
    """
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        column = next((name for name in SHOT_COLUMNS if name in (rows.fieldnames or ())), None)
        if column is None:
            raise ValueError(f"{str(path)!r} has no column {SHOT_COLUMNS[0]!r}: its header is {rows.fieldnames}.")
        starts: list[float] = []
        for number, row in enumerate(rows, start=1):
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


def stretches(starts: Sequence[float], duration: float) -> list[tuple[float, float]]:
    """Pairs each of `starts` with its end: the next start, or `duration` for the last."""
    return list(pairwise([*starts, duration]))


def split_shots(starts: Sequence[float], duration: float, longest: float) -> tuple[list[float], list[int]]:
    """Cuts shots that are longer than `longest` into equal stretches, each of which gets a picture of its own.

    Args:
        starts: Where each shot begins, in seconds.
        duration: Of the film, in seconds.
        longest: The longest stretch, in seconds.

    Returns:
        Where each stretch begins, and the index of its shot.
    """
    begins, shots = [], []
    for shot, (start, end) in enumerate(stretches(starts, duration)):
        count = math.ceil((end - start) / longest - 1e-9)
        begins += [start + (end - start) * part / count for part in range(count)]
        shots += [shot] * count
    return begins, shots


# ---------------------------------------- onsets


def find_onsets(waveform: np.ndarray | torch.Tensor, sampling_rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds where notes and drums begin.

    Args:
        waveform: `[T]`, mono.
        sampling_rate: Of `waveform`, in Hz.

    Returns:
        The onsets' times in seconds `[N]`, ascending, and their strengths `[N]` (the square root of the spectral
        flux, which keeps one loud drum from hiding the soft notes beside it).

    Raises:
        TypeError: If `waveform` is not a floating-point array or tensor.
        ValueError: If it is empty, not finite or not `[T]`.
    """
    check_sampling_rate(sampling_rate)
    samples = check_waveform(waveform).detach().cpu().float().numpy()
    if samples.ndim != 1:
        raise ValueError(f"`waveform` must be [samples], but its shape is {list(samples.shape)}: pick one piece.")
    hop = max(1, sampling_rate // 100)
    settings = {"sr": sampling_rate, "hop_length": hop, "n_fft": 1024, "n_mels": 64}
    # A second of neighbours on either side: a block's edge is no onset.
    frames, margin = ONSET_BLOCK * 100, 100
    envelope = []
    for first in range(0, math.ceil(len(samples) / hop), frames):
        skipped = min(first, margin)
        block = samples[(first - skipped) * hop : (first + frames + margin) * hop]
        envelope.append(librosa.onset.onset_strength(y=block, **settings)[skipped : skipped + frames])
    flux = np.sqrt(np.concatenate(envelope))
    if not flux.any():
        return np.zeros(0), np.zeros(0)
    found = librosa.onset.onset_detect(onset_envelope=flux, sr=sampling_rate, hop_length=hop, delta=0.1)
    return found * hop / sampling_rate, flux[found]


def draw_spectrogram(waveform: np.ndarray | torch.Tensor, sampling_rate: int, num_columns: int = 4000) -> torch.Tensor:
    """Computes a log-mel spectrogram to look at, for `plot_storyboard`.

    Args:
        waveform: `[T]`, mono, of any length.
        sampling_rate: Of `waveform`, in Hz.
        num_columns: At most about so many frames; a long piece is looked at now and then.

    Returns:
        `[frames, 64]`, natural logarithm of the magnitude.
    """
    samples = check_waveform(waveform).detach().cpu().float().numpy()
    hop = max(sampling_rate // 100, len(samples) // num_columns)
    mel = librosa.feature.melspectrogram(y=samples, sr=sampling_rate, hop_length=hop, n_fft=1024, n_mels=64, power=1)
    return torch.from_numpy(np.log(mel.T.clip(1e-5)))


def move_to_onsets(
    starts: Sequence[float], duration: float, onsets: np.ndarray, strengths: np.ndarray, reach: float = REACH
) -> list[float]:
    """Moves each change of a slide show to the strongest onset near it, so that pictures change on the beat.

    Args:
        starts: Where each picture begins, in seconds; the first is 0 and stays.
        duration: Of the whole, in seconds.
        onsets: The music's onsets in seconds, `[N]`.
        strengths: How strong each is, `[N]`.
        reach: How far a change may move, in seconds; at most a third of the stretch on that side, so that changes
            stay in order and every picture keeps a third of its time at least.

    Returns:
        Where each picture begins; a change without an onset near it stays where it was.
    """
    edges, moved = [*starts, duration], list(starts)
    for index in range(1, len(starts)):
        before, start, end = edges[index - 1 : index + 2]
        earliest, latest = start - min(reach, (start - before) / 3), start + min(reach, (end - start) / 3)
        near = np.flatnonzero((onsets >= earliest) & (onsets <= latest))
        if len(near):
            moved[index] = float(onsets[near[strengths[near].argmax()]])
    return moved


def share_met(cuts: Sequence[float], onsets: np.ndarray, tolerance: float = TOLERANCE) -> float:
    """Counts the cuts that meet the music.

    Args:
        cuts: In seconds.
        onsets: In seconds, `[N]`.
        tolerance: How far from a cut an onset may lie, in seconds.

    Returns:
        The share of cuts with an onset near them, in [0, 1]; NaN without cuts.
    """
    if not len(cuts):
        return math.nan
    distances = np.abs(np.asarray(cuts)[:, None] - np.asarray(onsets)[None])
    return float((distances.min(axis=1, initial=math.inf) <= tolerance).mean())


def share_met_by_chance(
    cuts: Sequence[float],
    variations: Sequence[np.ndarray],
    duration: float,
    generator: np.random.Generator,
    num_shifts: int = 1000,
) -> float:
    """Counts the cuts that the best variation meets when all cuts are shifted together, around the end, at random.

    Choosing the best of several is part of it, so that the number stands beside that of a chosen variation.

    Args:
        cuts: In seconds.
        variations: The onsets of each variation, in seconds, `[N]` each.
        duration: Of the film, in seconds.
        generator: Draws the shifts.
        num_shifts: How many.

    Returns:
        The mean share over the shifts, in [0, 1]; NaN without cuts.
    """
    shifted = [(np.asarray(cuts) + shift) % duration for shift in generator.uniform(0, duration, num_shifts)]
    return float(np.mean([max(share_met(one, onsets) for onsets in variations) for one in shifted]))


# ---------------------------------------- writing


def write_slideshow(
    path: str | os.PathLike,
    pictures: Iterable[PIL.Image.Image],
    starts: Sequence[float],
    waveform: np.ndarray | torch.Tensor,
    sampling_rate: int,
    size: tuple[int, int] = (1920, 1080),
    crop: bool = False,
    fade_in_s: float = 0.5,
) -> None:
    """Writes pictures and music as an mp4 (H.264, 25 pictures a second, AAC) that browsers and phones play.

    Args:
        path: The file to write, ending in `.mp4`; it is complete or absent.
        pictures: Of any size and mode; they are taken one at a time, so a generator may open them as they are needed.
        starts: Where each picture begins, in seconds; the first is 0.
        waveform: `[T]` or `[C, T]` in [-1, 1]; the film is as long as it is.
        sampling_rate: Of `waveform`, in Hz.
        size: Width and height in pixels, even.
        crop: Fill the size and lose what lies outside, instead of putting black beside or above the picture.
        fade_in_s: How long one picture takes to become the next, half of it before the change; at most as long as the
            shorter of the two lasts.

    Raises:
        TypeError: If `waveform` is not a floating-point array or tensor.
        ValueError: If the path, the size, the starts, the fade or the waveform is unusable.
        OSError: If the file cannot be written.
    """
    if Path(path).suffix.lower() != ".mp4":
        raise ValueError(f"`path` must end in .mp4, got {str(path)!r}.")
    if any(side < 16 or side % 2 for side in size):
        raise ValueError(f"`size` must be even and 16 pixels at least, got {size}: H.264 stores colours for 2 x 2.")
    if not (math.isfinite(fade_in_s) and fade_in_s >= 0):
        raise ValueError(f"`fade_in_s` must be zero or more seconds, got {fade_in_s!r}.")
    waveform = _as_channels(waveform, sampling_rate)
    duration = waveform.shape[1] / sampling_rate
    edges = np.array([*starts, duration])
    if len(starts) == 0 or starts[0] != 0 or not (np.diff(edges) > 0).all():
        raise ValueError(f"`starts` must begin at 0, ascend and end before {duration:.2f} s, got {list(starts)}.")

    with atomic_write(path) as temporary, _create(temporary) as container:
        video = container.add_stream("libx264", rate=FRAME_RATE, options={"preset": "veryfast", "crf": "20"})
        video.width, video.height, video.pix_fmt = *size, "yuv420p"
        # Untagged, some players take HD for the older standard and shift the colours.
        video.codec_context.colorspace = video.codec_context.color_primaries = video.codec_context.color_trc = 1
        frames = _slideshow_frames(pictures, starts, duration, size, crop, fade_in_s)
        num_frames = max(1, round(duration * FRAME_RATE))
        progress = logging.tqdm(frames, total=num_frames, desc=f"Writing {Path(path).name}", unit=" pictures")
        sound = _encode_sound(container, _blocks(waveform, sampling_rate))
        _mux(container, _encode(video, progress), sound)


def _slideshow_frames(
    pictures: Iterable[PIL.Image.Image],
    starts: Sequence[float],
    duration: float,
    size: tuple[int, int],
    crop: bool,
    fade_in_s: float,
) -> Iterator["av.VideoFrame"]:
    """Yields the frames, each picture fitted once and each still frame converted once."""
    edges, coming = [*starts, duration], iter(pictures)
    fades = [
        min(fade_in_s, start - before, end - start)
        for before, start, end in zip(edges, edges[1:-1], edges[2:], strict=False)
    ]
    fitted: dict[int, PIL.Image.Image] = {}
    still, still_index = None, -1
    for number in range(max(1, round(duration * FRAME_RATE))):
        # The frame nearest to a change is the first to show the new picture.
        time = (number + 0.5) / FRAME_RATE
        index = bisect.bisect(starts, time) - 1
        # The change in whose fade this frame may lie: the last or the next.
        change = index if index and time - starts[index] < fades[index - 1] / 2 else index + 1
        fading = change < len(starts) and 0 < change and abs(time - starts[change]) < fades[change - 1] / 2
        for needed in range(max(fitted, default=-1) + 1, (change if fading else index) + 1):
            fitted[needed] = _fit(next(coming), size, crop)
            fitted.pop(needed - 2, None)
        if fading:
            share = (time - starts[change]) / fades[change - 1] + 0.5
            frame = _to_frame(PIL.Image.blend(fitted[change - 1], fitted[change], share))
        else:
            if still_index != index:
                still, still_index = _to_frame(fitted[index]), index
            frame = still
        frame.pts, frame.time_base = number, Fraction(1, FRAME_RATE)
        yield frame


def _fit(picture: PIL.Image.Image, size: tuple[int, int], crop: bool) -> PIL.Image.Image:
    return (PIL.ImageOps.fit if crop else PIL.ImageOps.pad)(to_rgb(picture), size, PIL.Image.Resampling.LANCZOS)


def _to_frame(picture: PIL.Image.Image) -> "av.VideoFrame":
    return av.VideoFrame.from_image(picture).reformat(
        format="yuv420p", dst_colorspace="ITU709", src_color_range="JPEG", dst_color_range="MPEG"
    )


def read_picture(path: str | os.PathLike, side: int | None = None) -> PIL.Image.Image:
    """Opens a picture, upright and RGB.

    Args:
        path: The file.
        side: Make a larger picture smaller, until its shorter side is this many pixels: sixty photographs at once
            are too many as cameras write them.

    Returns:
        The picture.

    Raises:
        ValueError: If the file is no picture, or damaged.
    """
    try:
        with PIL.Image.open(path) as opened:
            picture = to_rgb(opened)
    except FileNotFoundError:
        raise
    # Pillow's decoders let anything out that a damaged file provokes.
    except Exception as error:
        raise ValueError(f"{str(path)!r} cannot be read as a picture: {error}") from error
    if side is not None and min(picture.size) > side:
        scale = side / min(picture.size)
        picture = picture.resize(
            [max(1, round(length * scale)) for length in picture.size], PIL.Image.Resampling.LANCZOS
        )
    return picture


def write_scored_film(
    path: str | os.PathLike,
    film: Film,
    waveform: np.ndarray | torch.Tensor,
    sampling_rate: int,
    old_sound: str = "drop",
    old_sound_gain_in_db: float = 0.0,
) -> None:
    """Writes a film with new music. Its pictures are copied as they are, not encoded anew.

    Args:
        path: The file to write; its suffix names the container, which must take the film's kind of pictures. It is
            complete or absent, and must not be the film itself.
        film: The film.
        waveform: `[T]` or `[C, T]` in [-1, 1]; it is cut, or followed by silence, where the film ends.
        sampling_rate: Of `waveform`, in Hz.
        old_sound: `"drop"`, `"keep"` it under the music, or `"duck"`: the music steps back where the old sound,
            speech for example, is loud. A film without sound has nothing to keep.
        old_sound_gain_in_db: Added to the level of the old sound that is kept.

    Raises:
        TypeError: If `waveform` is not a floating-point array or tensor.
        ValueError: If an argument is unusable, or the container does not take the film's pictures.
        OSError: If the file cannot be written.
    """
    path = Path(path)
    if old_sound not in ("drop", "keep", "duck"):
        raise ValueError(f"`old_sound` must be 'drop', 'keep' or 'duck', got {old_sound!r}.")
    if not -120 <= old_sound_gain_in_db <= 40:
        raise ValueError(f"`old_sound_gain_in_db` must be in [-120, 40], got {old_sound_gain_in_db!r}.")
    if path.exists() and path.samefile(film.path):
        raise ValueError(f"`path` is the film itself, {str(path)!r}: write the scored film to another file.")
    waveform = _as_channels(waveform, sampling_rate)
    num_samples = max(1, round(film.duration * sampling_rate))
    waveform = np.pad(waveform[:, :num_samples], ((0, 0), (0, max(0, num_samples - waveform.shape[1]))))

    with _open(film.path) as source, atomic_write(path) as temporary:
        stream = _picture_stream(source, film.path)
        sound = _blocks(waveform, sampling_rate)
        if old_sound != "drop" and film.has_sound:
            sound = _mix(sound, film, sampling_rate, waveform.shape[0], old_sound == "duck", old_sound_gain_in_db)
        with _create(temporary) as container:
            container.metadata.update(source.metadata)
            try:
                copied = container.add_stream_from_template(stream)
                packets = (packet for packet in source.demux(stream) if packet.size)
                progress = logging.tqdm(packets, total=film.num_frames, desc=f"Writing {path.name}", unit=" pictures")
                _mux(container, _copy(progress, copied, film.start), _encode_sound(container, sound))
            # FFmpeg's refusals are ValueErrors as well; a full disk is none.
            except ValueError as error:
                name = stream.codec_context.name
                message = f"the pictures ({name}) cannot be copied into {str(path)!r}: {error} A .mkv takes all kinds."
                raise ValueError(message) from error


def _copy(packets: Iterable["av.Packet"], copied: "av.VideoStream", start: float) -> Iterator["av.Packet"]:
    """Yields a film's packets for the stream `copied`, on a clock that begins with the first picture."""
    for packet in packets:
        offset = round(start / packet.time_base)
        packet.pts = None if packet.pts is None else packet.pts - offset
        packet.dts = None if packet.dts is None else packet.dts - offset
        packet.stream = copied
        yield packet


def _mix(
    music: Iterable["av.AudioFrame"],
    film: Film,
    sampling_rate: int,
    num_channels: int,
    duck: bool,
    gain_in_db: float,
) -> Iterator["av.AudioFrame"]:
    """Mixes music with a film's own sound, block by block, in FFmpeg's filters."""
    with _open(film.path) as source:
        stream = source.streams.audio[0]
        graph = av.filter.Graph()
        music_in = graph.add_abuffer(
            format="fltp",
            sample_rate=sampling_rate,
            layout=LAYOUTS[num_channels],
            time_base=Fraction(1, sampling_rate),
        )
        old_in = graph.add_abuffer(template=stream, time_base=stream.time_base)
        music_out = _chain(graph, music_in, ("aresample", str(SOUND_RATE)), STEREO)
        # The old sound keeps its place: silence where it has gaps, nothing of it before the first picture.
        placed = ("aresample", f"{SOUND_RATE}:async=1:first_pts=0")
        old_out = _chain(graph, old_in, placed, STEREO, ("volume", f"{gain_in_db}dB"), ("apad", ""))
        if duck:
            split = graph.add("asplit")
            old_out.link_to(split)
            compressor = graph.add("sidechaincompress", ":".join(f"{key}={value}" for key, value in DUCKING.items()))
            music_out.link_to(compressor)
            split.link_to(compressor, 1, 1)
            music_out, old_out = compressor, split
        mixer = graph.add("amix", "inputs=2:duration=first:normalize=0")
        music_out.link_to(mixer)
        old_out.link_to(mixer, 0, 1)
        sink = _chain(graph, mixer, ("alimiter", "level=disabled:latency=1"), ("abuffersink", ""))
        graph.configure()

        def old_frames() -> Iterator["av.AudioFrame"]:
            for frame in source.decode(stream):
                if frame.pts is not None:
                    frame.pts -= round(film.start / frame.time_base)
                    yield frame

        # Whichever is behind goes on, so that neither waits in the memory.
        waiting = {music_in: [0.0, iter(music)], old_in: [0.0, old_frames()]}
        while True:
            try:
                frame = sink.pull()
            except av.error.BlockingIOError:
                entry = min(waiting, key=lambda one: waiting[one][0])
                block = next(waiting[entry][1], None)
                waiting[entry][0] = math.inf if block is None else float(block.pts * block.time_base)
                entry.push(block)
            except av.error.EOFError:
                return
            else:
                yield frame


def _chain(graph: "av.filter.Graph", first: "av.filter.context.FilterContext", *filters: tuple[str, str]):
    """Links filters, each given by name and arguments, behind `first`; returns the last."""
    for name, arguments in filters:
        following = graph.add(name, arguments) if arguments else graph.add(name)
        first.link_to(following)
        first = following
    return first


def _as_channels(waveform: np.ndarray | torch.Tensor, sampling_rate: int) -> np.ndarray:
    """Checks a waveform `[T]` or `[C, T]` and gives it as float32 `[C, T]`, its peak at most 1."""
    check_sampling_rate(sampling_rate)
    samples = check_waveform(waveform).detach().cpu().float().numpy()
    samples = samples[None] if samples.ndim == 1 else samples
    if samples.ndim != 2 or samples.shape[0] not in LAYOUTS:
        raise ValueError(f"`waveform` must be [samples] or [1 or 2 channels, samples], got {list(samples.shape)}.")
    return samples / max(1.0, float(np.abs(samples).max()))


def _blocks(waveform: np.ndarray, sampling_rate: int) -> Iterator["av.AudioFrame"]:
    """Yields a waveform `[C, T]` as frames of a tenth of a second."""
    step = max(1, sampling_rate // 10)
    for first in range(0, waveform.shape[1], step):
        block = np.ascontiguousarray(waveform[:, first : first + step])
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=LAYOUTS[len(block)])
        frame.sample_rate, frame.pts, frame.time_base = sampling_rate, first, Fraction(1, sampling_rate)
        yield frame


def _encode_sound(container: "av.container.OutputContainer", frames: Iterable["av.AudioFrame"]):
    """Adds a sound stream of the kind that the container is used with; returns its packets as they are made."""
    codec = "aac" if "aac" in container.supported_codecs else container.default_audio_codec
    return _encode(container.add_stream(codec, rate=SOUND_RATE, layout="stereo"), frames)


def _encode(stream: "av.stream.Stream", frames: Iterable) -> Iterator["av.Packet"]:
    for frame in frames:
        yield from stream.encode(frame)
    yield from stream.encode(None)


def _mux(container: "av.container.OutputContainer", *streams: Iterator["av.Packet"]) -> None:
    """Writes packets in the order of time: pictures and their sound lie side by side in the file."""
    for packet in heapq.merge(*streams, key=lambda packet: float((packet.dts or 0) * packet.time_base)):
        container.mux(packet)


def _create(path: Path) -> "av.container.OutputContainer":
    # The index comes first, so that a browser need not load the whole file before it plays.
    options = {"movflags": "+faststart"} if path.suffix.lower() in (".mp4", ".mov", ".m4v") else {}
    try:
        return av.open(os.fspath(path), "w", options=options)
    except ValueError as error:
        raise ValueError(f"{path.suffix!r} is no suffix of a film: write .mp4, .mov or .mkv.") from error

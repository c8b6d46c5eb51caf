"""Pictures and music as one file: slide shows, and films with new music or with music under their old sound.

Needs the extra `film`. All times are seconds from the first picture.
"""

import bisect
import heapq
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from diffusers.utils import logging

from .arguments_melfusion import check_integer, check_path, check_real, check_reals
from .files_melfusion import atomic_write
from .film import FRAME_RATE, Film, check_film, open_film, picture_stream
from .pictures_melfusion import to_rgb
from .waveforms_melfusion import check_sampling_rate, check_waveform

try:
    import av
except ImportError as error:
    raise ImportError("Slide shows and films need the extra `film`: pip install .[film]") from error

# What every player takes, whatever the music's own rate is.
SOUND_RATE = 48000
# What H.264 can say.
MAX_SIDE = 16384
LAYOUTS = {1: "mono", 2: "stereo"}
HEVC_TAG = "hvc1"
STEREO = ("aformat", "sample_fmts=fltp:channel_layouts=stereo")
# Above -30 dB of old sound the music steps back, at most by about 15 dB, and takes its time to come back.
DUCKING = {"threshold": "0.03", "ratio": "6", "attack": "40", "release": "700"}


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
        sampling_rate: The sampling rate of `waveform`, in Hz.
        size: Width and height in pixels, even.
        crop: Fill the size and lose what lies outside, instead of putting black beside or above the picture.
        fade_in_s: How long one picture takes to become the next, half of it before the change; at most as long as the
            shorter of the two lasts.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the path, the size, the starts, the fade or the waveform is unusable, or the pictures run out.
        OSError: If the file cannot be written.
    """
    check_path("path", path)
    if Path(path).suffix.lower() != ".mp4":
        raise ValueError(f"`path` must end in .mp4, got {str(path)!r}.")
    if not isinstance(size, (list, tuple)) or len(size) != 2:
        raise TypeError(f"`size` must be width and height in pixels, got {size!r:.80}.")
    for side in size:
        check_integer("size", side, 16, MAX_SIDE)
        if side % 2:
            raise ValueError(f"`size` must be even, got {size}: H.264 stores colours for 2 x 2 pixels.")
    check_real("fade_in_s", fade_in_s, 0.0)
    check_reals("starts", starts)
    waveform = _as_channels(waveform, sampling_rate)
    duration = waveform.shape[1] / sampling_rate
    edges = np.array([*starts, duration])
    if len(starts) == 0 or starts[0] != 0 or not (np.diff(edges) > 0).all():
        raise ValueError(f"`starts` must begin at 0, ascend and end before {duration:.2f} s, got {list(starts)}.")
    if isinstance(pictures, Sequence) and len(pictures) != len(starts):
        raise ValueError(f"`pictures` must be as many as `starts`, got {len(pictures)} for {len(starts)}.")

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
        # Only two changes can have a fade that shows in this frame: the last one and the next.
        change = index if index and time - starts[index] < fades[index - 1] / 2 else index + 1
        fading = change < len(starts) and 0 < change and abs(time - starts[change]) < fades[change - 1] / 2
        for needed in range(max(fitted, default=-1) + 1, (change if fading else index) + 1):
            picture = next(coming, None)
            if picture is None:
                raise ValueError(f"`pictures` must be as many as `starts`, got {needed} for {len(starts)}.")
            fitted[needed] = _fit(picture, size, crop)
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
        TypeError: If `path` is no path, or `side` no int.
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no picture, or damaged, or `side` is below 1.
    """
    check_path("path", path)
    if side is not None:
        check_integer("side", side, 1)
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

    Its subtitles and chapters are left out.

    Args:
        path: The file to write; its suffix names the container, which must take the film's kind of pictures. It is
            complete or absent, and must not be the film itself.
        film: The film.
        waveform: `[T]` or `[C, T]` in [-1, 1]; it is cut, or followed by silence, where the film ends.
        sampling_rate: The sampling rate of `waveform`, in Hz.
        old_sound: `"drop"`, `"keep"` it under the music, or `"duck"`: the music steps back where the old sound,
            speech for example, is loud. A film without sound has nothing to keep.
        old_sound_gain_in_db: Added to the level of the old sound that is kept.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is unusable, or the container does not take the film's pictures.
        OSError: If the file cannot be written.
    """
    check_path("path", path)
    check_film(film)
    path = Path(path)
    check_old_sound(old_sound, old_sound_gain_in_db)
    if path.exists() and path.samefile(film.path):
        raise ValueError(f"`path` is the film itself, {str(path)!r}: write the scored film to another file.")
    waveform = _as_channels(waveform, sampling_rate)
    num_samples = max(1, round(film.duration * sampling_rate))
    waveform = np.pad(waveform[:, :num_samples], ((0, 0), (0, max(0, num_samples - waveform.shape[1]))))

    with open_film(film.path) as source, atomic_write(path) as temporary:
        stream = picture_stream(source, film.path)
        sound = _blocks(waveform, sampling_rate)
        if old_sound != "drop" and film.has_sound:
            sound = _mix(sound, film, sampling_rate, waveform.shape[0], old_sound == "duck", old_sound_gain_in_db)
        with _create(temporary) as container:
            container.metadata.update(source.metadata)
            with _naming_what_cannot_be_copied(stream, path):
                copied = _add_copied_stream(container, stream)
                packets = (packet for packet in source.demux(stream) if packet.size)
                progress = logging.tqdm(packets, total=film.num_frames, desc=f"Writing {path.name}", unit=" pictures")
                _mux(container, _copy(progress, copied, film.start), _encode_sound(container, sound))


def check_old_sound(old_sound: str, old_sound_gain_in_db: float) -> None:
    """Refuses what `write_scored_film` would refuse of these, before minutes of music are made for it.

    Args:
        old_sound: `"drop"`, `"keep"` or `"duck"`.
        old_sound_gain_in_db: In [-120, 40].

    Raises:
        TypeError: If the gain is no number.
        ValueError: If one is anything else.
    """
    if old_sound not in ("drop", "keep", "duck"):
        raise ValueError(f"`old_sound` must be 'drop', 'keep' or 'duck', got {old_sound!r}.")
    check_real("old_sound_gain_in_db", old_sound_gain_in_db, -120.0, 40.0)


def check_container(path: str | os.PathLike, film: Film) -> None:
    """Refuses what `write_scored_film` would refuse of a path, before minutes of music are made for it.

    Args:
        path: The file to write, in a folder that exists.
        film: The film whose pictures it is to hold.

    Raises:
        TypeError: If `path` is no path, or `film` no `Film`.
        ValueError: If the suffix is no container's, or the container does not take the film's pictures.
        OSError: If the folder cannot be written to.
    """
    check_path("path", path)
    check_film(film)
    path = Path(path)
    with open_film(film.path) as source, tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        stream = picture_stream(source, film.path)
        with _create(Path(folder, path.name)) as container, _naming_what_cannot_be_copied(stream, path):
            _add_copied_stream(container, stream)


def _add_copied_stream(container: "av.container.OutputContainer", stream: "av.VideoStream") -> "av.VideoStream":
    # Without `opaque` PyAV looks for an encoder of the decoder's name: there is none for AV1 and Theora.
    copied = container.add_stream_from_template(stream, opaque=True)
    # PyAV drops the tag, FFmpeg's own is hev1, and Apple's players show hvc1 only, which is what phones write.
    if stream.codec_context.codec_tag == HEVC_TAG and container.format.name in ("mp4", "mov"):
        copied.codec_context.codec_tag = HEVC_TAG
    return copied


@contextmanager
def _naming_what_cannot_be_copied(stream: "av.VideoStream", path: Path) -> Iterator[None]:
    try:
        yield
    # FFmpeg's refusals are ValueErrors as well; a full disk is none.
    except ValueError as error:
        name = stream.codec_context.name
        message = f"the pictures ({name}) cannot be copied into {str(path)!r}: {error} A .mkv takes nearly all kinds."
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
    with open_film(film.path) as source:
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
        container = av.open(os.fspath(path), "w", options=options)
    except ValueError as error:
        raise ValueError(f"{path.suffix!r} is no suffix of a film: write .mp4, .mov or .mkv.") from error
    if container.default_audio_codec == "none":
        container.close()
        raise ValueError(f"{path.suffix!r} holds no sound: write .mp4, .mov or .mkv.")
    return container

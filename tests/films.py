"""Small real films and music with onsets at known times, made with PyAV."""

from fractions import Fraction

import av
import numpy as np
import PIL.Image

RATE = 16000
COLOURS = ("red", "lime", "blue", "yellow")
RGB = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}


def clicks(times, duration, rate=RATE, pitch=660):
    """Decaying tones at `times`, `[T]`."""
    waveform = np.zeros(round(duration * rate), np.float32)
    for begin in times:
        first = round(begin * rate)
        # After three seconds nothing is left.
        seconds = np.arange(min(len(waveform) - first, 3 * rate)) / rate
        waveform[first : first + 3 * rate] += 0.3 * np.sin(2 * np.pi * pitch * seconds) * np.exp(-20 * seconds)
    return waveform


def shot_picture(colour, size):
    """A colour with its upper left quarter white, so that it shows which way up it is."""
    picture = PIL.Image.new("RGB", size, colour)
    picture.paste("white", (0, 0, size[0] // 2, size[1] // 2))
    return picture


def write_film(
    path, times=None, size=(64, 48), shot=1.0, rotation=0, sound=None, start=0.0, codec="libx264", tag=None, **options
):
    """A film whose colour changes every `shot` seconds; its pictures are shown at `times`."""
    times = np.arange(0, 4, 0.04) if times is None else times
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"g": "20", **options})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        if tag:
            stream.codec_context.codec_tag = tag
        if rotation:
            stream.set_display_rotation(rotation)
        track = None if sound is None else container.add_stream("aac", rate=RATE, layout="mono")
        for begin in times:
            colour = COLOURS[int(begin / shot + 1e-9) % 4]
            frame = av.VideoFrame.from_image(shot_picture(colour, size))
            frame.pts, frame.time_base = round((begin + start) * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if track is not None:
            frame = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = RATE, round(start * RATE), Fraction(1, RATE)
            container.mux(track.encode(frame))
            container.mux(track.encode(None))
    return path

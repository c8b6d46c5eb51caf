"""Waveforms in and out: reading and writing sound files, and the way from a waveform to AudioLDM's latents.

    waveform, sampling_rate = load_audio("song.mp3", start=30.0, duration=10.24)
    latents = waveform_to_latents(waveform, sampling_rate, pipe.vae, audio_length_in_s=10.24)

Rate, level and spectrogram of a waveform are `melfusion_pipeline.waveforms_melfusion`'s.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.utils import logging

from .arguments_melfusion import check_integer, check_path, check_positive, check_real
from .checks_melfusion import check_float_tensor
from .files_melfusion import atomic_write
from .waveforms_melfusion import (
    Spectrogram,
    check_sampling_rate,
    check_waveform,
    log_mel_spectrogram,
    normalize_waveform,
    resample,
    working_dtype,
)

if TYPE_CHECKING:
    from av.audio.resampler import AudioResampler
    from av.audio.stream import AudioStream
    from av.container import InputContainer

logger = logging.get_logger(__name__)

# libsndfile's number for what the operating system refuses, such as writing to a full disk.
SYSTEM_ERROR = 2
# What libsndfile writes, by suffix, and how: lossy formats choose their own precision.
SUBTYPES = {"WAV": "PCM_16", "FLAC": "PCM_16", "MP3": "MPEG_LAYER_III", "OGG": "VORBIS"}
MP3_SAMPLING_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
# libsndfile 1.2 dies of a segmentation fault above this rate, and of blocks of more than some million samples.
MAX_OGG_SAMPLING_RATE = 200000
SAMPLES_PER_BLOCK = 1 << 16
# What libsndfile cannot read and PyAV can.
AV_SUFFIXES = (".aac", ".m4a", ".mov", ".mp4")
# Decoding begins this many seconds early: a compressed frame builds upon the frames before it.
PREROLL = Fraction(1, 2)


class EmbeddedFile(NamedTuple):
    """A file that lies inside of another, as pictures and clips do in Parquet: its `content` and its `name`."""

    content: bytes
    name: str

    def __str__(self) -> str:
        return self.name


def check_file_format(path: Path, file_format: str, sampling_rate: int) -> None:
    """Raises `ValueError` unless `save_audio` writes `file_format`, the suffix of `path`, at `sampling_rate` (Hz)."""
    if file_format not in SUBTYPES:
        raise ValueError(f"`path` must end in .wav, .flac, .mp3 or .ogg, but is {str(path)!r}.")
    if file_format == "MP3" and sampling_rate not in MP3_SAMPLING_RATES:
        rates = ", ".join(map(str, MP3_SAMPLING_RATES))
        raise ValueError(f"`sampling_rate` of an MP3 must be one of {rates} Hz, but is {sampling_rate}: resample it.")
    if file_format == "OGG" and sampling_rate > MAX_OGG_SAMPLING_RATE:
        raise ValueError(f"`sampling_rate` of an OGG is at most {MAX_OGG_SAMPLING_RATE} Hz, but is {sampling_rate}.")


def save_audio(path: str | os.PathLike, waveform: np.ndarray | torch.Tensor, sampling_rate: int) -> None:
    """Writes a waveform as 16-bit WAV or FLAC, MP3 or Ogg Vorbis; an existing file is replaced at once.

    Args:
        path: file to write, ending in `.wav`, `.flac`, `.mp3` or `.ogg`.
        waveform: samples in [-1, 1], `[T]` or `[C, T]`. A waveform whose peak is above 1 is scaled to peak 1 with a
            warning, never clipped.
        sampling_rate: samples a second, for generated music `pipe.sampling_rate`. MP3 knows 8, 11.025,
            12, 16, 22.05, 24, 32, 44.1 and 48 kHz only, Ogg Vorbis at most 200 kHz.

    Raises:
        TypeError: if `path` is no path, or `waveform` not a floating-point array or tensor.
        ValueError: if `waveform` is empty, not finite or of another shape, or the suffix or the rate is unusable.
        OSError: if the file cannot be written, for example on a full disk.
    """
    check_path("path", path)
    path, file_format = Path(path), Path(path).suffix[1:].upper()
    check_sampling_rate(sampling_rate)
    check_file_format(path, file_format, sampling_rate)
    if not path.parent.is_dir():
        raise ValueError(f"`path` is {str(path)!r}, but there is no folder {str(path.parent)!r}: create it first.")
    samples = check_waveform(waveform).detach().cpu().numpy()
    if samples.ndim > 2 or (samples.ndim == 2 and samples.shape[0] > samples.shape[1]):
        raise ValueError(f"`waveform` must be [samples] or [channels, samples], but its shape is {samples.shape}.")
    if file_format == "MP3" and samples.ndim == 2 and len(samples) > 2:
        raise ValueError(f"`waveform` has {len(samples)} channels, but an MP3 at most 2: mix them or write a FLAC.")
    peak = np.abs(samples).max()
    if peak > 1:
        logger.warning(f"The peak of `waveform` is {peak:.3f}; it is scaled to 1 so that {path.name} does not clip.")
        samples = samples / peak
    samples = np.atleast_2d(samples)
    arguments = (int(sampling_rate), len(samples), SUBTYPES[file_format])
    try:
        with atomic_write(path) as temporary:
            with soundfile.SoundFile(temporary, "w", *arguments, format=file_format) as file:
                for start in range(0, samples.shape[1], SAMPLES_PER_BLOCK):
                    file.write(samples[:, start : start + SAMPLES_PER_BLOCK].T)
    except soundfile.LibsndfileError as error:
        if error.code == SYSTEM_ERROR:
            raise OSError(f"{str(path)!r} cannot be written: {error}") from error
        raise ValueError(f"{samples.shape} samples at {sampling_rate} Hz make no {file_format}: {error}") from error


def load_audio(
    path: str | os.PathLike | EmbeddedFile, start: float = 0.0, duration: float | None = None
) -> tuple[torch.Tensor, int]:
    """Reads a stretch of a sound file without decoding the rest of it.

    Args:
        path: the file: wav, flac, ogg, mp3, or, with PyAV (`pip install av`), m4a, aac, or the sound of an mp4
            or a mov.
        start: where to begin, in seconds.
        duration: how much to read, in seconds; less is returned where the file ends earlier. `None` reads to the end.

    Returns:
        The waveform, float32 `[C, T]`, and its sampling rate in Hz.

    Raises:
        ImportError: if the file needs PyAV and it is not installed.
        TypeError: if `path` is no path, or `start` or `duration` no number.
        ValueError: if `start` or `duration` is unusable, or the file is unreadable or holds no finite samples there.
    """
    check_real("start", start, 0.0)
    if duration is not None:
        check_positive("duration", duration)
    decode = decode_with_av if needs_av(path) else decode_with_libsndfile
    samples, sampling_rate = decode(path, start, duration)
    if samples.shape[-1] == 0:
        raise ValueError(f"{str(path)!r} holds no samples at {start} s.")
    if not np.isfinite(samples).all():
        raise ValueError(f"{str(path)!r} holds NaN or infinite samples.")
    return torch.from_numpy(np.ascontiguousarray(samples)), sampling_rate


def needs_av(path: str | os.PathLike | EmbeddedFile) -> bool:
    """Returns whether PyAV must read the sound file `path`; one that lies inside of a set may have no suffix."""
    if not isinstance(path, EmbeddedFile):
        check_path("path", path)
    is_mp4 = isinstance(path, EmbeddedFile) and path.content[4:8] == b"ftyp"
    return is_mp4 or Path(str(path)).suffix.lower() in AV_SUFFIXES


def stretch_bounds(start: float, duration: float | None, sampling_rate: int, num_samples: int) -> tuple[int, int]:
    """Returns the first sample of a stretch and the one after its last.

    Args:
        start: where the stretch begins, in seconds.
        duration: how long it is, in seconds; `None` is to the end.
        sampling_rate: of the file, in Hz.
        num_samples: in the whole file, of each channel.
    """
    # The minimum comes before rounding, which infinity does not survive.
    first = round(min(start * sampling_rate, num_samples))
    if duration is None:
        return first, num_samples
    return first, min(first + round(min(duration * sampling_rate, num_samples)), num_samples)


@contextmanager
def open_with_libsndfile(path: str | os.PathLike | EmbeddedFile) -> Iterator[soundfile.SoundFile]:
    """Opens the sound file `path`; what libsndfile refuses while it is open is a `ValueError` that names the file."""
    if not isinstance(path, EmbeddedFile) and not Path(path).is_file():
        found = "it is a folder" if Path(path).is_dir() else "there is no such file"
        raise ValueError(f"{str(path)!r} cannot be read as a sound file: {found}.")
    try:
        with soundfile.SoundFile(BytesIO(path.content) if isinstance(path, EmbeddedFile) else path) as file:
            yield file
    except (soundfile.LibsndfileError, MemoryError) as error:
        # A damaged header may promise more samples than fit into the memory.
        raise ValueError(f"{str(path)!r} cannot be read as a sound file: {error}") from error


def decode_with_libsndfile(
    path: str | os.PathLike | EmbeddedFile, start: float, duration: float | None
) -> tuple[np.ndarray, int]:
    """Reads what libsndfile knows: wav, flac, ogg, mp3.

    Args:
        path: the file.
        start: where to begin, in seconds.
        duration: how much to read, in seconds, or `None` for the rest.

    Returns:
        The waveform, float32 `[C, T]`, and its sampling rate in Hz.
    """
    with open_with_libsndfile(path) as file:
        first, last = stretch_bounds(start, duration, file.samplerate, file.frames)
        preroll = min(first, int(PREROLL * file.samplerate))
        file.seek(first - preroll)
        return file.read(last - first + preroll, dtype="float32", always_2d=True)[preroll:].T, file.samplerate


@contextmanager
def open_with_av(
    path: str | os.PathLike | EmbeddedFile,
) -> Iterator[tuple["InputContainer", "AudioStream", "AudioResampler"]]:
    """Opens an MP4 or raw AAC file.

    Args:
        path: the file.

    Yields:
        The file, its first sound, and what turns that sound's frames into float32.

    Raises:
        ImportError: if PyAV is not installed.
        ValueError: if FFmpeg cannot read the file, here or while it is open, or it is of another kind or has no sound.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError(f"Reading {str(path)!r} needs PyAV: pip install av") from error
    # A playlist that calls itself a sound must not make FFmpeg open other files or addresses.
    options = {"format_whitelist": "mov,aac", "protocol_whitelist": "file"}
    try:
        file = BytesIO(path.content) if isinstance(path, EmbeddedFile) else f"file:{os.fspath(path)}"
        with av.open(file, options=options, metadata_errors="replace") as container:
            if not container.streams.audio:
                raise ValueError("it has no sound")
            yield container, container.streams.audio[0], av.AudioResampler(format="fltp")
    except (av.FFmpegError, ValueError, MemoryError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as a sound file: {error}") from error


def length_with_av(container: "InputContainer", stream: "AudioStream") -> Fraction:
    """Returns the length in seconds of `stream`, which is open in `container` and at its beginning."""
    if container.format.name != "aac" and stream.duration is not None:
        return stream.duration * stream.time_base
    # A raw AAC file does not say how long it is, and FFmpeg guesses from the bit rate of its beginning.
    length = sum(packet.duration or 0 for packet in container.demux(stream)) * stream.time_base
    container.seek(0, stream=stream)
    return Fraction(length)


def decode_with_av(
    path: str | os.PathLike | EmbeddedFile, start: float, duration: float | None
) -> tuple[np.ndarray, int]:
    """Reads what PyAV knows: MP4 and raw AAC files.

    Args:
        path: the file.
        start: where to begin, in seconds from the first sample, also where a film's sound begins after its pictures.
        duration: how much to read, in seconds, or `None` for the rest.

    Returns:
        The waveform, float32 `[C, T]`, and its sampling rate in Hz.

    Raises:
        ImportError: if PyAV is not installed.
        ValueError: if the file cannot be read or has no sound.
    """
    with open_with_av(path) as (container, stream, to_float):
        length, origin = length_with_av(container, stream), stream.start_time or 0
        if start > PREROLL:
            position = max(min(Fraction(start), length) - PREROLL, 0)
            container.seek(origin + int(position / stream.time_base), stream=stream)
        blocks, num_decoded = [], 0
        for frame in container.decode(stream):
            if not blocks:
                sampling_rate = frame.sample_rate
                first, last = stretch_bounds(start, duration, sampling_rate, round(length * sampling_rate))
                position = round((frame.pts - origin) * frame.time_base * sampling_rate)
            blocks += [block.to_ndarray() for block in to_float.resample(frame)]
            num_decoded += frame.samples
            if position + num_decoded >= last:
                break
        if not blocks:
            raise ValueError("it has no sound")
    return np.concatenate(blocks, axis=1)[:, first - position : last - position], sampling_rate


def audio_duration(path: str | os.PathLike | EmbeddedFile) -> float:
    """Returns the length of the sound file `path` in seconds; raises what `load_audio` does for an unreadable one."""
    if needs_av(path):
        with open_with_av(path) as (container, stream, _):
            return float(length_with_av(container, stream))
    with open_with_libsndfile(path) as file:
        return file.frames / file.samplerate


def encode_mel(
    mel: torch.Tensor,
    vae: AutoencoderKL,
    sample_mode: str = "mode",
    generator: torch.Generator | list[torch.Generator] | None = None,
    num_mel_bands: int = Spectrogram.num_mel_bands,
) -> torch.Tensor:
    """Encodes log-mel spectrograms as scaled music latents.

    Args:
        mel: `[B, T, num_mel_bands]`, see `log_mel_spectrogram`.
        vae: The music autoencoder.
        sample_mode: `"mode"` of the posterior, or `"sample"` to draw from it.
        generator: for `"sample"`, one or one a row.
        num_mel_bands: of the spectrograms that the autoencoder was made for.

    Returns:
        Latents times `vae.config.scaling_factor`, `[B, latent channels, T / 4, 16]` with AudioLDM's autoencoder, in
        its dtype.

    Raises:
        TypeError: if `mel` is no tensor of floating-point numbers.
        ValueError: if `sample_mode` is unknown or `mel` has another shape.
    """
    if sample_mode not in ("mode", "sample"):
        raise ValueError(f"`sample_mode` must be 'mode' or 'sample', but is {sample_mode!r}.")
    check_float_tensor("mel", mel)
    check_integer("num_mel_bands", num_mel_bands, 1)
    if mel.ndim != 3 or mel.shape[-1] != num_mel_bands:
        raise ValueError(f"`mel` must be [batch, frames, {num_mel_bands}], but its shape is {list(mel.shape)}.")
    posterior = vae.encode(mel.unsqueeze(1).to(vae.device, vae.dtype)).latent_dist
    latents = posterior.mode() if sample_mode == "mode" else posterior.sample(generator)
    return latents * vae.config.scaling_factor


def waveform_to_latents(
    waveform: np.ndarray | torch.Tensor,
    sampling_rate: int,
    vae: AutoencoderKL,
    audio_length_in_s: float | None = None,
    sample_mode: str = "mode",
    generator: torch.Generator | list[torch.Generator] | None = None,
    spectrogram: Spectrogram = Spectrogram(),
) -> torch.Tensor:
    """Turns waveforms into scaled music latents, on the autoencoder's device; differentiable.

    Channels are averaged, then the waveform is resampled, normalised, padded with zeros and encoded.

    Args:
        waveform: `[T]`, `[C, T]` or `[B, C, T]`; a batch of mono waveforms is `[B, 1, T]`.
        sampling_rate: of `waveform`, in Hz.
        vae: the music autoencoder.
        audio_length_in_s: pad or cut to this many seconds. `None` keeps the waveform's length. Either is rounded up
            to a whole number of latent frames, as the pipeline does.
        sample_mode: `"mode"` of the posterior, or `"sample"` to draw from it.
        generator: for `"sample"`, one or one a row.
        spectrogram: that the autoencoder was made for: AudioLDM's, or `Spectrogram.of(pipe)`.

    Returns:
        `[B, latent channels, frames / 4, 16]` with AudioLDM's autoencoder: at 10.24 s `[B, 8, 256, 16]`.

    Raises:
        TypeError: if `waveform` is not a floating-point array or tensor, or the length no number.
        ValueError: if an argument is empty, not finite, out of range or of the wrong shape.
    """
    mel = waveform_to_mel(waveform, sampling_rate, vae, audio_length_in_s, spectrogram)
    return encode_mel(mel, vae, sample_mode, generator, spectrogram.num_mel_bands)


def waveform_to_mel(
    waveform: np.ndarray | torch.Tensor,
    sampling_rate: int,
    vae: AutoencoderKL,
    audio_length_in_s: float | None = None,
    spectrogram: Spectrogram = Spectrogram(),
) -> torch.Tensor:
    """Turns waveforms into the log-mel spectrograms `[B, frames, bands]` that `vae` encodes, on its device.

    The first half of `waveform_to_latents`, with the same arguments and errors.
    """
    frames_per_latent = 2 ** (len(vae.config.block_out_channels) - 1)
    return prepare_mel(waveform, sampling_rate, frames_per_latent, vae.device, audio_length_in_s, spectrogram)


def prepare_mel(
    waveform: np.ndarray | torch.Tensor,
    sampling_rate: int,
    frames_per_latent: int,
    device: torch.device | str = "cpu",
    audio_length_in_s: float | None = None,
    spectrogram: Spectrogram = Spectrogram(),
) -> torch.Tensor:
    """`waveform_to_mel` without the autoencoder, of which it needs two numbers.

    Args:
        waveform: These and what is not said here are the arguments of `waveform_to_latents`.
        sampling_rate: likewise.
        frames_per_latent: how many frames of a spectrogram become one of the latents.
        device: where to compute.
        audio_length_in_s: likewise.
        spectrogram: likewise.

    Returns:
        `[B, frames, bands]`, float64, or float32 where the device has no other.
    """
    waveform = check_waveform(waveform)
    check_sampling_rate(sampling_rate)
    if waveform.ndim > 3:
        raise ValueError(f"`waveform` must be [T], [C, T] or [B, C, T], but its shape is {list(waveform.shape)}.")
    if audio_length_in_s is not None:
        check_positive("audio_length_in_s", audio_length_in_s)
    device = torch.device(device)
    waveform = waveform.to(working_dtype(device)).to(device)
    waveform = resample(waveform[(None,) * (3 - waveform.ndim)].mean(dim=1), sampling_rate, spectrogram.sampling_rate)
    num_samples = waveform.shape[-1]
    if audio_length_in_s is not None:
        num_samples = round(audio_length_in_s * spectrogram.sampling_rate)
    latent_hop = spectrogram.hop_length * frames_per_latent
    num_samples = math.ceil(num_samples / latent_hop) * latent_hop
    waveform = pad_or_cut(normalize_waveform(waveform[..., :num_samples]), num_samples)
    return log_mel_spectrogram(waveform, spectrogram)


def pad_or_cut(waveform: torch.Tensor, num_samples: int) -> torch.Tensor:
    """Appends zeros to `waveform` `[..., T]`, or cuts its end: then T is `num_samples`."""
    return F.pad(waveform, (0, num_samples - waveform.shape[-1]))


def load_random_crop(
    path: str | os.PathLike | EmbeddedFile,
    start: float,
    duration: float | None,
    audio_length_in_s: float,
    generator: torch.Generator,
    new_sampling_rate: int = Spectrogram.sampling_rate,
) -> torch.Tensor:
    """Reads a random stretch of a sound file between `start` and `start + duration`.

    Args:
        path: the file.
        start: where the music begins, in seconds.
        duration: how long it is, in seconds; `None` is to the end of the file.
        audio_length_in_s: length of the stretch.
        generator: chooses the stretch, by one random number whatever the length.
        new_sampling_rate: of the result, in Hz.

    Returns:
        Mono, peak 0.5, float32 `[audio_length_in_s * new_sampling_rate]`, padded with zeros if the music is shorter.

    Raises:
        TypeError, ValueError: as `load_audio` does, also for `audio_length_in_s` and `new_sampling_rate`.
    """
    check_real("start", start, 0.0)
    check_positive("audio_length_in_s", audio_length_in_s)
    check_sampling_rate(new_sampling_rate, "new_sampling_rate")
    if duration is not None:
        check_positive("duration", duration)
    available = min(audio_duration(path) - start, duration or math.inf)
    start += max(0.0, available - audio_length_in_s) * torch.rand((), generator=generator).item()
    waveform, sampling_rate = load_audio(path, start, min(audio_length_in_s, duration or math.inf))
    # In float64 the result is the same in every process; float32 rounds by the memory's alignment and the threads.
    mono = resample(waveform.double().mean(dim=0), sampling_rate, new_sampling_rate)
    return pad_or_cut(normalize_waveform(mono).float(), round(audio_length_in_s * new_sampling_rate))

"""From a waveform to the log-mel spectrogram for which a music VAE was made: rate, level, bands.

The numbers of the spectrogram are a value, `Spectrogram`: AudioLDM's if nothing is said, else a pipeline's.
"""

import math
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
from diffusers import DiffusionPipeline
from transformers.audio_utils import mel_filter_bank

from .arguments_melfusion import check_real

MEL_FLOOR = 1e-5
PEAK = 0.5
# No format of sound has samples as large, and float32 still holds the sum of an hour of them.
MAX_LEVEL = 1e28
# What the header of a sound file can say.
MAX_SAMPLING_RATE = 2**31 - 1


@dataclass(frozen=True)
class Spectrogram:
    """The numbers of a log-mel spectrogram.

    The defaults are AudioLDM's (arXiv 2301.12503, and the preprocessing of its public checkpoints).

    Args:
        sampling_rate: Of the waveforms, in Hz.
        fft_length: Of the STFT and its window, in samples; even.
        hop_length: From one frame to the next, in samples.
        num_mel_bands: The bands.
        min_frequency: Where the lowest band begins, in Hz.
        max_frequency: Where the highest band ends, in Hz; at most half of `sampling_rate`.

    Raises:
        TypeError: If a frequency is no number.
        ValueError: If a number is out of range.
    """

    sampling_rate: int = 16000
    fft_length: int = 1024
    hop_length: int = 160
    num_mel_bands: int = 64
    min_frequency: float = 0.0
    max_frequency: float = 8000.0

    def __post_init__(self) -> None:
        check_sampling_rate(self.sampling_rate)
        for name in ("fft_length", "hop_length", "num_mel_bands"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
                raise ValueError(f"`{name}` must be a positive whole number, but is {value!r}.")
        if self.fft_length % 2:
            raise ValueError(f"`fft_length` must be even, but is {self.fft_length}.")
        for name in ("min_frequency", "max_frequency"):
            check_real(name, getattr(self, name))
        if not 0 <= self.min_frequency < self.max_frequency <= self.sampling_rate / 2:
            raise ValueError(
                f"`min_frequency` and `max_frequency` must ascend within 0 and {self.sampling_rate / 2:g} Hz, half of"
                f" `sampling_rate`, but are {self.min_frequency!r} and {self.max_frequency!r}."
            )

    @classmethod
    def of(cls, pipe: DiffusionPipeline) -> "Spectrogram":
        """Gives the spectrogram of a pipeline: what its vocoder tells of it, and the rest from its own config.

        Args:
            pipe: The `MelFusionPipeline`.

        Returns:
            The numbers.
        """
        vocoder, config = pipe.vocoder.config, pipe.config
        return cls(
            sampling_rate=vocoder.sampling_rate,
            fft_length=config.spectrogram_fft_length,
            hop_length=math.prod(vocoder.upsample_rates),
            num_mel_bands=vocoder.model_in_dim,
            min_frequency=config.spectrogram_min_frequency,
            max_frequency=config.spectrogram_max_frequency,
        )


def check_sampling_rate(sampling_rate: int, name: str = "sampling_rate") -> None:
    """Raises `ValueError` unless `sampling_rate` (Hz), for the message called `name`, is a positive whole number."""
    if isinstance(sampling_rate, bool) or not isinstance(sampling_rate, Integral) or sampling_rate < 1:
        raise ValueError(f"`{name}` must be a positive whole number of Hz, but is {sampling_rate!r:.80}.")
    if sampling_rate > MAX_SAMPLING_RATE:
        raise ValueError(f"`{name}` must be at most {MAX_SAMPLING_RATE} Hz, but is {sampling_rate!r:.80}.")


def check_waveform(waveform: np.ndarray | torch.Tensor, name: str = "waveform") -> torch.Tensor:
    """Returns `waveform` `[..., T]`, for the messages called `name`, as a tensor of float32 or float64.

    Raises:
        TypeError: if it is neither a numpy array nor a tensor of floating-point numbers.
        ValueError: if it is empty, or holds NaN, infinity or samples above 1e28.
    """
    if not isinstance(waveform, np.ndarray | torch.Tensor):
        raise TypeError(f"`{name}` must be a numpy array or a torch tensor, but is a {type(waveform).__name__}.")
    if isinstance(waveform, np.ndarray) and waveform.dtype.kind == "f":
        # Torch takes no steps backwards, no foreign byte order, no long doubles, and of what is read-only a warning.
        waveform = waveform.astype(np.float32 if waveform.itemsize < 8 else np.float64, order="C", copy=True)
    waveform = torch.from_numpy(waveform) if isinstance(waveform, np.ndarray) else waveform
    if not waveform.is_floating_point():
        raise TypeError(f"`{name}` must be floating-point, but is {waveform.dtype}: scale it to [-1, 1].")
    if waveform.ndim == 0 or waveform.numel() == 0:
        raise ValueError(f"`{name}` must hold samples, but its shape is {list(waveform.shape)}.")
    # As float32: what is larger than that can hold becomes infinite on the way to the VAE.
    if not waveform.float().isfinite().all():
        raise ValueError(f"`{name}` holds NaN or infinite samples: repair or drop the clip.")
    if (peak := waveform.abs().max().item()) > MAX_LEVEL:
        raise ValueError(f"`{name}` holds samples of up to {peak:.4g}, more than {MAX_LEVEL:g}: scale it to [-1, 1].")
    return waveform if waveform.dtype == torch.float64 else waveform.float()


def resample(
    waveform: torch.Tensor, sampling_rate: int, new_sampling_rate: int = Spectrogram.sampling_rate
) -> torch.Tensor:
    """Changes the sampling rate; keeps exactly what lies below both Nyquist frequencies. Differentiable.

    Args:
        waveform: `[..., T]`.
        sampling_rate: of `waveform`, in Hz.
        new_sampling_rate: of the result, in Hz.

    Returns:
        `[..., ceil(T * new_sampling_rate / sampling_rate)]`.
    """
    check_sampling_rate(sampling_rate)
    check_sampling_rate(new_sampling_rate, "new_sampling_rate")
    if sampling_rate == new_sampling_rate:
        return waveform
    divisor = math.gcd(sampling_rate, new_sampling_rate)
    # A whole number of periods of both rates keeps the pitch exact, an odd one leaves no Nyquist bin to lose;
    # 0.1 s of zeros keeps the end out of the start. A large prime factor would make an FFT ten times slower.
    least = math.ceil((waveform.shape[-1] + sampling_rate / 10) * divisor / sampling_rate)
    smooth = (3**a * 5**b * 7**c for a in range(19) for b in range(13) for c in range(11))
    periods = min(number for number in smooth if number >= least)
    length, new_length = (periods * rate // divisor for rate in (sampling_rate, new_sampling_rate))
    spectrum = torch.fft.rfft(waveform, length)[..., : (min(length, new_length) + 1) // 2]
    resampled = torch.fft.irfft(spectrum, new_length) * (new_length / length)
    return resampled[..., : math.ceil(waveform.shape[-1] * new_sampling_rate / sampling_rate)]


def normalize_waveform(waveform: torch.Tensor) -> torch.Tensor:
    """Subtracts each waveform's mean and scales its peak to 0.5, AudioLDM's level; silence stays silent.

    Args:
        waveform: `[..., T]`; in float32, what has a peak below 1e-31 is silent.

    Returns:
        `[..., T]` in [-0.5, 0.5].
    """
    centered = waveform - waveform.mean(dim=-1, keepdim=True)
    peak = centered.abs().amax(dim=-1, keepdim=True)
    # What is left of a constant waveform is rounding error, and what is near the smallest number has lost digits.
    limits = torch.finfo(waveform.dtype)
    rounding = 16 * limits.eps * waveform.abs().amax(dim=-1, keepdim=True)
    silent = peak <= rounding.clamp(min=limits.tiny / limits.eps)
    return torch.where(silent, 0.0, centered * PEAK / peak.masked_fill(silent, 1.0))


def log_mel_spectrogram(waveform: torch.Tensor, spectrogram: Spectrogram = Spectrogram()) -> torch.Tensor:
    """A log-mel spectrogram: centred, reflect-padded STFT, magnitude, Slaney mel bands, natural logarithm.

    It is computed in float64 where the device has it: bands 100 dB below the peak drown in float32's rounding.

    Args:
        waveform: `[..., T]` at the spectrogram's sampling rate, more than half an FFT long.
        spectrogram: Its numbers.

    Returns:
        `[..., T // hop_length, num_mel_bands]` (time x mel band), at least log(1e-5), in the waveform's dtype.

    Raises:
        ValueError: if the waveform is too short for the reflect padding.
    """
    fft_length, hop_length = spectrogram.fft_length, spectrogram.hop_length
    if waveform.shape[-1] <= fft_length // 2:
        raise ValueError(f"`waveform` must be longer than {fft_length // 2}, but is {list(waveform.shape)}: pad it.")
    dtype = working_dtype(waveform.device)
    samples = waveform.to(dtype).reshape(-1, waveform.shape[-1])
    window = torch.hann_window(fft_length, dtype=dtype, device=waveform.device)
    # Under autocast the matrix product would run in half precision.
    with torch.autocast(waveform.device.type, enabled=False):
        spectrum = torch.stft(samples, fft_length, hop_length, window=window, pad_mode="reflect", return_complex=True)
        mel = spectrum.abs().mT @ mel_filters(spectrogram).to(dtype).to(waveform.device)
    log_mel = mel[:, : waveform.shape[-1] // hop_length].clamp(min=MEL_FLOOR).log().to(waveform.dtype)
    return log_mel.reshape(*waveform.shape[:-1], *log_mel.shape[1:])


def working_dtype(device: torch.device) -> torch.dtype:
    """Returns float64, or float32 where `device` is MPS, which has no other."""
    return torch.float32 if device.type == "mps" else torch.float64


def mel_filters(spectrogram: Spectrogram = Spectrogram()) -> torch.Tensor:
    """Computes the mel filter bank.

    Args:
        spectrogram: Its numbers.

    Returns:
        float64 `[fft_length / 2 + 1, num_mel_bands]` (frequency bin x mel band).
    """
    filters = mel_filter_bank(
        spectrogram.fft_length // 2 + 1,
        spectrogram.num_mel_bands,
        spectrogram.min_frequency,
        spectrogram.max_frequency,
        spectrogram.sampling_rate,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(filters)

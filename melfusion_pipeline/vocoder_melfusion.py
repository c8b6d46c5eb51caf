"""The small checkpoint's vocoder. One file without relative imports, so that the Hub can load it alone."""

import math

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

# The noise repeats itself after 16 seconds, so that any stretch of a long piece can have its own part of it.
NOISE_SEED, NOISE_LENGTH = 0, 2**18


class ConvNeXtBlock(nn.Module):
    """ConvNeXt (arXiv 2201.03545) over time, as Vocos uses it: mixes frames, then channels.

    Args:
        width: Channels.
        hidden_width: Channels inside.
        scale: What the block's contribution starts at.
    """

    def __init__(self, width: int, hidden_width: int, scale: float) -> None:
        super().__init__()
        self.frames = nn.Conv1d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.widen = nn.Linear(width, hidden_width)
        self.narrow = nn.Linear(hidden_width, width)
        self.scale = nn.Parameter(torch.full((width,), scale))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Mixes `hidden_states` `[B, T, width]`, whose shape the result has."""
        mixed = self.norm(self.frames(hidden_states.mT).mT)
        return hidden_states + self.scale * self.narrow(F.gelu(self.widen(mixed)))


class MusicVocoder(ModelMixin, ConfigMixin):
    """Turns log-mel spectrograms into waveforms by predicting, frame by frame, tones and a short-time spectrum.

    The backbone and the short-time spectrum are those of Vocos (arXiv 2306.00814), which works at the frame rate
    throughout. Alone they cannot hold a chord: where the spectrogram stands still, so does everything that a
    convolution makes of it, and a frame that repeats every `hop` samples holds multiples of 100 Hz only. So the tones
    come from oscillators that run on through all frames, `tones_per_octave` of them, as in additive synthesis (DDSP,
    arXiv 2001.04643); the network says how strong each one is and how its phase is shifted. The spectrum holds what
    is no tone, attacks above all, and fixed noise in predicted strength.

    The same spectrogram always gives the same waveform.

    Args:
        sampling_rate: The sampling rate of the waveform, in Hz.
        upsample_rates: Their product is the number of samples a frame.
        model_in_dim: Bands of the spectrogram.
        mel_mean: Mean of the spectrograms, subtracted from them.
        mel_std: Standard deviation of the spectrograms, by which they are divided.
        width: Channels of the backbone.
        hidden_width: Channels inside its blocks.
        num_layers: Blocks.
        lowest_tone: Frequency of the lowest oscillator in Hz; the highest lies just below half the sampling rate.
        tones_per_octave: Oscillators an octave.
        fft_length: The length of the short-time spectrum in samples.

    Raises:
        ValueError: If `fft_length` is less than two frames, or `lowest_tone` not below half the sampling rate.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        sampling_rate: int = 16000,
        upsample_rates: tuple[int, ...] = (160,),
        model_in_dim: int = 64,
        mel_mean: float = -5.0,
        mel_std: float = 2.5,
        width: int = 192,
        hidden_width: int = 512,
        num_layers: int = 8,
        lowest_tone: float = 27.5,
        tones_per_octave: int = 36,
        fft_length: int = 512,
    ) -> None:
        super().__init__()
        self.hop = math.prod(upsample_rates)
        if fft_length < 2 * self.hop:
            raise ValueError(f"`fft_length` must be at least two frames ({2 * self.hop}), but is {fft_length}.")
        if not 0 < lowest_tone < sampling_rate / 2:
            raise ValueError(f"`lowest_tone` must be between 0 and {sampling_rate / 2} Hz, but is {lowest_tone}.")
        self.embed = nn.Conv1d(model_in_dim, width, 7, padding=3)
        self.embed_norm = nn.LayerNorm(width, eps=1e-6)
        self.layers = nn.ModuleList(ConvNeXtBlock(width, hidden_width, 1 / num_layers) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.num_tones = math.ceil(tones_per_octave * math.log2(sampling_rate / 2 / lowest_tone))
        self.num_bins = fft_length // 2 + 1
        self.head = nn.Linear(width, 2 * self.num_tones + 3 * self.num_bins)
        for module in self.modules():
            if isinstance(module, nn.Conv1d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def tone_frequencies(self) -> torch.Tensor:
        """Returns the oscillators' frequencies in Hz, float64 `[num_tones]`."""
        octaves = torch.arange(self.num_tones, dtype=torch.float64, device="cpu") / self.config.tones_per_octave
        return self.config.lowest_tone * 2**octaves

    def forward(self, spectrogram: torch.Tensor, first_frame: int = 0) -> torch.Tensor:
        """Makes waveforms.

        Args:
            spectrogram: Log-mel, `[B, T, model_in_dim]` or `[T, model_in_dim]`.
            first_frame: For how many frames oscillators and noise have been running already: where in a longer piece
                the spectrogram begins.

        Returns:
            `[B, T * hop]` or `[T * hop]`, float32 whatever the weights are.

        Raises:
            ValueError: If `spectrogram` has another shape.
        """
        bands = self.config.model_in_dim
        if spectrogram.ndim not in (2, 3) or spectrogram.shape[-1] != bands or 0 in spectrogram.shape:
            raise ValueError(
                f"`spectrogram` must be [batch, frames, {bands}] or [frames, {bands}], with nothing empty, "
                f"but its shape is {list(spectrogram.shape)}."
            )
        batch = spectrogram if spectrogram.ndim == 3 else spectrogram[None]
        hidden_states = (batch - self.config.mel_mean) / self.config.mel_std
        hidden_states = self.embed_norm(self.embed(hidden_states.mT).mT)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        waveform = self.synthesize(self.head(self.norm(hidden_states)), first_frame)
        return waveform if spectrogram.ndim == 3 else waveform[0]

    def synthesize(self, predicted: torch.Tensor, first_frame: int) -> torch.Tensor:
        """Adds up tones, spectrum and noise in float32, whatever the weights are.

        Args:
            predicted: What the head predicts, `[B, T, 2 * num_tones + 3 * num_bins]`.
            first_frame: As in `forward`.

        Returns:
            Waveforms `[B, T * hop]`.
        """
        # A waveform needs phases exact to a thousandth, which half precision has not.
        with torch.autocast(predicted.device.type, enabled=False):
            sizes = (self.num_tones, self.num_tones, self.num_bins, self.num_bins, self.num_bins)
            tone_level, tone_phase, level, phase, noise_level = predicted.float().split(sizes, dim=-1)
            tones = self.add_tones(torch.polar(strength(tone_level), tone_phase), first_frame)
            return tones + self.invert(torch.polar(strength(level), phase), strength(noise_level), first_frame)

    def add_tones(self, tones: torch.Tensor, first_frame: int) -> torch.Tensor:
        """Adds up oscillators whose strengths and phases glide from frame to frame.

        Args:
            tones: Strengths and phases as complex numbers, `[B, T, num_tones]`.
            first_frame: As in `forward`.

        Returns:
            Waveforms `[B, T * hop]`.
        """
        device, frames = tones.device, tones.shape[1]
        cycles = self.tone_frequencies() / self.config.sampling_rate
        # On the CPU, because not every device has float64.
        samples = torch.arange(first_frame, first_frame + frames, dtype=torch.float64, device="cpu") * self.hop
        turns = torch.outer(samples, cycles)
        turned = tones * torch.exp(2j * torch.pi * (turns % 1)).to(torch.complex64).to(device)
        # From a frame's centre out, the oscillators are the same for all frames.
        samples = torch.arange(-self.hop, self.hop, dtype=torch.float64, device="cpu")
        angle = 2 * torch.pi * torch.outer(cycles, samples)
        window = torch.hann_window(2 * self.hop, dtype=torch.float64, device="cpu")
        cosine, sine = ((wave(angle) * window).float().to(device) for wave in (torch.cos, torch.sin))
        pieces = turned.real @ cosine - turned.imag @ sine
        first, second = pieces.split(self.hop, dim=-1)
        # The frame's centre is at its first sample: the second half of a piece meets the next one's first half.
        overlapped = second + F.pad(first[:, 1:], (0, 0, 0, 1))
        return overlapped.flatten(1)

    def invert(self, spectrum: torch.Tensor, noise_level: torch.Tensor, first_frame: int) -> torch.Tensor:
        """Inverts a short-time spectrum to which fixed noise is added.

        Args:
            spectrum: Complex, `[B, T, num_bins]`.
            noise_level: Strength of the noise, `[B, T, num_bins]`.
            first_frame: As in `forward`.

        Returns:
            Waveforms `[B, T * hop]`.
        """
        device, length = spectrum.device, spectrum.shape[1] * self.hop
        window = torch.hann_window(self.config.fft_length, device=device)
        noise = torch.randn(NOISE_LENGTH, generator=torch.Generator().manual_seed(NOISE_SEED), device="cpu")
        noise = noise[(first_frame * self.hop + torch.arange(length, device="cpu")) % NOISE_LENGTH].to(device)
        settings = {"n_fft": self.config.fft_length, "hop_length": self.hop, "window": window}
        shaped = torch.stft(noise, **settings, pad_mode="constant", return_complex=True).mT
        spectrum = spectrum + noise_level * shaped[: spectrum.shape[1]]
        # One more frame closes the last one's second half.
        return torch.istft(F.pad(spectrum.mT, (0, 1)), **settings, length=length)


def strength(level: torch.Tensor) -> torch.Tensor:
    """Returns strengths from logarithms `level` `[...]`; 0 is quiet, and the largest stay finite."""
    return torch.exp((level - 5).clamp(max=5))

"""Between latents and waveforms, window by window, and how seconds become frames on the way."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin

from .arguments_melfusion import check_real
from .checks_melfusion import MAX_AUDIO_LENGTH_IN_S, check_float_tensor
from .given_audio_melfusion import GivenAudio
from .waveforms_melfusion import Spectrogram, log_mel_spectrogram, normalize_waveform, working_dtype
from .windows_melfusion import Windows

# Latent frames over which neighbouring decoded windows pass into each other, between their margins.
DECODER_FADE = 8


class DecodingMixin:
    """The methods of `MelFusionPipeline` between latents and waveforms; to be named before `DiffusionPipeline`."""

    @property
    def sampling_rate(self) -> int:
        """The rate of the waveforms, in Hz."""
        return self.vocoder.config.sampling_rate

    @property
    def default_audio_length_in_s(self) -> float:
        """The length of the music for which the music UNet was made, in seconds."""
        return own_size(self.unet, "unet", "audio_length_in_s") * self.vae_scale_factor * self._seconds_per_frame

    @property
    def _seconds_per_frame(self) -> float:
        return math.prod(self.vocoder.config.upsample_rates) / self.sampling_rate

    @property
    def _min_given_length_in_s(self) -> float:
        # Of one latent frame there is no neighbour, and a spectrogram needs half an FFT.
        return max(self.config.spectrogram_fft_length, 2 * self._samples_per_latent_frame) / self.sampling_rate

    @property
    def _samples_per_latent_frame(self) -> int:
        return self.vae_scale_factor * math.prod(self.vocoder.config.upsample_rates)

    def _num_frames(self, audio_length_in_s: float) -> int:
        # The rounding keeps 10.24 / 0.01 = 1024.0000000000001 from asking for one frame more.
        return math.ceil(round(audio_length_in_s / self._seconds_per_frame, 6))

    def _latent_shape(self, audio_length_in_s: float) -> tuple[int, int, int]:
        time = math.ceil(self._num_frames(audio_length_in_s) / self.vae_scale_factor)
        frequency = self.vocoder.config.model_in_dim // self.vae_scale_factor
        return self.unet.config.in_channels, time, frequency

    def _own_frames(self, num_frames: int) -> int:
        """The latent frames of a window by default; where neither config nor music UNet tells them, `num_frames`."""
        if self.config.default_window_length_in_s is not None:
            return math.ceil(self._num_frames(self.config.default_window_length_in_s) / self.vae_scale_factor)
        if self.unet is None or self.unet.config.sample_size is None:
            return num_frames
        return own_size(self.unet, "unet", "window_length_in_s")

    def _window_frames(self, num_frames: int, window_length_in_s: float | None) -> int:
        if window_length_in_s is None:
            return self._own_frames(num_frames)
        return self._latent_shape(window_length_in_s)[1]

    def _check_decoding(
        self, name: str, tensor: torch.Tensor, dimensions: tuple[str, ...], window_length_in_s: float | None
    ) -> None:
        """Refuses what cannot be decoded or encoded: no tensor, one of other `dimensions`, or such a window."""
        check_float_tensor(name, tensor)
        if tensor.ndim != len(dimensions) or 0 in tensor.shape:
            raise ValueError(f"`{name}` must be [{', '.join(dimensions)}], got {list(tensor.shape)}.")
        if window_length_in_s is not None:
            check_real("window_length_in_s", window_length_in_s, 0.0, MAX_AUDIO_LENGTH_IN_S)

    def _decoded_frames(self, num_frames: int, window_length_in_s: float | None) -> int:
        return max(self._own_frames(num_frames), self._window_frames(num_frames, window_length_in_s))

    def _decoder_windows(self, num_frames: int, margin: int, window_length_in_s: float | None) -> Windows:
        overlap = 2 * margin + DECODER_FADE
        length = max(self._decoded_frames(num_frames, window_length_in_s), overlap + 2 * margin)
        return Windows.lay_out(num_frames, length, overlap, margin)

    @torch.no_grad()
    def encode_audio(self, waveforms: torch.Tensor, window_length_in_s: float | None = None) -> torch.Tensor:
        """Encodes waveforms to music latents: the mode of the VAE's posterior, scaled.

        Like `decode_latents`, which goes the other way, it takes what is longer than a window in windows.

        Args:
            waveforms: `[batch, samples]` at `sampling_rate`, of any level; zeros fill the last latent frame.
            window_length_in_s: As in `decode_latents`.

        Returns:
            `[batch, channels, time, frequency]`, in the dtype of `vae`.

        Raises:
            TypeError: If `waveforms` is no tensor of floating-point numbers, or the window's length no number.
            ValueError: If it has another shape, or the length is out of range.
        """
        self._check_decoding("waveforms", waveforms, ("batch", "samples"), window_length_in_s)
        device, hop, spectrogram = self._execution_device, self._samples_per_latent_frame, Spectrogram.of(self)
        waveforms = normalize_waveform(waveforms.to(working_dtype(device)).to(device))
        waveforms = F.pad(waveforms, (0, -waveforms.shape[-1] % hop)).unflatten(-1, (-1, hop))

        def encode(window: torch.Tensor, _: int) -> torch.Tensor:
            mel = log_mel_spectrogram(window.flatten(-2), spectrogram)[:, None]
            return self.vae.encode(mel.to(self.vae.dtype)).latent_dist.mode() * self.vae.config.scaling_factor

        margin = encoder_margin(self.vae) + math.ceil(spectrogram.fft_length / 2 / hop)
        windows = self._decoder_windows(waveforms.shape[-2], margin, window_length_in_s)
        return self._run_in_windows(encode, waveforms, windows, 1)

    def _encode_given(self, given: GivenAudio, num_frames: int, window_length_in_s: float | None) -> torch.Tensor:
        """Gives the latents of given music, `[pieces, channels, num_frames, frequency]`; behind its end anything."""
        waveforms = given.waveforms
        if given.goes_on:
            # The encoder must not hear that the music stops: what goes on would begin with its end.
            beyond = encoder_margin(self.vae) * self._samples_per_latent_frame
            waveforms = F.pad(waveforms, (0, min(beyond, waveforms.shape[-1] - 1)), mode="reflect")
        latents = self.encode_audio(waveforms, window_length_in_s)[..., :num_frames, :]
        return F.pad(latents, (0, 0, 0, num_frames - latents.shape[-2]))

    def decode_latents(self, latents: torch.Tensor, window_length_in_s: float | None = None) -> torch.Tensor:
        """Decodes music latents to log-mel.

        Latents longer than a window are decoded window by window on a fixed grid, so that the memory does not grow
        with their length. What lies closer to a window's end than the decoder's convolutions look is discarded; there
        the next window takes over, within a short fade: group normalisation (and attention, where the decoder has it)
        looks at the whole window, so that two windows differ a little even there.

        Args:
            latents: `[batch, channels, time, frequency]`.
            window_length_in_s: The length of a window; at least the checkpoint's default, as in `__call__`.

        Returns:
            `[batch, 1, frames, bands]`.

        Raises:
            TypeError, ValueError: As `encode_audio`.
        """
        dimensions = ("batch", "channels", "time", "frequency")
        self._check_decoding("latents", latents, dimensions, window_length_in_s)
        windows = self._decoder_windows(latents.shape[-2], decoder_margin(self.vae), window_length_in_s)
        latents = 1 / self.vae.config.scaling_factor * latents.to(self._execution_device)
        return self._run_in_windows(
            lambda window, _: self.vae.decode(window.to(self.vae.dtype)).sample,
            latents,
            windows,
            self.vae_scale_factor,
        )

    def mel_spectrogram_to_waveform(
        self,
        mel_spectrogram: torch.Tensor,
        audio_length_in_s: float | None = None,
        window_length_in_s: float | None = None,
    ) -> torch.Tensor:
        """Turns log-mel spectrograms into waveforms and cuts what the vocoder adds beyond their end.

        Spectrograms longer than a window go through the vocoder window by window, overlapping by what it looks at: the
        waveform does not depend on where it was cut.

        Args:
            mel_spectrogram: `[batch, 1, frames, bands]` or `[batch, frames, bands]`.
            audio_length_in_s: The length of the waveforms in seconds. None is that of the spectrogram.
            window_length_in_s: As in `decode_latents`.

        Returns:
            `[batch, samples]`, float32, on the CPU.

        Raises:
            TypeError, ValueError: As `encode_audio`, also for `audio_length_in_s`.
        """
        check_float_tensor("mel_spectrogram", mel_spectrogram)
        if mel_spectrogram.ndim == 4:
            mel_spectrogram = mel_spectrogram.squeeze(1)
        dimensions = ("batch", "frames", "bands")
        self._check_decoding("mel_spectrogram", mel_spectrogram, dimensions, window_length_in_s)
        if audio_length_in_s is not None:
            check_real("audio_length_in_s", audio_length_in_s, 0.0, MAX_AUDIO_LENGTH_IN_S)
        num_frames = mel_spectrogram.shape[1]
        if audio_length_in_s is None:
            audio_length_in_s = num_frames * self._seconds_per_frame
        num_latents = math.ceil(num_frames / self.vae_scale_factor)
        length = self._decoded_frames(num_latents, window_length_in_s) * self.vae_scale_factor
        device, dtype, margin = self._execution_device, self.vocoder.dtype, 0
        if num_frames > length:
            margin = vocoder_margin(self.vocoder, device)
            length = max(length, 4 * margin)
        # What oscillates, as `MusicVocoder`'s sound does, must run on from window to window.
        runs_on = "first_frame" in inspect.signature(type(self.vocoder).forward).parameters

        def vocode(window: torch.Tensor, first_frame: int) -> torch.Tensor:
            position = {"first_frame": first_frame} if runs_on else {}
            return self.vocoder(window.to(device=device, dtype=dtype), **position).float().cpu()[..., None]

        windows = Windows.lay_out(num_frames, length, 2 * margin + 1, margin)
        hop = math.prod(self.vocoder.config.upsample_rates)
        waveform = self._run_in_windows(vocode, mel_spectrogram, windows, hop)
        return waveform[:, : round(audio_length_in_s * self.sampling_rate), 0]

    def _run_in_windows(
        self,
        function: Callable[[torch.Tensor, int], torch.Tensor],
        signal: torch.Tensor,
        windows: Windows,
        factor: int,
    ) -> torch.Tensor:
        """Runs a decoder on one window after the other, with a progress bar; on a single one without."""
        if len(windows) == 1:
            return function(signal, 0)
        with self.progress_bar(total=len(windows)) as progress_bar:
            return windows.apply(function, signal, factor, progress_bar.update)


def own_size(unet: ModelMixin, name: str, argument: str) -> int:
    """Gives the height of the latents for which a UNet was made; of music, that is their time.

    Args:
        unet: The UNet.
        name: Its name in the pipeline, for the message.
        argument: The argument whose default is asked for, for the message.

    Returns:
        The height.

    Raises:
        ValueError: If the UNet's config does not tell it.
    """
    sample_size = unet.config.sample_size
    if sample_size is None:
        raise ValueError(f"`{argument}` must be given: `{name}.config.sample_size` is None, so there is no default.")
    return sample_size if isinstance(sample_size, int) else sample_size[0]


def encoder_margin(vae: Any) -> int:
    """Counts the latent frames on either side that the convolutions of an `AutoencoderKL`'s encoder look at.

    As `decoder_margin` does for its decoder.

    Args:
        vae: The `AutoencoderKL`.

    Returns:
        The latent frames.
    """
    scale = 2 ** (len(vae.encoder.down_blocks) - 1)
    radius = 1 / scale
    for block in vae.encoder.down_blocks:
        radius += 2 * len(block.resnets) / scale
        if block.downsamplers is not None:
            # A stride of two with all padding on one side.
            radius += 2 / scale
            scale //= 2
    return math.ceil(radius + 2 * len(vae.encoder.mid_block.resnets) + 1)


def decoder_margin(vae: Any) -> int:
    """Counts the latent frames on either side that the convolutions of an `AutoencoderKL`'s decoder look at.

    Group normalisation and the attention of a mid block look at all of a window; that no margin can help.

    Args:
        vae: The `AutoencoderKL`.

    Returns:
        The latent frames.
    """
    radius = 1 + 2 * len(vae.decoder.mid_block.resnets)
    scale = 1
    for block in vae.decoder.up_blocks:
        radius += 2 * len(block.resnets) / scale
        if block.upsamplers is not None:
            scale *= 2
            radius += 1 / scale
    return math.ceil(radius + 1 / scale)


@torch.no_grad()
def vocoder_margin(vocoder: Any, device: torch.device | str = "cpu", num_frames: int = 384) -> int:
    """Measures how many mel frames to the side a vocoder looks: by changing some and seeing what else changes.

    Args:
        vocoder: `[batch, frames, bands]` to `[batch, samples]`.
        device: Where the vocoder computes.
        num_frames: The length of the trial; what it finds is at most a third of that.

    Returns:
        The mel frames.
    """
    bands, hop = vocoder.config.model_in_dim, math.prod(vocoder.config.upsample_rates)
    third = num_frames // 3
    mel = torch.zeros(1, 3 * third, bands, device=device, dtype=vocoder.dtype)
    changed = mel.clone()
    changed[:, third : 2 * third] = torch.linspace(-5, 5, third * bands, device=device).reshape(third, bands).to(mel)
    before, after = vocoder(mel).float()[0], vocoder(changed).float()[0]
    differs = ((after - before).abs() > 1e-6 * after.abs().max()).nonzero()[:, 0]
    if not len(differs):
        return third
    reach = max(third * hop - differs[0].item(), differs[-1].item() + 1 - 2 * third * hop, 0)
    return min(third, math.ceil(reach / hop))

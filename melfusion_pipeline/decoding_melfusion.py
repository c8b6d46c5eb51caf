"""From latents to a waveform in windows: a long piece is decoded in no more memory than a short one."""

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL

from .windows_melfusion import Windows

# Latent frames over which neighbouring decoded windows pass into each other, between their margins.
DECODER_FADE = 8


def decode_latents(
    vae: AutoencoderKL, latents: torch.Tensor, length: int, factor: int, progress_bar: Callable[..., Any]
) -> torch.Tensor:
    """Decodes latents to log-mel, in windows where they are longer than one.

    What lies closer to a window's end than the decoder's convolutions look is discarded; there the next window takes
    over, within a short fade: group normalisation (and attention, where the decoder has it) looks at the whole window,
    so that two windows differ a little even there.

    Args:
        vae: The music autoencoder.
        latents: `[batch, channels, time, frequency]`, on its device.
        length: The latent frames of a window; it is longer if the margins need it.
        factor: The spectrogram's frames for each latent frame.
        progress_bar: A callable like `DiffusionPipeline.progress_bar`.

    Returns:
        `[batch, 1, frames, bands]`.
    """
    margin = decoder_margin(vae)
    overlap = 2 * margin + DECODER_FADE
    windows = Windows.lay_out(latents.shape[-2], max(length, overlap + 2 * margin), overlap, margin)
    latents = 1 / vae.config.scaling_factor * latents
    return _run(lambda window: vae.decode(window.to(vae.dtype)).sample, latents, windows, factor, progress_bar)


def decode_mel_spectrogram(
    vocoder: torch.nn.Module,
    mel_spectrogram: torch.Tensor,
    length: int,
    device: torch.device,
    progress_bar: Callable[..., Any],
) -> torch.Tensor:
    """Turns log-mel into a waveform, in windows where it is longer than one, overlapping by what the vocoder looks at.

    Args:
        vocoder: `[batch, frames, bands]` to `[batch, samples]`.
        mel_spectrogram: `[batch, frames, bands]`.
        length: The frames of a window; it is longer if the margins need it.
        device: Where the vocoder computes.
        progress_bar: A callable like `DiffusionPipeline.progress_bar`.

    Returns:
        `[batch, samples]`, float32, on the CPU.
    """
    num_frames, dtype, margin = mel_spectrogram.shape[1], vocoder.dtype, 0
    if num_frames > length:
        margin = vocoder_margin(vocoder, device)
        length = max(length, 4 * margin)
    windows = Windows.lay_out(num_frames, length, 2 * margin + 1, margin)
    hop = math.prod(vocoder.config.upsample_rates)
    return _run(
        lambda window: vocoder(window.to(device=device, dtype=dtype)).float().cpu()[..., None],
        mel_spectrogram,
        windows,
        hop,
        progress_bar,
    )[..., 0]


def _run(
    function: Callable[[torch.Tensor], torch.Tensor],
    signal: torch.Tensor,
    windows: Windows,
    factor: int,
    progress_bar: Callable[..., Any],
) -> torch.Tensor:
    """Runs a decoder on one window after the other, with a progress bar; on a single one without."""
    if len(windows) == 1:
        return function(signal)
    with progress_bar(total=len(windows)) as bar:
        return windows.apply(function, signal, factor, bar.update)


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
    changed[:, third : 2 * third] = torch.linspace(-5, 5, third * bands).reshape(third, bands).to(mel)
    before, after = vocoder(mel).float()[0], vocoder(changed).float()[0]
    differs = ((after - before).abs() > 1e-6 * after.abs().max()).nonzero()[:, 0]
    if not len(differs):
        return third
    reach = max(third * hop - differs[0].item(), differs[-1].item() + 1 - 2 * third * hop, 0)
    return min(third, math.ceil(reach / hop))

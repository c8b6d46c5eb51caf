"""Figures of what the pipeline makes. Needs matplotlib, which the package does not require."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_mel_spectrogram(mel_spectrogram: torch.Tensor, seconds_per_frame: float = 0.01, title: str = "") -> "Figure":
    """Draws a log-mel spectrogram.

    Args:
        mel_spectrogram: `[frames, bands]`, natural logarithm of the magnitude, as `output_type="mel"` gives it.
        seconds_per_frame: The hop of the spectrogram.
        title: Written above.

    Returns:
        A figure with time in seconds and mel band as its axes; `figure.savefig(path)` writes it.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the spectrogram has not two dimensions.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plotting needs matplotlib: pip install matplotlib") from error
    if mel_spectrogram.ndim != 2:
        raise ValueError(f"`mel_spectrogram` must be [frames, bands], got {list(mel_spectrogram.shape)}.")
    frames, bands = mel_spectrogram.shape
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots()
    mesh = axes.imshow(
        mel_spectrogram.detach().float().cpu().numpy().T,
        origin="lower",
        aspect="auto",
        cmap="magma",
        extent=(0, frames * seconds_per_frame, 0, bands),
    )
    axes.set(title=title, xlabel="time (s)", ylabel="mel band")
    figure.colorbar(mesh, label="log magnitude")
    return figure

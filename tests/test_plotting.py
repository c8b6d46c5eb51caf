import numpy as np
import PIL.Image
import pytest
import torch

from melfusion_pipeline.plotting import plot_mel_spectrogram


def test_a_mel_spectrogram_is_drawn_upright_on_seconds_and_bands(tmp_path):
    mel = torch.full((200, 64), -11.0)
    mel[50:60, 10:20] = 0.0
    figure = plot_mel_spectrogram(mel, 0.01, "a blip")
    axes = figure.axes[0]
    assert axes.get_title() == "a blip" and axes.get_xlim() == (0, 2) and axes.get_ylim() == (0, 64)
    drawn = axes.images[0]
    assert drawn.origin == "lower" and np.array_equal(drawn.get_array(), mel.numpy().T)
    figure.savefig(tmp_path / "mel.png")
    assert len(set(PIL.Image.open(tmp_path / "mel.png").convert("RGB").getdata())) > 10


def test_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\[frames, bands\]"):
        plot_mel_spectrogram(torch.zeros(1, 200, 64))

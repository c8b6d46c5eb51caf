import sys
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import assert_near, generator, photograph, rounding_error
from copies import untrained_components

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.plotting import (
    picture_influence,
    plot_alphas,
    plot_mel_spectrogram,
    plot_picture_influence,
    plot_storyboard,
)


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


def test_without_matplotlib_the_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_mel_spectrogram(torch.zeros(200, 64))


def test_alphas_are_drawn_in_the_order_of_the_layers(components):
    synapse = components["synapse"]
    with torch.no_grad():
        synapse.alphas.copy_(torch.tensor([0.1, -0.2, 0.3, 0.4, 0.5, 0.6]))
    figure = plot_alphas(synapse)
    bars = sorted(figure.axes[0].patches, key=lambda bar: bar.get_x())
    assert [bar.get_height() for bar in bars] == pytest.approx([0.1, -0.2, 0.3, 0.4, 0.5, 0.6])
    assert [round(bar.get_center()[0]) for bar in bars] == [1, 2, 3, 4, 5, 6]
    colours = [bar.get_facecolor() for bar in bars]
    assert colours[0] == colours[1] != colours[2] == colours[3] != colours[4] == colours[5]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["latents / 8", "latents / 4", "latents / 2"]


def small_pipeline(mel_bands, latent_frames):
    pipe = MelFusionPipeline(**untrained_components(mel_bands=mel_bands, latent_frames=latent_frames))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def attract_attention(pipe, features, share):
    """Makes every query of a layer the same, and every picture key but one zero: that one, at `share` of the tokens,
    points along the query in each head and is huge."""
    keys = {layer: torch.zeros_like(key) for layer, key in features.keys.items()}
    for index, layer in enumerate(pipe.synapse.config.music_layers):
        norm = pipe.unet.get_submodule(layer.rpartition(".")[0]).norm2
        norm.weight.zero_()
        norm.bias.fill_(1.0)
        query = pipe.unet.get_submodule(layer).to_q.weight.sum(dim=1)
        projection = pipe.synapse.key_projections[index].weight
        projection.zero_()
        projection[:, 0] = query / query.norm()
    for key in keys.values():
        key[:, :, int(share * key.shape[2]), 0] = 1e7
    return replace(features, keys=keys)


@pytest.mark.parametrize("image_size, run", [(64, 8), (160, 50)])
def test_influence_gathers_on_the_region_whose_key_attracts_all(image_size, run):
    pipe = small_pipeline(mel_bands=32, latent_frames=16)
    features = pipe.encode_image(photograph(), image_size=image_size, num_inversion_steps=2)
    recorded = max(key.shape[2] for key in features.keys.values())
    # The larger picture has more tokens than are recorded; the smaller one does not.
    assert recorded == {64: 256, 160: 1024}[image_size]
    features = attract_attention(pipe, features, share=0.3)
    influence = picture_influence(pipe, features, prompt="a", num_inference_steps=2, num_waveforms_per_prompt=2)

    assert list(influence) == pipe.synapse.config.music_layers
    sides = [image_size // 4 // scale for scale in (4, 4, 2, 2, 1, 1)]
    times = [2, 2, 4, 4, 8, 8]
    assert [list(weights.shape) for weights in influence.values()] == [[t, s, s] for t, s in zip(times, sides)]
    for alpha, (layer, weights) in zip(pipe.synapse.alphas.tolist(), influence.items()):
        cells = weights.flatten(1)
        start = int(0.3 * cells.shape[1]) // run * run
        inside = cells[:, start : start + run]
        assert_near(inside.sum(dim=1), torch.full((len(cells),), alpha))
        assert_near(cells.abs().sum(dim=1), torch.full((len(cells),), alpha))
        if image_size == 64:
            assert_near(inside, torch.full_like(inside, alpha / run))


def test_influence_is_the_weight_of_the_pictures_values_in_the_layers_output():
    """The deepest layer's output is watched while one value of the picture is moved by one."""
    pipe = small_pipeline(mel_bands=64, latent_frames=32)
    features = pipe.encode_image(photograph(), image_size=64, num_inversion_steps=2)
    layer, image_layer = pipe.synapse.config.music_layers[0], pipe.synapse.config.image_layers[0]
    with torch.no_grad():
        # Channel 0 of a picture value arrives in every channel of the music's, so in every head.
        pipe.synapse.value_projections[0].weight[:, 0] = 1.0
    arguments = {"prompt": "a", "num_inference_steps": 1, "output_type": "latent"}
    weights = picture_influence(pipe, features, **arguments, generator=generator())[layer]
    assert weights.shape == (4, 4, 4) and weights.std(dim=0).max() > 1e-5

    def output(values):
        seen = []
        to_out = pipe.unet.get_submodule(layer).to_out[0]
        hook = to_out.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        moved = replace(features, values={**features.values, image_layer: values})
        pipe(image_features=moved, **arguments, generator=generator())
        hook.remove()
        # Of the branch with the prompt: heads share the channels, and 4 x 2 tokens are time x frequency.
        return seen[0][-1].mean(dim=-1).unflatten(0, (4, 2)).mean(dim=1)

    before = output(features.values[image_layer])
    for token in (0, 6, 15):
        values = features.values[image_layer].clone()
        values[:, :, token, 0] += 1.0
        measured = output(values) - before
        assert measured.min() > 1e-3
        # The difference of two outputs is as exact as these are.
        assert (measured - weights.flatten(1)[:, token]).abs().max() < rounding_error(before, 100)


def test_observing_changes_nothing_and_leaves_nothing_behind(pipe, image):
    features = pipe.encode_image(image)
    arguments = {"prompt": "a", "num_inference_steps": 2, "output_type": "latent"}
    layers = [pipe.unet.get_submodule(layer) for layer in pipe.synapse.config.music_layers]
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((tensors["latents"], sum(len(layer._forward_pre_hooks) for layer in layers)))
        return {}

    picture_influence(pipe, features, **arguments, generator=generator(), callback_on_step_end=callback)
    latents = pipe(image_features=features, **arguments, generator=generator()).audios
    assert torch.equal(seen[-1][0], latents) and seen[-1][1] == 6
    with pytest.raises(ValueError, match="num_inference_steps"):
        picture_influence(pipe, features, prompt="a", num_inference_steps=0)
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_influence_needs_one_picture_of_known_size(pipe, image):
    with pytest.raises(ValueError, match="got 2 pictures"):
        picture_influence(pipe, pipe.encode_image([image, image]), prompt="a")
    with pytest.raises(ValueError, match="image_size=None"):
        picture_influence(pipe, replace(pipe.encode_image(image), image_size=None), prompt="a")


def test_influence_is_drawn_over_the_square_of_the_picture(tmp_path):
    deep, fine, deaf = torch.zeros(2, 2, 2), torch.full((8, 4, 4), 0.5 / 16), torch.zeros(2, 2, 2)
    deep[0, 0, 1] = deep[1, 1, 0] = -0.25
    image = PIL.Image.new("RGB", (60, 40), "black")
    image.paste("white", (10, 0, 50, 40))
    figure = plot_picture_influence({"1": deep, "2": fine, "3": deaf}, image, audio_length_in_s=4.0, num_spans=2)
    panels = figure.axes[:9]
    assert [axes.get_title() for axes in panels[:3]] == ["whole time", "0 to 2 s", "2 to 4 s"]
    labels = ["layer 1\nalpha -0.25", "layer 2\nalpha 0.50", "layer 3\nalpha 0.00"]
    assert [axes.get_ylabel() for axes in panels[::3]] == labels
    # The crop is the white square in the middle; the shares lie above it, upright.
    assert np.asarray(panels[0].images[0].get_array()).min() == 255
    drawn = [axes.images[1] for axes in panels]
    # Four cells: all in one is four even shares. None is drawn as the least of the scale, which ends at a quarter.
    least = 0.25
    expected = [[[least, 2], [2, least]], [[least, 4], [least, least]], [[least, least], [4, least]]]
    assert all(np.allclose(panel.get_array(), wanted) for panel, wanted in zip(drawn, expected))
    assert all(np.allclose(panel.get_array(), 1) for panel in drawn[3:6])
    assert all(panel.get_array().mask.all() for panel in drawn[6:])
    assert all(panel.origin == "upper" and panel.get_clim() == (0.25, 4) for panel in drawn)
    figure.savefig(tmp_path / "influence.png")
    assert len(set(PIL.Image.open(tmp_path / "influence.png").convert("RGB").getdata())) > 10


def test_a_storyboard_is_drawn_on_one_time_axis():
    pictures = [PIL.Image.new("RGB", size, colour) for size, colour in (((60, 40), "red"), ((40, 60), "blue"))]
    mel = torch.full((100, 64), -11.0)
    figure = plot_storyboard(pictures, [0.0, 9.0], mel, 10.0, onsets=[1.0, 9.1], title="a story")
    strip, axes = figure.axes
    assert strip.get_title() == "a story" and strip.get_xlim() == axes.get_xlim() == (0, 10)
    (red, blue), (spectrogram,) = strip.images, axes.images
    assert (red.get_array()[..., 0] > 200).all() and (blue.get_array()[..., 2] > 200).all()
    # The first keeps its shape, the second is as wide as its second of time.
    assert (
        red.get_extent()[0] == 0
        and red.get_extent()[1] < 2
        and blue.get_extent()[:2] == pytest.approx([9, 9.71], abs=0.01)
    )
    assert spectrogram.get_extent() == [0, 10, 0, 64]
    (cut,) = [line for line in axes.lines if line.get_linestyle() == "--"]
    (marks,) = [line for line in axes.lines if line.get_marker() == "v"]
    assert list(cut.get_xdata()) == [9, 9] and list(marks.get_xdata()) == [1, 9.1]
    cuts = plot_storyboard(pictures, [0.0, 9.0], mel, 10.0, cuts=[2.0, 3.0, 4.0]).axes[1].lines
    assert [line.get_xdata()[0] for line in cuts if line.get_linestyle() == "--"] == [2, 3, 4]


def test_storyboards_that_do_not_fit_are_refused():
    picture, mel = PIL.Image.new("RGB", (8, 8)), torch.zeros(10, 4)
    with pytest.raises(ValueError, match="`image_start_in_s` must name a second for each picture, got 2 for 1"):
        plot_storyboard([picture], [0.0, 1.0], mel, 2.0)
    with pytest.raises(ValueError, match=r"\[frames, bands\], got \[1, 10, 4\]"):
        plot_storyboard([picture], [0.0], mel[None], 2.0)

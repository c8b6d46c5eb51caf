"""`blend_image` around diffusers' own pipelines, against plain loops."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import assert_near, audioldm2_oracle, generator
from diffusers import AudioLDM2Pipeline
from test_attention_melfusion import textbook_pool
from untrained import audioldm2_components, audioldm2_unet, music_unet, picture_unet, text_unet

from melfusion_pipeline import ImageFeatures, VisualSynapse, blend_image

PROMPTS = ["a calm piano", "drum"]
BATCH = {"prompt": PROMPTS, "negative_prompt": ["hiss", "noise"], "num_waveforms_per_prompt": 2}
TIMESTEPS = [1, 301, 601]


def trained_synapse(unet, layers: str | None = None, alphas: bool = True) -> VisualSynapse:
    synapse = VisualSynapse.from_unets(picture_unet(), unet, layers=layers).eval()
    with torch.no_grad():
        for parameter in synapse.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        synapse.alphas.uniform_(0.2, 0.8) if alphas else synapse.alphas.zero_()
    return synapse


def random_features(synapse: VisualSynapse, num_images: int = 1, dtype: torch.dtype = torch.float32) -> ImageFeatures:
    shapes = {
        layer: (len(TIMESTEPS), num_images, 30, width)
        for layer, width in zip(synapse.config.image_layers, synapse.config.image_widths)
    }
    keys, values = ({layer: torch.randn(shape, dtype=dtype) for layer, shape in shapes.items()} for _ in range(2))
    return ImageFeatures(keys, values, torch.tensor(TIMESTEPS))


def audioldm2(layers: str | None = None, alphas: bool = True) -> tuple[AudioLDM2Pipeline, VisualSynapse]:
    torch.manual_seed(0)
    components = {**audioldm2_components(mel_bands=8), "unet": audioldm2_unet()}
    return audioldm2_oracle(components), trained_synapse(components["unet"], layers, alphas)


def run(pipe: AudioLDM2Pipeline, **kwargs) -> np.ndarray:
    arguments = {"num_inference_steps": 3, "audio_length_in_s": 0.32, "generator": generator(), "guidance_scale": 3.0}
    return pipe(**{**arguments, **kwargs}).audios


@pytest.mark.parametrize("layers", ["self", "text", "all"])
@pytest.mark.parametrize("guidance_scale", [3.0, 1.0])
def test_without_alpha_or_scale_it_is_audioldm2_bit_for_bit_and_nothing_stays_behind(layers, guidance_scale):
    pipe, synapse = audioldm2(layers)
    processors = pipe.unet.attn_processors
    kwargs = {**BATCH, "guidance_scale": guidance_scale}
    expected = run(pipe, **kwargs)
    features = random_features(synapse, 2)
    num_branches = 2 if guidance_scale > 1 else 1
    with blend_image(pipe.unet, synapse, features, 0.0, num_branches):
        assert np.array_equal(run(pipe, **kwargs), expected)
    with blend_image(pipe.unet, synapse, features, num_branches=num_branches):
        assert np.abs(run(pipe, **kwargs) - expected).max() > 1e-3 * np.abs(expected).max()
    with pytest.raises(ZeroDivisionError), blend_image(pipe.unet, synapse, features, num_branches=num_branches):
        run(pipe, callback=lambda *_: 1 / 0, **kwargs)
    assert pipe.unet.attn_processors == processors and not pipe.unet._forward_pre_hooks
    assert np.array_equal(run(pipe, **kwargs), expected)
    torch.nn.init.zeros_(synapse.alphas)
    with blend_image(pipe.unet, synapse, features, num_branches=num_branches):
        assert np.array_equal(run(pipe, **kwargs), expected)


class TextbookAttnProcessor:
    """Section 2 of method.md for one layer: a row and a head at a time, softmax written out."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor, alpha: torch.Tensor, picture_of: list[int]) -> None:
        self.key, self.value, self.alpha, self.picture_of = key, value, alpha, picture_of

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        texts = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        outputs = []
        for row, (states, text) in enumerate(zip(hidden_states, texts)):
            picture = self.picture_of[row]
            blended = []
            for project, image in ((attn.to_k, self.key[picture]), (attn.to_v, self.value[picture])):
                music = project(text)
                blended.append(self.alpha * textbook_pool(image, len(music)) + (1 - self.alpha) * music)
            heads = []
            for query, key, value in zip(*(x.chunk(attn.heads, dim=-1) for x in (attn.to_q(states), *blended))):
                scores = query @ key.T / math.sqrt(query.shape[-1])
                if attention_mask is not None:
                    scores = scores + attention_mask[row]
                weights = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
                heads.append(weights / weights.sum(dim=-1, keepdim=True) @ value)
            outputs.append(attn.to_out[0](torch.cat(heads, dim=-1)))
        return torch.stack(outputs)


def textbook(unet, synapse, features, latents, text: dict, picture_of: list[int], guidance_scale: float, scheduler):
    """Three DDIM steps by hand; both branches of classifier-free guidance in one batch, and both see the picture."""
    cumulative, steps = scheduler.alphas_cumprod.double(), 3
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps.tolist():
        step = min(range(len(TIMESTEPS)), key=lambda index: abs(TIMESTEPS[index] - timestep))
        layers = zip(synapse.config.image_layers, synapse.config.music_layers, synapse.alphas)
        for number, (image_layer, music_layer, alpha) in enumerate(layers):
            key = features.keys[image_layer][step] @ synapse.key_projections[number].weight.T
            value = features.values[image_layer][step] @ synapse.value_projections[number].weight.T
            unet.get_submodule(music_layer).set_processor(TextbookAttnProcessor(key, value, alpha, picture_of))
        free, guided = unet(torch.cat([latents] * 2), timestep, **text).sample.chunk(2)
        epsilon = free + guidance_scale * (guided - free)
        here, there = cumulative[timestep], timestep - 1000 // steps
        there = cumulative[there] if there >= 0 else scheduler.final_alpha_cumprod.double()
        clean = (latents - (1 - here) ** 0.5 * epsilon) / here**0.5
        latents = there**0.5 * clean + (1 - there) ** 0.5 * epsilon
    return latents


@torch.no_grad()
@pytest.mark.parametrize("layers", ["self", "text", "all"])
def test_audioldm2_with_pictures_is_a_textbook_loop(layers):
    """Two prompts of other lengths, so that the second text has a mask, with a picture each and two waveforms."""
    pipe, synapse = audioldm2(layers)
    for model in (pipe.unet, synapse):
        model.double()
    features = random_features(synapse, 2, torch.float64)
    embeds, mask, generated = pipe.encode_prompt(PROMPTS, "cpu", 2, True, negative_prompt=["hiss", "noise"])
    assert not mask.all()
    text = {
        "encoder_hidden_states": generated.double(),
        "encoder_hidden_states_1": embeds.double(),
        "encoder_attention_mask_1": mask,
    }
    latents = torch.randn(4, 4, 8, 2, dtype=torch.float64)
    pipe.encode_prompt = lambda *_, **__: (embeds.double(), mask, generated.double())
    with blend_image(pipe.unet, synapse, features, num_branches=2):
        found = run(pipe, prompt=PROMPTS, latents=latents, num_waveforms_per_prompt=2, output_type="latent")
    picture_of = [0, 0, 1, 1] * 2
    expected = textbook(pipe.unet, synapse, features, latents, text, picture_of, 3.0, pipe.scheduler)
    assert_near(found.float(), expected.float(), steps=100)
    swapped = textbook(pipe.unet, synapse, features, latents, text, picture_of[::-1], 3.0, pipe.scheduler)
    assert (found - swapped).abs().max() > 1e-3 * expected.abs().max()


@torch.no_grad()
def test_a_unet_with_one_masked_text_is_a_textbook_pass():
    """Tango's shape: the blended layers are the text's own, and what the mask hides has no effect."""
    torch.manual_seed(0)
    unet = text_unet().double().eval()
    synapse = trained_synapse(unet).double()
    assert synapse.config.music_texts == ["encoder_hidden_states"] * 6
    features = random_features(synapse, 1, torch.float64)
    latents, text, mask = torch.randn(2, 4, 8, 4).double(), torch.randn(2, 9, 20).double(), torch.ones(2, 9)
    mask[1, 5:] = 0
    arguments = {"encoder_hidden_states": text, "encoder_attention_mask": mask}
    with blend_image(unet, synapse, features):
        found = unet(latents, 500, **arguments).sample
        text[1, 5:] += 1
        assert torch.equal(unet(latents, torch.tensor(500), **arguments).sample, found)
        text[1, 5:] -= 1
    for number, music_layer in enumerate(synapse.config.music_layers):
        key, value = (
            states[synapse.config.image_layers[number]][2] @ projections[number].weight.T
            for states, projections in (
                (features.keys, synapse.key_projections),
                (features.values, synapse.value_projections),
            )
        )
        processor = TextbookAttnProcessor(key, value, synapse.alphas[number], [0, 0])
        unet.get_submodule(music_layer).set_processor(processor)
    expected = unet(latents, 500, **arguments).sample
    assert_near(found.float(), expected.float(), steps=100)


@torch.no_grad()
def test_the_timestep_chooses_what_is_blended_and_a_longer_piece_is_fitted_anew():
    torch.manual_seed(0)
    unet = music_unet().eval()
    synapse = trained_synapse(unet)
    features = random_features(synapse)
    labels = torch.randn(2, 32)
    alone = {}
    for step, timestep in enumerate(TIMESTEPS):
        part = ImageFeatures(
            {layer: key[step : step + 1] for layer, key in features.keys.items()},
            {layer: value[step : step + 1] for layer, value in features.values.items()},
            torch.tensor([timestep]),
        )
        for length in (8, 12):
            sample = torch.full((2, 4, length, 2), 0.1)
            with blend_image(unet, synapse, part):
                alone[timestep, length] = unet(sample, timestep + 20, None, class_labels=labels).sample
    with blend_image(unet, synapse, features):
        for (timestep, length), expected in alone.items():
            sample = torch.full((2, 4, length, 2), 0.1)
            for given in (timestep + 20, torch.tensor(timestep + 20), torch.full((2,), timestep + 20)):
                found = unet(sample=sample, timestep=given, encoder_hidden_states=None, class_labels=labels).sample
                assert_near(found, expected)
        with pytest.raises(ValueError, match=r"one timestep, got \[1, 2\]"):
            unet(torch.zeros(2, 4, 8, 2), torch.tensor([1, 2]), None, class_labels=labels)


def test_what_does_not_belong_together_is_refused_before_the_unet_runs():
    torch.manual_seed(0)
    unet, other = audioldm2_unet(), music_unet()
    synapse = trained_synapse(unet)
    features = random_features(synapse, 2)
    narrower = replace(
        features,
        keys={layer: key[..., 1:] for layer, key in features.keys.items()},
        values={layer: value[..., 1:] for layer, value in features.values.items()},
    )
    refused = [
        (TypeError, "`image_features` must be `ImageFeatures`, got dict", {"image_features": {}}),
        (ValueError, "`unet` does not fit.*no such layer", {"unet": other}),
        (ValueError, "to attend to the music: in `unet`, .* attends to encoder", {"synapse": trained_synapse(other)}),
        (ValueError, "`image_features` does not fit", {"image_features": narrower}),
        (ValueError, "`num_branches` must be given for 2 pictures", {"num_branches": None}),
        (ValueError, "`num_branches` must be 1, 2 or None, got 3", {"num_branches": 3}),
        (ValueError, "`synapse_scale` must be one number or 6", {"synapse_scale": [1.0, 2.0]}),
        (TypeError, "`synapse_scale` must be a number, got 'strong'", {"synapse_scale": "strong"}),
    ]
    arguments = {"unet": unet, "synapse": synapse, "image_features": features, "synapse_scale": 1.0, "num_branches": 2}
    for error, message, changes in refused:
        with pytest.raises(error, match=message), blend_image(**arguments | changes):
            pass
    text = {"encoder_hidden_states": torch.zeros(3, 8, 12), "encoder_hidden_states_1": torch.zeros(3, 5, 20)}
    with pytest.raises(ValueError, match="3 rows, which 2 pictures in 2 guidance branches"), blend_image(**arguments):
        unet(torch.zeros(3, 4, 8, 2), 1, **text)
    assert not unet._forward_pre_hooks

"""Pieces longer than the music UNet was made for, and storyboards: windows inside the whole call."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from bad_inputs import strict_pipeline
from conftest import assert_near, generator, photograph
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.attention_melfusion import KVBlenders, use_attn_processors

# The tiny UNet was made for 8 latent frames, 0.32 s. This piece has 27 frames: windows at 0, 6, 12, 18 and 19.
LENGTH = 1.08
STARTS = (0, 6, 12, 18, 19)
PROMPTS = ["a calm piano", "loud drums and a bass"]
FAST = {"num_inference_steps": 2, "num_inversion_steps": 2, "guidance_scale": 3.0}
SCHEDULERS = [
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
]
GUIDANCE = {
    "no guidance": {"guidance_scale": 1.0},
    "text": {"guidance_scale": 3.0},
    "text and picture": {"guidance_scale": 3.0, "image_guidance_scale": 1.5},
}


def run(pipe: MelFusionPipeline, *args, seed: int = 0, **kwargs) -> np.ndarray:
    audios = pipe(*args, **{"generator": generator(seed), **FAST, **kwargs}).audios
    return audios.numpy() if isinstance(audios, torch.Tensor) else audios


# -------------------------------------------------------------------------------------- one window is the call as ever


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_piece_no_longer_than_a_window_does_not_know_of_windows(pipe, image, scheduler):
    """The tests of AudioLDM's equality run the same call, so that this one is AudioLDM's too at alpha = 0."""
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    kwargs = {"num_inference_steps": 4, "image_guidance_scale": 1.5, "num_waveforms_per_prompt": 2}
    for length in (0.32, 0.2):
        expected = run(pipe, image, PROMPTS, audio_length_in_s=length, **kwargs)
        for options in ({"window_length_in_s": 3.0}, {"window_overlap": 0.9, "window_batch_size": 1}):
            assert np.array_equal(run(pipe, image, PROMPTS, audio_length_in_s=length, **options, **kwargs), expected)
    longer = {"audio_length_in_s": LENGTH, **kwargs}
    one_pass = run(pipe, image, PROMPTS, window_length_in_s=LENGTH, **longer)
    assert np.array_equal(run(pipe, image, PROMPTS, window_length_in_s=2 * LENGTH, **longer), one_pass)
    assert not np.allclose(run(pipe, image, PROMPTS, **longer), one_pass)


def test_a_checkpoint_may_know_the_length_of_its_windows(pipe, image):
    """AudioLDM was trained on twice the length that its UNet names."""
    longer = {"audio_length_in_s": LENGTH, "num_inference_steps": 2, "output_type": "latent"}
    expected = run(pipe, image, PROMPTS, window_length_in_s=0.96, **longer)
    by_unet = run(pipe, image, PROMPTS, **longer)
    latents = torch.randn(1, 4, 250, 2, generator=generator())
    decoded = pipe.decode_latents(latents, window_length_in_s=6.0)
    assert not torch.equal(pipe.decode_latents(latents), decoded)
    pipe.register_to_config(default_window_length_in_s=0.96)
    assert np.array_equal(run(pipe, image, PROMPTS, **longer), expected)
    assert np.array_equal(run(pipe, image, PROMPTS, window_length_in_s=0.32, **longer), by_unet)
    pipe.register_to_config(default_window_length_in_s=6.0)
    assert torch.equal(pipe.decode_latents(latents), decoded)
    for wrong, error in ((0.31, ValueError), (math.nan, ValueError), ("long", TypeError)):
        pipe.register_to_config(default_window_length_in_s=wrong)
        with pytest.raises(error, match="`default_window_length_in_s` must be"):
            run(pipe, image, PROMPTS, **longer)


# ------------------------------------------------------------------------------------------------------- the textbook


def textbook(
    pipe: MelFusionPipeline,
    noise: torch.Tensor,
    prompt: torch.Tensor,
    negative: torch.Tensor,
    features,
    image_starts: list[int],
    steps: int,
    guidance: tuple[float, float],
) -> torch.Tensor:
    """Section 9 of method.md in plain loops: one window, one guidance branch at a time; DDIM's step by hand."""
    latents = noise.clone()
    cumulative = pipe.scheduler.alphas_cumprod.double()
    pipe.scheduler.set_timesteps(steps)
    keys, values, alphas = pipe.synapse(features.keys, features.values, pipe.synapse.num_tokens(8, latents.shape[-1]))
    ends = [*image_starts[1:], math.inf]
    blenders = KVBlenders(pipe.synapse.config.music_layers)
    for timestep in pipe.scheduler.timesteps.tolist():
        step = min(range(len(features.timesteps)), key=lambda index: abs(features.timesteps[index] - timestep))
        numerator, denominator = torch.zeros_like(latents), torch.zeros(latents.shape[-2])
        for start in STARTS:
            frames = range(start, start + 8)
            shares = [sum(begin <= frame < end for frame in frames) / 8 for begin, end in zip(image_starts, ends)]
            seen = {
                layer: [sum(share * states[step, p] for p, share in enumerate(shares))[None] for states in both]
                for layer, both in zip(keys, zip(keys.values(), values.values()))
            }
            text = sum(share * prompt[p % len(prompt)] for p, share in enumerate(shares))
            text = text / text.norm()
            window, predictions = latents[..., start : start + 8, :], []
            for strength, label in ((0.0, negative), (1.0, negative), (1.0, text)):
                blenders.read(seen, strength * alphas[:, None])
                with use_attn_processors(pipe.unet, blenders):
                    labels = label.reshape(1, -1)
                    predictions.append(pipe.unet(window, timestep, None, class_labels=labels).sample)
            free, with_image, with_text = predictions
            guided = free + guidance[1] * (with_image - free) + guidance[0] * (with_text - with_image)
            for index, frame in enumerate(frames):
                weight = min(index + 0.5, 7.5 - index)
                numerator[..., frame, :] += weight * guided[..., index, :]
                denominator[frame] += weight
        epsilon = numerator / denominator[:, None]
        here = cumulative[timestep]
        there = timestep - 1000 // steps
        there = cumulative[there] if there >= 0 else pipe.scheduler.final_alpha_cumprod.double()
        clean = (latents - (1 - here) ** 0.5 * epsilon) / here**0.5
        latents = there**0.5 * clean + (1 - there) ** 0.5 * epsilon
    return latents


@torch.no_grad()
@pytest.mark.parametrize("case", ["one picture", "storyboard", "storyboard with a prompt a picture"])
def test_a_long_piece_is_the_textbooks(components, case):
    pipe = MelFusionPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    for name in ("unet", "synapse", "image_unet"):
        components[name].double()
    pictures = [photograph(seed) for seed in range(1 if case == "one picture" else 3)]
    prompts = PROMPTS[:1] if case != "storyboard with a prompt a picture" else [*PROMPTS, "a flute"]
    frames = [0, 7, 9][: len(pictures)]
    features = pipe.encode_image(pictures, num_inversion_steps=2)
    prompt, negative = pipe.encode_prompt(prompts, "noise")
    noise = torch.randn(1, 4, 27, 2, dtype=torch.float64)
    found = pipe(
        image_features=features,
        prompt_embeds=prompt,
        negative_prompt_embeds=negative,
        image_start_in_s=None if case == "one picture" else [frame * 0.04 for frame in frames],
        latents=noise,
        audio_length_in_s=LENGTH,
        num_inference_steps=3,
        guidance_scale=2.5,
        image_guidance_scale=1.7,
        output_type="latent",
    ).audios
    expected = textbook(pipe, noise, prompt, negative[0], features, frames, 3, (2.5, 1.7))
    # The scheduler's noise levels are float32.
    assert_near(found.float(), expected.float(), steps=10)


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("story", [False, True])
def test_the_number_of_windows_at_once_does_not_matter(pipe, guidance, story):
    kwargs = {**GUIDANCE[guidance], "audio_length_in_s": LENGTH, "num_waveforms_per_prompt": 2}
    kwargs["image_start_in_s"] = [0, 0.5] if story else None
    pictures = [photograph(1), photograph(2)]
    one_by_one = run(pipe, pictures, PROMPTS, window_batch_size=1, **kwargs)
    assert one_by_one.shape == (2 if story else 4, round(LENGTH * 16000))
    for size in (2, 5, 100, None):
        together = run(pipe, pictures, PROMPTS, window_batch_size=size, **kwargs)
        assert_near(together, one_by_one)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_any_scheduler_steps_the_whole_piece_once(pipe, image, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    kwargs = {"audio_length_in_s": LENGTH, "num_inference_steps": 4, "output_type": "latent"}
    shapes, step = [], pipe.scheduler.step

    @functools.wraps(step)
    def look(*args, **kwargs):
        shapes.append(args[2].shape)
        return step(*args, **kwargs)

    pipe.scheduler.step = look
    latents = run(pipe, image, PROMPTS[0], window_batch_size=2, **kwargs)
    assert set(shapes) == {(1, 4, 27, 2)} and len(shapes) == pipe.num_timesteps
    assert np.isfinite(latents).all() and latents.shape == (1, 4, 27, 2)
    assert_near(run(pipe, image, PROMPTS[0], **kwargs), latents)


def test_batches_eta_and_generators_are_those_of_singles(pipe):
    pictures = [photograph(1), photograph(2)]
    kwargs = {"audio_length_in_s": LENGTH, "num_waveforms_per_prompt": 2, "eta": 0.5, "image_guidance_scale": 1.5}
    generators = [generator(seed) for seed in range(4)]
    together = run(pipe, pictures, PROMPTS, generator=generators, **kwargs)
    generators = [generator(seed) for seed in (2, 3)]
    second = run(pipe, pictures[1], PROMPTS[1], generator=generators, **kwargs)
    assert_near(together[2:], second)


# --------------------------------------------------------------------------------------------------------- storyboards


def test_a_storyboard_of_one_picture_is_the_picture(pipe, image):
    for length in (0.32, LENGTH):
        expected = run(pipe, image, PROMPTS[0], audio_length_in_s=length)
        story = run(pipe, [image], PROMPTS[0], audio_length_in_s=length, image_start_in_s=[0.0])
        assert np.array_equal(story, expected)


def test_far_from_a_boundary_a_storyboard_is_its_picture_alone(pipe):
    """With two steps a picture reaches two windows beyond the last that sees it: 27 + 16 frames."""
    kwargs = {"audio_length_in_s": 4.0, "output_type": "latent"}
    first, second = photograph(1), photograph(2)
    story = run(pipe, [first, second], PROMPTS, image_start_in_s=[0.0, 2.0], **kwargs)
    for picture, prompt, part in ((first, PROMPTS[0], slice(0, 28)), (second, PROMPTS[1], slice(72, 100))):
        alone = run(pipe, picture, prompt, **kwargs)
        assert_near(story[..., part, :], alone[..., part, :])
        assert np.abs(story - alone)[..., 28:72, :].max() > 1e-2
    later = run(pipe, [first, second], PROMPTS, image_start_in_s=[0.0, 2.4], **kwargs)
    assert_near(story[..., :28, :], later[..., :28, :])
    assert np.abs(story - later).max() > 1e-2


def test_variations_of_a_storyboard_and_one_prompt_for_all(pipe):
    pictures = [photograph(seed) for seed in range(3)]
    kwargs = {"audio_length_in_s": LENGTH, "image_start_in_s": [0, 0.3, 0.6]}
    both = run(
        pipe, pictures, PROMPTS[0], num_waveforms_per_prompt=2, generator=[generator(3), generator(4)], **kwargs
    )
    for seed, variation in zip((3, 4), both):
        alone = run(pipe, pictures, PROMPTS[0], seed=seed, **kwargs)
        assert_near(variation, alone[0])
    assert np.abs(both[0] - both[1]).max() > 1e-3 * np.abs(both).max()
    repeated = run(pipe, pictures, [PROMPTS[0]] * 3, seed=3, **kwargs)
    assert_near(repeated[0], both[0])
    features = pipe.encode_image(pictures, num_inversion_steps=2)
    given = run(pipe, None, PROMPTS[0], image_features=features, seed=3, **kwargs)
    assert_near(given[0], both[0])
    seconds = np.array(kwargs.pop("image_start_in_s"))
    assert np.array_equal(run(pipe, pictures, PROMPTS[0], seed=3, image_start_in_s=seconds, **kwargs)[0], given[0])


def test_many_pictures_are_inverted_in_batches_of_few(pipe):
    pictures = [photograph(seed) for seed in range(11)]
    batches = []
    hook = pipe.image_unet.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    prompts = [f"picture {number}" for number in range(11)]
    features = pipe.encode_image(pictures, prompts, num_inversion_steps=2)
    hook.remove()
    assert batches == [8, 8, 3, 3] and features.num_images == 11
    alone = pipe.encode_image(pictures[9], prompts[9], num_inversion_steps=2)
    for layer, key in alone.keys.items():
        assert_near(features.keys[layer][:, 9], key[:, 0])
        assert_near(features.values[layer][:, 9], alone.values[layer][:, 0])


def test_a_storyboard_within_one_window_sees_its_pictures_by_share(pipe):
    pictures = [photograph(1), photograph(2)]
    mixed = run(pipe, pictures, PROMPTS[0], image_start_in_s=[0, 0.16], output_type="latent")
    little = run(pipe, pictures, PROMPTS[0], image_start_in_s=[0, 0.319999], output_type="latent")
    first = run(pipe, pictures[0], PROMPTS[0], output_type="latent")
    assert np.abs(mixed - first).max() > 10 * np.abs(little - first).max() > 0


# ------------------------------------------------------------------------------------------- callbacks, bars, decoding


def test_a_callback_sees_and_changes_the_whole_piece(pipe):
    seen = []

    def silence(pipe, step, timestep, tensors):
        seen.append([tuple(tensor.shape) for tensor in tensors.values()])
        return {"latents": torch.zeros_like(tensors["latents"])}

    pictures = [photograph(1), photograph(2)]
    latents = run(
        pipe,
        pictures,
        PROMPTS,
        audio_length_in_s=LENGTH,
        image_start_in_s=[0, 0.5],
        callback_on_step_end=silence,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        output_type="latent",
    )
    assert seen == [[(1, 4, 27, 2), (4, 32)]] * 2 and not latents.any()


def test_a_call_can_be_interrupted_between_groups(pipe, image):
    passes = []

    def count(*_):
        passes.append(1)
        pipe._interrupt = len(passes) == 7

    hook = pipe.unet.register_forward_hook(count)
    kwargs = {"audio_length_in_s": LENGTH, "window_batch_size": 1, "output_type": "latent"}
    stopped = run(pipe, image, PROMPTS[0], **kwargs)
    hook.remove()
    assert len(passes) == 7
    one_step = run(
        pipe,
        image,
        PROMPTS[0],
        callback_on_step_end=lambda pipe, *_: setattr(pipe, "_interrupt", True) or {},
        **kwargs,
    )
    # The step that was under way is not made with half of its windows.
    assert np.array_equal(stopped, one_step)


def test_the_progress_bar_moves_with_the_groups_and_the_decoding(pipe, image, capsys):
    pipe.set_progress_bar_config(disable=False)
    run(pipe, image, PROMPTS[0], audio_length_in_s=LENGTH, window_batch_size=2)
    output = capsys.readouterr().err
    assert "6/6" in output
    run(pipe, image, PROMPTS[0], audio_length_in_s=6.0, window_batch_size=100)
    output = capsys.readouterr().err
    assert "2/2" in output and len([line for line in output.split("\r") if "100%" in line]) >= 4


@torch.no_grad()
def test_decoding_in_windows(pipe):
    latents = torch.randn(2, 4, 250, 2)
    mel = pipe.decode_latents(latents)
    assert mel.shape == (2, 1, 1000, 8) and torch.equal(mel, pipe.decode_latents(latents))
    one_pass = pipe.decode_latents(latents, window_length_in_s=10.0)
    assert torch.equal(one_pass, pipe.vae.decode(1 / 0.9 * latents).sample)
    # Group normalisation and attention see a window instead of the piece; that is all that differs.
    difference = (mel - one_pass).abs().max() / one_pass.abs().max()
    print(f"decoded in windows against one pass: {difference:.3f} of the peak")
    assert 0 < difference < 0.5

    waveform = pipe.mel_spectrogram_to_waveform(mel)
    whole = pipe.mel_spectrogram_to_waveform(mel, window_length_in_s=10.0)
    assert waveform.shape == whole.shape == (2, 160000)
    assert_near(waveform, whole)
    other = pipe.mel_spectrogram_to_waveform(mel, window_length_in_s=3.17)
    assert_near(other, whole)


@torch.no_grad()
def test_output_types_are_of_the_whole_piece(pipe, image):
    kwargs = {"audio_length_in_s": 6.003}
    latents = run(pipe, image, PROMPTS[0], output_type="latent", **kwargs)
    mel = run(pipe, image, PROMPTS[0], output_type="mel", **kwargs)
    audio = run(pipe, image, PROMPTS[0], **kwargs)
    assert latents.shape == (1, 4, 151, 2) and mel.shape == (1, 601, 8) and audio.shape == (1, 96048)
    decoded = pipe.decode_latents(torch.from_numpy(latents))
    assert np.array_equal(decoded.squeeze(1)[:, :601].numpy(), mel)
    assert np.array_equal(pipe.mel_spectrogram_to_waveform(decoded, 6.003).numpy(), audio)


# ----------------------------------------------------------------------------------------------------- what is refused

TWO = {"image": [photograph(1), photograph(2)], "prompt": "a piano", "audio_length_in_s": 2.0}
REFUSED = {
    "start": ({**TWO, "image_start_in_s": [0.5, 1.0]}, "`image_start_in_s` must begin at 0, got 0.5"),
    "negative start": ({**TWO, "image_start_in_s": [-1.0, 1.0]}, "must begin at 0, got -1.0"),
    "equal": ({**TWO, "image_start_in_s": [0, 0]}, "must ascend, got 0 before 0"),
    "descending": (
        {**TWO, "image": [photograph(s) for s in range(3)], "image_start_in_s": [0, 1.5, 1.0]},
        "must ascend, got 1.5 before 1.0",
    ),
    "past the end": ({**TWO, "image_start_in_s": [0, 2.0]}, "2.0 s, lies past the end.*`audio_length_in_s` above it"),
    "fewer": ({**TWO, "image_start_in_s": [0]}, "holds 1 seconds for 2 pictures"),
    "more": ({**TWO, "image_start_in_s": [0, 1, 1.5]}, "holds 3 seconds for 2 pictures"),
    "none": ({**TWO, "image_start_in_s": []}, "holds 0 seconds for 2 pictures"),
    "NaN": ({**TWO, "image_start_in_s": [0, math.nan]}, "`image_start_in_s` must be finite, got nan"),
    "infinite": ({**TWO, "image_start_in_s": [0, math.inf]}, "`image_start_in_s` must be finite"),
    "texts": ({**TWO, "image_start_in_s": ["0", "1"]}, "`image_start_in_s` must be a number"),
    "one number": ({**TWO, "image_start_in_s": 3.0}, "`image_start_in_s` must be a list of seconds"),
    "no picture": ({"prompt": "a piano", "image_start_in_s": [0]}, "there is no picture"),
    "prompts": ({**TWO, "prompt": ["a"] * 3, "image_start_in_s": [0, 1]}, "cannot meet 3 prompts"),
    "generators": (
        {**TWO, "image_start_in_s": [0, 1], "generator": [generator()] * 2},
        "`generator` is a list of 2, but 1 waveforms",
    ),
    "latents": (
        {**TWO, "image_start_in_s": [0, 1], "latents": torch.zeros(2, 4, 50, 2)},
        r"`latents` must have the shape \[1, 4, 50, 2\]",
    ),
    "overlap": ({**TWO, "window_overlap": 0.95}, r"`window_overlap` must be finite and in \[0, 0.9\], got 0.95"),
    "negative overlap": ({**TWO, "window_overlap": -0.1}, r"`window_overlap` .*\[0, 0.9\]"),
    "NaN overlap": ({**TWO, "window_overlap": math.nan}, "`window_overlap` must be finite"),
    "short window": ({**TWO, "window_length_in_s": 0.31}, r"`window_length_in_s` must be in \[0.32, 3600\], got 0.31"),
    "long window": ({**TWO, "window_length_in_s": 4000}, r"\[0.32, 3600\], got 4000"),
    "NaN window": ({**TWO, "window_length_in_s": math.nan}, "`window_length_in_s` must be finite"),
    "text window": ({**TWO, "window_length_in_s": "long"}, "`window_length_in_s` must be a number"),
    "windows at once": ({**TWO, "window_batch_size": 0}, "`window_batch_size` must be at least 1"),
    "half a window": ({**TWO, "window_batch_size": 1.5}, "`window_batch_size` must be an int"),
}


@pytest.fixture(scope="module")
def strict_pipe() -> MelFusionPipeline:
    return strict_pipeline()


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_storyboards_and_windows_are_refused_before_any_model_runs(strict_pipe, case):
    arguments, message = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=message):
        strict_pipe(**{**FAST, **arguments})


def test_the_shortest_window_that_is_not_refused_works(pipe, image):
    for overlap, length in itertools.product((0, 0.9), (0.5, 1.08)):
        audio = run(pipe, image, PROMPTS[0], audio_length_in_s=length, window_length_in_s=0.32, window_overlap=overlap)
        assert np.isfinite(audio).all() and audio.shape == (1, round(length * 16000))

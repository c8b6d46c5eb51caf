"""Music that is already there: variations, stretches made anew, going on from it."""

import math
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bad_inputs import strict_pipeline
from conftest import assert_near, generator, photograph
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from test_audio import polyphonic_music
from untrained import untrained_components

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.audio import waveform_to_latents
from melfusion_pipeline.checks_melfusion import _check_strength
from melfusion_pipeline.given_audio_melfusion import GivenAudio, as_stretches, timesteps_from
from melfusion_pipeline.waveforms_melfusion import Spectrogram, normalize_waveform

ROOT = Path(__file__).parents[1]
RATE = 16000
# 30 latent frames; windows of the tiny UNet have 8.
GIVEN = torch.from_numpy(polyphonic_music(RATE, 1.2)).float() / 3
FAST = {"num_inference_steps": 4, "num_inversion_steps": 2, "guidance_scale": 3.0, "output_type": "pt"}
SCHEDULERS = {
    DDIMScheduler: {},
    DPMSolverMultistepScheduler: {},
    EulerAncestralDiscreteScheduler: {},
    EulerDiscreteScheduler: {},
    HeunDiscreteScheduler: {},
    KDPM2DiscreteScheduler: {},
    LMSDiscreteScheduler: {},
    PNDMScheduler: {"skip_prk_steps": True},
    UniPCMultistepScheduler: {},
}


@pytest.fixture(scope="module")
def components() -> dict:
    """Built once: no test here changes them, and another scheduler is put into the test's own pipeline."""
    return untrained_components()


def run(pipe, *args, audio=GIVEN, seed=0, **kwargs) -> torch.Tensor:
    kwargs = {"audio_sampling_rate": RATE, "generator": generator(seed), **FAST, **kwargs}
    return pipe(*args, audio=audio, **kwargs).audios


def use(pipe, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **SCHEDULERS[scheduler])


# ---------------------------------------------------------------------------------------------------------- variations


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_at_strength_1_a_variation_is_the_call_without_audio(pipe, scheduler):
    use(pipe, scheduler)
    latent = {**FAST, "output_type": "latent"}
    expected = pipe(prompt="a", **latent, generator=generator()).audios
    assert torch.equal(run(pipe, prompt="a", audio=GIVEN[:5120], strength=1.0, **latent), expected)


def test_the_waveforms_too_are_those_of_the_call_without_audio(pipe, image):
    kwargs = {**FAST, "num_inference_steps": 2, "num_waveforms_per_prompt": 2}
    made = pipe(image, "a", audio_length_in_s=1.2, generator=generator(), **kwargs).audios
    level = (GIVEN - GIVEN.mean()).abs().max() / 0.5
    assert_near(run(pipe, image, "a", strength=1.0, **kwargs), made * level + GIVEN.mean())


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_weaker_a_variation_the_nearer_to_what_the_vae_keeps_of_the_music(pipe, scheduler):
    use(pipe, scheduler)
    kept, errors = pipe.encode_audio(GIVEN[None, :5120]), []
    arguments = {"audio": GIVEN[:5120], "num_inference_steps": 20, "guidance_scale": 1.0, "output_type": "latent"}
    for strength in (0.05, 0.2, 0.6):
        made = run(pipe, prompt="a", strength=strength, **arguments)
        errors.append((made - kept).square().mean().sqrt())
        assert pipe.num_timesteps == len(timesteps_from(pipe.scheduler, 20, strength))
    # Twice what the last timestep has of the noise, whose spread is 1.
    noise = (1 - pipe.scheduler.alphas_cumprod[int(timesteps_from(pipe.scheduler, 20, 0.05)[0])]).sqrt()
    assert errors[0] < 2 * noise and 2 * errors[0] < errors[1] < errors[2]


def test_given_music_of_any_level_rate_and_channels_comes_back_at_its_own_level(pipe):
    kwargs = {"prompt": "a", "strength": 0.5}
    expected = run(pipe, **kwargs)
    quiet = run(pipe, **kwargs, audio=0.01 * GIVEN + 0.002)
    torch.testing.assert_close(quiet, 0.01 * expected + 0.002, atol=1e-5, rtol=0)
    for scale in (1e27, 1e-29):
        torch.testing.assert_close(run(pipe, **kwargs, audio=scale * GIVEN) / scale, expected, atol=1e-4, rtol=0)
    stereo = torch.stack([GIVEN + 0.1, GIVEN - 0.1]).double()
    torch.testing.assert_close(run(pipe, **kwargs, audio=stereo), expected, atol=1e-4, rtol=0)
    high = torch.from_numpy(polyphonic_music(44100, 1.2)).float() / 3
    made = run(pipe, **kwargs, audio=high.numpy(), audio_sampling_rate=44100)
    assert made.shape == (1, 19200)
    assert abs(made.abs().max() / expected.abs().max() - 1) < 0.2


def test_pieces_meet_prompts_pictures_or_both(pipe, image):
    # 14 latent frames, two windows.
    given, other = GIVEN[:8960], torch.from_numpy(polyphonic_music(RATE, 0.56, seed=1)).float() / 2
    pieces = torch.stack([given, other])[:, None]
    noise = torch.randn(4, 4, 14, 2, generator=generator())
    kwargs = {"num_waveforms_per_prompt": 2, "strength": 0.5, "num_inference_steps": 2, "output_type": "latent"}
    both = run(pipe, image, ["a", "b"], audio=pieces, latents=noise, **kwargs)
    for index, (piece, prompt) in enumerate(zip(pieces, "ab")):
        rows = slice(2 * index, 2 * index + 2)
        assert_near(both[rows], run(pipe, image, prompt, audio=piece, latents=noise[rows], **kwargs), 10_000)
    one_prompt = run(pipe, prompt="a", audio=pieces, latents=noise, **kwargs)
    assert_near(one_prompt[2:], run(pipe, prompt="a", audio=other, latents=noise[2:], **kwargs), 10_000)
    one_piece = run(pipe, [photograph(1), photograph(2)], audio=given, latents=noise, **kwargs)
    assert_near(one_piece[:2], run(pipe, photograph(1), audio=given, latents=noise[:2], **kwargs), 10_000)


@pytest.fixture
def music_pipe() -> MelFusionPipeline:
    """With a VAE that has learnt music: the bundled one."""
    vae = AutoencoderKL.from_pretrained(ROOT / "checkpoints" / "small" / "vae")
    pipe = MelFusionPipeline(**{**untrained_components(mel_bands=64), "vae": vae})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_encoding_is_that_of_training_and_hardly_depends_on_windows(pipe, music_pipe):
    expected = waveform_to_latents(GIVEN, RATE, pipe.vae, spectrogram=Spectrogram.of(pipe))
    # But for rounding: float64 is kept up to the spectrogram.
    assert_near(pipe.encode_audio(GIVEN[None], window_length_in_s=2.0), expected)
    long = torch.from_numpy(polyphonic_music(RATE, 12.0)).float()[None]
    whole = music_pipe.encode_audio(long, window_length_in_s=12.0)
    cut = music_pipe.encode_audio(long, window_length_in_s=4.0)
    assert whole.shape == cut.shape == (1, 8, 150, 8)
    # Not exactly: group normalisation looks at all of a window.
    assert (whole - cut).abs().max() < 0.15 * whole.std()


# ------------------------------------------------------------------------------------------------- stretches made anew


@pytest.mark.parametrize("scheduler", [*SCHEDULERS, "PNDM with Runge-Kutta steps"])
def test_around_a_stretch_the_latents_are_the_given_ones(pipe, scheduler):
    if scheduler in SCHEDULERS:
        use(pipe, scheduler)
    else:
        pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
    given = GIVEN[:5120]
    latents = run(pipe, prompt="a", audio=given, mask_start_in_s=0.1, mask_end_in_s=0.2, output_type="latent")
    kept = pipe.encode_audio(given[None])
    around = torch.tensor([True, True, False, False, False, True, True, True])
    assert torch.equal(latents[:, :, around], kept[:, :, around]) and latents.isfinite().all()
    assert (latents[:, :, ~around] != kept[:, :, ~around]).all()


def test_around_the_stretches_every_sample_is_the_given_one(pipe, image):
    masks = {"mask_start_in_s": [0.25, 0.9], "mask_end_in_s": [0.5, 1.0]}
    made = run(pipe, image, "a", **masks, num_waveforms_per_prompt=2)
    inside = torch.zeros(19200, dtype=torch.bool)
    inside[4000:8000] = inside[14400:16000] = True
    assert torch.equal(made[:, ~inside], GIVEN[None, ~inside].expand(2, -1))
    assert (made[:, inside] != GIVEN[None, inside]).all(dim=0).float().mean() > 0.99


def test_at_every_step_the_music_around_a_stretch_has_the_noise_of_the_next_one(pipe):
    noise, seen = torch.randn(1, 4, 30, 2, generator=generator()), []

    def keep(pipe, step, timestep, tensors):
        seen.append(tensors["latents"].clone())

    run(pipe, prompt="a", mask_start_in_s=0.4, latents=noise, callback_on_step_end=keep)
    kept = pipe.encode_audio(GIVEN[None])
    cumulative = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps[1:]]
    for latents, alpha in zip(seen, [*cumulative, torch.tensor(1.0)], strict=True):
        expected = alpha.sqrt() * kept + (1 - alpha).sqrt() * noise
        assert_near(latents[:, :, :10], expected[:, :, :10])
        assert not torch.allclose(latents[:, :, 10:], expected[:, :, 10:], atol=0.1)


def test_the_first_step_hears_the_music_around_a_stretch_too(pipe):
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda unet, inputs: seen.append(inputs[0]))
    noise = torch.randn(1, 4, 8, 2, generator=generator())
    run(pipe, prompt="a", audio=GIVEN[:5120], mask_start_in_s=0.16, latents=noise, num_inference_steps=1)
    hook.remove()
    alpha = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps[0]]
    expected = alpha.sqrt() * pipe.encode_audio(GIVEN[None, :5120]) + (1 - alpha).sqrt() * noise
    assert_near(seen[0][:1, :, :4], expected[:, :, :4])
    assert torch.equal(seen[0][:1, :, 4:], noise[:, :, 4:])


def test_a_weaker_strength_varies_a_stretch(pipe):
    inside = slice(5600, 9600)
    errors = [
        (run(pipe, prompt="a", mask_start_in_s=0.35, mask_end_in_s=0.6, strength=strength, num_inference_steps=10,
             output_type="latent") - pipe.encode_audio(GIVEN[None])).square().sum()
        for strength in (0.1, 0.5, 1.0)
    ]  # fmt: skip
    assert 0 < errors[0] < errors[1] < errors[2]
    made = run(pipe, prompt="a", mask_start_in_s=0.35, mask_end_in_s=0.6, strength=0.5)
    assert torch.equal(made[0, 9600:], GIVEN[9600:]) and not torch.equal(made[0, inside], GIVEN[inside])


@pytest.mark.parametrize("scheduler", [DDIMScheduler, HeunDiscreteScheduler, KDPM2DiscreteScheduler])
def test_windows_without_a_stretch_are_not_computed_where_the_result_does_not_depend_on_them(pipe, scheduler):
    use(pipe, scheduler)
    calls = []
    hook = pipe.unet.register_forward_pre_hook(lambda unet, inputs: calls.append(len(inputs[0])))
    # Windows begin at 0, 6, 12, 18 and 22; frames 10 and 11 lie in the second alone.
    call = {"prompt": "a", "mask_start_in_s": 0.40, "mask_end_in_s": 0.48, "num_inference_steps": 2}
    alone = run(pipe, **call, window_batch_size=1)
    assert calls == [2] * (2 if scheduler is DDIMScheduler else 3 * 5)
    hook.remove()
    assert_near(run(pipe, **call, window_batch_size=5), alone)


def test_a_storyboard_is_seen_by_a_stretch(pipe):
    pictures, starts = [photograph(seed) for seed in range(3)], [0.0, 0.4, 0.8]
    masks = {"mask_start_in_s": 0.5, "mask_end_in_s": 0.7, "image_start_in_s": starts, "num_inference_steps": 2}
    made = run(pipe, pictures, ["a", "b", "c"], **masks)
    assert torch.equal(made[0, :8000], GIVEN[:8000]) and torch.equal(made[0, 11200:], GIVEN[11200:])
    others = run(pipe, [pictures[0], photograph(9), pictures[2]], ["a", "b", "c"], **masks)
    assert not torch.allclose(others[0, 8800:10400], made[0, 8800:10400], atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ going on


def test_going_on_begins_where_the_given_music_ends(pipe, image):
    made = run(pipe, image, "a", audio_length_in_s=2.0)
    assert made.shape == (1, 32000) and torch.equal(made[0, :19200], GIVEN)
    assert made[0, 19200:].abs().max() > 1e-3 and made.isfinite().all()
    # Together with a stretch at the end of what was given it is one stretch.
    longer = run(pipe, image, "a", audio_length_in_s=2.0, mask_start_in_s=1.0)
    assert torch.equal(longer[0, :16000], GIVEN[:16000]) and not torch.equal(longer[0, 16000:19200], GIVEN[16000:])
    given = GivenAudio.of(GIVEN[None], RATE, as_stretches(1.0, None, 1.2), 2.0)
    assert given.stretches == ((16000, 32000),) and given.goes_on


def test_what_goes_on_does_not_hear_the_given_music_stop(music_pipe):
    """Encoded with silence behind it, all of it would be that of music that ends."""
    music = torch.from_numpy(polyphonic_music(RATE, 2.4)).float()[None]
    latents = music_pipe._encode_given(GivenAudio.of(music[:, :20480], RATE, [], 2.4), 30, None)
    assert latents.shape == (1, 8, 30, 8)
    whole = music_pipe.encode_audio(music)
    stopped = music_pipe.encode_audio(music * (torch.arange(music.shape[-1]) < 20480))
    errors = [(found - whole)[:, :, 12:16].square().mean().sqrt() for found in (latents, stopped)]
    assert errors[0] < 0.5 * errors[1]


def test_another_default_device_changes_nothing(pipe):
    """`torch.set_default_device`, as of an accelerator: on the meta device what it reaches has no numbers."""
    embeds, negative_embeds = pipe.encode_prompt("a")
    features = pipe.encode_image([photograph(0), photograph(1)], num_inversion_steps=2)
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative_embeds, "image_features": features}
    masks = {"mask_start_in_s": 0.2, "mask_end_in_s": 0.7, "audio_length_in_s": 1.5, "image_start_in_s": [0.0, 0.6]}
    call = {**given, **masks, "audio": 4 * GIVEN.numpy(), "generator": generator(), "num_inference_steps": 2}
    expected = run(pipe, **call)
    call["generator"].manual_seed(0)
    with torch.device("meta"):
        made = run(pipe, **call)
    assert torch.equal(made, expected)


# --------------------------------------------------------------------------------------------------------------- joins


def noise_like_music(seed, samples=RATE):
    return torch.randn(1, samples, generator=generator(seed)) * 0.1


def test_a_join_keeps_the_power_and_takes_a_step_no_larger_than_the_music():
    given, made = noise_like_music(0), noise_like_music(1)
    made = made * normalize_waveform(given).abs().max() / given.abs().max()
    joined = torch.cat([
        GivenAudio(noise_like_music(2 * seed), RATE, RATE, ((4000, 12000),)).join(
            noise_like_music(2 * seed + 1) * 0.5 / noise_like_music(2 * seed).abs().max()
        )
        for seed in range(200)
    ])  # fmt: skip
    power = joined.square().mean(dim=0).unflatten(0, (-1, 160)).mean(dim=-1)
    assert power.std() / power.mean() < 0.05 and (power / power.mean() - 1).abs().max() < 0.2
    expected = torch.cat([noise_like_music(2 * seed)[:, :4000] for seed in range(200)])
    assert torch.equal(joined[:, :4000], expected)


def level(waveform):
    return waveform.unflatten(-1, (-1, RATE // 10)).square().mean(dim=-1).sqrt()


def test_the_level_of_a_stretch_goes_from_the_one_before_it_to_the_one_behind_it():
    tone = torch.sin(torch.arange(4 * RATE) * 0.3)[None]
    given = tone * torch.where(torch.arange(4 * RATE) < 2 * RATE, 0.2, 0.4)
    join = GivenAudio(given, RATE, 4 * RATE, ((RATE, 3 * RATE),)).join
    way = (torch.arange(20) + 0.5) / 20
    # Without the tenths in which the fades lie. What was made is at AudioLDM's level, of which 0.4 is 0.5 here.
    made = level(join(0.15 * tone * 0.5 / 0.4))[0, 10:30]
    torch.testing.assert_close(made[1:-1], (level(tone)[0, 0] * 0.2 ** (1 - way) * 0.4**way)[1:-1], rtol=0.02, atol=0)
    # By a factor of at most 4, and silence beside a stretch says nothing about its level.
    assert_near(level(join(0.01 * tone * 0.5 / 0.4))[0, 12], 0.04 * level(tone)[0, 0], 1e5)
    silent = torch.where(torch.arange(4 * RATE) < RATE, 0.0, given)
    join = GivenAudio(silent, RATE, 4 * RATE, ((RATE, 4 * RATE),)).join
    assert_near(join(0.15 * tone * 0.5 / 0.4)[:, 2 * RATE :], 0.15 * tone[:, 2 * RATE :], 1e4)


def test_very_short_stretches_and_those_at_the_ends():
    given, made = noise_like_music(0), noise_like_music(1)
    for first, last in ((0, 1), (0, 3), (7999, 8001), (8000, RATE), (RATE - 1, RATE), (0, RATE)):
        joined = GivenAudio(given, RATE, RATE, ((first, last),)).join(made)
        assert torch.equal(joined[:, :first], given[:, :first]) and torch.equal(joined[:, last:], given[:, last:])
        assert joined.isfinite().all() and not torch.equal(joined[:, first:last], given[:, first:last])


def test_how_loud_the_given_music_is_changes_nothing_but_that():
    """Also far below what is silent at AudioLDM's level, and on top of a constant."""
    given, made = noise_like_music(0), 0.2 * noise_like_music(1)
    expected = GivenAudio(given, RATE, RATE, ((4000, 12000),)).join(made)
    for scale in (1e-5, 3e4):
        joined = GivenAudio(given * scale, RATE, RATE, ((4000, 12000),)).join(made)
        assert_near(joined / scale, expected)
    joined = GivenAudio(given + 2, RATE, RATE, ((4000, 12000),)).join(made)
    torch.testing.assert_close(joined - 2, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("peak", [0.9, 1.1])
def test_beside_dense_music_what_is_made_stays_below_full_scale(peak):
    """The level of a square wave needs peaks of several times its height of music that decays."""
    time = torch.arange(RATE) / RATE
    given = peak * torch.sin(2 * math.pi * 110 * time).sign()[None]
    made = 0.5 * (torch.sin(2 * math.pi * 440 * time) * torch.exp(-20 * (time % 0.25)))[None]
    joined = GivenAudio(given, RATE, RATE, ((4000, 12000),)).join(made)
    assert torch.equal(joined[:, :4000], given[:, :4000]) and torch.equal(joined[:, 12000:], given[:, 12000:])
    assert joined.abs().max() <= max(peak, 1.0)
    # Turned down around its peaks, not clipped.
    new = joined[0, 4800:11200]
    assert (new.abs() > 0.999 * new.abs().max()).float().mean() < 0.01
    assert level(joined)[0, 3:7].max() > 0.3


def test_stretches_may_be_arrays_and_arrays_may_lie_in_memory_as_they_like(pipe):
    stretches = {"mask_start_in_s": [0.2, 0.8], "mask_end_in_s": [0.4, 1.0]}
    kwargs = {"prompt": "a", "num_inference_steps": 1}
    expected = run(pipe, **kwargs, **stretches)
    arrays = {name: kind(bounds) for (name, bounds), kind in zip(stretches.items(), (np.array, torch.tensor))}
    assert_near(run(pipe, **kwargs, **arrays), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        numbers = {name: [np.float32(bound) for bound in bounds] for name, bounds in stretches.items()}
        assert_near(run(pipe, **kwargs, **numbers), expected)
    for same in (
        GIVEN.flip(0).numpy()[::-1],
        GIVEN.numpy().astype(">f4"),
        np.frombuffer(GIVEN.numpy().tobytes(), np.float32),
        GIVEN.numpy().astype(np.longdouble),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(run(pipe, **kwargs, audio=same, **stretches), expected)


def test_the_strength_that_is_named_as_the_least_leaves_a_step():
    for steps in (*range(1, 200), 1000):
        with pytest.raises(ValueError, match="leaves no step: pass") as refused:
            _check_strength(None, 0.0, steps)
        least = float(re.search(r"pass ([\d.e-]+) or more", str(refused.value))[1])
        assert len(timesteps_from(SimpleNamespace(timesteps=torch.arange(steps), order=1), steps, least)) >= 1


# ----------------------------------------------------------------------------------------------------- what is refused

TWO = torch.stack([GIVEN, GIVEN])[:, None]
REFUSED = {
    "silence": ({"audio": torch.zeros(RATE)}, "`audio` is silent"),
    "a constant": ({"audio": torch.full((RATE,), 0.3)}, "`audio` is silent"),
    "NaN": ({"audio": torch.full((RATE,), math.nan)}, "`audio` holds NaN or infinite samples"),
    "one sample": ({"audio": GIVEN[:1]}, "`audio` must last 0.08 to 3600 s, got 6.25e-05 s: 1 samples at 16000 Hz"),
    "nothing": ({"audio": GIVEN[:0]}, "`audio` must hold samples"),
    "too large for float32": ({"audio": GIVEN.double() * 1e300}, "`audio` holds NaN or infinite samples"),
    "near the largest number": ({"audio": GIVEN.sign() * 3e38}, "samples of up to 3e+38, more than 1e+28"),
    "near the smallest number": ({"audio": GIVEN * 1e-44}, "`audio` is silent"),
    "integers": ({"audio": GIVEN.short()}, "`audio` must be floating-point"),
    "more than an hour": (
        {"audio": torch.ones(3601), "audio_sampling_rate": 1},
        "`audio` must last 0.08 to 3600 s, got 3601 s",
    ),
    "samples first": ({"audio": GIVEN[:, None].expand(-1, 2)}, "`audio` has more channels than samples"),
    "four axes": ({"audio": GIVEN[(None,) * 3]}, "`audio` must be [samples], [channels, samples] or a batch"),
    "channels that cancel out": ({"audio": torch.stack([GIVEN, -GIVEN])}, "silent (piece 0) where its channels"),
    "a file's name": (
        {"audio": "song.mp3", "audio_sampling_rate": None},
        "`audio` must be a numpy array or a torch tensor, but is a str: `load_audio`",
    ),
    "no rate": ({"audio_sampling_rate": None}, "`audio_sampling_rate` must come with `audio`"),
    "rate 0": ({"audio_sampling_rate": 0}, "`audio_sampling_rate` must be a positive whole number"),
    "an absurd rate": ({"audio_sampling_rate": 10**400}, "`audio_sampling_rate` must be at most 2147483647 Hz"),
    "a rate alone": ({"audio": None}, "`audio_sampling_rate` is 16000, but there is no music"),
    "a mask alone": ({"audio": None, "audio_sampling_rate": None, "mask_end_in_s": 1}, "`mask_end_in_s` is 1, but"),
    "nothing to do": ({}, "`audio` alone says not what to make of it"),
    "strength 0": ({"strength": 0.0}, "`strength` is 0.0, of which `num_inference_steps` = 4 leaves no step"),
    "strength 1.1": ({"strength": 1.1}, "`strength` must be finite and in [0, 1]"),
    "no step left": ({"strength": 0.2}, "`strength` is 0.2, of which `num_inference_steps` = 4 leaves no step"),
    "shorter": ({"audio_length_in_s": 1.0, "strength": 1.0}, "`audio_length_in_s` is 1.0, but `audio` lasts 1.2 s"),
    "going on, varied": ({"audio_length_in_s": 2.0, "strength": 0.5}, "`strength` is 0.5, but `audio_length_in_s`"),
    "mask outside": ({"mask_start_in_s": 1.0, "mask_end_in_s": 1.3}, "must ascend within `audio`, from 0 to 1.2 s"),
    "mask before": ({"mask_start_in_s": -0.1, "mask_end_in_s": 0.3}, "must ascend within `audio`"),
    "empty mask": ({"mask_start_in_s": 0.5, "mask_end_in_s": 0.5}, "must ascend within `audio`"),
    "less than a sample": ({"mask_start_in_s": 0.5, "mask_end_in_s": 0.50001}, "by a sample at least"),
    "no masks": ({"mask_start_in_s": [], "mask_end_in_s": []}, "`audio` alone says not what to make of it"),
    "masks overlap": ({"mask_start_in_s": [0.1, 0.4], "mask_end_in_s": [0.5, 0.9]}, "must not overlap"),
    "masks unsorted": ({"mask_start_in_s": [0.6, 0.1], "mask_end_in_s": [0.9, 0.5]}, "must not overlap, and ascend"),
    "masks unequal": ({"mask_start_in_s": [0.1, 0.4], "mask_end_in_s": [0.2]}, "`mask_start_in_s` names 2 stretches"),
    "pieces and prompts": ({"audio": TWO, "prompt": ["a"] * 3, "strength": 1.0}, "`audio` holds 2 pieces, which"),
    "pieces and a storyboard": (
        {"audio": TWO, "image": [photograph(1), photograph(2)], "image_start_in_s": [0.0, 0.5], "strength": 1.0},
        "`audio` holds 2 pieces, which",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def strict() -> MelFusionPipeline:
    return strict_pipeline()


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_named_before_any_model_runs(strict, case):
    changes, message = REFUSED[case]
    arguments = {"audio": GIVEN, "audio_sampling_rate": RATE, "prompt": "a", "num_inference_steps": 4, **changes}
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        strict(**arguments)


def test_pndm_cannot_begin_in_the_middle_of_its_first_steps(strict):
    scheduler = PNDMScheduler.from_config(strict.scheduler.config)
    pipe = MelFusionPipeline(**{**strict.components, "scheduler": scheduler})
    with pytest.raises(ValueError, match="`strength` is 0.5, but `scheduler` is a PNDMScheduler"):
        pipe(prompt="a", audio=GIVEN, audio_sampling_rate=RATE, strength=0.5)

import ast
import inspect
import json
import math
from dataclasses import replace

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from bad_inputs import strict_pipeline
from conftest import assert_near, generator, photograph
from diffusers import (
    AudioLDMPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.callbacks import (
    MultiPipelineCallbacks,
    PipelineCallback,
    SDCFGCutoffCallback,
    SDXLCFGCutoffCallback,
)
from untrained import music_unet, picture_unet

from melfusion_pipeline import ImageFeatures, MelFusionPipeline, VisualSynapse, pictures_melfusion
from melfusion_pipeline.denoising_melfusion import NoisePredictor

PROMPTS = ["a calm piano", "loud drums and a bass"]
FAST = {"num_inference_steps": 2, "num_inversion_steps": 2, "guidance_scale": 3.0}


def run(pipe: MelFusionPipeline, *args, seed: int = 0, **kwargs) -> np.ndarray:
    return pipe(*args, generator=generator(seed), **{**FAST, **kwargs}).audios


def audioldm(components: dict, **kwargs) -> np.ndarray:
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler", "vocoder")
    oracle = AudioLDMPipeline(**{name: components[name] for name in names})
    oracle.set_progress_bar_config(disable=True)
    kwargs = {"num_inference_steps": 2, "guidance_scale": 3.0, "generator": generator(), **kwargs}
    return oracle(**kwargs).audios


# ----------------------------------------------------------------------------------- it is text-to-music at alpha = 0


@pytest.mark.parametrize("case", ["no picture", "alpha 0", "synapse_scale 0", "scale 0 in each layer"])
@pytest.mark.parametrize("guidance_scale", [3.0, 1.0])
def test_without_the_pictures_influence_it_is_audioldm_bit_for_bit(pipe, components, case, guidance_scale):
    kwargs = {"negative_prompt": ["noise", "hiss"], "num_waveforms_per_prompt": 2, "guidance_scale": guidance_scale}
    expected = audioldm(components, prompt=PROMPTS, **kwargs)
    image = None if case == "no picture" else photograph()
    if case == "alpha 0":
        components["synapse"].reset_parameters()
    if case == "synapse_scale 0":
        kwargs["synapse_scale"] = 0
    if case == "scale 0 in each layer":
        kwargs["synapse_scale"] = [0.0] * 6
    assert np.array_equal(run(pipe, image, PROMPTS, **kwargs), expected)


def test_without_a_negative_prompt_and_with_other_lengths_it_is_audioldm_too(pipe, components):
    for kwargs in ({"audio_length_in_s": 0.96}, {"audio_length_in_s": 0.2}, {"eta": 0.7}, {"prompt": "a flute"}):
        kwargs = {"prompt": PROMPTS, **kwargs}
        # AudioLDM knows no windows: it makes longer pieces in a single pass.
        assert np.array_equal(run(pipe, window_length_in_s=0.96, **kwargs), audioldm(components, **kwargs))


def test_the_picture_matters_when_alpha_is_not_zero(pipe, image):
    plain = run(pipe, None, PROMPTS[0])
    one, other = run(pipe, image, PROMPTS[0]), run(pipe, photograph(9), PROMPTS[0])
    scale = np.abs(plain).max()
    assert scale > 1e-3
    assert np.abs(one - plain).max() > 1e-3 * scale and np.abs(one - other).max() > 1e-6 * scale
    assert np.array_equal(one, run(pipe, image, PROMPTS[0]))


def test_guidance_with_a_picture_is_the_sum_of_its_branches(pipe, image):
    """Section 4 of method.md: three passes, each alone, combined by hand, in float64: the text's share is small."""
    pipe.to(torch.float64)

    def prediction(prompt: str, **kwargs) -> torch.Tensor:
        outputs = []
        hook = pipe.unet.register_forward_hook(lambda _, __, output: outputs.append(output.sample))
        run(pipe, image, prompt, num_inference_steps=1, output_type="latent", **kwargs)
        hook.remove()
        return outputs[0]

    three = prediction(PROMPTS[0], negative_prompt="noise", image_guidance_scale=1.7, guidance_scale=2.5)
    guided = pipe.guidance.combine(three)
    free = prediction("noise", guidance_scale=1.0, synapse_scale=0.0)
    seen = prediction("noise", guidance_scale=1.0)
    full = prediction(PROMPTS[0], guidance_scale=1.0)
    assert three.dtype == torch.float64
    assert_near(three, torch.cat([free, seen, full]))
    assert (free - seen).abs().max() > 1e-3 and (full - seen).abs().max() > 1e-3
    assert_near(guided, free + 1.7 * (seen - free) + 2.5 * (full - seen))

    two = prediction(PROMPTS[0], negative_prompt="noise", guidance_scale=2.5)
    assert_near(pipe.guidance.combine(two), seen + 2.5 * (full - seen))


# -------------------------------------------------------------------------------------------------- pictures, prompts


def test_pictures_and_prompts_meet_as_they_should(pipe):
    pictures = [photograph(1), photograph(2)]
    pairs = run(pipe, pictures, PROMPTS, latents=(noise := torch.randn(2, 4, 8, 2)))
    for index in range(2):
        alone = run(pipe, pictures[index], PROMPTS[index], latents=noise[index : index + 1])
        assert_near(pairs[index], alone[0])
    one_picture = run(pipe, pictures[1], PROMPTS, latents=noise)
    assert_near(one_picture[1], pairs[1])
    one_prompt = run(pipe, pictures, PROMPTS[1], latents=noise)
    assert_near(one_prompt[1], pairs[1])
    no_prompt = run(pipe, pictures, latents=noise)
    assert np.array_equal(no_prompt, run(pipe, pictures, "", latents=noise))


def test_waveforms_are_laid_out_prompt_by_prompt_with_their_own_picture(pipe):
    pictures, noise = [photograph(1), photograph(2)], torch.randn(4, 4, 8, 2)
    kwargs = {"num_waveforms_per_prompt": 2, "image_guidance_scale": 1.5}
    together = run(pipe, pictures, PROMPTS, latents=noise, **kwargs)
    second = run(pipe, pictures[1], PROMPTS[1], latents=noise[2:], **kwargs)
    assert_near(together[2:], second)


def test_features_computed_once_serve_other_calls_lengths_and_files(pipe, image, tmp_path):
    features = pipe.encode_image(image, num_inversion_steps=2)
    assert features.image_size == 32 and len(features.timesteps) == 2 and features.num_images == 1
    features.save(tmp_path / "features.safetensors")
    loaded = ImageFeatures.load(tmp_path / "features.safetensors")
    for kwargs in ({}, {"prompt": PROMPTS}, {"audio_length_in_s": 0.5}, {"num_inference_steps": 3}):
        kwargs = {"prompt": PROMPTS[0], **kwargs}
        fresh = run(pipe, image, **kwargs)
        assert np.array_equal(run(pipe, image_features=features, **kwargs), fresh)
        assert np.array_equal(run(pipe, image_features=loaded, **kwargs), fresh)


def test_feature_sources_and_image_arguments_change_the_features(pipe, image):
    layer = pipe.synapse.config.image_layers[0]
    base = pipe.encode_image(image, num_inversion_steps=2)
    paper = pipe.encode_image(image, num_inversion_steps=2, feature_source="reconstruction")
    assert base.timesteps.tolist() == [0, 499] and paper.timesteps.tolist() == [999, 499]
    prompted = pipe.encode_image(image, "a harbour", num_inversion_steps=2)
    assert not torch.allclose(base.keys[layer], prompted.keys[layer])
    larger = pipe.encode_image(image, image_size=48, num_inversion_steps=2)
    assert larger.keys[layer].shape[2] == math.ceil(12 / 4) ** 2 and larger.image_size == 48


def test_image_latents_are_the_posterior_mode_and_consume_no_randomness(pipe, image):
    state = torch.get_rng_state()
    latents = pipe.prepare_image_latents([image, photograph(4)])
    assert torch.equal(torch.get_rng_state(), state)
    assert latents.shape == (2, 4, 8, 8) and latents.dtype == torch.float32
    assert torch.equal(latents, pipe.prepare_image_latents([image, photograph(4)]))


def test_the_state_dicts_and_processors_are_untouched_by_a_call_and_by_an_exception(pipe, image):
    models = (pipe.image_unet, pipe.unet)
    weights = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]
    processors = [dict(model.attn_processors) for model in models]

    def interrupt(pipe, step, timestep, tensors):
        raise KeyboardInterrupt

    run(pipe, image, PROMPTS[0])
    with pytest.raises(KeyboardInterrupt):
        run(pipe, image, PROMPTS[0], callback_on_step_end=interrupt)
    for model, before, installed in zip(models, weights, processors):
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert all(model.attn_processors[name] is processor for name, processor in installed.items())
    assert np.isfinite(run(pipe, image, PROMPTS[0])).all()


# --------------------------------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("seconds", [0.04, 0.1, 0.333, 1.2345])
def test_the_waveform_is_exactly_as_long_as_asked(pipe, image, seconds):
    audio = run(pipe, image, PROMPTS[0], audio_length_in_s=seconds)
    assert audio.shape == (1, round(seconds * 16000)) and audio.dtype == np.float32
    mel = run(pipe, image, PROMPTS[0], audio_length_in_s=seconds, output_type="mel")
    assert mel.shape == (1, math.ceil(round(seconds * 100, 6)), 8)


@torch.no_grad()
def test_lengths_and_rates_have_names_and_the_vocoders_tail_is_cut(pipe):
    assert pipe.sampling_rate == 16000 and pipe.default_audio_length_in_s == pytest.approx(0.32)
    mel = torch.randn(2, 1, 12, 8)
    raw = pipe.vocoder(mel.squeeze(1))
    assert raw.shape[1] > 12 * 160
    assert torch.equal(pipe.mel_spectrogram_to_waveform(mel), raw[:, : 12 * 160])
    assert torch.equal(pipe.mel_spectrogram_to_waveform(mel.squeeze(1), 0.0753), raw[:, :1205])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_of_every_output_type_are_float32_on_the_cpu_and_go_on(components, dtype):
    pipe = MelFusionPipeline(**components).to(dtype)
    pipe.set_progress_bar_config(disable=True)
    found = {kind: run(pipe, None, PROMPTS[0], output_type=kind) for kind in ("pt", "mel", "latent")}
    assert {(audio.dtype, audio.device.type) for audio in found.values()} == {(torch.float32, "cpu")}
    with torch.no_grad():
        assert torch.equal(pipe.mel_spectrogram_to_waveform(found["mel"]), found["pt"])
        mel = pipe.decode_latents(found["latent"]).squeeze(1).float()
    assert (mel - found["mel"]).abs().max() <= 0.02 * found["mel"].abs().max()


@torch.no_grad()
def test_output_types_and_return_dict(pipe, image):
    audio = run(pipe, image, PROMPTS[0])
    tensor = run(pipe, image, PROMPTS[0], output_type="pt")
    assert isinstance(tensor, torch.Tensor) and np.array_equal(tensor.numpy(), audio)
    latents = run(pipe, image, PROMPTS[0], output_type="latent")
    assert latents.shape == (1, 4, 8, 2)
    mel = pipe.decode_latents(latents)
    assert torch.equal(run(pipe, image, PROMPTS[0], output_type="mel"), mel.squeeze(1))
    assert np.array_equal(pipe.mel_spectrogram_to_waveform(mel)[:, : audio.shape[1]].numpy(), audio)
    (as_tuple,) = pipe(image, PROMPTS[0], generator=generator(), return_dict=False, **FAST)
    assert np.array_equal(as_tuple, audio)


@pytest.mark.parametrize(
    "scheduler",
    [
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
        LMSDiscreteScheduler,
        PNDMScheduler,
    ],
)
def test_any_scheduler_drives_the_music(pipe, image, components, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    audio = run(pipe, image, PROMPTS[0], num_inference_steps=4)
    assert np.isfinite(audio).all() and np.array_equal(audio, run(pipe, image, PROMPTS[0], num_inference_steps=4))
    oracle = audioldm({**components, "scheduler": pipe.scheduler}, prompt=PROMPTS, num_inference_steps=4)
    assert np.array_equal(run(pipe, image, PROMPTS, synapse_scale=0, num_inference_steps=4), oracle)


def test_a_callback_can_change_latents_prompts_and_guidance_and_interrupt(pipe, image):
    seen = []

    def change(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), tensors["prompt_embeds"].shape[0]))
        if step == 1:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        if step == 2:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
            pipe._interrupt = True
        return tensors

    names = ["latents", "prompt_embeds"]
    latents = run(
        pipe,
        image,
        PROMPTS,
        num_inference_steps=5,
        output_type="latent",
        callback_on_step_end=change,
        callback_on_step_end_tensor_inputs=names,
    )
    assert not latents.any() and pipe.num_timesteps == 5
    assert pipe.guidance_scale == 0.0 and pipe.image_guidance_scale is None
    assert [(step, rows) for step, _, rows in seen] == [(0, 4), (1, 4), (2, 2)]


def test_the_callbacks_of_diffusers_name_their_tensors_themselves(pipe, image):
    seen = []

    class Watch(PipelineCallback):
        tensor_inputs = ["latents", "negative_prompt_embeds"]

        def callback_fn(self, pipe, step, timestep, tensors):
            seen.append((step, len(tensors["prompt_embeds"]), tensors["negative_prompt_embeds"] is None))
            return tensors

    class WatchPrompts(Watch):
        tensor_inputs = ["prompt_embeds", "negative_prompt_embeds"]

    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    kwargs = {"num_inference_steps": 4, "output_type": "latent"}
    cut = run(pipe, image, PROMPTS[0], callback_on_step_end=MultiPipelineCallbacks([cutoff, WatchPrompts()]), **kwargs)
    assert seen == [(0, 2, False), (1, 1, False), (2, 1, False), (3, 1, False)] and pipe.guidance_scale == 0.0
    assert torch.equal(cut, run(pipe, image, PROMPTS[0], callback_on_step_end=cutoff, **kwargs))
    whole, unguided = (run(pipe, image, PROMPTS[0], guidance_scale=scale, **kwargs) for scale in (3.0, 1.0))
    assert (cut - whole).abs().max() > 1e-4 and (cut - unguided).abs().max() > 1e-4


def test_a_callback_that_leaves_too_few_embeddings_is_told_so(pipe, image):
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    for prompt, kwargs, need in (
        (PROMPTS, {}, "2 waveforms in 1 guidance branches need 2"),
        (PROMPTS[0], {"image_guidance_scale": 2.0}, "1 waveforms in 3 guidance branches need 3"),
    ):
        with pytest.raises(ValueError, match=f"left `prompt_embeds` with 1 rows, but {need}"):
            run(pipe, image, prompt, callback_on_step_end=cutoff, **kwargs)
    sdxl = SDXLCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    with pytest.raises(ValueError, match="`callback_on_step_end_tensor_inputs` must be one of .* 'add_text_embeds'"):
        run(pipe, image, PROMPTS[0], callback_on_step_end=sdxl)


@pytest.mark.parametrize("image_guidance_scale", [None, 2.0])
def test_a_callback_may_change_the_negative_prompt(pipe, image, image_guidance_scale):
    kwargs = {"image_guidance_scale": image_guidance_scale, "output_type": "latent", "num_waveforms_per_prompt": 2}
    _, other = pipe.encode_prompt(PROMPTS, "noise")
    other = other.repeat_interleave(2, dim=0)
    rows = []

    def change(pipe, step, timestep, tensors):
        rows.append(tensors["prompt_embeds"])
        return {"negative_prompt_embeds": other} if step == 0 else tensors

    names = ["prompt_embeds", "negative_prompt_embeds"]
    latents = run(
        pipe, image, PROMPTS, callback_on_step_end=change, callback_on_step_end_tensor_inputs=names, **kwargs
    )
    branches = rows[1].chunk(2 if image_guidance_scale is None else 3)
    assert all(torch.equal(branch, other) for branch in branches[:-1])
    assert torch.equal(branches[-1], rows[0].chunk(len(branches))[-1])
    assert not torch.equal(latents, run(pipe, image, PROMPTS, **kwargs))


def test_encode_prompt_alone_gives_what_a_call_takes(pipe, image):
    prompt_embeds, negative_prompt_embeds = pipe.encode_prompt(PROMPTS, "noise")
    assert_near(prompt_embeds.norm(dim=-1), torch.ones(2))
    kwargs = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
    expected = run(pipe, image, PROMPTS, negative_prompt="noise", num_waveforms_per_prompt=2)
    assert np.array_equal(run(pipe, image, num_waveforms_per_prompt=2, **kwargs), expected)
    pipe.text_encoder = pipe.tokenizer = None
    assert np.array_equal(run(pipe, image, num_waveforms_per_prompt=2, **kwargs), expected)


def test_encode_prompt_returns_plain_names_and_gradients_are_off_where_calls_begin():
    """diffusers' battery of behaviours reads the names that `encode_prompt` returns from its source."""
    own = [parent for parent in MelFusionPipeline.__mro__ if parent.__module__.startswith("melfusion_pipeline.")]
    nodes = [node for parent in own for node in ast.walk(ast.parse(inspect.getsource(parent)))]
    methods = {node.name: node for node in nodes if isinstance(node, ast.FunctionDef)}
    returned = [node.value for node in ast.walk(methods["encode_prompt"]) if isinstance(node, ast.Return)]
    assert [ast.unparse(value) for value in returned] == ["(prompt_embeds, negative_prompt_embeds)"]
    decorators = {name: [ast.unparse(single) for single in node.decorator_list] for name, node in methods.items()}
    without_gradients = {name for name, found in decorators.items() if "torch.no_grad()" in found}
    assert without_gradients == {"__call__", "encode_prompt", "encode_audio", "encode_image", "encode_image_prompt"}


def test_long_prompts_are_cut_with_one_warning(pipe, caplog, capfd):
    diffusers.utils.logging.enable_propagation()
    run(pipe, None, "very long " * 100, guidance_scale=1.0)
    diffusers.utils.logging.disable_propagation()
    assert [record.message for record in caplog.records] == [
        "A text of 1002 tokens was cut to the 77 that the text encoder takes."
    ]
    assert "indexing errors" not in capfd.readouterr().err


def test_a_long_negative_prompt_is_cut_to_what_the_text_encoder_takes(components):
    """AudioLDM's text encoder takes as many tokens as its embeddings are wide, the bundled one fewer."""
    config = components["text_encoder"].config
    config.max_position_embeddings = 22
    components["text_encoder"] = type(components["text_encoder"])(config).eval()
    components["tokenizer"].model_max_length = 20
    pipe = MelFusionPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    assert np.isfinite(run(pipe, None, PROMPTS[0], negative_prompt="very long noise " * 20)).all()


def test_the_unets_own_sizes_may_be_tuples_or_missing(components, image):
    def sized(sample_size, image_sample_size):
        unets = {
            "unet": music_unet(sample_size=sample_size),
            "image_unet": picture_unet(sample_size=image_sample_size),
        }
        for name, unet in unets.items():
            unet.load_state_dict(components[name].state_dict())
        pipe = MelFusionPipeline(**{**components, **{name: unet.eval() for name, unet in unets.items()}})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    expected = run(sized(8, 8), image, PROMPTS[0])
    pipe = sized((8, 2), [8, 8])
    assert pipe.default_audio_length_in_s == pytest.approx(0.32) and pipe.default_image_size == 32
    assert np.array_equal(run(pipe, image, PROMPTS[0]), expected)
    pipe = sized(None, None)
    with pytest.raises(ValueError, match=r"`audio_length_in_s` must be given: `unet\.config\.sample_size` is None"):
        run(pipe, image, PROMPTS[0])
    with pytest.raises(ValueError, match=r"`image_size` must be given: `image_unet\.config\.sample_size` is None"):
        run(pipe, image, PROMPTS[0], audio_length_in_s=0.32)
    assert np.array_equal(run(pipe, image, PROMPTS[0], audio_length_in_s=0.32, image_size=32), expected)


def test_a_picture_is_looked_at_once_and_recorded_steps_are_looked_up_before_the_first_pass(pipe, monkeypatch):
    events = []

    def watched(module, name):
        function = getattr(module, name)

        def watch(*args, **kwargs):
            events.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, watch)

    for module, name in (
        (pictures_melfusion, "_as_pil_image"),
        (pictures_melfusion, "to_rgb"),
        (ImageFeatures, "nearest"),
        (NoisePredictor, "predict"),
    ):
        watched(module, name)
    run(pipe, [photograph(1), photograph(2)], PROMPTS, num_inference_steps=3)
    assert events == ["_as_pil_image"] * 2 + ["to_rgb"] * 2 + ["nearest"] + ["predict"] * 3


def test_a_call_unlike_the_training_warns(pipe, image, caplog):
    pipe.synapse.register_to_config(image_latents="inversion", num_inversion_steps=2, image_size=32)
    diffusers.utils.logging.enable_propagation()
    run(pipe, image, PROMPTS[0])
    # Of the two steps of this one, one is read.
    run(pipe, image, PROMPTS[0], num_inference_steps=1)
    assert not caplog.text
    run(pipe, image, PROMPTS[0], num_inversion_steps=3, image_size=48)
    diffusers.utils.logging.disable_propagation()
    assert "num_inversion_steps=2" in caplog.text and "image_size=32" in caplog.text
    assert "image latents" not in caplog.text
    for trained, given in (("noising", "inversion"), ("inversion", "noising")):
        pipe.synapse.register_to_config(image_latents=trained)
        assert pipe.default_feature_source == trained
        caplog.clear()
        diffusers.utils.logging.enable_propagation()
        run(pipe, image, PROMPTS[0])
        assert not caplog.text
        run(pipe, image, PROMPTS[0], feature_source=given)
        diffusers.utils.logging.disable_propagation()
        assert f"trained with image latents from '{trained}', this call's are from '{given}'" in caplog.text


# -------------------------------------------------------------------------------- diffusers' own battery of behaviours


def test_a_batch_of_three_equals_its_singles(pipe):
    pictures = [photograph(seed) for seed in range(3)]
    prompts = ["short", "a middling long prompt of strings", "very long " * 20]
    together = pipe(pictures, prompts, generator=[generator(seed) for seed in range(3)], **FAST).audios
    for index in range(3):
        alone = pipe(pictures[index], prompts[index], generator=generator(index), **FAST).audios
        assert_near(together[index], alone[0])


def test_attention_slicing_and_vae_slicing_do_not_change_the_result(pipe, image):
    expected = run(pipe, image, PROMPTS)
    pipe.enable_attention_slicing(1)
    pipe.vae.enable_slicing()
    assert_near(run(pipe, image, PROMPTS), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_close_to_full(components, image, dtype):
    pipe = MelFusionPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    expected = run(pipe, image, PROMPTS[0], output_type="latent")
    latents = run(pipe.to(dtype), image, PROMPTS[0], output_type="latent")
    assert (latents - expected).abs().max() < 0.1 * expected.abs().max()
    audio = run(pipe, image, PROMPTS[0])
    assert audio.dtype == np.float32 and np.isfinite(audio).all()


@pytest.mark.parametrize(
    "half", ["text_encoder", "image_text_encoder", "vocoder", "vae", "image_vae", "unet", "image_unet"]
)
def test_components_may_differ_in_dtype(components, image, half):
    pipe = MelFusionPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    expected = run(pipe, image, PROMPTS[0], output_type="latent")
    getattr(pipe, half).to(torch.float16)
    latents = run(pipe, image, PROMPTS[0], output_type="latent")
    assert (latents.float() - expected).abs().max() < 0.1 * expected.abs().max()
    assert np.isfinite(run(pipe, image, PROMPTS[0])).all()


def test_an_image_vae_that_exceeds_half_precision_runs_in_float32_where_its_config_says_so(components, image):
    with torch.no_grad():
        components["image_vae"].encoder.conv_in.weight.mul_(1e5)
    pipe = MelFusionPipeline(**components)
    expected = pipe.prepare_image_latents(image)
    pipe.image_vae.to(torch.float16)
    weights = [parameter.clone() for parameter in pipe.image_vae.parameters()]
    found = pipe.prepare_image_latents(image)
    # The weights are rounded to float16, what is computed with them is not.
    assert (found - expected).abs().max() < 0.01 * expected.abs().max()
    for before, after in zip(weights, pipe.image_vae.parameters(), strict=True):
        assert after.dtype == torch.float16 and torch.equal(before, after)
    pipe.image_vae.register_to_config(force_upcast=False)
    with pytest.raises(FloatingPointError, match="inversion of the picture"):
        pipe.encode_image(image)


def test_model_and_group_offload_give_the_same_result(pipe, image):
    expected = run(pipe, image, PROMPTS[0])
    pipe.enable_model_cpu_offload(device="cpu")
    assert_near(run(pipe, image, PROMPTS[0]), expected)
    pipe.remove_all_hooks()
    pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    assert_near(run(pipe, image, PROMPTS[0]), expected)


def test_sequential_offload_finds_every_weight_where_it_is_used(pipe, image):
    """accelerate keeps weights on the meta device outside of their module's forward: reading one elsewhere fails."""
    from accelerate import cpu_offload

    # Cast to float32 and back by its `force_upcast`.
    pipe.image_vae.to(torch.float16)
    expected = run(pipe, image, PROMPTS[0])
    for name in ("text_encoder", "image_text_encoder", "image_vae", "image_unet", "synapse", "unet", "vae", "vocoder"):
        component = getattr(pipe, name)
        cpu_offload(component, torch.device("cpu"), offload_buffers=len(component._parameters) > 0)
    assert pipe.synapse.alphas.device.type == "meta" and pipe.unet.conv_in.weight.device.type == "meta"
    assert_near(run(pipe, image, PROMPTS[0]), expected)
    assert pipe.synapse.alphas.device.type == "meta"


def test_the_stages_run_apart(components, image):
    whole = run(MelFusionPipeline(**components), image, PROMPTS[0])
    picture = ("image_vae", "image_text_encoder", "image_tokenizer", "image_unet", "image_scheduler", "synapse")
    first = MelFusionPipeline(**{name: part if name in picture else None for name, part in components.items()})
    features = first.encode_image(image, num_inversion_steps=2)
    music = {name: None if name in picture[:-1] else part for name, part in components.items()}
    second = MelFusionPipeline(**music)
    assert np.array_equal(run(second, None, PROMPTS[0], image_features=features), whole)


def test_without_an_image_text_encoder_the_picture_is_conditioned_on_zeros_with_a_warning(pipe, image, caplog):
    pipe.image_text_encoder = None
    diffusers.utils.logging.enable_propagation()
    assert np.isfinite(run(pipe, image, PROMPTS[0])).all()
    diffusers.utils.logging.disable_propagation()
    assert "conditioned on zeros" in caplog.text


@pytest.mark.parametrize(("scheduler", "passes"), [(PNDMScheduler, 13), (HeunDiscreteScheduler, 7)])
def test_the_progress_bar_counts_the_passes_of_the_unet(pipe, capsys, scheduler, passes):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=False)
    run(pipe, None, PROMPTS[0], num_inference_steps=4)
    assert f"{passes}/{passes}" in capsys.readouterr().err and pipe.num_timesteps == passes


def test_nothing_is_promised_that_does_not_work(pipe):
    for name in ("fuse_qkv_projections", "unfuse_qkv_projections", "enable_freeu", "disable_freeu"):
        assert not hasattr(pipe, name)


def test_progress_bars_can_be_seen_and_silenced(pipe, image, capsys):
    pipe.set_progress_bar_config(disable=False)
    run(pipe, image, PROMPTS[0], num_inference_steps=3)
    output = capsys.readouterr().err
    assert "2/2" in output and "3/3" in output
    pipe.set_progress_bar_config(disable=True)
    run(pipe, image, PROMPTS[0])
    assert capsys.readouterr().err == ""


# ----------------------------------------------------------------------------------------------------- what is refused

LATENTS = torch.zeros(1, 4, 8, 2)
EMBEDS = torch.zeros(1, 32)
REFUSED = {
    "nothing": ({"image": None, "prompt": None}, "nothing to make music of"),
    "prompt type": ({"prompt": 3}, "`prompt` must be a str"),
    "prompt list type": ({"prompt": ["a", None]}, "`prompt` must be a str"),
    "no prompts": ({"prompt": []}, "`prompt` is an empty list"),
    "no pictures": ({"image": []}, "empty list"),
    "counts": ({"image": [photograph()] * 2, "prompt": ["a"] * 3}, "2 pictures cannot meet 3 prompts"),
    "zero length": ({"audio_length_in_s": 0}, "`audio_length_in_s` must be finite"),
    "negative length": ({"audio_length_in_s": -1.0}, "`audio_length_in_s`"),
    "NaN length": ({"audio_length_in_s": math.nan}, "`audio_length_in_s`"),
    "infinite length": ({"audio_length_in_s": math.inf}, "`audio_length_in_s`"),
    "below a frame": ({"audio_length_in_s": 0.03}, r"in \[0.04"),
    "text length": ({"audio_length_in_s": "5"}, "`audio_length_in_s` must be a number"),
    "no steps": ({"num_inference_steps": 0}, r"`num_inference_steps` must be in \[1, 1000\], got 0"),
    "float steps": ({"num_inference_steps": 5.0}, "`num_inference_steps` must be an int"),
    "too many steps": ({"num_inference_steps": 1001}, r"\[1, 1000\]"),
    "true steps": ({"num_inference_steps": True}, "must be an int"),
    "no inversion steps": ({"num_inversion_steps": 0}, "`num_inversion_steps`"),
    "too many inversion steps": ({"num_inversion_steps": 1001}, "`num_inversion_steps`"),
    "float inversion steps": ({"num_inversion_steps": 2.5}, "`num_inversion_steps`"),
    "NaN guidance": ({"guidance_scale": math.nan}, "`guidance_scale` must be finite"),
    "NaN image guidance": ({"image_guidance_scale": math.nan}, "`image_guidance_scale` must be finite"),
    "image guidance alone": ({"image": None, "image_guidance_scale": 2.0}, "there is no picture"),
    "scale count": ({"synapse_scale": [1.0] * 5}, "one number or 6, one a layer, got 5"),
    "NaN scale": ({"synapse_scale": math.nan}, "`synapse_scale` must be finite"),
    "scale type": ({"synapse_scale": "strong"}, "`synapse_scale` must be a number"),
    "both prompts": ({"prompt_embeds": EMBEDS}, "`prompt` or `prompt_embeds`, not both"),
    "both negatives": ({"negative_prompt": "x", "negative_prompt_embeds": EMBEDS}, "not both"),
    "embeds width": ({"prompt": None, "prompt_embeds": torch.zeros(1, 31)}, r"\[prompts, 32\], got \[1, 31\]"),
    "embeds type": ({"prompt": None, "prompt_embeds": [0.0]}, "must be a torch tensor"),
    "embeds mismatch": (
        {"prompt": None, "prompt_embeds": EMBEDS.expand(3, -1), "negative_prompt_embeds": EMBEDS.expand(2, -1)},
        "2 negative prompts do not match 3",
    ),
    "negative count": ({"prompt": ["a", "b", "c"], "negative_prompt": ["x", "y"]}, "2 negative prompts"),
    "negative type": ({"negative_prompt": 1}, "`negative_prompt` must be a str"),
    "generator count": ({"generator": [generator()] * 2}, "`generator` is a list of 2, but 1 waveforms"),
    "generator type": ({"generator": 42}, "`generator` must be a torch.Generator"),
    "latents shape": ({"latents": LATENTS[..., :1]}, r"`latents` must have the shape \[1, 4, 8, 2\]"),
    "latents type": ({"latents": [1.0]}, "`latents` must be a torch tensor"),
    "NaN latents": ({"latents": LATENTS * math.nan}, "`latents` holds NaN"),
    "NaN embeds": ({"prompt": None, "prompt_embeds": EMBEDS * math.inf}, "`prompt_embeds` holds NaN or infinite"),
    "output type": ({"output_type": "wav"}, "`output_type` must be one of"),
    "feature source": ({"feature_source": "noise"}, "`feature_source` must be one of"),
    "callback tensor": ({"callback_on_step_end_tensor_inputs": ["noise_pred"]}, "must be one of"),
    "attention kwargs": ({"cross_attention_kwargs": 1}, "`cross_attention_kwargs` must be a dict"),
    "eta": ({"eta": 2.0}, r"`eta` must be finite and in \[0, 1\]"),
    "waveforms": ({"num_waveforms_per_prompt": 0}, "`num_waveforms_per_prompt`"),
    "image size": ({"image_size": 30}, "`image_size` must be a multiple of 4"),
    "image size zero": ({"image_size": 0}, "`image_size` must be at least 4"),
    "image prompts": ({"image_prompt": ["a", "b"]}, "`image_prompt` must be one text or 1"),
    "image prompt type": ({"image_prompt": 7}, "`image_prompt` must be a str"),
    "features type": ({"image": None, "image_features": {"a": 1}}, "what `encode_image` returns"),
}


TRAINED = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
REFUSED_SCHEDULERS = {
    "FlowMatchEulerDiscreteScheduler": {},
    "FlowMatchHeunDiscreteScheduler": {},
    "EDMEulerScheduler": {},
    "EDMDPMSolverMultistepScheduler": {},
    "IPNDMScheduler": {},
    "CMStochasticIterativeScheduler": {},
    "UniPCMultistepScheduler": {**TRAINED, "use_flow_sigmas": True, "prediction_type": "flow_prediction"},
    "EulerDiscreteScheduler": {**TRAINED, "timestep_type": "continuous", "prediction_type": "v_prediction"},
    "DDIMInverseScheduler": TRAINED,
    "DPMSolverMultistepInverseScheduler": TRAINED,
    "RePaintScheduler": {"beta_schedule": "linear"},
    "CogVideoXDPMScheduler": TRAINED,
}


@pytest.mark.parametrize("name", REFUSED_SCHEDULERS)
def test_schedulers_that_cannot_work_are_refused_by_name(strict_pipe, name):
    scheduler = getattr(diffusers, name)(**REFUSED_SCHEDULERS[name])
    pipe = MelFusionPipeline(**{**strict_pipe.components, "scheduler": scheduler})
    with pytest.raises(ValueError, match=f"^`scheduler` is a {name}, "):
        pipe(prompt="a piano", **FAST)
    if not hasattr(scheduler, "alphas_cumprod"):
        pipe = MelFusionPipeline(**{**strict_pipe.components, "image_scheduler": scheduler})
        with pytest.raises(ValueError, match=f"^`image_scheduler` is a {name}, "):
            pipe(photograph(), "a piano", **FAST)
        with pytest.raises(ValueError, match=f"^`image_scheduler` is a {name}, "):
            pipe.encode_image(photograph(), num_inversion_steps=2)


def test_a_text_or_a_path_in_place_of_the_picture_shows_the_right_call(strict_pipe):
    with pytest.raises(TypeError, match="A text is given as `prompt='a waltz for piano'`"):
        strict_pipe("a waltz for piano")
    with pytest.raises(TypeError, match=r"`image=diffusers\.utils\.load_image\('harbour\.jpg'\)`"):
        strict_pipe("harbour.jpg", "a waltz for piano")


def test_check_inputs_takes_names_only_and_says_what_it_refuses_and_returns(strict_pipe):
    parameters = inspect.signature(strict_pipe.check_inputs).parameters.values()
    assert {parameter.kind for parameter in parameters} == {inspect.Parameter.KEYWORD_ONLY}
    assert all(part in strict_pipe.check_inputs.__doc__ for part in ("Refused are", "Returns:", "Raises:"))
    call = inspect.signature(strict_pipe.__call__).parameters
    assert {parameter.name for parameter in parameters} == call.keys() - {"return_dict"}


@pytest.fixture(scope="module")
def strict_pipe() -> MelFusionPipeline:
    """A pipeline whose models must not run: input is refused before."""
    return strict_pipeline()


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_input_is_refused_before_any_model_runs(strict_pipe, case):
    arguments, message = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=message):
        strict_pipe(**{"image": photograph(), "prompt": "a piano", **FAST, **arguments})


def test_wrong_pictures_are_refused_before_any_model_runs(strict_pipe):
    for image in (np.full((8, 8, 3), np.nan), np.zeros((8, 8, 2)), PIL.Image.new("RGB", (0, 4)), "picture.png"):
        with pytest.raises((ValueError, TypeError), match="`image`"):
            strict_pipe(image, "a piano")
        with pytest.raises((ValueError, TypeError), match="`image`"):
            strict_pipe.encode_image(image)


def test_features_of_another_unet_or_beside_a_picture_are_refused(strict_pipe, pipe, image):
    features = pipe.encode_image(image, num_inversion_steps=2)
    with pytest.raises(ValueError, match="`image` or `image_features`, not both"):
        strict_pipe(image, "a piano", image_features=features)
    layer = next(iter(features.keys))
    narrow = {name: key[..., :8] for name, key in features.keys.items()}
    for keys in (narrow, {f"other.{name}": key for name, key in features.keys.items() if name != layer}):
        with pytest.raises(ValueError, match="`image_features` does not fit"):
            strict_pipe(prompt="a piano", image_features=ImageFeatures(keys, keys, features.timesteps))


def test_features_are_not_encoded_otherwise_by_a_call(strict_pipe, pipe, image):
    features = pipe.encode_image(image, num_inversion_steps=2)
    for name, value, message in (
        ("num_inversion_steps", 3, "`num_inversion_steps` is 3, but `image_features` were encoded with 2: leave it"),
        ("image_size", 16, "`image_size` is 16, but `image_features` were encoded with 32: leave it"),
        ("feature_source", "noising", "`feature_source` is 'noising', but .* encoded with 'inversion': leave it"),
        ("image_prompt", "fog", "Pass `image_prompt` or `image_features`, not both: got 'fog'"),
        ("num_inversion_steps", 2.0, "`num_inversion_steps` must be an int"),
        ("image_size", np.full(2, 32), "`image_size` must be an int"),
        ("feature_source", np.zeros(2), "`feature_source` must be one of"),
        ("image_prompt", 3, "`image_prompt` must be a str"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"^{message}"):
            strict_pipe(prompt="a piano", image_features=features, **{name: value})
    # A script that always says what it encodes with may say it here too; an older file does not tell its size.
    settings = {"image_size": 32, "num_inversion_steps": 2, "feature_source": "inversion", "image_prompt": ""}
    made = run(pipe, None, PROMPTS[0], image_features=features, **settings)
    unsized = replace(features, image_size=None)
    assert np.array_equal(made, run(pipe, None, PROMPTS[0], image_features=unsized, **settings))


@pytest.mark.parametrize("name", ["unet", "vae", "tokenizer"])
def test_components_in_one_anothers_place_are_refused_also_without_a_picture(strict_pipe, name):
    components = strict_pipe.components
    swapped = {name: components[f"image_{name}"], f"image_{name}": components[name]}
    with pytest.raises(ValueError, match=f"^`(image_)?{name}` "):
        MelFusionPipeline(**{**components, **swapped})(prompt="a piano")


def test_each_recorded_step_that_is_read_is_fitted_once_when_it_is_due(pipe, image):
    features = pipe.encode_image(image, num_inversion_steps=8)
    fitted = []
    pipe.synapse.register_forward_pre_hook(lambda _, args: fitted.append(len(next(iter(args[0].values())))))
    for num_inference_steps in (3, 20):
        fitted.clear()
        run(
            pipe,
            None,
            PROMPTS[0],
            image_features=features,
            num_inversion_steps=8,
            num_inference_steps=num_inference_steps,
        )
        steps = features.nearest(pipe.scheduler.timesteps)
        assert fitted == [1] * len(steps.unique())


def test_a_variation_inverts_the_picture_no_further_than_it_reads(pipe, image):
    passes = []
    features = pipe.encode_image(image, num_inversion_steps=8)
    pipe.image_unet.register_forward_pre_hook(lambda *_: passes.append(1))
    audio = np.random.default_rng(0).uniform(-0.5, 0.5, round(0.32 * pipe.sampling_rate))
    call = {"audio": audio, "audio_sampling_rate": pipe.sampling_rate, "strength": 0.5, "num_inference_steps": 4}
    made = run(pipe, image, PROMPTS[0], num_inversion_steps=8, **call)
    assert len(passes) == features.nearest(pipe.scheduler.timesteps[2:]).max() + 1 == 3
    assert np.array_equal(made, run(pipe, None, PROMPTS[0], image_features=features, num_inversion_steps=8, **call))


def test_features_are_looked_through_once(pipe, image):
    features = pipe.encode_image(image, num_inversion_steps=2)
    assert vars(features)["is_finite"] and features.to(torch.float64).is_finite
    with torch.no_grad():
        next(iter(features.values.values())).fill_(math.nan)
    with pytest.raises(FloatingPointError, match="denoising"):
        run(pipe, None, PROMPTS[0], image_features=features)


def test_features_with_nan_and_texts_without_an_encoder_are_refused(pipe, image):
    features = pipe.encode_image(image, num_inversion_steps=2)
    broken = replace(features, values={layer: value * math.nan for layer, value in features.values.items()})
    with pytest.raises(ValueError, match="`image_features` holds NaN or infinite values"):
        run(pipe, None, PROMPTS[0], image_features=broken)
    pipe.text_encoder = None
    with pytest.raises(ValueError, match="cannot be encoded without `text_encoder`"):
        run(pipe, None, PROMPTS[0])


def test_a_file_in_place_of_the_folder_is_refused(pipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`save_directory` must be a folder, got the file"):
        pipe.save_pretrained(tmp_path / "file")


def test_swapped_unets_and_unknown_predictions_are_refused(components, image):
    other = picture_unet(block_out_channels=(8, 16, 32, 32))
    with pytest.raises(ValueError, match="`image_unet` does not fit `synapse`"):
        MelFusionPipeline(**{**components, "image_unet": other})(image, "a piano")
    scheduler = type(components["image_scheduler"]).from_config(
        components["image_scheduler"].config, prediction_type="sample"
    )
    with pytest.raises(ValueError, match="prediction_type"):
        MelFusionPipeline(**{**components, "image_scheduler": scheduler})(image, "a piano")


def test_unmatched_decoders_are_refused():
    plain = {"up_block_types": ("UpBlock2D",) * 4, "down_block_types": ("DownBlock2D",) * 4}
    with pytest.raises(ValueError, match="cannot be matched"):
        VisualSynapse.from_unets(picture_unet(), music_unet(**plain))


@pytest.mark.parametrize(
    ("component", "stage"),
    [
        ("text_encoder", "the encoding of the prompt"),
        ("image_vae", "the inversion of the picture"),
        ("image_unet", "the inversion of the picture"),
        ("synapse", "denoising"),
        ("unet", "denoising"),
        ("vae", "the VAE decoder"),
        ("vocoder", "the vocoder"),
    ],
)
def test_damaged_weights_are_reported_with_the_stage_where_they_show(pipe, image, component, stage):
    with torch.no_grad():
        for parameter in getattr(pipe, component).parameters():
            parameter.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=f"appeared in {stage}"):
        run(pipe, image, PROMPTS[0])


@pytest.mark.parametrize("component", ["unet", "vocoder"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_on_processors_with_amx_is_named_as_a_cause(pipe, component, dtype):
    getattr(pipe, component).to(dtype)
    with torch.no_grad():
        for parameter in getattr(pipe, component).parameters():
            parameter.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=str(dtype)) as error:
        run(pipe, None, PROMPTS[0])
    assert ("ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16" in str(error.value)) == (dtype == torch.bfloat16)


# ------------------------------------------------------------------------------------------- defaults of a checkpoint


def test_a_call_takes_the_defaults_that_its_checkpoint_stores(components, image, tmp_path):
    defaults = {"num_inference_steps": 3, "guidance_scale": 2.0, "image_guidance_scale": 4.0, "num_inversion_steps": 2}
    defaults["image_guidance_end"] = 0.7
    pipe = MelFusionPipeline(**components, **{f"default_{name}": value for name, value in defaults.items()})
    pipe.save_pretrained(tmp_path)
    loaded = MelFusionPipeline.from_pretrained(tmp_path)
    for one in (pipe, loaded, MelFusionPipeline.from_pipe(pipe)):
        one.set_progress_bar_config(disable=True)
        given = one(image, PROMPTS[0], generator=generator(), **defaults).audios
        assert np.array_equal(one(image, PROMPTS[0], generator=generator()).audios, given)
        assert len(one.encode_image(image).timesteps) == 2
        assert not np.array_equal(given, one(image, PROMPTS[0], generator=generator(), num_inversion_steps=1).audios)
    # Without a picture there is nothing that its guidance could follow.
    expected = pipe(prompt=PROMPTS[0], generator=generator(), num_inference_steps=3, guidance_scale=2.0).audios
    assert np.array_equal(pipe(prompt=PROMPTS[0], generator=generator()).audios, expected)


def test_a_checkpoint_of_before_loads_and_is_called_as_before(pipe, image, tmp_path):
    pipe.save_pretrained(tmp_path)
    # Both are loaded: weights that lie otherwise in memory give other last digits on some processors.
    new = MelFusionPipeline.from_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    stored = {name: index.pop(name) for name in list(index) if name.startswith("default_")}
    assert len(stored) == 6
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    old = MelFusionPipeline.from_pretrained(tmp_path)
    for one in (new, old):
        one.set_progress_bar_config(disable=True)
    before = {"num_inference_steps": 50, "num_inversion_steps": 10, "guidance_scale": 3.0}
    expected = new(image, PROMPTS[0], generator=generator(), **before).audios
    assert np.array_equal(old(image, PROMPTS[0], generator=generator()).audios, expected)


def test_what_the_synapse_was_trained_with_is_the_default(pipe, image):
    pipe.synapse.register_to_config(image_latents="inversion", num_inversion_steps=3, image_size=16)
    features = pipe.encode_image(image)
    assert len(features.timesteps) == 3 and features.image_size == 16
    assert len(pipe.encode_image(image, num_inversion_steps=2).timesteps) == 2


def test_the_picture_guides_up_to_its_end_and_stays_blended(pipe, image):
    def guided(**kwargs):
        return run(pipe, image, PROMPTS[0], num_inference_steps=4, image_guidance_scale=4.0, **kwargs)

    def one_branch_less(pipe, step, timestep, tensors):
        if step == 1:
            pipe._image_guidance_scale = None
            return {"prompt_embeds": tensors["prompt_embeds"][1:]}

    by_hand = {"callback_on_step_end": one_branch_less, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    assert_near(guided(image_guidance_end=0.5), guided(**by_hand))
    assert np.array_equal(guided(image_guidance_end=0.0), run(pipe, image, PROMPTS[0], num_inference_steps=4))
    assert np.array_equal(guided(image_guidance_end=1.0), guided())
    assert not np.array_equal(guided(image_guidance_end=0.5), guided())
    # Without guidance by the text one branch is left.
    assert np.isfinite(guided(image_guidance_end=0.5, guidance_scale=1.0)).all()


def test_branches_of_one_text_share_down_and_mid_blocks(pipe, image):
    """The result is that of three rows; a callback that puts other prompts in their place is given three rows."""
    rows = []

    def note(module, args):
        rows.append((module is pipe.unet.up_blocks[-1].resnets[-1], len(args[0])))

    hooks = [
        block.resnets[-1].register_forward_pre_hook(note)
        for block in (pipe.unet.down_blocks[0], pipe.unet.up_blocks[-1])
    ]
    kwargs = {"num_inference_steps": 2, "image_guidance_scale": 4.0, "num_waveforms_per_prompt": 2}
    shared = run(pipe, image, PROMPTS[0], **kwargs)
    assert rows == 2 * [(False, 4), (True, 6)]
    rows.clear()
    given = {
        "callback_on_step_end": lambda pipe, step, timestep, tensors: {
            "prompt_embeds": tensors["prompt_embeds"].clone()
        }
    }
    own = run(pipe, image, PROMPTS[0], **kwargs, **given, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert rows == [(False, 4), (True, 6), (False, 6), (True, 6)]
    assert_near(shared, own)
    for hook in hooks:
        hook.remove()


def test_at_one_the_picture_does_not_guide(pipe, image):
    assert np.array_equal(run(pipe, image, PROMPTS[0], image_guidance_scale=1.0), run(pipe, image, PROMPTS[0]))
    assert pipe.image_guidance_scale is None

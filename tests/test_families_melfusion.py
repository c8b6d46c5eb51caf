"""AudioLDM 2 and UNets with one text sequence in the pipeline."""

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from conftest import assert_near, audioldm2_oracle, generator, photograph
from copies import untrained_components
from diffusers.callbacks import SDCFGCutoffCallback
from test_blending import random_features, textbook, trained_synapse
from transformers import ClapModel, ClapTextModelWithProjection
from untrained import audioldm2_unet, text_unet

from melfusion_pipeline import MelFusionPipeline, blend_image
from melfusion_pipeline.families_melfusion import AudioLDM2Prompts

PROMPTS = ["a calm piano", "drum"]
FAST = {"num_inference_steps": 2, "num_inversion_steps": 2, "guidance_scale": 3.0}


def make(family: str, layers: str | None = None) -> tuple[MelFusionPipeline, dict]:
    components = untrained_components(family=family, layers=layers)
    pipe = MelFusionPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe, components


def run(pipe: MelFusionPipeline, *args, seed: int = 0, **kwargs) -> np.ndarray:
    return pipe(*args, generator=generator(seed), **{**FAST, **kwargs}).audios


def audioldm2(components: dict, **kwargs) -> np.ndarray:
    kwargs = {"num_inference_steps": 2, "guidance_scale": 3.0, "generator": generator(), **kwargs}
    return audioldm2_oracle(components)(**kwargs).audios


# ----------------------------------------------------------------------------------- it is text-to-music at alpha = 0


@pytest.mark.parametrize("case", ["no picture", "alpha 0", "synapse_scale 0", "all layers"])
@pytest.mark.parametrize("guidance_scale", [3.0, 1.0])
def test_without_the_pictures_influence_it_is_audioldm2_bit_for_bit(case, guidance_scale):
    pipe, components = make("audioldm2", "all" if case == "all layers" else None)
    kwargs = {"negative_prompt": ["noise", "hiss"], "num_waveforms_per_prompt": 2, "guidance_scale": guidance_scale}
    expected = audioldm2(components, prompt=PROMPTS, **kwargs)
    image = None if case == "no picture" else photograph()
    if case in ("alpha 0", "all layers"):
        components["synapse"].reset_parameters()
    if case == "synapse_scale 0":
        kwargs["synapse_scale"] = 0
    assert np.array_equal(run(pipe, image, PROMPTS, **kwargs), expected)


def test_without_a_negative_prompt_and_with_embeddings_it_is_audioldm2_too():
    pipe, components = make("audioldm2")
    for kwargs in ({"audio_length_in_s": 0.2}, {"eta": 0.7}, {"prompt": "a flute"}, {"prompt": PROMPTS}):
        kwargs = {"prompt": "a calm piano", **kwargs}
        expected = audioldm2(components, **kwargs)
        assert np.array_equal(run(pipe, **kwargs), expected)
    embeds, negatives = pipe.encode_prompt(PROMPTS, "hiss")
    assert np.array_equal(
        run(pipe, prompt_embeds=embeds, negative_prompt_embeds=negatives),
        run(pipe, None, PROMPTS, negative_prompt="hiss"),
    )
    # Texts for one of the two: what is given is padded with what is encoded.
    assert np.array_equal(
        run(pipe, prompt_embeds=embeds, negative_prompt="hiss"), run(pipe, None, PROMPTS, negative_prompt="hiss")
    )
    _, short = pipe.encode_prompt("a", "x")
    assert np.isfinite(run(pipe, None, PROMPTS, negative_prompt_embeds=short)).all()


def test_a_whole_clap_model_is_used_by_its_text_half():
    pipe, components = make("audioldm2")
    clap = components["text_encoder"]
    assert type(clap) is ClapModel and type(pipe.text_encoder) is ClapTextModelWithProjection
    assert pipe.text_encoder.text_model is clap.text_model and not pipe.text_encoder.training
    tokens = pipe.tokenizer("a calm piano", return_tensors="pt")
    expected = torch.nn.functional.normalize(pipe.text_encoder(**tokens).text_embeds, dim=-1)
    assert torch.equal(clap.get_text_features(**tokens).pooler_output, expected)


# ------------------------------------------------------------------------------------------------ it is the textbook's


@torch.no_grad()
@pytest.mark.parametrize(("family", "layers"), [("audioldm2", "self"), ("audioldm2", "all"), ("text", "text")])
def test_with_pictures_it_is_a_textbook_loop(family, layers):
    """Two pictures, two prompts of other lengths, two waveforms each: the loop that also judges `blend_image`."""
    pipe, components = make(family, layers)
    synapse = trained_synapse(pipe.unet, layers)
    pipe.register_modules(synapse=synapse)
    for name in ("unet", "synapse"):
        getattr(pipe, name).double()
    features = random_features(synapse, 2, torch.float64)
    prompt, negative = pipe.encode_prompt(PROMPTS, ["hiss", "noise"])
    text = {name: torch.cat([negative[name], prompt[name]]).repeat_interleave(2, dim=0) for name in prompt}
    assert any(not rows.all() for name, rows in text.items() if "mask" in name)
    latents = torch.randn(4, 4, 8, 2, dtype=torch.float64)
    arguments = {"prompt_embeds": prompt, "negative_prompt_embeds": negative, "latents": latents}
    found = run(
        pipe,
        image_features=features,
        num_waveforms_per_prompt=2,
        num_inference_steps=3,
        num_inversion_steps=3,
        output_type="latent",
        **arguments,
    )
    picture_of = [0, 0, 1, 1] * 2
    expected = textbook(pipe.unet, synapse, features, latents, text, picture_of, 3.0, pipe.scheduler)
    assert np.abs(found - expected.float().numpy()).max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("layers", ["self", "all"])
def test_the_plug_does_to_audioldm2_what_the_pipeline_does(layers):
    pipe, components = make("audioldm2", layers)
    features = pipe.encode_image([photograph(), photograph(1)], num_inversion_steps=2)
    expected = run(
        pipe, None, PROMPTS, image_features=features, num_waveforms_per_prompt=2, negative_prompt=["x", "hiss"]
    )
    with blend_image(pipe.unet, pipe.synapse, features, num_branches=2):
        found = audioldm2(components, prompt=PROMPTS, num_waveforms_per_prompt=2, negative_prompt=["x", "hiss"])
    assert np.array_equal(found, expected)
    plain = audioldm2(components, prompt=PROMPTS, num_waveforms_per_prompt=2, negative_prompt=["x", "hiss"])
    assert np.abs(plain - expected).max() > 1e-3 * np.abs(plain).max()


# ------------------------------------------------------------------------------------------------------- every family


@pytest.mark.parametrize("family", ["audioldm2", "text"])
def test_pictures_guidance_windows_and_storyboards_work_for_every_family(family):
    pipe, _ = make(family)
    pictures = [photograph(), photograph(1)]
    plain = run(pipe, None, PROMPTS)
    one, other = run(pipe, pictures[0], PROMPTS), run(pipe, pictures[1], PROMPTS)
    assert plain.shape == (2, 5120) and np.abs(one - other).max() > 1e-6 * np.abs(plain).max()
    both = run(pipe, pictures, PROMPTS)
    assert_near(both[:1], one[:1])
    assert_near(both[1:], other[1:])
    guided = run(pipe, pictures[0], PROMPTS, image_guidance_scale=4.0)
    assert np.abs(guided - one).max() > 1e-6 * np.abs(plain).max()
    story = {"image_start_in_s": [0, 0.5], "audio_length_in_s": 1.08}
    together = run(pipe, pictures, PROMPTS, **story)
    assert_near(together, run(pipe, pictures, PROMPTS, window_batch_size=1, **story))
    for prompts in ([PROMPTS[0], "a flute"], PROMPTS[0]):
        assert np.abs(run(pipe, pictures, prompts, **story) - together).max() > 1e-6 * np.abs(together).max()


@pytest.mark.parametrize("family", ["audioldm2", "text"])
def test_a_window_hears_its_pictures_prompts_by_their_shares(family):
    pipe, _ = make(family)
    windows = pipe._lay_out_windows(16, 0.32, 0.0, [0.0, 0.24, 0.48])
    prompts = pipe.prompts
    arguments = prompts.to_unet(
        pipe.encode_prompt(["a calm piano", "drum", "oboe"], do_classifier_free_guidance=False)[0]
    )
    seen = prompts.see(arguments, windows, range(2))
    (sequence, mask), *_ = prompts.masks.items()
    states, kept = arguments[sequence], arguments[mask]
    # Shares of the first window: 6 of 8 frames, then 2; of the second: 4, then 4.
    for window, weights in enumerate(([0.75, 0.25, 0.0], [0.0, 0.5, 0.5])):
        for token in range(states.shape[1]):
            valid = [share * float(kept[picture, token]) for picture, share in enumerate(weights)]
            assert seen[mask][window, token] == (sum(valid) > 0)
            if sum(valid):
                expected = sum(share * states[picture, token] for picture, share in enumerate(valid)) / sum(valid)
                assert_near(seen[sequence][window, token], expected)
    if family == "audioldm2":
        first = arguments["encoder_hidden_states"]
        assert_near(seen["encoder_hidden_states"][0], 0.75 * first[0] + 0.25 * first[1])


def test_a_prompt_of_one_text_does_not_depend_on_its_batch_mates():
    pipe, _ = make("text")
    image = photograph()
    together = run(pipe, image, PROMPTS, negative_prompt=["hiss", "a very long text of what not to play"])
    alone = pipe(
        image,
        PROMPTS[0],
        negative_prompt="hiss",
        generator=[generator()],
        latents=torch.randn(2, 4, 8, 2, generator=generator())[:1],
        **FAST,
    ).audios
    assert_near(together[:1], alone)


def test_a_callback_may_change_the_texts():
    pipe, _ = make("audioldm2")
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append({name: rows.shape[0] for name, rows in tensors["prompt_embeds"].items()})
        silence = {name: torch.zeros_like(rows) for name, rows in tensors["negative_prompt_embeds"].items()}
        return {"negative_prompt_embeds": silence}

    names = ["prompt_embeds", "negative_prompt_embeds"]
    changed = run(pipe, None, PROMPTS, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names)
    assert [set(rows.values()) for rows in seen] == [{4}, {4}] and len(seen[0]) == 3
    assert np.abs(changed - run(pipe, None, PROMPTS)).max() > 0


@pytest.mark.parametrize("family", ["audioldm2", "text"])
def test_the_callbacks_of_diffusers_take_rows_of_the_texts(family):
    pipe, _ = make(family)
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)

    def by_hand(pipe, step, timestep, tensors):
        pipe._guidance_scale = 0.0
        return {"prompt_embeds": {name: rows[-1:] for name, rows in tensors["prompt_embeds"].items()}}

    cut = run(pipe, None, PROMPTS[:1], callback_on_step_end=cutoff)
    expected = run(
        pipe, None, PROMPTS[:1], callback_on_step_end=by_hand, callback_on_step_end_tensor_inputs=["prompt_embeds"]
    )
    assert np.array_equal(cut, expected) and not np.array_equal(cut, run(pipe, None, PROMPTS[:1]))


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("family", ["audioldm2", "text"])
def test_embeddings_that_the_unet_cannot_take_are_refused_before_it_runs(family):
    pipe, _ = make(family)
    embeds, negatives = pipe.encode_prompt(PROMPTS, "hiss")
    pipe.unet.forward = None
    (sequence, mask), *_ = pipe.prompts.masks.items()
    changes = [
        (TypeError, "must be a dict of", lambda given: given[sequence]),
        (ValueError, "must hold", lambda given: {sequence: given[sequence]}),
        (TypeError, "must be a torch tensor", lambda given: {**given, sequence: [1.0]}),
        (
            ValueError,
            r"must have the shape \[prompts, tokens, 20\]",
            lambda given: {**given, sequence: given[sequence][0]},
        ),
        (ValueError, r"must have the shape", lambda given: {**given, sequence: given[sequence][..., 1:]}),
        (ValueError, "NaN", lambda given: {**given, sequence: given[sequence] * torch.nan}),
        (ValueError, "1 for tokens", lambda given: {**given, mask: given[mask][:, 1:]}),
        (ValueError, "1 for tokens", lambda given: {**given, mask: None}),
    ]
    for error, message, change in changes:
        with pytest.raises(error, match=f"`prompt_embeds.*{message}"):
            run(pipe, prompt_embeds=change(embeds), negative_prompt_embeds=negatives)
    with pytest.raises(ValueError, match="`prompt` or `prompt_embeds`, not both"):
        run(pipe, prompt="a", prompt_embeds=embeds)


def test_components_of_another_family_are_refused_by_name():
    both = {family: untrained_components(family=family) for family in ("audioldm", "audioldm2", "text")}
    clap, t5 = both["audioldm"]["text_encoder"], both["text"]["text_encoder"]
    extra = {
        name: both["audioldm2"][name] for name in AudioLDM2Prompts.components if name.endswith("2") or "model" in name
    }
    refused = [
        (
            "text_encoder_2, tokenizer_2, projection_model, language_model must be given beside text_encoder",
            {**both["audioldm"], "unet": audioldm2_unet(), "synapse": None},
        ),
        (
            "`unet` is that of a UNet with one text sequence and needs a T5EncoderModel as `text_encoder`",
            {**both["text"], "text_encoder": clap},
        ),
        (
            "`unet` is that of AudioLDM and needs a ClapTextModelWithProjection as `text_encoder`",
            {**both["audioldm"], "text_encoder": t5},
        ),
        ("`text_encoder_2` has no use where `unet` is that of AudioLDM", {**both["audioldm"], **extra}),
        (
            "`text_encoder_2` makes texts of 20 channels, but `unet` takes 24",
            {**both["audioldm2"], "unet": audioldm2_unet(cross_attention_dim=[[None, 12, 24]] * 4)},
        ),
        (
            "`text_encoder` makes texts of 20 channels, but `unet` takes 24 as `encoder_hidden_states`",
            {**both["text"], "unet": text_unet(cross_attention_dim=24)},
        ),
    ]
    for message, components in refused:
        pipe = MelFusionPipeline(**components)
        with pytest.raises(ValueError, match=message):
            run(pipe, None, "a calm piano")
    pipe = MelFusionPipeline(**{**both["audioldm2"], "synapse": both["audioldm"]["synapse"]})
    with pytest.raises(ValueError, match="`unet` does not fit `synapse`.*attends to encoder_hidden_states"):
        run(pipe, photograph(), "a calm piano")
    pipe = MelFusionPipeline(**{**both["audioldm"], "synapse": both["audioldm2"]["synapse"]})
    with pytest.raises(ValueError, match="`unet` does not fit `synapse`.*no such layer"):
        run(pipe, photograph(), "a calm piano")


def test_texts_without_encoders_are_refused_and_embeddings_do_without():
    pipe, components = make("audioldm2")
    embeds, negatives = pipe.encode_prompt(PROMPTS, "hiss")
    expected = run(pipe, prompt_embeds=embeds, negative_prompt_embeds=negatives)
    lean = MelFusionPipeline(**components | dict.fromkeys(AudioLDM2Prompts.components))
    assert np.array_equal(run(lean, prompt_embeds=embeds, negative_prompt_embeds=negatives), expected)
    with pytest.raises(ValueError, match="cannot be encoded without `text_encoder` and .*`language_model`"):
        run(lean, None, PROMPTS)
    pipe, _ = make("text")
    pipe.tokenizer.model_max_length = int(1e30)
    with pytest.raises(ValueError, match="`tokenizer.model_max_length` is 1e"):
        run(pipe, None, "a calm piano")


@pytest.mark.parametrize("family", ["audioldm2", "text"])
def test_components_of_different_dtypes_work_together(family):
    """As transformers and diffusers load a half-precision checkpoint without a dtype."""
    pipe, _ = make(family)
    for name, component in pipe.components.items():
        if type(component).__module__.startswith("transformers") and isinstance(component, torch.nn.Module):
            component.to(torch.bfloat16)
    assert np.isfinite(run(pipe, photograph(), PROMPTS)).all()


# --------------------------------------------------------------------------- what diffusers' own test battery looks at


@pytest.mark.parametrize("family", ["audioldm2", "text"])
def test_offloading_and_slicing_do_not_change_the_result(family):
    pipe, _ = make(family)
    image = photograph()
    expected = run(pipe, image, PROMPTS[0])
    pipe.enable_model_cpu_offload(device="cpu")
    assert_near(run(pipe, image, PROMPTS[0]), expected)
    assert all(hasattr(getattr(pipe, name), "_hf_hook") for name in pipe.prompts.components if "tokenizer" not in name)
    pipe.remove_all_hooks()
    pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    assert_near(run(pipe, image, PROMPTS[0]), expected)

    pipe, _ = make(family)
    pipe.enable_attention_slicing(1)
    pipe.vae.enable_slicing()
    assert_near(run(pipe, image, PROMPTS[0]), expected)


@pytest.mark.parametrize("family", ["audioldm2", "text"])
def test_sequential_offload_finds_every_weight_where_it_is_used(family):
    """accelerate keeps weights on the meta device outside of their module's forward: reading one elsewhere fails."""
    pipe, _ = make(family)
    expected = run(pipe, photograph(), PROMPTS[0])
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            cpu_offload(component, torch.device("cpu"), offload_buffers=len(component._parameters) > 0)
    assert pipe.unet.conv_in.weight.device.type == pipe.synapse.alphas.device.type == "meta"
    assert_near(run(pipe, photograph(), PROMPTS[0]), expected)


@pytest.mark.parametrize("family", ["audioldm2", "text"])
def test_prompts_of_one_length_do_not_depend_on_their_batch_mates(family):
    """Of other lengths they do with AudioLDM 2, as in diffusers: GPT-2 counts the padding."""
    pipe, _ = make(family)
    pictures, prompts = [photograph(seed) for seed in range(3)], ["drums", "flute", "oboes"]
    together = pipe(pictures, prompts, generator=[generator(seed) for seed in range(3)], **FAST).audios
    for index in range(3):
        alone = pipe(pictures[index], prompts[index], generator=generator(index), **FAST).audios
        assert_near(together[index], alone[0])


@pytest.mark.parametrize("family", ["audioldm2", "text"])
def test_half_precision_runs_close_to_full(family):
    pipe, _ = make(family)
    expected = run(pipe, photograph(), PROMPTS[0], output_type="latent")
    latents = run(pipe.to(torch.bfloat16), photograph(), PROMPTS[0], output_type="latent")
    assert np.abs(latents - expected).max() < 0.1 * np.abs(expected).max()


def test_guidance_may_change_in_a_callback():
    pipe, _ = make("audioldm2")

    def stronger(pipe, step, timestep, tensors):
        pipe._guidance_scale += 4.0
        return tensors

    changed = run(pipe, None, PROMPTS, callback_on_step_end=stronger)
    assert pipe.guidance_scale == 11.0 and np.abs(changed - run(pipe, None, PROMPTS)).max() > 0

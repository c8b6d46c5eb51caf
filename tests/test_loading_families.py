"""The ways of loading, as `test_loading_melfusion` shows them for AudioLDM, for the other families of music models."""

import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import assert_near, photograph
from copies import untrained_components
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from safetensors.torch import load_file
from test_loading_melfusion import (
    CODE,
    assert_equal_weights,
    booby_trap,
    load_and_save_as_a_stranger,
    pickle_weights,
    play,
    warnings_logged,  # noqa: F401 - a fixture
)
from transformers import ClapTextModelWithProjection, GPT2LMHeadModel, GPT2Model
from untrained import music_unet

from melfusion_pipeline import MelFusionPipeline, VisualSynapse
from melfusion_pipeline.families_melfusion import AudioLDM2Prompts

FAMILIES = ["audioldm2", "text"]


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def pipe(family) -> MelFusionPipeline:
    return MelFusionPipeline(**untrained_components(family=family))


@pytest.fixture
def checkpoint(pipe, tmp_path) -> Path:
    pipe.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_folders_and_repositories_load_in_every_way_that_needs_the_package(pipe, family, checkpoint, hub, monkeypatch):
    expected = play(pipe)
    index = json.loads((checkpoint / "model_index.json").read_text())
    assert ("language_model" in index) == (family == "audioldm2")
    assert [None, None] not in index.values()
    hub.add_repo("tester/safe", checkpoint)
    for source in (checkpoint, "tester/safe"):
        with pytest.raises(ValueError, match="trust_remote_code"):
            DiffusionPipeline.from_pretrained(source)
    assert_near(play(DiffusionPipeline.from_pretrained("tester/safe", trust_remote_code=True)), expected)
    pipe.save_pretrained(checkpoint, variant="fp16")
    booby_trap(checkpoint)
    hub.add_repo("tester/music", checkpoint)
    scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    for source in (checkpoint, "tester/music"):
        loaded = MelFusionPipeline.from_pretrained(source)
        assert_near(play(loaded), expected)
        assert_equal_weights(pipe.synapse, VisualSynapse.from_pretrained(source, subfolder="synapse"))
        half = MelFusionPipeline.from_pretrained(source, variant="fp16", torch_dtype=torch.bfloat16)
        assert half.text_encoder.dtype == half.unet.dtype == half.synapse.dtype == torch.bfloat16
        passed = MelFusionPipeline.from_pretrained(source, scheduler=scheduler, image_unet=None)
        assert passed.scheduler is scheduler and passed.image_unet is None
    with monkeypatch.context() as offline:
        offline.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert_near(play(MelFusionPipeline.from_pretrained("tester/music")), expected)
    loaded.synapse.alphas.data.add_(0.5)
    loaded.save_pretrained(checkpoint)
    assert_equal_weights(loaded.synapse, MelFusionPipeline.from_pretrained(checkpoint).synapse)
    loaded.push_to_hub("tester/music")
    assert CODE <= hub.files("tester/music").keys()
    assert_equal_weights(loaded.synapse, MelFusionPipeline.from_pretrained("tester/music").synapse)


@pytest.mark.parametrize("family", ["audioldm2"], indirect=True)
def test_a_stranger_who_trusts_the_code_needs_no_package(pipe, checkpoint, hub, tmp_path):
    pipe.save_pretrained(checkpoint, variant="fp16")
    hub.add_repo("tester/music", checkpoint)
    np.save(tmp_path / "expected.npy", play(pipe))
    photograph().save(tmp_path / "picture.png")
    load_and_save_as_a_stranger(tmp_path, "tester/music", "tester/again")
    assert CODE <= hub.files("tester/again").keys()


def test_from_pipe_and_components_keep_everything(pipe, family):
    expected = play(pipe)
    names = {name for name, component in pipe.components.items() if component is not None}
    assert names == set(untrained_components(family=family))
    for again in (MelFusionPipeline.from_pipe(pipe), MelFusionPipeline(**pipe.components)):
        assert all(getattr(again, name) is getattr(pipe, name) for name in names)
        assert np.array_equal(play(again), expected)


# ------------------------------------------------------------ composing


@pytest.fixture
def base_models(family, tmp_path) -> tuple[dict, Path, Path]:
    """A text-to-image and a text-to-music checkpoint, laid out as the public ones."""
    components = untrained_components(family=family)
    image_model, music_model = tmp_path / "image-model", tmp_path / "music-model"
    for name, component in components.items():
        if name.startswith("image_"):
            component.save_pretrained(image_model / name.removeprefix("image_"))
        elif name != "synapse":
            component.save_pretrained(music_model / name)
    if family == "audioldm2":
        # As the public checkpoints name it; the other class would generate, this one cannot.
        language_model = GPT2Model(components["language_model"].config)
        language_model.load_state_dict(components["language_model"].transformer.state_dict())
        language_model.save_pretrained(music_model / "language_model")
    return components, image_model, music_model


def test_base_models_compose_from_folders_and_from_the_hub(base_models, family, hub, warnings_logged):  # noqa: F811
    components, image_model, music_model = base_models
    expected = play(MelFusionPipeline(**components))
    for name in {"unet", "text_encoder_2"} & components.keys():
        pickle_weights(music_model / name)
    hub.add_repo("tester/image", image_model)
    hub.add_repo("tester/music", music_model)
    for sources in ((image_model, music_model), ("tester/image", "tester/music")):
        pipe = MelFusionPipeline.from_base_models(*sources, synapse=components["synapse"])
        assert type(pipe.unet) is type(components["unet"]) and not pipe.unet.training
        assert_near(play(pipe), expected)
        assert "unet/diffusion_pytorch_model.bin" in warnings_logged.text
    if family == "audioldm2":
        assert type(pipe.language_model) is GPT2LMHeadModel
        assert type(pipe.text_encoder) is ClapTextModelWithProjection
    half = MelFusionPipeline.from_base_models(image_model, music_model, torch_dtype=torch.bfloat16)
    assert {model.dtype for model in half.components.values() if isinstance(model, torch.nn.Module)} == {
        torch.bfloat16
    }
    assert not half.synapse.alphas.any() and half.synapse.music_texts == components["synapse"].music_texts
    assert np.isfinite(play(half)).all()


def spoil_weights(folder: Path) -> None:
    """What reads them fails by another message than the one that is expected."""
    for file in folder.rglob("*.safetensors"):
        file.write_bytes(b"no weights")


@pytest.mark.parametrize("family", ["audioldm2"], indirect=True)
def test_what_does_not_belong_together_is_refused_before_weights_are_read(base_models, tmp_path):
    components, image_model, music_model = base_models
    others = {family: untrained_components(family=family) for family in ("audioldm", "text")}
    for family, parts in others.items():
        parts["synapse"].save_pretrained(tmp_path / family)
    spoil_weights(tmp_path)
    for family, message in (
        ("audioldm", "to attend to the music: in `unet`"),
        ("text", "`unet` does not fit `synapse`"),
    ):
        for synapse in (tmp_path / family, others[family]["synapse"]):
            with pytest.raises(ValueError, match=message):
                MelFusionPipeline.from_base_models(image_model, music_model, synapse=synapse)
    others["text"]["text_encoder"].save_pretrained(music_model / "text_encoder")
    spoil_weights(tmp_path)
    with pytest.raises(
        ValueError, match="text_encoder is of the kind 't5', but the UNet .* AudioLDM 2, which needs a Clap"
    ):
        MelFusionPipeline.from_base_models(image_model, music_model)
    others["audioldm"]["text_encoder"].save_pretrained(music_model / "text_encoder")
    for file in (music_model / "language_model").iterdir():
        file.unlink()
    spoil_weights(tmp_path)
    with pytest.raises(FileNotFoundError, match="language_model/config.json is missing"):
        MelFusionPipeline.from_base_models(image_model, music_model)


@pytest.mark.parametrize("family", ["audioldm2"], indirect=True)
def test_a_checkpoint_of_a_wrong_mixture_is_refused_by_name(pipe, checkpoint):
    """AudioLDM's UNet in AudioLDM 2's checkpoint; and a checkpoint of which a part is left out."""
    with pytest.raises(ValueError, match="`text_encoder_2` has no use where `unet` is that of AudioLDM"):
        MelFusionPipeline.from_pretrained(checkpoint, unet=music_unet())
    with pytest.raises(
        ValueError, match="language_model must be given beside text_encoder, tokenizer, text_encoder_2"
    ):
        MelFusionPipeline.from_pretrained(checkpoint, language_model=None)
    lean = MelFusionPipeline.from_pretrained(checkpoint, **dict.fromkeys(AudioLDM2Prompts.components))
    assert lean.language_model is None
    (file,) = (checkpoint / "language_model").glob("*.safetensors")
    assert "lm_head.weight" not in load_file(file)


@pytest.mark.parametrize("family", ["audioldm2"], indirect=True)
def test_the_music_side_of_a_checkpoint_is_audioldm2s(pipe, checkpoint):
    """The folders are those that diffusers' own pipeline reads, but for the half of CLAP that only ranks waveforms."""
    for name in ("unet", "vae", "text_encoder_2", "projection_model", "language_model"):
        component = getattr(pipe, name)
        loaded = type(component).from_pretrained(checkpoint / name)
        assert_equal_weights(component, loaded)
    assert json.loads((checkpoint / "model_index.json").read_text())["unet"] == ["audioldm2", type(pipe.unet).__name__]

"""Training with AudioLDM 2 and with a UNet of one text: what differs from AudioLDM's, which `test_training` shows."""

import pytest
import torch
from conftest import assert_near
from copies import untrained_components
from test_train_melfusion import play, train, workspace  # noqa: F401 - a fixture
from test_training import make_batch, make_objective, rows

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.caches import PromptCache
from melfusion_pipeline.training import enable_gradient_checkpointing

# Other lengths, so that there is padding.
CAPTIONS = ["drum", "a calm piano"]


def make(family: str, layers: str | None = None) -> MelFusionPipeline:
    components = untrained_components(mel_bands=64, latent_frames=16, family=family, layers=layers)
    pipe = MelFusionPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def batch(tmp_path) -> dict:
    return make_batch(tmp_path, 2) | {"captions": CAPTIONS}


@pytest.mark.parametrize(
    ("family", "layers", "trainable"),
    [("audioldm2", None, "synapse"), ("audioldm2", "all", "unet"), ("text", None, "synapse")],
)
def test_gradients_reach_exactly_what_is_trained_and_the_rest_stays_bitwise(batch, family, layers, trainable):
    pipe = make(family, layers)
    objective = make_objective(pipe, trainable=trainable)
    models = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    before = {
        name: {key: value.clone() for key, value in model.state_dict().items()} for name, model in models.items()
    }
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    with objective.attached():
        for step in range(3):
            optimizer.zero_grad()
            objective(batch, step).backward()
            optimizer.step()
    trained = {"synapse"} | ({"unet"} if trainable == "unet" else set())
    assert pipe.synapse.alphas.grad.all()
    for name, model in models.items():
        assert all((parameter.grad is None) == (name not in trained) for parameter in model.parameters())
        changed = [not torch.equal(value, before[name][key]) for key, value in model.state_dict().items()]
        assert (sum(changed) > 0.7 * len(changed)) if name in trained else not any(changed)


@pytest.mark.parametrize("family", ["audioldm2", "text"])
def test_a_rows_loss_does_not_depend_on_its_batch_mates(batch, family):
    objective = make_objective(make(family), text_dropout=0.5, image_dropout=0.5)
    with torch.no_grad(), objective.attached():
        for step in range(4):
            together = objective.per_sample_loss(batch, step)
            for index in range(2):
                alone = objective.per_sample_loss(rows(batch, slice(index, index + 1)), step)
                assert_near(alone, together[index : index + 1])


@pytest.mark.parametrize("family", ["audioldm", "audioldm2", "text"])
def test_captions_are_encoded_once_each_as_a_call_would(family):
    """Kept: as a call with this prompt. Dropped: as the negative prompt of that call."""
    pipe = make(family)
    cache, encoded = PromptCache(pipe), []
    pipe.text_encoder.register_forward_hook(lambda *_: encoded.append(1))
    keeps = torch.tensor([True, False, False, True])
    found = cache.read([*CAPTIONS, *CAPTIONS], keeps)
    calls = len(encoded)
    assert cache.read([*CAPTIONS, *CAPTIONS], keeps)[next(iter(found))].shape[0] == 4
    assert len(encoded) == calls <= 5
    for row, (caption, keep) in enumerate(zip([*CAPTIONS, *CAPTIONS], keeps)):
        prompt, negative = pipe.encode_prompt(caption, None)
        expected = pipe.prompts.to_unet(prompt if keep else negative)
        for name, rows_of_name in found.items():
            length = expected[name].shape[1]
            assert_near(rows_of_name[row, :length].float(), expected[name][0].float())
            assert not rows_of_name[row, length:].any(), "padding is zero, and so is its mask"
    if family == "audioldm2":
        assert found["encoder_attention_mask_1"].sum(dim=1).tolist() == [6, 1, 1, 14]


def test_gradient_checkpointing_is_refused_where_the_library_would_fail(batch):
    pipe = make("audioldm2")
    with pytest.raises(ValueError, match="Gradient checkpointing cannot be used with AudioLDM 2"):
        enable_gradient_checkpointing(pipe)
    # Where this no longer fails, diffusers is repaired, and the refusal has to go.
    pipe.unet.enable_gradient_checkpointing()
    objective = make_objective(pipe, trainable="unet")
    with objective.attached(), pytest.raises(RuntimeError, match="must match the size"):
        objective(batch, 0)
    pipe = make("text")
    enable_gradient_checkpointing(pipe)
    assert pipe.unet.is_gradient_checkpointing


def test_the_script_trains_audioldm2_from_base_models(workspace, tmp_path):  # noqa: F811
    components = untrained_components(mel_bands=64, latent_frames=16, family="audioldm2")
    for name, component in components.items():
        side = "image" if name.startswith("image_") else "music"
        if name != "synapse":
            component.save_pretrained(tmp_path / side / name.removeprefix("image_"))
    flags = {"pretrained_image_model": tmp_path / "image", "pretrained_music_model": tmp_path / "music"}
    flags["pretrained_model_name_or_path"] = ""
    assert len(train(workspace, tmp_path / "trained", max_train_steps=3, **flags)) == 3
    trained = MelFusionPipeline.from_pretrained(tmp_path / "trained")
    assert trained.synapse.alphas.abs().min() > 0 and trained.synapse.config.image_size == 32
    assert trained.synapse.music_texts == [None] * 6 and abs(play(trained)).max() > 1e-3
    with pytest.raises(ValueError, match="cannot be used with AudioLDM 2"):
        train(workspace, tmp_path / "other", gradient_checkpointing=True, **flags)

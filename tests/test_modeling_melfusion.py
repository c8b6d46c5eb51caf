import json
from pathlib import Path

import diffusers
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_near
from diffusers import ModelMixin
from untrained import audioldm2_unet, music_unet, picture_unet, text_unet

from melfusion_pipeline import VisualSynapse
from melfusion_pipeline.modeling_melfusion import _pooling_matrix_as

BASE_MODELS = json.loads((Path(__file__).parents[1] / "benchmarks" / "base_models.json").read_text())


def full_size_unet(side: str, name: str) -> ModelMixin:
    description = BASE_MODELS[side][name]["unet"]
    with torch.device("meta"):
        return getattr(diffusers, description["class"])(**description["config"])


@pytest.mark.parametrize(
    ("image_model", "music_model", "parameters"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "cvssp/audioldm-s-full-v2", 6_881_289),
        ("stabilityai/stable-diffusion-2-1", "cvssp/audioldm-m-full", 10_321_929),
        ("stabilityai/stable-diffusion-2-1", "cvssp/audioldm-l-full", 13_762_569),
        ("stabilityai/stable-diffusion-2-1", "ucsd-reach/musicldm", 6_881_289),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "audioldm-48k", 6_881_289),
    ],
)
def test_public_base_models_match_layer_by_layer(image_model: str, music_model: str, parameters: int):
    image_unet, unet = full_size_unet("text_to_image", image_model), full_size_unet("text_to_music", music_model)
    with torch.device("meta"):
        synapse = VisualSynapse.from_unets(image_unet, unet)
    config = synapse.config
    assert config.image_widths == [1280] * 3 + [640] * 3 + [320] * 3
    assert config.music_widths == [width for width in unet.config.block_out_channels[:0:-1] for _ in range(3)]
    assert config.image_layers[0] == "up_blocks.1.attentions.0.transformer_blocks.0.attn1"
    assert config.music_layers[8] == "up_blocks.2.attentions.2.transformer_blocks.0.attn2"
    assert synapse.num_tokens(256, 16) == [64] * 3 + [256] * 3 + [1024] * 3
    assert sum(parameter.numel() for parameter in synapse.parameters()) == parameters


@pytest.mark.parametrize(
    ("music_model", "unet_parameters", "parameters"),
    [
        ("cvssp/audioldm2", 346_943_496, 6_881_289),
        ("cvssp/audioldm2-large", 761_296_904, 10_321_929),
        ("declare-lab/tango", 865_933_768, 12_902_409),
    ],
)
def test_public_models_with_text_sequences_match_layer_by_layer(
    music_model: str, unet_parameters: int, parameters: int
):
    image_unet = full_size_unet("text_to_image", "stable-diffusion-v1-5/stable-diffusion-v1-5")
    unet = full_size_unet("text_to_music", music_model)
    assert unet.num_parameters() == unet_parameters
    with torch.device("meta"):
        synapse = VisualSynapse.from_unets(image_unet, unet)
        both = VisualSynapse.from_unets(image_unet, unet, layers="all")
    assert synapse.config.image_widths == [1280] * 3 + [640] * 3 + [320] * 3
    assert sum(parameter.numel() for parameter in synapse.parameters()) == parameters
    transformers = [int(layer.split(".")[3]) for layer in synapse.config.music_layers]
    if music_model == "declare-lab/tango":
        assert transformers == [0, 1, 2] * 3 and synapse.music_texts == ["encoder_hidden_states"] * 9
        assert synapse.num_tokens(256, 16, {"encoder_hidden_states": 77}) == [77] * 9
        assert both.config.music_layers == synapse.config.music_layers
        return
    assert transformers == [0, 3, 6] * 3 and synapse.music_texts == [None] * 9
    assert synapse.num_tokens(256, 16) == [64] * 3 + [256] * 3 + [1024] * 3
    assert both.music_texts == [None, "encoder_hidden_states", "encoder_hidden_states_1"] * 9
    lengths = {"encoder_hidden_states": 8, "encoder_hidden_states_1": 13}
    assert both.num_tokens(256, 16, lengths)[:4] == [64, 8, 13, 64]


def test_the_layers_that_blend_are_chosen_by_their_text():
    image_unet, unet = picture_unet(), audioldm2_unet()
    own = VisualSynapse.from_unets(image_unet, unet)
    assert [int(layer.split(".")[3]) for layer in own.config.music_layers] == [0, 3] * 3
    text = VisualSynapse.from_unets(image_unet, unet, layers="text")
    assert [int(layer.split(".")[3]) for layer in text.config.music_layers] == [1, 2, 4, 5] * 3
    assert text.music_texts == ["encoder_hidden_states", "encoder_hidden_states_1"] * 6
    for layers in (None, "self", "all"):
        assert VisualSynapse.from_unets(image_unet, music_unet(), layers=layers).music_texts == [None] * 6
    assert VisualSynapse.from_unets(image_unet, text_unet()).music_texts == ["encoder_hidden_states"] * 6
    with pytest.raises(ValueError, match=r"(?s)`image_unet` has 6.*`unet` has 0 .*layers='self' of 6"):
        VisualSynapse.from_unets(image_unet, text_unet(), layers="self")
    with pytest.raises(ValueError, match=r"(?s)`unet` has 0 .*layers='text' of 6"):
        VisualSynapse.from_unets(image_unet, music_unet(), layers="text")
    with pytest.raises(ValueError, match="`layers` must be 'self', 'text', 'all' or None, got 'none'"):
        VisualSynapse.from_unets(image_unet, unet, layers="none")
    with pytest.raises(ValueError, match="attend to `encoder_hidden_states`: give its length"):
        text.num_tokens(8, 4)


@pytest.mark.parametrize("unet", [audioldm2_unet, text_unet])
def test_what_a_layer_attends_to_is_what_it_is_given(unet):
    """The UNet runs once; every layer is told apart by the width of what reaches its keys."""
    torch.manual_seed(0)
    unet = unet().eval()
    synapse = VisualSynapse.from_unets(picture_unet(), unet, layers="all")
    lengths = {"encoder_hidden_states": 8, "encoder_hidden_states_1": 13}
    widths = {"encoder_hidden_states": 12, "encoder_hidden_states_1": 20}
    if unet.config.cross_attention_dim == 20:
        lengths, widths = {"encoder_hidden_states": 9}, {"encoder_hidden_states": 20}
    seen = []
    for layer in synapse.config.music_layers:
        key = unet.get_submodule(f"{layer}.to_k")
        key.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape[1:])))
    with torch.no_grad():
        unet(torch.randn(1, 4, 8, 4), 7, **{name: torch.randn(1, lengths[name], widths[name]) for name in lengths})
    assert [tokens for tokens, _ in seen] == synapse.num_tokens(8, 4, lengths)
    expected = [widths.get(text, width) for text, width in zip(synapse.music_texts, synapse.config.music_widths)]
    assert [width for _, width in seen] == expected


def test_a_config_from_before_there_was_a_choice_loads(tmp_path: Path):
    synapse = VisualSynapse.from_unets(picture_unet(), music_unet())
    synapse.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("music_texts") == [None] * 6
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = VisualSynapse.from_pretrained(tmp_path)
    assert loaded.music_texts == [None] * 6 and loaded.num_tokens(8, 4) == synapse.num_tokens(8, 4)
    loaded.check_unets(picture_unet(), music_unet())


def test_unequal_decoders_meet_by_relative_depth():
    image_unet = picture_unet(
        up_block_types=("UpBlock2D", "UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D", "DownBlock2D"),
        layers_per_block=2,
    )
    synapse = VisualSynapse.from_unets(image_unet, music_unet())
    assert [layer.split(".")[3] for layer in synapse.config.image_layers] == ["0", "0", "1", "1", "2", "2"]
    assert len(set(synapse.config.image_layers)) == 3 and synapse.alphas.shape == (6,)

    unet = music_unet(
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
    )
    every = VisualSynapse.from_unets(picture_unet(), music_unet()).config.image_layers
    assert VisualSynapse.from_unets(picture_unet(), unet).config.image_layers == [every[1], every[4]]


def test_a_decoder_without_attention_is_refused_by_name():
    plain = {"up_block_types": ("UpBlock2D",) * 4, "down_block_types": ("DownBlock2D",) * 4}
    with pytest.raises(ValueError, match="(?s)image_unet.*unet"):
        VisualSynapse.from_unets(picture_unet(**plain), music_unet())
    with pytest.raises(ValueError, match="(?s)image_unet.*unet"):
        VisualSynapse.from_unets(picture_unet(), music_unet(**plain))


@pytest.mark.parametrize("sides", [(8, 4), (7, 4), (2, 3), (5, 3)])
def test_num_tokens_is_what_the_unet_really_has(sides: tuple[int, int]):
    unet = music_unet().eval()
    synapse = VisualSynapse.from_unets(picture_unet(), unet)
    lengths = []
    for layer in synapse.config.music_layers:
        unet.get_submodule(f"{layer}.to_k").register_forward_hook(lambda _, __, out: lengths.append(out.shape[1]))
    with torch.no_grad():
        unet(torch.randn(1, 4, *sides), 7, None, class_labels=torch.randn(1, 32))
    assert synapse.num_tokens(*sides) == lengths


def features(synapse: VisualSynapse, tokens: int = 33) -> tuple[dict, dict]:
    layers = dict(zip(synapse.config.image_layers, synapse.config.image_widths))
    return tuple({name: torch.randn(3, 2, tokens, width) for name, width in layers.items()} for _ in range(2))


def test_an_untrained_synapse_equals_average_pooling():
    torch.manual_seed(0)
    image_unet, unet = picture_unet(), music_unet()
    linear = VisualSynapse.from_unets(image_unet, unet)
    pool = VisualSynapse.from_unets(image_unet, unet, projection="pool")
    assert [name for name, _ in pool.named_parameters()] == ["alphas"]
    assert not linear.alphas.any() and not pool.alphas.any()
    keys, values = features(linear)
    num_tokens = linear.num_tokens(8, 4)
    for by_linear, by_pool in zip(linear(keys, values, num_tokens)[:2], pool(keys, values, num_tokens)[:2]):
        for tokens, (layer, fitted) in zip(num_tokens, by_linear.items()):
            assert_near(fitted, by_pool[layer])
            assert fitted.shape == (3, 2, tokens, unet.get_submodule(layer).to_k.out_features)
    source = keys[linear.config.image_layers[0]]
    direct = F.adaptive_avg_pool2d(source, (num_tokens[0], linear.config.music_widths[0]))
    before = _pooling_matrix_as.cache_info()
    assert_near(pool(keys, values, num_tokens)[0][linear.config.music_layers[0]], direct)
    after = _pooling_matrix_as.cache_info()
    assert after.misses == before.misses and after.hits >= before.hits + 2 * len(num_tokens)


def test_scale_multiplies_every_alpha_or_one_each():
    synapse = VisualSynapse.from_unets(picture_unet(), music_unet())
    with torch.no_grad():
        synapse.alphas.copy_(torch.arange(6.0))
    keys, values = features(synapse)
    alphas = synapse(keys, values, synapse.num_tokens(8, 4), 0.5)[2]
    assert torch.equal(alphas, torch.arange(6.0) / 2)
    alphas = synapse(keys, values, synapse.num_tokens(8, 4), [2.0, 0, 0, 0, 0, 1])[2]
    assert alphas.tolist() == [0, 0, 0, 0, 0, 5]


@pytest.mark.parametrize("projection", ["linear", "pool"])
def test_the_synapse_saves_and_loads_alone(tmp_path: Path, projection: str):
    torch.manual_seed(0)
    synapse = VisualSynapse.from_unets(picture_unet(), music_unet(), projection)
    with torch.no_grad():
        for parameter in synapse.parameters():
            parameter.normal_()
    synapse.register_to_config(image_latents="inversion", num_inversion_steps=10, image_size=32)
    synapse.save_pretrained(tmp_path)
    loaded = VisualSynapse.from_pretrained(tmp_path)
    assert loaded.config.music_layers == synapse.config.music_layers and loaded.config.num_inversion_steps == 10
    for name, parameter in synapse.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], parameter)
    half = VisualSynapse.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert half.dtype == torch.float16


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="`projection` must be 'linear' or 'pool', got 'conv'"):
        VisualSynapse.from_unets(picture_unet(), music_unet(), projection="conv")
    with pytest.raises(ValueError, match="one length above zero"):
        VisualSynapse(["a"], [4], ["b", "c"], [4, 4], [0, 0])


def test_other_unets_are_refused_with_the_layer_that_differs():
    synapse = VisualSynapse.from_unets(picture_unet(), music_unet())
    synapse.check_unets(picture_unet(), music_unet())
    wider = picture_unet(block_out_channels=(8, 16, 32, 32))
    with pytest.raises(ValueError, match="`image_unet` does not fit.*32 channels there"):
        synapse.check_unets(wider, None)
    with pytest.raises(ValueError, match="`unet` does not fit.*no such layer"):
        synapse.check_unets(None, picture_unet())
    with pytest.raises(ValueError, match=r"attentions.1.*to attend to the music: in `unet`, a AudioLDM2UNet"):
        synapse.check_unets(None, audioldm2_unet())
    with pytest.raises(ValueError, match="`unet` does not fit.*no such layer"):
        VisualSynapse.from_unets(picture_unet(), audioldm2_unet()).check_unets(None, music_unet())
    keys, _ = features(synapse)
    synapse.check_image_features(keys)
    with pytest.raises(ValueError, match="`image_features` does not fit"):
        synapse.check_image_features({layer: key[..., 1:] for layer, key in keys.items()})

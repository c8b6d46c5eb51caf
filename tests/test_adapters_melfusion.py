"""LoRA adapters of the music UNet: installed, saved, loaded, chosen, fused, removed; alone or beside a synapse."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import generator, photograph
from copies import untrained_components
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig, get_peft_model_state_dict
from processes import forget_the_package, start
from safetensors.torch import load_file, save_file
from untrained import FAMILIES, music_unet

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.adapters_melfusion import LORA_TARGETS, add_lora, lora_layers

FILE = "pytorch_lora_weights.safetensors"


def play(pipe: DiffusionPipeline, **kwargs) -> torch.Tensor:
    """Latents of a picture and a prompt, where a difference of weights is a difference of music."""
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "num_inversion_steps": 2, "output_type": "latent", "generator": generator()}
    return pipe(photograph(), "a calm piano", **call, **kwargs).audios


def assert_same(latents: torch.Tensor, expected: torch.Tensor) -> None:
    """Not bit for bit: kernels round otherwise where a tensor lies otherwise in memory."""
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def train_lora(unet: torch.nn.Module, adapter_name: str = "default", rank: int = 2, seed: int = 0) -> None:
    """Installs an adapter that does something, as if it were trained."""
    add_lora(unet, rank, 2.0 * rank, seed=seed, adapter_name=adapter_name)
    torch.manual_seed(seed)
    for layer in lora_layers(unet):
        torch.nn.init.normal_(layer.lora_B[adapter_name].weight, std=0.5)


def make_pipe(family: str = "audioldm") -> MelFusionPipeline:
    return MelFusionPipeline(**untrained_components(family=family))


@pytest.fixture
def lora(tmp_path) -> Path:
    """A folder with an adapter of the tests' music UNet, and its tensors."""
    pipe = make_pipe()
    train_lora(pipe.unet)
    pipe.save_lora_weights(tmp_path / "lora", pipe.unet)
    return tmp_path / "lora"


# ------------------------------------------------------------ what an adapter does


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_loaded_fused_and_unfused_sounds_the_same_and_unloaded_as_before(family, tmp_path):
    plain = play(make_pipe(family))
    pipe = make_pipe(family)
    add_lora(pipe.unet, 2)
    assert_same(play(pipe), plain)
    pipe.unload_lora_weights()
    train_lora(pipe.unet)
    adapted = play(pipe)
    assert (adapted - plain).abs().mean() > 0.05 * plain.abs().mean()
    pipe.save_lora_weights(tmp_path, pipe.unet)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]

    loaded = make_pipe(family)
    loaded.load_lora_weights(tmp_path)
    assert_same(play(loaded), adapted)
    loaded.fuse_lora()
    assert loaded.fused_loras == {"default_0"} and loaded.num_fused_loras == 1
    assert_same(play(loaded), adapted)
    loaded.unfuse_lora()
    assert loaded.num_fused_loras == 0
    assert_same(play(loaded), adapted)
    loaded.disable_lora()
    assert_same(play(loaded), plain)
    loaded.enable_lora()
    loaded.fuse_lora()
    loaded.unload_lora_weights()
    assert not lora_layers(loaded.unet) and loaded.get_list_adapters() == {}
    assert_same(play(loaded), adapted)
    pipe.unload_lora_weights()
    assert_same(play(pipe), plain)


def test_other_layers_can_be_targets(tmp_path):
    pipe = make_pipe()
    add_lora(pipe.unet, 2, targets=[*LORA_TARGETS, "conv_out", "ff.net.0.proj"])
    torch.manual_seed(0)
    for layer in lora_layers(pipe.unet):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    adapted = play(pipe)
    assert (adapted - play(make_pipe())).abs().mean() > 0.05 * adapted.abs().mean()
    pipe.save_lora_weights(tmp_path, pipe.unet)
    loaded = make_pipe()
    loaded.load_lora_weights(tmp_path)
    assert_same(play(loaded), adapted)
    loaded.fuse_lora()
    assert_same(play(loaded), adapted)
    with pytest.raises(ValueError, match=r"`targets` must be ends of layers' names, as to_q, .*, got \['q'\]"):
        add_lora(make_pipe().unet, targets=["q"])


def test_adapters_are_chosen_weighed_and_deleted(lora):
    pipe, plain = make_pipe(), play(make_pipe())
    train_lora(pipe.unet, "other", rank=3, seed=1)
    other = play(pipe)
    pipe.load_lora_weights(lora, adapter_name="first")
    assert pipe.get_list_adapters() == {"unet": ["other", "first"]} and pipe.get_active_adapters() == ["first"]
    first = play(pipe)
    pipe.set_adapters("other")
    assert_same(play(pipe), other)
    pipe.set_adapters(["other", "first"], [0.0, 1.0])
    assert_same(play(pipe), first)
    pipe.set_adapters(["other", "first"])
    both = play(pipe)
    assert min((both - one).abs().mean() for one in (first, other)) > 0.01 * both.abs().mean()
    pipe.set_adapters("first", 0.0)
    assert_same(play(pipe), plain)
    pipe.set_adapters("first")
    pipe.delete_adapters("other")
    assert pipe.get_list_adapters() == {"unet": ["first"]}
    assert_same(play(pipe), first)
    pipe.delete_adapters(["first"])
    assert not lora_layers(pipe.unet)
    assert_same(play(pipe), plain)


def test_the_strength_of_a_call_and_of_fusing_are_that_of_set_adapters(lora):
    pipe = make_pipe()
    pipe.load_lora_weights(lora)
    full = play(pipe)
    pipe.set_adapters("default_0", 0.5)
    half = play(pipe)
    pipe.set_adapters("default_0")
    assert_same(play(pipe, cross_attention_kwargs={"scale": 0.5}), half)
    pipe.fuse_lora(lora_scale=0.5)
    assert_same(play(pipe), half)
    pipe.unfuse_lora()
    assert_same(play(pipe), full)


def test_any_adapter_is_fused_at_any_strength_and_taken_back(lora):
    pipe = make_pipe()
    pipe.load_lora_weights(lora, adapter_name="first")
    train_lora(pipe.unet, "other", rank=3, seed=1)
    pipe.set_adapters("first", 0.5)
    half = play(pipe)
    pipe.set_adapters("first")
    pipe.set_adapters("other")
    other = play(pipe)
    # The one that is not active.
    pipe.fuse_lora(adapter_names=["first"], lora_scale=0.5)
    assert_same(play(pipe), half)
    pipe.unfuse_lora()
    assert_same(play(pipe), other)
    pipe.fuse_lora(lora_scale=0.0)
    assert_same(play(pipe), play(make_pipe()))
    pipe.unfuse_lora()
    assert_same(play(pipe), other)


def test_strengths_that_are_none_are_refused_and_leave_the_adapter_as_it_was(lora):
    pipe = make_pipe()
    pipe.load_lora_weights(lora)
    expected = play(pipe)
    for wrong, error in ((math.nan, ValueError), (math.inf, ValueError), ("1", TypeError), ({"unet": 0.5}, TypeError)):
        with pytest.raises(error, match="`lora_scale` must be"):
            pipe.fuse_lora(lora_scale=wrong)
        for weights in (wrong, [wrong]):
            with pytest.raises(error, match="`adapter_weights` must be"):
                pipe.set_adapters("default_0", weights)
    assert_same(play(pipe), expected)
    pipe.set_adapters("default_0", (1.0,))
    assert_same(play(pipe), expected)


def test_gradients_reach_only_the_adapter():
    pipe = make_pipe()
    add_lora(pipe.unet, 2)
    trainable = {name for name, parameter in pipe.unet.named_parameters() if parameter.requires_grad}
    assert trainable and all(".lora_A." in name or ".lora_B." in name for name in trainable)
    wrapped = {name.split(".lora_")[0] for name in trainable}
    targets = {name for name, _ in make_pipe().unet.named_modules() if name.endswith(LORA_TARGETS)}
    assert wrapped == targets
    # Each level of the UNet has some, with attention or without.
    levels = [f"down_blocks.{level}." for level in range(len(pipe.unet.down_blocks))]
    assert all(any(name.startswith(level) for name in wrapped) for level in levels)


def test_half_precision_stays_half(lora):
    pipe = make_pipe()
    pipe.unet.to(torch.bfloat16)
    pipe.load_lora_weights(lora)
    assert {parameter.dtype for parameter in pipe.unet.parameters()} == {torch.bfloat16}


# ------------------------------------------------------------ files


def test_it_loads_from_a_file_from_tensors_and_from_the_hub_and_without_the_package(lora, tmp_path, hub):
    hub.add_repo("tester/lora", lora)
    pipe = make_pipe()
    pipe.load_lora_weights(lora)
    expected = play(pipe)
    for source in (lora / FILE, "tester/lora", str(lora)):
        other = make_pipe()
        other.load_lora_weights(source)
        assert_same(play(other), expected)
    # Without its settings alpha is the rank, half of what this one has.
    pipe.set_adapters("default_0", 0.5)
    other = make_pipe()
    other.load_lora_weights(load_file(lora / FILE))
    assert_same(play(other), play(pipe))
    make_pipe().save_pretrained(tmp_path / "whole")

    def load_without_the_package() -> None:
        forget_the_package()
        pipe = DiffusionPipeline.from_pretrained(tmp_path / "whole", trust_remote_code=True)
        pipe.load_lora_weights("tester/lora", adapter_name="mine")
        pipe.fuse_lora()
        np.save(tmp_path / "latents.npy", play(pipe).numpy())

    process = start(load_without_the_package, tmp_path / "printed")
    process.join()
    assert process.exitcode == 0, (tmp_path / "printed").read_text()
    assert_same(torch.from_numpy(np.load(tmp_path / "latents.npy")), expected)


def test_files_are_those_of_diffusers(lora, tmp_path):
    pipe = make_pipe()
    pipe.load_lora_weights(lora)
    expected = play(pipe)
    theirs = make_pipe()
    theirs.unet.load_lora_adapter(str(lora), prefix="unet", weight_name=FILE)
    assert_same(play(theirs), expected)

    theirs.unload_lora_weights()
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["to_q"], rank_pattern={"mid_block": 4})
    config.init_lora_weights = False
    torch.manual_seed(0)
    theirs.unet.add_adapter(config)
    metadata = {f"unet.{name}": value for name, value in config.to_dict().items()}
    layers = {f"unet.{name}": rows for name, rows in get_peft_model_state_dict(theirs.unet).items()}
    metadata = {name: sorted(value) if isinstance(value, set) else value for name, value in metadata.items()}
    StableDiffusionPipeline.write_lora_layers(layers, str(tmp_path), True, None, None, True, metadata)
    ours = make_pipe()
    ours.load_lora_weights(tmp_path)
    assert_same(play(ours), play(theirs))


def test_a_small_repository_gives_synapse_and_adapter_to_base_models(lora, tmp_path, hub):
    pipe = make_pipe()
    for name, component in pipe.components.items():
        if name.startswith("image_"):
            component.save_pretrained(tmp_path / "image" / name.removeprefix("image_"))
        elif component is not None and name != "synapse":
            component.save_pretrained(tmp_path / "music" / name)
    pipe.load_lora_weights(lora)
    expected = play(pipe)
    pipe.synapse.save_pretrained(tmp_path / "small")
    pipe.save_lora_weights(tmp_path / "small", pipe.unet)
    hub.add_repo("tester/small", tmp_path / "small")
    for synapse in (tmp_path / "small", "tester/small"):
        loaded = MelFusionPipeline.from_base_models(tmp_path / "image", tmp_path / "music", synapse=synapse)
        assert loaded.get_list_adapters() == {"unet": ["default_0"]}
        assert_same(play(loaded), expected)

    tensors = load_file(lora / FILE)
    layer = next(iter(tensors)).split(".lora_")[0]
    save_file(tensors | {f"{layer}.lora_B.weight": torch.zeros(5, 2)}, tmp_path / "small" / FILE)
    (tmp_path / "music" / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"The LoRA does not fit the music UNet: .* is \[5, 2\]"):
        MelFusionPipeline.from_base_models(tmp_path / "image", tmp_path / "music", synapse=tmp_path / "small")


# ------------------------------------------------------------ what is refused


def test_what_is_no_adapter_of_this_unet_is_refused_and_leaves_it_as_it_was(lora, tmp_path):
    tensors = load_file(lora / FILE)
    first = next(name for name in tensors if name.endswith(".to_q.lora_A.weight"))
    half = first.replace("lora_A", "lora_B")
    for changed, message in (
        ({}, "holds no tensors"),
        (tensors | {half: torch.full_like(tensors[half], torch.nan)}, "must be a tensor of finite floating-point"),
        (tensors | {half: 1.0}, "must be a tensor of finite floating-point"),
        ({"unet.conv_in.weight": torch.zeros(1)}, "`unet.conv_in.weight` is no tensor of a LoRA"),
        ({name.removeprefix("unet."): rows for name, rows in tensors.items()}, "is no tensor of a LoRA"),
        ({name.replace("up_blocks.0", "up_blocks.9"): rows for name, rows in tensors.items()}, "no layer up_blocks.9"),
        ({name: rows for name, rows in tensors.items() if name != half}, "is not complete"),
        ({**tensors, first: torch.zeros(2, 999)}, r"is \[2, 999\], the weight of"),
        ({**tensors, half: torch.zeros(len(tensors[half]), 7)}, "cannot be installed"),
        ({**tensors, first.replace("lora_A", "lora_C"): torch.zeros(2, 2)}, "cannot be installed: .* no place for"),
    ):
        pipe = make_pipe()
        with pytest.raises(ValueError, match=message):
            pipe.load_lora_weights(changed)
        assert not lora_layers(pipe.unet) and pipe.get_list_adapters() == {}
    pipe = MelFusionPipeline(**untrained_components() | {"unet": music_unet(block_out_channels=(8, 16, 16, 32))})
    with pytest.raises(ValueError, match="The LoRA does not fit the music UNet"):
        pipe.load_lora_weights(lora)


def test_wrong_files_are_named(lora, tmp_path):
    pipe = make_pipe()
    with pytest.raises(FileNotFoundError, match=rf"holds no {FILE}"):
        pipe.load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="`weight_name` must be the name of a safetensors file, got 'lora.bin'"):
        pipe.load_lora_weights(lora, weight_name="lora.bin")
    with pytest.raises(ValueError, match="`weight_name` must be"):
        pipe.save_lora_weights(tmp_path, {}, weight_name="../lora.safetensors")
    with pytest.raises(OSError, match="is no folder, and the Hub says"):
        pipe.load_lora_weights("nobody/nothing")
    for source in (lora, load_file(lora / FILE)):
        with pytest.raises(TypeError, match="takes no hotswap"):
            pipe.load_lora_weights(source, hotswap=True)
    for nothing in ({}, None):
        with pytest.raises(ValueError, match="`unet_lora_layers` must be"):
            pipe.save_lora_weights(tmp_path / "nothing", nothing)
    assert not (tmp_path / "nothing").exists()
    (tmp_path / FILE).write_bytes((lora / FILE).read_bytes()[:-10])
    with pytest.raises(OSError, match="is no complete safetensors file"):
        pipe.load_lora_weights(tmp_path)
    save_file(load_file(lora / FILE), tmp_path / FILE, {LORA_ADAPTER_METADATA_KEY: "[1"})
    with pytest.raises(ValueError, match=f"{LORA_ADAPTER_METADATA_KEY} must be a JSON object"):
        pipe.load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="`save_directory` must be a folder"):
        pipe.save_lora_weights(tmp_path / FILE, {})
    assert not lora_layers(pipe.unet)


def test_settings_of_a_file_cannot_make_peft_do_other_things(lora, tmp_path):
    settings = {"unet.init_lora_weights": "pissa", "unet.modules_to_save": ["conv_in"], "unet.lora_alpha": 4}
    save_file(load_file(lora / FILE), tmp_path / FILE, {LORA_ADAPTER_METADATA_KEY: json.dumps(settings)})
    pipe, plain = make_pipe(), make_pipe()
    pipe.load_lora_weights(tmp_path)
    expected = make_pipe()
    expected.load_lora_weights(lora)
    assert_same(play(pipe), play(expected))
    pipe.unload_lora_weights()
    for name, weight in plain.unet.state_dict().items():
        assert torch.equal(pipe.unet.state_dict()[name], weight), name


def test_wrong_names_and_orders_are_refused(lora):
    pipe = make_pipe()
    with pytest.raises(ValueError, match="`fuse_lora` needs an adapter"):
        pipe.fuse_lora()
    with pytest.raises(ValueError, match=r"`adapter_name` must be one of \[\]"):
        pipe.save_lora_weights(lora, pipe.unet)
    pipe.load_lora_weights(lora, adapter_name="first")
    with pytest.raises(ValueError, match="an adapter 'first' is installed already"):
        pipe.load_lora_weights(lora, adapter_name="first")
    with pytest.raises(ValueError, match=r"The music UNet has no adapter 'second', but \['first'\]"):
        pipe.set_adapters(["first", "second"])
    with pytest.raises(ValueError, match="`adapter_weights` must be one number or 1, got 2"):
        pipe.set_adapters("first", [1.0, 2.0])
    with pytest.raises(ValueError, match="`components` must be"):
        pipe.fuse_lora(components=["text_encoder"])
    pipe.unet = torch.compile(pipe.unet)
    with pytest.raises(ValueError, match="`load_lora_weights` must come before `torch.compile`"):
        pipe.load_lora_weights(lora)
    pipe.unet = pipe.unet._orig_mod
    pipe.fuse_lora()
    for refused in (
        lambda: pipe.load_lora_weights(lora),
        lambda: pipe.set_adapters("first"),
        pipe.fuse_lora,
        lambda: pipe.delete_adapters("first"),
    ):
        with pytest.raises(ValueError, match="cannot be used while an adapter is fused"):
            refused()

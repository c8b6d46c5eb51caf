import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_near, photograph
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch.utils._python_dispatch import TorchDispatchMode
from untrained import music_unet, picture_unet

from melfusion_pipeline import VisualSynapse
from melfusion_pipeline.attention_melfusion import (
    BlendKVAttnProcessor,
    KVBlenders,
    KVRecorders,
    pool_recorded_tokens,
    use_attn_processors,
)
from melfusion_pipeline.modeling_melfusion import decoder_layers


def textbook_pool(states: torch.Tensor, size: int) -> torch.Tensor:
    """Adaptive average pooling of the first axis, by its definition."""
    length = states.shape[0]
    windows = [(index * length // size, math.ceil((index + 1) * length / size)) for index in range(size)]
    return torch.stack([states[start:stop].mean(0) for start, stop in windows])


def textbook_attention(attn, hidden_states, context, image_key, image_value, alpha, key_map, value_map, mask):
    """method.md, section 2, for one row: every step written out, explicit softmax."""
    query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
    fitted_key = textbook_pool(image_key, len(key)) @ key_map.T
    fitted_value = textbook_pool(image_value, len(value)) @ value_map.T
    key = alpha * fitted_key + (1 - alpha) * key
    value = alpha * fitted_value + (1 - alpha) * value
    width = query.shape[-1] // attn.heads
    heads = []
    for head in range(attn.heads):
        columns = slice(head * width, (head + 1) * width)
        scores = query[:, columns] @ key[:, columns].T / math.sqrt(width)
        if mask is not None:
            scores = scores + mask
        weights = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
        heads.append(weights / weights.sum(dim=-1, keepdim=True) @ value[:, columns])
    return attn.to_out[0](torch.cat(heads, dim=-1))


@pytest.mark.parametrize("projection", ["linear", "pool"])
@pytest.mark.parametrize("position", ["no text", "text", "text with mask"])
def test_blending_equals_a_textbook_implementation(projection: str, position: str):
    torch.manual_seed(1)
    text, branches, pictures, waveforms = position != "no text", 2, 3, 2
    attn = Attention(16, 24 if text else 16, heads=4, dim_head=4).double()
    synapse = VisualSynapse(["a"], [20], ["b"], [16], [0], projection=projection).double()
    if projection == "linear":
        for projections in (synapse.key_projections, synapse.value_projections):
            torch.nn.init.normal_(projections[0].weight)
        key_map, value_map = synapse.key_projections[0].weight, synapse.value_projections[0].weight
    else:
        key_map = value_map = textbook_pool(torch.eye(20, dtype=torch.double), 16)

    rows, music_tokens = branches * pictures * waveforms, 11
    hidden_states = torch.randn(rows, music_tokens, 16).double()
    context = torch.randn(rows, 7, 24).double() if text else None
    mask = torch.zeros(rows, 1, 7).double()
    if position == "text with mask":
        mask[::2, :, 5:] = -10000.0
    keys, values = torch.randn(2, 3, pictures, 33, 20).double()
    alphas = torch.rand(1, branches, pictures).double()

    fitted_keys, fitted_values, _ = synapse({"a": keys}, {"a": values}, [7 if text else music_tokens])
    blenders = KVBlenders(["b"])
    attn.set_processor(blenders["b"])
    for step in range(3):
        blenders.read({"b": (fitted_keys["b"][step], fitted_values["b"][step])}, alphas)
        output = attn(hidden_states, context, mask if position == "text with mask" else None)
        for row in range(rows):
            branch, picture = row // (pictures * waveforms), row // waveforms % pictures
            expected = textbook_attention(
                attn,
                hidden_states[row],
                hidden_states[row] if context is None else context[row],
                keys[step, picture],
                values[step, picture],
                alphas[0, branch, picture],
                key_map,
                value_map,
                mask[row] if position == "text with mask" else None,
            )
            # The matrix that pools is float32.
            assert_near(output[row].float(), expected.float(), steps=10)


def test_a_padded_text_does_not_depend_on_its_batch_mates():
    torch.manual_seed(0)
    attn = Attention(16, 24, heads=4, dim_head=4)
    processor = BlendKVAttnProcessor()
    attn.set_processor(processor)
    key, value = torch.randn(2, 1, 7, 16)
    processor.key, processor.value = key, value
    processor.alpha = torch.full((1, 1, 1, 1, 1), 0.4)
    hidden_states, text = torch.randn(2, 5, 16), torch.randn(2, 7, 24)
    mask = torch.zeros(2, 1, 7)
    mask[0, :, 4:] = -10000.0
    together = attn(hidden_states, text, mask)
    alone = attn(hidden_states[:1], text[:1], mask[:1])
    assert_near(together[:1], alone)
    padding = text.clone()
    padding[0, 4:] += 100
    assert_near(attn(hidden_states, padding, mask)[0], together[0])


def blend_inputs(unet: UNet2DConditionModel, batch_size: int = 2) -> dict:
    width = unet.config.projection_class_embeddings_input_dim
    return {
        "sample": torch.randn(batch_size, 4, 8, 4),
        "timestep": torch.tensor(7),
        "encoder_hidden_states": None,
        "class_labels": torch.randn(batch_size, width),
    }


def ready_blenders(unet: UNet2DConditionModel, alpha: float | torch.Tensor, steps: int = 1) -> tuple[KVBlenders, list]:
    """Blenders for `unet` and what they read at each of `steps`."""
    synapse = VisualSynapse.from_unets(picture_unet(), unet)
    layers = list(zip(synapse.config.music_layers, synapse.config.music_widths, synapse.num_tokens(8, 4)))
    blenders = KVBlenders(synapse.config.music_layers)
    alphas = torch.as_tensor(alpha).expand(len(layers)).unsqueeze(1)
    readings = [
        ({name: tuple(torch.randn(2, 1, tokens, width)) for name, width, tokens in layers}, alphas)
        for _ in range(steps)
    ]
    blenders.read(*readings[0])
    return blenders, readings


@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_what_a_layer_does_beside_attending_is_kept(alpha: float):
    """Norms of queries, keys and text, residual and scale: as diffusers' own processor, with what is blended given."""
    torch.manual_seed(0)
    options = {"qk_norm": "layer_norm", "cross_attention_norm": "layer_norm", "residual_connection": True}
    attn = Attention(16, 24, heads=4, dim_head=4, rescale_output_factor=2.0, **options)
    for norm in (attn.norm_q, attn.norm_k, attn.norm_cross):
        torch.nn.init.normal_(norm.weight)
    hidden_states, text = torch.randn(2, 5, 16), torch.randn(2, 7, 24)
    key, value = torch.randn(2, 1, 7, 16)
    processor = BlendKVAttnProcessor()
    processor.key, processor.value = key, value
    processor.alpha = torch.full((1, 1, 1, 1, 1), alpha)
    with torch.no_grad():
        hooks = [
            module.register_forward_hook(lambda _, __, music, image=image: torch.lerp(music, image, alpha))
            for module, image in ((attn.to_k, key), (attn.to_v, value))
        ]
        expected = attn(hidden_states, text)
        for hook in hooks:
            hook.remove()
        attn.set_processor(processor)
        assert_near(attn(hidden_states, text), expected)


def test_every_layer_gets_its_own_alpha_keys_and_values():
    layers = ["a", "b", "c"]
    blenders = KVBlenders(layers)
    given = {layer: tuple(torch.randn(5, 2, 1, 3, 4)[2]) for layer in layers}
    alphas = torch.rand(3, 2)
    blenders.read(given, alphas)
    for index, layer in enumerate(layers):
        assert torch.equal(blenders[layer].alpha.flatten(), alphas[index])
        assert torch.equal(blenders[layer].key, given[layer][0])
        assert torch.equal(blenders[layer].value, given[layer][1])
        # Where a tensor begins in its storage is part of what a compiled UNet is compiled for.
        tensors = (blenders[layer].key, blenders[layer].value, blenders[layer].alpha)
        assert [tensor.storage_offset() for tensor in tensors] == [0, 0, 0]


def test_alpha_zero_is_the_unet_bit_for_bit():
    torch.manual_seed(0)
    unet = music_unet().eval()
    inputs = blend_inputs(unet)
    with torch.no_grad():
        expected = unet(**inputs).sample
        blenders, _ = ready_blenders(unet, 0.0)
        with use_attn_processors(unet, blenders):
            assert torch.equal(unet(**inputs).sample, expected)
        blenders, _ = ready_blenders(unet, 0.5)
        with use_attn_processors(unet, blenders):
            assert not torch.allclose(unet(**inputs).sample, expected, atol=1e-4)


def test_recording_leaves_the_output_bitwise_unchanged_and_records_the_layers_own_keys():
    torch.manual_seed(0)
    unet = picture_unet().eval()
    inputs = (torch.randn(2, 4, 80, 72), torch.tensor(7), torch.randn(2, 5, 24))
    layers = [name for name, _, _ in decoder_layers(unet, "attn1")]
    projected, hooks = {}, []
    for at in itertools.product(layers, ("to_k", "to_v")):
        module = unet.get_submodule(".".join(at))
        hooks.append(module.register_forward_hook(lambda _, __, output, at=at: projected.update({at: output})))
    with torch.no_grad():
        expected = unet(*inputs).sample
        for hook in hooks:
            hook.remove()
        recorders = KVRecorders(unet, layers)
        with use_attn_processors(unet, recorders):
            assert torch.equal(unet(*inputs).sample, expected)
    recorded = recorders.collect()
    assert projected[layers[-1], "to_k"].shape[1] == 80 * 72
    for layer in layers:
        for index, side in enumerate(("to_k", "to_v")):
            own = projected[layer, side]
            pooled = torch.stack([textbook_pool(row, min(len(row), 1024)) for row in own])
            assert_near(recorded[layer][index], pooled)
    with pytest.raises(RuntimeError, match="No keys and values were recorded"):
        recorders.collect()


def test_processors_are_restored_also_after_an_exception():
    unet = music_unet()
    originals = dict(unet.attn_processors)
    blenders, _ = ready_blenders(unet, 0.3)
    with pytest.raises(KeyboardInterrupt), use_attn_processors(unet, blenders):
        installed = unet.attn_processors
        assert sum(isinstance(processor, BlendKVAttnProcessor) for processor in installed.values()) == len(blenders)
        raise KeyboardInterrupt
    assert unet.attn_processors.keys() == originals.keys()
    assert all(unet.attn_processors[name] is originals[name] for name in originals)


def test_blending_without_anything_to_read_is_refused():
    unet = music_unet()
    blenders = KVBlenders([name for name, _, _ in decoder_layers(unet, "attn2")])
    with use_attn_processors(unet, blenders), pytest.raises(RuntimeError, match="no keys and values to blend"):
        unet(**blend_inputs(unet))


class Operations(TorchDispatchMode):
    """Counts operations by name; where `like_mps`, refuses the pooling that Apple's MPS does not have."""

    def __init__(self, like_mps: bool = False):
        super().__init__()
        self.like_mps, self.counts = like_mps, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        if self.like_mps and "adaptive_avg_pool" in str(function):
            sizes = zip(args[0].shape[-len(args[1]) :], args[1])
            if any(inputs % outputs for inputs, outputs in sizes):
                raise RuntimeError("Adaptive pool MPS: input sizes must be divisible by output sizes.")
        return function(*args, **(kwargs or {}))


def test_the_attention_backend_set_before_a_call_serves_the_blended_layers():
    torch.manual_seed(0)
    unet = music_unet().eval()
    inputs = blend_inputs(unet)
    flash = "_scaled_dot_product_flash_attention_for_cpu"
    blenders, _ = ready_blenders(unet, 0.5)
    with torch.no_grad(), use_attn_processors(unet, blenders), Operations() as default:
        expected = unet(**inputs).sample
    try:
        unet.set_attention_backend("_native_math")
        blenders, _ = ready_blenders(unet, 0.5)
        with torch.no_grad(), use_attn_processors(unet, blenders), Operations() as math:
            unet(**inputs)
    finally:
        unet.set_attention_backend("native")
    assert expected.isfinite().all()
    assert default.counts[flash] - math.counts[flash] == len(blenders)


@pytest.mark.parametrize("num_tokens", [5, 1024, 2048, 4096, 1025, 1600, 6400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_tokens_are_pooled_as_by_the_library_also_where_it_refuses(num_tokens: int, dtype: torch.dtype):
    torch.manual_seed(0)
    states = torch.randn(2, num_tokens, 3).to(dtype)
    with Operations(like_mps=True):
        pooled = pool_recorded_tokens(states)
    expected = F.adaptive_avg_pool1d(states.transpose(1, 2), min(num_tokens, 1024)).transpose(1, 2)
    if num_tokens <= 1024 or num_tokens % 1024 == 0:
        assert torch.equal(pooled, expected)
    assert_near(pooled, expected, steps=4)


def test_keys_on_another_device_are_blended_where_the_music_is():
    """The meta device stands for a second one: it refuses to compute with the CPU's tensors, as a GPU does."""
    processor = BlendKVAttnProcessor()
    processor.alpha = torch.rand(2, 1, 1, 1, 1)
    blended = processor.blend(torch.empty(4, 5, 8, device="meta", dtype=torch.float16), torch.randn(1, 5, 8))
    assert blended.device.type == "meta" and blended.dtype == torch.float16 and blended.shape == (4, 5, 8)


def test_gradient_checkpointing_gives_the_same_gradients():
    torch.manual_seed(0)
    unet = music_unet().train()
    inputs = blend_inputs(unet)
    alpha = torch.tensor(0.4, requires_grad=True)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet.zero_grad()
        alpha.grad = None
        torch.manual_seed(5)
        blenders, _ = ready_blenders(unet, alpha)
        with use_attn_processors(unet, blenders):
            unet(**inputs).sample.square().mean().backward()
        gradients.append([alpha.grad.clone(), *(parameter.grad.clone() for parameter in unet.parameters())])
    assert gradients[0][0].abs() > 1e-6
    # Together: the gradients of some parameters are zero but for rounding.
    assert_near(*(torch.cat([each.flatten() for each in computed]) for computed in gradients))


class CompileCounter:
    """A compiler backend that only counts the graphs it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph_module, example_inputs):
        self.graphs += 1
        return graph_module.forward


def test_compiled_unets_run_as_one_graph_without_recompilation():
    torch.manual_seed(0)
    unet, image_unet = music_unet().eval(), picture_unet().eval()
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(unet, backend=counter, fullgraph=True)
    with torch.no_grad():
        for call in range(2):
            blenders, readings = ready_blenders(unet, 0.1 + 0.3 * call, steps=4)
            with use_attn_processors(compiled, blenders):
                for step, reading in enumerate(readings):
                    blenders.read(*reading)
                    inputs = blend_inputs(unet) | {"timestep": torch.tensor(100 * step)}
                    output = compiled(**inputs).sample
                    assert_near(output, unet(**inputs).sample)
    assert counter.graphs == 1

    counter = CompileCounter()
    compiled = torch.compile(image_unet, backend=counter, fullgraph=True)
    layers = [name for name, _, _ in decoder_layers(image_unet, "attn1")]
    recorders = KVRecorders(image_unet, layers)
    with torch.no_grad(), use_attn_processors(compiled, recorders):
        for step in range(4):
            inputs = (torch.randn(1, 4, 8, 8), torch.tensor(100 * step), torch.randn(1, 5, 24))
            output, recorded = compiled(*inputs).sample, recorders.collect()
            assert_near(output, image_unet(*inputs).sample)
            for layer, (key, _) in recorders.collect().items():
                assert_near(recorded[layer][0], key)
    assert counter.graphs == 1


@pytest.mark.slow
def test_calls_of_several_sizes_stay_below_torchs_limit_of_graphs(pipe):
    """Both UNets count against one limit (`recompile_limit`, 8), because they run the same code of diffusers."""
    torch._dynamo.reset()
    counter = CompileCounter()
    pipe.unet.compile(backend=counter, fullgraph=True)
    pipe.image_unet.compile(backend=counter, fullgraph=True)
    photographs = [photograph(seed) for seed in range(3)]

    def graphs(image, **kwargs) -> int:
        before = counter.graphs
        assert np.isfinite(pipe(image, "a waltz", num_inference_steps=3, num_inversion_steps=3, **kwargs).audios).all()
        return counter.graphs - before

    # One for each UNet: neither the step, nor the timestep, nor the picture is compiled for.
    assert graphs(photographs[0]) == 2 and graphs(photographs[1]) == 0
    graphs(photographs[0], image_guidance_scale=2.0)
    graphs(photographs[:2])
    graphs(photographs)
    assert graphs(photographs[:2], image_guidance_scale=2.0) == 0
    graphs(photographs[0], image_size=48)
    assert counter.graphs <= torch._dynamo.config.recompile_limit

"""Attention processors of MeLFusion: one records keys and values, the other blends recorded ones into its own."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention

# Recorded layers longer than this are average-pooled when they are recorded (method, section 2).
MAX_RECORDED_TOKENS = 1024


def pool_recorded_tokens(states: torch.Tensor) -> torch.Tensor:
    """Averages the tokens of `[batch, tokens, channels]` into 1,024, as `adaptive_avg_pool1d`; fewer stay as they are.

    On Apple's MPS the library's pooling takes only numbers of tokens that 1,024 divides. For the others the same
    windows are gathered: that needs about as much memory as `states`, where a pooling matrix would need more.
    """
    num_tokens = states.shape[1]
    if num_tokens <= MAX_RECORDED_TOKENS:
        return states
    if num_tokens % MAX_RECORDED_TOKENS == 0:
        return F.adaptive_avg_pool1d(states.transpose(1, 2), MAX_RECORDED_TOKENS).transpose(1, 2)
    windows = torch.arange(MAX_RECORDED_TOKENS, device=states.device)
    start = windows * num_tokens // MAX_RECORDED_TOKENS
    # Negated floor division rounds up: a token on the border of two windows belongs to both.
    stop = -(-(windows + 1) * num_tokens // MAX_RECORDED_TOKENS)
    longest = -(-num_tokens // MAX_RECORDED_TOKENS) + 1
    index = start[:, None] + torch.arange(longest, device=states.device)
    inside = (index < stop[:, None]).to(states.dtype)[..., None]
    gathered = states[:, index.clamp(max=num_tokens - 1)]
    return (gathered * inside).sum(dim=2) / inside.sum(dim=1)


class RecordKVAttnProcessor:
    """Runs the processor it wraps, unchanged, and keeps the layer's self-attention keys and values.

    The source of `K_l^I` and `V_l^I` in the visual synapse (MeLFusion, arXiv 2406.04673, section 3). After each pass
    `key` and `value` hold them, `[batch, tokens, channels]`. Layers of more than 1,024 tokens are average-pooled to
    1,024 *before* the projections. These are linear, so that keys and values are the same, and have less to project.

    Args:
        processor: The layer's own processor.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.key: torch.Tensor | None = None
        self.value: torch.Tensor | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attends as the wrapped processor does; called by diffusers' `Attention`.

        Args:
            attn: The layer.
            hidden_states: `[batch, tokens, channels]`.
            encoder_hidden_states: For the wrapped processor; self-attention has none.
            attention_mask: For the wrapped processor.

        Returns:
            What the wrapped processor returns, `[batch, tokens, channels]`.
        """
        tokens = pool_recorded_tokens(hidden_states)
        self.key, self.value = attn.to_k(tokens), attn.to_v(tokens)
        return self.processor(attn, hidden_states, encoder_hidden_states, attention_mask)


class BlendKVAttnProcessor:
    """Attention whose keys and values are blended with a picture's, as the visual synapse prescribes.

    Implements `K <- alpha K^I + (1 - alpha) K^M`, `V <- alpha V^I + (1 - alpha) V^M` and
    `softmax(Q K^T / sqrt(d)) V` (MeLFusion, arXiv 2406.04673, section 3). `K^M` and `V^M` come from
    `encoder_hidden_states` where the UNet has a text sequence, otherwise from the hidden states.

    The batch of the UNet is laid out as (guidance branch, picture, waveform). `KVBlenders.read` sets what is blended:
    `key` and `value`, `[pictures, tokens, channels]`, already fitted to the layer's tokens and channels, and `alpha`,
    `[branches, pictures or 1, 1, 1, 1]`. They are broadcast, so that no branch or waveform needs a copy.
    """

    def __init__(self) -> None:
        self.key: torch.Tensor | None = None
        self.value: torch.Tensor | None = None
        self.alpha: torch.Tensor | None = None

    def blend(self, music: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Blends `music` `[branches * pictures * waveforms, ...]` with `image` `[pictures, ...]`, both `[..., N, C]`.

        The result has the dtype and device of `music`, whatever those of `image` and alpha are. `lerp` is exact at
        alpha = 0: there the text-to-music model is left as it is, bit for bit.
        """
        rows = music.unflatten(0, (self.alpha.shape[0], image.shape[0], -1))
        blended = torch.lerp(rows, image.unsqueeze(1).to(music), self.alpha.to(music))
        return blended.flatten(0, 2)

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attends with blended keys and values; called by diffusers' `Attention`.

        Args:
            attn: The layer.
            hidden_states: `[branches * pictures * waveforms, tokens, channels]`.
            encoder_hidden_states: The text sequence `[same batch, text tokens, channels]` where the UNet has one.
            attention_mask: Of the text sequence, as diffusers passes it on.

        Returns:
            `[branches * pictures * waveforms, tokens, channels]`.

        Raises:
            RuntimeError: If `KVBlenders.read` was not called before.
        """
        if self.key is None or self.value is None:
            raise RuntimeError("This layer has no keys and values to blend: call `KVBlenders.read` before the UNet.")
        residual = hidden_states
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)

        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))
        key = self.blend(attn.to_k(context), self.key).unflatten(-1, (attn.heads, -1))
        value = self.blend(attn.to_v(context), self.value).unflatten(-1, (attn.heads, -1))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)

        if attention_mask is not None:
            batch_size, num_tokens, _ = context.shape
            attention_mask = attn.prepare_attention_mask(attention_mask, num_tokens, batch_size)
            attention_mask = attention_mask.unflatten(0, (batch_size, attn.heads))
        # Without `backend` this is the active one, which `set_attention_backend` of any model chooses for all.
        hidden_states = dispatch_attention_fn(query, key, value, attn_mask=attention_mask)
        hidden_states = hidden_states.flatten(2, 3).to(query.dtype)

        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor


class KVRecorders(dict[str, RecordKVAttnProcessor]):
    """The recording processors of one UNet by layer name, ready for `use_attn_processors`.

    Args:
        unet: The UNet to record.
        layers: The names of its self-attention layers, such as `up_blocks.1.attentions.0.transformer_blocks.0.attn1`.
    """

    def __init__(self, unet: ModelMixin, layers: Iterable[str]) -> None:
        super().__init__((layer, RecordKVAttnProcessor(unet.get_submodule(layer).processor)) for layer in layers)

    def collect(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Returns what the last pass recorded and forgets it.

        A UNet that runs with CUDA graphs overwrites it in the next pass: copy what is to be kept.

        Returns:
            For each layer `(key, value)`, each `[batch, tokens, channels]`.

        Raises:
            RuntimeError: If there was no pass since the last call.
        """
        recorded = {layer: (processor.key, processor.value) for layer, processor in self.items()}
        if any(key is None or value is None for key, value in recorded.values()):
            raise RuntimeError("No keys and values were recorded: run the UNet with these processors first.")
        for processor in self.values():
            processor.key = processor.value = None
        return recorded


class KVBlenders(dict[str, BlendKVAttnProcessor]):
    """The blending processors of one UNet by layer name, ready for `use_attn_processors`.

    Args:
        layers: The names of its decoder layers at the cross-attention position (`attn2`).
    """

    def __init__(self, layers: Iterable[str]) -> None:
        super().__init__((layer, BlendKVAttnProcessor()) for layer in layers)

    def read(self, keys_and_values: dict[str, tuple[torch.Tensor, torch.Tensor]], alphas: torch.Tensor) -> None:
        """Sets what the next pass blends.

        Args:
            keys_and_values: For each layer its `(key, value)`, `[pictures, tokens, channels]`, fitted to the layer.
            alphas: `[layers, branches]`, or `[layers, branches, pictures]` where the pictures differ in it.
        """
        alphas = alphas.reshape(*alphas.shape, *[1] * (6 - alphas.ndim))
        for (layer, processor), alpha in zip(self.items(), alphas):
            # Copies, because a compiled UNet would be compiled again for views that begin elsewhere in their storage,
            # such as those of another step or of another number of branches.
            processor.key, processor.value = (states.clone() for states in keys_and_values[layer])
            processor.alpha = alpha.clone()


@contextmanager
def use_attn_processors(unet: ModelMixin, processors: dict[str, Any]) -> Iterator[None]:
    """Installs `processors` in `unet` and restores the UNet's own ones afterwards, also after an exception.

    In training the context must stay open until after the backward pass: gradient checkpointing runs the layers
    again there.

    Args:
        unet: A UNet of diffusers, compiled or not.
        processors: The processors by the name of their attention layer; the other layers keep theirs.
    """
    layers = {name: unet.get_submodule(name) for name in processors}
    originals = {name: attn.processor for name, attn in layers.items()}
    try:
        for name, attn in layers.items():
            attn.set_processor(processors[name])
        yield
    finally:
        for name, attn in layers.items():
            attn.set_processor(originals[name])

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


class KVCell:
    """The keys and values of one layer: written in one place, read in another, never read empty."""

    def __init__(self) -> None:
        self.key: torch.Tensor | None = None
        self.value: torch.Tensor | None = None

    def write(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Stores `key` and `value`, each `[batch, tokens, channels]`."""
        self.key, self.value = key, value

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns `(key, value)`, each `[batch, tokens, channels]`.

        Raises:
            RuntimeError: If nothing has been written.
        """
        if self.key is None or self.value is None:
            raise RuntimeError("No keys and values were written for this layer: run the pass that writes them first.")
        return self.key, self.value


class RecordKVAttnProcessor:
    """Runs the processor it wraps, unchanged, and writes the layer's self-attention keys and values to a cell.

    The source of `K_l^I` and `V_l^I` in the visual synapse (MeLFusion, arXiv 2406.04673, section 3). Layers of more
    than 1,024 tokens are average-pooled to 1,024 *before* the projections, which are linear: the same keys and values
    for a quarter of the work or less.

    Args:
        processor: The layer's own processor.
        cell: Where keys and values are written, each `[batch, tokens, channels]`.
    """

    def __init__(self, processor: Any, cell: KVCell) -> None:
        self.processor = processor
        self.cell = cell

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
        tokens = hidden_states
        if tokens.shape[1] > MAX_RECORDED_TOKENS:
            tokens = F.adaptive_avg_pool1d(tokens.transpose(1, 2), MAX_RECORDED_TOKENS).transpose(1, 2)
        self.cell.write(attn.to_k(tokens), attn.to_v(tokens))
        return self.processor(attn, hidden_states, encoder_hidden_states, attention_mask)


class BlendKVAttnProcessor:
    """Attention whose keys and values are blended with those in its cell, as the visual synapse prescribes.

    Implements `K <- alpha K^I + (1 - alpha) K^M`, `V <- alpha V^I + (1 - alpha) V^M` and
    `softmax(Q K^T / sqrt(d)) V` (MeLFusion, arXiv 2406.04673, section 3). `K^M` and `V^M` come from
    `encoder_hidden_states` where the UNet has a text sequence, otherwise from the hidden states.

    The batch of the UNet is laid out as (guidance branch, picture, waveform). The cell holds
    `[pictures, tokens, channels]`, already fitted to the layer's tokens and channels; `alpha` is
    `[branches, pictures or 1, 1, 1, 1]`. Both are broadcast, so that no branch or waveform holds a copy.

    Args:
        cell: Holds what is blended; `alpha` is set beside it, see `KVBlenders.read`.
    """

    # Where `set_attention_backend` and context parallelism leave their choice for `dispatch_attention_fn`.
    _attention_backend = None
    _parallel_config = None

    def __init__(self, cell: KVCell) -> None:
        self.cell = cell
        self.alpha: torch.Tensor | None = None

    def blend(self, music: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Blends `music` `[branches * pictures * waveforms, ...]` with `image` `[pictures, ...]`, both `[..., N, C]`.

        `lerp` is exact at alpha = 0: there the text-to-music model is left as it is, bit for bit.
        """
        rows = music.unflatten(0, (self.alpha.shape[0], image.shape[0], -1))
        blended = torch.lerp(rows, image.unsqueeze(1).to(music.dtype), self.alpha.to(music.dtype))
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
            RuntimeError: If the cell is empty.
        """
        residual = hidden_states
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)

        image_key, image_value = self.cell.read()
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))
        key = self.blend(attn.to_k(context), image_key).unflatten(-1, (attn.heads, -1))
        value = self.blend(attn.to_v(context), image_value).unflatten(-1, (attn.heads, -1))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)

        if attention_mask is not None:
            batch_size, num_tokens, _ = context.shape
            attention_mask = attn.prepare_attention_mask(attention_mask, num_tokens, batch_size)
            attention_mask = attention_mask.unflatten(0, (batch_size, attn.heads))
        hidden_states = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
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
        super().__init__(
            (layer, RecordKVAttnProcessor(unet.get_submodule(layer).processor, KVCell())) for layer in layers
        )

    def take(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Hands over what the last pass recorded, `(key, value)` of `[batch, tokens, channels]`, by layer."""
        recorded = {layer: processor.cell.read() for layer, processor in self.items()}
        for processor in self.values():
            processor.cell.key = processor.cell.value = None
        return recorded


class KVBlenders(dict[str, BlendKVAttnProcessor]):
    """The blending processors of one UNet by layer name, ready for `use_attn_processors`.

    Args:
        layers: The names of its decoder layers at the cross-attention position (`attn2`).
    """

    def __init__(self, layers: Iterable[str]) -> None:
        super().__init__((layer, BlendKVAttnProcessor(KVCell())) for layer in layers)

    def read(self, keys_and_values: dict[str, tuple[torch.Tensor, torch.Tensor]], alphas: torch.Tensor) -> None:
        """Sets what the next pass blends.

        Args:
            keys_and_values: For each layer its `(key, value)`, `[pictures, tokens, channels]`, fitted to the layer.
            alphas: `[layers, branches]`, or `[layers, branches, pictures]` where the pictures differ in it.
        """
        alphas = alphas.reshape(*alphas.shape, *[1] * (6 - alphas.ndim))
        for (layer, processor), alpha in zip(self.items(), alphas):
            processor.cell.write(*keys_and_values[layer])
            processor.alpha = alpha


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

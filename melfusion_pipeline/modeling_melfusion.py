"""The visual synapse: what MeLFusion learns. One file without relative imports, so that the Hub can load it alone."""

import functools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn


def pooling_matrix(inputs: int, outputs: int) -> torch.Tensor:
    """Adaptive average pooling of `inputs` to `outputs` as a matrix, `[outputs, inputs]`, float32.

    The same numbers as `torch.nn.functional.adaptive_avg_pool1d`, but it runs on every device for every pair of sizes.
    """
    return F.adaptive_avg_pool1d(torch.eye(inputs), outputs).T.contiguous()


@functools.lru_cache(maxsize=16)
def _pooling_matrix_as(inputs: int, outputs: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """`pooling_matrix` where it is needed again and again, for a few sizes; of use to training as well."""
    with torch.inference_mode(False), torch.device("cpu"):
        return pooling_matrix(inputs, outputs).to(device, dtype)


def decoder_layers(unet: ModelMixin, attention: str) -> list[tuple[str, int, int]]:
    """Lists the attention layers in a UNet's decoder, deepest first.

    Args:
        unet: A `UNet2DConditionModel`.
        attention: `"attn1"` for self-attention, `"attn2"` for the cross-attention position.

    Returns:
        For each layer its name, the width of its keys, and how many times its block halves the latents' sides.
    """
    num_blocks = len(unet.up_blocks)
    return [
        (f"up_blocks.{index}.{name}", module.to_k.out_features, num_blocks - 1 - index)
        for index, block in enumerate(unet.up_blocks)
        for name, module in block.named_modules()
        if name.rpartition(".")[2] == attention
    ]


def text_argument(unet: ModelMixin, layer: str) -> str | None:
    """Names the argument of a music UNet whose text sequence a layer at the cross-attention position attends to.

    Args:
        unet: A `UNet2DConditionModel` or `AudioLDM2UNet2DConditionModel`.
        layer: The layer's name, as `decoder_layers` gives it.

    Returns:
        `"encoder_hidden_states"`, `"encoder_hidden_states_1"` (AudioLDM 2's second text), or None for a layer without
        a text sequence, which attends to the music.
    """
    # AudioLDM declares cross-attention to as many channels as the music has, and is called without a text sequence.
    if not unet.get_submodule(layer).is_cross_attention or unet.config.class_embed_type == "simple_projection":
        return None
    _, block, _, transformer, *_ = layer.split(".")
    block = unet.up_blocks[int(block)]
    # AudioLDM 2 has several transformers after each resnet; those from the third on attend to the second text.
    second = int(transformer) % (len(block.attentions) // len(block.resnets)) > 1
    return "encoder_hidden_states_1" if second else "encoder_hidden_states"


class VisualSynapse(ModelMixin, ConfigMixin):
    """Fits a picture's keys and values to the music UNet and holds the strengths with which they are blended.

    Source: MeLFusion, arXiv 2406.04673, section 3 ("visual synapse"); the projections are this package's.

    Layer `l` of the music UNet's decoder meets `image_layers[l]` of the picture UNet's. Both start at the deepest
    layer; where their numbers differ, they are matched by relative position. `from_unets` builds one.

    Args:
        image_layers: For each music layer, the name of the picture's self-attention (`attn1`) that it meets.
        image_widths: The widths `C_I` of those layers.
        music_layers: The names of the music UNet's decoder layers at the cross-attention position (`attn2`).
        music_widths: The widths `C_M` of those layers.
        music_levels: How many times each music layer's block halves the latents' sides.
        projection: `"linear"` (learned bias-free maps `C_I -> C_M`, initialised to average pooling) or `"pool"`
            (average pooling over channels, without parameters).
        image_latents: Where the picture's latents came from in training, `"inversion"` or `"noising"`.
            `None` before training.
        num_inversion_steps: The inversion grid used in training. `None` before training or with `"noising"`.
        image_size: The side of the pictures in training, in pixels. `None` before training.
        music_texts: The music UNet's argument whose text sequence each music layer attends to, None for a layer that
            attends to the music. None in place of the list, as in older configs, is a UNet without text sequences.

    Raises:
        ValueError: If the lists differ in length or are empty, or `projection` is unknown.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        image_layers: list[str],
        image_widths: list[int],
        music_layers: list[str],
        music_widths: list[int],
        music_levels: list[int],
        projection: str = "linear",
        image_latents: str | None = None,
        num_inversion_steps: int | None = None,
        image_size: int | None = None,
        music_texts: list[str | None] | None = None,
    ) -> None:
        super().__init__()
        lists = (image_layers, image_widths, music_layers, music_widths, music_levels, music_texts)
        lengths = {len(names) for names in lists if names is not None}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(f"The layer lists of `VisualSynapse` must have one length above zero, got {lengths}.")
        if projection not in ("linear", "pool"):
            raise ValueError(f"`projection` must be 'linear' or 'pool', got {projection!r}.")

        self.alphas = nn.Parameter(torch.zeros(len(music_layers)))
        if projection == "linear":
            widths = list(zip(image_widths, music_widths))
            self.key_projections = nn.ModuleList(nn.Linear(*width, bias=False) for width in widths)
            self.value_projections = nn.ModuleList(nn.Linear(*width, bias=False) for width in widths)
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets alpha to 0 and the projections to average pooling: an untrained synapse."""
        self.alphas.zero_()
        if self.config.projection == "linear":
            for projection in (*self.key_projections, *self.value_projections):
                projection.weight.copy_(pooling_matrix(projection.in_features, projection.out_features))

    @classmethod
    def from_unets(
        cls, image_unet: ModelMixin, unet: ModelMixin, projection: str = "linear", layers: str | None = None
    ) -> "VisualSynapse":
        """Builds an untrained synapse (alpha = 0) between two UNets.

        Args:
            image_unet: The text-to-image `UNet2DConditionModel`.
            unet: The text-to-music `UNet2DConditionModel` or `AudioLDM2UNet2DConditionModel`.
            projection: `"linear"` or `"pool"`.
            layers: Which of the music UNet's decoder layers at the cross-attention position blend: `"self"` (those
                without a text sequence), `"text"` (those with one) or `"all"`. None is `"self"` where the UNet has
                such layers (AudioLDM, MusicLDM, AudioLDM 2), else `"text"`. In a layer with text the picture takes
                the places of the text's tokens, and what the text's mask hides stays hidden.

        Returns:
            A synapse with one layer for each of those layers.

        Raises:
            ValueError: If `layers` is unknown, or either decoder has no such attention layer; the message names both.
        """
        if layers not in (None, "self", "text", "all"):
            raise ValueError(f"`layers` must be 'self', 'text', 'all' or None, got {layers!r}.")
        image, music = decoder_layers(image_unet, "attn1"), decoder_layers(unet, "attn2")
        texts = {name: text_argument(unet, name) for name, _, _ in music}
        if layers is None:
            layers = "self" if None in texts.values() else "text"
        if layers != "all":
            music = [layer for layer in music if (texts[layer[0]] is None) == (layers == "self")]
        if not image or not music:
            raise ValueError(
                "The decoders of `image_unet` and `unet` cannot be matched: `image_unet` has"
                f" {len(image)} self-attention layers in its up blocks {image_unet.config.up_block_types}, `unet` has"
                f" {len(music)} layers at the cross-attention position in {unet.config.up_block_types} (layers="
                f"{layers!r} of {len(texts)}). Both need one at least: use UNets with `CrossAttnUpBlock2D`."
            )
        # The middle of each music layer's share of the depth, in whole numbers: equal counts meet one to one.
        matched = [image[(2 * index + 1) * len(image) // (2 * len(music))] for index in range(len(music))]
        return cls(
            image_layers=[name for name, _, _ in matched],
            image_widths=[width for _, width, _ in matched],
            music_layers=[name for name, _, _ in music],
            music_widths=[width for _, width, _ in music],
            music_levels=[level for _, _, level in music],
            music_texts=[texts[name] for name, _, _ in music],
            projection=projection,
        )

    def check_unets(self, image_unet: ModelMixin | None, unet: ModelMixin | None) -> None:
        """Refuses UNets whose layers are not those that this synapse connects.

        Args:
            image_unet: The text-to-image UNet; None is not checked.
            unet: The text-to-music UNet; None is not checked.

        Raises:
            ValueError: Naming the first layer that is missing, of another width, or of another text sequence.
        """
        config = self.config
        for name, model, layers, widths in (
            ("image_unet", image_unet, config.image_layers, config.image_widths),
            ("unet", unet, config.music_layers, config.music_widths),
        ):
            if model is None:
                continue
            found = {layer: _key_width(model, layer) for layer in layers}
            _check_widths(f"`{name}`", found, dict(zip(layers, widths)))
        for layer, expected in zip(config.music_layers, self.music_texts):
            if unet is not None and (text := text_argument(unet, layer)) != expected:
                raise ValueError(
                    f"`unet` does not fit `synapse`, which expects {layer} to attend to {expected or 'the music'}: in"
                    f" `unet`, a {type(unet).__name__}, it attends to {text or 'the music'}. Use what the synapse was"
                    " made for, or build another with `VisualSynapse.from_unets(image_unet, unet)`."
                )

    def check_image_features(self, keys: dict[str, torch.Tensor]) -> None:
        """Refuses recorded keys of a UNet other than the one that this synapse reads.

        Args:
            keys: By picture layer, `[..., tokens, channels]`.

        Raises:
            ValueError: Naming the first layer that is missing or of another width.
        """
        found = {layer: key.shape[-1] for layer, key in keys.items()}
        _check_widths("`image_features`", found, dict(zip(self.config.image_layers, self.config.image_widths)))

    @property
    def music_texts(self) -> list[str | None]:
        """The music UNet's argument whose text sequence each music layer attends to, None where that is the music."""
        return self.config.music_texts or [None] * len(self.config.music_layers)

    def num_tokens(
        self, latent_height: int, latent_width: int, text_tokens: Mapping[str, int] | None = None
    ) -> list[int]:
        """Gives the number of tokens that each music layer attends to.

        Args:
            latent_height: Of the music latents.
            latent_width: Likewise.
            text_tokens: The length of each text sequence by the UNet's argument, where the synapse blends layers with
                text.

        Returns:
            `N_M` of each layer.

        Raises:
            ValueError: If a layer attends to a text whose length is not given.
        """
        tokens = []
        for level, text in zip(self.config.music_levels, self.music_texts):
            if text is not None and text not in (text_tokens or {}):
                raise ValueError(
                    f"The synapse blends layers that attend to `{text}`: give its length in `text_tokens`."
                )
            # Negated floor division rounds up, as the UNet's strided convolutions do.
            music = -(-latent_height // 2**level) * -(-latent_width // 2**level)
            tokens.append(music if text is None else text_tokens[text])
        return tokens

    def forward(
        self,
        keys: dict[str, torch.Tensor],
        values: dict[str, torch.Tensor],
        num_tokens: list[int],
        scale: float | list[float] = 1.0,
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
        """Fits recorded keys and values to the music UNet: `P_K(K_l^I)`, `P_V(V_l^I)` and `alpha_l`.

        Tokens are average-pooled before channels are mapped; the two commute, and this order is cheaper.

        Args:
            keys: By picture layer, `[..., N_I, C_I]` with any leading dimensions (steps, pictures).
            values: As `keys`.
            num_tokens: `N_M` of each music layer, see `num_tokens`.
            scale: Multiplies every alpha, or one number for each layer.

        Returns:
            Keys and values by music layer, each `[..., N_M, C_M]`, and the scaled alphas `[layers]`.
        """
        music_keys, music_values = {}, {}
        layers = zip(self.config.image_layers, self.config.music_layers, num_tokens, strict=True)
        for index, (image_layer, music_layer, tokens) in enumerate(layers):
            music_keys[music_layer] = self._project("key_projections", index, keys[image_layer], tokens)
            music_values[music_layer] = self._project("value_projections", index, values[image_layer], tokens)
        scale = torch.as_tensor(scale, dtype=self.alphas.dtype, device=self.alphas.device)
        return music_keys, music_values, self.alphas * scale

    def _project(self, projections: str, index: int, states: torch.Tensor, num_tokens: int) -> torch.Tensor:
        states = states.to(self.alphas)
        if states.shape[-2] != num_tokens:
            states = _pooling_matrix_as(states.shape[-2], num_tokens, states.device, states.dtype) @ states
        if self.config.projection == "linear":
            return getattr(self, projections)[index](states)
        width = self.config.music_widths[index]
        return F.linear(states, _pooling_matrix_as(states.shape[-1], width, states.device, states.dtype))


def _key_width(model: ModelMixin, layer: str) -> int | None:
    try:
        return model.get_submodule(layer).to_k.out_features
    except AttributeError:
        return None


def _check_widths(name: str, found: dict[str, int | None], expected: dict[str, int]) -> None:
    for layer, width in expected.items():
        if found.get(layer) != width:
            raise ValueError(
                f"{name} does not fit `synapse`, which expects {layer} with {width} channels: {name} has"
                f" {f'{found[layer]} channels there' if found.get(layer) else 'no such layer'}. Use what the synapse"
                " was made for, or build another with `VisualSynapse.from_unets(image_unet, unet)`."
            )

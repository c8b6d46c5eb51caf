"""Music models whose UNet attends to a text: one small class for each family, and how a family is told."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AudioLDM2ProjectionModel, AudioLDM2UNet2DConditionModel, UNet2DConditionModel
from transformers import (
    ClapModel,
    ClapTextModelWithProjection,
    GPT2LMHeadModel,
    RobertaTokenizer,
    T5EncoderModel,
    T5Tokenizer,
)

from .checks_melfusion import check_float_tensor
from .prompts_melfusion import ClapPrompts, check_encoders, check_family, tokenize
from .windows_melfusion import Windows

# Tokenizers that know no limit say that they take 1e30 tokens.
MAX_TEXT_TOKENS = 4096


class TextEmbeds(dict):
    """The UNet's text arguments by name; a slice takes rows of each, as diffusers' callbacks do with a tensor."""

    def __getitem__(self, key: str | slice) -> "torch.Tensor | TextEmbeds":
        if isinstance(key, slice):
            return TextEmbeds({name: rows[key] for name, rows in self.items()})
        return super().__getitem__(key)


class TextPrompts:
    """UNets with one text sequence, in Tango's shape: T5's states, and a mask that says which are no padding.

    The methods are described in `ClapPrompts`. The form of embeddings is a dict, `encoder_hidden_states`
    `[prompts, tokens, channels]` and `encoder_attention_mask` `[prompts, tokens]`. Texts are padded to
    `tokenizer.model_max_length`, so that a prompt does not depend on its batch-mates.

    Args:
        pipe: The pipeline whose components encode.
    """

    name = "a UNet with one text sequence"
    unet_class = UNet2DConditionModel
    components = {"text_encoder": T5EncoderModel, "tokenizer": T5Tokenizer}
    # The UNet's arguments for text, each with the one for its mask.
    masks = {"encoder_hidden_states": "encoder_attention_mask"}

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    @property
    def widths(self) -> dict[str, int]:
        """The channels of each text sequence that the UNet takes."""
        return {"encoder_hidden_states": self.pipe.unet.config.cross_attention_dim}

    def check_components(self) -> None:
        """Refuses components of another family of music models.

        Raises:
            ValueError: If a component is of another kind than `components` tells, or makes texts of a width that the
                UNet does not take.
        """
        check_family(self.pipe, self)
        encoder, unet = self.pipe.text_encoder, self.pipe.unet
        if None not in (encoder, unet):
            _check_width("text_encoder", encoder.config.d_model, "encoder_hidden_states", self.widths)

    def check(self, name: str, prompt_embeds: dict[str, torch.Tensor]) -> int:
        """Refuses embeddings that the UNet cannot take.

        Args:
            name: The argument's name, for messages.
            prompt_embeds: To be in the form of this class, each tensor `[prompts, tokens, ...]`.

        Returns:
            The number of prompts.

        Raises:
            TypeError: If it is no dict of tensors.
            ValueError: If an argument is missing or unknown, has another shape, or holds NaN or infinite values.
        """
        return check_texts(name, prompt_embeds, self.widths, self.masks)

    def encode(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        prompt_embeds: dict[str, torch.Tensor] | None,
        negative_prompt_embeds: dict[str, torch.Tensor] | None,
        do_classifier_free_guidance: bool,
        device: torch.device,
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
        """Encodes texts, and takes embeddings that are given in their place as they are.

        Args:
            prompt: One text or a list; not needed with `prompt_embeds`.
            negative_prompt: One text for all, or a list as long as the prompts. None is the empty text.
            prompt_embeds: In the form of this class, each tensor `[prompts, tokens, ...]`, or None.
            negative_prompt_embeds: As `prompt_embeds`, or of one prompt for all.
            do_classifier_free_guidance: Whether the negative prompt is needed.
            device: Where to encode.

        Returns:
            `prompt_embeds` and `negative_prompt_embeds`, with equal numbers of prompts and tokens; the latter None
            without guidance.

        Raises:
            ValueError: If texts are given, but no encoder, or lengths that no mask can make equal.
        """
        encodes_negative = do_classifier_free_guidance and negative_prompt_embeds is None
        if prompt_embeds is None or encodes_negative:
            prompts = [prompt] if isinstance(prompt, str) else prompt
            negatives = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt or ""]
            given = None if prompt_embeds is None else self._move(prompt_embeds, device)
            prompt_embeds, negatives = self._embed_pairs(prompts, negatives, given, encodes_negative, device)
            negative_prompt_embeds = negatives if encodes_negative else negative_prompt_embeds
        if not do_classifier_free_guidance:
            return self._move(prompt_embeds, device), None
        return pair_texts(self._move(prompt_embeds, device), self._move(negative_prompt_embeds, device), self.masks)

    def _embed_pairs(
        self,
        prompts: list[str] | None,
        negatives: list[str],
        given: dict[str, torch.Tensor] | None,
        with_negatives: bool,
        device: torch.device,
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
        """Encodes prompts that are not `given`, and negative prompts."""
        prompt_embeds = self._embed(prompts, device) if given is None else given
        return prompt_embeds, self._embed(negatives, device) if with_negatives else None

    def _embed(self, texts: list[str], device: torch.device) -> dict[str, torch.Tensor]:
        check_encoders(self.pipe, self)
        tokenizer, max_length = self.pipe.tokenizer, self.pipe.tokenizer.model_max_length
        if max_length > MAX_TEXT_TOKENS:
            raise ValueError(
                f"`tokenizer.model_max_length` is {max_length:g}, but texts are padded to it: set the length that the"
                " music model was trained with."
            )
        inputs = tokenize(tokenizer, texts, max_length, device)
        states = self.pipe.text_encoder(inputs.input_ids, attention_mask=inputs.attention_mask)[0]
        return {"encoder_hidden_states": states, "encoder_attention_mask": inputs.attention_mask}

    def _move(self, prompt_embeds: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
        # Transformers loads a half-precision checkpoint as it is stored, diffusers in float32.
        dtype = (self.pipe.text_encoder if self.pipe.unet is None else self.pipe.unet).dtype
        return {
            name: rows.to(device, dtype if rows.is_floating_point() else None) for name, rows in prompt_embeds.items()
        }

    def to_unet(self, prompt_embeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Gives the UNet's arguments by name, each with one row a prompt.

        Args:
            prompt_embeds: In the form of this class, which is the UNet's; each `[prompts, tokens, ...]`.

        Returns:
            The same.
        """
        return prompt_embeds

    def from_unet(self, arguments: dict[str, torch.Tensor]) -> TextEmbeds:
        """Gives the embeddings of which `to_unet` made `arguments`.

        Args:
            arguments: The UNet's arguments by name, each `[prompts, tokens, ...]`.

        Returns:
            The same, with rows that callbacks can take.
        """
        return TextEmbeds(arguments)

    def see(self, arguments: dict[str, torch.Tensor], windows: Windows, group: range) -> dict[str, torch.Tensor]:
        """Gives each window of a storyboard the mean of its pictures' texts, weighted by their shares.

        At each token the mean is that of the texts that have one there.

        Args:
            arguments: What each picture's prompt became, `[pictures, ..., tokens, channels]`, and masks.
            windows: The windows, with the pictures' places in them.
            group: Which of them.

        Returns:
            The arguments, each `[windows of the group, ..., tokens, channels]`.
        """
        seen = {}
        for name in self.widths:
            states, mask = arguments[name], arguments.get(self.masks.get(name))
            if mask is None:
                seen[name] = windows.see(states, group)
                continue
            kept = mask.to(states.dtype)[..., None]
            weight = windows.see(kept, group)
            tiny = torch.finfo(weight.dtype).tiny
            seen[name] = windows.see(states * kept, group) / weight.clamp(min=tiny)
            seen[self.masks[name]] = (weight[..., 0] > 0).to(mask.dtype)
        return seen


class AudioLDM2Prompts(TextPrompts):
    """AudioLDM 2: eight tokens that GPT-2 makes of CLAP's and T5's view of the text, and T5's states with a mask.

    The form of embeddings is a dict: `encoder_hidden_states` `[prompts, 8, channels]` (GPT-2's),
    `encoder_hidden_states_1` `[prompts, tokens, channels]` (T5's) and `encoder_attention_mask_1` `[prompts, tokens]`.

    The encoding is that of diffusers' `AudioLDM2Pipeline`. It pads to the longest text of the batch, and GPT-2 counts
    the padding: what a prompt becomes depends on its batch-mates there, and so it does here. A negative prompt is
    padded and cut to the length of its prompt.
    """

    name = "AudioLDM 2"
    unet_class = AudioLDM2UNet2DConditionModel
    components = {
        "text_encoder": ClapTextModelWithProjection,
        "tokenizer": RobertaTokenizer,
        "text_encoder_2": T5EncoderModel,
        "tokenizer_2": T5Tokenizer,
        "projection_model": AudioLDM2ProjectionModel,
        # Public checkpoints name a `GPT2Model`, which cannot generate any longer; this class reads its files.
        "language_model": GPT2LMHeadModel,
    }
    masks = {"encoder_hidden_states_1": "encoder_attention_mask_1"}

    @property
    def widths(self) -> dict[str, int]:
        """The channels of each text sequence that the UNet takes."""
        _, *widths = self.pipe.unet.config.cross_attention_dim[-1]
        return dict(zip(("encoder_hidden_states", "encoder_hidden_states_1"), widths))

    def check_components(self) -> None:
        """Refuses components of another family of music models.

        Raises:
            ValueError: If a component is of another kind than `components` tells, or makes texts of a width that the
                UNet does not take.
        """
        pipe = self.pipe
        check_family(pipe, self)
        given = {name: getattr(pipe, name) for name in self.components}
        missing = [name for name, component in given.items() if component is None]
        if missing and len(missing) < len(given):
            present = [name for name in given if name not in missing]
            raise ValueError(
                f"{', '.join(missing)} must be given beside {', '.join(present)}: `unet` is that of {self.name}, which"
                " encodes texts with all of them. Without any, pass `prompt_embeds`."
            )
        if pipe.unet is not None and not missing:
            _check_width("language_model", pipe.language_model.config.n_embd, "encoder_hidden_states", self.widths)
            _check_width("text_encoder_2", pipe.text_encoder_2.config.d_model, "encoder_hidden_states_1", self.widths)

    def _embed_pairs(
        self,
        prompts: list[str] | None,
        negatives: list[str],
        given: dict[str, torch.Tensor] | None,
        with_negatives: bool,
        device: torch.device,
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
        """Lets the library encode prompts that are not `given`, and negative prompts."""
        # Here, because it imports librosa where that is installed, which takes its time.
        from diffusers import AudioLDM2Pipeline

        check_encoders(self.pipe, self)
        parts = {name: getattr(self.pipe, name) for name in self.components}
        parts["text_encoder"] = _ClapText(self.pipe.text_encoder)
        parts["projection_model"] = _Projection(self.pipe.projection_model, self.pipe.language_model.dtype)
        nothing = dict.fromkeys(("vae", "unet", "scheduler", "vocoder", "feature_extractor"))
        embeds = {}
        if given is not None:
            prompts = [""] * len(given["encoder_hidden_states"])
            embeds["generated_prompt_embeds"] = given["encoder_hidden_states"]
            embeds["prompt_embeds"] = given["encoder_hidden_states_1"]
            embeds["attention_mask"] = given["encoder_attention_mask_1"]
        states, mask, generated = AudioLDM2Pipeline(**parts, **nothing).encode_prompt(
            prompts,
            device,
            1,
            with_negatives,
            negative_prompt=negatives * (len(prompts) // len(negatives)),
            **embeds,
        )
        encoded = {
            "encoder_hidden_states": generated,
            "encoder_hidden_states_1": states,
            "encoder_attention_mask_1": mask,
        }
        if not with_negatives:
            return encoded, None
        halves = {name: rows.chunk(2) for name, rows in encoded.items()}
        return {name: rows for name, (_, rows) in halves.items()}, {name: rows for name, (rows, _) in halves.items()}


class _ClapText:
    """CLAP's text tower as `AudioLDM2Pipeline` uses a `ClapModel`, but run as a module, as offload hooks need it."""

    config = SimpleNamespace(model_type="clap")

    def __init__(self, text_encoder: ClapTextModelWithProjection) -> None:
        self.text_encoder = text_encoder

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Gives the embeddings, `[texts, channels]` with L2 norm 1."""
        return F.normalize(self.text_encoder(input_ids, attention_mask=attention_mask).text_embeds, dim=-1)


class _Projection:
    """The projection model where it, the encoders before it and the language model after it differ in dtype."""

    def __init__(self, projection_model: AudioLDM2ProjectionModel, dtype: torch.dtype) -> None:
        self.projection_model, self.dtype = projection_model, dtype

    def __call__(self, hidden_states: torch.Tensor, hidden_states_1: torch.Tensor, **masks: torch.Tensor) -> Any:
        own = self.projection_model.dtype
        output = self.projection_model(hidden_states.to(own), hidden_states_1.to(own), **masks)
        output.hidden_states = output.hidden_states.to(self.dtype)
        return output


def family_of(unet_config: Mapping[str, Any]) -> type:
    """Tells the family of music models by the configuration of its UNet.

    Args:
        unet_config: What the UNet's `config.json` holds.

    Returns:
        `ClapPrompts`, `AudioLDM2Prompts` or `TextPrompts`.
    """
    if unet_config.get("_class_name") == AudioLDM2UNet2DConditionModel.__name__:
        return AudioLDM2Prompts
    return ClapPrompts if unet_config.get("class_embed_type") == "simple_projection" else TextPrompts


def family_of_pipeline(pipe: Any) -> type:
    """Tells the family of a pipeline's music model: by its UNet, or, where it has none, by what encodes its texts.

    Args:
        pipe: The pipeline.

    Returns:
        As `family_of`.
    """
    if pipe.unet is None:
        encoder = TextPrompts if isinstance(pipe.text_encoder, T5EncoderModel) else ClapPrompts
        return encoder if pipe.language_model is None else AudioLDM2Prompts
    # Of a compiled UNet the module inside.
    unet = getattr(pipe.unet, "_orig_mod", pipe.unet)
    return family_of({**unet.config, "_class_name": type(unet).__name__})


def text_tower(text_encoder: Any) -> Any:
    """Gives the text half of a `ClapModel`, which is what music models use of it; others stay as they are.

    Args:
        text_encoder: The model.

    Returns:
        A `ClapTextModelWithProjection` that shares its weights, or `text_encoder`.
    """
    if not isinstance(text_encoder, ClapModel):
        return text_encoder
    with torch.device("meta"):
        tower = ClapTextModelWithProjection(text_encoder.config.text_config)
    tower.text_model, tower.text_projection = text_encoder.text_model, text_encoder.text_projection
    return tower.train(text_encoder.training)


def _check_width(name: str, width: int, argument: str, widths: dict[str, int]) -> None:
    if width != widths[argument]:
        raise ValueError(
            f"`{name}` makes texts of {width} channels, but `unet` takes {widths[argument]} as `{argument}`: they do"
            " not belong together."
        )


def text_lengths(arguments: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Gives the number of tokens of each text sequence among the UNet's arguments.

    Args:
        arguments: By name; a text sequence is `[rows, tokens, channels]`.

    Returns:
        The numbers by name.
    """
    return {name: rows.shape[1] for name, rows in arguments.items() if rows.ndim == 3}


def check_texts(name: str, prompt_embeds: Any, widths: dict[str, int], masks: dict[str, str]) -> int:
    """Refuses text sequences that the UNet cannot take.

    Args:
        name: The argument's name, for messages.
        prompt_embeds: To be a dict of the UNet's arguments, each with one row a prompt.
        widths: The channels of each text sequence.
        masks: The mask's argument of sequences that have one.

    Returns:
        The number of prompts.

    Raises:
        TypeError: If it is no dict of tensors.
        ValueError: If an argument is missing or unknown, has another shape, or holds NaN or infinite values.
    """
    expected = {*widths, *masks.values()}
    if not isinstance(prompt_embeds, dict):
        raise TypeError(
            f"`{name}` must be a dict of {sorted(expected)}, as `encode_prompt` returns it, got"
            f" {type(prompt_embeds).__name__}."
        )
    if prompt_embeds.keys() != expected:
        raise ValueError(f"`{name}` must hold {sorted(expected)}, got {sorted(map(str, prompt_embeds))}.")
    num_prompts = None
    for argument, width in widths.items():
        states = prompt_embeds[argument]
        check_float_tensor(f"{name}[{argument!r}]", states)
        num_prompts = len(states) if num_prompts is None and states.ndim else num_prompts
        if states.ndim != 3 or 0 in states.shape or states.shape[2] != width or len(states) != num_prompts:
            raise ValueError(
                f"`{name}[{argument!r}]` must have the shape [prompts, tokens, {width}], with as many prompts as the"
                f" others, got {list(states.shape)}."
            )
        if not states.isfinite().all():
            raise ValueError(f"`{name}[{argument!r}]` holds NaN or infinite values.")
        mask = prompt_embeds.get(masks.get(argument))
        if argument in masks and (not isinstance(mask, torch.Tensor) or mask.shape != states.shape[:2]):
            raise ValueError(
                f"`{name}[{masks[argument]!r}]` must be a tensor of the shape {list(states.shape[:2])}, 1 for tokens"
                " and 0 for padding."
            )
    return num_prompts


def pair_texts(
    prompts: dict[str, torch.Tensor], negatives: dict[str, torch.Tensor], masks: dict[str, str]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Gives prompts and negative prompts the same numbers of rows and tokens.

    Args:
        prompts: The UNet's arguments, `[prompts, tokens, ...]`.
        negatives: Likewise, of as many rows, or one for all prompts.
        masks: The mask's argument of sequences that have one: only these can be padded.

    Returns:
        Both.

    Raises:
        ValueError: If a sequence without a mask has two lengths.
    """
    lengths = {name: max(part[name].shape[1] for part in (prompts, negatives)) for name in prompts}
    for name in prompts.keys() - masks.keys() - set(masks.values()):
        if prompts[name].shape[1] != negatives[name].shape[1]:
            raise ValueError(
                f"`prompt_embeds[{name!r}]` has {prompts[name].shape[1]} tokens, `negative_prompt_embeds`"
                f" {negatives[name].shape[1]}: they must have as many, for no mask says which are padding."
            )
    prompts, negatives = pad_texts(prompts, lengths), pad_texts(negatives, lengths)
    return prompts, {name: rows.expand_as(prompts[name]) for name, rows in negatives.items()}


def pad_texts(arguments: dict[str, torch.Tensor], lengths: dict[str, int]) -> dict[str, torch.Tensor]:
    """Appends zeros to the tokens, which a mask hides.

    Args:
        arguments: The UNet's arguments by name, each `[prompts, tokens, ...]`.
        lengths: The number of tokens to reach, by name.

    Returns:
        The arguments, of these lengths.
    """
    return {
        name: F.pad(rows, (0, 0) * (rows.ndim - 2) + (0, lengths[name] - rows.shape[1]))
        for name, rows in arguments.items()
    }

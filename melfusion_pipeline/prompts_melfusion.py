"""How a prompt becomes arguments of the music UNet: one small class for each family of music models."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.utils import logging
from transformers import ClapTextModelWithProjection, RobertaTokenizer

from .checks_melfusion import check_float_tensor
from .windows_melfusion import Windows

logger = logging.get_logger(__name__)

# What encodes the prompts of any family; a pipeline has those of its own, and None in place of the others.
TEXT_COMPONENTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "projection_model", "language_model")


def tokenize(tokenizer: Any, texts: list[str], max_length: int, device: torch.device) -> Any:
    """Turns texts into tokens, padded to one length; a text that is longer is cut with a warning.

    Args:
        tokenizer: A tokenizer of transformers.
        texts: The texts.
        max_length: The length in tokens.
        device: Where the tokens are to lie.

    Returns:
        `input_ids` and `attention_mask`, each `[texts, max_length]`.
    """
    inputs = tokenizer(texts, padding="max_length", max_length=max_length, truncation=True, return_tensors="pt")
    # Not `verbose`: transformers would warn of errors that cutting the text prevents.
    longest = max(len(ids) for ids in tokenizer(texts, verbose=False).input_ids)
    if longest > max_length:
        logger.warning(f"A text of {longest} tokens was cut to the {max_length} that the text encoder takes.")
    return inputs.to(device)


class ClapPrompts:
    """AudioLDM and MusicLDM: a text is one CLAP embedding, which their UNet takes as `class_labels`.

    Every family has these methods. `check_components` refuses what another family encodes with. `encode` gives
    embeddings in the form in which `__call__` and callbacks take them (here a tensor), `check` refuses another form,
    `to_unet` and `from_unet` change between that form and the UNet's arguments by name, each with one row a prompt,
    and `see` says what a window hears that lies in several pictures of a storyboard with a prompt each.

    Args:
        pipe: The pipeline whose components encode.
    """

    name = "AudioLDM"
    unet_class = UNet2DConditionModel
    components = {"text_encoder": ClapTextModelWithProjection, "tokenizer": RobertaTokenizer}

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def check_components(self) -> None:
        """Refuses components that do not encode texts for the pipeline's UNet; those that are None are not checked.

        Raises:
            ValueError: Naming the component.
        """
        check_family(self.pipe, self)

    def check(self, name: str, prompt_embeds: torch.Tensor) -> int:
        """Refuses embeddings that the UNet cannot take.

        Args:
            name: The argument's name, for messages.
            prompt_embeds: To be `[prompts, channels]`.

        Returns:
            The number of prompts.

        Raises:
            TypeError: If it is no tensor of floating-point numbers.
            ValueError: If it has another shape, or holds NaN or infinite values.
        """
        check_float_tensor(name, prompt_embeds)
        width = self.pipe.unet.config.projection_class_embeddings_input_dim
        if prompt_embeds.ndim != 2 or prompt_embeds.shape[1] != width or not len(prompt_embeds):
            raise ValueError(f"`{name}` must have the shape [prompts, {width}], got {list(prompt_embeds.shape)}.")
        if not prompt_embeds.isfinite().all():
            raise ValueError(f"`{name}` holds NaN or infinite values.")
        return len(prompt_embeds)

    def encode(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
        do_classifier_free_guidance: bool,
        device: torch.device,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encodes texts, and takes embeddings that are given in their place as they are.

        Args:
            prompt: One text or a list; not needed with `prompt_embeds`.
            negative_prompt: One text for all, or a list as long as the prompts. None is the empty text.
            prompt_embeds: `[prompts, channels]` or None.
            negative_prompt_embeds: As `prompt_embeds`, or `[1, channels]` for all prompts.
            do_classifier_free_guidance: Whether the negative prompt is needed.
            device: Where to encode.

        Returns:
            `prompt_embeds` and `negative_prompt_embeds`, each `[prompts, channels]` with L2 norm 1; the latter None
            without guidance.
        """
        # Transformers loads a half-precision checkpoint as it is stored, diffusers in float32.
        dtype = (self.pipe.text_encoder if self.pipe.unet is None else self.pipe.unet).dtype
        if prompt_embeds is None:
            prompts = [prompt] if isinstance(prompt, str) else prompt
            prompt_embeds = self._embed(prompts, None, device)
        prompt_embeds = prompt_embeds.to(device=device, dtype=dtype)
        if not do_classifier_free_guidance:
            return prompt_embeds, None
        if negative_prompt_embeds is None:
            negatives = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt or ""]
            negatives = negatives * (len(prompt_embeds) // len(negatives))
            # AudioLDM pads negative prompts to the width of the embeddings; for its equal output so must we.
            negative_prompt_embeds = self._embed(negatives, prompt_embeds.shape[1], device)
        return prompt_embeds, negative_prompt_embeds.to(device=device, dtype=dtype).expand_as(prompt_embeds)

    def _embed(self, texts: list[str], max_length: int | None, device: torch.device) -> torch.Tensor:
        check_encoders(self.pipe, self)
        text_encoder, tokenizer = self.pipe.text_encoder, self.pipe.tokenizer
        inputs = tokenize(tokenizer, texts, min(max_length or math.inf, tokenizer.model_max_length), device)
        embeds = text_encoder(inputs.input_ids, attention_mask=inputs.attention_mask).text_embeds
        return F.normalize(embeds, dim=-1)

    def to_unet(self, prompt_embeds: torch.Tensor) -> dict[str, torch.Tensor]:
        """Gives the UNet's arguments by name of `prompt_embeds`, `[prompts, channels]`; each has a row a prompt."""
        return {"class_labels": prompt_embeds}

    def from_unet(self, arguments: dict[str, torch.Tensor]) -> torch.Tensor:
        """Gives the embeddings, `[prompts, channels]`, of which `to_unet` made `arguments`."""
        return arguments["class_labels"]

    def see(self, arguments: dict[str, torch.Tensor], windows: Windows, group: range) -> dict[str, torch.Tensor]:
        """Gives each window of a storyboard the mean of its pictures' embeddings, weighted by their shares.

        CLAP's embeddings have one length; a mean of several is shorter, and unlike what the UNet was trained on. So it
        is made as long as they are.

        Args:
            arguments: What each picture's prompt became, `[pictures, ..., channels]`.
            windows: The windows, with the pictures' places in them.
            group: Which of them.

        Returns:
            `[windows of the group, ..., channels]`.
        """
        embeds = arguments["class_labels"]
        seen, lengths = windows.see(embeds, group), windows.see(embeds.norm(dim=-1, keepdim=True), group)
        tiny = torch.finfo(seen.dtype).tiny
        return {"class_labels": seen * (lengths / seen.norm(dim=-1, keepdim=True).clamp(min=tiny))}


def check_family(pipe: Any, family: Any) -> None:
    """Refuses components with which another family of music models encodes texts.

    Args:
        pipe: The pipeline; components that are None are not checked.
        family: That of its UNet.

    Raises:
        ValueError: Naming the component.
    """
    for name in TEXT_COMPONENTS:
        component, wanted = getattr(pipe, name), family.components.get(name)
        if component is not None and wanted is None:
            raise ValueError(f"`{name}` has no use where `unet` is that of {family.name}: leave it out.")
        found = getattr(getattr(component, "config", None), "model_type", None)
        # Of models by others in this place too, such as quantised ones; tokenizers know no kind.
        if found and wanted.config_class.model_type.partition("_")[0] not in found:
            raise ValueError(
                f"`unet` is that of {family.name} and needs a {wanted.__name__} as `{name}`, but that is a"
                f" {type(component).__name__}: is one of them the picture's, or another music model's?"
            )


def check_encoders(pipe: Any, family: Any) -> None:
    """Refuses texts where a component with which the family encodes them is missing.

    Args:
        pipe: The pipeline.
        family: The class of its prompts, or an instance: its `components` tell what is needed.

    Raises:
        ValueError: If one of them is None; the message names it.
    """
    missing = [f"`{name}`" for name in family.components if getattr(pipe, name) is None]
    if missing:
        raise ValueError(
            f"Texts cannot be encoded without {' and '.join(missing)}: pass `prompt_embeds` and, for `guidance_scale`"
            " above 1, `negative_prompt_embeds`."
        )


def repeat_prompts(
    arguments: dict[str, torch.Tensor], num_texts: int, num_waveforms_per_prompt: int
) -> dict[str, torch.Tensor]:
    """Gives each waveform a row of its own.

    Args:
        arguments: The UNet's arguments by name for one guidance branch, each `[prompts or 1, ...]`.
        num_texts: The number of prompts, or of the pictures that one prompt meets.
        num_waveforms_per_prompt: The number of waveforms for each.

    Returns:
        The arguments, each `[num_texts * num_waveforms_per_prompt, ...]`.
    """
    return {
        name: rows.expand(num_texts, *rows.shape[1:]).repeat_interleave(num_waveforms_per_prompt, dim=0)
        for name, rows in arguments.items()
    }


def prompts_of_windows(
    family: ClapPrompts,
    arguments: dict[str, torch.Tensor],
    layout: tuple[int, int, int],
    windows: Windows,
    group: range,
) -> dict[str, torch.Tensor]:
    """Gives each row of the UNet's batch its prompt: the same in all windows, or, of a storyboard, what a window sees.

    Args:
        family: That of the music model.
        arguments: The UNet's arguments by name, each `[guidance branches * prompts * waveforms, ...]`.
        layout: The numbers of these three; one of them may be -1.
        windows: The windows.
        group: Which of them go through the UNet.

    Returns:
        The arguments, each `[guidance branches * prompts * windows * waveforms, ...]`; of a storyboard with a prompt a
        picture `[guidance branches * windows * waveforms, ...]`.
    """
    laid_out = {name: rows.unflatten(0, layout) for name, rows in arguments.items()}
    num_prompts = next(iter(laid_out.values())).shape[1]
    if windows.image_starts is not None and num_prompts > 1:
        of_pictures = {name: rows.movedim(1, 0) for name, rows in laid_out.items()}
        seen = family.see(of_pictures, windows, group)
        return {name: rows.movedim(0, 1).flatten(0, 2) for name, rows in seen.items()}
    return {
        name: rows.unsqueeze(2).expand(-1, -1, len(group), *rows.shape[2:]).flatten(0, 3)
        for name, rows in laid_out.items()
    }

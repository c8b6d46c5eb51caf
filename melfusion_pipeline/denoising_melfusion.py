"""One step of denoising: the music UNet runs on every window of a piece, in every guidance branch."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.utils.torch_utils import is_compiled_module

from .attention_melfusion import KVBlenders
from .guidance_melfusion import Guidance
from .prompts_melfusion import ClapPrompts, prompts_of_windows
from .windows_melfusion import Windows


@dataclass(frozen=True)
class NoisePredictor:
    """The music UNet, with all that stays the same over the steps of a call.

    The UNet's batch is laid out as (guidance branch, prompt or picture, window, waveform), or, of a storyboard, as
    (guidance branch, window, waveform). So what is blended is broadcast in either case.

    Args:
        unet: The music UNet.
        family: How it takes prompts.
        windows: The windows over the piece.
        num_waveforms_per_prompt: Waveforms for each prompt or picture.
        blenders: The processors that are installed in `unet`; none without a picture.
        alphas: What `branch_alphas` gives, `[layers of blenders, 3]`.
        joined_prompts: What `Guidance.join` gave. Prompts that a callback has put in their place share nothing.
        cross_attention_kwargs: For the attention processors of `unet`.
    """

    unet: ModelMixin
    family: ClapPrompts
    windows: Windows
    num_waveforms_per_prompt: int
    blenders: KVBlenders
    alphas: torch.Tensor
    joined_prompts: dict[str, torch.Tensor]
    cross_attention_kwargs: dict[str, Any] | None = None

    def predict(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        prompts: dict[str, torch.Tensor],
        recorded: dict[str, tuple[torch.Tensor, torch.Tensor]],
        guidance: Guidance,
        groups: Iterable[range],
    ) -> torch.Tensor:
        """Predicts the noise of the whole piece.

        Args:
            latents: Scaled for the UNet: `[waveforms of all prompts, channels, time, frequency]`.
            timestep: The noise level.
            prompts: The UNet's arguments, `branches * prompts (of a storyboard: or pictures) * waveforms` rows each.
            recorded: For each layer of `blenders` the pictures' `(key, value)` at this timestep.
            guidance: How the branches are combined.
            groups: The windows that go through the UNet together; all windows, each once.

        Returns:
            As `latents`.
        """
        # Many windows are added up.
        noise_pred = torch.zeros_like(latents, dtype=torch.promote_types(latents.dtype, torch.float32))
        parts = latents
        for group in groups:
            seen = {layer: [self.windows.see(states, group) for states in pair] for layer, pair in recorded.items()}
            self.blenders.read(seen, self.alphas[:, -guidance.num_branches :])
            parts = self._predict_group(latents, timestep, prompts, guidance, group)
            self.windows.merge(noise_pred, parts, group)
        return noise_pred.to(parts.dtype)

    def _predict_group(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        prompts: dict[str, torch.Tensor],
        guidance: Guidance,
        group: range,
    ) -> torch.Tensor:
        """Gives `[windows of the group, waveforms of all prompts, channels, frames of a window, frequency]`."""
        cut = self.windows.cut(latents, group).unflatten(1, (-1, self.num_waveforms_per_prompt)).movedim(0, 1)
        layout = (guidance.num_branches, -1, self.num_waveforms_per_prompt)
        arguments = prompts_of_windows(self.family, prompts, layout, self.windows, group)
        num_branches, doubled = guidance.num_branches, nullcontext()
        if self._shares_encoder(prompts, guidance):
            arguments = {name: rows[len(rows) // 3 :] for name, rows in arguments.items()}
            num_branches, doubled = 2, double_first_branch_in_decoder(self.unet)
        model_input = torch.cat([cut.flatten(0, 2)] * num_branches)
        # diffusers demands `encoder_hidden_states` also where the UNet has no text sequence.
        arguments = {"encoder_hidden_states": None, **arguments, "cross_attention_kwargs": self.cross_attention_kwargs}
        with doubled:
            noise_pred = self.unet(model_input, timestep, **arguments).sample
        return guidance.combine(noise_pred).unflatten(0, cut.shape[:3]).movedim(1, 0).flatten(1, 2)

    def _shares_encoder(self, prompts: dict[str, torch.Tensor], guidance: Guidance) -> bool:
        same_text = prompts is self.joined_prompts and self.cross_attention_kwargs is None
        in_decoder = all(layer.startswith("up_blocks.") for layer in self.blenders)
        return guidance.num_branches == 3 and same_text and in_decoder and not _is_compiled(self.unet)


@contextmanager
def double_first_branch_in_decoder(unet: ModelMixin) -> Iterator[None]:
    """Lets a UNet of two guidance branches run its decoder on three: the first one twice, then the second.

    Args:
        unet: A UNet of diffusers. While the context is open it takes `2 * rows` and returns `3 * rows`.

    Yields:
        None.
    """
    num_rows = None

    def note_rows(unet: ModelMixin, args: tuple) -> None:
        nonlocal num_rows
        num_rows = len(args[0])

    def double(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(double, value))
        # What comes from the block before has three branches already.
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == num_rows:
            return torch.cat([value[: num_rows // 2], value])
        return value

    def double_all(block: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return double(args), {name: double(value) for name, value in kwargs.items()}

    hooks = [unet.register_forward_pre_hook(note_rows)]
    hooks += [block.register_forward_pre_hook(double_all, with_kwargs=True) for block in unet.up_blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_compiled(unet: ModelMixin) -> bool:
    # Its graph would not notice that hooks come and go.
    return is_compiled_module(unet) or any(module._compiled_call_impl for module in (unet, *unet.up_blocks))

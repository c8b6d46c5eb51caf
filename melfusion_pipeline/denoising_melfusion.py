"""One step of denoising: the music UNet runs on every window of a piece, in every guidance branch."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin

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
        cross_attention_kwargs: For the attention processors of `unet`.
    """

    unet: ModelMixin
    family: ClapPrompts
    windows: Windows
    num_waveforms_per_prompt: int
    blenders: KVBlenders
    alphas: torch.Tensor
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
        # diffusers demands `encoder_hidden_states` also where the UNet has no text sequence.
        arguments = {
            "encoder_hidden_states": None,
            **prompts_of_windows(self.family, prompts, layout, self.windows, group),
            "cross_attention_kwargs": self.cross_attention_kwargs,
        }
        model_input = torch.cat([cut.flatten(0, 2)] * guidance.num_branches)
        noise_pred = self.unet(model_input, timestep, **arguments).sample
        return guidance.combine(noise_pred).unflatten(0, cut.shape[:3]).movedim(1, 0).flatten(1, 2)

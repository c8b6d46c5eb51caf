"""Guidance: in which branches the music UNet runs, what each of them sees, and how they are combined."""

from dataclasses import dataclass

import torch

# 1 where a guidance branch sees the picture. With fewer than three branches the first ones are left out.
IMAGE_BRANCHES = (0.0, 1.0, 1.0)


def branch_alphas(alphas: torch.Tensor) -> torch.Tensor:
    """Gives each branch the synapse's alphas, or zeros where it does not see the picture.

    Args:
        alphas: `[layers]`.

    Returns:
        `[layers, 3]`; with fewer branches the last ones count.
    """
    return torch.outer(alphas, alphas.new_tensor(IMAGE_BRANCHES))


@dataclass(frozen=True)
class Guidance:
    """How strongly text and picture guide the music, and what follows from that for the batch of the music UNet.

    The branches lie one after the other in the batch: without text and picture, with the picture alone, with both. The
    text alone guides (classifier-free) in the last two, no guidance is the last.

    Args:
        guidance_scale: Strength of the text; 1 or less is no guidance.
        image_guidance_scale: Strength of the picture beside that of the text; None for guidance by the text alone.
    """

    guidance_scale: float
    image_guidance_scale: float | None = None

    @property
    def num_branches(self) -> int:
        """How many branches there are: the UNet's batch holds so many rows for each waveform."""
        if self.image_guidance_scale is not None:
            return 3
        return 2 if self.guidance_scale > 1.0 else 1

    def join(
        self, prompts: dict[str, torch.Tensor], negative_prompts: dict[str, torch.Tensor] | None
    ) -> dict[str, torch.Tensor]:
        """Lays out the prompts of all branches.

        Args:
            prompts: The UNet's arguments by name for the last branch, each `[rows, ...]`.
            negative_prompts: Those for the other branches; not needed if there are none.

        Returns:
            The arguments for all branches, each `[branches * rows, ...]`.
        """
        return {
            name: torch.cat([negative_prompts[name] for _ in range(self.num_branches - 1)] + [rows])
            for name, rows in prompts.items()
        }

    def last(self, prompts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Gives the arguments of the last branch, `[rows, ...]`, of `prompts` as `join` lays them out."""
        return {name: rows.chunk(self.num_branches)[-1] for name, rows in prompts.items()}

    def combine(self, noise_pred: torch.Tensor) -> torch.Tensor:
        """Combines the branches: classifier-free, or after InstructPix2Pix (arXiv 2211.09800, equation 3).

        Args:
            noise_pred: The UNet's output, `[branches * rows, ...]`.

        Returns:
            `[rows, ...]`.
        """
        if self.num_branches == 3:
            noise_pred_free, noise_pred_image, noise_pred_text = noise_pred.chunk(3)
            noise_pred_image_delta = self.image_guidance_scale * (noise_pred_image - noise_pred_free)
            noise_pred_free = noise_pred_free + noise_pred_image_delta
            return noise_pred_free + self.guidance_scale * (noise_pred_text - noise_pred_image)
        if self.num_branches == 2:
            noise_pred_uncond, noise_pred_text = noise_pred.chunk(2)
            return noise_pred_uncond + self.guidance_scale * (noise_pred_text - noise_pred_uncond)
        return noise_pred

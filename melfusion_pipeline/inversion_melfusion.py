"""The picture's side: DDIM inversion, and the keys and values that are recorded on the way."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler, ModelMixin, SchedulerMixin
from diffusers.utils.logging import tqdm

from .arguments_melfusion import check_integer
from .attention_melfusion import KVRecorders, use_attn_processors
from .features_melfusion import ImageFeatures, nearest_steps

# What a UNet takes in one batch where a picture is noised for all its timesteps at once.
ROWS_AT_ONCE = 16


class NoiseLevel(NamedTuple):
    """One point of the picture's time grid: the `timestep` that the UNet is told, and its `alpha_cumprod`."""

    timestep: int
    alpha_cumprod: float


def inversion_grid(scheduler: SchedulerMixin, num_inversion_steps: int) -> list[NoiseLevel]:
    """Lays out the picture's time grid `t_0 = 0 < t_1 < ... < t_N` (method, section 3).

    `t_1 ... t_N` are the DDIM timesteps with trailing spacing, ascending; `t_0` has the level `final_alpha_cumprod`.

    Args:
        scheduler: The picture's scheduler; its training noise schedule is what counts.
        num_inversion_steps: N.

    Returns:
        N + 1 noise levels.

    Raises:
        TypeError: If N is no int.
        ValueError: If it is below 1 or above the number of training steps.
    """
    check_integer("num_inversion_steps", num_inversion_steps, 1, scheduler.config.num_train_timesteps)
    scheduler = DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")
    scheduler.set_timesteps(num_inversion_steps)
    # For some N rounding gives the scheduler one timestep too many, below zero.
    timesteps = sorted(scheduler.timesteps.tolist()[:num_inversion_steps])
    levels = [NoiseLevel(timestep, scheduler.alphas_cumprod[timestep].item()) for timestep in timesteps]
    return [NoiseLevel(0, float(scheduler.final_alpha_cumprod)), *levels]


def ddim_step(
    model_output: torch.Tensor, latents: torch.Tensor, source: float, target: float, prediction_type: str
) -> torch.Tensor:
    """Moves latents from one noise level to another, up or down, without noise.

    Implements `x0 = (z_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)`, `z_t' = sqrt(abar_t') x0 + sqrt(1 - abar_t') eps`
    (DDIM, arXiv 2010.02502, equation 12 with sigma = 0). The schedulers' own `step` derives the other noise level from
    the timestep and is off by one where the number of steps does not divide the training steps.

    Args:
        model_output: The UNet's output at the source, `[batch, channels, height, width]`.
        latents: `z_t`, of the same shape.
        source: The cumulative alpha at t.
        target: The cumulative alpha at t'.
        prediction_type: `"epsilon"` or `"v_prediction"`.

    Returns:
        `z_t'`, of the same shape.
    """
    if prediction_type == "v_prediction":
        denoised = source**0.5 * latents - (1 - source) ** 0.5 * model_output
        noise = source**0.5 * model_output + (1 - source) ** 0.5 * latents
    else:
        denoised = (latents - (1 - source) ** 0.5 * model_output) / source**0.5
        noise = model_output
    return target**0.5 * denoised + (1 - target) ** 0.5 * noise


def ddim_walk(
    image_unet: ModelMixin,
    latents: torch.Tensor,
    prompt_embeds: torch.Tensor,
    levels: list[NoiseLevel],
    prediction_type: str,
) -> Iterator[tuple[NoiseLevel, torch.Tensor]]:
    """Walks latents along noise levels, the UNet evaluated at each step's source: up inverts, down samples.

    Args:
        image_unet: The text-to-image UNet.
        latents: At `levels[0]`, `[batch, channels, height, width]`. Their dtype (float32 at least) is kept throughout.
        prompt_embeds: `[batch, tokens, channels]`.
        levels: The noise levels, at least two.
        prediction_type: `"epsilon"` or `"v_prediction"`.

    Yields:
        After each step the level it reached and the latents there.
    """
    # Tensors, because a compiled UNet would be compiled again for numbers.
    timesteps = torch.tensor([source.timestep for source in levels[:-1]], device=latents.device)
    for timestep, (source, target) in zip(timesteps, pairwise(levels)):
        model_input = latents.to(image_unet.dtype)
        model_output = image_unet(model_input, timestep, encoder_hidden_states=prompt_embeds).sample
        latents = ddim_step(
            model_output.to(latents.dtype), latents, source.alpha_cumprod, target.alpha_cumprod, prediction_type
        )
        yield target, latents


def record_keys_and_values(
    image_unet: ModelMixin,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    prompt_embeds: torch.Tensor,
    layers: list[str],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Records the keys and values of one pass, each picture at its own timestep, as training needs them.

    Args:
        image_unet: The text-to-image UNet; its processors are restored afterwards.
        latents: `z_t^I`, `[pictures, channels, height, width]`.
        timesteps: `[pictures]`.
        prompt_embeds: `[pictures, tokens, channels]`.
        layers: The names of the self-attention layers to record.

    Returns:
        Keys and values by layer, each `[pictures, tokens, channels]`.
    """
    recorders = KVRecorders(image_unet, dict.fromkeys(layers))
    with use_attn_processors(image_unet, recorders):
        image_unet(latents.to(image_unet.dtype), timesteps, encoder_hidden_states=prompt_embeds)
    recorded = recorders.collect()
    keys, values = zip(*recorded.values())
    return dict(zip(recorded, keys)), dict(zip(recorded, values))


def record_image_features(
    image_unet: ModelMixin,
    scheduler: SchedulerMixin,
    latents: torch.Tensor,
    prompt_embeds: torch.Tensor,
    layers: list[str],
    num_inversion_steps: int,
    feature_source: str = "inversion",
    progress_bar: Callable[..., Any] = tqdm,
    read_at: torch.Tensor | None = None,
) -> ImageFeatures:
    """Inverts picture latents and records the keys and values of `layers` (MeLFusion, arXiv 2406.04673, section 3).

    Args:
        image_unet: The text-to-image UNet; its processors are restored afterwards.
        scheduler: The picture's scheduler.
        latents: `z_0^I`, `[pictures, channels, height, width]`.
        prompt_embeds: `[pictures, tokens, channels]`, usually of the empty prompt.
        layers: The names of the self-attention layers to record.
        num_inversion_steps: N, the number of steps of the grid.
        feature_source: `"inversion"` records at `t_0 ... t_{N-1}` while inverting (N UNet passes);
            `"reconstruction"` inverts first and records at `t_N ... t_1` while sampling back (2 N passes: the paper);
            `"noising"` adds noise to `z_0^I` for each of `t_0 ... t_{N-1}` and records them together (N rows of one
            pass, as the authors' code trains). The noise is the same in every call and for every picture.
        progress_bar: A callable like `DiffusionPipeline.progress_bar`.
        read_at: The timesteps at which the features will be read, `[reads]`. Steps that are nearest to none of them
            are not kept, nor made where no kept one needs them. None keeps all.

    Returns:
        The features in the UNet's dtype, `N` steps or those that are kept.
    """
    levels = inversion_grid(scheduler, num_inversion_steps)
    recorded_levels = levels[:0:-1] if feature_source == "reconstruction" else levels[:-1]
    timesteps = torch.tensor([level.timestep for level in recorded_levels], device="cpu")
    kept = range(num_inversion_steps) if read_at is None else nearest_steps(timesteps, read_at).unique().tolist()
    timesteps = timesteps[list(kept)]
    if feature_source == "noising":
        return _record_noised(image_unet, scheduler, latents, prompt_embeds, layers, timesteps, progress_bar)
    prediction_type = scheduler.config.prediction_type
    passes_before = num_inversion_steps if feature_source == "reconstruction" else 0
    recorders = KVRecorders(image_unet, dict.fromkeys(layers))
    keys, values = {}, {}
    with progress_bar(total=passes_before + kept[-1] + 1) as bar:
        if feature_source == "reconstruction":
            for _, latents in ddim_walk(image_unet, latents, prompt_embeds, levels, prediction_type):
                bar.update()
            levels = levels[::-1]
        levels = levels[: kept[-1] + 2]
        with use_attn_processors(image_unet, recorders):
            for step, _ in enumerate(ddim_walk(image_unet, latents, prompt_embeds, levels, prediction_type)):
                recorded = recorders.collect()
                bar.update()
                if step not in kept:
                    continue
                for layer, (key, value) in recorded.items():
                    if step == kept[0]:
                        keys[layer] = key.new_empty(len(kept), *key.shape)
                        values[layer] = value.new_empty(len(kept), *value.shape)
                    keys[layer][kept.index(step)], values[layer][kept.index(step)] = key, value
    return ImageFeatures(keys=keys, values=values, timesteps=timesteps, feature_source=feature_source)


def _record_noised(
    image_unet: ModelMixin,
    scheduler: SchedulerMixin,
    latents: torch.Tensor,
    prompt_embeds: torch.Tensor,
    layers: list[str],
    timesteps: torch.Tensor,
    progress_bar: Callable[..., Any],
) -> ImageFeatures:
    num_steps = len(timesteps)
    noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(0), device="cpu").to(latents)
    # A row for each timestep and picture.
    row_timesteps = timesteps.repeat_interleave(len(latents)).to(latents.device)
    row_latents, row_prompts = latents.repeat(num_steps, 1, 1, 1), prompt_embeds.repeat(num_steps, 1, 1)
    noised = DDIMScheduler.from_config(scheduler.config).add_noise(
        row_latents, noise.expand_as(row_latents), row_timesteps
    )
    recorded = {}
    with progress_bar(total=len(noised)) as bar:
        for first in range(0, len(noised), ROWS_AT_ONCE):
            own = slice(first, first + ROWS_AT_ONCE)
            arguments = (noised[own], row_timesteps[own], row_prompts[own], layers)
            for side, by_layer in zip(("keys", "values"), record_keys_and_values(image_unet, *arguments)):
                for layer, states in by_layer.items():
                    if first == 0:
                        recorded[side, layer] = states.new_empty(len(noised), *states.shape[1:])
                    recorded[side, layer][own] = states
            bar.update(len(noised[own]))
    sizes = (num_steps, len(latents))
    return ImageFeatures(
        keys={layer: recorded["keys", layer].unflatten(0, sizes) for layer in dict.fromkeys(layers)},
        values={layer: recorded["values", layer].unflatten(0, sizes) for layer in dict.fromkeys(layers)},
        timesteps=timesteps,
        feature_source="noising",
    )

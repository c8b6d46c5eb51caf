"""The picture's side: preparation, DDIM inversion, and the keys and values that are recorded on the way."""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from diffusers import DDIMScheduler, ModelMixin, SchedulerMixin
from diffusers.utils.logging import tqdm
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .attention_melfusion import KVRecorders, use_attn_processors

PREDICTION_TYPES = ("epsilon", "v_prediction")
FEATURE_SOURCES = ("inversion", "reconstruction")


@dataclass(frozen=True)
class ImageFeatures:
    """What a picture contributes to the music: the keys and values of each recorded layer at each recorded timestep.

    A value: computed once, it serves any prompt, seed, number of steps and audio length.

    Args:
        keys: By layer name, `K_l^I` as `[steps, pictures, tokens, channels]`.
        values: `V_l^I`, as `keys`.
        timesteps: `[steps]`, the noise level at which each step was recorded, in the order of recording.
        feature_source: `"inversion"` or `"reconstruction"`.
        image_size: The side of the prepared picture in pixels, where known.

    Raises:
        TypeError: If keys, values or timesteps are not what is described here.
        ValueError: If layers or shapes do not agree with one another, or a value is out of range.
    """

    keys: dict[str, torch.Tensor]
    values: dict[str, torch.Tensor]
    timesteps: torch.Tensor
    feature_source: str = "inversion"
    image_size: int | None = None

    def __post_init__(self) -> None:
        _check_layers("keys", self.keys)
        _check_layers("values", self.values)
        _check_recording(self.timesteps, self.feature_source, self.image_size)
        if not self.keys or self.keys.keys() != self.values.keys():
            raise ValueError(
                f"`keys` and `values` must hold the same layers, got {sorted(self.keys)} and {sorted(self.values)}."
            )
        steps, pictures = len(self.timesteps), next(iter(self.keys.values())).shape[1:2]
        for layer, key in self.keys.items():
            shape_fits = key.ndim == 4 and key.shape[:2] == (steps, *pictures) and 0 not in key.shape
            if not shape_fits or key.shape != self.values[layer].shape:
                raise ValueError(
                    f"Layer {layer} must hold keys and values of [steps={steps}, pictures, tokens, channels], got"
                    f" {list(key.shape)} and {list(self.values[layer].shape)}."
                )

    @property
    def num_images(self) -> int:
        """The number of pictures."""
        return next(iter(self.keys.values())).shape[1]

    @property
    def nbytes(self) -> int:
        """The memory that keys and values take, in bytes."""
        return sum(tensor.nbytes for tensor in (*self.keys.values(), *self.values.values()))

    def at(self, timestep: float | torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Gives each layer's `(key, value)`, `[pictures, tokens, channels]`, recorded nearest to `timestep`.

        Raises:
            TypeError: If `timestep` is not one number.
            ValueError: If it is not finite.
        """
        number = timestep.item() if isinstance(timestep, torch.Tensor) and timestep.numel() == 1 else timestep
        if not isinstance(number, Real):
            raise TypeError(f"`timestep` must be one number, got {timestep!r:.80}.")
        if not abs(number) <= sys.float_info.max:
            raise ValueError(f"`timestep` must be finite, got {timestep!r:.80}.")
        step = int((self.timesteps - float(number)).abs().argmin())
        return {layer: (self.keys[layer][step], self.values[layer][step]) for layer in self.keys}

    def to(self, *args: Any, **kwargs: Any) -> "ImageFeatures":
        """Moves keys and values to a device and/or dtype, with the arguments of `torch.Tensor.to`."""
        return replace(
            self,
            keys={layer: key.to(*args, **kwargs) for layer, key in self.keys.items()},
            values={layer: value.to(*args, **kwargs) for layer, value in self.values.items()},
        )

    def save(self, path: str | os.PathLike) -> None:
        """Writes the features to one safetensors file, `path`; an existing file is replaced only by a complete one.

        Raises:
            OSError: If the file cannot be written, for example on a full disk; the message names the file.
        """
        path = _as_path(path)
        tensors = {f"{layer}.key": key.contiguous() for layer, key in self.keys.items()}
        tensors |= {f"{layer}.value": value.contiguous() for layer, value in self.values.items()}
        metadata = {"feature_source": self.feature_source, "image_size": str(self.image_size or "")}
        partial = f"{path}.{os.getpid()}.partial"
        try:
            save_file({**tensors, "timesteps": self.timesteps}, partial, metadata=metadata)
            os.replace(partial, path)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error
        finally:
            if os.path.exists(partial):
                os.remove(partial)

    @classmethod
    def load(cls, path: str | os.PathLike, device: str | torch.device = "cpu") -> "ImageFeatures":
        """Reads what `save` wrote.

        Args:
            path: The file.
            device: Where keys and values are to lie; the timesteps stay on the CPU.

        Returns:
            The features, in the dtype in which they were saved.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is no complete set of features; the message names the file.
        """
        path = _as_path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is no file: pass what `ImageFeatures.save` wrote.")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
            timesteps = tensors.pop("timesteps").cpu()
            layers = sorted({name.rpartition(".")[0] for name in tensors})
            return cls(
                keys={layer: tensors[f"{layer}.key"] for layer in layers},
                values={layer: tensors[f"{layer}.value"] for layer in layers},
                timesteps=timesteps,
                feature_source=metadata.get("feature_source", "inversion"),
                image_size=int(metadata.get("image_size") or 0) or None,
            )
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no complete file of `ImageFeatures`: {error}") from error


def _as_path(path: Any) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"`path` must be a str or a path, got {path!r:.80}.")
    return Path(path)


def _check_layers(name: str, layers: Any) -> None:
    if not isinstance(layers, dict):
        raise TypeError(f"`{name}` must be a dict of tensors by layer name, got {type(layers).__name__}.")
    for layer, tensor in layers.items():
        if not isinstance(layer, str) or not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            found = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise TypeError(f"`{name}` must hold floating-point tensors by layer name, got {layer!r:.80}: {found}.")


def _check_recording(timesteps: Any, feature_source: Any, image_size: Any) -> None:
    if not isinstance(timesteps, torch.Tensor) or timesteps.is_complex() or timesteps.dtype == torch.bool:
        raise TypeError(f"`timesteps` must be a tensor of numbers, got {timesteps!r:.80}.")
    if timesteps.ndim != 1 or not len(timesteps) or not timesteps.isfinite().all():
        raise ValueError(f"`timesteps` must be finite, [steps] with one step at least, got {timesteps!r:.80}.")
    if not isinstance(feature_source, str) or feature_source not in FEATURE_SOURCES:
        raise ValueError(f"`feature_source` must be one of {list(FEATURE_SOURCES)}, got {feature_source!r:.80}.")
    if image_size is not None and (isinstance(image_size, bool) or not isinstance(image_size, Integral)):
        raise TypeError(f"`image_size` must be an int or None, got {image_size!r:.80}.")
    if image_size is not None and image_size < 1:
        raise ValueError(f"`image_size` must be at least 1, got {image_size}.")


def as_pil_images(image: Any) -> list[PIL.Image.Image]:
    """Checks a picture or several and gives each as a PIL image.

    Args:
        image: PIL images; numpy arrays `[height, width, 3]` or `[batch, height, width, 3]`; torch tensors
            `[3, height, width]` or `[batch, 3, height, width]`; or a list of single pictures. Arrays and tensors are
            uint8 or float in [0, 1].

    Returns:
        One PIL image a picture, of its own size and mode.

    Raises:
        TypeError: If `image` or an element of it is none of these.
        ValueError: If a picture is empty, unreadable, too large for PIL's limit, not finite or out of range, or has
            not three channels.
    """
    if isinstance(image, (list, tuple)):
        if not image:
            raise ValueError("`image` is an empty list: pass one picture at least, or None for plain text-to-music.")
        return [_as_pil_image(single, f"`image[{index}]`") for index, single in enumerate(image)]
    if isinstance(image, (np.ndarray, torch.Tensor)) and image.ndim == 4:
        if not len(image):
            raise ValueError(f"`image` holds no picture: its shape is {tuple(image.shape)}.")
        return [_as_pil_image(single, f"`image[{index}]`") for index, single in enumerate(image)]
    return [_as_pil_image(image, "`image`")]


def _as_pil_image(image: Any, name: str) -> PIL.Image.Image:
    if isinstance(image, torch.Tensor):
        if image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"{name} must be a tensor [3, height, width], got {list(image.shape)}.")
        image = image.detach().cpu().movedim(0, -1)
        image = (image.float() if image.is_floating_point() else image).numpy()
    if isinstance(image, np.ndarray):
        return _array_to_pil(image, name)
    if not isinstance(image, PIL.Image.Image):
        raise TypeError(f"{name} must be a PIL image, a numpy array or a torch tensor, got {type(image).__name__}.")

    limit = PIL.Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > 2 * limit:
        raise ValueError(
            f"{name} has {image.width} x {image.height} pixels, more than twice `PIL.Image.MAX_IMAGE_PIXELS`"
            f" ({limit}): it may be a decompression bomb. Resize it first."
        )
    if 0 in image.size:
        raise ValueError(f"{name} has a side of zero pixels: {image.width} x {image.height}.")
    try:
        image.load()
        image.getexif()
    # Pillow's decoders let anything out that a damaged file provokes: struct.error, SyntaxError, IndexError, ...
    except Exception as error:
        raise ValueError(f"{name} cannot be decoded: {error}. The file is damaged or incomplete.") from error
    return image


def _array_to_pil(array: np.ndarray, name: str) -> PIL.Image.Image:
    if array.ndim != 3 or array.shape[-1] != 3:
        raise ValueError(f"{name} must be an array [height, width, 3], got {list(array.shape)}.")
    if 0 in array.shape:
        raise ValueError(f"{name} has a side of zero pixels: its shape is {list(array.shape)}.")
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds NaN or infinite values.")
        if array.min() < 0 or array.max() > 1:
            raise ValueError(
                f"{name} is float and must lie in [0, 1], got [{array.min():g}, {array.max():g}]. Scale it or pass"
                " uint8."
            )
        array = np.round(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise TypeError(f"{name} must be uint8 or float, got {array.dtype}.")
    return PIL.Image.fromarray(array)


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Turns `image` of any PIL mode upright (EXIF) and into RGB; 16-bit is scaled, transparency laid on white."""
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = PIL.Image.fromarray((np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def prepare_image(image: PIL.Image.Image, image_size: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Prepares one picture for the image VAE: upright, RGB, shorter side to `image_size`, square crop, [-1, 1].

    The one preparation for pipeline and training.

    Args:
        image: A picture of any PIL mode.
        image_size: The side of the square in pixels.
        generator: Where given, the square lies at a random place instead of in the centre.

    Returns:
        float32 `[3, image_size, image_size]` in [-1, 1].
    """
    image = to_rgb(image)
    side = min(image.size)
    place = torch.full((2,), 0.5) if generator is None else torch.rand(2, generator=generator)
    left, top = ((length - side) * float(share) for length, share in zip(image.size, place))
    # Cropping before resizing is the same picture and keeps an extreme aspect ratio from filling the memory.
    image = image.resize((image_size, image_size), PIL.Image.Resampling.LANCZOS, (left, top, left + side, top + side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1.0


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
    """
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
    for source, target in pairwise(levels):
        model_input = latents.to(image_unet.dtype)
        model_output = image_unet(model_input, source.timestep, encoder_hidden_states=prompt_embeds).sample
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
    recorded = recorders.take()
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
            `"reconstruction"` inverts first and records at `t_N ... t_1` while sampling back (2 N passes: the paper).
        progress_bar: A callable like `DiffusionPipeline.progress_bar`.

    Returns:
        The features, `N` steps in the UNet's dtype.
    """
    levels = inversion_grid(scheduler, num_inversion_steps)
    prediction_type = scheduler.config.prediction_type
    passes = num_inversion_steps * (1 if feature_source == "inversion" else 2)
    recorders = KVRecorders(image_unet, dict.fromkeys(layers))
    recorded = []
    with progress_bar(total=passes) as bar:
        if feature_source == "reconstruction":
            for _, latents in ddim_walk(image_unet, latents, prompt_embeds, levels, prediction_type):
                bar.update()
            levels = levels[::-1]
        with use_attn_processors(image_unet, recorders):
            for _ in ddim_walk(image_unet, latents, prompt_embeds, levels, prediction_type):
                recorded.append(recorders.take())
                bar.update()
    return ImageFeatures(
        keys={layer: torch.stack([step[layer][0] for step in recorded]) for layer in recorders},
        values={layer: torch.stack([step[layer][1] for step in recorded]) for layer in recorders},
        timesteps=torch.tensor([level.timestep for level in levels[:-1]]),
        feature_source=feature_source,
    )

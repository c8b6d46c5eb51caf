"""What a picture contributes to the music, as a value: `ImageFeatures`."""

import functools
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .arguments_melfusion import check_integer
from .files_melfusion import atomic_write

FEATURE_SOURCES = ("inversion", "reconstruction", "noising")


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """What a picture contributes to the music: the keys and values of each recorded layer at each recorded timestep.

    Computed once, it serves any prompt, seed, number of steps and audio length. `==` and `hash` go by identity: two
    features are equal only if they are one object. Compare their tensors with `torch.equal`.

    Args:
        keys: By layer name, `K_l^I` as `[steps, pictures, tokens, channels]`.
        values: `V_l^I`, as `keys`.
        timesteps: `[steps]`, the noise level at which each step was recorded, in the order of recording.
        feature_source: `"inversion"`, `"reconstruction"` or `"noising"`.
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

    @functools.cached_property
    def is_finite(self) -> bool:
        """Whether no key or value is NaN or infinite. They are looked through once, at the first question."""
        return all(bool(tensor.isfinite().all()) for tensor in (*self.keys.values(), *self.values.values()))

    def select(self, step: int) -> "ImageFeatures":
        """Gives the recorded step number `step` alone, without a copy.

        Raises:
            IndexError: If there is no such step.
        """
        number = range(len(self.timesteps))[step]
        only = slice(number, number + 1)
        return replace(
            self,
            keys={layer: key[only] for layer, key in self.keys.items()},
            values={layer: value[only] for layer, value in self.values.items()},
            timesteps=self.timesteps[only],
        )

    def nearest(self, timesteps: torch.Tensor) -> torch.LongTensor:
        """Finds the recorded step nearest to each timestep; of two that are as near, the one recorded first.

        Args:
            timesteps: `[N]`, on any device.

        Returns:
            `[N]`, on the CPU: numbers for `at_step`.

        Raises:
            TypeError: If `timesteps` is no tensor of real numbers.
            ValueError: If it is not `[N]`, or a timestep is not finite.
        """
        if not isinstance(timesteps, torch.Tensor) or timesteps.is_complex() or timesteps.dtype == torch.bool:
            raise TypeError(f"`timesteps` must be a tensor of numbers, got {timesteps!r:.80}.")
        if timesteps.ndim != 1 or not timesteps.isfinite().all():
            raise ValueError(f"`timesteps` must be finite, [N], got {timesteps!r:.80}.")
        return nearest_steps(self.timesteps, timesteps)

    def at_step(self, step: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Gives each layer's `(key, value)`, `[pictures, tokens, channels]`, of the recorded step number `step`.

        Raises:
            IndexError: If there is no such step.
        """
        return {layer: (self.keys[layer][step], self.values[layer][step]) for layer in self.keys}

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
        return self.at_step(self.nearest(torch.tensor([float(number)], dtype=torch.float64)).item())

    @classmethod
    def join(cls, parts: Iterable["ImageFeatures"]) -> "ImageFeatures":
        """Makes one of the features of several pictures.

        Args:
            parts: One at least, recorded in the same layers at the same timesteps. Of an iterator that makes them no
                more than one layer is in memory twice.

        Returns:
            The features of all pictures, in the order of `parts`.
        """
        first, *others = parts
        if not others:
            return first
        keys, values = ([dict(getattr(part, side)) for part in (first, *others)] for side in ("keys", "values"))
        recording = (first.timesteps, first.feature_source, first.image_size)
        del first, others
        joined = (
            {layer: torch.cat([side.pop(layer) for side in sides], dim=1) for layer in list(sides[0])}
            for sides in (keys, values)
        )
        return cls(*joined, *recording)

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
        try:
            with atomic_write(path) as temporary:
                save_file({**tensors, "timesteps": self.timesteps}, temporary, metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error

    @classmethod
    def load(
        cls, path: str | os.PathLike, device: str | torch.device = "cpu", step: int | None = None
    ) -> "ImageFeatures":
        """Reads what `save` wrote.

        Args:
            path: The file.
            device: Where keys and values are to lie; the timesteps stay on the CPU.
            step: The number, from 0, of the one recorded step to read; the rest of the file is not. None reads all.

        Returns:
            The features, in the dtype in which they were saved.

        Raises:
            TypeError: If `path` is no path, or `step` no int.
            FileNotFoundError: If there is no such file.
            ValueError: If the file is no complete set of features; the message names the file.
        """
        path = _as_path(path)
        if step is not None:
            check_integer("step", step, 0)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is no file: pass what `ImageFeatures.save` wrote.")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                only = slice(None) if step is None else slice(step, step + 1)
                tensors, metadata = {name: file.get_slice(name)[only] for name in file.keys()}, file.metadata() or {}
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


def nearest_steps(recorded: torch.Tensor, timesteps: torch.Tensor) -> torch.LongTensor:
    """Finds the number of the recorded timestep nearest to each timestep; of two that are as near, the first one.

    Args:
        recorded: `[steps]`.
        timesteps: `[N]`, on any device.

    Returns:
        `[N]`, on the CPU.
    """
    return (recorded.cpu().double() - timesteps.cpu().double()[:, None]).abs().argmin(dim=1)


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

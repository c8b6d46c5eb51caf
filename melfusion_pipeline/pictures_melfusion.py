"""Pictures: whatever a user calls one becomes what the image VAE takes."""

import os
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch

from .arguments_melfusion import check_integer

Image = PIL.Image.Image | np.ndarray | torch.Tensor | list[PIL.Image.Image | np.ndarray | torch.Tensor]

# Grey, RGB, RGBA.
CHANNELS = (1, 3, 4)
# In pixels. A larger side is taken for a slip of the keyboard: no machine could compute it.
MAX_IMAGE_SIZE = 8192


def as_pil_images(image: Any) -> list[PIL.Image.Image]:
    """Checks a picture or several and gives each as a PIL image.

    Args:
        image: PIL images; numpy arrays `[height, width]` (grey) or `[height, width, channels]`; torch tensors
            `[channels, height, width]`; the latter two also with a batch dimension before; or a list of single
            pictures. Channels are 1 (grey), 3 (RGB) or 4 (RGBA). Arrays and tensors are uint8 or float in [0, 1].

    Returns:
        One PIL image a picture, of its own size and mode.

    Raises:
        TypeError: If `image` or an element of it is none of these.
        ValueError: If a picture is empty, unreadable, too large for PIL's limit, not finite or out of range, or has
            another number of channels.
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
        if image.ndim != 3 or image.shape[0] not in CHANNELS:
            raise ValueError(f"{name} must be a tensor [1, 3 or 4, height, width], got {list(image.shape)}.")
        image = image.detach().cpu().movedim(0, -1)
        image = (image.float() if image.is_floating_point() else image).numpy()
    if isinstance(image, np.ndarray):
        return _array_to_pil(image, name)
    if not isinstance(image, PIL.Image.Image):
        remedy = ""
        if isinstance(image, (str, os.PathLike)):
            remedy = (
                f" A text is given as `prompt={os.fspath(image)!r:.60}`, the picture in a file or at an address as"
                f" `image=diffusers.utils.load_image({os.fspath(image)!r:.60})`."
            )
        found = type(image).__name__
        raise TypeError(f"{name} must be a PIL image, a numpy array or a torch tensor, got a {found}.{remedy}")

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
    if array.ndim != 2 and (array.ndim != 3 or array.shape[-1] not in CHANNELS):
        raise ValueError(
            f"{name} must be an array [height, width] or [height, width, 1, 3 or 4], got {list(array.shape)}."
        )
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
    return PIL.Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


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

    Raises:
        TypeError: If `image` is no PIL image, or `image_size` no int.
        ValueError: If `image_size` is out of range.
    """
    if not isinstance(image, PIL.Image.Image):
        raise TypeError(f"`image` must be a PIL image, got a {type(image).__name__}: `as_pil_images` makes one.")
    check_integer("image_size", image_size, 1, MAX_IMAGE_SIZE)
    image = to_rgb(image)
    side = min(image.size)
    place = torch.full((2,), 0.5) if generator is None else torch.rand(2, generator=generator)
    left, top = ((length - side) * float(share) for length, share in zip(image.size, place))
    # Cropping before resizing is the same picture and keeps an extreme aspect ratio from filling the memory.
    image = image.resize((image_size, image_size), PIL.Image.Resampling.LANCZOS, (left, top, left + side, top + side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1.0

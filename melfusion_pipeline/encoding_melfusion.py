"""From a picture to its features: what runs on the picture's side, once for any number of calls."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import PIL.Image
import torch
from diffusers import AutoencoderTiny, ModelMixin
from diffusers.utils import logging

from .arguments_melfusion import check_integer
from .checks_melfusion import check_finite, check_image_inputs, check_text
from .decoding_melfusion import own_size
from .families_melfusion import text_lengths
from .features_melfusion import ImageFeatures
from .inversion_melfusion import record_image_features
from .locks_melfusion import one_at_a_time
from .pictures_melfusion import Image, as_pil_images, prepare_image
from .prompts_melfusion import tokenize

logger = logging.get_logger(__name__)

# Pictures that go through the image UNet in one batch.
IMAGES_AT_ONCE = 8


@contextmanager
def upcast(image_vae: ModelMixin) -> Iterator[None]:
    """Runs a VAE in float32 that is in float16 and whose config says `force_upcast`, as diffusers' pipelines do.

    Such VAEs (SDXL's among them) exceed the range of float16: what they encode would be NaN. The weights are float16
    again afterwards, the same to the bit.

    Args:
        image_vae: An `AutoencoderKL` or `AutoencoderTiny`.

    Yields:
        None.
    """
    if image_vae.dtype != torch.float16 or not image_vae.config.get("force_upcast"):
        yield
        return
    image_vae.float()
    try:
        yield
    finally:
        image_vae.half()


def encode_pixels(image_vae: ModelMixin, pixel_values: torch.Tensor) -> torch.Tensor:
    """Encodes prepared pictures: the mode of the VAE's posterior, or what a VAE without one gives.

    Args:
        image_vae: An `AutoencoderKL` or `AutoencoderTiny`.
        pixel_values: `[pictures, 3, height, width]` in [-1, 1], on the device of the VAE.

    Returns:
        `z_0^I`, `[pictures, channels, height / 8, width / 8]` for Stable Diffusion, float32.
    """
    with upcast(image_vae):
        encoded = image_vae.encode(pixel_values.to(image_vae.dtype))
    latents = encoded.latents if isinstance(image_vae, AutoencoderTiny) else encoded.latent_dist.mode()
    return latents.float() * image_vae.config.scaling_factor


class EncodingMixin:
    """The methods of `MelFusionPipeline` that encode pictures; to be named before `DiffusionPipeline`."""

    @property
    def default_num_inversion_steps(self) -> int:
        """The inversion steps of a call that names none: the checkpoint's, else those of the synapse's training."""
        trained = self.synapse.config.num_inversion_steps if self.synapse else None
        return self.config.default_num_inversion_steps or trained or 10

    @property
    def default_image_size(self) -> int:
        """The side of the picture in pixels: that of the synapse's training, else the one of the image UNet."""
        trained = self.synapse.config.image_size if self.synapse else None
        return trained or own_size(self.image_unet, "image_unet", "image_size") * self.image_vae_scale_factor

    @property
    def default_feature_source(self) -> str:
        """How a call records that names no `feature_source`: as in the synapse's training, else while inverting."""
        trained = self.synapse.config.image_latents if self.synapse else None
        return trained or "inversion"

    @torch.no_grad()
    @one_at_a_time
    def encode_image(
        self,
        image: Image,
        image_prompt: str | list[str] = "",
        image_size: int | None = None,
        num_inversion_steps: int | None = None,
        feature_source: str | None = None,
    ) -> ImageFeatures:
        """Inverts pictures and records their keys and values; what it returns serves any number of calls.

        Args:
            image: As in `__call__`.
            image_prompt: The text for the picture's UNet; the empty text inverts best.
            image_size: The side in pixels to which pictures are prepared. None is `default_image_size`.
            num_inversion_steps: The number of recorded timesteps. None is `default_num_inversion_steps`.
            feature_source: `"inversion"`, `"reconstruction"` (the paper to the letter, twice the cost) or `"noising"`.
                None is `default_feature_source`.

        Returns:
            The features, in the dtype of `image_unet`, on its device.

        Raises:
            TypeError, ValueError: As `__call__`.
        """
        images = as_pil_images(image)
        if num_inversion_steps is None:
            num_inversion_steps = self.default_num_inversion_steps
        if feature_source is None:
            feature_source = self.default_feature_source
        check_image_inputs(self, len(images), image_prompt, image_size, num_inversion_steps, feature_source)
        return self._encode_images(images, image_prompt, image_size, num_inversion_steps, feature_source)

    def _encode_images(
        self,
        images: list[PIL.Image.Image],
        image_prompt: str | list[str],
        image_size: int | None,
        num_inversion_steps: int,
        feature_source: str,
        read_at: torch.Tensor | None = None,
    ) -> ImageFeatures:
        prompt_embeds = self.encode_image_prompt(image_prompt, len(images))
        parts = (
            record_image_features(
                self.image_unet,
                self.image_scheduler,
                self._encode_pixels(images[first : first + IMAGES_AT_ONCE], image_size, prompt_embeds.device),
                prompt_embeds[first : first + IMAGES_AT_ONCE],
                self.synapse.config.image_layers,
                num_inversion_steps,
                feature_source,
                self.progress_bar,
                read_at,
            )
            for first in range(0, len(images), IMAGES_AT_ONCE)
        )
        features = replace(ImageFeatures.join(parts), image_size=image_size or self.default_image_size)
        if not features.is_finite:
            check_finite("the inversion of the picture", *features.keys.values(), *features.values.values())
        return features

    @one_at_a_time
    def prepare_image_latents(self, image: Image, image_size: int | None = None) -> torch.Tensor:
        """Prepares pictures and encodes them: the mode of the VAE's posterior, so that no generator is consumed.

        Args:
            image: As in `__call__`.
            image_size: The side in pixels. None is `default_image_size`.

        Returns:
            `z_0^I`, `[pictures, 4, image_size / 8, image_size / 8]` for Stable Diffusion, float32.
        """
        return self._encode_pixels(as_pil_images(image), image_size, self._execution_device)

    def _encode_pixels(
        self, images: list[PIL.Image.Image], image_size: int | None, device: torch.device
    ) -> torch.Tensor:
        image_size = self.default_image_size if image_size is None else image_size
        pixel_values = torch.stack([prepare_image(image, image_size) for image in images])
        return encode_pixels(self.image_vae, pixel_values.to(device))

    @torch.no_grad()
    @one_at_a_time
    def encode_image_prompt(self, image_prompt: str | list[str] = "", num_images: int = 1) -> torch.Tensor:
        """Encodes the text for the picture's UNet.

        Args:
            image_prompt: One text for all pictures, or one a picture.
            num_images: The number of pictures.

        Returns:
            `[num_images, tokens, channels]` in the dtype of `image_unet`.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If there is no text, or they are neither one nor `num_images`.
        """
        check_integer("num_images", num_images, 1)
        check_text("image_prompt", image_prompt)
        if image_prompt is None or (isinstance(image_prompt, list) and len(image_prompt) not in (1, num_images)):
            raise ValueError(f"`image_prompt` must be one text or {num_images}, got {image_prompt!r:.80}.")
        device, dtype = self._execution_device, self.image_unet.dtype
        if self.image_text_encoder is None or self.image_tokenizer is None:
            logger.warning(
                "Without `image_text_encoder` and `image_tokenizer` the picture's UNet is conditioned on zeros; the"
                " features differ from those of the empty prompt."
            )
            return torch.zeros(num_images, 1, self.image_unet.config.cross_attention_dim, device=device, dtype=dtype)
        prompts = [image_prompt] if isinstance(image_prompt, str) else image_prompt
        inputs = tokenize(self.image_tokenizer, prompts, self.image_tokenizer.model_max_length, device)
        use_mask = getattr(self.image_text_encoder.config, "use_attention_mask", False)
        mask = inputs.attention_mask if use_mask else None
        embeds = self.image_text_encoder(inputs.input_ids, attention_mask=mask)[0].to(dtype)
        return embeds.expand(num_images, -1, -1)

    def fit_image_features(
        self,
        image_features: ImageFeatures,
        latents: torch.Tensor,
        synapse_scale: float | list[float] = 1.0,
        prompts: dict[str, torch.Tensor] | None = None,
    ) -> tuple[ImageFeatures, torch.Tensor]:
        """Fits recorded features to the music UNet (visual synapse, method section 2).

        Args:
            image_features: As recorded.
            latents: The music latents `[batch, channels, time, frequency]`, for their size.
            synapse_scale: Multiplies every alpha, or one number for each layer.
            prompts: The UNet's arguments, for the lengths of its text sequences; needed where the synapse blends
                layers that attend to them.

        Returns:
            The features by layer of the music UNet, and the scaled alphas `[layers]`.
        """
        num_tokens = self.synapse.num_tokens(*latents.shape[-2:], text_lengths(prompts or {}))
        keys, values, alphas = self.synapse(image_features.keys, image_features.values, num_tokens, synapse_scale)
        return replace(image_features, keys=keys, values=values), alphas

    def _fit_when_due(
        self,
        image_features: ImageFeatures,
        latents: torch.Tensor,
        synapse_scale: float | list[float],
        prompts: dict[str, torch.Tensor],
    ) -> Callable[[int], tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], torch.Tensor]]:
        """Gives a function of a recorded step's number: what that step blends, and the alphas.

        Only the last one is kept. Denoising reads the steps one after the other, and all of them fitted at once are
        ten times as large.
        """

        @functools.lru_cache(maxsize=1)
        def fit(step: int) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
            fitted, alphas = self.fit_image_features(image_features.select(step), latents, synapse_scale, prompts)
            return fitted.at_step(0), alphas

        return fit

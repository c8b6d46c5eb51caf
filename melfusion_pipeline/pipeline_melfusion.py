"""MeLFusion (arXiv 2406.04673): a picture and a sentence become music."""

import functools
import importlib
import inspect
import json
import math
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import (
    AudioPipelineOutput,
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    ModelMixin,
    SchedulerMixin,
    StableDiffusionMixin,
    UNet2DConditionModel,
)
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from safetensors import SafetensorError, safe_open
from transformers import (
    ClapTextModelWithProjection,
    CLIPTextModel,
    CLIPTokenizer,
    RobertaTokenizer,
    SpeechT5HifiGan,
)

from .attention_melfusion import KVBlenders, use_attn_processors
from .inversion_melfusion import (
    FEATURE_SOURCES,
    PREDICTION_TYPES,
    ImageFeatures,
    as_pil_images,
    prepare_image,
    record_image_features,
)

logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("np", "pt", "mel", "latent")
# Beyond these a typing error is likelier than a machine that can do it.
MAX_AUDIO_LENGTH_IN_S = 3600.0
MAX_WAVEFORMS_PER_PROMPT = 1000
MAX_IMAGE_SIZE = 8192
# What a checkpoint carries so that it loads without this package (with `trust_remote_code=True`).
CODE_FILES = ("pipeline_melfusion.py", "attention_melfusion.py", "inversion_melfusion.py")
# In an index without components of its own: the folder in which they lie.
CHECKPOINT_KEY = "_checkpoint"
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
# The JSON files of a checkpoint and what each must say: one of these, or it is empty or another file.
IDENTITY_KEYS = {
    "config.json": ("_class_name", "model_type"),
    "scheduler_config.json": ("_class_name",),
    "tokenizer_config.json": ("tokenizer_class",),
    "tokenizer.json": ("model",),
}

Image = PIL.Image.Image | np.ndarray | torch.Tensor | list[PIL.Image.Image | np.ndarray | torch.Tensor]


def _one_at_a_time(method: Callable) -> Callable:
    """Lets a method of the pipeline run in one thread at a time; the others wait."""

    @functools.wraps(method)
    def locked(self: "MelFusionPipeline", *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return method(self, *args, **kwargs)

    return locked


class MelFusionPipeline(DiffusionPipeline, StableDiffusionMixin):
    """Generates music from a picture, a text prompt or both.

    The picture is DDIM-inverted through a frozen text-to-image UNet; the keys and values of its decoder self-attention
    are blended by a learned `synapse` into the attention of a text-to-music UNet while that denoises music latents.
    Source: Chowdhury et al., "MeLFusion: Synthesizing Music from Image and Language Cues using Diffusion Models",
    CVPR 2024, arXiv 2406.04673.

    Threads may share a pipeline: their calls run one after the other. A call keeps its state in the pipeline, its
    processors in the UNets and its timesteps in the scheduler, and pipelines may share these (`from_pipe`,
    components), so one lock serves all MeLFusion pipelines of a process. For several devices at once start a process
    for each. Pipelines of other classes do not know of the lock: do not run them on the same UNets at the same time.

    Args:
        vae: Of mel spectrograms, as in AudioLDM.
        text_encoder: CLAP's text tower.
        tokenizer: Of `text_encoder`.
        unet: The text-to-music UNet, conditioned on CLAP embeddings by `class_labels` (AudioLDM, MusicLDM).
        scheduler: Any diffusers scheduler for the music latents.
        vocoder: Log-mel spectrogram to waveform.
        image_vae: Of pictures, as in Stable Diffusion.
        image_text_encoder: Of the picture's prompt. If None, the picture's UNet is conditioned on zeros.
        image_tokenizer: Of `image_text_encoder`.
        image_unet: The text-to-image UNet, `epsilon` or `v_prediction`.
        image_scheduler: Its noise schedule.
        synapse: A `VisualSynapse` between the two UNets.
    """

    model_cpu_offload_seq = "text_encoder->image_text_encoder->image_vae->image_unet->synapse->unet->vae->vocoder"
    _callback_tensor_inputs = ["latents", "prompt_embeds"]
    # Of the class: copies, pickles and pipelines that share components all find the same one.
    _lock = threading.RLock()

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: ClapTextModelWithProjection,
        tokenizer: RobertaTokenizer,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        vocoder: SpeechT5HifiGan,
        image_vae: AutoencoderKL,
        image_text_encoder: CLIPTextModel,
        image_tokenizer: CLIPTokenizer,
        image_unet: UNet2DConditionModel,
        image_scheduler: SchedulerMixin,
        synapse: ModelMixin,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            vocoder=vocoder,
            image_vae=image_vae,
            image_text_encoder=image_text_encoder,
            image_tokenizer=image_tokenizer,
            image_unet=image_unet,
            image_scheduler=image_scheduler,
            synapse=synapse,
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae else 4
        self.image_vae_scale_factor = 2 ** (len(image_vae.config.block_out_channels) - 1) if image_vae else 8

    @property
    def guidance_scale(self) -> float:
        """How strongly the text guides the music; above 1 it is classifier-free guidance."""
        return self._guidance_scale

    @property
    def image_guidance_scale(self) -> float | None:
        """How strongly the picture guides the music, or None for guidance by text alone."""
        return self._image_guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the UNet runs on more than one guidance branch."""
        return self._guidance_scale > 1.0 or self._image_guidance_scale is not None

    @property
    def num_timesteps(self) -> int:
        """The number of timesteps of the last call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to stop denoising."""
        return self._interrupt

    @property
    def image_branches(self) -> tuple[float, ...]:
        """For each guidance branch 1 where it sees the picture, 0 where alpha is dropped for it."""
        if self._image_guidance_scale is not None:
            return (0.0, 1.0, 1.0)
        return (1.0, 1.0) if self.do_classifier_free_guidance else (1.0,)

    # ------------------------------------------------------------------------------------------------ lifecycle

    def check_inputs(
        self,
        image: list[PIL.Image.Image] | None,
        prompt: str | list[str] | None,
        audio_length_in_s: float,
        num_inference_steps: int,
        num_inversion_steps: int,
        guidance_scale: float,
        image_guidance_scale: float | None,
        synapse_scale: float | list[float],
        negative_prompt: str | list[str] | None,
        num_waveforms_per_prompt: int,
        eta: float,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
        image_prompt: str | list[str],
        image_size: int | None,
        image_features: ImageFeatures | None,
        feature_source: str,
        output_type: str,
        cross_attention_kwargs: dict[str, Any] | None,
        callback_on_step_end_tensor_inputs: list[str],
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
    ) -> tuple[int, int]:
        """Refuses arguments of `__call__` that cannot work, before any model runs.

        Returns:
            The number of prompts and the number of pictures (0 without a picture).

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If a value is out of range or contradicts another one. Either names argument, value and remedy.
        """
        _check_integer("num_inference_steps", num_inference_steps, 1, self.scheduler.config.num_train_timesteps)
        _check_integer("num_waveforms_per_prompt", num_waveforms_per_prompt, 1, MAX_WAVEFORMS_PER_PROMPT)
        _check_real("guidance_scale", guidance_scale)
        _check_real("eta", eta, 0.0, 1.0)
        frame_length = self.vae_scale_factor * self._seconds_per_frame
        _check_real("audio_length_in_s", audio_length_in_s, frame_length * (1 - 1e-6), MAX_AUDIO_LENGTH_IN_S)
        _check_choice("output_type", output_type, OUTPUT_TYPES)
        if cross_attention_kwargs is not None and not isinstance(cross_attention_kwargs, dict):
            raise TypeError(f"`cross_attention_kwargs` must be a dict or None, got {cross_attention_kwargs!r}.")
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise TypeError(f"`callback_on_step_end` must be callable or None, got {callback_on_step_end!r}.")
        if not isinstance(callback_on_step_end_tensor_inputs, (list, tuple)):
            raise TypeError(
                f"`callback_on_step_end_tensor_inputs` must be a list, got {callback_on_step_end_tensor_inputs!r}."
            )
        for name in callback_on_step_end_tensor_inputs:
            _check_choice("callback_on_step_end_tensor_inputs", name, self._callback_tensor_inputs)

        self._check_components()
        num_images = 0
        if image is not None and image_features is not None:
            raise ValueError("Pass `image` or `image_features`, not both: the features already stand for the picture.")
        if image is not None:
            num_images = len(image)
            self._check_image_inputs(num_images, image_prompt, image_size, num_inversion_steps, feature_source)
        if image_features is not None:
            num_images = self._check_image_features(image_features)
        if num_images:
            self._check_synapse_scale(synapse_scale)
        if image_guidance_scale is not None:
            _check_real("image_guidance_scale", image_guidance_scale)
            if not num_images:
                raise ValueError(
                    f"`image_guidance_scale` is {image_guidance_scale}, but there is no picture: pass `image` or"
                    " `image_features`, or leave it None."
                )

        num_prompts = self._check_prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, num_images)
        if num_images > 1 and num_prompts > 1 and num_images != num_prompts:
            raise ValueError(
                f"{num_images} pictures cannot meet {num_prompts} prompts: pass equal numbers, or one of either."
            )
        batch_size = max(num_prompts, num_images) * num_waveforms_per_prompt
        self._check_generator(generator, batch_size)
        if latents is not None:
            _check_float_tensor("latents", latents)
            shape = (batch_size, *self._latent_shape(audio_length_in_s))
            if tuple(latents.shape) != shape:
                raise ValueError(
                    f"`latents` must have the shape {list(shape)} (batch, channels, time, frequency) for"
                    f" {audio_length_in_s} s, got {list(latents.shape)}."
                )
            if not latents.isfinite().all():
                raise ValueError("`latents` holds NaN or infinite values.")
        return num_prompts, num_images

    def _check_prompts(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
        num_images: int,
    ) -> int:
        if prompt is None and prompt_embeds is None and not num_images:
            raise ValueError("There is nothing to make music of: pass `image`, `prompt` or both.")
        for name, text, embeds in (
            ("prompt", prompt, prompt_embeds),
            ("negative_prompt", negative_prompt, negative_prompt_embeds),
        ):
            _check_text(name, text)
            if text is not None and embeds is not None:
                raise ValueError(f"Pass `{name}` or `{name}_embeds`, not both: got {text!r} and a tensor.")
            if embeds is None:
                continue
            _check_float_tensor(f"{name}_embeds", embeds)
            width = self.unet.config.projection_class_embeddings_input_dim
            if embeds.ndim != 2 or embeds.shape[1] != width or not len(embeds):
                raise ValueError(f"`{name}_embeds` must have the shape [prompts, {width}], got {list(embeds.shape)}.")
            if not embeds.isfinite().all():
                raise ValueError(f"`{name}_embeds` holds NaN or infinite values.")

        num_prompts = _count(prompt) if prompt_embeds is None else len(prompt_embeds)
        num_negatives = _count(negative_prompt) if negative_prompt_embeds is None else len(negative_prompt_embeds)
        if num_negatives not in (1, num_prompts):
            raise ValueError(
                f"{num_negatives} negative prompts do not match {num_prompts} prompts: pass equal numbers, or one"
                " `negative_prompt` for all."
            )
        return num_prompts

    def _check_image_inputs(
        self,
        num_images: int,
        image_prompt: str | list[str],
        image_size: int | None,
        num_inversion_steps: int,
        feature_source: str,
    ) -> None:
        self.synapse.check_unets(self.image_unet, self.unet)
        _check_integer("num_inversion_steps", num_inversion_steps, 1, self.image_scheduler.config.num_train_timesteps)
        _check_choice("feature_source", feature_source, FEATURE_SOURCES)
        _check_text("image_prompt", image_prompt)
        if image_prompt is None or _count(image_prompt) not in (1, num_images):
            raise ValueError(f"`image_prompt` must be one text or {num_images}, one a picture, got {image_prompt!r}.")
        if image_size is not None:
            _check_integer("image_size", image_size, self.image_vae_scale_factor)
            if image_size % self.image_vae_scale_factor or image_size > MAX_IMAGE_SIZE:
                raise ValueError(
                    f"`image_size` must be a multiple of {self.image_vae_scale_factor} pixels, at most"
                    f" {MAX_IMAGE_SIZE}, got {image_size}."
                )
        prediction_type = self.image_scheduler.config.prediction_type
        _check_choice("image_scheduler.config.prediction_type", prediction_type, PREDICTION_TYPES)

    def _check_image_features(self, image_features: ImageFeatures) -> int:
        if not isinstance(image_features, ImageFeatures):
            raise TypeError(
                f"`image_features` must be what `encode_image` returns, got {type(image_features).__name__}."
            )
        self.synapse.check_unets(None, self.unet)
        self.synapse.check_image_features(image_features.keys)
        tensors = (*image_features.keys.values(), *image_features.values.values())
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise ValueError("`image_features` holds NaN or infinite values.")
        return image_features.num_images

    def _check_components(self) -> None:
        """Refuses components that have taken one another's place, as far as they can be told apart."""
        if self.unet is not None and self.unet.config.class_embed_type != "simple_projection":
            raise ValueError(
                "`unet` must condition on CLAP embeddings, but its class_embed_type is"
                f" {self.unet.config.class_embed_type!r}: is it the picture's?"
            )
        for name, channels in (("vae", 1), ("image_vae", 3)):
            vae = getattr(self, name)
            if vae is not None and vae.config.out_channels != channels:
                raise ValueError(f"`{name}` must decode to {channels} channels, but has {vae.config.out_channels}.")
        for name in ("", "image_"):
            tokenizer, encoder = getattr(self, f"{name}tokenizer"), getattr(self, f"{name}text_encoder")
            if None not in (tokenizer, encoder) and len(tokenizer) > encoder.config.vocab_size:
                raise ValueError(
                    f"`{name}tokenizer` knows {len(tokenizer)} tokens, but `{name}text_encoder` only"
                    f" {encoder.config.vocab_size}: they do not belong together."
                )

    def _check_synapse_scale(self, synapse_scale: float | list[float]) -> None:
        num_layers = len(self.synapse.config.music_layers)
        if isinstance(synapse_scale, (np.ndarray, torch.Tensor)):
            synapse_scale = synapse_scale.tolist()
        if not isinstance(synapse_scale, (list, tuple)):
            return _check_real("synapse_scale", synapse_scale)
        if len(synapse_scale) != num_layers:
            raise ValueError(
                f"`synapse_scale` must be one number or {num_layers}, one a layer, got {len(synapse_scale)} numbers."
            )
        for scale in synapse_scale:
            _check_real("synapse_scale", scale)

    @staticmethod
    def _check_generator(generator: Any, batch_size: int) -> None:
        generators = generator if isinstance(generator, list) else [generator]
        if generator is not None and not all(isinstance(single, torch.Generator) for single in generators):
            raise TypeError(f"`generator` must be a torch.Generator, a list of them or None, got {generator!r}.")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` is a list of {len(generator)}, but {batch_size} waveforms are to be made (prompts or"
                " pictures times `num_waveforms_per_prompt`): pass as many, or one generator."
            )

    @torch.no_grad()
    @_one_at_a_time
    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        do_classifier_free_guidance: bool = True,
        device: torch.device | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encodes texts with CLAP; what it returns can be given to `__call__`.

        Args:
            prompt: One text or a list; not needed with `prompt_embeds`.
            negative_prompt: One text for all, or a list as long as the prompts. None is the empty text.
            prompt_embeds: `[prompts, channels]`, taken as they are.
            negative_prompt_embeds: As `prompt_embeds`.
            do_classifier_free_guidance: Whether the negative prompt is needed.
            device: Where to encode. None is the pipeline's device.

        Returns:
            `prompt_embeds` and `negative_prompt_embeds`, each `[prompts, channels]` with L2 norm 1; the latter None
            without guidance.
        """
        device = device or self._execution_device
        # Transformers loads a half-precision checkpoint as it is stored, diffusers in float32.
        dtype = (self.text_encoder if self.unet is None else self.unet).dtype
        if prompt_embeds is None:
            prompts = [prompt] if isinstance(prompt, str) else prompt
            prompt_embeds = self._embed_texts(prompts, self.tokenizer.model_max_length, device)
        prompt_embeds = prompt_embeds.to(device=device, dtype=dtype)
        if not do_classifier_free_guidance:
            return prompt_embeds, None

        if negative_prompt_embeds is None:
            negatives = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt or ""]
            # AudioLDM pads negative prompts to the width of the embeddings; for its equal output so must we.
            negatives = negatives * (len(prompt_embeds) // len(negatives))
            negative_prompt_embeds = self._embed_texts(negatives, prompt_embeds.shape[1], device)
        negative_prompt_embeds = negative_prompt_embeds.to(device=device, dtype=dtype)
        return prompt_embeds, negative_prompt_embeds.expand_as(prompt_embeds)

    def _embed_texts(self, texts: list[str], max_length: int, device: torch.device) -> torch.Tensor:
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                "Texts cannot be encoded without `text_encoder` and `tokenizer`: pass `prompt_embeds` and, for"
                " `guidance_scale` above 1, `negative_prompt_embeds`."
            )
        inputs = _tokenize(self.tokenizer, texts, max_length, device)
        embeds = self.text_encoder(inputs.input_ids, attention_mask=inputs.attention_mask).text_embeds
        return F.normalize(embeds, dim=-1)

    @torch.no_grad()
    @_one_at_a_time
    def encode_image(
        self,
        image: Image,
        image_prompt: str | list[str] = "",
        image_size: int | None = None,
        num_inversion_steps: int = 10,
        feature_source: str = "inversion",
    ) -> ImageFeatures:
        """Inverts pictures and records their keys and values; what it returns serves any number of calls.

        Args:
            image: As in `__call__`.
            image_prompt: The text for the picture's UNet; the empty text inverts best.
            image_size: The side in pixels to which pictures are prepared. None is the image UNet's own.
            num_inversion_steps: The number of recorded timesteps.
            feature_source: `"inversion"` or `"reconstruction"` (the paper to the letter, twice the cost).

        Returns:
            The features, in the dtype of `image_unet`, on its device.

        Raises:
            TypeError, ValueError: As `__call__`.
        """
        image = as_pil_images(image)
        self._check_image_inputs(len(image), image_prompt, image_size, num_inversion_steps, feature_source)
        prompt_embeds = self.encode_image_prompt(image_prompt, len(image))
        features = record_image_features(
            self.image_unet,
            self.image_scheduler,
            self.prepare_image_latents(image, image_size),
            prompt_embeds,
            self.synapse.config.image_layers,
            num_inversion_steps,
            feature_source,
            self.progress_bar,
        )
        _check_finite("the inversion of the picture", *features.keys.values(), *features.values.values())
        return replace(features, image_size=image_size or self.default_image_size)

    @property
    def default_image_size(self) -> int:
        """The side of the picture in pixels for which the image UNet was made."""
        sample_size = self.image_unet.config.sample_size
        return (sample_size if isinstance(sample_size, int) else sample_size[0]) * self.image_vae_scale_factor

    @torch.no_grad()
    def prepare_image_latents(self, image: Image, image_size: int | None = None) -> torch.Tensor:
        """Prepares pictures and encodes them: the mode of the VAE's posterior, so that no generator is consumed.

        Args:
            image: As in `__call__`.
            image_size: The side in pixels. None is the image UNet's own.

        Returns:
            `z_0^I`, `[pictures, 4, image_size / 8, image_size / 8]` for Stable Diffusion, float32.
        """
        image_size = image_size or self.default_image_size
        pixel_values = torch.stack([prepare_image(single, image_size) for single in as_pil_images(image)])
        pixel_values = pixel_values.to(device=self._execution_device, dtype=self.image_vae.dtype)
        latents = self.image_vae.encode(pixel_values).latent_dist.mode()
        return latents.float() * self.image_vae.config.scaling_factor

    @torch.no_grad()
    @_one_at_a_time
    def encode_image_prompt(self, image_prompt: str | list[str] = "", num_images: int = 1) -> torch.Tensor:
        """Encodes the text for the picture's UNet.

        Args:
            image_prompt: One text for all pictures, or one a picture.
            num_images: The number of pictures.

        Returns:
            `[num_images, tokens, channels]` in the dtype of `image_unet`.
        """
        device, dtype = self._execution_device, self.image_unet.dtype
        if self.image_text_encoder is None or self.image_tokenizer is None:
            logger.warning(
                "Without `image_text_encoder` and `image_tokenizer` the picture's UNet is conditioned on zeros; the"
                " features differ from those of the empty prompt."
            )
            return torch.zeros(num_images, 1, self.image_unet.config.cross_attention_dim, device=device, dtype=dtype)
        prompts = [image_prompt] if isinstance(image_prompt, str) else image_prompt
        inputs = _tokenize(self.image_tokenizer, prompts, self.image_tokenizer.model_max_length, device)
        use_mask = getattr(self.image_text_encoder.config, "use_attention_mask", False)
        mask = inputs.attention_mask if use_mask else None
        embeds = self.image_text_encoder(inputs.input_ids, attention_mask=mask)[0].to(dtype)
        return embeds.expand(num_images, -1, -1)

    def prepare_latents(
        self,
        batch_size: int,
        audio_length_in_s: float,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Draws the initial noise, or takes `latents`, at the scheduler's initial scale.

        Args:
            batch_size: The number of waveforms.
            audio_length_in_s: Their length in seconds.
            dtype: Of the result.
            device: Of the result.
            generator: For reproducible noise; one, or one for each waveform.
            latents: Unscaled noise `[batch_size, channels, time, frequency]`, in place of the generator's.

        Returns:
            `[batch_size, channels, time, frequency]`.
        """
        if latents is None:
            shape = (batch_size, *self._latent_shape(audio_length_in_s))
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        return latents.to(device=device, dtype=dtype) * self.scheduler.init_noise_sigma

    @property
    def _seconds_per_frame(self) -> float:
        return math.prod(self.vocoder.config.upsample_rates) / self.vocoder.config.sampling_rate

    def _num_frames(self, audio_length_in_s: float) -> int:
        # The rounding keeps 10.24 / 0.01 = 1024.0000000000001 from asking for one frame more.
        return math.ceil(round(audio_length_in_s / self._seconds_per_frame, 6))

    def _latent_shape(self, audio_length_in_s: float) -> tuple[int, int, int]:
        time = math.ceil(self._num_frames(audio_length_in_s) / self.vae_scale_factor)
        frequency = self.vocoder.config.model_in_dim // self.vae_scale_factor
        return self.unet.config.in_channels, time, frequency

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Decodes music `latents` `[batch, channels, time, frequency]` to log-mel `[batch, 1, frames, bands]`."""
        return self.vae.decode((1 / self.vae.config.scaling_factor * latents).to(self.vae.dtype)).sample

    @torch.no_grad()
    def mel_spectrogram_to_waveform(self, mel_spectrogram: torch.Tensor) -> torch.Tensor:
        """Turns log-mel spectrograms into waveforms.

        Args:
            mel_spectrogram: `[batch, 1, frames, bands]` or `[batch, frames, bands]`.

        Returns:
            `[batch, samples]`, float32, on the CPU.
        """
        if mel_spectrogram.ndim == 4:
            mel_spectrogram = mel_spectrogram.squeeze(1)
        return self.vocoder(mel_spectrogram.to(self.vocoder.dtype)).cpu().float()

    def fit_image_features(
        self, image_features: ImageFeatures, latents: torch.Tensor, synapse_scale: float | list[float] = 1.0
    ) -> tuple[ImageFeatures, torch.Tensor]:
        """Fits recorded features to the music UNet, once for all denoising steps (visual synapse, method section 2).

        Args:
            image_features: As recorded.
            latents: The music latents `[batch, channels, time, frequency]`, for their size.
            synapse_scale: Multiplies every alpha, or one number for each layer.

        Returns:
            The features by layer of the music UNet, and the scaled alphas `[layers]`.
        """
        num_tokens = self.synapse.num_tokens(*latents.shape[-2:])
        keys, values, alphas = self.synapse(image_features.keys, image_features.values, num_tokens, synapse_scale)
        return replace(image_features, keys=keys, values=values), alphas

    def _warn_if_trained_otherwise(self, image_features: ImageFeatures) -> None:
        config = self.synapse.config
        if config.image_latents is None:
            return
        trained = {"image_size": config.image_size, "num_inversion_steps": config.num_inversion_steps}
        given = {"image_size": image_features.image_size, "num_inversion_steps": len(image_features.timesteps)}
        for name, value in trained.items():
            if value is not None and given[name] is not None and given[name] != value:
                logger.warning(f"The synapse was trained with `{name}={value}`, this call uses {given[name]}.")
        if config.image_latents != "inversion":
            logger.warning(
                f"The synapse was trained with image latents from {config.image_latents!r}, this call inverts."
            )

    def _guide(self, noise_pred: torch.Tensor) -> torch.Tensor:
        """Combines the guidance branches: classifier-free, or after InstructPix2Pix (arXiv 2211.09800, equation 3)."""
        if self._image_guidance_scale is not None:
            noise_pred_free, noise_pred_image, noise_pred_text = noise_pred.chunk(3)
            noise_pred_image_delta = self._image_guidance_scale * (noise_pred_image - noise_pred_free)
            noise_pred_free = noise_pred_free + noise_pred_image_delta
            return noise_pred_free + self._guidance_scale * (noise_pred_text - noise_pred_image)
        if self.do_classifier_free_guidance:
            noise_pred_uncond, noise_pred_text = noise_pred.chunk(2)
            return noise_pred_uncond + self._guidance_scale * (noise_pred_text - noise_pred_uncond)
        return noise_pred

    @torch.no_grad()
    @_one_at_a_time
    def __call__(
        self,
        image: Image | None = None,
        prompt: str | list[str] | None = None,
        audio_length_in_s: float | None = None,
        num_inference_steps: int = 50,
        num_inversion_steps: int = 10,
        guidance_scale: float = 3.0,
        image_guidance_scale: float | None = None,
        synapse_scale: float | list[float] = 1.0,
        negative_prompt: str | list[str] | None = None,
        num_waveforms_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        image_prompt: str | list[str] = "",
        image_size: int | None = None,
        image_features: ImageFeatures | None = None,
        feature_source: str = "inversion",
        output_type: str = "np",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> AudioPipelineOutput | tuple[np.ndarray | torch.Tensor]:
        """Generates music.

        One picture serves N prompts, one prompt serves N pictures, N pictures meet N prompts.

        Args:
            image: PIL images, numpy arrays `[height, width, 3]`, torch tensors `[3, height, width]`, batches or lists
                of them, uint8 or float in [0, 1]. None is plain text-to-music.
            prompt: One text or a list. With a picture it may be left out.
            audio_length_in_s: In seconds. None is the UNet's own length.
            num_inference_steps: Denoising steps of the music.
            num_inversion_steps: Inversion steps of the picture; each music step uses the features nearest in time.
            guidance_scale: Strength of the text; 1 or less is no guidance.
            image_guidance_scale: Strength of the picture beside that of the text, at the cost of a third branch.
            synapse_scale: Multiplies every alpha of the synapse, or one number for each layer. 0 ignores the picture.
            negative_prompt: What to keep out; one text or as many as prompts.
            num_waveforms_per_prompt: Waveforms for each prompt (or each picture, where those are more).
            eta: The DDIM paper's, in [0, 1]; for schedulers that take it.
            generator: For reproducible noise; one, or one for each waveform.
            latents: Initial noise `[batch, channels, time, frequency]`, unscaled, in place of the generator's.
            prompt_embeds: `[prompts, channels]`, in place of `prompt`; see `encode_prompt`.
            negative_prompt_embeds: In place of `negative_prompt`.
            image_prompt: The text for the picture's UNet; the empty text inverts best.
            image_size: The side in pixels to which pictures are prepared. None is the image UNet's own.
            image_features: In place of `image`; see `encode_image`.
            feature_source: `"inversion"` records while inverting; `"reconstruction"` inverts, then records while
                sampling back, as the paper does, at twice the cost.
            output_type: `"np"` or `"pt"` (waveforms), `"mel"` (log-mel spectrograms `[batch, frames, bands]`) or
                `"latent"`.
            return_dict: Whether to return `AudioPipelineOutput` instead of a tuple.
            cross_attention_kwargs: For the attention processors of the music UNet.
            callback_on_step_end: Called as `callback(pipe, step, timestep, tensors)` after each step; the tensors that
                it returns replace the loop's.
            callback_on_step_end_tensor_inputs: Which of `latents` and `prompt_embeds` (all guidance branches) it gets.

        Returns:
            `AudioPipelineOutput` with `audios`: float32 `[batch, samples]`, exactly `audio_length_in_s` long, at
            `pipe.vocoder.config.sampling_rate`.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If an argument is out of range or contradicts another one.
            FloatingPointError: If NaN or infinite values appear; the message names the stage.

        Examples:
            ```py
            >>> import PIL.Image
            >>> from melfusion_pipeline import MelFusionPipeline

            >>> pipe = MelFusionPipeline.from_pretrained("path/to/checkpoint")
            >>> audio = pipe(PIL.Image.open("harbour.jpg"), "slow piano").audios[0]
            ```
        """
        # 1. Check inputs
        image = None if image is None else as_pil_images(image)
        if audio_length_in_s is None:
            audio_length_in_s = self.unet.config.sample_size * self.vae_scale_factor * self._seconds_per_frame
        num_prompts, num_images = self.check_inputs(
            image,
            prompt,
            audio_length_in_s,
            num_inference_steps,
            num_inversion_steps,
            guidance_scale,
            image_guidance_scale,
            synapse_scale,
            negative_prompt,
            num_waveforms_per_prompt,
            eta,
            generator,
            latents,
            prompt_embeds,
            negative_prompt_embeds,
            image_prompt,
            image_size,
            image_features,
            feature_source,
            output_type,
            cross_attention_kwargs,
            callback_on_step_end_tensor_inputs,
            callback_on_step_end,
        )
        self._guidance_scale = guidance_scale
        self._image_guidance_scale = image_guidance_scale
        self._interrupt = False
        device = self._execution_device
        batch_size = max(num_prompts, num_images)

        # 2. Encode the prompt
        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            "" if prompt is None and prompt_embeds is None else prompt,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            self.do_classifier_free_guidance,
            device,
        )
        _check_finite("the encoding of the prompt", prompt_embeds)
        branches = [negative_prompt_embeds] * (len(self.image_branches) - 1) + [prompt_embeds]
        prompt_embeds = torch.cat(
            [embeds.expand(batch_size, -1).repeat_interleave(num_waveforms_per_prompt, dim=0) for embeds in branches]
        )

        # 3. Encode the picture: invert, record
        if image is not None:
            image_features = self.encode_image(image, image_prompt, image_size, num_inversion_steps, feature_source)

        # 4. Prepare timesteps and latents
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        latents = self.prepare_latents(
            batch_size * num_waveforms_per_prompt, audio_length_in_s, prompt_embeds.dtype, device, generator, latents
        )
        step_parameters = inspect.signature(self.scheduler.step).parameters
        step_kwargs = {"eta": eta, "generator": generator}
        step_kwargs = {name: value for name, value in step_kwargs.items() if name in step_parameters}

        # 5. Fit the picture's keys and values to the music UNet
        blenders = KVBlenders([])
        if image_features is not None:
            self._warn_if_trained_otherwise(image_features)
            image_features, alphas = self.fit_image_features(image_features, latents, synapse_scale)
            blenders = KVBlenders(self.synapse.config.music_layers)

        # 6. Denoise
        with use_attn_processors(self.unet, blenders), self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                if image_features is not None:
                    branch_alphas = torch.outer(alphas, alphas.new_tensor(self.image_branches))
                    blenders.read(image_features.at(t), branch_alphas)

                latent_model_input = torch.cat([latents] * len(self.image_branches))
                latent_model_input = self.scheduler.scale_model_input(latent_model_input, t)
                noise_pred = self.unet(
                    latent_model_input,
                    t,
                    encoder_hidden_states=None,
                    class_labels=prompt_embeds,
                    cross_attention_kwargs=cross_attention_kwargs,
                ).sample
                latents = self.scheduler.step(self._guide(noise_pred), t, latents, **step_kwargs).prev_sample

                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "prompt_embeds": prompt_embeds}
                    tensors = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    returned = callback_on_step_end(self, i, t, tensors) or {}
                    if not isinstance(returned, dict):
                        raise TypeError(f"`callback_on_step_end` must return a dict or None, got {returned!r:.80}.")
                    latents = returned.pop("latents", latents)
                    prompt_embeds = returned.pop("prompt_embeds", prompt_embeds)
                if (i + 1) % self.scheduler.order == 0 or i == len(timesteps) - 1:
                    progress_bar.update()

        # 7. Decode
        _check_finite("denoising", latents)
        audio = latents
        if output_type != "latent":
            audio = self.decode_latents(latents)
            _check_finite("the VAE decoder", audio)
        if output_type == "mel":
            audio = audio.squeeze(1)[:, : self._num_frames(audio_length_in_s)]
        elif output_type != "latent":
            audio = self.mel_spectrogram_to_waveform(audio)
            _check_finite("the vocoder", audio)
            audio = audio[:, : round(audio_length_in_s * self.vocoder.config.sampling_rate)]
        if output_type == "np":
            audio = audio.numpy()

        self.maybe_free_model_hooks()
        if not return_dict:
            return (audio,)
        return AudioPipelineOutput(audios=audio)

    # -------------------------------------------------------------------------------- composing, saving, loading

    @classmethod
    def from_base_models(
        cls,
        image_model: str | os.PathLike,
        music_model: str | os.PathLike,
        synapse: str | os.PathLike | ModelMixin | None = None,
        **kwargs: Any,
    ) -> "MelFusionPipeline":
        """Composes a Stable Diffusion checkpoint with an AudioLDM or MusicLDM checkpoint.

        Args:
            image_model: Hub id or folder of a text-to-image checkpoint with a `UNet2DConditionModel`.
            music_model: Hub id or folder of an AudioLDM or MusicLDM checkpoint.
            synapse: Hub id or folder (of a synapse alone or of a whole pipeline), a `VisualSynapse`, or None:
                untrained, with alpha = 0, so that the music does not follow the picture yet.
            **kwargs: `torch_dtype` (or dtype), `variant`, `cache_dir`, `token`, `revision`, `local_files_only`, ...,
                as `from_pretrained` takes them. Only safetensors weights are read.

        Returns:
            A pipeline with every component.

        Raises:
            ValueError: If a UNet needs a conditioning that this pipeline does not give, or the decoders do not match.
        """
        dtype = kwargs.pop("torch_dtype", None)
        dtype = kwargs.pop("dtype", dtype)
        kwargs.setdefault("use_safetensors", True)
        hub_kwargs = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}

        def load(component_class: type, model: str | os.PathLike, subfolder: str) -> Any:
            folder = Path(model, subfolder)
            with _named_errors(folder):
                if not issubclass(component_class, torch.nn.Module):
                    return component_class.from_pretrained(model, subfolder=subfolder, **hub_kwargs)
                dtype_name = "torch_dtype" if issubclass(component_class, ModelMixin) else "dtype"
                load_kwargs = {**kwargs, dtype_name: dtype}
                component = component_class.from_pretrained(model, subfolder=subfolder, **load_kwargs)
            _check_weights(component, folder)
            return component

        scheduler_config = DDIMScheduler.load_config(music_model, subfolder="scheduler", **hub_kwargs)
        components = {
            "vae": load(AutoencoderKL, music_model, "vae"),
            "text_encoder": load(ClapTextModelWithProjection, music_model, "text_encoder"),
            "tokenizer": load(RobertaTokenizer, music_model, "tokenizer"),
            "unet": load(UNet2DConditionModel, music_model, "unet"),
            "scheduler": load(getattr(diffusers, scheduler_config["_class_name"]), music_model, "scheduler"),
            "vocoder": load(SpeechT5HifiGan, music_model, "vocoder"),
            "image_vae": load(AutoencoderKL, image_model, "vae"),
            "image_text_encoder": load(CLIPTextModel, image_model, "text_encoder"),
            "image_tokenizer": load(CLIPTokenizer, image_model, "tokenizer"),
            "image_unet": load(UNet2DConditionModel, image_model, "unet"),
            "image_scheduler": load(DDIMScheduler, image_model, "scheduler"),
        }
        _check_unets(components["image_unet"], components["unet"])
        synapse_class = importlib.import_module(f"{__package__}.modeling_melfusion").VisualSynapse
        if synapse is None:
            synapse = synapse_class.from_unets(components["image_unet"], components["unet"]).to(dtype).eval()
        elif not isinstance(synapse, ModelMixin):
            synapse = _load_synapse(synapse_class, synapse, torch_dtype=dtype, **kwargs)
        synapse.check_unets(components["image_unet"], components["unet"])
        return cls(**components, synapse=synapse)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "MelFusionPipeline":
        """Loads a checkpoint, as `DiffusionPipeline.from_pretrained`, from safetensors only.

        A folder whose index names another folder inside it as the checkpoint is followed there: so the root of this
        project's repository loads its bundled checkpoint.

        Args:
            pretrained_model_name_or_path: Hub id or folder.
            **kwargs: As `DiffusionPipeline.from_pretrained` takes them.

        Returns:
            The pipeline; the checkpoint's own code does not run.

        Raises:
            OSError: If files are missing or incomplete, also those of a folder named by the index.
            ValueError: If files are no JSON, or hold something else than the index says, or not all of the weights, or
                the folder named by the index lies outside. Either names the file or the folder.
        """
        kwargs.setdefault("use_safetensors", True)
        source = _follow_index(pretrained_model_name_or_path, cls.config_name)
        index = Path(source, cls.config_name)
        if index.is_file():
            _check_checkpoint(index, inspect.signature(cls).parameters.keys() - kwargs.keys())
        with _named_errors(source):
            pipe = super().from_pretrained(source, **kwargs)
            pipe._check_components()
            if pipe.synapse is not None:
                pipe.synapse.check_unets(pipe.image_unet, pipe.unet)
        for name in pipe.components.keys() - kwargs.keys():
            _check_weights(getattr(pipe, name), Path(source, name))
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "MelFusionPipeline":
        """Makes another pipeline of the same components, without memory of its own.

        Args:
            pipeline: The pipeline that has them.
            **kwargs: As `DiffusionPipeline.from_pipe` takes them, such as a component to use instead.

        Returns:
            The other pipeline.
        """
        # diffusers hands over models of the annotated class only, and this file must not import the synapse's.
        kwargs.setdefault("synapse", getattr(pipeline, "synapse", None))
        return super().from_pipe(pipeline, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Saves the pipeline with the code that loads it, as `DiffusionPipeline.save_pretrained`.

        Everything is written to a hidden folder in `save_directory` first and moved file by file when it is complete,
        so that a full disk leaves what was there before. Weights are safetensors whatever `safe_serialization` says.

        Args:
            save_directory: The folder, made if it does not exist.
            **kwargs: As `DiffusionPipeline.save_pretrained` takes them, such as `variant`.

        Raises:
            ValueError: If `save_directory` is a file.
        """
        if not kwargs.pop("safe_serialization", True):
            logger.warning("`safe_serialization=False` is ignored: this pipeline saves safetensors only.")
        target = Path(save_directory)
        if target.is_file():
            raise ValueError(f"`save_directory` must be a folder, got the file {target}.")
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", target.name)
        target.mkdir(parents=True, exist_ok=True)
        # Inside, because the folder may be a mount of its own, to which nothing can be moved from outside.
        with tempfile.TemporaryDirectory(dir=target, prefix=".partial-") as staging:
            super().save_pretrained(staging, **kwargs)
            # The index last: where it lies, what it names is complete.
            files = sorted(Path(staging).rglob("*"), key=lambda file: file.name == self.config_name)
            for file in files:
                if file.is_file():
                    destination = target / file.relative_to(staging)
                    destination.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(file, destination)

    def save_config(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Writes `model_index.json` and, beside it, the code that loads the checkpoint without this package.

        Arguments are those of `ConfigMixin.save_config`; the files go into `save_directory`.
        """
        for name in CODE_FILES:
            shutil.copyfile(Path(__file__).with_name(name), Path(save_directory, name))
        if self.synapse is not None:
            module = sys.modules[type(self.synapse).__module__]
            folder = Path(save_directory, "synapse")
            folder.mkdir(exist_ok=True)
            shutil.copyfile(module.__file__, folder / "modeling_melfusion.py")
        super().save_config(save_directory, **kwargs)

    def to_json_string(self) -> str:
        """The index as the Hub needs it: pipeline and synapse under their file names, not this package's."""
        config = json.loads(super().to_json_string())
        config["_class_name"] = ["pipeline_melfusion", "MelFusionPipeline"]
        if self.synapse is not None:
            config["synapse"] = ["modeling_melfusion", "VisualSynapse"]
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @classmethod
    def _dict_from_json_file(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # With the plain name diffusers uses this class and never runs the checkpoint's own code.
        config = super()._dict_from_json_file(*args, **kwargs)
        if isinstance(config.get("_class_name"), list):
            config["_class_name"] = config["_class_name"][-1]
        return config

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Reads the index, as `ConfigMixin.load_config`; the synapse's class is the installed one, not the file's."""
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        installed = f"{__package__}.modeling_melfusion"
        if (config.get("synapse") or [None])[0] == "modeling_melfusion" and installed in sys.modules:
            config["synapse"] = [installed, "VisualSynapse"]
        return loaded


def _follow_index(folder: str | os.PathLike, index_name: str) -> str | os.PathLike:
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"`pretrained_model_name_or_path` must be a str or a path, got {folder!r}.")
    index = Path(folder, index_name)
    checkpoint = _read_json(index).get(CHECKPOINT_KEY) if index.is_file() else None
    if checkpoint is None:
        return folder
    if not isinstance(checkpoint, str) or "\0" in checkpoint:
        raise ValueError(f"{index}: `{CHECKPOINT_KEY}` must be the path of a folder, got {checkpoint!r:.80}.")
    root = Path(folder).resolve()
    target = (root / checkpoint).resolve()
    if not target.is_relative_to(root):
        raise ValueError(f"{index} names the checkpoint {checkpoint!r}, which lies outside of its folder.")
    if not (target / index_name).is_file():
        raise FileNotFoundError(
            f"The bundled checkpoint is not there yet: {index} names {checkpoint!r}, which holds no {index_name}."
            " Compose a pipeline with `MelFusionPipeline.from_base_models(image_model, music_model)`, or load another"
            " checkpoint."
        )
    return target


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got {content!r:.80}.")
    return content


def _check_checkpoint(index: Path, names: Iterable[str]) -> None:
    """Refuses a folder whose files are missing, damaged or swapped: much of it would load, or fail without a name.

    Args:
        index: `model_index.json` in the folder.
        names: The components that are to be loaded.
    """
    entries = _read_json(index)
    if "_class_name" not in entries:
        raise ValueError(f"{index} is damaged or another file: it holds no _class_name.")
    for name, entry in entries.items():
        if name not in names or entry == [None, None]:
            continue
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(part, str) for part in entry):
            raise ValueError(f"{index}: `{name}` must be a pair of library and class, got {entry!r:.80}.")
        _check_component_files(index.with_name(name), entry[1])


def _check_component_files(folder: Path, class_name: str) -> None:
    kind = next((kind for kind in ("scheduler_", "tokenizer_") if kind[:-1] in class_name.lower()), "")
    config = folder / f"{kind}config.json"
    contents = {file.name: _read_json(file) for file in sorted(folder.glob("*.json"))}
    if config.name not in contents:
        raise FileNotFoundError(f"{config} is missing.")
    if kind == "tokenizer_" and not contents.keys() & {"tokenizer.json", "vocab.json"}:
        raise FileNotFoundError(f"{folder / 'tokenizer.json'} is missing: the tokenizer would know no words.")
    for name, keys in IDENTITY_KEYS.items():
        if name in contents and not contents[name].keys() & set(keys):
            raise ValueError(f"{folder / name} is damaged or another file: it holds no {' or '.join(keys)}.")

    found = contents[config.name].get("_class_name") or contents[config.name].get("tokenizer_class")
    family = str(contents[config.name].get("model_type", "")).partition("_")[0]
    if (found and str(found).removesuffix("Fast") != class_name.removesuffix("Fast")) or (
        not found and family not in class_name.lower()
    ):
        raise ValueError(f"{config} is of a {found or family}, the index names a {class_name}: are folders swapped?")
    for file in sorted(folder.glob("*.safetensors")):
        _weight_names(file)


def _weight_names(file: Path) -> set[str]:
    try:
        with safe_open(file, framework="pt") as weights:
            return set(weights.keys())
    except (SafetensorError, OSError) as error:
        raise OSError(f"{file} is no complete safetensors file: {error}. Get it again.") from error


def _check_weights(component: Any, folder: Path) -> None:
    """Refuses a component that its files hold in part only: the libraries leave the rest at random with a warning."""
    if not isinstance(component, torch.nn.Module) or getattr(component, "hf_quantizer", None) is not None:
        return
    stored = set().union(*map(_weight_names, folder.glob("*.safetensors")))
    missing = component.state_dict().keys() - stored
    # Older files have other names for some weights, which the libraries know: those are not missing.
    if stored and len(missing) > len(stored - component.state_dict().keys()):
        names = ", ".join(sorted(missing)[:3])
        raise ValueError(f"{folder} holds too few weights for a {type(component).__name__}: no {names}, ...")


@contextmanager
def _named_errors(source: str | os.PathLike) -> Iterator[None]:
    """Gives an error that does not say what could not be loaded a name."""
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:
        if os.fspath(source) in str(error):
            raise
        raise ValueError(f"{os.fspath(source)} cannot be loaded: {type(error).__name__}: {error}") from error


def _load_synapse(synapse_class: type, synapse: str | os.PathLike, **kwargs: Any) -> ModelMixin:
    """Loads a synapse from its own folder or repository, or from a whole pipeline's."""
    try:
        return synapse_class.from_pretrained(synapse, subfolder="synapse", **kwargs)
    except OSError:
        return synapse_class.from_pretrained(synapse, **kwargs)


def _check_unets(image_unet: ModelMixin, unet: ModelMixin) -> None:
    if image_unet.config.addition_embed_type is not None or image_unet.config.class_embed_type is not None:
        raise ValueError(
            "`image_model` needs conditioning beside its text (addition_embed_type="
            f"{image_unet.config.addition_embed_type!r}, class_embed_type={image_unet.config.class_embed_type!r}):"
            " use a checkpoint of the Stable Diffusion 1 or 2 family."
        )
    if unet.config.class_embed_type != "simple_projection":
        raise ValueError(
            f"`music_model` must condition on CLAP embeddings, but its class_embed_type is"
            f" {unet.config.class_embed_type!r}: use an AudioLDM or MusicLDM checkpoint."
        )


def _check_finite(stage: str, *tensors: torch.Tensor) -> None:
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise FloatingPointError(
            f"NaN or infinite values appeared in {stage}: its weights are damaged, or its values too large for"
            f" {tensors[0].dtype}. Try another dtype, or load the weights again."
        )


def _tokenize(tokenizer: Any, texts: list[str], max_length: int, device: torch.device) -> Any:
    inputs = tokenizer(texts, padding="max_length", max_length=max_length, truncation=True, return_tensors="pt")
    longest = max(len(ids) for ids in tokenizer(texts).input_ids)
    if longest > max_length:
        logger.warning(f"A text of {longest} tokens was cut to the {max_length} that the text encoder takes.")
    return inputs.to(device)


def _count(text: str | list[str] | None) -> int:
    return len(text) if isinstance(text, list) else 1


def _check_text(name: str, text: Any) -> None:
    texts = text if isinstance(text, list) else [text]
    if text is not None and not all(isinstance(single, str) for single in texts):
        raise TypeError(f"`{name}` must be a str or a list of str, got {text!r}.")
    if not texts:
        raise ValueError(f"`{name}` is an empty list: pass one text at least.")
    try:
        "".join(texts if text is not None else []).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"`{name}` holds characters that belong to no text: {error}.") from error


def _check_float_tensor(name: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        found = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(f"`{name}` must be a torch tensor of floating-point numbers, got {found}.")


def _check_choice(name: str, value: Any, choices: Any) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` must be one of {list(choices)}, got {value!r}.")


def _check_integer(name: str, value: Any, minimum: int, maximum: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{name}` must be an int, got {value!r}.")
    if value < minimum or (maximum is not None and value > maximum):
        limits = f"at least {minimum}" if maximum is None else f"in [{minimum}, {maximum}]"
        raise ValueError(f"`{name}` must be {limits}, got {value}.")


def _check_real(name: str, value: Any, minimum: float = -math.inf, maximum: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")
    # Compared instead of converted: an int may be larger than any float.
    if not max(minimum, -sys.float_info.max) <= value <= min(maximum, sys.float_info.max):
        limits = "" if minimum == -math.inf else f" and in [{minimum:g}, {maximum:g}]"
        raise ValueError(f"`{name}` must be finite{limits}, got {value}.")

"""Refusing what a call cannot do, before any model runs."""

import inspect
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DDIMInverseScheduler, DPMSolverMultistepInverseScheduler, PNDMScheduler
from diffusers.utils import logging

from .arguments_melfusion import check_integer, check_real
from .features_melfusion import FEATURE_SOURCES, ImageFeatures
from .given_audio_melfusion import as_stretches
from .pictures_melfusion import MAX_IMAGE_SIZE
from .waveforms_melfusion import normalize_waveform

logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("np", "pt", "mel", "latent")
# Larger values are taken for slips of the keyboard: no machine could compute them.
MAX_AUDIO_LENGTH_IN_S = 3600.0
MAX_WAVEFORMS_PER_PROMPT = 1000
MAX_WINDOW_OVERLAP = 0.9
PREDICTION_TYPES = ("epsilon", "v_prediction")


def check_call(
    pipe: Any,
    *,
    image: list[PIL.Image.Image] | None,
    prompt: str | list[str] | None,
    audio_length_in_s: float,
    num_inference_steps: int,
    num_inversion_steps: int,
    guidance_scale: float,
    image_guidance_scale: float | None,
    image_guidance_end: float,
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
    image_start_in_s: list[float] | None,
    window_length_in_s: float | None,
    window_overlap: float,
    window_batch_size: int | None,
    audio: torch.Tensor | None,
    audio_sampling_rate: int | None,
    strength: float | None,
    mask_start_in_s: float | list[float] | None,
    mask_end_in_s: float | list[float] | None,
    output_type: str,
    cross_attention_kwargs: dict[str, Any] | None,
    callback_on_step_end_tensor_inputs: list[str],
    callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
) -> tuple[int, int]:
    """Refuses arguments of `__call__` that cannot work, before any model runs.

    Refused are: a wrong type; a number that is not finite or out of range; an empty list; a tensor of another shape or
    with NaN; a picture beside features, or a prompt beside its embeddings; settings of encoding a picture beside
    features that were encoded otherwise; nothing to make music of; numbers of pictures, prompts,
    negative prompts or generators that do not fit together; features that another UNet recorded; components that do
    not belong together; windows that the UNet cannot take; a storyboard whose pictures do not follow one another
    within the piece; given music that is silent, too short, or of which nothing is to be made; masks that are empty,
    overlap or lie outside of it; a scheduler that does not step through the training's noise schedule.

    Args:
        pipe: The pipeline that is called.
        image: The pictures as `as_pil_images` gives them, or None.
        audio_length_in_s: As in `__call__`, but not None.
        prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, image_prompt: As in `__call__`.
        guidance_scale, image_guidance_scale, image_guidance_end, synapse_scale: As in `__call__`.
        image_size, image_features, feature_source, num_inversion_steps: As in `__call__`.
        num_inference_steps, num_waveforms_per_prompt, eta, generator, latents: As in `__call__`.
        image_start_in_s, window_length_in_s, window_overlap, window_batch_size: As in `__call__`.
        audio: What `as_waveforms` gives, `[pieces, samples]`, or None.
        audio_sampling_rate, strength, mask_start_in_s, mask_end_in_s: As in `__call__`.
        output_type, cross_attention_kwargs: As in `__call__`.
        callback_on_step_end, callback_on_step_end_tensor_inputs: As in `__call__`.

    Returns:
        The number of prompts and the number of pictures (0 without a picture).

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a value is out of range or contradicts another one. Either names argument, value and remedy.
    """
    check_components(pipe)
    if audio is not None:
        _check_audible(audio)
    check_integer("num_inference_steps", num_inference_steps, 1, pipe.scheduler.config.num_train_timesteps)
    check_integer("num_waveforms_per_prompt", num_waveforms_per_prompt, 1, MAX_WAVEFORMS_PER_PROMPT)
    check_real("guidance_scale", guidance_scale)
    check_real("eta", eta, 0.0, 1.0)
    check_real("image_guidance_end", image_guidance_end, 0.0, 1.0)
    frame_length = pipe.vae_scale_factor * pipe._seconds_per_frame
    check_real("audio_length_in_s", audio_length_in_s, frame_length * (1 - 1e-6), MAX_AUDIO_LENGTH_IN_S)
    _check_windows(pipe, window_length_in_s, window_overlap, window_batch_size)
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
        _check_choice("callback_on_step_end_tensor_inputs", name, pipe._callback_tensor_inputs)

    num_images = 0
    if image is not None and image_features is not None:
        raise ValueError("Pass `image` or `image_features`, not both: the features already stand for the picture.")
    if image is not None:
        num_images = len(image)
        check_image_inputs(pipe, num_images, image_prompt, image_size, num_inversion_steps, feature_source)
    if image_features is not None:
        num_images = _check_image_features(pipe, image_features)
        _check_encoded_so(image_features, image_prompt, image_size, num_inversion_steps, feature_source)
    if num_images:
        check_synapse_scale(pipe.synapse, synapse_scale)
    if image_guidance_scale is not None:
        check_real("image_guidance_scale", image_guidance_scale)
        if not num_images:
            raise ValueError(
                f"`image_guidance_scale` is {image_guidance_scale}, but there is no picture: pass `image` or"
                " `image_features`, or leave it None."
            )

    num_prompts = check_prompts(pipe, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, num_images)
    if num_images > 1 and num_prompts > 1 and num_images != num_prompts:
        raise ValueError(
            f"{num_images} pictures cannot meet {num_prompts} prompts: pass equal numbers, or one of either."
        )
    num_pieces = max(num_prompts, num_images)
    if image_start_in_s is not None:
        _check_storyboard(image_start_in_s, num_images, num_prompts, audio_length_in_s)
        num_pieces = 1
    settings = {
        "audio_sampling_rate": audio_sampling_rate,
        "strength": strength,
        "mask_start_in_s": mask_start_in_s,
        "mask_end_in_s": mask_end_in_s,
    }
    if audio is None:
        _check_no_audio(settings)
    else:
        num_pieces = _check_num_audios(len(audio), num_pieces, image_start_in_s is not None)
        _check_strength(pipe, strength, num_inference_steps)
        _check_masks(pipe, audio, audio_length_in_s, strength, mask_start_in_s, mask_end_in_s)
    batch_size = num_pieces * num_waveforms_per_prompt
    _check_generator(generator, batch_size)
    if latents is not None:
        check_float_tensor("latents", latents)
        shape = (batch_size, *pipe._latent_shape(audio_length_in_s))
        if tuple(latents.shape) != shape:
            raise ValueError(
                f"`latents` must have the shape {list(shape)} (batch, channels, time, frequency) for"
                f" {audio_length_in_s} s, got {list(latents.shape)}."
            )
        if not latents.isfinite().all():
            raise ValueError("`latents` holds NaN or infinite values.")
    return num_prompts, num_images


def _check_windows(
    pipe: Any, window_length_in_s: float | None, window_overlap: float, window_batch_size: int | None
) -> None:
    check_real("window_overlap", window_overlap, 0.0, MAX_WINDOW_OVERLAP)
    if window_batch_size is not None:
        check_integer("window_batch_size", window_batch_size, 1)
    name = "window_length_in_s"
    if window_length_in_s is None:
        name, window_length_in_s = "default_window_length_in_s", pipe.config.default_window_length_in_s
    if window_length_in_s is None:
        return
    check_real(name, window_length_in_s)
    # In fewer frames the UNet's deepest level would have none that is whole.
    shortest = 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    shortest_in_s = shortest * pipe.vae_scale_factor * pipe._seconds_per_frame
    if not shortest_in_s * (1 - 1e-6) <= window_length_in_s <= MAX_AUDIO_LENGTH_IN_S:
        raise ValueError(
            f"`{name}` must be in [{shortest_in_s:g}, {MAX_AUDIO_LENGTH_IN_S:g}], got"
            f" {window_length_in_s}: `unet` halves a window {shortest.bit_length() - 1} times and so needs {shortest}"
            " latent frames. None is the length it was trained with."
        )


def _check_storyboard(image_start_in_s: Any, num_images: int, num_prompts: int, audio_length_in_s: float) -> None:
    if isinstance(image_start_in_s, (np.ndarray, torch.Tensor)):
        image_start_in_s = image_start_in_s.tolist()
    if not isinstance(image_start_in_s, (list, tuple)):
        raise TypeError(
            f"`image_start_in_s` must be a list of seconds, one a picture, or None, got {image_start_in_s!r:.80}."
        )
    for start in image_start_in_s:
        check_real("image_start_in_s", start)
    if not num_images:
        raise ValueError(
            f"`image_start_in_s` is {image_start_in_s!r:.80}, but there is no picture: pass as many in `image` or"
            " `image_features`, or leave it None."
        )
    if len(image_start_in_s) != num_images:
        raise ValueError(
            f"`image_start_in_s` holds {len(image_start_in_s)} seconds for {num_images} pictures: pass one a picture,"
            " or None for a piece of each."
        )
    if image_start_in_s[0] != 0:
        raise ValueError(
            f"`image_start_in_s` must begin at 0, got {image_start_in_s[0]}: the music begins with the first picture."
        )
    for before, after in pairwise(image_start_in_s):
        if not before < after:
            raise ValueError(
                f"`image_start_in_s` must ascend, got {before} before {after}: sort the pictures by when they begin."
            )
    if image_start_in_s[-1] >= audio_length_in_s:
        raise ValueError(
            f"The last of `image_start_in_s`, {image_start_in_s[-1]} s, lies past the end of the piece: pass an"
            f" `audio_length_in_s` above it, got {audio_length_in_s} s, or leave that picture out."
        )
    if num_prompts not in (1, num_images):
        raise ValueError(
            f"`image_start_in_s` makes one piece of {num_images} pictures, which cannot meet {num_prompts} prompts:"
            " pass one for the whole or one a picture, and call once for each further piece."
        )


def _check_no_audio(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        if value is not None:
            raise ValueError(f"`{name}` is {value!r:.80}, but there is no music to use it on: pass `audio`.")


def _check_num_audios(num_audios: int, num_pieces: int, is_storyboard: bool) -> int:
    if num_audios > 1 and (is_storyboard or num_pieces not in (1, num_audios)):
        raise ValueError(
            f"`audio` holds {num_audios} pieces, which cannot meet {num_pieces} prompts, pictures or storyboards: pass"
            " one piece, or one for each prompt or picture. Channels go into the last axis but one."
        )
    return max(num_audios, num_pieces)


def _check_audible(audio: torch.Tensor) -> None:
    silent = (~normalize_waveform(audio).any(dim=-1)).nonzero()[:, 0].tolist()
    if silent:
        raise ValueError(
            f"`audio` is silent (piece {silent[0]}) where its channels are averaged: leave it out to make music of the"
            " prompt alone, or pass one channel of it."
        )


def _check_strength(pipe: Any, strength: float | None, num_inference_steps: int) -> None:
    if strength is None:
        return
    check_real("strength", strength, 0.0, 1.0)
    if int(num_inference_steps * strength) < 1:
        # Rounded up: of 0.333333 three steps leave none.
        least = math.ceil(1e4 / num_inference_steps) / 1e4
        raise ValueError(
            f"`strength` is {strength}, of which `num_inference_steps` = {num_inference_steps} leaves no step: pass"
            f" {least:g} or more, or more steps."
        )
    if strength < 1.0 and isinstance(pipe.scheduler, PNDMScheduler) and not pipe.scheduler.config.skip_prk_steps:
        raise ValueError(
            f"`strength` is {strength}, but `scheduler` is a PNDMScheduler whose Runge-Kutta steps are its first: set"
            " its `skip_prk_steps`, use another scheduler, or pass 1."
        )


def _check_masks(
    pipe: Any,
    audio: torch.Tensor,
    audio_length_in_s: float,
    strength: float | None,
    mask_start_in_s: float | list[float] | None,
    mask_end_in_s: float | list[float] | None,
) -> None:
    given_length_in_s, tolerance = audio.shape[-1] / pipe.sampling_rate, 0.5 / pipe.sampling_rate
    goes_on = audio_length_in_s > given_length_in_s + tolerance
    if audio_length_in_s < given_length_in_s - tolerance:
        raise ValueError(
            f"`audio_length_in_s` is {audio_length_in_s}, but `audio` lasts {given_length_in_s:g} s: cut it, or leave"
            " `audio_length_in_s` None."
        )
    stretches = as_stretches(mask_start_in_s, mask_end_in_s, given_length_in_s)
    for stretch in stretches:
        for name, bound in zip(("mask_start_in_s", "mask_end_in_s"), stretch):
            check_real(name, bound)
        start, end = stretch
        if not -tolerance <= start < end - tolerance <= given_length_in_s:
            raise ValueError(
                f"`mask_start_in_s` and `mask_end_in_s` must ascend within `audio`, from 0 to {given_length_in_s:g} s,"
                f" by a sample at least, got {start} and {end}. What lies beyond comes of a longer"
                " `audio_length_in_s`."
            )
    for (_, end), (start, _) in pairwise(stretches):
        if start < end:
            raise ValueError(
                f"The stretches of `mask_start_in_s` and `mask_end_in_s` must not overlap, and ascend, got one that"
                f" ends at {end} s before one that begins at {start} s: sort them, or make them one."
            )
    if goes_on and strength not in (None, 1.0):
        raise ValueError(
            f"`strength` is {strength}, but `audio_length_in_s` goes on beyond `audio`, where there is nothing to"
            " vary: leave it None, and vary in a call of its own."
        )
    if not (goes_on or stretches or strength is not None):
        raise ValueError(
            "`audio` alone says not what to make of it: pass `strength` for a variation, `mask_start_in_s` and"
            " `mask_end_in_s` to make a stretch anew, or a longer `audio_length_in_s` to go on."
        )


def check_prompts(
    pipe: Any,
    prompt: str | list[str] | None,
    negative_prompt: str | list[str] | None,
    prompt_embeds: torch.Tensor | None,
    negative_prompt_embeds: torch.Tensor | None,
    num_images: int = 0,
) -> int:
    """Refuses texts and embeddings of texts that cannot be encoded, or not together.

    Args:
        pipe: The pipeline that is called.
        prompt, negative_prompt: As in `__call__`.
        prompt_embeds, negative_prompt_embeds: As in `__call__`, `[prompts, channels]` with AudioLDM and MusicLDM.
        num_images: The number of pictures; without one there must be a prompt.

    Returns:
        The number of prompts.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a value is unusable or does not fit the others. Either names argument, value and remedy.
    """
    if prompt is None and prompt_embeds is None and not num_images:
        raise ValueError("There is nothing to make music of: pass `image`, `prompt` or both.")
    counts = []
    for name, text, embeds in (
        ("prompt", prompt, prompt_embeds),
        ("negative_prompt", negative_prompt, negative_prompt_embeds),
    ):
        check_text(name, text)
        if text is not None and embeds is not None:
            raise ValueError(f"Pass `{name}` or `{name}_embeds`, not both: got {text!r} and a tensor.")
        counts.append(_count(text) if embeds is None else pipe.prompts.check(f"{name}_embeds", embeds))

    num_prompts, num_negatives = counts
    if num_negatives not in (1, num_prompts):
        raise ValueError(
            f"{num_negatives} negative prompts do not match {num_prompts} prompts: pass equal numbers, or one"
            " `negative_prompt` for all."
        )
    return num_prompts


def check_image_inputs(
    pipe: Any,
    num_images: int,
    image_prompt: str | list[str],
    image_size: int | None,
    num_inversion_steps: int,
    feature_source: str,
) -> None:
    """Refuses arguments of `encode_image` that cannot work, before any model runs.

    Args:
        pipe: The pipeline that is called.
        num_images: The number of pictures.
        image_prompt, image_size, num_inversion_steps, feature_source: As in `encode_image`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a value is out of range or does not fit the others. Either names argument, value and remedy.
    """
    _check_present(pipe, ("image_vae", "image_unet", "image_scheduler", "synapse"), "A picture")
    _check_scheduler("image_scheduler", pipe.image_scheduler)
    pipe.synapse.check_unets(pipe.image_unet, pipe.unet)
    check_integer("num_inversion_steps", num_inversion_steps, 1, pipe.image_scheduler.config.num_train_timesteps)
    _check_choice("feature_source", feature_source, FEATURE_SOURCES)
    check_text("image_prompt", image_prompt)
    if image_prompt is None or _count(image_prompt) not in (1, num_images):
        raise ValueError(f"`image_prompt` must be one text or {num_images}, one a picture, got {image_prompt!r}.")
    if image_size is not None:
        check_integer("image_size", image_size, pipe.image_vae_scale_factor)
        if image_size % pipe.image_vae_scale_factor or image_size > MAX_IMAGE_SIZE:
            raise ValueError(
                f"`image_size` must be a multiple of {pipe.image_vae_scale_factor} pixels, at most"
                f" {MAX_IMAGE_SIZE}, got {image_size}."
            )
    prediction_type = pipe.image_scheduler.config.prediction_type
    _check_choice("image_scheduler.config.prediction_type", prediction_type, PREDICTION_TYPES)


def _check_image_features(pipe: Any, image_features: ImageFeatures) -> int:
    if not isinstance(image_features, ImageFeatures):
        raise TypeError(f"`image_features` must be what `encode_image` returns, got {type(image_features).__name__}.")
    _check_present(pipe, ("synapse",), "`image_features`")
    pipe.synapse.check_unets(None, pipe.unet)
    pipe.synapse.check_image_features(image_features.keys)
    if not image_features.is_finite:
        raise ValueError("`image_features` holds NaN or infinite values.")
    return image_features.num_images


def _check_encoded_so(
    image_features: ImageFeatures,
    image_prompt: str | list[str],
    image_size: int | None,
    num_inversion_steps: int | None,
    feature_source: str | None,
) -> None:
    """Refuses settings of `encode_image` that are not those of features; those that are may be said again."""
    check_text("image_prompt", image_prompt)
    if image_prompt:
        # Features do not tell theirs. Like `prompt` beside `prompt_embeds` it stands beside what was made of it.
        raise ValueError(
            f"Pass `image_prompt` or `image_features`, not both: got {image_prompt!r:.80} beside features, which were"
            " encoded with a prompt already. `encode_image` takes it."
        )
    for name, value in (("image_size", image_size), ("num_inversion_steps", num_inversion_steps)):
        if value is not None:
            check_integer(name, value, 1)
    if feature_source is not None:
        _check_choice("feature_source", feature_source, FEATURE_SOURCES)
    for name, value, recorded in (
        ("image_size", image_size, image_features.image_size),
        ("num_inversion_steps", num_inversion_steps, len(image_features.timesteps)),
        ("feature_source", feature_source, image_features.feature_source),
    ):
        if value is not None and recorded is not None and value != recorded:
            raise ValueError(
                f"`{name}` is {value!r:.80}, but `image_features` were encoded with {recorded!r}: leave it None, or"
                " encode the picture anew by `encode_image`."
            )


def _check_present(pipe: Any, names: tuple[str, ...], needed_by: str) -> None:
    missing = [name for name in names if getattr(pipe, name) is None]
    if missing:
        raise ValueError(
            f"{needed_by} cannot be used: this pipeline was made or loaded without {', '.join(missing)}. Load it with"
            " them, or pass `prompt` alone."
        )


def check_components(pipe: Any) -> None:
    """Refuses schedulers that cannot work, and components in one another's place, as far as they can be told apart.

    Args:
        pipe: The pipeline that holds the components; those that are None are not checked.

    Raises:
        ValueError: Naming the component.
    """
    for name in ("scheduler", "image_scheduler"):
        _check_scheduler(name, getattr(pipe, name))
    pipe.prompts.check_components()
    for name, channels in (("vae", 1), ("image_vae", 3)):
        vae = getattr(pipe, name)
        if vae is not None and vae.config.out_channels != channels:
            stereo = " Stereo music is not served." if (name, vae.config.out_channels) == ("vae", 2) else ""
            raise ValueError(
                f"`{name}` must decode to {channels} channels, but has {vae.config.out_channels}.{stereo}"
            )
    if None not in (pipe.image_vae, pipe.image_unet):
        found, expected = pipe.image_vae.config.latent_channels, pipe.image_unet.config.in_channels
        if found != expected:
            raise ValueError(
                f"`image_vae` has latents of {found} channels, but `image_unet` takes {expected}: they do not belong"
                " together."
            )
    for tokenizer_name in ("tokenizer", "tokenizer_2", "image_tokenizer"):
        encoder_name = tokenizer_name.replace("tokenizer", "text_encoder")
        tokenizer, encoder = getattr(pipe, tokenizer_name), getattr(pipe, encoder_name)
        if None not in (tokenizer, encoder) and len(tokenizer) > encoder.config.vocab_size:
            raise ValueError(
                f"`{tokenizer_name}` knows {len(tokenizer)} tokens, but `{encoder_name}` only"
                f" {encoder.config.vocab_size}: they do not belong together."
            )


def _check_scheduler(name: str, scheduler: Any) -> None:
    """Refuses a scheduler that counts time otherwise than the training did, or cannot step from noise to music."""
    if scheduler is None:
        return
    config = scheduler.config
    trained = hasattr(scheduler, "alphas_cumprod") and hasattr(scheduler, "init_noise_sigma")
    flows = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    if not trained or flows or config.get("timestep_type") == "continuous":
        raise ValueError(
            f"`{name}` is a {type(scheduler).__name__}, whose timesteps are not those with which the UNet was trained."
            " Use one with a noise schedule of training steps, without flow sigmas or continuous timesteps, such as"
            " DDIMScheduler, EulerDiscreteScheduler or DPMSolverMultistepScheduler."
        )
    parameters = inspect.signature(scheduler.step).parameters.values()
    needed = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    inverse = isinstance(scheduler, (DDIMInverseScheduler, DPMSolverMultistepInverseScheduler))
    # The picture's scheduler only tells its noise schedule; the music's also makes the steps.
    if name == "scheduler" and (inverse or needed[:3] != ["model_output", "timestep", "sample"] or needed[3:]):
        raise ValueError(
            f"`{name}` is a {type(scheduler).__name__}, which does not turn noise into music step by step. Use one"
            " such as DDIMScheduler, EulerDiscreteScheduler or DPMSolverMultistepScheduler."
        )


def check_branches(prompt_embeds: torch.Tensor, num_waveforms: int, num_branches: int) -> None:
    """Refuses embeddings that a callback returned for another number of waveforms or guidance branches.

    Args:
        prompt_embeds: `[branches * waveforms, channels]`.
        num_waveforms: The number of waveforms.
        num_branches: The number of guidance branches.

    Raises:
        ValueError: If the number of rows is not the product of the two.
    """
    if len(prompt_embeds) != num_waveforms * num_branches:
        raise ValueError(
            f"`callback_on_step_end` left `prompt_embeds` with {len(prompt_embeds)} rows, but {num_waveforms}"
            f" waveforms in {num_branches} guidance branches need {num_waveforms * num_branches}. A callback that ends"
            " the guidance must keep a row for each waveform, and set `pipe._image_guidance_scale = None` where a"
            " picture guides."
        )


def warn_if_trained_otherwise(synapse: Any, image_features: ImageFeatures, num_inversion_steps: int) -> None:
    """Warns of features that were recorded otherwise than those with which a synapse was trained.

    Args:
        synapse: The `VisualSynapse`; one that does not tell how it was trained is not compared.
        image_features: The features that it is to fit.
        num_inversion_steps: Of which they are all, or those that the call reads.
    """
    config = synapse.config
    if config.image_latents is None:
        return
    trained = {"image_size": config.image_size, "num_inversion_steps": config.num_inversion_steps}
    given = {"image_size": image_features.image_size, "num_inversion_steps": num_inversion_steps}
    for name, value in trained.items():
        if value is not None and given[name] is not None and given[name] != value:
            logger.warning(f"The synapse was trained with `{name}={value}`, this call uses {given[name]}.")
    if (config.image_latents == "noising") != (image_features.feature_source == "noising"):
        logger.warning(
            f"The synapse was trained with image latents from {config.image_latents!r}, this call's are from"
            f" {image_features.feature_source!r}."
        )


def check_synapse_scale(synapse: Any, synapse_scale: float | list[float]) -> None:
    """Refuses what is neither one number nor one for each layer.

    Args:
        synapse: The `VisualSynapse`.
        synapse_scale: Multiplies every alpha, or one number for each layer.

    Raises:
        TypeError: If it holds anything but real numbers.
        ValueError: If a number is not finite, or there are more or fewer than layers.
    """
    num_layers = len(synapse.config.music_layers)
    if isinstance(synapse_scale, (np.ndarray, torch.Tensor)) and synapse_scale.ndim:
        synapse_scale = synapse_scale.tolist()
    if not isinstance(synapse_scale, (list, tuple)):
        return check_real("synapse_scale", synapse_scale)
    if len(synapse_scale) != num_layers:
        raise ValueError(
            f"`synapse_scale` must be one number or {num_layers}, one a layer, got {len(synapse_scale)} numbers."
        )
    for scale in synapse_scale:
        check_real("synapse_scale", scale)


def _check_generator(generator: Any, batch_size: int) -> None:
    generators = generator if isinstance(generator, list) else [generator]
    if generator is not None and not all(isinstance(single, torch.Generator) for single in generators):
        raise TypeError(f"`generator` must be a torch.Generator, a list of them or None, got {generator!r}.")
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(
            f"`generator` is a list of {len(generator)}, but {batch_size} waveforms are to be made (prompts or"
            " pictures times `num_waveforms_per_prompt`): pass as many, or one generator."
        )


def check_finite(stage: str, *tensors: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """Refuses what a stage computed if it is not finite.

    Args:
        stage: What was computed, in words.
        tensors: The results, of any shape.
        dtype: The dtype in which it was computed. None is that of the first tensor.

    Raises:
        FloatingPointError: Naming the stage, the likely causes and the remedy.
    """
    if all(tensor.isfinite().all() for tensor in tensors):
        return
    dtype = dtype or tensors[0].dtype
    remedy = "Try another dtype, or load the weights again."
    if dtype == torch.bfloat16:
        # Seen with torch 2.13: strided convolutions whose output is one column wide change from run to run.
        remedy = (
            "On a processor with AMX the bfloat16 convolutions of torch are faulty: set the environment variable"
            f" ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 before Python starts. {remedy}"
        )
    raise FloatingPointError(
        f"NaN or infinite values appeared in {stage}: its weights are damaged, or its values too large for {dtype}."
        f" {remedy}"
    )


def _count(text: str | list[str] | None) -> int:
    return len(text) if isinstance(text, list) else 1


def check_text(name: str, text: Any) -> None:
    """Refuses what is neither a text nor a list of texts, nor None.

    Args:
        name: The argument's name, for the message.
        text: What was given.

    Raises:
        TypeError: If it is anything else.
        ValueError: If it is an empty list, or holds what no text can.
    """
    texts = text if isinstance(text, list) else [text]
    if text is not None and not all(isinstance(single, str) for single in texts):
        raise TypeError(f"`{name}` must be a str or a list of str, got {text!r}.")
    if not texts:
        raise ValueError(f"`{name}` is an empty list: pass one text at least.")
    try:
        "".join(texts if text is not None else []).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"`{name}` holds characters that belong to no text: {error}.") from error


def check_float_tensor(name: str, value: Any) -> None:
    """Refuses what is no tensor of floating-point numbers, of whatever shape.

    Args:
        name: The argument's name, for the message.
        value: What was given.

    Raises:
        TypeError: If it is no such tensor.
    """
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        found = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(f"`{name}` must be a torch tensor of floating-point numbers, got {found}.")


def _check_choice(name: str, value: Any, choices: Any) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` must be one of {list(choices)}, got {value!r}.")

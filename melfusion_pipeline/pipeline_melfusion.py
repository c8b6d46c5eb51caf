"""MeLFusion (arXiv 2406.04673): a picture and a sentence become music."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from diffusers import (
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
    AudioPipelineOutput,
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    ModelMixin,
    SchedulerMixin,
    UNet2DConditionModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.torch_utils import randn_tensor
from transformers import (
    ClapTextModelWithProjection,
    CLIPTextModel,
    CLIPTokenizer,
    GPT2LMHeadModel,
    RobertaTokenizer,
    SpeechT5HifiGan,
    T5EncoderModel,
    T5Tokenizer,
)

from .adapters_melfusion import AdapterMixin
from .arguments_melfusion import check_integer, check_real
from .attention_melfusion import KVBlenders, use_attn_processors
from .checkpoint_melfusion import CheckpointMixin
from .checks_melfusion import (
    MAX_AUDIO_LENGTH_IN_S,
    check_branches,
    check_call,
    check_finite,
    check_prompts,
    warn_if_trained_otherwise,
)
from .decoding_melfusion import DecodingMixin
from .denoising_melfusion import NoisePredictor
from .encoding_melfusion import EncodingMixin
from .families_melfusion import AudioLDM2Prompts, TextPrompts, family_of_pipeline, text_tower
from .features_melfusion import ImageFeatures
from .files_melfusion import atomic_write  # noqa: F401 - remote code gets only the files that are named here
from .given_audio_melfusion import GivenAudio, GivenLatents, as_stretches, as_waveforms, timesteps_from
from .guidance_melfusion import Guidance, branch_alphas
from .inversion_melfusion import record_image_features  # noqa: F401 - likewise
from .locks_melfusion import ComponentLocks, one_at_a_time
from .pictures_melfusion import Image, as_pil_images
from .prompts_melfusion import ClapPrompts, repeat_prompts
from .sources_melfusion import Source  # noqa: F401 - likewise
from .waveforms_melfusion import Spectrogram  # noqa: F401 - likewise
from .windows_melfusion import Windows

# Rows of the music UNet's batch that windows fill by default: a processor gains nothing from more.
ROWS_ON_CPU, ROWS_ON_ACCELERATOR = 8, 32


class MelFusionPipeline(CheckpointMixin, EncodingMixin, DecodingMixin, AdapterMixin, DiffusionPipeline):
    """Generates music from a picture, a text prompt or both.

    The picture is DDIM-inverted through a frozen text-to-image UNet; the keys and values of its decoder self-attention
    are blended by a learned `synapse` into the attention of a text-to-music UNet while that denoises music latents.
    Source: Chowdhury et al., "MeLFusion: Synthesizing Music from Image and Language Cues using Diffusion Models",
    CVPR 2024, arXiv 2406.04673.

    Threads may share a pipeline: their calls run one after the other. A call keeps its processors in the UNets and its
    timesteps in the scheduler, so the calls of pipelines that share a component (`from_pipe`, components) wait for
    each other too; pipelines that share none, such as those on two GPUs, run at the same time. Pipelines of other
    classes do not know of these locks: do not run them on the same UNets at the same time.

    Args:
        vae: The autoencoder of mel spectrograms, as in AudioLDM.
        text_encoder: CLAP's text tower, of a whole `ClapModel` too; T5's encoder for a UNet with one text sequence.
        tokenizer: The tokenizer of `text_encoder`.
        unet: The text-to-music UNet. It tells what the other components must be: AudioLDM's and MusicLDM's is
            conditioned on CLAP embeddings by `class_labels`, AudioLDM 2's on two text sequences, and a
            `UNet2DConditionModel` without `class_labels` on one (as Tango's).
        scheduler: Denoises the music latents: a diffusers scheduler that steps through the noise schedule of the
            training, such as DDIM, Euler, Heun, PNDM, DPM-Solver++ or UniPC. Those that count time in another way
            (flow matching, EDM, IPNDM) are refused.
        vocoder: Log-mel spectrogram to waveform.
        image_vae: The autoencoder of pictures, as in Stable Diffusion, or a lightweight one (`AutoencoderTiny`). This
            component and those that follow may be None: text-to-music needs none of them, and for `image_features` the
            synapse is enough.
        image_text_encoder: Encodes the picture's prompt. If None, the picture's UNet is conditioned on zeros.
        image_tokenizer: The tokenizer of `image_text_encoder`.
        image_unet: The text-to-image UNet, `epsilon` or `v_prediction`.
        image_scheduler: The noise schedule of `image_unet`.
        synapse: A `VisualSynapse` between the two UNets.
        text_encoder_2: T5's encoder. This and the following three are AudioLDM 2's, None for other music models.
        tokenizer_2: The tokenizer of `text_encoder_2`.
        projection_model: Brings both text encoders to the width of `language_model`.
        language_model: The GPT-2 that makes tokens for the music UNet of both.
        default_num_inference_steps: The denoising steps of a call that names none. This and the following settings are
            stored in `model_index.json`: what a checkpoint was evaluated with comes with it.
        default_guidance_scale: Likewise, the strength of the text.
        default_image_guidance_scale: Likewise, the strength of the picture; None guides with the text alone.
        default_image_guidance_end: Likewise, the share of the steps after which the picture guides no more.
        default_num_inversion_steps: Likewise, the inversion steps; None takes those that `synapse` was trained with,
            or 10 before training.
        default_window_length_in_s: Likewise, the length of the windows in which a longer piece is made; None takes the
            one that `unet` names.
        spectrogram_fft_length: Of the spectrograms for which the VAE was made, in samples; like the following two it
            is stored, with AudioLDM's as the default. Their sampling rate, hop and number of bands are the vocoder's,
            which could not differ: see `melfusion_pipeline.waveforms_melfusion.Spectrogram.of`.
        spectrogram_min_frequency: Where their lowest band begins, in Hz.
        spectrogram_max_frequency: Where their highest band ends, in Hz.
    """

    model_cpu_offload_seq = (
        "text_encoder->text_encoder_2->projection_model->language_model"
        "->image_text_encoder->image_vae->image_unet->synapse->unet->vae->vocoder"
    )
    # Text-to-music needs none of these; with recorded features the synapse is enough.
    _optional_components = [
        "image_vae",
        "image_text_encoder",
        "image_tokenizer",
        "image_unet",
        "image_scheduler",
        "synapse",
        "text_encoder_2",
        "tokenizer_2",
        "projection_model",
        "language_model",
    ]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    # Of the class, so that all pipelines find the same lock for the same component.
    _locks = ComponentLocks()

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: ClapTextModelWithProjection | T5EncoderModel,
        tokenizer: RobertaTokenizer | T5Tokenizer,
        unet: UNet2DConditionModel | AudioLDM2UNet2DConditionModel,
        scheduler: SchedulerMixin,
        vocoder: SpeechT5HifiGan | ModelMixin,
        image_vae: AutoencoderKL | AutoencoderTiny | None,
        image_text_encoder: CLIPTextModel | None,
        image_tokenizer: CLIPTokenizer | None,
        image_unet: UNet2DConditionModel | None,
        image_scheduler: SchedulerMixin | None,
        synapse: ModelMixin | None,
        text_encoder_2: T5EncoderModel | None = None,
        tokenizer_2: T5Tokenizer | None = None,
        projection_model: AudioLDM2ProjectionModel | None = None,
        language_model: GPT2LMHeadModel | None = None,
        default_num_inference_steps: int = 50,
        default_guidance_scale: float = 3.0,
        default_image_guidance_scale: float | None = None,
        default_image_guidance_end: float = 1.0,
        default_num_inversion_steps: int | None = None,
        default_window_length_in_s: float | None = None,
        spectrogram_fft_length: int = 1024,
        spectrogram_min_frequency: float = 0.0,
        spectrogram_max_frequency: float = 8000.0,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_tower(text_encoder),
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
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            projection_model=projection_model,
            language_model=language_model,
        )
        self.register_to_config(
            default_num_inference_steps=default_num_inference_steps,
            default_guidance_scale=default_guidance_scale,
            default_image_guidance_scale=default_image_guidance_scale,
            default_image_guidance_end=default_image_guidance_end,
            default_num_inversion_steps=default_num_inversion_steps,
            default_window_length_in_s=default_window_length_in_s,
            spectrogram_fft_length=spectrogram_fft_length,
            spectrogram_min_frequency=spectrogram_min_frequency,
            spectrogram_max_frequency=spectrogram_max_frequency,
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae else 4
        self.image_vae_scale_factor = 2 ** (len(image_vae.config.block_out_channels) - 1) if image_vae else 8

    # Kept in a room of its own, for its length.
    check_inputs = check_call

    @property
    def prompts(self) -> ClapPrompts | AudioLDM2Prompts | TextPrompts:
        """How a prompt becomes arguments of this music UNet."""
        return family_of_pipeline(self)(self)

    @property
    def guidance_scale(self) -> float:
        """How strongly the text guides the music; above 1 it is classifier-free guidance."""
        return self._guidance_scale

    @property
    def image_guidance_scale(self) -> float | None:
        """How strongly the picture guides the music, or None for guidance by the text alone."""
        return self._image_guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the UNet runs on more than one guidance branch."""
        return self.guidance.num_branches > 1

    @property
    def guidance(self) -> Guidance:
        """The guidance of the call; a callback may change its scales from step to step."""
        return Guidance(self._guidance_scale, self._image_guidance_scale)

    @property
    def num_timesteps(self) -> int:
        """The number of timesteps of the last call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to stop denoising."""
        return self._interrupt

    @torch.no_grad()
    @one_at_a_time
    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        do_classifier_free_guidance: bool = True,
        device: torch.device | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encodes texts as the music model takes them; what it returns can be given to `__call__`.

        Args:
            prompt: One text or a list; not needed with `prompt_embeds`.
            negative_prompt: One text for all, or a list as long as the prompts. None is the empty text.
            prompt_embeds: What this method returned, taken as it is.
            negative_prompt_embeds: As `prompt_embeds`.
            do_classifier_free_guidance: Whether the negative prompt is needed.
            device: Where to encode. None is the pipeline's device.

        Returns:
            `prompt_embeds` and `negative_prompt_embeds`; the latter None without guidance. With AudioLDM and MusicLDM
            each is `[prompts, channels]` with L2 norm 1; with AudioLDM 2, and with a UNet of one text, a dict of the
            UNet's text arguments, each with one row a prompt.

        Raises:
            TypeError, ValueError: As `__call__`.
        """
        check_prompts(self, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        prompt_embeds, negative_prompt_embeds = self.prompts.encode(
            prompt,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            do_classifier_free_guidance,
            device or self._execution_device,
        )
        # By these names, which diffusers' tests of pipelines read here.
        return prompt_embeds, negative_prompt_embeds

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
            dtype: The dtype of the latents.
            device: Where the latents are to lie.
            generator: For reproducible noise; one, or one for each waveform.
            latents: Unscaled noise `[batch_size, channels, time, frequency]`, in place of the generator's.

        Returns:
            `[batch_size, channels, time, frequency]`.

        Raises:
            TypeError: If a number is none.
            ValueError: If it is out of range.
        """
        check_integer("batch_size", batch_size, 1)
        check_real("audio_length_in_s", audio_length_in_s, 0.0, MAX_AUDIO_LENGTH_IN_S)
        if latents is None:
            shape = (batch_size, *self._latent_shape(audio_length_in_s))
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        return latents.to(device=device, dtype=dtype) * self.scheduler.init_noise_sigma

    def _prepare_given(
        self, given_audio: GivenAudio, scaled_noise: torch.Tensor, anew: torch.Tensor, window_length_in_s: float | None
    ) -> GivenLatents:
        latents = self._encode_given(given_audio, len(anew), window_length_in_s).to(scaled_noise.dtype)
        check_finite("the VAE encoder", latents)
        return GivenLatents(
            latents.repeat_interleave(len(scaled_noise) // len(latents), dim=0),
            scaled_noise / self.scheduler.init_noise_sigma,
            None if anew.all() else ~anew[:, None].to(scaled_noise.device),
        )

    def _lay_out_windows(
        self,
        num_frames: int,
        window_length_in_s: float | None,
        window_overlap: float,
        image_start_in_s: list[float] | None,
    ) -> Windows:
        length = self._window_frames(num_frames, window_length_in_s)
        if image_start_in_s is not None:
            frame_length = self.vae_scale_factor * self._seconds_per_frame
            # The rounding keeps 5.12 / 0.04 = 128.00000000000003 from giving a window a trace of another picture.
            image_start_in_s = tuple(round(float(start) / frame_length, 6) for start in image_start_in_s)
        return Windows.lay_out(num_frames, length, round(window_overlap * length), image_starts=image_start_in_s)

    def _encode_prompts(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
        num_texts: int,
        num_waveforms_per_prompt: int,
        device: torch.device,
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
        """Gives the UNet's arguments of prompts and of negative prompts (None without guidance), a row a waveform."""
        if prompt is None and prompt_embeds is None:
            prompt = ""
        texts = (prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        encoded = self.encode_prompt(*texts, self.do_classifier_free_guidance, device)
        prompts, negative_prompts = (None if embeds is None else self.prompts.to_unet(embeds) for embeds in encoded)
        check_finite("the encoding of the prompt", *prompts.values())
        prompts, negative_prompts = (
            None if arguments is None else repeat_prompts(arguments, num_texts, num_waveforms_per_prompt)
            for arguments in (prompts, negative_prompts)
        )
        return prompts, negative_prompts

    def _until_interrupted(self, groups: list[range], progress_bar: Any) -> Iterator[range]:
        for group in groups:
            if self.interrupt:
                return
            yield group
            progress_bar.update()

    def _end_image_guidance(self, prompts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Lets the text alone guide from here on, and gives the prompts of the branches that are left."""
        num_rows = len(next(iter(prompts.values()))) // self.guidance.num_branches
        self._image_guidance_scale = None
        return {name: rows[-num_rows * self.guidance.num_branches :] for name, rows in prompts.items()}

    def _call_back(
        self,
        callback: Callable,
        names: list[str],
        step: int,
        timestep: torch.Tensor,
        latents: torch.Tensor,
        prompts: dict[str, torch.Tensor],
        negative_prompts: dict[str, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
        """Shows the callback the named tensors and gives all of them, with those that it returns in their place."""
        num_rows = len(next(iter(prompts.values()))) // self.guidance.num_branches
        shown = {
            "latents": latents,
            "prompt_embeds": self.prompts.from_unet(prompts),
            "negative_prompt_embeds": None if negative_prompts is None else self.prompts.from_unet(negative_prompts),
        }
        returned = callback(self, step, timestep, {name: shown[name] for name in names}) or {}
        if not isinstance(returned, dict):
            raise TypeError(f"`callback_on_step_end` must return a dict or None, got {returned!r:.80}.")
        latents, prompt_embeds, negative_prompt_embeds = (returned.get(name, shown[name]) for name in shown)
        if prompt_embeds is not shown["prompt_embeds"]:
            prompts = self.prompts.to_unet(prompt_embeds)
        if negative_prompt_embeds is not shown["negative_prompt_embeds"]:
            negative_prompts = self.prompts.to_unet(negative_prompt_embeds)
            prompts = self.guidance.join(self.guidance.last(prompts), negative_prompts)
        for rows in prompts.values():
            check_branches(rows, num_rows, self.guidance.num_branches)
        return latents, prompts, negative_prompts

    def _decode(
        self, latents: torch.Tensor, output_type: str, audio_length_in_s: float, window_length_in_s: float | None
    ) -> torch.Tensor:
        check_finite("denoising", latents)
        if output_type == "latent":
            return latents
        mel_spectrogram = self.decode_latents(latents, window_length_in_s)
        check_finite("the VAE decoder", mel_spectrogram)
        if output_type == "mel":
            return mel_spectrogram.squeeze(1)[:, : self._num_frames(audio_length_in_s)]
        waveform = self.mel_spectrogram_to_waveform(mel_spectrogram, audio_length_in_s, window_length_in_s)
        check_finite("the vocoder", waveform, dtype=self.vocoder.dtype)
        return waveform

    @torch.no_grad()
    @one_at_a_time
    def __call__(
        self,
        image: Image | None = None,
        prompt: str | list[str] | None = None,
        audio_length_in_s: float | None = None,
        num_inference_steps: int | None = None,
        num_inversion_steps: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        image_guidance_end: float | None = None,
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
        feature_source: str | None = None,
        image_start_in_s: list[float] | None = None,
        window_length_in_s: float | None = None,
        window_overlap: float = 0.25,
        window_batch_size: int | None = None,
        audio: np.ndarray | torch.Tensor | None = None,
        audio_sampling_rate: int | None = None,
        strength: float | None = None,
        mask_start_in_s: float | list[float] | None = None,
        mask_end_in_s: float | list[float] | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> AudioPipelineOutput | tuple[np.ndarray | torch.Tensor]:
        """Generates music.

        One picture serves N prompts, one prompt serves N pictures, N pictures meet N prompts. With `image_start_in_s`
        the pictures follow one another in one piece. With `audio` it varies music that is there, makes stretches of it
        anew, or goes on from it; all of that follows prompt and pictures.

        Args:
            image: PIL images, numpy arrays `[height, width]` (grey) or `[height, width, 1, 3 or 4]`, torch tensors
                `[1, 3 or 4, height, width]`, batches or lists of them, uint8 or float in [0, 1]. None is plain
                text-to-music.
            prompt: One text or a list. With a picture it may be left out.
            audio_length_in_s: The length of the music in seconds. None is that of `audio`, or the UNet's own length.
            num_inference_steps: Denoising steps of the music. None is the checkpoint's default, as for the next four:
                what it was evaluated with (`pipe.config.default_num_inference_steps`, ...).
            num_inversion_steps: Inversion steps of the picture; each music step uses the features nearest in time.
            guidance_scale: Strength of the text; 1 or less is no guidance.
            image_guidance_scale: Strength of the picture beside that of the text, at the cost of a third branch; at 1
                the picture does not guide, and there is none.
            image_guidance_end: The share of the steps after which the picture guides no more, in [0, 1]; it stays
                blended. What a picture decides is decided early, and later steps do without the third branch (limited
                interval, arXiv 2404.07724).
            synapse_scale: Multiplies every alpha of the synapse, or one number for each layer. 0 ignores the picture.
            negative_prompt: What to keep out; one text or as many as prompts.
            num_waveforms_per_prompt: Waveforms for each prompt (or each picture, where those are more); of a
                storyboard, variations of the whole.
            eta: The DDIM paper's, in [0, 1]; for schedulers that take it.
            generator: For reproducible noise; one, or one for each waveform.
            latents: Initial noise `[batch, channels, time, frequency]`, unscaled, in place of the generator's.
            prompt_embeds: In place of `prompt`: what `encode_prompt` returns.
            negative_prompt_embeds: In place of `negative_prompt`.
            image_prompt: The text for the picture's UNet; the empty text inverts best.
            image_size: The side in pixels to which pictures are prepared. None is `default_image_size`.
            image_features: In place of `image`; see `encode_image`. `image_size`, `num_inversion_steps` and
                `feature_source` are then those that it was encoded with, which may be said again but not changed.
            feature_source: `"inversion"` records while inverting; `"reconstruction"` inverts, then records while
                sampling back, as the paper does, at twice the cost; `"noising"` adds noise to the picture instead of
                inverting it, all timesteps in one pass. None is as in the synapse's training, see
                `default_feature_source`.
            image_start_in_s: Makes one piece of a storyboard: where each picture begins, in seconds, ascending from 0.
                `prompt` is then one for the whole or one a picture. A window in which several pictures lie sees each
                by its share, and so it hears their prompts. None: every picture makes a piece of its own.
            window_length_in_s: A longer piece is denoised in overlapping windows of this length, merged at every step.
                None is the checkpoint's default, or the UNet's own length; that of the piece is a single pass over
                all of it.
            window_overlap: The share of a window that its neighbour shares, in [0, 0.9].
            window_batch_size: How many windows go through the UNet at once. None: as many as fill its batch to 8 rows
                on a CPU, to 32 elsewhere.
            audio: Music that is there, `[samples]`, `[channels, samples]` or `[pieces, channels, samples]`, numpy or
                torch, floating-point, of any level. Channels are averaged. One piece serves N prompts or pictures, N
                pieces meet N of either. With an `audio_length_in_s` beyond it the music goes on from there.
            audio_sampling_rate: The rate of `audio` in Hz; other rates than `pipe.sampling_rate` are resampled.
            strength: How much of `audio` is forgotten, in (0, 1]: the share of the steps that are made, as in
                image-to-image pipelines. At 1 the call is one without `audio`. With a mask None is 1.
            mask_start_in_s: Where a stretch of `audio` begins that is made anew, in seconds, or a list for several.
                None is 0 where `mask_end_in_s` is given. Around the stretches the waveforms are the given samples
                (`"mel"` and `"latent"` hold what VAE and UNet make of them).
            mask_end_in_s: Where it ends. None is the end of `audio` where `mask_start_in_s` is given.
            output_type: `"np"` or `"pt"` (waveforms), `"mel"` (log-mel spectrograms `[batch, frames, bands]`) or
                `"latent"`.
            return_dict: Whether to return `AudioPipelineOutput` instead of a tuple.
            cross_attention_kwargs: For the attention processors of the music UNet.
            callback_on_step_end: Called as `callback(pipe, step, timestep, tensors)` after each step; the tensors that
                it returns replace the loop's. Callbacks of `diffusers.callbacks` name their tensors themselves.
            callback_on_step_end_tensor_inputs: Which it gets of `latents`, `prompt_embeds` (of all guidance branches)
                and `negative_prompt_embeds` (None without guidance).

        Returns:
            `AudioPipelineOutput` with `audios`: float32 `[batch, samples]`, exactly `audio_length_in_s` long, at
            `pipe.sampling_rate`. Tensors of every `output_type` are float32 and on the CPU.

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
        # 1. Take the checkpoint's defaults, check inputs
        if num_inference_steps is None:
            num_inference_steps = self.config.default_num_inference_steps
        if guidance_scale is None:
            guidance_scale = self.config.default_guidance_scale
        if image_guidance_scale is None and (image is not None or image_features is not None):
            image_guidance_scale = self.config.default_image_guidance_scale
        if image_guidance_end is None:
            image_guidance_end = self.config.default_image_guidance_end
        if num_inversion_steps is None and image is not None:
            num_inversion_steps = self.default_num_inversion_steps
        if feature_source is None and image is not None:
            feature_source = self.default_feature_source
        images = None if image is None else as_pil_images(image)
        if audio is not None:
            limits_in_s = (self._min_given_length_in_s, MAX_AUDIO_LENGTH_IN_S)
            audio = as_waveforms(audio, audio_sampling_rate, self.sampling_rate, limits_in_s)
        if audio_length_in_s is None:
            given_length_in_s = None if audio is None else audio.shape[-1] / self.sampling_rate
            audio_length_in_s = given_length_in_s or self.default_audio_length_in_s
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        num_prompts, num_images = self.check_inputs(
            image=images,
            prompt=prompt,
            audio_length_in_s=audio_length_in_s,
            num_inference_steps=num_inference_steps,
            num_inversion_steps=num_inversion_steps,
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
            image_guidance_end=image_guidance_end,
            synapse_scale=synapse_scale,
            negative_prompt=negative_prompt,
            num_waveforms_per_prompt=num_waveforms_per_prompt,
            eta=eta,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            image_prompt=image_prompt,
            image_size=image_size,
            image_features=image_features,
            feature_source=feature_source,
            image_start_in_s=image_start_in_s,
            window_length_in_s=window_length_in_s,
            window_overlap=window_overlap,
            window_batch_size=window_batch_size,
            audio=audio,
            audio_sampling_rate=audio_sampling_rate,
            strength=strength,
            mask_start_in_s=mask_start_in_s,
            mask_end_in_s=mask_end_in_s,
            output_type=output_type,
            cross_attention_kwargs=cross_attention_kwargs,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            callback_on_step_end=callback_on_step_end,
        )
        self._guidance_scale = guidance_scale
        # At 1 the three branches are the two of the text, for a third more work.
        self._image_guidance_scale = None if image_guidance_scale == 1.0 else image_guidance_scale
        self._interrupt = False
        device = self._execution_device
        num_audios = 1 if audio is None else len(audio)
        num_pieces = max(num_prompts, num_images, num_audios) if image_start_in_s is None else 1
        batch_size = num_pieces * num_waveforms_per_prompt

        # 2. Encode the prompt
        num_texts = max(num_prompts, num_pieces)
        texts = (prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        prompts, negative_prompts = self._encode_prompts(*texts, num_texts, num_waveforms_per_prompt, device)
        prompts = self.guidance.join(prompts, negative_prompts)

        # 3. Prepare timesteps
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        strength = 1.0 if strength is None else strength
        timesteps = timesteps_from(self.scheduler, num_inference_steps, strength)
        self._num_timesteps = len(timesteps)

        # 4. Encode the picture: invert, record what these timesteps read
        if images is not None:
            arguments = (image_prompt, image_size, num_inversion_steps, feature_source)
            image_features = self._encode_images(images, *arguments, read_at=timesteps)
        elif image_features is not None:
            num_inversion_steps = len(image_features.timesteps)

        # 5. Prepare latents
        latents = self.prepare_latents(batch_size, audio_length_in_s, self.unet.dtype, device, generator, latents)
        step_parameters = inspect.signature(self.scheduler.step).parameters
        step_kwargs = {"eta": eta, "generator": generator}
        step_kwargs = {name: value for name, value in step_kwargs.items() if name in step_parameters}

        given_audio, given_latents = None, None
        if audio is not None:
            stretches = as_stretches(mask_start_in_s, mask_end_in_s, audio.shape[-1] / self.sampling_rate)
            given_audio = GivenAudio.of(audio, self.sampling_rate, stretches, audio_length_in_s)
            anew = given_audio.anew(self._samples_per_latent_frame, latents.shape[-2])
            given_latents = self._prepare_given(given_audio, latents, anew, window_length_in_s)
            latents = given_latents.begin(latents, self.scheduler, timesteps[:1], strength)

        # 6. Lay out the windows
        windows = self._lay_out_windows(latents.shape[-2], window_length_in_s, window_overlap, image_start_in_s)
        if window_batch_size is None:
            rows = ROWS_ON_CPU if device.type == "cpu" else ROWS_ON_ACCELERATOR
            window_batch_size = max(1, rows // (self.guidance.num_branches * batch_size))
        groups = list(windows.groups(window_batch_size))
        # The second half of a step of second order sees what the first made of the music around the stretches too.
        if given_audio is not None and self.scheduler.order == 1:
            groups = [group for group in groups if windows.cut(anew[:, None], group).any()]

        # 7. Look up which of the picture's recorded keys and values each step blends; these are fitted to a window
        blenders, alphas, steps = KVBlenders([]), latents.new_empty(0, 3), None
        if image_features is not None:
            warn_if_trained_otherwise(self.synapse, image_features, num_inversion_steps)
            window = windows.cut(latents, [0])[0]
            steps = image_features.nearest(timesteps).tolist()
            fit = self._fit_when_due(image_features, window, synapse_scale, prompts)
            blenders, alphas = KVBlenders(self.synapse.config.music_layers), branch_alphas(fit(steps[0])[1])

        # 8. Denoise
        predictor = NoisePredictor(
            self.unet,
            self.prompts,
            windows,
            num_waveforms_per_prompt,
            blenders,
            alphas,
            prompts,
            cross_attention_kwargs,
        )
        total = len(timesteps) * len(groups)
        with use_attn_processors(self.unet, blenders), self.progress_bar(total=total) as progress_bar:
            for i, t in enumerate(timesteps):
                if i == round(image_guidance_end * len(timesteps)) and self._image_guidance_scale is not None:
                    prompts = self._end_image_guidance(prompts)
                model_input = self.scheduler.scale_model_input(latents, t)
                recorded = {} if steps is None else fit(steps[i])[0]
                remaining = self._until_interrupted(groups, progress_bar)
                noise_pred = predictor.predict(model_input, t, prompts, recorded, self.guidance, remaining)
                if self.interrupt:
                    break
                latents = self.scheduler.step(noise_pred, t, latents, **step_kwargs).prev_sample
                if given_latents is not None:
                    latents = given_latents.after_step(latents, self.scheduler, timesteps, i)
                if callback_on_step_end is not None:
                    names = callback_on_step_end_tensor_inputs
                    latents, prompts, negative_prompts = self._call_back(
                        callback_on_step_end, names, i, t, latents, prompts, negative_prompts
                    )

        # 9. Decode
        made = self._decode(latents, output_type, audio_length_in_s, window_length_in_s).float().cpu()
        if given_audio is not None and output_type in ("np", "pt"):
            made = given_audio.join(made)
        if output_type == "np":
            made = made.numpy()

        self.maybe_free_model_hooks()
        if not return_dict:
            return (made,)
        return AudioPipelineOutput(audios=made)

"""The training objective of MeLFusion, and what it trains."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AudioLDM2UNet2DConditionModel, DDIMScheduler, DiffusionPipeline
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from .adapters_melfusion import lora_layers
from .arguments_melfusion import check_integer, check_real
from .attention_melfusion import KVBlenders, use_attn_processors
from .audio import encode_mel, waveform_to_mel
from .caches import ImageFeaturesCache, MusicLatentCache, PreparedInputs, PromptCache, TrajectoryCache
from .encoding_melfusion import encode_pixels
from .families_melfusion import text_lengths
from .inversion_melfusion import record_keys_and_values
from .waveforms_melfusion import Spectrogram

# What each choice trains; everything else of the pipeline is frozen.
TRAINABLE = {"synapse": ("synapse",), "lora": ("synapse", "lora"), "unet": ("synapse", "unet")}
FROZEN_TOWERS = (
    "vae",
    "text_encoder",
    "text_encoder_2",
    "projection_model",
    "language_model",
    "vocoder",
    "image_vae",
    "image_text_encoder",
    "image_unet",
)
# A pipeline that only generates may lack some. Without `image_text_encoder` its prompt is zeros, as in a call.
NEEDED = ("vae", "text_encoder", "unet", "synapse", "image_vae", "image_unet")


class Draw(NamedTuple):
    """What is random in a batch, row by row: it depends neither on the other rows nor on which process has them.

    `timesteps`, `keeps_text` and `keeps_image` are `[B]`; `generators` has one a row, for what is drawn later.
    """

    timesteps: torch.Tensor
    keeps_text: torch.Tensor
    keeps_image: torch.Tensor
    generators: list[torch.Generator]


def trained_parts(pipe: DiffusionPipeline, trainable: str) -> dict[str, nn.Module]:
    """Gives what is trained, by name.

    Args:
        pipe: The pipeline.
        trainable: `"synapse"` (alphas and projections), `"lora"` (a LoRA of the music UNet as well, see `add_lora`) or
            `"unet"` (the music UNet as well, as the paper does).

    Returns:
        The synapse and, of the music UNet, nothing, only what PEFT has added to its layers, or all.

    Raises:
        ValueError: If `trainable` is none of these, or the music UNet has no LoRA to train.
    """
    if trainable not in TRAINABLE:
        raise ValueError(f"`trainable` must be one of {list(TRAINABLE)}, got {trainable!r}.")
    halves = [half for layer in lora_layers(pipe.unet) for half in (layer.lora_A, layer.lora_B)]
    if trainable == "lora" and not halves:
        raise ValueError("There is no LoRA to train: call `adapters_melfusion.add_lora(pipe.unet)` before.")
    parts = {"synapse": pipe.synapse, "lora": nn.ModuleList(halves), "unet": pipe.unet}
    return {name: parts[name] for name in TRAINABLE[trainable]}


def freeze(pipe: DiffusionPipeline, trainable: str, dtype: torch.dtype = torch.float32) -> None:
    """Freezes and casts what is not trained; what is trained becomes float32 and requires gradients.

    Args:
        pipe: The pipeline, changed in place.
        trainable: As `trained_parts` takes it.
        dtype: The dtype of the frozen parts.

    Raises:
        ValueError: As `trained_parts`, or if the pipeline lacks a component that training needs.
    """
    if lacking := [name for name in NEEDED if getattr(pipe, name) is None]:
        raise ValueError(
            f"Training needs {', '.join(f'`{name}`' for name in lacking)}, None in this pipeline: load it with all"
            " components, or compose it with `MelFusionPipeline.from_base_models`."
        )
    parts = trained_parts(pipe, trainable)
    for name in (*FROZEN_TOWERS, "unet", "synapse"):
        trained = name in TRAINABLE[trainable]
        model = getattr(pipe, name)
        if model is None:
            continue
        model.requires_grad_(trained).train(trained)
        if model.dtype != (wanted := torch.float32 if trained else dtype):
            model.to(wanted)
    if "lora" in parts:
        parts["lora"].requires_grad_(True).to(torch.float32)


def enable_gradient_checkpointing(pipe: DiffusionPipeline) -> None:
    """Lets the music UNet compute its activations again in the backward pass, which takes less memory and more time.

    Args:
        pipe: The pipeline, changed in place.

    Raises:
        ValueError: If the UNet is AudioLDM 2's: with gradient checkpointing, diffusers gives the mask of its text to
            the wrong attention (seen in 0.42.1).
    """
    if isinstance(pipe.unet, AudioLDM2UNet2DConditionModel):
        raise ValueError(
            "Gradient checkpointing cannot be used with AudioLDM 2: diffusers then gives the mask of the text to the"
            " wrong attention. Leave `--gradient_checkpointing` out; a smaller batch with more accumulation steps"
            " takes less memory too."
        )
    pipe.unet.enable_gradient_checkpointing()


class MelFusionObjective(nn.Module):
    """The training objective: a batch of triplets goes in, the loss comes out.

    Implements algorithm 1 of MeLFusion (arXiv 2406.04673): `|| eps - eps_theta(z_t^M, t, Y, K^I, V^I) ||^2` with the
    picture's keys and values at the same t. Only what is trained is registered as a submodule, so that DDP, FSDP and
    state dicts deal with nothing else; the frozen models stay with the pipeline.

    Args:
        pipe: The pipeline, on its device; see `freeze`.
        trainable: As `trained_parts` takes it.
        trajectories: The pictures' inverted latents (faithful). None noises `z_0^I`, as the authors' code does.
        music_latents: The clips' encodings. None encodes each batch anew.
        snr_gamma: Min-SNR weighting (arXiv 2303.09556, section 3.4). None weighs all timesteps alike.
        logit_mean: Draws timesteps in training from a logit-normal density with this mean and deviation 1
            (arXiv 2403.03206, equation 19; above 0 more of the high noise levels, where a picture has most to say).
            None draws them evenly.
        text_dropout: The probability with which a row's text is dropped in training.
        image_dropout: The probability with which a row's picture is dropped in training, independently.
        seed: Timesteps, noise and dropping are keyed by (seed, step, row of the data set).
        image_features: What the pictures contribute, in place of `trajectories`; the pipeline then needs none of the
            picture's models any more.

    Raises:
        TypeError: If a number is none.
        ValueError: As `trained_parts`, or if a number is out of range, or the music scheduler's prediction type is
            unknown.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        trainable: str = "synapse",
        trajectories: TrajectoryCache | None = None,
        music_latents: MusicLatentCache | None = None,
        snr_gamma: float | None = None,
        logit_mean: float | None = None,
        text_dropout: float = 0.1,
        image_dropout: float = 0.1,
        seed: int = 0,
        image_features: ImageFeaturesCache | None = None,
    ) -> None:
        super().__init__()
        for name, chance in (("text_dropout", text_dropout), ("image_dropout", image_dropout)):
            check_real(name, chance, 0.0, 1.0)
        for name, number, least in (("snr_gamma", snr_gamma, 0.0), ("logit_mean", logit_mean, -math.inf)):
            if number is not None:
                check_real(name, number, least)
        check_integer("seed", seed, 0)
        self.trained = nn.ModuleDict(trained_parts(pipe, trainable))
        self.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        if self.scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"Cannot train for prediction_type={self.scheduler.config.prediction_type!r}.")
        self.pipe, self.snr_gamma, self.logit_mean, self.seed = pipe, snr_gamma, logit_mean, seed
        self.trajectories, self.music_latents, self.image_features = trajectories, music_latents, image_features
        self.text_dropout, self.image_dropout = text_dropout, image_dropout
        self.blenders = KVBlenders(pipe.synapse.config.music_layers)
        self.prompts = PromptCache(pipe)
        self._image_prompt: torch.Tensor | None = None

    @property
    def unet(self) -> nn.Module:
        """The music UNet, wrapped where a strategy such as FSDP has wrapped it."""
        return self.trained["unet"] if "unet" in self.trained else self.pipe.unet

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Installs the blending processors; open around forward *and* backward (gradient checkpointing runs twice)."""
        with use_attn_processors(self.unet, self.blenders):
            yield

    def draw(self, indices: torch.Tensor, step: int) -> Draw:
        """Draws each row's timestep and what it drops, keyed by (seed, step, row).

        Args:
            indices: `[B]`, the rows' numbers in the data set.
            step: The optimisation step.

        Returns:
            Timesteps and what is kept, each `[B]`, and the generators.
        """
        generators = []
        for index in indices.tolist():
            (key,) = np.random.SeedSequence([self.seed, step, index]).generate_state(1, np.uint64)
            generators.append(torch.Generator().manual_seed(int(key)))
        timesteps = torch.cat([self._draw_timestep(generator) for generator in generators])
        chances = torch.stack([torch.rand(2, generator=generator) for generator in generators])
        keeps = chances >= torch.tensor([self.text_dropout, self.image_dropout]) if self.training else chances >= 0
        return Draw(timesteps, *keeps.unbind(dim=1), generators)

    def _draw_timestep(self, generator: torch.Generator) -> torch.Tensor:
        num_timesteps = self.scheduler.config.num_train_timesteps
        if self.logit_mean is None or not self.training:
            return torch.randint(num_timesteps, (1,), generator=generator)
        share = compute_density_for_timestep_sampling("logit_normal", 1, self.logit_mean, 1.0, generator=generator)
        return (share * num_timesteps).long().clamp(max=num_timesteps - 1)

    def forward(self, batch: dict, step: int) -> torch.Tensor:
        """Gives the mean loss of a batch; its arguments are those of `per_sample_loss`."""
        return self.per_sample_loss(batch, step).mean()

    def per_sample_loss(self, batch: dict, step: int, synapse_scale: float = 1.0) -> torch.Tensor:
        """Gives each row's loss; in eval mode nothing is dropped.

        Args:
            batch: `waveforms` `[B, samples]` at `pipe.sampling_rate`, `captions` (B texts), `indices` `[B]`, and
                `image_files` (with trajectories or features) or `pixel_values` `[B, 3, S, S]` in [-1, 1] (without);
                what `PreparedInputs` has added to all samples is taken as it is.
            step: The optimisation step, which keys the randomness.
            synapse_scale: Multiplies every alpha, as in a call of the pipeline; 0 takes the pictures away.

        Returns:
            `[B]`, float32.

        Raises:
            RuntimeError: If it runs outside of `attached()`, where the picture would have no effect.
        """
        if any(self.unet.get_submodule(name).processor is not processor for name, processor in self.blenders.items()):
            raise RuntimeError(
                "The blending processors are not installed: open `objective.attached()` around training."
            )
        draw = self.draw(batch["indices"], step)
        latents, noise = self._music_latents(batch, draw)
        timesteps = draw.timesteps.to(latents.device)
        noisy_latents = self.scheduler.add_noise(latents, noise, timesteps)
        prompts = self.prompts.read(batch["captions"], draw.keeps_text)
        self._read_image(batch, draw, latents.shape, prompts, synapse_scale)
        dtype = self.unet.dtype
        arguments = {name: rows.to(latents.device, dtype) for name, rows in prompts.items()}
        arguments = {"encoder_hidden_states": None, **arguments}
        model_output = self.unet(noisy_latents.to(dtype), timesteps, **arguments).sample
        target = noise
        if self.scheduler.config.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(latents, noise, timesteps)
        losses = (model_output.float() - target).square().flatten(1).mean(dim=1)
        return losses * self._snr_weights(timesteps)

    @torch.no_grad()
    def _music_latents(self, batch: dict, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
        spectrogram = Spectrogram.of(self.pipe)
        if self.music_latents is not None:
            latents = self.music_latents.encode(batch["waveforms"], draw.generators, batch.get("moments"))
        else:
            mels = batch.get("mels")
            if mels is None:
                rate = spectrogram.sampling_rate
                mels = waveform_to_mel(batch["waveforms"][:, None], rate, self.pipe.vae, spectrogram=spectrogram)
            latents = encode_mel(mels, self.pipe.vae, "sample", draw.generators, spectrogram.num_mel_bands).float()
        return latents, randn_tensor(latents.shape, draw.generators, latents.device)

    def prepared_inputs(self) -> PreparedInputs:
        """Gives what prepares samples for this objective where they are read."""
        return PreparedInputs(
            Spectrogram.of(self.pipe),
            self.pipe.vae_scale_factor,
            self.trajectories and self.trajectories.files,
            self.music_latents and self.music_latents.files,
        )

    @torch.no_grad()
    def _image_latents(self, batch: dict, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.pipe.image_unet.device
        if self.trajectories is not None:
            arguments = (batch["image_files"], draw.timesteps, batch.get("trajectories"))
            latents, timesteps = self.trajectories.read(*arguments)
            return latents.to(device), timesteps.to(device)
        latents = encode_pixels(self.pipe.image_vae, batch["pixel_values"].to(device))
        noise = randn_tensor(latents.shape, draw.generators, device)
        scheduler = DDIMScheduler.from_config(self.pipe.image_scheduler.config)
        timesteps = draw.timesteps.to(device)
        return scheduler.add_noise(latents, noise, timesteps), timesteps

    @torch.no_grad()
    def _record(self, batch: dict, draw: Draw) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        if self.image_features is not None:
            return self.image_features.read(batch["image_files"], draw.timesteps)
        latents, timesteps = self._image_latents(batch, draw)
        prompt_embeds = self._empty_image_prompt().expand(len(latents), -1, -1)
        layers = self.pipe.synapse.config.image_layers
        return record_keys_and_values(self.pipe.image_unet, latents, timesteps, prompt_embeds, layers)

    def _read_image(
        self,
        batch: dict,
        draw: Draw,
        music_shape: torch.Size,
        prompts: dict[str, torch.Tensor],
        synapse_scale: float,
    ) -> None:
        synapse = self.trained["synapse"]
        recorded = self._record(batch, draw)
        num_tokens = self.pipe.synapse.num_tokens(*music_shape[-2:], text_lengths(prompts))
        keys, values, alphas = synapse(*recorded, num_tokens, synapse_scale)
        kept = draw.keeps_image.to(alphas)
        self.blenders.read({layer: (keys[layer], values[layer]) for layer in keys}, alphas[:, None, None] * kept)

    def _empty_image_prompt(self) -> torch.Tensor:
        if self._image_prompt is None:
            # Without autocast, as captions are.
            with torch.autocast(self.pipe.image_unet.device.type, enabled=False):
                self._image_prompt = self.pipe.encode_image_prompt("")
        return self._image_prompt.to(self.pipe.image_unet.device)

    def _snr_weights(self, timesteps: torch.Tensor) -> torch.Tensor:
        if self.snr_gamma is None:
            return torch.ones_like(timesteps, dtype=torch.float32)
        snr = compute_snr(self.scheduler, timesteps)
        offset = 1 if self.scheduler.config.prediction_type == "v_prediction" else 0
        return snr.clamp(max=self.snr_gamma) / (snr + offset)

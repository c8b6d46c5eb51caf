"""The training objective of MeLFusion, what it trains, and caches of what never changes in training."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AudioLDM2UNet2DConditionModel, AutoencoderKL, DDIMScheduler, DiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr
from diffusers.utils.logging import tqdm
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from .adapters_melfusion import lora_layers
from .attention_melfusion import KVBlenders, use_attn_processors
from .audio import waveform_to_latents, waveform_to_mel
from .encoding_melfusion import encode_pixels
from .families_melfusion import pad_texts, text_lengths
from .files_melfusion import atomic_write
from .inversion_melfusion import ddim_walk, inversion_grid, record_keys_and_values
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


class TrajectoryCache:
    """The inversion trajectories of pictures on disk: computed once, shared by processes and runs.

    One safetensors file a picture, named after the picture's bytes, the settings and the models' weights. It holds
    `z_t^I` at `t_0 ... t_{N-1}`, the latents at which the pipeline records by default: `[N, channels, height, width]`,
    float16.

    Args:
        folder: Where the files lie; made if it does not exist.
        pipe: The pipeline whose picture side inverts.
        num_inversion_steps: N.
        image_size: The side to which pictures are prepared (centre crop), in pixels.
    """

    def __init__(
        self, folder: str | os.PathLike, pipe: DiffusionPipeline, num_inversion_steps: int, image_size: int
    ) -> None:
        self.folder, self.pipe, self.image_size = Path(folder), pipe, image_size
        self.levels = inversion_grid(pipe.image_scheduler, num_inversion_steps)[:-1]
        self.timesteps = torch.tensor([level.timestep for level in self.levels])
        self.folder.mkdir(parents=True, exist_ok=True)
        self._fingerprint = self._hash_settings()
        self._paths: dict[str, Path] = {}

    def _hash_settings(self) -> bytes:
        settings = [self.levels, self.image_size, self.pipe.image_scheduler.config.prediction_type]
        weights = hash_weights(self.pipe.image_vae, self.pipe.image_unet, self.pipe.image_text_encoder)
        return hashlib.sha256(json.dumps(settings).encode() + weights).digest()

    def path(self, image_file: str | bytes) -> Path:
        """Names the file of the trajectory of the picture `image_file`, a path or encoded; it need not exist."""
        if isinstance(image_file, bytes):
            return self.folder / f"{hashlib.sha256(self._fingerprint + image_file).hexdigest()}.safetensors"
        if image_file not in self._paths:
            self._paths[image_file] = self.path(Path(image_file).read_bytes())
        return self._paths[image_file]

    def missing(self, image_files: Sequence[str | bytes], process_index: int = 0, num_processes: int = 1) -> list[int]:
        """Lists what is not there yet, each content once.

        Args:
            image_files: The pictures, as paths or encoded.
            process_index: The number of this process, from 0.
            num_processes: How many processes share the pictures.

        Returns:
            The positions in `image_files` of this process's share of them that have no trajectory.
        """
        by_file = {self.path(image_file): position for position, image_file in enumerate(image_files)}
        # Shared out before looking: processes that look at different moments would not agree on what is missing.
        own = list(by_file.items())[process_index::num_processes]
        return [position for file, position in own if not file.is_file()]

    def nbytes(self, num_images: int) -> int:
        """Gives the size of `num_images` trajectories on disk, in bytes."""
        side = self.image_size // self.pipe.image_vae_scale_factor
        return num_images * len(self.levels) * self.pipe.image_unet.config.in_channels * side * side * 2

    @torch.no_grad()
    def build(
        self, image_files: Sequence[str | bytes], batch_size: int = 4, process_index: int = 0, num_processes: int = 1
    ) -> None:
        """Computes what is missing, with a progress bar; may be stopped and repeated.

        Args:
            image_files: The pictures, as paths or encoded.
            batch_size: How many are inverted at once.
            process_index: The number of this process, from 0.
            num_processes: How many processes share the work.
        """
        own = self.missing(image_files, process_index, num_processes)
        with tqdm(total=len(own), desc="Inverting pictures", disable=not own) as bar:
            for start in range(0, len(own), batch_size):
                chunk = [image_files[position] for position in own[start : start + batch_size]]
                for image_file, trajectory in zip(chunk, self._invert(chunk)):
                    _write_tensor("latents", trajectory, self.path(image_file))
                bar.update(len(chunk))

    def _invert(self, image_files: Sequence[str | bytes]) -> torch.Tensor:
        latents = self.pipe.prepare_image_latents([open_picture(file) for file in image_files], self.image_size)
        prompt_embeds = self.pipe.encode_image_prompt("", len(latents))
        prediction_type = self.pipe.image_scheduler.config.prediction_type
        walk = ddim_walk(self.pipe.image_unet, latents, prompt_embeds, self.levels, prediction_type)
        return torch.stack([latents, *(reached for _, reached in walk)], dim=1).to(torch.float16).cpu()

    def read(self, image_files: Sequence[str | bytes], timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads each picture's latents nearest to its timestep; what is missing is computed first.

        Args:
            image_files: B pictures, as paths or encoded.
            timesteps: `[B]`.

        Returns:
            `z_{t_i}^I`, float32 `[B, channels, height, width]`, and `t_i` `[B]`, both on the CPU.
        """
        self.build(image_files)
        steps = (self.timesteps - timesteps.cpu()[:, None]).abs().argmin(dim=1)
        latents = []
        for image_file, step in zip(image_files, steps.tolist()):
            with safe_open(self.path(image_file), framework="pt") as file:
                latents.append(file.get_slice("latents")[step].float())
        return torch.stack(latents), self.timesteps[steps]


def open_picture(image_file: str | bytes) -> Image.Image:
    """Opens the picture `image_file`, a path or encoded."""
    return Image.open(BytesIO(image_file) if isinstance(image_file, bytes) else image_file)


def hash_weights(*models: nn.Module | None) -> bytes:
    """Gives the SHA-256 of the names, dtypes, shapes and values of all weights and buffers of `models`, in order."""
    digest = hashlib.sha256()
    for model in filter(None, models):
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.digest()


def _write_tensor(name: str, tensor: torch.Tensor, path: Path) -> None:
    try:
        with atomic_write(path) as temporary:
            save_file({name: tensor.contiguous()}, temporary)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


class MusicLatentCache:
    """The music autoencoder's posteriors of clips on disk: each clip is encoded once, by whichever process meets it.

    One safetensors file a clip, named after its samples and the autoencoder's weights: mean and log-variance as the
    autoencoder gives them, `[2 * channels, frames / 4, bands / 4]`, float16. Of use where clips are not longer than
    what is trained on; random crops of longer ones are rarely met twice.

    Args:
        folder: Where the files lie; made if it does not exist.
        vae: The music autoencoder.
        spectrogram: That it was made for: AudioLDM's, or `Spectrogram.of(pipe)`.
    """

    def __init__(
        self, folder: str | os.PathLike, vae: AutoencoderKL, spectrogram: Spectrogram = Spectrogram()
    ) -> None:
        self.folder, self.vae, self.spectrogram = Path(folder), vae, spectrogram
        self.folder.mkdir(parents=True, exist_ok=True)
        # Files of before the spectrogram was a choice are AudioLDM's.
        other = b"" if spectrogram == Spectrogram() else repr(spectrogram).encode()
        self._fingerprint = hash_weights(vae) + other

    @torch.no_grad()
    def encode(self, waveforms: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        """Gives scaled music latents, sampled from the posteriors.

        Args:
            waveforms: `[B, samples]` at the spectrogram's sampling rate.
            generators: One a row, of the samples.

        Returns:
            `[B, channels, frames / 4, bands / 4]`, float32.
        """
        posteriors = [self._posterior(waveform) for waveform in waveforms.cpu()]
        posterior = DiagonalGaussianDistribution(torch.stack(posteriors).to(self.vae.device, torch.float32))
        return posterior.sample(generators) * self.vae.config.scaling_factor

    def _posterior(self, waveform: torch.Tensor) -> torch.Tensor:
        digest = hashlib.sha256(self._fingerprint + waveform.numpy().tobytes()).hexdigest()
        path = self.folder / f"{digest}.safetensors"
        if not path.is_file():
            rate = self.spectrogram.sampling_rate
            mel = waveform_to_mel(waveform, rate, self.vae, spectrogram=self.spectrogram)
            moments = self.vae.encode(mel[:, None].to(self.vae.dtype)).latent_dist.parameters[0]
            _write_tensor("moments", moments.to(torch.float16).cpu(), path)
        # Half precision cannot be stacked under autocast to bfloat16.
        return load_file(path)["moments"].float()


class PromptCache:
    """What captions become for the music UNet, in memory: the text encoders are frozen, so each is encoded once.

    Each caption is encoded alone, as the pipeline encodes a single prompt: AudioLDM 2's encoding depends on the
    batch. A dropped caption becomes what the negative prompt of a call without one is: the empty text, padded to the
    caption's length. That is kept once for each length. A caption of 30 tokens takes about 0.15 MB with AudioLDM 2 in
    float32, 2 kB with AudioLDM.

    Args:
        pipe: The pipeline whose text encoders encode.
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe = pipe
        self._prompts: dict[str, dict[str, torch.Tensor]] = {}
        self._dropped: dict[tuple[int, ...], dict[str, torch.Tensor]] = {}

    def read(self, captions: Sequence[str], keeps_text: torch.Tensor) -> dict[str, torch.Tensor]:
        """Gives the UNet's arguments by name.

        Args:
            captions: B texts.
            keeps_text: `[B]`, False for those that are dropped.

        Returns:
            B rows each, on the CPU; text sequences are padded to the longest, and their masks say so.
        """
        rows = [self._row(caption, keep) for caption, keep in zip(captions, keeps_text.tolist(), strict=True)]
        lengths = {name: max(row[name].shape[1] for row in rows) for name in rows[0]}
        rows = [pad_texts(row, lengths) for row in rows]
        return {name: torch.cat([row[name] for row in rows]) for name in lengths}

    def _row(self, caption: str, keep: bool) -> dict[str, torch.Tensor]:
        if caption not in self._prompts:
            self._prompts[caption] = self._encode(0, prompt=[caption], do_classifier_free_guidance=False)
        prompt = self._prompts[caption]
        if keep:
            return prompt
        lengths = tuple(rows.shape[1] for rows in prompt.values())
        if lengths not in self._dropped:
            self._dropped[lengths] = self._encode(1, prompt_embeds=self.pipe.prompts.from_unet(prompt))
        return self._dropped[lengths]

    def _encode(self, which: int, **arguments: Any) -> dict[str, torch.Tensor]:
        # Without autocast, or what is kept would depend on where a caption is met first.
        with torch.autocast(self.pipe.unet.device.type, enabled=False):
            embeds = self.pipe.encode_prompt(**arguments)[which]
        return {name: rows.cpu() for name, rows in self.pipe.prompts.to_unet(embeds).items()}


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

    Raises:
        ValueError: As `trained_parts`, or if the music scheduler's prediction type is unknown.
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
    ) -> None:
        super().__init__()
        self.trained = nn.ModuleDict(trained_parts(pipe, trainable))
        self.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        if self.scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"Cannot train for prediction_type={self.scheduler.config.prediction_type!r}.")
        self.pipe, self.snr_gamma, self.logit_mean, self.seed = pipe, snr_gamma, logit_mean, seed
        self.trajectories, self.music_latents = trajectories, music_latents
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
                `image_files` (with trajectories) or `pixel_values` `[B, 3, S, S]` in [-1, 1] (without).
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
        latents, noise = self._music_latents(batch["waveforms"], draw)
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
    def _music_latents(self, waveforms: torch.Tensor, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
        if self.music_latents is not None:
            latents = self.music_latents.encode(waveforms, draw.generators)
        else:
            spectrogram = Spectrogram.of(self.pipe)
            latents = waveform_to_latents(
                waveforms[:, None],
                spectrogram.sampling_rate,
                self.pipe.vae,
                sample_mode="sample",
                generator=draw.generators,
                spectrogram=spectrogram,
            ).float()
        return latents, randn_tensor(latents.shape, draw.generators, latents.device)

    @torch.no_grad()
    def _image_latents(self, batch: dict, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.pipe.image_unet.device
        if self.trajectories is not None:
            latents, timesteps = self.trajectories.read(batch["image_files"], draw.timesteps)
            return latents.to(device), timesteps.to(device)
        latents = encode_pixels(self.pipe.image_vae, batch["pixel_values"].to(device))
        noise = randn_tensor(latents.shape, draw.generators, device)
        scheduler = DDIMScheduler.from_config(self.pipe.image_scheduler.config)
        timesteps = draw.timesteps.to(device)
        return scheduler.add_noise(latents, noise, timesteps), timesteps

    def _read_image(
        self,
        batch: dict,
        draw: Draw,
        music_shape: torch.Size,
        prompts: dict[str, torch.Tensor],
        synapse_scale: float,
    ) -> None:
        synapse = self.trained["synapse"]
        with torch.no_grad():
            latents, timesteps = self._image_latents(batch, draw)
            prompt_embeds = self._empty_image_prompt().expand(len(latents), -1, -1)
            layers = self.pipe.synapse.config.image_layers
            recorded = record_keys_and_values(self.pipe.image_unet, latents, timesteps, prompt_embeds, layers)
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

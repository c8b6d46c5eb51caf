"""What never changes in training, computed once: pictures, clips and captions as the models take them."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.logging import tqdm
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from .arguments_melfusion import check_integer, check_path
from .attention_melfusion import MAX_RECORDED_TOKENS
from .audio import prepare_mel, waveform_to_mel
from .families_melfusion import pad_texts
from .features_melfusion import ImageFeatures, nearest_steps
from .files_melfusion import atomic_write
from .inversion_melfusion import ddim_walk, inversion_grid
from .modeling_melfusion import decoder_layers
from .waveforms_melfusion import Spectrogram


class CacheFiles:
    """The files of a cache, named after what they were made of; without the models, so that workers can be sent it.

    Args:
        folder: Where they lie; made if it does not exist.
        fingerprint: Of the settings and models that make them.
    """

    def __init__(self, folder: str | os.PathLike, fingerprint: bytes) -> None:
        check_path("folder", folder)
        self.folder, self.fingerprint = Path(folder), fingerprint
        self.folder.mkdir(parents=True, exist_ok=True)
        self._paths: dict[str, Path] = {}

    def path(self, content: str | bytes) -> Path:
        """Names the file of `content`, or of that of the file at this path, read once; it need not exist."""
        if isinstance(content, bytes):
            return self.folder / f"{hashlib.sha256(self.fingerprint + content).hexdigest()}.safetensors"
        if content not in self._paths:
            self._paths[content] = self.path(Path(content).read_bytes())
        return self._paths[content]

    def read(self, content: str | bytes, name: str) -> torch.Tensor | None:
        """Reads the tensor `name` `[...]`, as it was written, of the file of `content`; None if there is none."""
        path = self.path(content)
        return load_file(path)[name] if path.is_file() else None


@dataclass
class PreparedInputs:
    """Reads or computes for a sample, where the sample is read, what the models would else wait for.

    That is in a `DataLoader`'s worker, if it has some. Nothing here is a model, so that workers can be sent it.

    Args:
        spectrogram: The music autoencoder's.
        frames_per_latent: How many of its frames become one of the latents.
        trajectories: Of `TrajectoryCache.files`.
        moments: Of `MusicLatentCache.files`; then there are no spectrograms.
    """

    spectrogram: Spectrogram
    frames_per_latent: int
    trajectories: CacheFiles | None = None
    moments: CacheFiles | None = None

    def __call__(self, sample: dict) -> dict:
        """Prepares a sample.

        Args:
            sample: Of `read_triplet`.

        Returns:
            The sample and, where they are cached, its `trajectories` `[N, channels, height, width]` and `moments`
            `[2 * channels, frames / 4, bands / 4]`, float16, else `mels` `[frames, bands]`, float32.
        """
        waveform, found = sample["waveforms"], {}
        if self.trajectories is not None:
            found["trajectories"] = self.trajectories.read(sample["image_files"], "latents")
        if self.moments is not None:
            found["moments"] = self.moments.read(waveform.numpy().tobytes(), "moments")
        else:
            rate = self.spectrogram.sampling_rate
            mels = prepare_mel(waveform, rate, self.frames_per_latent, spectrogram=self.spectrogram)
            found["mels"] = mels[0].float()
        return sample | {name: tensor for name, tensor in found.items() if tensor is not None}


class PictureCache:
    """What pictures become, on disk: computed once, shared by processes and runs.

    One safetensors file a picture, named after the picture's bytes, the settings and the models' weights.

    Args:
        folder: Where the files lie; made if it does not exist.
        pipe: The pipeline whose picture side inverts.
        num_inversion_steps: N.
        image_size: The side to which pictures are prepared (centre crop), in pixels.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is out of range, or `image_size` no multiple of what the picture's VAE halves.
    """

    def __init__(
        self, folder: str | os.PathLike, pipe: DiffusionPipeline, num_inversion_steps: int, image_size: int
    ) -> None:
        check_integer("image_size", image_size, 1)
        if image_size % pipe.image_vae_scale_factor:
            raise ValueError(f"`image_size` must be a multiple of {pipe.image_vae_scale_factor}, got {image_size}.")
        self.pipe, self.image_size = pipe, image_size
        self.levels = inversion_grid(pipe.image_scheduler, num_inversion_steps)[:-1]
        self.timesteps = torch.tensor([level.timestep for level in self.levels])
        self.files = CacheFiles(folder, self._hash_settings())

    def _hash_settings(self) -> bytes:
        settings = [self.levels, self.image_size, self.pipe.image_scheduler.config.prediction_type]
        weights = hash_weights(self.pipe.image_vae, self.pipe.image_unet, self.pipe.image_text_encoder)
        return hashlib.sha256(json.dumps(settings).encode() + weights).digest()

    def path(self, image_file: str | bytes) -> Path:
        """Names the file of the picture `image_file`, a path or encoded; it need not exist."""
        return self.files.path(image_file)

    def missing(self, image_files: Sequence[str | bytes], process_index: int = 0, num_processes: int = 1) -> list[int]:
        """Lists what is not there yet, each content once.

        Args:
            image_files: The pictures, as paths or encoded.
            process_index: The number of this process, from 0.
            num_processes: How many processes share the pictures.

        Returns:
            The positions in `image_files` of this process's share of them that have no file.
        """
        by_file = {self.path(image_file): position for position, image_file in enumerate(image_files)}
        # Shared out before looking: processes that look at different moments would not agree on what is missing.
        own = list(by_file.items())[process_index::num_processes]
        return [position for file, position in own if not file.is_file()]

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
                self._write(chunk)
                bar.update(len(chunk))

    def nearest(self, timesteps: torch.Tensor) -> torch.LongTensor:
        """Gives the number of the noise level nearest to each of `timesteps` `[B]`, on the CPU."""
        return nearest_steps(self.timesteps, timesteps)


class TrajectoryCache(PictureCache):
    """The inversion trajectories of pictures on disk.

    A file holds `z_t^I` at `t_0 ... t_{N-1}`, the latents at which the pipeline records by default:
    `[N, channels, height, width]`, float16.
    """

    def nbytes(self, num_images: int) -> int:
        """Gives the size of `num_images` trajectories on disk, in bytes."""
        side = self.image_size // self.pipe.image_vae_scale_factor
        return num_images * len(self.levels) * self.pipe.image_unet.config.in_channels * side * side * 2

    def _write(self, image_files: Sequence[str | bytes]) -> None:
        for image_file, trajectory in zip(image_files, self._invert(image_files)):
            _write_tensor("latents", trajectory, self.path(image_file))

    def _invert(self, image_files: Sequence[str | bytes]) -> torch.Tensor:
        latents = self.pipe.prepare_image_latents([open_picture(file) for file in image_files], self.image_size)
        prompt_embeds = self.pipe.encode_image_prompt("", len(latents))
        prediction_type = self.pipe.image_scheduler.config.prediction_type
        walk = ddim_walk(self.pipe.image_unet, latents, prompt_embeds, self.levels, prediction_type)
        return torch.stack([latents, *(reached for _, reached in walk)], dim=1).to(torch.float16).cpu()

    def read(
        self, image_files: Sequence[str | bytes], timesteps: torch.Tensor, trajectories: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads each picture's latents nearest to its timestep; what is missing is computed first.

        Args:
            image_files: B pictures, as paths or encoded.
            timesteps: `[B]`.
            trajectories: Theirs, `[B, N, channels, height, width]`, where `PreparedInputs` has read them already.

        Returns:
            `z_{t_i}^I`, float32 `[B, channels, height, width]`, and `t_i` `[B]`, both on the CPU unless
            `trajectories` lie elsewhere.
        """
        steps = self.nearest(timesteps)
        if trajectories is not None:
            return trajectories[range(len(steps)), steps].float(), self.timesteps[steps]
        self.build(image_files)
        latents = []
        for image_file, step in zip(image_files, steps.tolist()):
            with safe_open(self.path(image_file), framework="pt") as file:
                latents.append(file.get_slice("latents")[step].float())
        return torch.stack(latents), self.timesteps[steps]


class ImageFeaturesCache(PictureCache):
    """The features of pictures on disk, recorded while inverting: where all are there, training needs no more of them.

    A file is that of `ImageFeatures.save`, in float16: N times the keys and values of each layer that the synapse
    reads. With Stable Diffusion at 512 pixels and N = 10 it has 157 MB, where a trajectory has 0.3.
    """

    def _hash_settings(self) -> bytes:
        layers = dict.fromkeys(self.pipe.synapse.config.image_layers)
        return hashlib.sha256(json.dumps(list(layers)).encode() + super()._hash_settings()).digest()

    def nbytes(self, num_images: int) -> int:
        """Gives the size of the features of `num_images` pictures on disk, in bytes; needs the picture's UNet."""
        side = self.image_size // self.pipe.image_vae_scale_factor
        numbers = 0
        for layer, width, level in decoder_layers(self.pipe.image_unet, "attn1"):
            if layer in self.pipe.synapse.config.image_layers:
                numbers += min(MAX_RECORDED_TOKENS, (-(-side // 2**level)) ** 2) * width
        # Keys and values, two bytes each.
        return num_images * len(self.levels) * numbers * 4

    def _write(self, image_files: Sequence[str | bytes]) -> None:
        images = [open_picture(file) for file in image_files]
        recorded = self.pipe.encode_image(
            images, image_size=self.image_size, num_inversion_steps=len(self.levels), feature_source="inversion"
        )
        recorded = recorded.to("cpu", torch.float16)
        for index, image_file in enumerate(image_files):
            keys, values = (
                {layer: states[:, index : index + 1] for layer, states in side.items()}
                for side in (recorded.keys, recorded.values)
            )
            replace(recorded, keys=keys, values=values).save(self.path(image_file))

    def features(self, image_file: str | bytes) -> ImageFeatures:
        """Reads the features of a picture, for a call of the pipeline.

        Args:
            image_file: A path or encoded.

        Returns:
            Those of all N timesteps, float16, on the CPU.

        Raises:
            FileNotFoundError: If they were not built.
        """
        return ImageFeatures.load(self.path(image_file))

    def read(
        self, image_files: Sequence[str | bytes], timesteps: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Reads what each picture contributes at the recorded timestep nearest to its own.

        Args:
            image_files: B pictures, as paths or encoded.
            timesteps: `[B]`.

        Returns:
            Keys and values by layer, each `[B, tokens, channels]`, float16, on the CPU.

        Raises:
            FileNotFoundError: If a picture's were not built.
        """
        steps = self.nearest(timesteps).tolist()
        parts = [ImageFeatures.load(self.path(file), step=step) for file, step in zip(image_files, steps)]
        joined = ImageFeatures.join(parts).at_step(0)
        return {layer: key for layer, (key, _) in joined.items()}, {
            layer: value for layer, (_, value) in joined.items()
        }


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
        self.vae, self.spectrogram = vae, spectrogram
        # Files of before the spectrogram was a choice are AudioLDM's.
        other = b"" if spectrogram == Spectrogram() else repr(spectrogram).encode()
        self.files = CacheFiles(folder, hash_weights(vae) + other)

    @torch.no_grad()
    def encode(
        self, waveforms: torch.Tensor, generators: list[torch.Generator], moments: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Gives scaled music latents, sampled from the posteriors.

        Args:
            waveforms: `[B, samples]` at the spectrogram's sampling rate.
            generators: One a row, of the samples.
            moments: Of the posteriors, `[B, 2 * channels, frames / 4, bands / 4]`, if `PreparedInputs` has read them.

        Returns:
            `[B, channels, frames / 4, bands / 4]`, float32.
        """
        if moments is None:
            moments = torch.stack([self._posterior(waveform) for waveform in waveforms.cpu()])
        posterior = DiagonalGaussianDistribution(moments.to(self.vae.device, torch.float32))
        return posterior.sample(generators) * self.vae.config.scaling_factor

    def _posterior(self, waveform: torch.Tensor) -> torch.Tensor:
        path = self.files.path(waveform.numpy().tobytes())
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

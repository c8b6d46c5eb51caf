"""Trains the text-to-image UNet on picture latents and descriptions; inversion later uses it with the empty prompt."""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from corpus import load_pictures, read_rows, unique_images
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch.nn import functional as F
from train_image_vae import encode
from training_loop import Training, run, stage_parser
from transformers import CLIPTextModel, CLIPTokenizer

EMPTY_PROMPT_PROBABILITY = 0.1


def create_unet(cross_attention_dim: int) -> UNet2DConditionModel:
    """Returns Stable Diffusion's UNet in three resolutions, one layer a block: its decoder has six attention layers.

    So has the music UNet's. The encoder's first level has no attention: nothing is recorded there, and it costs most.
    """
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def create_scheduler(beta_start: float, beta_end: float, prediction_type: str = "epsilon") -> DDIMScheduler:
    """Returns the noise schedule of Stable Diffusion and AudioLDM, which differ in the betas only."""
    return DDIMScheduler(
        prediction_type=prediction_type,
        beta_start=beta_start,
        beta_end=beta_end,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )


@torch.no_grad()
def encode_texts(encoder: CLIPTextModel, tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Returns the text states `[N, 32, 128]`."""
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return torch.cat([encoder(batch)[0] for batch in tokens.split(50)])


def noise_loss(unet, scheduler, latents: torch.Tensor, generator: torch.Generator, **conditioning) -> torch.Tensor:
    """Returns the mean squared error of what the scheduler predicts at random timesteps, for latents `[B, ...]`."""
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), generator=generator)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
    return F.mse_loss(unet(noisy, timesteps, **conditioning).sample, target)


@torch.no_grad()
def validation_loss(unet, scheduler, latents: torch.Tensor, seed: int, **conditioning) -> float:
    """Returns the noise loss of all latents with fixed noise."""
    generator = torch.Generator().manual_seed(seed)
    return noise_loss(unet, scheduler, latents, generator, **conditioning).item()


def train_unet(
    args: argparse.Namespace,
    state: Path,
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    latents: torch.Tensor,
    texts: torch.Tensor,
    condition: Callable[[torch.Tensor], dict],
) -> bool:
    """Trains a UNet to tell the noise in latents, each of them one time in ten without its text.

    Args:
        args: Of `stage_parser`.
        state: The file of the training's state.
        unet: The UNet; afterwards it has the averaged weights.
        scheduler: Its noise schedule.
        latents: `[N, ...]`, each with the text after the last one's; after the last text the first one comes again.
        texts: The encoded texts `[1 + M, ...]`, the empty one first.
        condition: Makes the UNet's arguments of rows of `texts`.

    Returns:
        Whether all steps are done.
    """
    training = Training(unet, state, args)

    def take_step(generator: torch.Generator) -> dict[str, torch.Tensor]:
        batch = torch.randint(len(latents), (args.batch_size,), generator=generator)
        told = torch.rand(args.batch_size, generator=generator) >= EMPTY_PROMPT_PROBABILITY
        rows = texts[torch.where(told, batch % (len(texts) - 1) + 1, 0)]
        loss = noise_loss(unet, scheduler, latents[batch], generator, **condition(rows))
        training.update(loss)
        return {"loss": loss}

    done = run(training, take_step)
    training.use_average()
    return done


def main() -> None:
    args = stage_parser(__doc__, steps=20000, batch_size=16, learning_rate=5e-4).parse_args()
    torch.manual_seed(args.seed)
    components = args.output / "components"
    vae = AutoencoderKL.from_pretrained(components / "image_vae").eval()
    encoder = CLIPTextModel.from_pretrained(components / "clip").eval()
    tokenizer = CLIPTokenizer.from_pretrained(components / "clip")
    rows = {split: unique_images(read_rows(args.data, split)) for split in ("train", "validation")}
    pictures = {split: load_pictures(args.data, rows[split]) for split in rows}
    mirrored = torch.cat([pictures["train"], pictures["train"].flip(-1)])
    latents = encode(vae, mirrored) * vae.config.scaling_factor
    texts = encode_texts(encoder, tokenizer, ["", *(row["description"] for row in rows["train"])])
    unet, scheduler = create_unet(texts.shape[-1]), create_scheduler(0.00085, 0.012)
    state = args.output / "state/image_unet.safetensors"
    done = train_unet(args, state, unet, scheduler, latents, texts, lambda rows: {"encoder_hidden_states": rows})
    unet.save_pretrained(components / "image_unet")
    scheduler.save_pretrained(components / "image_scheduler")
    encoder.save_pretrained(components / "image_text_encoder")
    tokenizer.save_pretrained(components / "image_tokenizer")
    unseen = encode(vae, pictures["validation"]) * vae.config.scaling_factor
    loss = validation_loss(unet, scheduler, unseen, 0, encoder_hidden_states=texts[:1].expand(len(unseen), -1, -1))
    print(f"{'done' if done else 'stopped'}: validation noise loss with the empty prompt {loss:.4f}")


if __name__ == "__main__":
    main()

"""Trains the music autoencoder on log-mel spectrograms: [512, 64] becomes 8 x 64 x 8 latents."""

import torch
from corpus import load_mels
from diffusers import AutoencoderKL
from torch.nn import functional as F
from training_loop import Training, run, stage_parser

CROP_FRAMES = 128
KL_WEIGHT = 1e-3


def create_vae() -> AutoencoderKL:
    """Returns AudioLDM's autoencoder, smaller and with one more halving."""
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def draw_crops(mels: torch.Tensor, batch_size: int, generator: torch.Generator) -> torch.Tensor:
    """Draws crops `[B, 1, 128, 64]` of random clips and moments."""
    clips = torch.randint(len(mels), (batch_size,), generator=generator).tolist()
    starts = torch.randint(mels.shape[1] - CROP_FRAMES + 1, (batch_size,), generator=generator).tolist()
    crops = [mels[clip, start : start + CROP_FRAMES] for clip, start in zip(clips, starts, strict=True)]
    return torch.stack(crops).float().unsqueeze(1)


def vae_losses(vae: AutoencoderKL, target: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Returns the L1 error of the reconstruction and the mean KL divergence of a latent from the unit normal."""
    posterior = vae.encode(target).latent_dist
    reconstruction = vae.decode(posterior.sample(generator)).sample
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return {"l1": F.l1_loss(reconstruction, target), "kl": kl}


@torch.no_grad()
def finish(vae: AutoencoderKL, mels: torch.Tensor, validation: torch.Tensor) -> float:
    """Sets the scaling factor to 1 / standard deviation of the training latents, and returns the validation L1."""
    latents = torch.cat([vae.encode(mels[i : i + 8, None].float()).latent_dist.mode() for i in range(0, 512, 8)])
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    reconstruct = (vae(validation[i : i + 8, None].float()).sample[:, 0] for i in range(0, len(validation), 8))
    return F.l1_loss(torch.cat(list(reconstruct)), validation.float()).item()


def main() -> None:
    args = stage_parser(__doc__, steps=2400, batch_size=4, learning_rate=1e-3).parse_args()
    torch.manual_seed(args.seed)
    vae, mels = create_vae(), load_mels(args, "train")
    training = Training(vae, args.output / "state/mel_vae.safetensors", args)

    def take_step(generator: torch.Generator) -> dict[str, torch.Tensor]:
        losses = vae_losses(vae, draw_crops(mels, args.batch_size, generator), generator)
        training.update(losses["l1"] + KL_WEIGHT * losses["kl"])
        return losses

    done = run(training, take_step)
    training.use_average()
    l1 = finish(vae, mels, load_mels(args, "validation"))
    vae.save_pretrained(args.output / "components/vae")
    print(f"{'done' if done else 'stopped'}: validation log-mel L1 {l1:.4f}, scaling {vae.config.scaling_factor:.4f}")


if __name__ == "__main__":
    main()

"""Trains the picture autoencoder: 3 x 64 x 64 pixels become 4 x 16 x 16 latents."""

import torch
from corpus import load_pictures, pixel_values, read_rows, unique_images
from diffusers import AutoencoderKL
from mood import PICTURE_SIZE
from train_mel_vae import vae_losses
from training_loop import Training, run, stage_parser

KL_WEIGHT = 1e-4


def create_vae() -> AutoencoderKL:
    """Returns Stable Diffusion's autoencoder, smaller and with two halvings instead of three."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=PICTURE_SIZE,
        mid_block_add_attention=False,
    )


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Returns the modes `[N, 4, 16, 16]` of uint8 pictures `[N, 3, 64, 64]`, not scaled."""
    return torch.cat([vae.encode(pixel_values(batch)).latent_dist.mode() for batch in pictures.split(50)])


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: torch.Tensor) -> float:
    """Returns the mean peak signal-to-noise ratio of the reconstructions in dB."""
    decoded = torch.cat([vae.decode(batch).sample for batch in encode(vae, pictures).split(50)]).clamp(-1, 1)
    errors = (decoded - pixel_values(pictures)).square().mean(dim=(1, 2, 3))
    return (10 * (4 / errors).log10()).mean().item()


def main() -> None:
    args = stage_parser(__doc__, steps=900, batch_size=16, learning_rate=1e-3).parse_args()
    torch.manual_seed(args.seed)
    pictures = load_pictures(args.data, unique_images(read_rows(args.data, "train")))
    vae = create_vae()
    training = Training(vae, args.output / "state/image_vae.safetensors", args)

    def take_step(generator: torch.Generator) -> dict[str, torch.Tensor]:
        batch = pixel_values(pictures[torch.randint(len(pictures), (args.batch_size,), generator=generator)])
        losses = vae_losses(vae, batch, generator)
        training.update(losses["l1"] + KL_WEIGHT * losses["kl"])
        return losses

    done = run(training, take_step)
    training.use_average()
    vae.register_to_config(scaling_factor=1 / encode(vae, pictures).std().item())
    vae.save_pretrained(args.output / "components/image_vae")
    quality = psnr(vae, load_pictures(args.data, unique_images(read_rows(args.data, "validation"))))
    print(f"{'done' if done else 'stopped'}: validation {quality:.2f} dB, scaling {vae.config.scaling_factor:.4f}")


if __name__ == "__main__":
    main()

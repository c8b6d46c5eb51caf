"""Trains the music autoencoder on log-mel spectrograms: [512, 64] becomes 8 x 64 x 8 latents.

`--start_from` goes on from weights that are there already, and `--keep_latents` then trains the decoder only, so that
music UNet and synapse stay valid.
"""

from pathlib import Path

import torch
from corpus import load_mels
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from training_loop import Training, run, stage_parser

from melfusion_pipeline.waveforms_melfusion import MEL_FLOOR

CROP_FRAMES = 128
KL_WEIGHT = 1e-3
ADVERSARIAL_WEIGHT = 0.03


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


class PatchDiscriminator(nn.Module):
    """Judges patches of log-mel spectrograms, as the PatchGAN of latent diffusion (arXiv 2112.10752) does pictures."""

    def __init__(self, width: int = 32):
        super().__init__()
        widths, strides = (1, width, 2 * width, 2 * width), (2, 2, 1)
        self.layers = nn.ModuleList(
            weight_norm(nn.Conv2d(*shape, 4, stride, 1))
            for *shape, stride in zip(widths[:-1], widths[1:], strides, strict=True)
        )
        self.judge = weight_norm(nn.Conv2d(2 * width, 1, 4, padding=1))

    def forward(self, mels: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Returns the judgements of spectrograms `[B, 1, T, 64]`, one a patch, and all layers' outputs."""
        hidden, outputs = mels / 5 + 1, []
        for layer in self.layers:
            hidden = F.leaky_relu(layer(hidden), 0.2)
            outputs.append(hidden.float())
        return self.judge(hidden).float(), outputs


def draw_crops(mels: torch.Tensor, batch_size: int, generator: torch.Generator) -> torch.Tensor:
    """Draws crops `[B, 1, 128, 64]` of random clips and moments."""
    clips = torch.randint(len(mels), (batch_size,), generator=generator).tolist()
    starts = torch.randint(mels.shape[1] - CROP_FRAMES + 1, (batch_size,), generator=generator).tolist()
    crops = [mels[clip, start : start + CROP_FRAMES] for clip, start in zip(clips, starts, strict=True)]
    return torch.stack(crops).float().unsqueeze(1)


def vae_losses(
    vae: AutoencoderKL, target: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Returns the reconstruction and its losses.

    `l1` is the reconstruction's error, `loud` the same where each band counts by how far it lies above the floor (the
    floor's own noise says nothing about notes), `kl` the mean KL divergence of a latent from the unit normal.
    """
    posterior = vae.encode(target).latent_dist
    reconstruction = vae.decode(posterior.sample(generator)).sample.float()
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    above = target - torch.tensor(MEL_FLOOR).log()
    loud = (above * (reconstruction - target).abs()).sum() / above.sum().clamp(min=1)
    return reconstruction, {"l1": F.l1_loss(reconstruction, target), "loud": loud, "kl": kl}


def adversarial_losses(
    discriminator: PatchDiscriminator, reconstruction: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the autoencoder's loss, least squares plus ten times feature matching, and the discriminator's."""
    judged, features = discriminator(reconstruction)
    true_judged, true_features = discriminator(target)
    fake_judged, _ = discriminator(reconstruction.detach())
    matching = sum(F.l1_loss(f, t.detach()) for f, t in zip(features, true_features, strict=True))
    own = fake_judged.square().mean() + (1 - true_judged).square().mean()
    return (1 - judged).square().mean() + 10 * matching / len(features), own


@torch.no_grad()
def finish(vae: AutoencoderKL, mels: torch.Tensor, validation: torch.Tensor, keep_latents: bool) -> float:
    """Returns the validation L1; sets the scaling factor to 1 / standard deviation of the latents unless kept."""
    if not keep_latents:
        latents = torch.cat([vae.encode(mels[i : i + 8, None].float()).latent_dist.mode() for i in range(0, 512, 8)])
        vae.register_to_config(scaling_factor=1 / latents.std().item())
    reconstruct = (vae(validation[i : i + 8, None].float()).sample[:, 0] for i in range(0, len(validation), 8))
    return F.l1_loss(torch.cat(list(reconstruct)), validation.float()).item()


def main() -> None:
    parser = stage_parser(__doc__, steps=2400, batch_size=4, learning_rate=1e-3)
    parser.add_argument("--start_from", type=Path, help="folder of an autoencoder whose weights to go on from")
    parser.add_argument("--keep_latents", action="store_true", help="train the decoder only")
    parser.add_argument("--discriminator_from", type=int, default=1000, help="step at which the discriminator joins")
    parser.add_argument("--bf16", action="store_true", help="twice as fast with AMX or AVX-512 BF16")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    vae = create_vae() if args.start_from is None else AutoencoderKL.from_pretrained(args.start_from).train()
    discriminator, mels = PatchDiscriminator(), load_mels(args, "train")
    if args.keep_latents:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    training = Training(vae, args.output / "state/mel_vae.safetensors", args)
    judging = Training(discriminator, args.output / "state/mel_discriminator.safetensors", args, betas=(0.5, 0.9))

    def take_step(generator: torch.Generator) -> dict[str, torch.Tensor]:
        target = draw_crops(mels, args.batch_size, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            reconstruction, losses = vae_losses(vae, target, generator)
            loss = (losses["l1"] + losses["loud"]) / 2 + KL_WEIGHT * losses["kl"]
            if training.step >= args.discriminator_from:
                adversarial, losses["discriminator"] = adversarial_losses(discriminator, reconstruction, target)
                losses["adversarial"] = adversarial
                loss = loss + ADVERSARIAL_WEIGHT * adversarial
        training.update(loss)
        if "discriminator" in losses:
            judging.update(losses["discriminator"])
        return losses

    done = run(training, take_step, also=(judging,))
    training.use_average()
    l1 = finish(vae, mels, load_mels(args, "validation"), args.keep_latents)
    vae.save_pretrained(args.output / "components/vae")
    print(f"{'done' if done else 'stopped'}: validation log-mel L1 {l1:.4f}, scaling {vae.config.scaling_factor:.4f}")


if __name__ == "__main__":
    main()

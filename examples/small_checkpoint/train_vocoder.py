"""Trains the vocoder: spectral losses at five resolutions, and from `--discriminator_from` on a discriminator.

First on the clips' own spectrograms; with `--vae` on what an autoencoder makes of them, against the same waveforms.
"""

import math
from pathlib import Path

import torch
from corpus import load_mels, load_waveforms
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from training_loop import Training, run, stage_parser

from melfusion_pipeline.vocoder_melfusion import MusicVocoder
from melfusion_pipeline.waveforms_melfusion import log_mel_spectrogram, mel_filters

HOP = 160
SEGMENT_FRAMES = 96
# Frames on either side that the vocoder sees and the losses do not, as within a whole clip.
CONTEXT_FRAMES = 24
# Windows of 16 to 256 ms: only the longest tell the notes of a chord apart.
RESOLUTIONS = ((4096, 1024), (2048, 512), (1024, 256), (512, 128), (256, 64))
MEL_RESOLUTION = (1024, 256)
JUDGED_RESOLUTIONS = ((2048, 512), (1024, 256), (512, 128))
ADVERSARIAL_WEIGHT = 0.2
# The discriminator costs more than all the rest, so it hears half of a batch.
JUDGED_SHARE = 0.5


def create_vocoder(mels: torch.Tensor) -> MusicVocoder:
    """Returns an untrained vocoder for log-mel spectrograms such as `mels` `[N, T, 64]`."""
    sample = mels[:500].float()
    return MusicVocoder(mel_mean=sample.mean().item(), mel_std=sample.std().item())


class SpectrumDiscriminator(nn.Module):
    """Judges patches of log-magnitude spectrograms, one network a resolution (as UnivNet's, arXiv 2106.07889)."""

    def __init__(self, width: int = 16):
        super().__init__()
        strides = ((2, 1), (2, 1), (2, 2), (2, 1))
        widths = (1, width, width, 2 * width, 2 * width)

        def network() -> nn.ModuleList:
            layers = [
                weight_norm(nn.Conv2d(*shape, (5, 3), stride, (2, 1)))
                for *shape, stride in zip(widths[:-1], widths[1:], strides, strict=True)
            ]
            return nn.ModuleList([*layers, weight_norm(nn.Conv2d(2 * width, 1, 3, padding=1))])

        self.networks = nn.ModuleList(network() for _ in JUDGED_RESOLUTIONS)

    def forward(self, waveform: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Returns the judgements of waveforms `[B, T]`, one tensor a resolution, and all layers' outputs."""
        judgements, outputs = [], []
        for network, resolution in zip(self.networks, JUDGED_RESOLUTIONS, strict=True):
            hidden = magnitude(waveform, *resolution).log().unsqueeze(1)
            for layer in network[:-1]:
                hidden = F.leaky_relu(layer(hidden), 0.1)
                outputs.append(hidden)
            judgements.append(network[-1](hidden).float())
        return judgements, outputs


def magnitude(waveform: torch.Tensor, length: int, hop: int) -> torch.Tensor:
    """Returns STFT magnitudes `[B, length / 2 + 1, frames]`, in which a sine has its own amplitude.

    They are at least 1e-4: what lies further below says nothing, and the logarithm would make much of it.
    """
    window = torch.hann_window(length, device=waveform.device)
    spectrum = torch.stft(waveform, length, hop, window=window, center=False, return_complex=True) / (length / 4)
    return (spectrum.real.square() + spectrum.imag.square() + 1e-8).sqrt()


def spectral_losses(generated: torch.Tensor, real: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the spectral distances of waveforms `[B, T]`.

    `spectral` is spectral convergence plus log-magnitude L1, averaged over resolutions (Parallel WaveGAN, arXiv
    1910.11480), `mel` the L1 of log-mel spectrograms.
    """
    losses = []
    for resolution in RESOLUTIONS:
        fake, true = magnitude(generated, *resolution), magnitude(real, *resolution)
        convergence = (true - fake).norm(dim=(1, 2)) / true.norm(dim=(1, 2)).clamp(min=0.01)
        losses.append(convergence.mean() + F.l1_loss(fake.log(), true.log()))
        if resolution == MEL_RESOLUTION:
            filters = mel_filters().float().mT * resolution[0] / 4
            mel = F.l1_loss((filters @ fake).log(), (filters @ true).log())
    return {"spectral": torch.stack(losses).mean(), "mel": mel}


def adversarial_loss(
    discriminator: SpectrumDiscriminator, generated: torch.Tensor, real: torch.Tensor
) -> torch.Tensor:
    """Least-squares generator loss plus twice the feature matching loss (HiFi-GAN, arXiv 2010.05646, eq. 3 and 5)."""
    judgements, fake = discriminator(generated)
    with torch.no_grad():
        true = discriminator(real)[1]
    judged = sum((1 - scores).square().mean() for scores in judgements)
    return judged + 2 * sum(F.l1_loss(f.float(), t.float()) for f, t in zip(fake, true, strict=True)) / len(fake)


def discriminator_loss(
    discriminator: SpectrumDiscriminator, generated: torch.Tensor, real: torch.Tensor
) -> torch.Tensor:
    """Least-squares discriminator loss (HiFi-GAN, eq. 2)."""
    fakes, trues = (discriminator(waveform)[0] for waveform in (generated.detach(), real))
    return sum(f.square().mean() + (1 - t).square().mean() for f, t in zip(fakes, trues, strict=True))


def draw_segments(
    batch_size: int, mels: torch.Tensor, waveforms: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws log-mel segments with context `[B, 144, 64]` and the waveforms of the 96 frames within `[B, 15360]`."""
    segments, sounds, frames = [], [], SEGMENT_FRAMES + 2 * CONTEXT_FRAMES
    for index in torch.randint(len(mels), (batch_size,), generator=generator).tolist():
        start = torch.randint(mels.shape[1] - frames + 1, (), generator=generator).item()
        segments.append(mels[index, start : start + frames].float())
        first = (start + CONTEXT_FRAMES) * HOP
        sounds.append(waveforms[index, first : first + SEGMENT_FRAMES * HOP].float() / 32767)
    return torch.stack(segments), torch.stack(sounds)


def without_context(waveform: torch.Tensor) -> torch.Tensor:
    """Cuts the context's samples off `[B, T]`."""
    return waveform[:, CONTEXT_FRAMES * HOP : -CONTEXT_FRAMES * HOP]


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, mels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Returns what an autoencoder makes of log-mel spectrograms `[B, T, 64]`, T a whole number of latent frames."""
    latents = vae.encode(mels.unsqueeze(1)).latent_dist.sample(generator)
    return vae.decode(latents).sample.squeeze(1).float()


@torch.no_grad()
def mel_error(vocoder: MusicVocoder, mels: torch.Tensor) -> float:
    """Returns the log-mel L1 between `[N, T, 64]` and the spectrograms of the vocoded waveforms."""
    vocoded = torch.cat([log_mel_spectrogram(vocoder(batch)) for batch in mels.float().split(8)])
    return F.l1_loss(vocoded, mels.float()).item()


def main() -> None:
    parser = stage_parser(__doc__, steps=60000, batch_size=8, learning_rate=1e-3)
    parser.add_argument("--discriminator_from", type=int, default=2000, help="step at which the discriminator joins")
    parser.add_argument("--vae", type=Path, help="folder of an autoencoder, to train on its spectrograms")
    parser.add_argument("--bf16", action="store_true", help="twice as fast with AMX or AVX-512 BF16")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    mels, waveforms = load_mels(args, "train"), load_waveforms(args, "train")
    vae = None if args.vae is None else AutoencoderKL.from_pretrained(args.vae)
    vocoder, discriminator = create_vocoder(mels), SpectrumDiscriminator()
    training = Training(vocoder, args.output / "state/vocoder.safetensors", args, betas=(0.8, 0.99))
    judging = Training(discriminator, args.output / "state/discriminator.safetensors", args, betas=(0.8, 0.99))

    def take_step(generator: torch.Generator) -> dict[str, torch.Tensor]:
        segments, real = draw_segments(args.batch_size, mels, waveforms, generator)
        first_frame = torch.randint(512, (), generator=generator).item()
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            if vae is not None:
                segments = reconstruct(vae, segments, generator)
            generated = without_context(vocoder(segments, first_frame))
            losses = spectral_losses(generated, real)
            loss = losses["spectral"] + losses["mel"]
            if training.step >= args.discriminator_from:
                heard = [sounds[: math.ceil(JUDGED_SHARE * args.batch_size)] for sounds in (generated, real)]
                losses["discriminator"] = discriminator_loss(discriminator, *heard)
                losses["adversarial"] = adversarial_loss(discriminator, *heard)
                loss = loss + ADVERSARIAL_WEIGHT * losses["adversarial"]
        training.update(loss)
        if "discriminator" in losses:
            judging.update(losses["discriminator"])
        return losses

    done = run(training, take_step, also=(judging,))
    training.use_average()
    vocoder.save_pretrained(args.output / "components/vocoder")
    error = mel_error(vocoder, load_mels(args, "validation")[:100])
    print(f"{'done' if done else 'stopped'}: validation log-mel L1 {error:.4f}")


if __name__ == "__main__":
    main()

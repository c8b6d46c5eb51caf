"""Trains the HiFi-GAN vocoder: multi-resolution STFT and mel losses first, then also a light discriminator."""

import torch
from corpus import load_mels, load_waveform, read_rows
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from training_loop import Training, run, stage_parser
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

from melfusion_pipeline.audio import log_mel_spectrogram

SEGMENT_FRAMES = 48
HOP = 160
RESOLUTIONS = ((1024, 160), (512, 80), (256, 40))


def create_vocoder() -> SpeechT5HifiGan:
    """Returns a HiFi-GAN of about one million parameters, 160 samples a frame, in inference form (no weight norm)."""
    config = SpeechT5HifiGanConfig(
        model_in_dim=64,
        sampling_rate=16000,
        upsample_initial_channel=192,
        upsample_rates=[5, 4, 4, 2],
        upsample_kernel_sizes=[11, 8, 8, 4],
        resblock_kernel_sizes=[3, 7],
        resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
        normalize_before=False,
    )
    vocoder = SpeechT5HifiGan(config)
    # The class starts all weights at a deviation of 0.01, from which the first hundred steps go to waste.
    for layer in vocoder.modules():
        if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d):
            layer.reset_parameters()
    return vocoder


class BandDiscriminator(nn.Module):
    """Judges patches of log-magnitude spectrograms at two resolutions (as UnivNet's, arXiv 2106.07889, but light)."""

    def __init__(self, width: int = 16):
        super().__init__()
        strides = ((1, 1), (2, 1), (2, 2), (2, 1))
        shapes = zip((1, width, width, 2 * width), (width, width, 2 * width, 2 * width), strides, strict=True)
        layers = [weight_norm(nn.Conv2d(i, o, (5, 3), stride, (2, 1))) for i, o, stride in shapes]
        self.layers = nn.ModuleList([*layers, weight_norm(nn.Conv2d(2 * width, 1, 3, padding=1))])

    def forward(self, waveform: torch.Tensor) -> list[torch.Tensor]:
        """Returns, for each resolution, every layer's output for waveforms `[B, T]`; the last are the judgements."""
        outputs = []
        for resolution in RESOLUTIONS[:2]:
            hidden = magnitude(waveform, *resolution).log().unsqueeze(1)
            for layer in self.layers[:-1]:
                hidden = F.leaky_relu(layer(hidden), 0.1)
                outputs.append(hidden)
            outputs.append(self.layers[-1](hidden))
        return outputs

    def judge(self, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Returns the judgements among the outputs."""
        return outputs[len(self.layers) - 1 :: len(self.layers)]


def magnitude(waveform: torch.Tensor, length: int, hop: int) -> torch.Tensor:
    """Returns STFT magnitudes `[B, length / 2 + 1, frames]`, at least 1e-4 so that their logarithm has a gradient."""
    window = torch.hann_window(length, device=waveform.device)
    spectrum = torch.stft(waveform, length, hop, window=window, return_complex=True)
    return (spectrum.real.square() + spectrum.imag.square() + 1e-8).sqrt()


def spectral_loss(generated: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Spectral convergence plus log-magnitude L1, averaged over resolutions (Parallel WaveGAN, arXiv 1910.11480)."""
    losses = []
    for resolution in RESOLUTIONS:
        fake, true = magnitude(generated, *resolution), magnitude(real, *resolution)
        convergence = (true - fake).norm() / true.norm().clamp(min=1e-3)
        losses.append(convergence + F.l1_loss(fake.log(), true.log()))
    return torch.stack(losses).mean()


def adversarial_loss(discriminator: BandDiscriminator, generated: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Least-squares generator loss plus twice the feature matching loss (HiFi-GAN, arXiv 2010.05646, eq. 3 and 5)."""
    fake = discriminator(generated)
    with torch.no_grad():
        true = discriminator(real)
    judged = sum((1 - scores).square().mean() for scores in discriminator.judge(fake))
    return judged + 2 * sum(F.l1_loss(f, t) for f, t in zip(fake, true, strict=True)) / len(fake)


def discriminator_loss(discriminator: BandDiscriminator, generated: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Least-squares discriminator loss (HiFi-GAN, eq. 2)."""
    fake, true = discriminator(generated.detach()), discriminator(real)
    return sum(
        scores_fake.square().mean() + (1 - scores_true).square().mean()
        for scores_fake, scores_true in zip(discriminator.judge(fake), discriminator.judge(true), strict=True)
    )


def draw_segments(
    args, rows: list[dict], mels: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws log-mel segments `[B, 48, 64]` and their waveforms `[B, 7680]`."""
    segments, waveforms = [], []
    for index in torch.randint(len(rows), (args.batch_size,), generator=generator).tolist():
        start = torch.randint(mels.shape[1] - SEGMENT_FRAMES + 1, (), generator=generator).item()
        segments.append(mels[index, start : start + SEGMENT_FRAMES].float())
        waveforms.append(load_waveform(args.data, rows[index])[start * HOP : (start + SEGMENT_FRAMES) * HOP])
    return torch.stack(segments), torch.stack(waveforms)


@torch.no_grad()
def mel_error(vocoder: SpeechT5HifiGan, mels: torch.Tensor) -> float:
    """Returns the log-mel L1 between `[N, T, 64]` and the spectrograms of the vocoded waveforms."""
    vocoded = torch.cat([log_mel_spectrogram(vocoder(batch)) for batch in mels.float().split(8)])
    return F.l1_loss(vocoded, mels.float()).item()


def main() -> None:
    parser = stage_parser(__doc__, steps=20000, batch_size=4, learning_rate=1e-3)
    parser.add_argument("--discriminator_from", type=int, default=8000, help="step at which the discriminator joins")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    rows, spectrograms = read_rows(args.data, "train"), load_mels(args, "train")
    vocoder, discriminator = create_vocoder(), BandDiscriminator()
    training = Training(vocoder, args.output / "state/vocoder.safetensors", args, betas=(0.8, 0.99))
    judging = Training(discriminator, args.output / "state/discriminator.safetensors", args, betas=(0.8, 0.99))

    def take_step(generator: torch.Generator) -> dict[str, torch.Tensor]:
        mels, real = draw_segments(args, rows, spectrograms, generator)
        generated = vocoder(mels)
        spectral = spectral_loss(generated, real)
        mel = F.l1_loss(log_mel_spectrogram(generated), mels)
        losses = {"spectral": spectral, "mel": mel}
        loss = spectral + mel
        if training.step >= args.discriminator_from:
            losses["discriminator"] = discriminator_loss(discriminator, generated, real)
            judging.update(losses["discriminator"])
            losses["adversarial"] = adversarial_loss(discriminator, generated, real)
            loss = loss + 0.3 * losses["adversarial"]
        training.update(loss)
        return losses

    done = run(training, take_step, also=(judging,))
    training.use_average()
    vocoder.save_pretrained(args.output / "components/vocoder")
    error = mel_error(vocoder, load_mels(args, "validation")[:100])
    print(f"{'done' if done else 'stopped'}: validation log-mel L1 {error:.4f}")


if __name__ == "__main__":
    main()

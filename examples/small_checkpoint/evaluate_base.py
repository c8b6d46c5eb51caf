"""Measures the base stack's ceiling: real clips through vocoder and autoencoder, judged like generated ones."""

import argparse
from pathlib import Path

import librosa
import numpy as np
import torch
from corpus import load_waveform, read_rows
from diffusers import AutoencoderKL
from judge import format_judgement, judge
from torch.nn import functional as F
from train_vocoder import spectral_losses

from melfusion_pipeline import MusicVocoder
from melfusion_pipeline.audio import Spectrogram, log_mel_spectrogram


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/small/data"), help="folder that build_data.py wrote")
    parser.add_argument("--output", type=Path, default=Path("build/small"), help="folder with components/")
    parser.add_argument("--vae", type=Path, help="folder of another autoencoder than that in components/")
    parser.add_argument("--vocoder", type=Path, help="folder of another vocoder than that in components/")
    parser.add_argument("--split", default="test")
    parser.add_argument("--clips", type=int, default=200, help="clips to judge")
    parser.add_argument("--griffin_lim", action="store_true", help="also without a vocoder, seconds a clip")
    return parser.parse_args()


def griffin_lim(mels: torch.Tensor) -> torch.Tensor:
    """Inverts log-mel spectrograms `[N, T, 64]` by least squares and Griffin-Lim: what no network has to learn."""
    numbers = Spectrogram()
    settings = {"sr": numbers.sampling_rate, "n_fft": numbers.fft_length, "hop_length": numbers.hop_length}
    settings |= {"fmin": numbers.min_frequency, "fmax": numbers.max_frequency, "power": 1.0, "n_iter": 48}
    settings["length"] = mels.shape[1] * numbers.hop_length
    invert = librosa.feature.inverse.mel_to_audio
    # Frames are centred at 0, hop, ..., so it takes one more to reach the end.
    closed = torch.cat([mels, mels[:, -1:]], dim=1).exp().numpy()
    return torch.from_numpy(np.stack([invert(mel.T, **settings) for mel in closed])).float()


def frame_rate_share(waveforms: torch.Tensor) -> float:
    """Returns how much of the energy from 150 to 4,000 Hz lies within 2 Hz of multiples of the frame rate.

    A vocoder that only convolves the spectrogram repeats itself with each frame where the spectrogram stands still, so
    that every note becomes multiples of 100 Hz. Other sounds lie there by chance, in a share of 0.05.
    """
    second = Spectrogram.sampling_rate
    window = torch.hann_window(second)
    power = torch.stft(waveforms, second, second // 4, window=window, center=False, return_complex=True)
    frequencies, rate = torch.arange(150, 4000), second // Spectrogram.hop_length
    energy = power.abs().square().sum(dim=-1)[:, frequencies]
    return (energy[:, (frequencies + 2) % rate <= 4].sum(dim=1) / energy.sum(dim=1)).mean().item()


@torch.no_grad()
def reconstructions(args: argparse.Namespace, waveforms: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the clips `[N, T]` as they are, through the vocoder, and through autoencoder and vocoder."""
    vae = AutoencoderKL.from_pretrained(args.vae or args.output / "components/vae").eval()
    vocoder = MusicVocoder.from_pretrained(args.vocoder or args.output / "components/vocoder").eval()
    mels = log_mel_spectrogram(waveforms)
    decoded = torch.cat([vae(batch.unsqueeze(1)).sample.squeeze(1) for batch in mels.split(8)])
    print(f"log-mel L1 of the autoencoder: {F.l1_loss(decoded, mels):.3f}")
    found = {"real": waveforms}
    for name, source in (("", mels), ("autoencoder and ", decoded)):
        found[f"{name}vocoder"] = torch.cat([vocoder(batch) for batch in source.split(8)])
        if args.griffin_lim:
            found[f"{name}Griffin-Lim"] = griffin_lim(source)
    return found


def main() -> None:
    args = parse_args()
    rows = read_rows(args.data, args.split)[: args.clips]
    waveforms = torch.stack([load_waveform(args.data, row) for row in rows])
    print(f"{len(rows)} {args.split} clips of {len({row['picture'] for row in rows})} pictures")
    mels = log_mel_spectrogram(waveforms)
    found = {}
    for name, clips in reconstructions(args, waveforms).items():
        found[name] = judge(args.output / "components/classifier", clips, rows)
        pairs = zip(clips.split(8), waveforms.split(8), strict=True)
        stft = torch.stack([spectral_losses(*pair)["spectral"] for pair in pairs])
        l1 = F.l1_loss(log_mel_spectrogram(clips), mels)
        print(f"{name}: log-mel L1 {l1:.3f}, multi-resolution STFT distance {stft.mean():.3f}")
        print(f"  energy at multiples of the frame rate {frame_rate_share(clips):.3f}")
        print(format_judgement(found[name], found["real"]), flush=True)


if __name__ == "__main__":
    main()

"""Measures the base stack's ceiling: real test clips through vocoder and autoencoder, judged like generated ones."""

import argparse
from pathlib import Path

import numpy as np
import torch
from corpus import load_waveform, read_rows
from diffusers import AutoencoderKL
from measure_music import measure_music
from music import SAMPLING_RATE
from scipy.stats import spearmanr
from torch.nn import functional as F
from train_classifier import accuracy, labels_of
from transformers import ASTFeatureExtractor, ASTForAudioClassification, SpeechT5HifiGan

from melfusion_pipeline.audio import log_mel_spectrogram


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/small/data"), help="folder that build_data.py wrote")
    parser.add_argument("--output", type=Path, default=Path("build/small"), help="folder with components/")
    parser.add_argument("--clips", type=int, default=200, help="test clips to judge")
    return parser.parse_args()


@torch.no_grad()
def reconstructions(args: argparse.Namespace, waveforms: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the clips `[N, T]` as they are, through the vocoder, and through autoencoder and vocoder."""
    vae = AutoencoderKL.from_pretrained(args.output / "components/vae").eval()
    vocoder = SpeechT5HifiGan.from_pretrained(args.output / "components/vocoder").eval()
    mels = log_mel_spectrogram(waveforms)
    decoded = torch.cat([vae(batch.unsqueeze(1)).sample.squeeze(1) for batch in mels.split(8)])
    print(f"log-mel L1 of the autoencoder: {F.l1_loss(decoded, mels):.3f}")
    vocoded = {"vocoder": mels, "autoencoder and vocoder": decoded}
    return {"real": waveforms} | {
        name: torch.cat([vocoder(batch) for batch in source.split(8)]) for name, source in vocoded.items()
    }


def judge(args: argparse.Namespace, waveforms: torch.Tensor, rows: list[dict]) -> tuple[float, float]:
    """Returns how often the classifier tells instrument and mood bin right."""
    folder = args.output / "components/classifier"
    classifier = ASTForAudioClassification.from_pretrained(folder).eval()
    extractor = ASTFeatureExtractor.from_pretrained(folder)
    inputs = extractor(list(waveforms.numpy()), sampling_rate=SAMPLING_RATE, return_tensors="pt")
    return accuracy(classifier, inputs.input_values, labels_of(rows))


def describe(waveforms: torch.Tensor, rows: list[dict]) -> str:
    """Returns the correlations of what is measured in the music with the pictures' arousal and valence."""
    measured = [measure_music(waveform.numpy(), SAMPLING_RATE) for waveform in waveforms]
    mood_of = {"onset_rate": "arousal", "drum_presence": "arousal", "register": "valence"}
    found = [
        f"{name}~{mood} {spearmanr([row[name] for row in measured], [row[mood] for row in rows]).statistic:+.3f}"
        for name, mood in mood_of.items()
    ]
    major = np.array([row["major_minor"] > 0 for row in measured])
    agreement = np.mean(major == np.array([row["valence"] > 0.5 for row in rows]))
    return "  ".join([*found, f"mode agreement {agreement:.3f}"])


def main() -> None:
    args = parse_args()
    rows = read_rows(args.data, "test")[: args.clips]
    waveforms = torch.stack([load_waveform(args.data, row) for row in rows])
    print(f"{len(rows)} test clips of {len({row['picture'] for row in rows})} pictures")
    mels = log_mel_spectrogram(waveforms)
    for name, clips in reconstructions(args, waveforms).items():
        error = F.l1_loss(log_mel_spectrogram(clips), mels)
        instrument, mood = judge(args, clips, rows)
        print(f"{name}: log-mel L1 {error:.3f}  instrument {instrument:.3f}  mood bin {mood:.3f}", flush=True)
        print(f"  {describe(clips, rows)}", flush=True)


if __name__ == "__main__":
    main()

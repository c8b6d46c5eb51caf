"""Measures the base stack's ceiling: real test clips through vocoder and autoencoder, judged like generated ones."""

import argparse
from pathlib import Path

import torch
from corpus import load_waveform, read_rows
from diffusers import AutoencoderKL
from judge import format_judgement, judge
from torch.nn import functional as F

from melfusion_pipeline import MusicVocoder
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
    vocoder = MusicVocoder.from_pretrained(args.output / "components/vocoder").eval()
    mels = log_mel_spectrogram(waveforms)
    decoded = torch.cat([vae(batch.unsqueeze(1)).sample.squeeze(1) for batch in mels.split(8)])
    print(f"log-mel L1 of the autoencoder: {F.l1_loss(decoded, mels):.3f}")
    vocoded = {"vocoder": mels, "autoencoder and vocoder": decoded}
    return {"real": waveforms} | {
        name: torch.cat([vocoder(batch) for batch in source.split(8)]) for name, source in vocoded.items()
    }


def main() -> None:
    args = parse_args()
    rows = read_rows(args.data, "test")[: args.clips]
    waveforms = torch.stack([load_waveform(args.data, row) for row in rows])
    print(f"{len(rows)} test clips of {len({row['picture'] for row in rows})} pictures")
    mels = log_mel_spectrogram(waveforms)
    found = {}
    for name, clips in reconstructions(args, waveforms).items():
        found[name] = judge(args.output / "components/classifier", clips, rows)
        print(f"{name}: log-mel L1 {F.l1_loss(log_mel_spectrogram(clips), mels):.3f}")
        print(format_judgement(found[name], found["real"]), flush=True)


if __name__ == "__main__":
    main()

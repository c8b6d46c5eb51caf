"""Do the distances rise as music gets worse? Real recordings, degraded step by step, against others.

python benchmarks/degradation.py --recordings path/to/music --output build

Half of the recordings are the reference, the other half is degraded; both with the fixed log-mel embedding.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.signal import butter, sosfiltfilt

from melfusion_pipeline.audio import Spectrogram, load_audio, normalize_waveform, resample
from melfusion_pipeline.extractors import LogMelExtractor
from melfusion_pipeline.metrics import Interval, frechet_distance, jackknife_interval, kernel_audio_distance

SAMPLING_RATE = Spectrogram.sampling_rate
CLIP_LENGTH = round(10.24 * SAMPLING_RATE)
QUIET = 1e-3
LADDERS = {
    "noise": ("20 dB", "10 dB", "0 dB"),
    "low-pass": ("4 kHz", "2 kHz", "1 kHz"),
}


def cut_clips(paths: list[Path], count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Cuts recordings into clips and picks `count`: waveforms `[count, samples]` and the recording of each."""
    clips, labels = [], []
    for label, path in enumerate(paths):
        waveform, sampling_rate = load_audio(path)
        waveform = resample(waveform.double().mean(dim=0), sampling_rate)
        for clip in waveform[: len(waveform) // CLIP_LENGTH * CLIP_LENGTH].reshape(-1, CLIP_LENGTH):
            if clip.square().mean().sqrt() > QUIET:
                clips.append(normalize_waveform(clip).float())
                labels.append(label)
    picked = np.sort(rng.permutation(len(clips))[:count])
    return torch.stack(clips).numpy()[picked], np.array(labels)[picked]


def degrade(waveforms: np.ndarray, kind: str, step: str) -> np.ndarray:
    """Adds noise at a signal-to-noise ratio, or filters with an eighth-order low-pass."""
    amount = float(step.split()[0])
    if kind == "low-pass":
        filtered = sosfiltfilt(butter(8, amount * 1000, fs=SAMPLING_RATE, output="sos"), waveforms, axis=1)
        return filtered.astype(np.float32)
    power = np.square(waveforms).mean(axis=1, keepdims=True) / 10 ** (amount / 10)
    noise = np.random.default_rng(1).normal(size=waveforms.shape)
    return (waveforms + noise * np.sqrt(power)).astype(np.float32)


def draw(figures: dict[str, dict[str, list[Interval]]], path: Path) -> None:
    """Draws each distance along each ladder of degradations."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (distance, ladders) in zip(figure.subplots(1, 2), figures.items()):
        for kind, intervals in ladders.items():
            estimate, low, high = np.array(intervals).T
            label, bars = f"{kind}: {', '.join(LADDERS[kind])}", [estimate - low, high - estimate]
            axes.errorbar(["clean", "step 1", "step 2", "step 3"], estimate, bars, capsize=4, label=label)
        axes.set(title=f"{distance}, log-mel embedding", ylim=(0, None))
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", type=Path, required=True, help="folder of wav, flac, ogg or mp3 files")
    parser.add_argument("--clips", type=int, default=250, help="on each side")
    parser.add_argument("--output", type=Path, default=Path("build"))
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    paths = sorted(path for path in args.recordings.rglob("*") if path.suffix in (".wav", ".flac", ".ogg", ".mp3"))
    order = rng.permutation(len(paths))
    halves = np.array_split(order, 2)
    (reference, labels), (clean, clean_labels) = (
        cut_clips([paths[i] for i in half], args.clips, rng) for half in halves
    )
    extractor = LogMelExtractor()
    target = extractor.embed(audio=reference, sampling_rate=SAMPLING_RATE)
    print(
        f"{len(paths)} recordings, {len(reference)} reference clips, {len(clean)} degraded; 95% jackknife by recording"
    )
    figures = {"FAD": {kind: [] for kind in LADDERS}, "KAD": {kind: [] for kind in LADDERS}}
    for kind, steps in LADDERS.items():
        for step in ("clean", *steps):
            waveforms = clean if step == "clean" else degrade(clean, kind, step)
            found = extractor.embed(audio=waveforms, sampling_rate=SAMPLING_RATE)
            for name, distance in (("FAD", frechet_distance), ("KAD", kernel_audio_distance)):
                interval = jackknife_interval(distance, found, target, groups=[clean_labels, labels])
                figures[name][kind].append(interval)
                print(f"{kind} {step}: {name} {interval.estimate:.4g} [{interval.low:.4g}, {interval.high:.4g}]")
    draw(figures, args.output / "degradation.png")


if __name__ == "__main__":
    main()

"""Evaluates the trained checkpoint on unseen pictures: the paper's table, then what the music measurably does.

The clips are made by `examples/evaluate.py`; the same command resumes. `instrument` and `mood` come from the
classifier that was trained on real clips only. Intervals are resampled by picture; those of `text-only` and
`shuffled`, which must contain 0, are widened for the number of such tests (Bonferroni).
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from contrastive import mood_texts
from corpus import load_waveform
from measure_music import measure_music
from music import SAMPLING_RATE
from scipy.stats import spearmanr
from train_classifier import MOODS, labels_of, marginals
from transformers import ASTFeatureExtractor, ASTForAudioClassification

from melfusion_pipeline.metrics import bootstrap_interval

sys.path.append(str(Path(__file__).parents[1]))
import evaluate  # noqa: E402

SYSTEMS = ("melfusion", "text-only", "shuffled", "reference")
# What is measured, and the side of the mood that the rule lets decide it.
FOLLOWS = {"onset_rate": "arousal", "drum_presence": "arousal", "register": "valence", "major_minor": "valence"}
NOISE = ("spectral_flatness", "harmonic_to_noise")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder of the pipeline")
    parser.add_argument("--data", type=Path, default=Path("build/small/data"), help="folder that build_data.py wrote")
    parser.add_argument("--components", type=Path, default=Path("build/small/components"), help="has the judges")
    parser.add_argument("--output", type=Path, required=True, help="folder for clips and results")
    parser.add_argument("--split", default="test")
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--systems", nargs="*", default=SYSTEMS)
    parser.add_argument("--num_inversion_steps", type=int, default=10)
    parser.add_argument("--feature_source", default="inversion")
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    return parser.parse_args()


def write_subset(args: argparse.Namespace) -> tuple[Path, list[dict]]:
    """Writes the first rows of the split as a set of its own."""
    lines = (args.data / f"{args.split}.jsonl").read_text().splitlines()[: args.clips]
    path = args.data / f"{args.split}{args.clips}.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path, [json.loads(line) for line in lines]


def make_table(args: argparse.Namespace, triplets: Path) -> None:
    """Makes the clips and prints the paper's table, IMSM bridged over the fixed mood sentences."""
    args.output.mkdir(parents=True, exist_ok=True)
    bridge = args.output / "mood_sentences.txt"
    bridge.write_text("".join(f"{text}\n" for text in mood_texts()[0]))
    named = {name: getattr(args, name) for name in ("checkpoint", "output", "num_inversion_steps", "feature_source")}
    named |= {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    named |= {"triplets": triplets, "imsm_captions": bridge, "classifier": f"ast={args.components / 'classifier'}"}
    named |= {f"{model}_model": args.components / model for model in ("clap", "clip")}
    evaluate.main([*(f"--{name}={value}" for name, value in named.items()), "--systems", *args.systems])


@torch.no_grad()
def classify(args: argparse.Namespace, waveforms: torch.Tensor, rows: list[dict]) -> dict[str, np.ndarray]:
    """Returns, clip by clip, whether the classifier hears the caption's instrument and the picture's mood bin."""
    classifier = ASTForAudioClassification.from_pretrained(args.components / "classifier").eval()
    extractor = ASTFeatureExtractor.from_pretrained(args.components / "classifier")
    inputs = extractor(list(waveforms.numpy()), sampling_rate=SAMPLING_RATE, return_tensors="pt").input_values
    logits = torch.cat([classifier(batch).logits for batch in inputs.split(32)])
    labels = labels_of(rows)
    heard = {"instrument": (marginals(logits)[0], labels // MOODS), "mood": (marginals(logits)[1], labels % MOODS)}
    return {name: (scores.argmax(dim=1) == truth).float().numpy() for name, (scores, truth) in heard.items()}


def rank_correlation(pairs: np.ndarray) -> float:
    return float(spearmanr(pairs[:, 0], pairs[:, 1]).statistic)


def judge(args: argparse.Namespace, waveforms: torch.Tensor, rows: list[dict], tests: int = 1) -> dict[str, list]:
    """Returns estimate and interval of everything measured in clips `[N, T]`.

    Args:
        args: `components`.
        waveforms: one clip a row.
        rows: of the triplets; `arousal` and `valence` are those of the row's own picture in every system.
        tests: for the correlations, the number among which each is one.
    """
    interval = partial(bootstrap_interval, groups=[row["picture"] for row in rows])
    measured = [measure_music(waveform.numpy(), SAMPLING_RATE) for waveform in waveforms]
    found = {name: interval(right) for name, right in classify(args, waveforms, rows).items()}
    for name, mood in FOLLOWS.items():
        pairs = np.array([(clip[name], row[mood]) for clip, row in zip(measured, rows, strict=True)])
        found[f"{name} ~ {mood}"] = interval(pairs, rank_correlation, confidence=1 - 0.05 / tests)
    agreement = [(clip["major_minor"] > 0) == (row["valence"] > 0.5) for clip, row in zip(measured, rows, strict=True)]
    found["mode agreement"] = interval(np.array(agreement, float))
    found |= {name: interval(np.array([clip[name] for clip in measured])) for name in NOISE}
    return {name: [float(value) for value in values] for name, values in found.items()}


def main() -> None:
    args = parse_args()
    triplets, rows = write_subset(args)
    make_table(args, triplets)
    results = {"clips": len(rows), "pictures": len({row["picture"] for row in rows})}
    print(f"{results['clips']} clips of {results['pictures']} pictures, estimate [95% interval]")
    tests = len(FOLLOWS) * len({"text-only", "shuffled"} & set(args.systems))
    for system in ("real", *args.systems):
        paths = [row["audio"] if system == "real" else f"{index}.flac" for index, row in enumerate(rows)]
        folder = args.data if system == "real" else args.output / system
        waveforms = torch.stack([load_waveform(folder, {"audio": path})[:81920] for path in paths])
        results[system] = judge(args, waveforms, rows, tests if system in ("text-only", "shuffled") else 1)
        print(system)
        for name, (estimate, low, high) in results[system].items():
            share = f"  {estimate / results['real'][name][0]:.0%} of real" if "~" in name else ""
            print(f"  {name:26s} {estimate:7.3f} [{low:.3f}, {high:.3f}]{share}", flush=True)
    (args.output / "measured.json").write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()

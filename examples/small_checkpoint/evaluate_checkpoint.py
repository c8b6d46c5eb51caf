"""Evaluates the trained checkpoint on unseen pictures: the paper's table, then what the music measurably does.

The clips are made by `examples/evaluate.py`; the same command resumes. `instrument` and `mood` come from the
classifier that was trained on real clips only. Intervals are resampled by picture; those of `text-only` and
`shuffled`, which must contain 0, are widened for the number of such tests (Bonferroni).
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from contrastive import mood_texts
from corpus import load_waveform
from judge import FOLLOWS, format_judgement, judge

# In front: `evaluate` is also a package of Hugging Face, which may be installed.
sys.path.insert(0, str(Path(__file__).parents[1]))
import evaluate  # noqa: E402

SYSTEMS = ("melfusion", "text-only", "shuffled", "reference")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder of the pipeline")
    parser.add_argument("--data", type=Path, default=Path("build/small/data"), help="folder that build_data.py wrote")
    parser.add_argument("--components", type=Path, default=Path("build/small/components"), help="has the judges")
    parser.add_argument("--output", type=Path, required=True, help="folder for clips and results")
    parser.add_argument("--split", default="test")
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--systems", nargs="*", default=SYSTEMS)
    parser.add_argument("--feature_source", default="inversion")
    for name in evaluate.CALL:
        parser.add_argument(f"--{name}", help="default: the checkpoint's own")
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
    named = {name: getattr(args, name) for name in ("checkpoint", "output", "feature_source")}
    named |= {name: getattr(args, name) for name in evaluate.CALL if getattr(args, name) is not None}
    named |= {"triplets": triplets, "imsm_captions": bridge, "classifier": f"ast={args.components / 'classifier'}"}
    named |= {f"{model}_model": args.components / model for model in ("clap", "clip")}
    evaluate.main([*(f"--{name}={value}" for name, value in named.items()), "--systems", *args.systems])


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
        waveforms = torch.stack([load_waveform(folder, {"audio": path}) for path in paths])
        own_tests = tests if system in ("text-only", "shuffled") else 1
        results[system] = judge(args.components / "classifier", waveforms, rows, own_tests)
        print(f"{system}\n{format_judgement(results[system], results['real'])}", flush=True)
    (args.output / "measured.json").write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()

"""Bundles a trained pipeline as the small checkpoint: half precision, without code, with its model card."""

import argparse
import shutil
from pathlib import Path

import torch

from melfusion_pipeline import MelFusionPipeline

ROOT = Path(__file__).parents[2]
LIMIT = 60 * 2**20


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder that train_melfusion.py wrote")
    parser.add_argument("--card", type=Path, required=True, help="the model card, which becomes README.md")
    parser.add_argument("--output", type=Path, default=ROOT / "checkpoints" / "small")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    partial = args.output.with_name(f".{args.output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    MelFusionPipeline.from_pretrained(args.checkpoint).to(torch.float16).save_pretrained(partial)
    # Two folders further up lies the package itself, which a copy of its code could only contradict.
    for module in partial.rglob("*.py"):
        module.unlink()
    shutil.copy(args.card, partial / "README.md")
    size = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    if size > LIMIT:
        raise ValueError(f"The checkpoint has {size / 2**20:.1f} MiB, more than {LIMIT / 2**20:.0f}.")
    shutil.rmtree(args.output, ignore_errors=True)
    args.output.parent.mkdir(exist_ok=True)
    partial.rename(args.output)
    print(f"{args.output}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()

"""Measures `pair_triplets.py` where the true moods are known: how many pairs have picture and clip of one mood bin.

python examples/pair_triplets.py --pictures DATA/test/images --music DATA/test.jsonl --output build/pairs --reuse 4 \\
    --duplicates 1 --bridge build/moods.txt --clip_model COMPONENTS/clip --clap_model COMPONENTS/clap
python examples/small_checkpoint/measure_pairing.py --data DATA --split test --pairs build/pairs/pairs.jsonl

`--write_phrases build/moods.txt` writes the sentences of `mood.py` as bridging captions, which both models know.
"""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
from corpus import read_rows
from mood import MOOD_SENTENCES, mood_bin

from melfusion_pipeline.metrics import bootstrap_interval


def content(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def moods_by_content(data: Path, split: str) -> tuple[dict, dict]:
    """The mood bins of the split's pictures and of its clips, which were composed to their pictures."""
    rows = read_rows(data, split)
    bins = [mood_bin(row["arousal"], row["valence"]) for row in rows]
    return tuple({content(data / row[key]): found for row, found in zip(rows, bins)} for key in ("image", "audio"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/small/data"))
    parser.add_argument("--split", default="test")
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--write_phrases", type=Path)
    args = parser.parse_args()
    if args.write_phrases:
        sentences = [f"mood: {text}" for texts in MOOD_SENTENCES.values() for text in texts]
        args.write_phrases.write_text("\n".join(sentences))
        return
    pictures, clips = moods_by_content(args.data, args.split)
    rows = [json.loads(line) for line in args.pairs.read_text().splitlines()]
    names = [content(args.pairs.parent / row["image"]) for row in rows]
    seen = np.array([pictures[name] for name in names])
    heard = np.array([clips[content(args.pairs.parent / row["audio"])] for row in rows])
    order = np.random.default_rng(0).permutation(len(rows))
    for name, clip_bins in (("paired", heard), ("at random", heard[order])):
        same = (seen == clip_bins).all(axis=1).astype(float)
        near = (np.abs(seen - clip_bins) <= 1).all(axis=1).astype(float)
        for label, values in (("the same mood bin", same), ("the same or a neighbouring one", near)):
            share, low, high = bootstrap_interval(values, groups=names)
            print(f"{name}: {label} {share:.3f} [{low:.3f}, {high:.3f}], {len(rows)} pairs")


if __name__ == "__main__":
    main()

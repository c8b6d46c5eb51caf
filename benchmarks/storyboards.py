"""Measures whether the music of storyboards follows their pictures as well as the music of each picture alone does.

python benchmarks/storyboards.py --data build/small/data

Storyboards of four unseen pictures, 10.24 s each, calm and stirring ones alternating, two prompts. Onset rate of each
stretch (its middle 80%) against its picture's arousal, the same for each picture alone, and how sharply the music
changes where the pictures do. Intervals are resampled by storyboard. The same command resumes.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.audio import load_audio
from melfusion_pipeline.metrics import bootstrap_interval

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "examples" / "small_checkpoint")]
from evaluate_storyboards import (  # noqa: E402
    format_boundaries,
    group_rows,
    make_parts,
    part,
    score_boundaries,
    share_work,
)
from evaluate_systems import claim_folder, digest_components, group_by_picture  # noqa: E402
from judge import rank_correlation  # noqa: E402
from measure_music import onset_rate  # noqa: E402

PROMPTS = ("a waltz for piano", "guitar playing a march")
NUM_PICTURES, SECONDS = 4, 10.24
SYSTEMS = ("storyboard", "melfusion")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=str(ROOT), help="folder or Hub id; default: the bundled one")
    parser.add_argument("--data", type=Path, default=Path("build/small/data"), help="folder that build_data.py wrote")
    parser.add_argument("--output", type=Path, default=Path("build/storyboards"), help="folder for the clips")
    parser.add_argument("--storyboards", type=int, default=24)
    parser.add_argument("--image_guidance_scale", type=float, help="default: the checkpoint's own")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def choose_rows(data: Path, count: int, seed: int) -> list[dict]:
    """Draws the rows of `count` storyboards from the test pictures: calm and stirring thirds by turns, no crop twice.

    Half of the storyboards begin with a calm picture, and each prompt has half of either.
    """
    crops = {row["image"]: row for row in map(json.loads, (data / "test.jsonl").read_text().splitlines())}
    crops = sorted(crops.values(), key=lambda row: row["arousal"])
    generator, third = np.random.default_rng(seed), len(crops) // 3
    pools = [[part[index] for index in generator.permutation(third)] for part in (crops[:third], crops[-third:])]
    rows = []
    for index in range(count):
        seen = set()
        for position in range(NUM_PICTURES):
            pool = pools[(position + index) % 2]
            # A picture has several crops; in one storyboard it is seen once.
            crop = next(crop for crop in pool if crop["picture"] not in seen)
            pool.remove(crop)
            seen.add(crop["picture"])
            row = {"row": len(rows), "image": str(data / crop["image"]), "caption": PROMPTS[index // 2 % 2]}
            rows.append(row | {"arousal": crop["arousal"]})
    return rows


def make(arguments: argparse.Namespace, rows: list[dict]) -> None:
    """Makes the stretches of the storyboards and the clips of the pictures alone that are not there yet."""
    pipe = MelFusionPipeline.from_pretrained(arguments.checkpoint)
    call = {"audio_length_in_s": SECONDS, "image_guidance_scale": arguments.image_guidance_scale}
    options = {"seed": arguments.seed, "call": call}
    settings = options | {"rows": rows, "weights": digest_components(pipe.components)}
    for system in SYSTEMS:
        claim_folder(arguments.output / system, settings)
    parts = share_work(group_by_picture(["melfusion"], rows), group_rows(rows, NUM_PICTURES))
    make_parts(pipe, parts, None, options, arguments.output)


def middle_onset_rate(path: Path) -> float:
    """The onsets a second in the middle 80% of a clip: what a window shares with the next picture is left out."""
    waveform, rate = load_audio(path)
    length = waveform.shape[-1]
    return onset_rate(waveform[0, length // 10 : length - length // 10].numpy(), rate)


def ratio(values: np.ndarray) -> float:
    """How closely the first column of `[N, 3]` follows the last, over how closely the second does."""
    return rank_correlation(values[:, [0, 2]]) / rank_correlation(values[:, 1:])


def score(rates: dict[str, np.ndarray], arousal: np.ndarray, seed: int) -> None:
    """Prints correlations, their ratio, and the rates of calm and stirring stretches."""
    boards = np.arange(len(arousal)) // NUM_PICTURES
    values = np.column_stack([*(rates[system] for system in SYSTEMS), arousal])
    generator = np.random.default_rng(seed)
    # Wholly shuffled: within a storyboard calm and stirring alternate, and a shift by two would leave them so.
    shuffled = [rank_correlation(np.c_[values[:, 0], generator.permutation(arousal)]) for _ in range(2000)]
    for name, columns in (("storyboards", [0, 2]), ("the same pictures alone", [1, 2])):
        found = bootstrap_interval(values[:, columns], rank_correlation, groups=boards, seed=seed)
        print(f"{name:24s} {found.estimate:.3f} [{found.low:.3f}, {found.high:.3f}]")
    found = bootstrap_interval(values, ratio, groups=boards, seed=seed)
    print(f"{'ratio':24s} {found.estimate:.3f} [{found.low:.3f}, {found.high:.3f}]")
    low, high = np.quantile(shuffled, [0.025, 0.975])
    print(f"{'shuffled pictures':24s} {np.mean(shuffled):.3f} [{low:.3f}, {high:.3f}]")
    for name, some in (("calm", arousal < np.median(arousal)), ("stirring", arousal >= np.median(arousal))):
        means = ", ".join(f"{system} {rates[system][some].mean():.2f}" for system in SYSTEMS)
        print(f"onsets a second in {some.sum()} {name} stretches: {means}")


def main() -> None:
    arguments = parse_arguments()
    rows = choose_rows(arguments.data, arguments.storyboards, arguments.seed)
    make(arguments, rows)
    clips = {name: [arguments.output / name / f"{row['row']}.flac" for row in rows] for name in SYSTEMS}
    rates = {name: np.array([middle_onset_rate(path) for path in paths]) for name, paths in clips.items()}
    print(f"{arguments.storyboards} storyboards; Spearman's correlation of onset rate with arousal, 95% intervals")
    score(rates, np.array([row["arousal"] for row in rows]), arguments.seed)
    boundaries = {
        name: score_boundaries(part(paths, NUM_PICTURES), SECONDS, arguments.seed) for name, paths in clips.items()
    }
    print(f"\n{format_boundaries(boundaries)}")


if __name__ == "__main__":
    main()

"""Builds the small checkpoint's data set: pictures of Debian packages, music composed to their mood, captions.

The pairs are made, not natural: a written rule (`mood.py`) reads arousal and valence off the picture, the music
(`music.py`) follows them, and the caption names instrument and genre only. Split by picture, never by crop.

`train.jsonl` has each clip with the crop that it was composed for. In `train_varied.jsonl` a clip meets other crops of
nearly its mood, many of two pictures combined, and varied in contrast, colour and sharpness until one picture is now
calm, now stirring: what a model can learn from them is the rule, not which picture is which.
"""

import argparse
import csv
import json
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
from measure_music import measure_music
from mood import MoodRule, measure_picture
from music import GENRES, INSTRUMENTS, SAMPLING_RATE, compose, render
from pictures import SOUND_FONT_PACKAGE, Picture, find_pictures, read_copyright, rights, unpack, version_of
from PIL import Image, ImageEnhance, ImageFilter
from scipy.spatial import cKDTree
from scipy.stats import spearmanr

SPLITS = ("train", "validation", "test")
CROP_SIZE = 128
CLIPS_PER_CROP = 4
# Each of the varied crops meets this many clips, drawn from the nearest in arousal and valence.
CLIPS_PER_VARIED_CROP, NEAREST_CLIPS = 2, 8
TEMPLATES = (
    "a {genre} played on the {instrument}",
    "{instrument} playing a {genre}",
    "a {genre} for {instrument}",
    "{instrument}, {genre}",
    "a short {genre} with {instrument}",
    "music in the style of a {genre}, performed on {instrument}",
    "an instrumental {genre}, the {instrument} leads",
    "recording of a {instrument} {genre}",
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/small/data"), help="folder to write the data to")
    parser.add_argument("--packages", type=Path, default=Path("build/small/packages"), help="folder for packages")
    parser.add_argument("--train_crops", type=int, default=3000, help="training crops, each with four clips")
    parser.add_argument("--varied_crops", type=int, default=24000, help="varied crops, two clips each")
    parser.add_argument("--test_pictures", type=int, default=60, help="pictures of the test split")
    parser.add_argument("--validation_pictures", type=int, default=25, help="pictures of the validation split")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def split_pictures(pictures: list[Picture], args: argparse.Namespace) -> dict[str, list[Picture]]:
    """Splits by picture, at random but fixed by the seed."""
    order = np.random.default_rng(args.seed).permutation(len(pictures))
    validation = args.test_pictures + args.validation_pictures
    parts = (order[validation:], order[args.test_pictures : validation], order[: args.test_pictures])
    return {split: [pictures[index] for index in sorted(part)] for split, part in zip(SPLITS, parts, strict=True)}


def draw_crop(picture: Picture, augment: bool, generator: np.random.Generator) -> Image.Image:
    """Cuts a random square of 60-100% of the shorter side; in training also mirrors it and varies its colours."""
    with Image.open(picture.path) as image:
        image = image.convert("RGB")
    side = int(min(image.size) * generator.uniform(0.6, 1.0))
    left, top = (generator.integers(0, length - side + 1) for length in image.size)
    crop = image.resize((CROP_SIZE, CROP_SIZE), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
    if not augment:
        return crop
    if generator.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        crop = enhance(crop).enhance(generator.uniform(0.7, 1.35))
    return crop


def write_crops(split: str, pictures: list[Picture], count: int, args: argparse.Namespace) -> list[dict]:
    """Writes `count` crops of a split, each picture equally often, and returns a row for each."""
    folder = args.output / split / "images"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        generator = np.random.default_rng([args.seed, SPLITS.index(split), index])
        picture = pictures[index % len(pictures)]
        path = folder / f"{index:05d}.jpg"
        draw_crop(picture, split == "train", generator).save(path, quality=95)
        rows.append({"image": str(path.relative_to(args.output)), "picture": picture.name,
                     "description": picture.description})  # fmt: skip
    return rows


def combine(crop: Image.Image, other: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Lays one crop over another through a random mask of soft or hard edges."""
    cells = generator.uniform(0, 255, (generator.integers(1, 4), generator.integers(2, 4)))
    mask = Image.fromarray(cells.astype(np.uint8)).resize(crop.size, Image.Resampling.BICUBIC)
    return Image.composite(crop, other, ImageEnhance.Contrast(mask).enhance(8 ** generator.random()))


def vary(crop: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Varies brightness, contrast, colour and sharpness, from barely to strongly: all that the rule measures."""
    strength = generator.random()
    strongest = {ImageEnhance.Brightness: 1.5, ImageEnhance.Contrast: 2.5, ImageEnhance.Color: 2.5}
    for enhance, factor in strongest.items():
        crop = enhance(crop).enhance(factor ** (strength * generator.uniform(-1, 1)))
    red, green, blue = crop.split()
    warmth = 1.25 ** (strength * generator.uniform(-1, 1))
    crop = Image.merge("RGB", (red.point(lambda v: v * warmth), green, blue.point(lambda v: v / warmth)))
    if generator.random() < 0.4:
        return crop.filter(ImageFilter.GaussianBlur(strength * generator.uniform(0, 4)))
    return ImageEnhance.Sharpness(crop).enhance(1 + strength * generator.uniform(0, 3))


def write_varied_crop(index: int, pictures: list[Picture], rule: MoodRule, args: argparse.Namespace) -> dict:
    """Writes one varied crop, half of them combined of two pictures, and returns its row, with its mood."""
    generator = np.random.default_rng([args.seed, 30, index])
    shown = [pictures[index % len(pictures)]]
    crop = draw_crop(shown[0], True, generator)
    if generator.random() < 0.5:
        shown.append(pictures[generator.integers(len(pictures))])
        crop = combine(crop, draw_crop(shown[1], True, generator), generator)
    path = args.output / "train" / "varied" / f"{index:05d}.jpg"
    vary(crop, generator).save(path, quality=95)
    row = {"image": str(path.relative_to(args.output)), "picture": " and ".join(picture.name for picture in shown)}
    row["description"] = " and ".join(picture.description for picture in shown)
    return row | dict(zip(("arousal", "valence"), rule(Image.open(path)), strict=True))


def write_varied(pictures: list[Picture], rows: list[dict], rule: MoodRule, args: argparse.Namespace) -> list[dict]:
    """Writes the varied training crops and `train_varied.jsonl`; returns its rows."""
    (args.output / "train" / "varied").mkdir(parents=True, exist_ok=True)
    write = partial(write_varied_crop, pictures=pictures, rule=rule, args=args)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        crops = list(pool.map(write, range(args.varied_crops), chunksize=50))
    clips = cKDTree([(row["arousal"], row["valence"]) for row in rows])
    nearest = clips.query([(crop.pop("arousal"), crop.pop("valence")) for crop in crops], NEAREST_CLIPS)[1]
    generator = np.random.default_rng([args.seed, 40])
    varied = []
    for crop, choice in zip(crops, nearest, strict=True):
        varied += [rows[clip] | crop for clip in generator.choice(choice, CLIPS_PER_VARIED_CROP, replace=False)]
    (args.output / "train_varied.jsonl").write_text("".join(json.dumps(row) + "\n" for row in varied))
    return varied


def write_clip(index: int, row: dict, split: str, sound_font: Path, args: argparse.Namespace) -> dict:
    """Composes and renders the clip of one row, writes it as FLAC, and returns the row of the triplet."""
    generator = np.random.default_rng([args.seed, 10 + SPLITS.index(split), index])
    instrument = list(INSTRUMENTS)[index % len(INSTRUMENTS)]
    genre = list(GENRES)[generator.integers(len(GENRES))]
    caption = TEMPLATES[generator.integers(len(TEMPLATES))].format(instrument=instrument, genre=genre)
    notes = compose(genre, row["arousal"], row["valence"], generator)
    path = args.output / split / "audio" / f"{index:05d}.flac"
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, render(notes, instrument, sound_font), SAMPLING_RATE)
    audio = str(path.relative_to(args.output))
    return row | {"audio": audio, "caption": caption, "instrument": instrument, "genre": genre}


def write_split(split: str, crops: list[dict], sound_font: Path, args: argparse.Namespace) -> list[dict]:
    """Writes a split's clips and its JSON-lines file of triplets."""
    order = np.random.default_rng([args.seed, 20 + SPLITS.index(split)]).permutation(len(crops) * CLIPS_PER_CROP)
    write = partial(write_clip, split=split, sound_font=sound_font, args=args)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(write, range(len(order)), [crops[crop % len(crops)] for crop in order], chunksize=50))
    (args.output / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def write_attribution(splits: dict[str, list[Picture]], sound_font: Path, args: argparse.Namespace) -> None:
    """Writes the table of authors and licences beside the data."""
    package = args.packages / SOUND_FONT_PACKAGE
    author, licence = rights(
        read_copyright(package / f"usr/share/doc/{SOUND_FONT_PACKAGE}/copyright"), sound_font.name
    )
    with open(args.output / "ATTRIBUTION.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("split", "file", "author", "licence", "package", "version"))
        for split, pictures in splits.items():
            table.writerows((split, p.name, p.author, p.licence, p.package, p.version) for p in pictures)
        version = version_of(SOUND_FONT_PACKAGE, args.packages)
        table.writerow(("all", sound_font.name, author, licence, SOUND_FONT_PACKAGE, version))


def print_ceiling(rows: list[dict], args: argparse.Namespace) -> None:
    """Prints how strongly the real clips' measured music follows the mood: no model can do better."""
    measured = [measure_music(*soundfile.read(args.output / row["audio"], dtype="float32")) for row in rows]
    print(f"{len(rows)} clips of {len({row['picture'] for row in rows})} pictures; Spearman correlation with")
    moods = {mood: [row[mood] for row in rows] for mood in ("arousal", "valence")}
    for name in measured[0]:
        values = [row[name] for row in measured]
        found = (f"{mood} {spearmanr(expected, values).statistic:+.3f}" for mood, expected in moods.items())
        print(f"  {name:14s} {'  '.join(found)}")
    major = np.array([row["major_minor"] > 0 for row in measured])
    print(f"  major/minor agreement {np.mean(major == (np.array(moods['valence']) > 0.5)):.3f}")


def main() -> None:
    args = parse_args()
    (sound_font,) = unpack(SOUND_FONT_PACKAGE, args.packages).rglob("*.sf2")
    splits = split_pictures(find_pictures(args.packages), args)
    counts = {"train": args.train_crops, "validation": 4 * args.validation_pictures, "test": 4 * args.test_pictures}
    crops = {split: write_crops(split, splits[split], counts[split], args) for split in SPLITS}
    rule = MoodRule.fit([measure_picture(Image.open(args.output / row["image"])) for row in crops["train"]])
    rule.save(args.output / "mood.json")
    for split in SPLITS:
        for row in crops[split]:
            row["arousal"], row["valence"] = rule(Image.open(args.output / row["image"]))
        rows = write_split(split, crops[split], sound_font, args)
        print(f"{split}: {len(splits[split])} pictures, {len(crops[split])} crops, {len(rows)} clips", flush=True)
        if split == "train" and args.varied_crops:
            varied = write_varied(splits[split], rows, rule, args)
            print(f"train_varied: {args.varied_crops} crops, {len(varied)} pairs", flush=True)
    write_attribution(splits, sound_font, args)
    print_ceiling(rows[:240], args)


if __name__ == "__main__":
    main()

"""Builds a wholly real test set from the story screens of Wesnoth's campaigns: picture, narration, music.

Nothing of it was made for this package and nothing of it is trained on: painters, writers and composers of the game
brought them together. The pictures are paintings, the music recordings; the small checkpoint's own domain is neither.
"""

import argparse
import csv
import json
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import soundfile
from pictures import unpack, version_of
from PIL import Image

CAMPAIGNS = ("did", "dm", "dw", "ei", "httt", "l", "low", "nr", "sof", "sota", "sotbe", "thot", "trow", "tsg", "ttb",
             "utbs")  # fmt: skip
PACKAGES = ("wesnoth-1.16-data", "wesnoth-1.16-music", *(f"wesnoth-1.16-{name}" for name in CAMPAIGNS))
# What a story screen is made of, in the order in which it stands in a scenario file.
TOKENS = re.compile(
    r"\[(?P<tag>/?(?:story|part))\]|^\s*music\s*=\s*\"?(?P<music>[\w./-]+)"
    r"|^\s*(?:background|image)\s*=\s*\"?(?P<picture>story/[\w./-]+)|^\s*story\s*=\s*_?\s*\"(?P<text>[^\"]+)\"",
    re.MULTILINE,
)
# The first track that a scenario names is taken for the screens of its story that name none.
FIRST_TRACK = re.compile(r"\b(\w+\.ogg)")
# Tracks begin softly, and a track that accompanies several screens is heard further on for each.
FIRST_SECOND, CLIP_SECONDS = 8.0, 10.24


@dataclass
class Screen:
    """One screen of a story: the names of picture and track as the scenario gives them, and the narration."""

    picture: str | None = None
    music: str | None = None
    text: str | None = None


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/small/story"), help="folder to write the set to")
    parser.add_argument("--packages", type=Path, default=Path("build/small/packages"), help="folder for packages")
    return parser.parse_args()


def read_screens(scenario: str) -> list[Screen]:
    """Reads the screens of a scenario file that have a painting, a narration and music.

    Args:
        scenario: the text of the file.

    Returns:
        The screens in order. Music plays on from screen to screen until the story ends or another track begins.
    """
    first = FIRST_TRACK.search(scenario)
    screens, music, screen = [], None, None
    for token in TOKENS.finditer(scenario):
        if token["tag"] == "story":
            music = first and first[1]
        elif token["tag"] == "part":
            screen = Screen(music=music)
        elif token["tag"] == "/part" and screen is not None:
            music = screen.music
            if screen.picture and screen.music and screen.text:
                screens.append(screen)
            screen = None
        elif screen is not None:
            for name in ("picture", "music", "text"):
                if token[name]:
                    setattr(screen, name, token[name])
    return screens


def clean(text: str) -> str:
    """Returns a narration on one line, without the game's markup."""
    return " ".join(re.sub(r"<[^>]+>", "", text).split())


def index_files(packages: Path, suffixes: tuple[str, ...]) -> dict[str, tuple[str, Path]]:
    """Returns the package and path of each media file by its name in scenarios, `story/x.jpg` or `x.ogg`."""
    found = {}
    for package in PACKAGES:
        for path in sorted((packages / package).rglob("*")):
            if path.suffix in suffixes and path.is_file():
                found.setdefault(re.split("/(?:images|music)/", str(path))[-1], (package, path))
    return found


def attribution(package: str, path: Path, packages: Path) -> tuple[str, str, str, str, str]:
    """Returns file, author, licence, package and version: the game's copyright file names no author of one file."""
    return path.name, "the contributors of Battle for Wesnoth", "GPL-2+", package, version_of(package, packages)


def write_row(screen: Screen, uses: int, picture: Path, track: Path, output: Path) -> dict:
    """Writes picture (as PNG) and track, and gives the row; each use of a track starts further on in it."""
    image, audio = output / "images" / f"{picture.stem}.png", output / "audio" / track.name
    if not image.exists():
        Image.open(picture).convert("RGB").save(image)
    if not audio.exists():
        shutil.copy(track, audio)
    start = FIRST_SECOND + CLIP_SECONDS * uses
    if start + CLIP_SECONDS > (duration := soundfile.info(track).duration):
        start = FIRST_SECOND + (start - FIRST_SECOND) % (duration - FIRST_SECOND - CLIP_SECONDS)
    files = {"image": str(image.relative_to(output)), "audio": str(audio.relative_to(output))}
    return files | {"caption": clean(screen.text), "start": round(start, 2), "duration": CLIP_SECONDS}


def main() -> None:
    args = parse_args()
    for package in PACKAGES:
        unpack(package, args.packages)
    for folder in ("images", "audio"):
        (args.output / folder).mkdir(parents=True, exist_ok=True)
    pictures, tracks = (index_files(args.packages, suffixes) for suffixes in ((".jpg", ".png", ".webp"), (".ogg",)))
    scenarios = sorted(path for package in PACKAGES for path in (args.packages / package).rglob("campaigns/**/*.cfg"))
    rows, uses, used = [], Counter(), set()
    for screen in (screen for path in scenarios for screen in read_screens(path.read_text(errors="replace"))):
        if screen.picture not in pictures or screen.music not in tracks:
            continue
        picture, track = pictures[screen.picture], tracks[screen.music]
        rows.append(write_row(screen, uses[screen.music], picture[1], track[1], args.output))
        uses[screen.music] += 1
        used |= {picture, track}
    (args.output / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open(args.output / "ATTRIBUTION.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("file", "author", "licence", "package", "version"))
        table.writerows(attribution(package, path, args.packages) for package, path in sorted(used))
    counts = f"{len({row['image'] for row in rows})} pictures, {len({row['audio'] for row in rows})} tracks"
    print(f"{len(rows)} triplets: {counts}")


if __name__ == "__main__":
    main()

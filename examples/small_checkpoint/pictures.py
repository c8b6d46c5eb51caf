"""The pictures: landscapes and scenes from Debian packages, with their authors, licences and written descriptions."""

import json
import re
import subprocess
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
from PIL import Image

SKY_PACKAGE = "endless-sky-data"
SOUND_FONT_PACKAGE = "timgm6mb-soundfont"
SKY_CLASSES = {"fields": "green fields", "fog": "a foggy landscape", "snow": "a snowy landscape", "sea": "the sea",
               "water": "a lake or river", "lava": "a volcanic landscape", "space": "a space station",
               "station": "an industrial hall", "sky": "the sky", "industrial": "an industrial site"}  # fmt: skip
# Everything else in these packages is abstract, a logo, a dark or portrait variant or another size of the same scene.
WALLPAPERS = {
    "lomiri-wallpapers-16.04": {
        "Picture_1A_by_freespace.jpg": "paint brushes in bright colours",
        "greentock_by_Peter_Nerlich.jpg": "a pale clock face in close up",
        "seeding_by_Clements_Engelhardt.jpg": "dandelions in a meadow in evening light",
        "aitzgorri_by_Aitzol_Berasategi.jpg": "a mountain behind an autumn forest and a green meadow",
        "Dragonfly_by_Bolly.jpg": "a dragonfly on a dry bush in front of a blue sky",
        "sunset_by_Aitzol_Berasategi.jpg": "a sunset over wooded hills",
        "free_by_Peter_Nerlich.jpg": "a bird flying under white lamps",
        "picosdeeuropa_by_Aitzol_Berasategi.jpg": "a path under rocky mountains with snow",
        "Picture_0B_by_freespace.jpg": "a cut fig in a red bowl",
        "life_by_Aitzol_Berasategi.jpg": "a stream in a stony forest",
        "Bridge_by_Sander_Klootwijk.jpg": "a bridge over a wide pale plain",
    },
    "lomiri-wallpapers-20.04": {"Kleiber_by_Lukas_Baubkus.jpg": "a nuthatch on a tree trunk in winter"},
    "mate-backgrounds": {
        "Garden.jpg": "a red and orange flower in a garden",
        "Dune.jpg": "dry grass on a dune before the sea",
        "Aqua.jpg": "a drop falling into still water",
        "TwoWings.jpg": "seeds with wings before orange flowers",
        "Storm.jpg": "a dark storm over a road at dusk",
        "GreenMeadow.jpg": "fresh green grass in close up",
        "RainDrops.jpg": "rain drops on a green leaf",
        "Blinds.jpg": "the ribs of a bright green leaf",
        "FreshFlower.jpg": "a red flower in close up",
        "LadyBird.jpg": "a ladybird among blue flowers",
        "YellowFlower.jpg": "a yellow flower on black",
    },
    "plasma-workspace-wallpapers": {
        "Altai": "a painted blue mountain lake",
        "Autumn": "a painted autumn tree in golden light",
        "BytheWater": "wooden boards by the water at sunset",
        "ColdRipple": "a grey pier in fog",
        "ColorfulCups": "rows of pale cups on red and blue",
        "DarkestHour": "a dark blue lake at night",
        "EveningGlow": "boats at a lake under an evening sky",
        "FallenLeaf": "fallen autumn leaves in sunlight",
        "Grey": "black and white steel lattices",
        "IceCold": "ice drifting on blue water",
        "Kite": "a kite in a deep blue sky",
        "OneStandsOut": "dark green moss with one orange leaf",
        "PastelHills": "hills in pastel colours",
        "Path": "a path into a dark pine forest",
        "SafeLanding": "a painted landing in bright hills",
        "Volna": "a wave on a sandy beach from above",
        "summer_1am": "a pale violet summer night over a lake",
    },
}


@dataclass(frozen=True)
class Picture:
    """A picture with where it is from, who made it and what it shows."""

    path: Path
    package: str
    version: str
    author: str
    licence: str
    description: str

    @property
    def name(self) -> str:
        """`package/file`, or `package/folder` for wallpapers named by their folder."""
        stem = self.path.parts[-4] if self.path.parent.name == "images" else self.path.stem
        return f"{self.package}/{stem}"


def unpack(package: str, folder: Path) -> Path:
    """Downloads a Debian package with `apt-get download` and unpacks it, unless that was done before.

    Args:
        package: its name.
        folder: where to keep the package and the unpacked files; nothing is installed.

    Returns:
        The folder with the unpacked files.

    Raises:
        subprocess.CalledProcessError: if the package cannot be downloaded (run `apt-get update` first).
    """
    folder.mkdir(parents=True, exist_ok=True)
    unpacked = folder / package
    if not any(folder.glob(f"{package}_*.deb")):
        subprocess.run(["apt-get", "download", package], cwd=folder, check=True)
    if not unpacked.exists():
        subprocess.run(["dpkg", "-x", next(folder.glob(f"{package}_*.deb")), unpacked], check=True)
    return unpacked


def version_of(package: str, folder: Path) -> str:
    """Returns the version of an unpacked package, read from the downloaded file's name."""
    return next(folder.glob(f"{package}_*.deb")).name.split("_")[1].replace("%3a", ":")


def read_copyright(path: Path) -> list[tuple[list[str], str, str]]:
    """Reads a Debian copyright file.

    Returns:
        For each paragraph its file patterns, copyright holders and licence; of two that match, the later one holds.
    """
    entries = []
    for paragraph in re.split(r"\n\s*\n", path.read_text()):
        fields = dict(re.findall(r"^(\S+):((?:.*)(?:\n\s+.*)*)", paragraph, flags=re.MULTILINE))
        if "Files" in fields and "Copyright" in fields:
            holders = "; ".join(line.strip() for line in fields["Copyright"].strip().splitlines())
            # The authors of endless-sky write mountain1* for mountain1.jpg alone; mountain19-harro.jpg is another's.
            patterns = [re.sub(r"(\d)\*$", r"\1.*", pattern) for pattern in fields["Files"].split()]
            entries.append((patterns, holders, fields["License"].strip().splitlines()[0]))
    return entries


def rights(entries: list[tuple[list[str], str, str]], name: str) -> tuple[str, str]:
    """Returns the author and licence of a file, given by its path in the source package or that path's end."""
    matching = [
        (author, licence)
        for patterns, author, licence in entries
        if any(fnmatch(name, pattern) or fnmatch(pattern, f"*/{name}") for pattern in patterns)
    ]
    return matching[-1]


def _planet_descriptions(data: Path) -> dict[str, str]:
    """First sentences that the game says of a planet shown with a landscape, by landscape."""
    descriptions = {}
    for block in re.split(r"\nplanet ", (data / "map.txt").read_text()):
        found = re.search(r"\tlandscape land/(\S+)\n\tdescription `([^`]+)`", block)
        if found:
            descriptions.setdefault(found[1], found[2].strip().split(". ")[0][:200])
    return descriptions


def _sky_pictures(folder: Path) -> list[Picture]:
    root, version = unpack(SKY_PACKAGE, folder), version_of(SKY_PACKAGE, folder)
    game = root / "usr/share/games/endless-sky"
    entries = read_copyright(root / "usr/share/doc" / SKY_PACKAGE / "copyright")
    sentences = _planet_descriptions(game / "data")
    pictures = []
    for path in sorted((game / "images/land").glob("*.jpg")):
        kind = re.match("[a-z]+", path.stem)[0]
        named = any(
            other in kind for other in ("bwerner", "dmottl", "loc", "mfield", "myrabella", "nasa", "earthrise")
        )
        shown = "a landscape" if named else SKY_CLASSES.get(kind, f"a landscape of {kind}")
        description = ". ".join(filter(None, (f"a photograph of {shown}", sentences.get(path.stem))))
        author, licence = rights(entries, f"images/land/{path.name}")
        pictures.append(Picture(path, SKY_PACKAGE, version, author, licence, description))
    return pictures


def _plasma_rights(wallpaper: Path) -> tuple[str, str] | None:
    metadata = wallpaper / "metadata.json"
    if not metadata.exists():
        return None
    plugin = json.loads(metadata.read_text())["KPlugin"]
    return "; ".join(author["Name"] for author in plugin["Authors"]), plugin["License"]


def _wallpapers(package: str, folder: Path) -> list[Picture]:
    root, version = unpack(package, folder), version_of(package, folder)
    entries = read_copyright(root / "usr/share/doc" / package / "copyright")
    pictures = []
    for name, description in WALLPAPERS[package].items():
        (found,) = (path for path in root.rglob(name) if not path.is_symlink())
        author_and_licence = rights(entries, name)
        if found.is_dir():
            author_and_licence = _plasma_rights(found) or author_and_licence
            landscape = (found / "contents/images").glob("*x*")
            found = max((path for path in landscape if not path.is_symlink()), key=_width)
        pictures.append(Picture(found, package, version, *author_and_licence, description))
    return pictures


def _width(path: Path) -> int:
    return int(path.stem.split("x")[0])


def find_pictures(folder: Path) -> list[Picture]:
    """Unpacks the packages and returns their usable pictures in a fixed order, near-duplicates dropped.

    Args:
        folder: where to keep the packages.

    Returns:
        The pictures: the first of any two whose 16 x 16 colour thumbnails differ by less than 6 of 255 on average.
    """
    kept, thumbnails = [], []
    for picture in _sky_pictures(folder) + [p for package in WALLPAPERS for p in _wallpapers(package, folder)]:
        with Image.open(picture.path) as image:
            thumbnail = np.asarray(image.convert("RGB").resize((16, 16), Image.Resampling.BOX), dtype=np.float32)
        if all(np.abs(thumbnail - other).mean() >= 6 for other in thumbnails):
            kept.append(picture)
            thumbnails.append(thumbnail)
    return kept

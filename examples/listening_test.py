"""A blind listening test: exports a page that works from a file, and reads the ratings that it saves.

python examples/listening_test.py export --triplets melbench/test.jsonl --output test --audio_length_in_s 10 \
    --systems melfusion=results/melfusion text-only=results/text-only
python examples/listening_test.py read --key test/key.json ratings-*.json

Give raters the folder `test/page` and keep `test/key.json`, which says whose clip is whose. Raters open index.html,
rate every clip's overall quality (OVL) and its relevance to picture and text (REL) from 0 to 100, and send the file
that the page saves.
"""

import argparse
import hashlib
import html
import json
import string
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
from command_line import errors_in_one_line, existing_file, new_folder, positive_int, positive_seconds, random_seed
from evaluate_systems import find_clips, name_and_path, read_clip, read_picture

from melfusion_pipeline.audio import save_audio
from melfusion_pipeline.data import load_rows
from melfusion_pipeline.files_melfusion import atomic_write
from melfusion_pipeline.metrics import bootstrap_interval

SCALES = {"OVL": "overall quality", "REL": "fits picture and text"}
PAGE = Path(__file__).with_suffix(".html")
ITEM = string.Template("""<article><h2>$number of $count</h2>
<figure><img src="pictures/$number.jpg" alt="The picture of part $number"><figcaption>$caption</figcaption></figure>
<div>$clips</div></article>
""")
CLIP = string.Template("""<fieldset data-clip="$clip"><legend>Clip $letter</legend>
<audio controls preload="metadata" src="clips/$clip.wav"></audio>
$sliders</fieldset>
""")
SLIDER = string.Template("""<label><span>$scale: $meaning</span>
<input type="range" min="0" max="100" value="50" data-scale="$scale"><output>–</output></label>
""")


def draw_order(systems: Sequence[str], rows: Sequence[dict], num_items: int, seed: int) -> dict[str, dict]:
    """Draws rows, and for each the order of the systems' clips: `{"1-A": {"row": 7, "system": "melfusion"}, ...}`."""
    generator = np.random.default_rng(seed)
    drawn = sorted(generator.permutation(len(rows))[:num_items])
    return {
        f"{number}-{letter}": {"row": rows[index]["row"], "system": systems[position]}
        for number, index in enumerate(drawn, start=1)
        for letter, position in zip(string.ascii_uppercase, generator.permutation(len(systems)))
    }


def format_page(order: dict[str, dict], captions: dict[int, str], test: str) -> str:
    """Formats the page; nothing in it depends on which system a clip is of."""
    clips, texts = {}, {}
    sliders = "".join(SLIDER.substitute(scale=scale, meaning=meaning) for scale, meaning in SCALES.items())
    for clip, source in order.items():
        number, letter = clip.split("-")
        texts[number] = html.escape(captions[source["row"]])
        clips[number] = clips.get(number, "") + CLIP.substitute(clip=clip, letter=letter, sliders=sliders)
    items = (ITEM.substitute(number=n, count=len(clips), caption=texts[n], clips=clips[n]) for n in clips)
    page = string.Template(PAGE.read_text(encoding="utf-8"))
    return page.substitute(items="\n".join(items), test=test)


def digest_test(order: dict, clips: dict[str, Sequence[Path]], rows: Sequence[dict]) -> str:
    """Names a test by the clips in it and their order."""
    digest = hashlib.sha256(json.dumps(order).encode())
    positions = {row["row"]: position for position, row in enumerate(rows)}
    for source in order.values():
        digest.update(clips[source["system"]][positions[source["row"]]].read_bytes())
    return digest.hexdigest()[:16]


def write_media(
    page: Path, order: dict, clips: dict[str, Sequence[Path]], rows: Sequence[dict], seconds: float
) -> None:
    """Writes `clips/<part>-<letter>.wav` and `pictures/<part>.jpg`, all of one make.

    The clips have the lowest of the systems' sampling rates: none is given away by its high frequencies.
    """
    rate = min(soundfile.info(paths[0]).samplerate for paths in clips.values())
    for folder in ("clips", "pictures"):
        (page / folder).mkdir(parents=True)
    positions = {row["row"]: position for position, row in enumerate(rows)}
    for clip, source in order.items():
        position = positions[source["row"]]
        waveform = read_clip(clips[source["system"]][position], seconds, sampling_rate=rate)
        save_audio(page / "clips" / f"{clip}.wav", waveform, rate)
        picture = page / "pictures" / f"{clip.split('-')[0]}.jpg"
        if not picture.exists():
            read_picture(rows[position]["image"], side=1024).save(picture, quality=90)


def export_listening_test(
    output: Path,
    clips: dict[str, Sequence[Path]],
    rows: Sequence[dict],
    seconds: float,
    seed: int,
    num_items: int = 20,
) -> None:
    """Writes the folder `output`: `page`, to be given away, and `key.json`, to be kept.

    Every clip is cut to the same length, mono with peak 0.5 at the lowest of the systems' sampling rates, and the file
    loses its name and metadata, so that neither peak level nor bandwidth nor the file tells the systems apart.

    Args:
        output: A folder that does not exist yet; a folder with the same test is left as it is.
        clips: For each system its clips, one a row.
        rows: Of `load_rows`.
        seconds: Length of the clips.
        seed: Of the rows drawn and the order of the systems' clips.
        num_items: Number of rows, at most; more tire the raters.

    Raises:
        ValueError: If the folder exists with other content, or a file cannot be read.
    """
    order = draw_order(list(clips), rows, num_items, seed)
    test = digest_test(order, clips, rows)
    if output.exists():
        key = output / "key.json"
        if not (key.exists() and json.loads(key.read_text())["test"] == test):
            raise ValueError(f"{str(output)!r} exists, and a test that was given away must not change: give another.")
        return
    captions = {row["row"]: row["caption"] for row in rows}
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as folder:
        page = folder / "page"
        write_media(page, order, clips, rows, seconds)
        (page / "index.html").write_text(format_page(order, captions, test), encoding="utf-8")
        (folder / "key.json").write_text(json.dumps({"test": test, "seed": seed, "clips": order}, indent=1))


def read_key(path: Path) -> dict:
    """Reads `key.json`: which system each clip is of.

    Raises:
        ValueError: Naming the file, if it is none.
    """
    try:
        key = json.loads(path.read_text(encoding="utf-8"))
        if not key["test"] or not all({"row", "system"} <= source.keys() for source in key["clips"].values()):
            raise KeyError("clips")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is no key.json of a listening test: {error!r}") from error
    return key


def read_ratings(key: dict, path: Path) -> tuple[str, dict[str, dict]]:
    """Reads one rater's file: the name, and the ratings by clip.

    Raises:
        ValueError: Naming the file, if it is broken, of another test, incomplete or out of range.
    """
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        ratings = {rating["clip"]: {scale: rating[scale] for scale in SCALES} for rating in saved["ratings"]}
        test, rater = saved["test"], str(saved["rater"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} holds no ratings that the page saved: {error!r}") from error
    if test != key["test"]:
        raise ValueError(f"{str(path)!r} is of another test ({test}) than the key ({key['test']}).")
    if set(ratings) != set(key["clips"]) or len(ratings) < len(saved["ratings"]):
        raise ValueError(f"{str(path)!r} does not rate every clip of the key once.")
    for clip, rating in ratings.items():
        for scale, value in rating.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
                raise ValueError(f"{str(path)!r} rates {scale} of clip {clip} as {value!r}, not from 0 to 100.")
    return rater, ratings


def aggregate_ratings(key: dict, paths: Sequence[Path]) -> dict[str, dict]:
    """Means of all raters' OVL and REL, as the paper's columns, for each system.

    A rater's ratings depend on each other, and so do those of one row: there is an interval over raters, who are
    resampled with all that they rated, and one over rows. The wider of both is the cautious one.

    Args:
        key: Content of `key.json`.
        paths: One file a rater.

    Returns:
        `{system: {scale: {"mean", "raters": [low, high] or None, "rows": [low, high] or None}}}`; None where there is
        only one rater, or row, to resample.

    Raises:
        ValueError: As `read_ratings`, or if two files are of one rater.
    """
    raters = {}
    for path in paths:
        rater, ratings = read_ratings(key, path)
        if rater in raters:
            raise ValueError(f"{str(path)!r} is another file of the rater {rater!r}: give one of each rater.")
        raters[rater] = ratings
    table = {}
    for system in sorted({source["system"] for source in key["clips"].values()}):
        clips = {clip: source["row"] for clip, source in key["clips"].items() if source["system"] == system}
        groups = {"raters": np.repeat(list(raters), len(clips)), "rows": list(clips.values()) * len(raters)}
        values = {scale: [rated[clip][scale] for rated in raters.values() for clip in clips] for scale in SCALES}
        table[system] = {scale: summarize(values[scale], groups) for scale in SCALES}
    return table


def summarize(values: Sequence[float], groups: dict[str, Sequence]) -> dict:
    """Mean and, for each grouping with more than one group, the ends of its bootstrap interval."""
    summary = {"mean": float(np.mean(values))}
    for name, labels in groups.items():
        several = len(set(labels)) > 1
        summary[name] = list(bootstrap_interval(values, groups=labels)[1:]) if several else None
    return summary


def format_ratings(table: dict[str, dict], num_raters: int, num_rows: int) -> str:
    """Formats what `aggregate_ratings` returns as Markdown."""

    def cells(result):
        intervals = (result[name] for name in ("raters", "rows"))
        return [f"{result['mean']:.1f}", *("-" if i is None else f"[{i[0]:.1f}, {i[1]:.1f}]" for i in intervals)]

    lines = ["| system | " + " | ".join(f"{scale} | over raters | over rows" for scale in SCALES) + " |"]
    lines.append("|---" * (1 + 3 * len(SCALES)) + "|")
    for system, scales in table.items():
        lines.append("| " + " | ".join([system, *(cell for scale in SCALES for cell in cells(scales[scale]))]) + " |")
    return "\n".join([*lines, "", f"{num_raters} raters, {num_rows} rows, 95% bootstrap intervals"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export")
    export.add_argument("--triplets", type=existing_file, required=True)
    export.add_argument("--systems", nargs="+", required=True, type=name_and_path, metavar="NAME=FOLDER")
    export.add_argument("--audio_length_in_s", type=positive_seconds, required=True)
    export.add_argument("--num_items", type=positive_int, default=20, help="number of rows, drawn at random")
    export.add_argument("--seed", type=random_seed, default=0)
    export.add_argument("--output", type=new_folder, required=True)
    read = commands.add_parser("read")
    read.add_argument("--key", type=existing_file, required=True)
    read.add_argument("ratings", type=existing_file, nargs="+")
    arguments = parser.parse_args(arguments)
    if arguments.command == "read":
        key = read_key(arguments.key)
        table = aggregate_ratings(key, arguments.ratings)
        rows = {source["row"] for source in key["clips"].values()}
        return print(format_ratings(table, len(arguments.ratings), len(rows)))
    rows = list(load_rows(arguments.triplets))
    clips = {name: find_clips(Path(folder), rows) for name, folder in arguments.systems}
    export_listening_test(
        arguments.output, clips, rows, arguments.audio_length_in_s, arguments.seed, arguments.num_items
    )


if __name__ == "__main__":
    with errors_in_one_line():
        main()

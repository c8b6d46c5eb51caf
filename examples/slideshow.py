"""Makes a slide show with music of your pictures: an mp4 whose pictures change on the beat, and the music as a WAV.

python examples/slideshow.py holiday/ --prompt "a waltz for piano" --seconds 6 --output build/holiday.mp4

Needs the extra `film`. Beside the mp4 lie the WAV and a JSON that says when which picture is seen.
"""

import argparse
import json
import re
import tempfile
from collections import Counter
from pathlib import Path

import PIL.Image
import torch
from command_line import (
    errors_in_one_line,
    existing_file,
    new_file,
    positive_int,
    positive_seconds,
    random_seed,
    read_lines,
)
from matplotlib.figure import Figure

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.audio import save_audio
from melfusion_pipeline.files_melfusion import atomic_write
from melfusion_pipeline.onsets import draw_spectrogram, find_onsets, move_to_onsets
from melfusion_pipeline.plotting import plot_storyboard
from melfusion_pipeline.scoring import read_picture, write_slideshow

EXAMPLES = Path(__file__).parent
# Of the files in a folder, what this Pillow opens of these kinds: AVIF since 11.3.
FORMATS = {"AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP"}
SUFFIXES = {suffix for suffix, name in PIL.Image.registered_extensions().items() if name in FORMATS}
# More than the pipeline looks at.
SIDE = 768


def add_music_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what decides the music, and the checkpoint that makes it."""
    parser.add_argument("--prompt", default="a waltz for piano", help="one sentence for the whole")
    parser.add_argument(
        "--prompts", type=existing_file, metavar="FILE", help="a text file instead, one sentence a line"
    )
    parser.add_argument("--checkpoint", default=EXAMPLES.parent, help="folder or Hub id; default: the bundled one")
    parser.add_argument(
        "--num_inference_steps", type=positive_int, help="default: the checkpoint's own, as for guidance"
    )
    parser.add_argument("--guidance_scale", type=float, help="strength of the sentence")
    parser.add_argument("--image_guidance_scale", type=float, help="strength of the pictures; 1: unguided")
    parser.add_argument("--synapse_scale", type=float, default=1.0, help="strength of the pictures; 0 ignores them")
    parser.add_argument("--seed", type=random_seed, default=0)
    parser.add_argument("--preview", action="store_true", help="also draw pictures and music as a PNG")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, nargs="+", help="files in their order, or folders (sorted by name)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--seconds", type=float, nargs="+", default=[6.0], help="for all pictures, or for each of them"
    )
    length.add_argument("--total", type=positive_seconds, help="seconds of the whole, shared out equally")
    parser.add_argument("--size", type=parse_size, default=(1920, 1080), metavar="WIDTHxHEIGHT")
    parser.add_argument("--crop", action="store_true", help="fill the size and cut off the rest; default: black bars")
    parser.add_argument(
        "--output", type=new_file, default=Path("build/slideshow.mp4"), help="an .mp4; more lies beside it"
    )
    add_music_arguments(parser)
    arguments = parser.parse_args()
    for path in arguments.pictures:
        if not path.exists():
            parser.error(f"{path} is no picture and no folder; a sentence is given as --prompt")
    if arguments.output.suffix.lower() != ".mp4":
        parser.error(f"--output {arguments.output} must end in .mp4")
    return arguments


def parse_size(text: str) -> tuple[int, int]:
    """Reads a size such as 1280x720."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 1280x720")
    size = int(match[1]), int(match[2])
    if any(side < 16 or side % 2 for side in size):
        raise argparse.ArgumentTypeError(f"{text!r} must be even numbers, 16 at least")
    return size


def list_pictures(paths: list[Path]) -> list[Path]:
    """Lists the pictures of files and folders; `2.jpg` comes before `10.jpg`. What a folder holds besides is printed.

    Raises:
        ValueError: If there is none.
    """
    found = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        files = [file for file in path.glob("*") if file.is_file() and not file.name.startswith(".")]
        inside = [file for file in files if file.suffix.lower() in SUFFIXES]
        found += sorted(inside, key=by_number)
        if len(inside) < len(files):
            others = Counter(file.suffix.lower() or file.name for file in files if file not in inside)
            said = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
            print(f"not shown of {path}, as Pillow does not open them: {said}")
    if not found:
        raise ValueError(f"There is no picture in {', '.join(map(str, paths))}.")
    return found


def by_number(path: Path) -> list:
    """A sorting key that takes digits as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name.lower())]


def lay_out(count: int, seconds: list[float], total: float | None) -> tuple[list[float], float]:
    """Says where each of `count` pictures begins, and how long the whole is, in seconds.

    Raises:
        ValueError: If the seconds are neither one number nor one for each picture, or not positive.
    """
    if total is not None:
        seconds = [total / count]
    if len(seconds) not in (1, count):
        raise ValueError(f"--seconds takes one number or one a picture, got {len(seconds)} for {count} pictures.")
    # `not` catches NaN too.
    if not all(0 < one < 3600 for one in seconds):
        raise ValueError(f"Each picture needs more than 0 and less than 3600 seconds, got {seconds}.")
    lengths = seconds * count if len(seconds) == 1 else seconds
    ends = torch.tensor(lengths, dtype=torch.float64).cumsum(0).tolist()
    return [0.0, *ends[:-1]], ends[-1]


def read_prompts(arguments: argparse.Namespace, count: int) -> str | list[str]:
    """Gives the one prompt, or those of the file, one a picture.

    Raises:
        ValueError: If the file has not `count` lines.
    """
    if arguments.prompts is None:
        return arguments.prompt
    lines = read_lines(arguments.prompts)
    if len(lines) != count:
        raise ValueError(f"{str(arguments.prompts)!r} has {len(lines)} lines for {count} pictures or shots.")
    return lines


def load_pipeline(checkpoint: str | Path) -> MelFusionPipeline:
    """Loads a pipeline and puts it where it is fastest."""
    pipe = MelFusionPipeline.from_pretrained(checkpoint)
    return pipe.to("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def make_music(
    pipe: MelFusionPipeline,
    pictures: list[PIL.Image.Image],
    starts: list[float],
    duration: float,
    prompt: str | list[str],
    arguments: argparse.Namespace,
    variations: int = 1,
) -> torch.Tensor:
    """Makes music for pictures that begin at `starts` (seconds); returns `[variations, T]`."""
    return pipe(
        pictures,
        prompt,
        image_start_in_s=starts,
        audio_length_in_s=duration,
        num_inference_steps=arguments.num_inference_steps,
        guidance_scale=arguments.guidance_scale,
        image_guidance_scale=arguments.image_guidance_scale,
        synapse_scale=arguments.synapse_scale,
        num_waveforms_per_prompt=variations,
        generator=torch.Generator().manual_seed(arguments.seed),
        output_type="pt",
    ).audios.float()


def write_json(path: Path, table: list[dict]) -> None:
    """Writes a row a line."""
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in table)
    with atomic_write(path) as temporary:
        temporary.write_text(f"[\n{rows}\n]\n", encoding="utf-8")


def save_figure(path: Path, figure: Figure) -> None:
    """Writes a figure as PNG."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary)


def main() -> None:
    arguments = parse_arguments()
    paths = list_pictures(arguments.pictures)
    starts, duration = lay_out(len(paths), arguments.seconds, arguments.total)
    prompt = read_prompts(arguments, len(paths))
    output = arguments.output
    if output.with_suffix(".png").resolve() in {path.resolve() for path in paths}:
        raise ValueError(
            f"{str(output.with_suffix('.png'))!r} is one of the pictures, and where --preview draws for this --output:"
            " write to another folder, or take it out."
        )
    pictures = [read_picture(path, SIDE) for path in paths]
    output.parent.mkdir(parents=True, exist_ok=True)
    # A folder that cannot be written to is told before minutes of music are made.
    tempfile.TemporaryFile(dir=output.parent).close()

    pipe = load_pipeline(arguments.checkpoint)
    rate = pipe.sampling_rate
    waveform = make_music(pipe, pictures, starts, duration, prompt, arguments)[0]
    onsets, strengths = find_onsets(waveform, rate)
    changes = move_to_onsets(starts, duration, onsets, strengths)

    save_audio(output.with_suffix(".wav"), waveform, rate)
    whole = (read_picture(path) for path in paths)
    write_slideshow(output, whole, changes, waveform, rate, arguments.size, arguments.crop)
    table = [
        {"picture": str(path), "start": round(change, 3), "asked_for": round(start, 3)}
        for path, change, start in zip(paths, changes, starts)
    ]
    write_json(output.with_suffix(".json"), table)
    written = [output, output.with_suffix(".wav"), output.with_suffix(".json")]
    if arguments.preview:
        written.append(output.with_suffix(".png"))
        title = prompt if isinstance(prompt, str) else ""
        figure = plot_storyboard(
            pictures, changes, draw_spectrogram(waveform, rate), duration, onsets=onsets, title=title
        )
        save_figure(written[-1], figure)
    moved = sum(change != start for change, start in zip(changes, starts))
    print(f"{len(paths)} pictures, {duration:.1f} s; {moved} of {len(paths) - 1} changes moved to an onset")
    print(f"wrote {', '.join(map(str, written))}")


if __name__ == "__main__":
    with errors_in_one_line():
        main()

"""Measures long pieces, slide shows and films end to end: time, memory, and how well pictures and music meet.

python benchmarks/films.py --pictures build/small/data/test/images --film trailer.ogv --output build/films

Each is a process of its own with the bundled checkpoint at its defaults: ten minutes of music for one picture; a
slide show of 60 pictures, whose changes and onsets are looked for in what was written; a real film and one that is
rendered here, scored by the command; an hour of film whose old sound is kept and ducked. Needs the extra `film`.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import PIL.Image
import torch

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.audio import save_audio
from melfusion_pipeline.files_melfusion import atomic_write
from melfusion_pipeline.film import Film, read_film, read_frames
from melfusion_pipeline.onsets import find_onsets
from melfusion_pipeline.scoring import write_scored_film

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
FRAME_RATE = 25
# Seconds of a slide's change that are looked at on either side, and the distance that is called met.
AROUND, MET = 0.32, 0.04


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True, help="folder with at least 60")
    parser.add_argument("--film", type=Path, help="a real one, for the task film")
    parser.add_argument("--output", type=Path, default=Path("build/films"))
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--inside", choices=INSIDE, help=argparse.SUPPRESS)
    return parser.parse_args()


def run(*command: str | Path) -> str:
    """Runs a Python command to its end, prints its time and peak memory, and gives what it wrote."""
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE, text=True)
    answer = process.stdout.read()
    # `wait4` tells of this child alone; RUSAGE_CHILDREN would be the largest of all so far.
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{command[0]} failed with status {status}.")
    seconds, processor = time.perf_counter() - begin, usage.ru_utime + usage.ru_stime
    print(f"{answer.strip()}\n{seconds:.0f} s, {processor:.0f} s of processor, {usage.ru_maxrss / 2**20:.2f} GiB\n")
    return answer


def run_inside(arguments: argparse.Namespace, what: str) -> None:
    """Runs a function of this file in a process of its own."""
    run(__file__, "--pictures", arguments.pictures, "--output", arguments.output, "--inside", what)


def piece(arguments: argparse.Namespace) -> None:
    run_inside(arguments, "piece")


def make_piece(arguments: argparse.Namespace) -> None:
    pipe, generator = MelFusionPipeline.from_pretrained(ROOT), torch.Generator().manual_seed(0)
    picture = PIL.Image.open(EXAMPLES / "images" / "fog.jpg")
    waveform = pipe(picture, "a waltz for piano", audio_length_in_s=600.0, generator=generator).audios[0]
    save_audio(arguments.output / "piece.flac", waveform, pipe.sampling_rate)
    print(f"{len(waveform) / pipe.sampling_rate:.1f} s of music")


def choose_pictures(folder: Path, count: int) -> list[Path]:
    """Takes pictures from all over a folder; neighbours by name may be crops of one photograph."""
    paths = sorted(folder.glob("*.*"))
    return [paths[index] for index in np.linspace(0, len(paths) - 1, count).round().astype(int)]


def slides(arguments: argparse.Namespace) -> None:
    output = arguments.output / "slides.mp4"
    pictures = choose_pictures(arguments.pictures, 60)
    run(EXAMPLES / "slideshow.py", *pictures, "--seconds", "4", "--output", output, "--preview")
    film = read_film(output)
    onsets, _ = find_onsets(*read_sound(output))
    table = json.loads(output.with_suffix(".json").read_text())
    seen = [see_change(film, row["start"]) for row in table[1:]]
    distances = np.array([np.abs(onsets - change).min() for change in seen])
    near = np.array([np.abs(onsets - row["asked_for"]).min() <= 0.5 for row in table[1:]])
    print(f"{len(seen)} changes, {near.sum()} with an onset within half a second of where they were asked for;")
    print(f"of these {np.mean(distances[near] <= MET):.0%} within {MET * 1000:.0f} ms of an onset, as seen and heard")
    print(f"median {np.median(distances[near]) * 1000:.0f} ms, largest {distances[near].max() * 1000:.0f} ms\n")


def read_sound(path: Path) -> tuple[np.ndarray, int]:
    """Decodes a film's sound to mono, `[T]`, and its rate."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        blocks = [frame.to_ndarray().mean(axis=0) for frame in container.decode(stream)]
        return np.concatenate(blocks), stream.rate


def see_change(film: Film, expected: float) -> float:
    """Finds the second at which the picture is half way from the one before a change to the one after it."""
    times = expected + np.arange(-AROUND, AROUND + 1e-9, 1 / FRAME_RATE)
    small = [np.asarray(frame.resize((64, 36)), float).ravel() for frame in read_frames(film, times.tolist())]
    way = (np.array(small) - small[0]) @ (small[-1] - small[0])
    # A frame is on screen from its own second on; the change passes between those of two frames.
    shown = np.floor(times * FRAME_RATE + 1e-6) / FRAME_RATE
    return float(np.interp(way[-1] / 2, np.maximum.accumulate(way), shown))


def film(arguments: argparse.Namespace) -> None:
    if arguments.film is None:
        raise ValueError("The task film needs `--film`.")
    score(arguments.film, arguments.output / f"scored-{arguments.film.stem}.mkv")


def rendered(arguments: argparse.Namespace) -> None:
    path = arguments.output / "rendered.mp4"
    if not path.exists():
        render(path, choose_pictures(arguments.pictures, 60), np.random.default_rng(0))
    score(path, arguments.output / "scored-rendered.mp4")


def score(path: Path, output: Path) -> None:
    """Scores a film with four variations, and says what one of them would have met on average."""
    command = (EXAMPLES / "score_film.py", path, "--variations", "4", "--old_sound", "duck", "--output", output)
    answer = run(*command, "--preview")
    shares = re.search(r"the best of (.*);", answer)
    if shares:
        each = [int(share) for share in re.findall(r"(\d+)%", shares[1])]
        print(f"one variation, on average: {np.mean(each):.0f}%\n")


def render(path: Path, pictures: list[Path], generator: np.random.Generator) -> None:
    """Renders a film of slow pans over pictures, with a hard cut after every 2 to 4 seconds."""
    with atomic_write(path) as temporary, av.open(str(temporary), "w") as container:
        stream = container.add_stream("libx264", rate=FRAME_RATE)
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        for name in pictures:
            picture = PIL.Image.open(name).convert("RGB").resize((960, 960))
            (left, top), count = generator.uniform(0, (320, 600)), int(generator.integers(50, 101))
            step = generator.uniform(-1, 1, 2)
            for index in range(count):
                corner = np.clip((left, top) + index * step, 0, (320, 600))
                crop = picture.crop((*corner.astype(int), *(corner.astype(int) + (640, 360))))
                container.mux(stream.encode(av.VideoFrame.from_image(crop)))
        container.mux(stream.encode(None))


def hour(arguments: argparse.Namespace) -> None:
    path = arguments.output / "hour.mkv"
    if not path.exists():
        render_hour(path)
    run_inside(arguments, "duck")


def render_hour(path: Path, seconds: int = 3600, rate: int = 16000) -> None:
    """Renders an hour of coarse film with a sound that comes and goes."""
    with atomic_write(path) as temporary, av.open(str(temporary), "w") as container:
        stream, track = container.add_stream("mpeg4", rate=10), container.add_stream("aac", rate=rate, layout="mono")
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        generator = np.random.default_rng(0)
        for second in range(seconds):
            colour = tuple(np.random.default_rng(second // 8).integers(0, 256, 3).tolist())
            for _ in range(10):
                container.mux(stream.encode(av.VideoFrame.from_image(PIL.Image.new("RGB", (160, 96), colour))))
            loud = 0.1 * (second // 5 % 2) * generator.uniform(-1, 1, rate)
            frame = av.AudioFrame.from_ndarray(loud[None].astype(np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = rate, second * rate, Fraction(1, rate)
            container.mux(track.encode(frame))
        container.mux(stream.encode(None))
        container.mux(track.encode(None))


def duck(arguments: argparse.Namespace) -> None:
    """Puts an hour of noise under the hour of film, in this process: what is measured is the writing."""
    film, rate = read_film(arguments.output / "hour.mkv"), 16000
    music = np.random.default_rng(1).uniform(-0.3, 0.3, round(film.duration * rate)).astype(np.float32)
    output = arguments.output / "scored-hour.mkv"
    write_scored_film(output, film, music, rate, "duck")
    written = read_film(output)
    print(f"{film.duration:.1f} s, {film.num_frames} pictures; written {written.duration:.1f} s, {written.num_frames}")


TASKS = {"piece": piece, "slides": slides, "film": film, "rendered": rendered, "hour": hour}
INSIDE = {"piece": make_piece, "duck": duck}


def main() -> None:
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.inside:
        INSIDE[arguments.inside](arguments)
        return
    for task in arguments.tasks:
        print(f"{task}:", flush=True)
        TASKS[task](arguments)


if __name__ == "__main__":
    main()

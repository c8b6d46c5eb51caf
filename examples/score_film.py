"""Gives a film new music that follows its shots; the pictures are copied, not encoded anew.

python examples/score_film.py holiday.mp4 --prompt "a waltz for piano" --variations 4 --output build/holiday.mp4

Needs the extra `film`. Beside the film lies a JSON that says which shot had which picture, second and mood.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import PIL.Image
from command_line import errors_in_one_line, existing_file, new_file, positive_int
from slideshow import SIDE, add_music_arguments, load_pipeline, make_music, read_prompts, save_figure, write_json

from melfusion_pipeline.film import Film, choose_frame, find_shots, read_film, read_shots, split_shots, stretches
from melfusion_pipeline.onsets import draw_spectrogram, find_onsets, share_met, share_met_by_chance
from melfusion_pipeline.plotting import plot_storyboard
from melfusion_pipeline.scoring import check_container, check_old_sound, write_scored_film

EXAMPLES = Path(__file__).parent
sys.path.append(str(EXAMPLES / "small_checkpoint"))
from mood import MoodRule  # noqa: E402

# A shot that lasts longer, in seconds, gets a picture for each equal part.
LONGEST = 20.0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("film", type=existing_file)
    parser.add_argument(
        "--shots", type=existing_file, metavar="CSV", help="a table with a column start (s); default: look"
    )
    parser.add_argument(
        "--variations", type=positive_int, default=1, help="make several, take the one that meets most cuts"
    )
    parser.add_argument("--old_sound", choices=("drop", "keep", "duck"), default="drop",
                        help="keep it under the music, or let the music step back where it is loud")  # fmt: skip
    parser.add_argument("--old_sound_gain_in_db", type=float, default=0.0, help="of the sound that is kept")
    parser.add_argument("--output", type=new_file, help="default: build/ and the film's name")
    add_music_arguments(parser)
    return parser.parse_args()


def look(film: Film, starts: list[float]) -> tuple[list[float], list[PIL.Image.Image]]:
    """Chooses a picture for each stretch; returns the pictures' seconds and the pictures, made smaller."""
    chosen = [choose_frame(film, start, end) for start, end in stretches(starts, film.duration)]
    for _, picture in chosen:
        picture.thumbnail((2 * SIDE, SIDE) if picture.width > picture.height else (SIDE, 2 * SIDE))
    return [second for second, _ in chosen], [picture for _, picture in chosen]


def describe(shots: list[int], starts: list[float], film: Film, seconds: list[float], pictures: list) -> list[dict]:
    """Lists the stretches: shot, beginning and end, the second of its picture, and the picture's mood by the rule
    that the small checkpoint was trained by (arousal and valence in [0, 1])."""
    rule, table = MoodRule.load(EXAMPLES / "small_checkpoint" / "mood.json"), []
    for shot, (start, end), second, picture in zip(shots, stretches(starts, film.duration), seconds, pictures):
        arousal, valence = rule(picture)
        row = {"start": start, "end": end, "picture_at": second, "arousal": arousal, "valence": valence}
        table.append({"shot": shot + 1} | {name: round(value, 3) for name, value in row.items()})
    return table


def main() -> None:
    arguments = parse_arguments()
    check_old_sound(arguments.old_sound, arguments.old_sound_gain_in_db)
    film = read_film(arguments.film)
    output = arguments.output or Path("build", arguments.film.name)
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.exists() and output.samefile(film.path):
        raise ValueError(f"--output is the film itself, {str(output)!r}: write to another file.")
    check_container(output, film)
    shots = read_shots(arguments.shots, film.duration) if arguments.shots else find_shots(film)
    starts, shot_of = split_shots(shots, film.duration, LONGEST)
    prompt = read_prompts(arguments, len(shots))
    if isinstance(prompt, list):
        prompt = [prompt[shot] for shot in shot_of]
    seconds, pictures = look(film, starts)

    pipe = load_pipeline(arguments.checkpoint)
    rate = pipe.sampling_rate
    waveforms = make_music(pipe, pictures, starts, film.duration, prompt, arguments, arguments.variations)
    onsets, cuts = [find_onsets(waveform, rate)[0] for waveform in waveforms], shots[1:]
    met = [share_met(cuts, times) for times in onsets]
    best = int(np.argmax(met))

    write_scored_film(output, film, waveforms[best], rate, arguments.old_sound, arguments.old_sound_gain_in_db)
    table = describe(shot_of, starts, film, seconds, pictures)
    write_json(output.with_suffix(".json"), table)
    print(f"{film.duration:.1f} s, {len(shots)} shots, {len(pictures)} pictures")
    if cuts:
        chance = share_met_by_chance(cuts, onsets, film.duration, np.random.default_rng(arguments.seed))
        print(f"cuts with an onset within 0.1 s: {met[best]:.0%}; shifted at random: {chance:.0%}")
        if len(met) > 1:
            print(f"the best of {', '.join(f'{share:.0%}' for share in met)}; likewise for each shift")
    written = [output, output.with_suffix(".json")]
    if arguments.preview:
        written.append(output.with_suffix(".png"))
        mel = draw_spectrogram(waveforms[best], rate)
        save_figure(written[-1], plot_storyboard(pictures, starts, mel, film.duration, cuts, onsets[best]))
    print(f"wrote {', '.join(map(str, written))}")


if __name__ == "__main__":
    with errors_in_one_line():
        main()

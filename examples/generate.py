"""Makes music for a picture and a prompt, or of music that is there: writes a WAV and a picture of its spectrogram.

python examples/generate.py --image examples/images/lightning.jpg --prompt "a waltz for piano"
python examples/generate.py --audio song.mp3 --strength 0.6            # a variation
python examples/generate.py --audio song.mp3 --make_anew 10:20         # these seconds anew, the others as they are
python examples/generate.py --audio song.mp3 --go_on_to 60             # and on from its end
python examples/generate.py --best_of 8 --clap_model laion/clap-htsat-unfused
"""

import argparse
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from best_of import best_first, score_variations
from command_line import (
    errors_in_one_line,
    existing_file,
    new_folder,
    positive_int,
    positive_seconds,
    random_seed,
    read_lines,
)
from diffusers.utils.torch_utils import get_device

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.audio import load_audio, save_audio
from melfusion_pipeline.data import open_image
from melfusion_pipeline.extractors import ClapExtractor, ClipExtractor
from melfusion_pipeline.plotting import plot_mel_spectrogram
from melfusion_pipeline.waveforms_melfusion import Spectrogram, log_mel_spectrogram

EXAMPLES = Path(__file__).parent


def stretch(text: str) -> tuple[float, float]:
    """Reads `START:END`, in seconds."""
    start, separator, end = text.partition(":")
    try:
        return float(start), float(end)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no stretch such as 10:20, in seconds") from error


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=existing_file, default=EXAMPLES / "images" / "forest_stream.jpg")
    parser.add_argument("--prompt", default="a waltz for piano")
    parser.add_argument("--checkpoint", default=EXAMPLES.parent, help="folder or Hub id; default: the bundled one")
    parser.add_argument("--audio_length_in_s", type=positive_seconds, help="in seconds; default: the checkpoint's own")
    parser.add_argument(
        "--num_inference_steps", type=positive_int, help="default: the checkpoint's own, as for guidance"
    )
    parser.add_argument("--guidance_scale", type=float, help="strength of the sentence")
    parser.add_argument("--image_guidance_scale", type=float, help="strength of the picture; 1: unguided")
    parser.add_argument("--synapse_scale", type=float, default=1.0, help="strength of the picture; 0 ignores it")
    parser.add_argument(
        "--audio", type=existing_file, help="music that is there: wav, flac, ogg, mp3; m4a, mp4 and mov with PyAV"
    )
    parser.add_argument("--strength", type=float, help="how much of it a variation forgets, above 0 to 1")
    use = "stretches of it that are made anew, in seconds; --strength below 1 varies them"
    parser.add_argument("--make_anew", type=stretch, nargs="+", default=[], metavar="START:END", help=use)
    parser.add_argument("--go_on_to", type=float, metavar="SECONDS", help="goes on from its end to this length")
    use = "so many variations, of which the one is kept that CLAP and IMSM rank first"
    parser.add_argument("--best_of", type=positive_int, default=1, metavar="N", help=use)
    parser.add_argument("--clap_model", help="folder or Hub id: how near a variation is to the sentence")
    parser.add_argument("--clip_model", help="folder or Hub id: with --imsm_captions, how near it is to the picture")
    parser.add_argument(
        "--imsm_captions", type=existing_file, help="file with one caption a line, over which IMSM compares"
    )
    parser.add_argument("--seed", type=random_seed, default=0)
    parser.add_argument(
        "--output", type=new_folder, default=Path("build"), help="folder for WAV and PNG, named after the files"
    )
    arguments = parser.parse_args()
    if (arguments.best_of > 1) != (arguments.clap_model is not None):
        parser.error("--best_of above 1 and --clap_model need each other")
    if (arguments.clip_model is None) != (arguments.imsm_captions is None):
        parser.error("--clip_model and --imsm_captions need each other")
    if arguments.clip_model is not None and arguments.clap_model is None:
        parser.error("--clip_model needs --best_of above 1 and --clap_model")
    if arguments.go_on_to is not None and (arguments.audio is None or arguments.audio_length_in_s is not None):
        parser.error("--go_on_to needs --audio to go on from, and stands in place of --audio_length_in_s")
    return arguments


def given_music(arguments: argparse.Namespace) -> dict[str, Any]:
    """The call's arguments about music that is there; what contradicts, the call names."""
    audio, sampling_rate = (None, None) if arguments.audio is None else load_audio(arguments.audio)
    starts, ends = zip(*arguments.make_anew) if arguments.make_anew else (None, None)
    return {
        "audio": audio,
        "audio_sampling_rate": sampling_rate,
        "strength": arguments.strength,
        "mask_start_in_s": starts,
        "mask_end_in_s": ends,
        "audio_length_in_s": arguments.audio_length_in_s if arguments.go_on_to is None else arguments.go_on_to,
    }


def name_result(arguments: argparse.Namespace) -> str:
    """Names WAV and PNG after the files they were made of and after what was done: neither takes the other's place."""
    if arguments.audio is None:
        return arguments.image.stem
    done = "anew" if arguments.make_anew else "variation"
    return f"{arguments.audio.stem}-{arguments.image.stem}-{'longer' if arguments.go_on_to is not None else done}"


def load_judges(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `score_variations` that judge; before any music is made, which a wrong name would lose."""
    if arguments.clip_model is None:
        return {"clap": ClapExtractor.from_pretrained(arguments.clap_model, get_device())}
    captions = read_lines(arguments.imsm_captions)
    if len(captions) < 2:
        raise ValueError(f"--imsm_captions must hold two captions at least, got {captions}.")
    return {
        "clap": ClapExtractor.from_pretrained(arguments.clap_model, get_device()),
        "clip": ClipExtractor.from_pretrained(arguments.clip_model, get_device()),
        "captions": captions,
    }


def choose(
    waveforms: torch.Tensor, sampling_rate: int, image: PIL.Image.Image, prompt: str, judges: dict[str, Any]
) -> torch.Tensor:
    """Gives the best `[samples]` of `waveforms` `[variations, samples]` and prints what each one scored."""
    scores = score_variations(waveforms.numpy(), sampling_rate, prompt, image, **judges)
    best = best_first(scores)[0]
    for index in range(len(waveforms)):
        said = ", ".join(f"{name} {values[index]:.4f}" for name, values in scores.items())
        print(f"variation {index}: {said}{', kept' if index == best else ''}")
    return waveforms[best]


@torch.no_grad()
def main() -> None:
    arguments = parse_arguments()
    image = open_image(arguments.image)
    music = given_music(arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    pipe = MelFusionPipeline.from_pretrained(arguments.checkpoint)
    pipe.to(get_device())
    judges = load_judges(arguments) if arguments.best_of > 1 else None
    waveforms = pipe(
        image,
        arguments.prompt,
        num_inference_steps=arguments.num_inference_steps,
        guidance_scale=arguments.guidance_scale,
        image_guidance_scale=arguments.image_guidance_scale,
        synapse_scale=arguments.synapse_scale,
        num_waveforms_per_prompt=arguments.best_of,
        generator=torch.Generator().manual_seed(arguments.seed),
        output_type="pt",
        **music,
    ).audios
    waveform = waveforms[0]
    if judges is not None:
        waveform = choose(waveforms, pipe.sampling_rate, image, arguments.prompt, judges)

    wav = arguments.output / f"{name_result(arguments)}.wav"
    save_audio(wav, waveform, pipe.sampling_rate)
    title = f"{arguments.image.stem}: {arguments.prompt}"
    spectrogram = Spectrogram.of(pipe)
    seconds_per_frame = spectrogram.hop_length / spectrogram.sampling_rate
    mel_spectrogram = log_mel_spectrogram(waveform, spectrogram)
    plot_mel_spectrogram(mel_spectrogram, seconds_per_frame, title).savefig(wav.with_suffix(".png"))
    print(f"wrote {wav} ({len(waveform) / pipe.sampling_rate:.2f} s) and {wav.with_suffix('.png')}")


if __name__ == "__main__":
    with errors_in_one_line():
        main()

"""Makes music for a picture and a prompt: writes a WAV and a picture of its mel spectrogram.

python examples/generate.py --image examples/images/lightning.jpg --prompt "a waltz for piano"
"""

import argparse
from pathlib import Path

import PIL.Image
import torch
from diffusers.utils.torch_utils import get_device

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.audio import save_audio
from melfusion_pipeline.plotting import plot_mel_spectrogram

EXAMPLES = Path(__file__).parent


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, default=EXAMPLES / "images" / "forest_stream.jpg")
    parser.add_argument("--prompt", default="a waltz for piano")
    parser.add_argument("--checkpoint", default=EXAMPLES.parent, help="folder or Hub id; default: the bundled one")
    parser.add_argument("--audio_length_in_s", type=float, help="in seconds; default: the checkpoint's own")
    parser.add_argument("--num_inference_steps", type=int, help="default: the checkpoint's own, as for guidance")
    parser.add_argument("--guidance_scale", type=float, help="strength of the sentence")
    parser.add_argument("--image_guidance_scale", type=float, help="strength of the picture; 1: unguided")
    parser.add_argument("--synapse_scale", type=float, default=1.0, help="strength of the picture; 0 ignores it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("build"), help="folder for the WAV and the PNG")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    arguments = parse_arguments()
    pipe = MelFusionPipeline.from_pretrained(arguments.checkpoint)
    pipe.to(get_device())
    mel_spectrogram = pipe(
        PIL.Image.open(arguments.image),
        arguments.prompt,
        audio_length_in_s=arguments.audio_length_in_s,
        num_inference_steps=arguments.num_inference_steps,
        guidance_scale=arguments.guidance_scale,
        image_guidance_scale=arguments.image_guidance_scale,
        synapse_scale=arguments.synapse_scale,
        generator=torch.Generator().manual_seed(arguments.seed),
        output_type="mel",
    ).audios
    waveform = pipe.mel_spectrogram_to_waveform(mel_spectrogram)[0]

    arguments.output.mkdir(parents=True, exist_ok=True)
    wav = arguments.output / f"{arguments.image.stem}.wav"
    save_audio(wav, waveform, pipe.sampling_rate)
    title = f"{arguments.image.stem}: {arguments.prompt}"
    plot_mel_spectrogram(mel_spectrogram[0], title=title).savefig(wav.with_suffix(".png"))
    print(f"wrote {wav} ({len(waveform) / pipe.sampling_rate:.2f} s) and {wav.with_suffix('.png')}")


if __name__ == "__main__":
    main()

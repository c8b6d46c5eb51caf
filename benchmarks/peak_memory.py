"""Measures peak resident memory at full size (random weights): each stage alone, both apart in one process, together.

python benchmarks/peak_memory.py
python benchmarks/peak_memory.py --sizes

Apart means: load the picture's side, encode, save the features, free it, load the music side, load the features, call.
"""

import argparse
import gc
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import PIL.Image
import torch
from diffusers import DDIMScheduler
from full_size import build_components

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.features_melfusion import ImageFeatures
from melfusion_pipeline.inversion_melfusion import record_image_features

WAYS = ("picture alone", "music alone", "apart", "together")
IMAGE_SIDE = ("image_vae", "image_text_encoder", "image_tokenizer", "image_unet", "image_scheduler", "synapse")
MUSIC_SIDE = ("vae", "text_encoder", "tokenizer", "unet", "scheduler", "vocoder", "synapse")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_size", type=int, default=512)
    parser.add_argument("--audio_length_in_s", type=float, default=10.24)
    parser.add_argument("--num_inversion_steps", type=int, default=10)
    parser.add_argument(
        "--sizes", action="store_true", help="count the bytes of features instead, for long pieces too"
    )
    parser.add_argument("--way", choices=WAYS, help="measure this one in this process (used by the script itself)")
    parser.add_argument("--features", type=Path, help="file of the features (used by the script itself)")
    return parser.parse_args()


def build_pipeline(names: tuple[str, ...]) -> MelFusionPipeline:
    """Builds a pipeline with these components and none of the others."""
    components = build_components(only=names)
    return MelFusionPipeline(**dict.fromkeys((*IMAGE_SIDE, *MUSIC_SIDE)) | components)


def encode(pipe: MelFusionPipeline, args: argparse.Namespace) -> ImageFeatures:
    image = PIL.Image.effect_mandelbrot((512, 512), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    return pipe.encode_image(image, image_size=args.image_size, num_inversion_steps=args.num_inversion_steps)


def make_music(pipe: MelFusionPipeline, features: ImageFeatures, args: argparse.Namespace) -> None:
    pipe(
        prompt="a calm piano",
        image_features=features,
        audio_length_in_s=args.audio_length_in_s,
        num_inference_steps=1,
    )


def run(args: argparse.Namespace) -> None:
    if args.way == "together":
        pipe = build_pipeline((*IMAGE_SIDE, *MUSIC_SIDE))
        make_music(pipe, encode(pipe, args), args)
    if args.way in ("picture alone", "apart"):
        pipe = build_pipeline(IMAGE_SIDE)
        encode(pipe, args).save(args.features)
        del pipe
        gc.collect()
    if args.way in ("music alone", "apart"):
        make_music(build_pipeline(MUSIC_SIDE), ImageFeatures.load(args.features), args)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


@torch.no_grad()
def print_sizes(args: argparse.Namespace) -> None:
    """Prints what recorded and fitted features take in half precision; on the meta device nothing is computed."""
    with torch.device("meta"):
        pipe = MelFusionPipeline(**build_components())
        for name in ("image_unet", "synapse"):
            getattr(pipe, name).to(torch.float16)
        side = args.image_size // pipe.image_vae_scale_factor
        image_latents = torch.empty(1, pipe.image_unet.config.in_channels, side, side)
        prompt_embeds = torch.empty(1, 77, pipe.image_unet.config.cross_attention_dim, dtype=torch.float16)
    layers = pipe.synapse.config.image_layers
    steps = args.num_inversion_steps
    features = record_image_features(pipe.image_unet, DDIMScheduler(), image_latents, prompt_embeds, layers, steps)
    for name, pictures, seconds in (
        ("batch of 8, 10.24 s", 8, 10.24),
        ("batch of 8, 30 s in one window", 8, 30.0),
        ("ten minutes with 60 pictures, windows of 10.24 s", 60, 10.24),
    ):
        window = torch.empty(1, *pipe._latent_shape(seconds), device="meta")
        fitted, _ = pipe.fit_image_features(features.select(0), window)
        recorded, one = (pictures * size.nbytes / 1e9 for size in (features, fitted))
        print(f"{name}: recorded {recorded:.2f} GB, fitted one step {one:.3f} GB, all at once {steps * one:.2f} GB")


def main() -> None:
    args = parse_arguments()
    if args.sizes:
        print_sizes(args)
        return
    if args.way:
        run(args)
        return
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        for way in WAYS:
            command = [sys.executable, *sys.argv, "--way", way, "--features", f"{folder}/features.safetensors"]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            peaks[way] = float(output.split()[-1])
            print(f"{way}: {peaks[way]:.2f} GiB", flush=True)
    larger = max(peaks["picture alone"], peaks["music alone"])
    ratios = {way: peaks[way] / larger for way in ("apart", "together")}
    print("of the larger stage alone: " + ", ".join(f"{way} {ratio:.3f}" for way, ratio in ratios.items()))


if __name__ == "__main__":
    main()

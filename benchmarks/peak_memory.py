"""Measures peak resident memory at full size (random weights): each stage alone, both apart in one process, together.

python benchmarks/peak_memory.py
python benchmarks/peak_memory.py --dtype bfloat16 --way "picture alone" --features features.safetensors
python benchmarks/peak_memory.py --sizes

Apart means: load the picture's side, encode, save the features, free it, load the music side, load the features, call.
"""

import argparse
import functools
import gc
import resource
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path

import PIL.Image
import torch
from diffusers import DDIMScheduler
from full_size import build_components
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.encoding_melfusion import encode_pixels
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
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of all models")
    use = "count instead: bytes of features, for long pieces too, and the peak of the picture's stage"
    parser.add_argument("--sizes", action="store_true", help=use)
    parser.add_argument("--way", choices=WAYS, help="measure this one, in this process")
    parser.add_argument("--features", type=Path, help="file in which that one finds or leaves the features")
    return parser.parse_args()


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of tensors that exist at the same time: the given ones, and what comes up while it is open.

    Buffers inside of kernels are not seen.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()
        for tensor in tensors:
            self.add(tensor.untyped_storage())

    def add(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self.known:
            self.known.add(id(storage))
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.remove, id(storage), storage.nbytes())

    def remove(self, identity: int, nbytes: int) -> None:
        self.known.remove(identity)
        self.now -= nbytes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf.untyped_storage())
        return result


class FusedAttention(TorchFunctionMode):
    """Attention that keeps its result only: the meta device keeps all its weights, as no fused kernel does."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            return torch.empty_like(args[0] if args else kwargs["query"])
        return function(*args, **(kwargs or {}))


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
    torch.set_default_dtype(getattr(torch, args.dtype))
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


@torch.no_grad()
def print_peaks(args: argparse.Namespace, dtype: torch.dtype, num_images: int, force_upcast: bool = False) -> None:
    """Prints what the picture's stage holds at most, counted on the meta device: weights, activations, features."""
    with torch.device("meta"):
        components = build_components(only=IMAGE_SIDE)
        vae, unet, text_encoder = (components[f"image_{name}"].to(dtype) for name in ("vae", "unet", "text_encoder"))
        vae.register_to_config(force_upcast=force_upcast)
        pixels = torch.empty(num_images, 3, args.image_size, args.image_size)
        prompt_embeds = torch.empty(num_images, 77, unet.config.cross_attention_dim, dtype=dtype)
    layers, steps = components["synapse"].config.image_layers, args.num_inversion_steps
    record = functools.partial(record_image_features, progress_bar=functools.partial(tqdm, disable=True))
    weights = [weight for model in (vae, unet, text_encoder) for weight in model.parameters()]
    held = sum(weight.nbytes for weight in weights)
    counted = PeakBytes([*weights, pixels, prompt_embeds])
    del weights
    with FusedAttention(), counted:
        latents = encode_pixels(vae, pixels)
        of_vae, counted.peak = counted.peak, counted.now
        record(unet, DDIMScheduler(), latents, prompt_embeds, layers, steps)
    upcast = ", VAE upcast" if force_upcast else ""
    print(
        f"{num_images} picture(s), {args.image_size} px, {str(dtype)[6:]}{upcast}: weights {held / 2**30:.2f} GiB,"
        f" peak {of_vae / 2**30:.2f} while the VAE encodes, {counted.peak / 2**30:.2f} in {steps} inversion steps"
    )


def main() -> None:
    args = parse_arguments()
    if args.sizes:
        print_sizes(args)
        for num_images in (1, 8):
            print_peaks(args, torch.float16, num_images)
            print_peaks(args, torch.float16, num_images, force_upcast=True)
            print_peaks(args, torch.float32, num_images)
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

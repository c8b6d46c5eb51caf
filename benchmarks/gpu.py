"""Times whole calls on an accelerator, full size, random weights, beside `AudioLDMPipeline` with the same models.

python benchmarks/gpu.py
python benchmarks/gpu.py --size small --dtypes fp32 --batches 1 2 --repeats 1   # tries the script, anywhere

A line is one way to run: seconds a call (medians, all calls of a line in turn), the ratio to text-to-music as
`AudioLDMPipeline` does it on the same line, and the peak memory of the device. What a device cannot do is said so.
"""

import argparse
import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator

import PIL.Image
import torch
from count_flops import AUDIO_LENGTH_IN_S
from diffusers import AudioLDMPipeline
from diffusers.utils.torch_utils import get_device
from full_size import build_components
from torch.nn.attention import SDPBackend, sdpa_kernel

from melfusion_pipeline import MelFusionPipeline

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
OFFLOADS = ("enable_model_cpu_offload", "enable_sequential_cpu_offload")
BASELINE = "AudioLDMPipeline"
Calls = dict[str, Callable[[], object]]


def build_pipeline(size: str, dtype: torch.dtype) -> MelFusionPipeline:
    if size == "small":
        pipe = MelFusionPipeline.from_pretrained(".", torch_dtype=dtype)
    else:
        pipe = MelFusionPipeline(**build_components(), default_window_length_in_s=AUDIO_LENGTH_IN_S).to(dtype)
        torch.nn.init.constant_(pipe.synapse.alphas, 0.5)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def calls(pipe: MelFusionPipeline, batch: int, args: argparse.Namespace) -> Calls:
    """The ways to make `batch` pieces of music, the last one by diffusers' own pipeline."""
    image = PIL.Image.effect_mandelbrot((512, 512), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    length = pipe.default_audio_length_in_s
    common = {"prompt": ["a calm piano"] * batch, "audio_length_in_s": length, "guidance_scale": 3.0}
    common["num_inference_steps"] = args.num_inference_steps
    ours = functools.partial(pipe, **common, image_guidance_scale=1.0)
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler", "vocoder")
    text_to_music = AudioLDMPipeline(**{name: getattr(pipe, name) for name in names})
    text_to_music.set_progress_bar_config(disable=True)
    features = pipe.encode_image(image, num_inversion_steps=args.num_inversion_steps)
    fresh = {"image": [image] * batch, "num_inversion_steps": args.num_inversion_steps}
    return {
        "a fresh picture each": functools.partial(ours, **fresh),
        "with picture guidance": functools.partial(pipe, **common, **fresh, image_guidance_scale=2.0),
        "given features": functools.partial(ours, image_features=features),
        BASELINE: functools.partial(text_to_music, **common),
    }


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def time_in_turn(functions: Calls, repeats: int, device: torch.device) -> dict[str, float]:
    """Gives the median seconds of each call, in turn, after one round to warm up."""
    times = {name: [] for name in functions}
    for round_number in range(repeats + 1):
        for name, function in functions.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if round_number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(spent) for name, spent in times.items()}


def print_line(way: str, functions: Calls, args: argparse.Namespace, device: torch.device) -> None:
    """Times one way to run and prints it, or why it cannot be run here."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        seconds = time_in_turn(functions, args.repeats, device)
    except (RuntimeError, NotImplementedError) as error:
        # Running out of memory and a kernel that is not there are both of these.
        print(f"| {way} | not possible here: {str(error).splitlines()[0][:90]} |", flush=True)
        return
    base = seconds.get(BASELINE)
    cells = [f"{spent:.3f} s" + (f" ({spent / base:.2f})" if base else "") for spent in seconds.values()]
    memory = f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if cuda else "-"
    print(f"| {' | '.join([way, *cells, memory])} |", flush=True)


@contextlib.contextmanager
def compiled(*unets: torch.nn.Module) -> Iterator[None]:
    """Compiles modules in place, and takes them back afterwards."""
    for unet in unets:
        unet.compile()
    try:
        yield
    finally:
        for unet in unets:
            unet._compiled_call_impl = None
        torch.compiler.reset()


def measure(dtype_name: str, args: argparse.Namespace, device: torch.device) -> None:
    pipe = build_pipeline(args.size, DTYPES[dtype_name]).to(device)
    for batch in args.batches:
        print_line(f"{dtype_name}, batch {batch}", calls(pipe, batch, args), args, device)
    first = calls(pipe, args.batches[0], args)
    for backend in BACKENDS:
        with sdpa_kernel([backend]):
            print_line(f"{dtype_name}, {backend.name.lower()}", first, args, device)
    with compiled(pipe.image_unet, pipe.unet):
        print_line(f"{dtype_name}, both UNets compiled", first, args, device)
    if device.type == "cpu":
        return
    for offload in OFFLOADS:
        getattr(pipe, offload)(device=device)
        # The other pipeline would have hooks of its own.
        ours = {name: call for name, call in first.items() if name != BASELINE}
        print_line(f"{dtype_name}, {offload}", ours, args, device)
        pipe.remove_all_hooks()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("full", "small"), default="full", help="small: the bundled checkpoint")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=["fp16", "bf16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--num_inference_steps", type=int, default=10)
    parser.add_argument("--num_inversion_steps", type=int, help="default: the pipeline's")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = torch.device(get_device())
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else device.type}, {args}\n")
    print(f"| way | a fresh picture each | with picture guidance | given features | {BASELINE} | peak |")
    print("|---|---|---|---|---|---|", flush=True)
    for dtype_name in args.dtypes:
        measure(dtype_name, args, device)


if __name__ == "__main__":
    main()

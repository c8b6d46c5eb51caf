"""Times MeLFusion against text-to-music at full size (random weights), as ratios beside those of operations.

python benchmarks/wall_clock.py --num_inference_steps 4 --num_inversion_steps 2 --repeats 2
"""

import argparse
import functools
import resource
import statistics
import time
from collections.abc import Callable

import PIL.Image
import torch
from count_flops import AUDIO_LENGTH_IN_S, LENGTH, Counted
from full_size import AUDIOLDM, build_components

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.attention_melfusion import KVBlenders, KVRecorders, use_attn_processors


def picture() -> PIL.Image.Image:
    return PIL.Image.effect_mandelbrot((512, 512), (-2, -1.5, 1, 1.5), 50).convert("RGB")


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Times each function in turn, `repeats` rounds after one to warm up, and gives the medians."""
    times = {name: [] for name in functions}
    for round_number in range(repeats + 1):
        for name, function in functions.items():
            spent = seconds(function)
            if round_number:
                times[name].append(spent)
    return {name: statistics.median(spent) for name, spent in times.items()}


def compare_calls(pipe: MelFusionPipeline, args: argparse.Namespace, counted: Counted) -> None:
    """Whole calls: without a picture, with a fresh one, with given features."""
    image = picture()
    call = functools.partial(
        pipe,
        prompt="a calm piano",
        audio_length_in_s=AUDIO_LENGTH_IN_S,
        num_inference_steps=args.num_inference_steps,
        num_inversion_steps=args.num_inversion_steps,
        image_size=args.image_size,
    )
    features = pipe.encode_image(image, image_size=args.image_size, num_inversion_steps=args.num_inversion_steps)
    functions = {
        "text-to-music": call,
        "fresh picture": functools.partial(call, image),
        "given features": functools.partial(call, image_features=features),
    }
    medians, steps = interleaved(functions, args.repeats), args.num_inference_steps
    counts = {"fresh picture": counted.default(steps), "given features": counted.with_features(steps)}
    print(f"text-to-music: {medians['text-to-music']:.1f} s")
    for name, count in counts.items():
        ratio, expected = medians[name] / medians["text-to-music"], count / counted.text_to_music(steps)
        difference = f"{ratio / expected - 1:+.1%}"
        print(f"{name}: {medians[name]:.1f} s, ratio {ratio:.3f}; of operations {expected:.3f} ({difference})")


def compare_goal(pipe: MelFusionPipeline, args: argparse.Namespace, counted: Counted) -> None:
    """Few steps, with a fresh picture that guides in the first half of them, against 50 steps of text-to-music."""
    call = functools.partial(pipe, prompt="a calm piano", audio_length_in_s=AUDIO_LENGTH_IN_S)
    goal = functools.partial(
        call,
        picture(),
        num_inference_steps=args.goal_steps,
        num_inversion_steps=args.num_inversion_steps,
        image_guidance_scale=8.0,
        image_guidance_end=0.5,
        image_size=args.image_size,
    )
    # What ran before has warmed up all of it but the third branch.
    functions = {"text-to-music": functools.partial(call, num_inference_steps=50), "goal": goal}
    times = {name: [seconds(function) for _ in range(args.goal_repeats)] for name, function in functions.items()}
    base, spent = (statistics.median(times[name]) for name in functions)
    expected = counted.guided(args.goal_steps, end=0.5) / counted.text_to_music(50)
    difference = f"{spent / base / expected - 1:+.1%}"
    print(f"50 steps of text-to-music: {base:.1f} s; {args.goal_steps} with a fresh, guiding picture: {spent:.1f} s,")
    print(f"ratio {spent / base:.3f}; of operations {expected:.3f} ({difference})")


@torch.no_grad()
def compare_processors(pipe: MelFusionPipeline, args: argparse.Namespace) -> None:
    """What blending adds to a music step and recording to a pass of the picture's UNet."""
    latents = torch.randn(2, *pipe._latent_shape(AUDIO_LENGTH_IN_S))
    embeds = torch.randn(2, pipe.unet.config.projection_class_embeddings_input_dim)
    config = pipe.synapse.config
    tokens = pipe.synapse.num_tokens(*latents.shape[-2:])
    fitted = {
        layer: tuple(torch.randn(2, 1, length, width))
        for layer, length, width in zip(config.music_layers, tokens, config.music_widths)
    }
    blenders = KVBlenders(config.music_layers)
    blenders.read(fitted, torch.full((len(tokens), 2), 0.5))
    side = args.image_size // pipe.image_vae_scale_factor
    image_latents, null = torch.randn(1, 4, side, side), torch.randn(1, 77, pipe.image_unet.config.cross_attention_dim)

    def music_step() -> None:
        pipe.unet(latents, 500, None, class_labels=embeds)

    def image_pass() -> None:
        pipe.image_unet(image_latents, 500, null)

    def with_processors(unet: torch.nn.Module, processors: dict, run: Callable[[], None]) -> None:
        with use_attn_processors(unet, processors):
            run()

    recorders = KVRecorders(pipe.image_unet, dict.fromkeys(config.image_layers))
    medians = interleaved(
        {
            "music step": music_step,
            "blending": functools.partial(with_processors, pipe.unet, blenders, music_step),
            "image pass": image_pass,
            "recording": functools.partial(with_processors, pipe.image_unet, recorders, image_pass),
        },
        args.processor_repeats,
    )
    pairs = (("a music step", "music step", "blending"), ("a picture pass", "image pass", "recording"))
    for name, plain, changed in pairs:
        print(f"{name}: {medians[plain]:.2f} s; {changed} {medians[changed] / medians[plain] - 1:+.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--music_model", default=AUDIOLDM)
    parser.add_argument("--image_size", type=int, default=512)
    parser.add_argument("--num_inference_steps", type=int, default=4)
    parser.add_argument("--num_inversion_steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2, help="of whole calls")
    parser.add_argument("--processor_repeats", type=int, default=10, help="of single steps and passes")
    parser.add_argument("--goal_steps", type=int, default=6, help="with a picture, to be compared with 50 without")
    parser.add_argument("--goal_repeats", type=int, default=1, help="of these two")
    args = parser.parse_args()
    with torch.device("meta"):
        on_meta = MelFusionPipeline(**build_components(music_model=args.music_model), **LENGTH)
    counted = Counted(on_meta, args.image_size, args.num_inversion_steps)
    components = build_components(music_model=args.music_model)
    torch.nn.init.constant_(components["synapse"].alphas, 0.5)
    pipe = MelFusionPipeline(**components, **LENGTH)
    pipe.set_progress_bar_config(disable=True)
    print(f"{args.music_model}, {args.image_size} px, {args.num_inference_steps} + {args.num_inversion_steps} steps")
    compare_calls(pipe, args, counted)
    compare_processors(pipe, args)
    if args.goal_repeats:
        compare_goal(pipe, args, counted)
    print(f"peak resident memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()

"""Measures long pieces: time and memory against length with a checkpoint, operations of windows against one long pass.

python benchmarks/long_pieces.py

The first table is of real calls with the bundled small checkpoint, each length in a process of its own, so that its
peak memory is its own. The second is counted on the meta device with the architectures of the public checkpoints.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import torch

ROOT = Path(__file__).parents[1]
MINUTES = (0.5, 1, 2, 5, 10)
STEPS = 4


def run_one(seconds: float, checkpoint: str) -> dict[str, float]:
    """Makes one piece in this process and gives what it took."""
    from melfusion_pipeline import MelFusionPipeline

    pipe = MelFusionPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    image = PIL.Image.open(ROOT / "examples" / "images" / "fog.jpg")
    settings = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "image_guidance_scale": 1.0}
    features = pipe.encode_image(image)
    # Of the processor, which other work on the machine does not lengthen.
    start = time.process_time()
    pipe(prompt="a waltz for piano", image_features=features, audio_length_in_s=seconds, **settings)
    # Linux counts in KiB.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": time.process_time() - start, "peak": peak}


def print_growth(checkpoint: str) -> None:
    print(f"| minutes | processor seconds ({STEPS} steps) | peak memory, GiB |\n|---|---|---|")
    rows = []
    for minutes in MINUTES:
        command = [sys.executable, __file__, "--one", str(60 * minutes), "--checkpoint", checkpoint]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append(json.loads(answer.splitlines()[-1]))
        print(f"| {minutes} | {rows[-1]['seconds']:.1f} | {rows[-1]['peak']:.3f} |", flush=True)
    times, peaks = (np.array([row[name] for row in rows]) for name in ("seconds", "peak"))
    slope, constant = np.polyfit(MINUTES, times, 1)
    residual = np.abs(np.polyval((slope, constant), MINUTES) - times).max() / times.max()
    print(f"{constant:.2f} s + {slope:.2f} s a minute, off a straight line by at most {residual:.1%} of the longest.")
    ratio = peaks[MINUTES.index(10)] / peaks[MINUTES.index(1)]
    print(f"Peak memory of ten minutes over that of one: {ratio:.3f}")


def print_operations(music_model: str) -> None:
    from count_flops import count
    from full_size import build_components

    from melfusion_pipeline import MelFusionPipeline
    from melfusion_pipeline.attention_melfusion import KVBlenders
    from melfusion_pipeline.checkpoint_melfusion import BASE_LENGTH_IN_S
    from melfusion_pipeline.denoising_melfusion import NoisePredictor
    from melfusion_pipeline.guidance_melfusion import Guidance
    from melfusion_pipeline.windows_melfusion import Windows

    with torch.device("meta"):
        components = build_components(music_model=music_model)
        pipe = MelFusionPipeline(**components, default_window_length_in_s=BASE_LENGTH_IN_S)
    pipe.set_progress_bar_config(disable=True)
    own = pipe._latent_shape(BASE_LENGTH_IN_S)[1]
    embeds = torch.empty(2, pipe.unet.config.projection_class_embeddings_input_dim, device="meta")
    prompts = pipe.prompts.to_unet(embeds)
    timestep = torch.empty((), device="meta")

    def step(latents: torch.Tensor, windows: Windows) -> torch.Tensor:
        predictor = NoisePredictor(pipe.unet, pipe.prompts, windows, 1, KVBlenders([]), latents.new_empty(0, 3), {})
        return predictor.predict(latents, timestep, prompts, {}, Guidance(3.0), windows.groups(16))

    print(f"\n{music_model}, windows of {own} latent frames overlapping by a quarter; TFLOP with guidance.\n")
    print("| seconds | a step: one pass | windows | ratio | VAE decoder: one pass | windows | ratio |")
    print("|---|---|---|---|---|---|---|")
    for windows_long in (1, 6, 30):
        seconds = windows_long * BASE_LENGTH_IN_S
        latents = torch.empty(1, *pipe._latent_shape(seconds), device="meta")
        frames = latents.shape[-2]
        one, _ = count(step, latents, Windows.lay_out(frames, frames, 0))
        cut, _ = count(step, latents, Windows.lay_out(frames, own, own // 4))
        one_vae, _ = count(pipe.decode_latents, latents, seconds)
        cut_vae, _ = count(pipe.decode_latents, latents)
        print(
            f"| {seconds:.2f} | {one:.2f} | {cut:.2f} | {cut / one:.3f} | {one_vae:.2f} | {cut_vae:.2f} |"
            f" {cut_vae / one_vae:.3f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=str(ROOT), help="folder or Hub id; default: the bundled one")
    parser.add_argument("--one", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run_one(arguments.one, arguments.checkpoint)))
        return
    print_growth(arguments.checkpoint)
    print_operations("cvssp/audioldm-s-full-v2")


if __name__ == "__main__":
    main()

"""Measures the inversion: round trips of unseen pictures, and the cheap features against the paper's."""

import argparse
from pathlib import Path

import torch
from corpus import load_pictures, read_rows, unique_images
from PIL import Image
from torch.nn import functional as F

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.inversion_melfusion import ddim_walk, inversion_grid


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder of the pipeline")
    parser.add_argument("--data", type=Path, default=Path("build/small/data"), help="folder that build_data.py wrote")
    parser.add_argument("--pictures", type=int, default=60, help="test pictures, one crop of each")
    parser.add_argument("--num_inversion_steps", type=int, default=50)
    return parser.parse_args()


def psnr(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Returns the peak signal-to-noise ratio in dB of each of `[B, 3, H, W]`, values in [-1, 1]."""
    return 10 * (4 / (images - others).square().mean(dim=(1, 2, 3))).log10()


@torch.no_grad()
def round_trip(pipe: MelFusionPipeline, images: list[Image.Image], steps: int) -> torch.Tensor:
    """Returns the pictures' latents after inverting in `steps` and sampling back in as many."""
    latents = pipe.prepare_image_latents(images, pipe.default_image_size)
    prompt_embeds = pipe.encode_image_prompt("", len(latents))
    grid = inversion_grid(pipe.image_scheduler, steps)
    for levels in (grid, grid[::-1]):
        for _, latents in ddim_walk(
            pipe.image_unet, latents, prompt_embeds, levels, pipe.image_scheduler.config.prediction_type
        ):
            pass
    return latents


@torch.no_grad()
def decode(pipe: MelFusionPipeline, latents: torch.Tensor) -> torch.Tensor:
    return pipe.image_vae.decode(latents / pipe.image_vae.config.scaling_factor).sample.clamp(-1, 1)


def compare_features(pipe: MelFusionPipeline, images: list[Image.Image]) -> dict[str, float]:
    """Returns each layer's mean cosine similarity of keys and values: the default's against the paper's procedure."""
    cheap = pipe.encode_image(images)
    paper = pipe.encode_image(images, num_inversion_steps=50, feature_source="reconstruction")
    similarities = {}
    for timestep in paper.timesteps.tolist():
        for layer, pair in paper.at(timestep).items():
            alike = [F.cosine_similarity(*both, dim=-1) for both in zip(cheap.at(timestep)[layer], pair, strict=True)]
            similarities.setdefault(layer, []).append(torch.stack(alike).mean())
    return {layer: torch.stack(found).mean().item() for layer, found in similarities.items()}


def main() -> None:
    args = parse_args()
    pipe = MelFusionPipeline.from_pretrained(args.checkpoint)
    pipe.set_progress_bar_config(disable=True)
    rows = unique_images(read_rows(args.data, "test"))
    rows = list({row["picture"]: row for row in rows}.values())[: args.pictures]
    images = [Image.open(args.data / row["image"]) for row in rows]
    pixels = load_pictures(args.data, rows).float() / 127.5 - 1
    own = decode(pipe, pipe.prepare_image_latents(images, pipe.default_image_size))
    back = decode(pipe, round_trip(pipe, images, args.num_inversion_steps))
    print(f"{len(rows)} pictures: autoencoder alone {psnr(own, pixels).mean():.2f} dB against the picture")
    print(f"round trip of {args.num_inversion_steps} steps: {psnr(back, pixels).mean():.2f} dB against the picture,")
    print(f"{psnr(back, own).mean():.2f} dB against the autoencoder's own reconstruction")
    for layer, similarity in compare_features(pipe, images[:16]).items():
        print(f"  {layer}: cosine similarity {similarity:.3f}")


if __name__ == "__main__":
    main()

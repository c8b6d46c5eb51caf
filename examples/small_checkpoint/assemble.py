"""Composes the trained components and a new synapse into the pipeline that `train_melfusion.py` starts from."""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import (
    ClapTextModelWithProjection,
    CLIPTextModel,
    CLIPTokenizer,
    RobertaTokenizer,
)

from melfusion_pipeline import MelFusionPipeline, MusicVocoder, VisualSynapse

CLASSES = {
    "vae": AutoencoderKL,
    "text_encoder": ClapTextModelWithProjection,
    "tokenizer": RobertaTokenizer,
    "unet": UNet2DConditionModel,
    "scheduler": DDIMScheduler,
    "vocoder": MusicVocoder,
    "image_vae": AutoencoderKL,
    "image_text_encoder": CLIPTextModel,
    "image_tokenizer": CLIPTokenizer,
    "image_unet": UNet2DConditionModel,
    "image_scheduler": DDIMScheduler,
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/small"), help="has components/, gets pipeline/")
    parser.add_argument("--alpha", type=float, default=0.3, help="of every layer; above 0 all learn at once")
    parser.add_argument("--seed", type=int, default=0, help="of the projections")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    folder = args.output / "components"
    components = {name: kind.from_pretrained(folder / name) for name, kind in CLASSES.items()}
    components["synapse"] = VisualSynapse.from_unets(components["image_unet"], components["unet"])
    torch.nn.init.constant_(components["synapse"].alphas, args.alpha)
    MelFusionPipeline(**components).save_pretrained(args.output / "pipeline")


if __name__ == "__main__":
    main()

"""Trains the text-to-music UNet, without pictures, on precomputed latents of the music autoencoder."""

import torch
from corpus import cached, read_rows
from diffusers import AutoencoderKL, UNet2DConditionModel
from music import DURATION
from torch.nn import functional as F
from train_image_unet import create_scheduler, train_unet, validation_loss
from training_loop import stage_parser
from transformers import ClapTextModelWithProjection, RobertaTokenizer

from melfusion_pipeline.audio import load_random_crop
from melfusion_pipeline.caches import MusicLatentCache

CHANNELS = (32, 64, 96, 128)


def create_unet(text_width: int) -> UNet2DConditionModel:
    """Returns AudioLDM's UNet, smaller: class-embedding conditioning, attention in the three deeper levels."""
    return UNet2DConditionModel(
        sample_size=64,
        in_channels=8,
        out_channels=8,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=list(CHANNELS),
        attention_head_dim=4,
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=text_width,
        class_embeddings_concat=True,
    )


def load_latents(args, vae: AutoencoderKL, split: str) -> torch.Tensor:
    """Returns the scaled latents of a split `[N, 8, 64, 8]`; computed once, so remove the file with a new `vae`.

    The clips' encodings lie in the cache that `train_melfusion.py --music_latents_cache` reads afterwards.
    """
    cache = MusicLatentCache(args.output / "cache/moments", vae)
    generator = torch.Generator().manual_seed(args.seed)

    def encode(row: dict) -> torch.Tensor:
        waveform = load_random_crop(args.data / row["audio"], 0.0, None, DURATION, generator)
        # Half the time of float32, and its error is small beside the posterior's own deviation.
        with torch.autocast("cpu", torch.bfloat16):
            return cache.encode(waveform[None], [generator])

    path = args.output / "cache" / f"latents_{split}.safetensors"
    return cached(path, lambda: torch.cat([encode(row) for row in read_rows(args.data, split)]))


@torch.no_grad()
def embed_captions(args, texts: list[str]) -> torch.Tensor:
    """Returns the unit text embeddings `[N, 128]` that the pipeline computes for these prompts."""
    encoder = ClapTextModelWithProjection.from_pretrained(args.output / "components/text_encoder").eval()
    tokenizer = RobertaTokenizer.from_pretrained(args.output / "components/tokenizer")
    distinct = {text: index for index, text in enumerate(dict.fromkeys(texts))}
    tokens = tokenizer(list(distinct), padding="max_length", truncation=True, return_tensors="pt")
    embeds = F.normalize(encoder(tokens.input_ids, attention_mask=tokens.attention_mask).text_embeds, dim=-1)
    return embeds[[distinct[text] for text in texts]]


def condition(embeds: torch.Tensor) -> dict:
    """Returns the arguments by which the UNet takes text embeddings `[N, 128]`."""
    return {"encoder_hidden_states": None, "class_labels": embeds}


def main() -> None:
    args = stage_parser(__doc__, steps=10000, batch_size=16, learning_rate=8e-4).parse_args()
    torch.manual_seed(args.seed)
    components = args.output / "components"
    vae = AutoencoderKL.from_pretrained(components / "vae").eval()
    latents, unseen = (load_latents(args, vae, split) for split in ("train", "validation"))
    rows = {split: read_rows(args.data, split) for split in ("train", "validation")}
    texts, unseen_texts = (embed_captions(args, ["", *(row["caption"] for row in rows[split])]) for split in rows)
    # Velocity weighs the high noise levels, where instrument and tempo are decided, more than noise prediction does.
    scheduler = create_scheduler(0.0015, 0.0195, "v_prediction")
    unet = create_unet(texts.shape[-1])
    state = args.output / "state/music_unet.safetensors"
    done = train_unet(args, state, unet, scheduler, latents, texts, condition)
    unet.save_pretrained(components / "unet")
    scheduler.save_pretrained(components / "scheduler")
    loss = validation_loss(unet, scheduler, unseen[:200], 0, **condition(unseen_texts[1:201]))
    print(f"{'done' if done else 'stopped'}: validation noise loss {loss:.4f}")


if __name__ == "__main__":
    main()

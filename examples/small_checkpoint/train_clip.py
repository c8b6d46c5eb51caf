"""Trains the small CLIP on pictures, descriptions and mood sentences; its text tower conditions the image UNet.

IMSM bridges pictures and music by texts: the mood sentences are that bridge, since the prompts say nothing of mood.
"""

import torch
from contrastive import contrastive_loss, mood_labels, mood_texts, retrieval_accuracy, train_tokenizer
from corpus import load_pictures, pixel_values, read_rows, unique_images
from mood import PICTURE_SIZE
from torch.nn import functional as F
from training_loop import Training, run, stage_parser
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
)

VOCABULARY_SIZE = 1500
MAX_TOKENS = 32
WIDTH = 128


def create_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Returns a CLIP of 128 channels: a text tower of two layers, a picture tower of four on 8 x 8 patches."""
    shape = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4, "projection_dim": WIDTH}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_TOKENS,
        num_hidden_layers=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shape,
    )
    vision = CLIPVisionConfig(image_size=PICTURE_SIZE, patch_size=8, num_hidden_layers=4, **shape)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH))


def create_processor(texts: list[str]) -> CLIPProcessor:
    """Returns a processor whose tokenizer is trained on `texts` and whose pictures are 64 pixels in [-1, 1]."""
    tokenizer = train_tokenizer(CLIPTokenizer, texts, VOCABULARY_SIZE, MAX_TOKENS)
    side = {"height": PICTURE_SIZE, "width": PICTURE_SIZE}
    images = CLIPImageProcessorPil(
        size={"shortest_edge": PICTURE_SIZE}, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def embed_texts(clip: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Returns unit embeddings `[N, 128]`."""
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    return F.normalize(clip.get_text_features(**tokens).pooler_output, dim=-1)


def embed_pictures(clip: CLIPModel, pictures: torch.Tensor) -> torch.Tensor:
    """Returns unit embeddings `[N, 128]` of uint8 pictures `[N, 3, 64, 64]`."""
    return F.normalize(clip.get_image_features(pixel_values(pictures)).pooler_output, dim=-1)


@torch.no_grad()
def mood_accuracy(clip: CLIPModel, tokenizer: CLIPTokenizer, args, split: str) -> float:
    """Returns how often the nearest of the mood sentences (averaged by bin) is that of the picture's bin."""
    rows = unique_images(read_rows(args.data, split))
    pictures = embed_pictures(clip, load_pictures(args.data, rows))
    return retrieval_accuracy(pictures, mood_labels(rows), lambda texts: embed_texts(clip, tokenizer, texts))


def main() -> None:
    args = stage_parser(__doc__, steps=1500, batch_size=48, learning_rate=5e-4).parse_args()
    torch.manual_seed(args.seed)
    rows = unique_images(read_rows(args.data, "train"))
    pictures, moods = load_pictures(args.data, rows), mood_labels(rows)
    descriptions = [row["description"] for row in rows]
    names = {name: label for label, name in enumerate(sorted({row["picture"] for row in rows}))}
    shown = torch.tensor([names[row["picture"]] for row in rows])
    sentences, sentence_moods = mood_texts()
    processor = create_processor(descriptions + sentences)
    clip = create_clip(processor.tokenizer)
    training = Training(clip, args.output / "state/clip.safetensors", args)

    def take_step(generator: torch.Generator) -> dict[str, torch.Tensor]:
        batch = torch.randint(len(rows), (args.batch_size,), generator=generator)
        flipped = torch.rand(args.batch_size, generator=generator) < 0.5
        seen = pictures[batch]
        images = embed_pictures(clip, torch.where(flipped[:, None, None, None], seen.flip(-1), seen))
        scale = clip.logit_scale.clamp(max=4.6).exp()
        told = embed_texts(clip, processor.tokenizer, [descriptions[index] for index in batch.tolist()])
        description = contrastive_loss(images, told, shown[batch], shown[batch], scale)
        mood = contrastive_loss(
            images, embed_texts(clip, processor.tokenizer, sentences), moods[batch], sentence_moods, scale
        )
        training.update(mood + 0.5 * description)
        return {"mood": mood, "description": description}

    done = run(training, take_step)
    training.use_average()
    folder = args.output / "components/clip"
    clip.save_pretrained(folder)
    processor.save_pretrained(folder)
    accuracy = mood_accuracy(clip, processor.tokenizer, args, "validation")
    print(f"{'done' if done else 'stopped'}: validation mood retrieval 1 of 9: {accuracy:.3f} (chance 0.111)")


if __name__ == "__main__":
    main()

"""Trains the small CLAP on clips, captions and mood sentences; its text tower conditions the music UNet."""

import argparse
from pathlib import Path

import torch
from contrastive import contrastive_loss, mood_labels, mood_texts, retrieval_accuracy, train_tokenizer
from corpus import load_features, read_rows
from music import GENRES, INSTRUMENTS, SAMPLING_RATE
from torch.nn import functional as F
from training_loop import Training, run, stage_parser
from transformers import (
    ClapAudioConfig,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    ClapProcessor,
    ClapTextConfig,
    ClapTextModelWithProjection,
    RobertaTokenizer,
)

VOCABULARY_SIZE = 600
MAX_TOKENS = 64
WIDTH = 128


def create_processor(texts: list[str]) -> ClapProcessor:
    """Returns a processor for clips of at most 6 s at 16 kHz: 256 frames of 64 mel bands."""
    features = ClapFeatureExtractor(
        feature_size=64,
        sampling_rate=SAMPLING_RATE,
        hop_length=376,
        max_length_s=6,
        fft_window_size=1024,
        frequency_max=8000,
        truncation="rand_trunc",
        padding="pad",
    )
    tokenizer = train_tokenizer(RobertaTokenizer, texts, VOCABULARY_SIZE, MAX_TOKENS)
    return ClapProcessor(feature_extractor=features, tokenizer=tokenizer)


def create_clap(tokenizer: RobertaTokenizer) -> ClapModel:
    """Returns a CLAP with 128-dimensional embeddings: two Swin stages hear, two layers read."""
    text = ClapTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS + 2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        projection_dim=WIDTH,
    )
    audio = ClapAudioConfig(
        spec_size=128,
        num_mel_bins=64,
        hidden_size=128,
        patch_size=8,
        patch_stride=[8, 8],
        patch_embeds_hidden_size=64,
        depths=[2, 2],
        num_attention_heads=[4, 8],
        num_hidden_layers=2,
        projection_dim=WIDTH,
    )
    return ClapModel(ClapConfig(text_config=text.to_dict(), audio_config=audio.to_dict(), projection_dim=WIDTH))


def embed_texts(clap: ClapModel, tokenizer: RobertaTokenizer, texts: list[str]) -> torch.Tensor:
    """Returns unit embeddings `[N, 128]`."""
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    return F.normalize(clap.get_text_features(**tokens).pooler_output, dim=-1)


def embed_audio(clap: ClapModel, features: torch.Tensor) -> torch.Tensor:
    """Returns unit embeddings `[N, 128]` of the audio tower's input `[N, 1, 256, 64]`."""
    is_longer = torch.zeros(len(features), 1, dtype=torch.bool)
    return F.normalize(clap.get_audio_features(features.float(), is_longer=is_longer).pooler_output, dim=-1)


def style_labels(rows: list[dict]) -> torch.Tensor:
    """Returns the index of each row's (instrument, genre): 32 in all."""
    pairs = [(instrument, genre) for instrument in INSTRUMENTS for genre in GENRES]
    return torch.tensor([pairs.index((row["instrument"], row["genre"])) for row in rows])


@torch.no_grad()
def accuracies(clap: ClapModel, processor: ClapProcessor, args: argparse.Namespace, split: str) -> dict[str, float]:
    """Returns how often a clip's nearest text names its instrument, its instrument and genre, and its mood bin."""
    rows = read_rows(args.data, split)
    features = load_features(args, split, processor.feature_extractor, "input_features")
    audio = torch.cat([embed_audio(clap, batch) for batch in features.split(32)])
    tokenizer, styles = processor.tokenizer, style_labels(rows)
    sentences = [f"a {genre} played on the {instrument}" for instrument in INSTRUMENTS for genre in GENRES]
    nearest = (audio @ embed_texts(clap, tokenizer, sentences).mT).argmax(dim=1)
    return {
        "instrument": (nearest // len(GENRES) == styles // len(GENRES)).float().mean().item(),
        "instrument_and_genre": (nearest == styles).float().mean().item(),
        "mood": retrieval_accuracy(audio, mood_labels(rows), lambda texts: embed_texts(clap, tokenizer, texts)),
    }


def save(clap: ClapModel, processor: ClapProcessor, folder: Path) -> None:
    """Saves CLAP with its processor, and its text tower and tokenizer as the pipeline's components."""
    clap.save_pretrained(folder / "clap")
    processor.save_pretrained(folder / "clap")
    ClapTextModelWithProjection.from_pretrained(folder / "clap").save_pretrained(folder / "text_encoder")
    processor.tokenizer.save_pretrained(folder / "tokenizer")


def main() -> None:
    args = stage_parser(__doc__, steps=1500, batch_size=32, learning_rate=5e-4).parse_args()
    torch.manual_seed(args.seed)
    rows = read_rows(args.data, "train")
    captions, styles, moods = [row["caption"] for row in rows], style_labels(rows), mood_labels(rows)
    sentences, sentence_moods = mood_texts()
    processor = create_processor(captions + sentences)
    features = load_features(args, "train", processor.feature_extractor, "input_features")
    clap = create_clap(processor.tokenizer)
    training = Training(clap, args.output / "state/clap.safetensors", args)

    def take_step(generator: torch.Generator) -> dict[str, torch.Tensor]:
        batch = torch.randint(len(rows), (args.batch_size,), generator=generator)
        texts = embed_texts(clap, processor.tokenizer, [captions[index] for index in batch.tolist()] + sentences)
        audio = embed_audio(clap, features[batch])
        scale = clap.logit_scale_a.clamp(max=4.6).exp()
        style = contrastive_loss(audio, texts[: len(batch)], styles[batch], styles[batch], scale)
        mood = contrastive_loss(audio, texts[len(batch) :], moods[batch], sentence_moods, scale)
        training.update(style + mood)
        return {"style": style, "mood": mood}

    done = run(training, take_step)
    training.use_average()
    save(clap, processor, args.output / "components")
    found = "  ".join(f"{name} {value:.3f}" for name, value in accuracies(clap, processor, args, "validation").items())
    print(f"{'done' if done else 'stopped'}: validation retrieval {found} (chance 0.125, 0.031, 0.111)")


if __name__ == "__main__":
    main()

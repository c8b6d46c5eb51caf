"""Tiny checkpoints of the real classes that judge clips and describe pictures, saved as their authors publish them."""

import torch
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    ClapProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    RobertaTokenizer,
)

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
LETTERS = {letter: index for index, letter in enumerate(ALPHABET, start=5)}
CLAP_TOKENS = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4, **LETTERS, "Ġ": 31}
CLIP_TOKENS = {"<|startoftext|>": 0, "<|endoftext|>": 1, **LETTERS, **{f"{k}</w>": v + 30 for k, v in LETTERS.items()}}
BLIP_TOKENS = {token: index for index, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *ALPHABET])}


def save_spread(model, folder):
    """Random weights of the default size hardly react to the input: larger ones make the comparisons strict."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    model.save_pretrained(folder)


def save_clap(folder, truncation="rand_trunc"):
    text = dict(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    audio = dict(patch_embeds_hidden_size=8, hidden_size=16, depths=[1, 1], num_attention_heads=[1, 2], window_size=4)
    audio.update(
        spec_size=64, num_mel_bins=16, patch_size=4, patch_stride=[4, 4], enable_fusion=truncation == "fusion"
    )
    config = ClapConfig(text_config={**text, "max_position_embeddings": 66}, audio_config=audio, projection_dim=16)
    save_spread(ClapModel(config), folder)
    tokenizer = RobertaTokenizer(vocab=CLAP_TOKENS, merges=[], model_max_length=64)
    extractor = ClapFeatureExtractor(16, 12000, 120, max_length_s=1, frequency_max=6000, truncation=truncation)
    ClapProcessor(extractor, tokenizer).save_pretrained(folder)
    return folder


def save_clip(folder):
    tower = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    text = dict(vocab_size=64, max_position_embeddings=32, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    config = CLIPConfig(
        text_config={**tower, **text}, vision_config={**tower, "image_size": 32, "patch_size": 16}, projection_dim=16
    )
    save_spread(CLIPModel(config), folder)
    tokenizer = CLIPTokenizer(vocab=CLIP_TOKENS, merges=[], model_max_length=32)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def save_ast(folder):
    size = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=7)
    save_spread(ASTForAudioClassification(ASTConfig(**size, num_mel_bins=32, max_length=100)), folder)
    ASTFeatureExtractor(num_mel_bins=32, max_length=100).save_pretrained(folder)
    return folder


def save_blip(folder):
    tower = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    tokens = dict(vocab_size=len(BLIP_TOKENS), bos_token_id=2, eos_token_id=3, sep_token_id=3, pad_token_id=0)
    text = {**tower, **tokens, "encoder_hidden_size": 16, "max_position_embeddings": 64}
    config = BlipConfig(
        text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 16}, projection_dim=16
    )
    save_spread(BlipForConditionalGeneration(config), folder)
    images = BlipImageProcessor(size={"height": 32, "width": 32})
    BlipProcessor(images, BertTokenizer(vocab=BLIP_TOKENS)).save_pretrained(folder)
    return folder

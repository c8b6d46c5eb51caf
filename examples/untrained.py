"""Small components of all the real classes with random weights: they run everywhere and have learnt nothing."""

import string

import torch
from diffusers import (
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
    AutoencoderKL,
    DDIMScheduler,
    UNet2DConditionModel,
)
from transformers import (
    ClapConfig,
    ClapModel,
    ClapTextConfig,
    ClapTextModelWithProjection,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaTokenizer,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from melfusion_pipeline import VisualSynapse


def music_unet(**changes) -> UNet2DConditionModel:
    """AudioLDM's shape: attention in the three deeper levels, conditioned by `class_labels`."""
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16, 16, 24),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": (8, 16, 16, 24),
        "class_embed_type": "simple_projection",
        "projection_class_embeddings_input_dim": 32,
        "class_embeddings_concat": True,
    }
    return UNet2DConditionModel(**{**config, **changes})


def audioldm2_unet(**changes) -> AudioLDM2UNet2DConditionModel:
    """AudioLDM 2's shape: after each resnet a transformer without text, one for each of two text sequences."""
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16, 16, 24),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": [[None, 12, 20]] * 4,
    }
    return AudioLDM2UNet2DConditionModel(**{**config, **changes})


def text_unet(**changes) -> UNet2DConditionModel:
    """Tango's shape: Stable Diffusion's, with one text sequence, of which a mask says what is padding."""
    config = {"sample_size": (8, 2), "cross_attention_dim": 20, "use_linear_projection": True}
    return picture_unet(**{**config, **changes})


def picture_unet(**changes) -> UNet2DConditionModel:
    """Stable Diffusion's shape: attention in all levels of the decoder but the deepest."""
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16, 24, 24),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 2,
        "cross_attention_dim": 24,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**{**config, **changes})


def byte_vocabulary(specials: list[str], end_of_word: str = "") -> dict[str, int]:
    """A byte-level BPE vocabulary, enough for any text without merges."""
    alphabet = list(bytes_to_unicode().values())
    tokens = dict.fromkeys(specials + alphabet + [letter + end_of_word for letter in alphabet])
    return {token: index for index, token in enumerate(tokens)}


def autoencoder(**changes) -> AutoencoderKL:
    """A VAE that halves the sides of its input twice."""
    config = {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 8,
        "layers_per_block": 1,
        "latent_channels": 4,
    }
    return AutoencoderKL(**{**config, **changes})


def ddim_scheduler(beta_start: float, beta_end: float) -> DDIMScheduler:
    """DDIM as the public checkpoints of Stable Diffusion and AudioLDM set it."""
    return DDIMScheduler(
        beta_start=beta_start,
        beta_end=beta_end,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )


def music_components(mel_bands: int) -> dict:
    """The text-to-music side, as in AudioLDM, without its UNet."""
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = RobertaTokenizer(vocab=byte_vocabulary(specials), merges=[], model_max_length=77)
    text_config = ClapTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=37,
        projection_dim=32,
        pad_token_id=1,
    )
    vocoder = SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=mel_bands,
            sampling_rate=16000,
            upsample_initial_channel=64,
            upsample_rates=[5, 4, 2, 2, 2],
            upsample_kernel_sizes=[16, 16, 8, 4, 4],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1, 3]],
            normalize_before=False,
        )
    )
    with torch.no_grad():
        # transformers' initial weights make a vocoder whose output is 1e-9, where nothing could be told apart.
        for parameter in vocoder.parameters():
            parameter.mul_(12.0)
    return {
        "vae": autoencoder(in_channels=1, out_channels=1, scaling_factor=0.9),
        "text_encoder": ClapTextModelWithProjection(text_config),
        "tokenizer": tokenizer,
        "scheduler": ddim_scheduler(0.0015, 0.0195),
        "vocoder": vocoder,
    }


def t5_components() -> dict:
    """A T5 encoder of 20 channels and its tokenizer, which knows single letters."""
    words = [("▁", -2.0), *((letter, -3.0) for letter in string.ascii_letters + string.digits + string.punctuation)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *words]
    config = T5Config(vocab_size=len(vocabulary), d_model=20, d_ff=37, d_kv=10, num_heads=2, num_layers=2)
    return {
        "text_encoder": T5EncoderModel(config),
        "tokenizer": T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=32),
    }


def audioldm2_components(mel_bands: int) -> dict:
    """The text-to-music side, as in AudioLDM 2, without its UNet: CLAP and T5, joined by a GPT-2 of 12 channels."""
    components = music_components(mel_bands)
    text_config = components["text_encoder"].config.to_dict() | {"projection_dim": 16}
    audio_config = {
        "spec_size": 32,
        "window_size": 4,
        "num_mel_bins": 32,
        "depths": [1, 1],
        "num_attention_heads": [1, 1],
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "patch_size": 4,
        "patch_stride": 4,
        "patch_embeds_hidden_size": 8,
        "projection_dim": 16,
    }
    t5 = t5_components()
    language_config = GPT2Config(
        n_embd=12, n_head=2, n_layer=2, vocab_size=8, n_positions=64, bos_token_id=0, eos_token_id=0, max_new_tokens=8
    )
    return components | {
        "text_encoder": ClapModel(ClapConfig(text_config=text_config, audio_config=audio_config, projection_dim=16)),
        "text_encoder_2": t5["text_encoder"],
        "tokenizer_2": t5["tokenizer"],
        "projection_model": AudioLDM2ProjectionModel(16, 20, 12),
        "language_model": GPT2LMHeadModel(language_config),
    }


def picture_components() -> dict:
    """The text-to-image side, as in Stable Diffusion, without its UNet."""
    tokenizer = CLIPTokenizer(
        vocab=byte_vocabulary(["<|startoftext|>", "<|endoftext|>"], "</w>"), merges=[], model_max_length=77
    )
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=37,
        bos_token_id=0,
        eos_token_id=1,
    )
    return {
        "image_vae": autoencoder(scaling_factor=0.18215),
        "image_text_encoder": CLIPTextModel(text_config),
        "image_tokenizer": tokenizer,
        "image_scheduler": ddim_scheduler(0.00085, 0.012),
    }


def text_components(mel_bands: int) -> dict:
    """The text-to-music side with one text sequence, as in Tango, without its UNet."""
    return music_components(mel_bands) | t5_components()


def components_at_48_khz() -> dict:
    """All components in the shape of AudioLDM's 48 kHz model: 256 bands, eight frames a latent one, 16 channels."""
    components = untrained_components()
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = autoencoder(
        in_channels=1,
        out_channels=1,
        latent_channels=16,
        block_out_channels=(8, 8, 8, 8),
        scaling_factor=0.9,
        **blocks,
    )
    config = components["vocoder"].config.to_dict()
    config |= {"model_in_dim": 256, "sampling_rate": 48000, "upsample_initial_channel": 64}
    config |= {"upsample_rates": [6, 5, 4, 2, 2], "upsample_kernel_sizes": [12, 10, 8, 4, 4]}
    vocoder = SpeechT5HifiGan(SpeechT5HifiGanConfig(**config))
    with torch.no_grad():
        for parameter in vocoder.parameters():
            parameter.mul_(12.0)
    unet = music_unet(in_channels=16, out_channels=16, sample_size=8)
    return components | {"vae": vae.eval(), "vocoder": vocoder.eval(), "unet": unet.eval()}


# The music side of each family of music models: its UNet, and all the rest.
FAMILIES = {
    "audioldm": (music_unet, music_components),
    "audioldm2": (audioldm2_unet, audioldm2_components),
    "text": (text_unet, text_components),
}


def untrained_components(
    seed: int = 0, mel_bands: int = 8, latent_frames: int = 8, family: str = "audioldm", layers: str | None = None
) -> dict:
    """Builds every component of a pipeline in eval mode, with random weights.

    Args:
        seed: Of the weights.
        mel_bands: Of the spectrogram; a multiple of 4.
        latent_frames: The default length of the music, in latent frames of 0.04 s.
        family: Of the music model: "audioldm", "audioldm2" or "text" (a UNet with one text sequence).
        layers: As `VisualSynapse.from_unets` takes it.

    Returns:
        The keyword arguments of `MelFusionPipeline`. The synapse has random alphas, so that the picture counts.
    """
    torch.manual_seed(seed)
    make_unet, make_music = FAMILIES[family]
    image_unet, unet = picture_unet(), make_unet(sample_size=latent_frames)
    components = {**make_music(mel_bands), **picture_components(), "image_unet": image_unet, "unet": unet}
    components["synapse"] = VisualSynapse.from_unets(image_unet, unet, layers=layers)
    torch.nn.init.uniform_(components["synapse"].alphas, 0.2, 0.8)
    for component in components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    return components

"""The public base models at full size with random weights, from their published architectures."""

import json
import sys
from collections.abc import Container
from pathlib import Path

import diffusers
import torch
import transformers

from melfusion_pipeline import VisualSynapse

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from untrained import music_components, picture_components  # noqa: E402

BASE_MODELS = json.loads(Path(__file__).with_name("base_models.json").read_text())
STABLE_DIFFUSION, AUDIOLDM = "stable-diffusion-v1-5/stable-diffusion-v1-5", "cvssp/audioldm-s-full-v2"
# The published scaling factor is learnt; its value does not matter for cost.
SCALING_FACTOR = 0.9


def build(description: dict) -> torch.nn.Module:
    """Instantiates one component of `base_models.json` with random weights."""
    config = dict(description["config"])
    if isinstance(config.get("scaling_factor"), str):
        config["scaling_factor"] = SCALING_FACTOR
    if description["library"] == "diffusers":
        return getattr(diffusers, description["class"])(**config)
    model_class = getattr(transformers, description["class"])
    return model_class(model_class.config_class(**config))


def build_components(
    image_model: str = STABLE_DIFFUSION, music_model: str = AUDIOLDM, only: Container[str] | None = None
) -> dict:
    """Builds the components of a full-size pipeline in the default dtype, on the default device, in eval mode.

    With `only`, no others are built; the synapse, fitted to both UNets, is built of their shapes alone.

    The tokenizers are the small ones of `examples/untrained.py`: their vocabularies do not change the cost.
    """
    image, music = BASE_MODELS["text_to_image"][image_model], BASE_MODELS["text_to_music"][music_model]
    names = ("vae", "text_encoder", "unet", "vocoder", "scheduler")
    descriptions = {name: music[name] for name in names if name in music}
    descriptions |= {f"image_{name}": image[name] for name in ("vae", "text_encoder", "unet", "scheduler")}
    wanted = [name for name in descriptions if only is None or name in only]
    components = {name: build(descriptions[name]) for name in wanted}
    with torch.device("cpu"):
        tokenizers = {
            "tokenizer": music_components(mel_bands=8)["tokenizer"],
            "image_tokenizer": picture_components()["image_tokenizer"],
        }
    components |= {name: tokenizer for name, tokenizer in tokenizers.items() if only is None or name in only}
    if "text_encoder" not in music:
        # Of AudioLDM 2 and others, whose text encoders the benchmarks leave out.
        components |= {"text_encoder": None, "tokenizer": None}
    if only is None or "synapse" in only:
        with torch.device("meta"):
            unets = [build(descriptions[name]) for name in ("image_unet", "unet")]
            config = VisualSynapse.from_unets(*unets).config
        components["synapse"] = VisualSynapse.from_config(config)
    for component in components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    return components

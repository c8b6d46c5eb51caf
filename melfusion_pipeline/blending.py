"""The visual synapse as a plug: `blend_image` lets any diffusers pipeline for music follow a picture."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers import ModelMixin

from .attention_melfusion import KVBlenders, use_attn_processors
from .checks_melfusion import check_synapse_scale
from .features_melfusion import ImageFeatures


@contextmanager
def blend_image(
    unet: ModelMixin,
    synapse: ModelMixin,
    image_features: ImageFeatures,
    synapse_scale: float | list[float] = 1.0,
    num_branches: int | None = None,
) -> Iterator[None]:
    """Blends a picture into whatever pipeline runs `unet` while the context is open.

    The visual synapse (MeLFusion, arXiv 2406.04673, section 3) for people who have a pipeline of their own, such as
    diffusers' `AudioLDM2Pipeline`. Before each pass of the UNet its timestep chooses the recorded keys and values; all
    guidance branches see the picture. Afterwards the UNet is as it was, also after an exception.

    What it cannot do: guide with the picture beside the text, and give a branch without it; let pictures follow one
    another in one piece, or denoise in windows; train (nothing in it has gradients: see
    `melfusion_pipeline.training`). The pipeline must count time as the training did (0 to 999; no flow matching or
    EDM) and have all rows at one timestep, must call the UNet as a module (`unet(...)`, not `unet.forward(...)`), and
    must neither change its attention processors nor share it with another thread meanwhile.

    Args:
        unet: The music UNet, a `UNet2DConditionModel` or `AudioLDM2UNet2DConditionModel`, compiled or not.
        synapse: A `VisualSynapse` made for it, on any device.
        image_features: What `MelFusionPipeline.encode_image` returns, or `ImageFeatures.load`.
        synapse_scale: Multiplies every alpha, or one number for each layer. 0 ignores the picture.
        num_branches: The guidance branches that the pipeline stacks in the UNet's batch: 2 with classifier-free
            guidance, 1 without it or where each has a pass of its own. One picture does without this; of several, each
            belongs to as many rows of a branch as there are waveforms for it, in the order of the prompts.

    Yields:
        None.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If UNet, synapse and features do not belong together or a value is out of range; in the UNet's pass
            if its batch cannot be shared out among the pictures, or its rows have several timesteps.
    """
    if not isinstance(image_features, ImageFeatures):
        raise TypeError(f"`image_features` must be `ImageFeatures`, got {type(image_features).__name__}.")
    synapse.check_unets(None, unet)
    synapse.check_image_features(image_features.keys)
    check_synapse_scale(synapse, synapse_scale)
    if num_branches not in (None, 1, 2):
        raise ValueError(f"`num_branches` must be 1, 2 or None, got {num_branches!r}.")
    if num_branches is None and image_features.num_images > 1:
        raise ValueError(
            f"`num_branches` must be given for {image_features.num_images} pictures: 2 if the pipeline stacks the two"
            " branches of classifier-free guidance in one batch, else 1."
        )
    blenders = KVBlenders(synapse.config.music_layers)
    reader = _FeatureReader(unet, synapse, image_features, synapse_scale, num_branches or 1, blenders)
    hook = unet.register_forward_pre_hook(reader, with_kwargs=True)
    try:
        with use_attn_processors(unet, blenders):
            yield
    finally:
        hook.remove()


class _FeatureReader:
    """A forward pre-hook of the UNet: sets what its pass blends.

    Its arguments are those of `blend_image` and the blending processors. What is fitted last is kept: the next pass is
    most often of the same recorded step, size of the latents and lengths of the texts.
    """

    def __init__(
        self,
        unet: ModelMixin,
        synapse: ModelMixin,
        image_features: ImageFeatures,
        synapse_scale: float | list[float],
        num_branches: int,
        blenders: KVBlenders,
    ) -> None:
        # Of a compiled UNet the module inside; a UNet with offload hooks keeps the signature of its own forward.
        self.signature = inspect.signature(getattr(unet, "_orig_mod", unet).forward)
        self.synapse, self.image_features, self.synapse_scale = synapse, image_features, synapse_scale
        self.num_branches, self.blenders = num_branches, blenders
        self.fitted_for: tuple[int, list[int]] | None = None

    @torch.no_grad()
    def __call__(self, unet: ModelMixin, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self.signature.bind(*args, **kwargs).arguments
        sample = call["sample"]
        rows = self.num_branches * self.image_features.num_images
        if self.image_features.num_images > 1 and len(sample) % rows:
            raise ValueError(
                f"The UNet was called with {len(sample)} rows, which {self.image_features.num_images} pictures in"
                f" {self.num_branches} guidance branches cannot share: pass as many prompts as pictures, and the"
                " `num_branches` of the pipeline."
            )
        timesteps = torch.as_tensor(call["timestep"]).flatten()
        # One timestep, as diffusers' pipelines pass it, need not be waited for.
        if len(timesteps) > 1 and not (timesteps == timesteps[0]).all():
            raise ValueError(f"`blend_image` needs all rows at one timestep, got {timesteps.tolist()}.")
        (step,) = self.image_features.nearest(timesteps[:1]).tolist()
        self._fit(step, sample, call)
        self.blenders.read(self.fitted.at_step(0), self.alphas)

    def _fit(self, step: int, sample: torch.Tensor, call: dict[str, Any]) -> None:
        texts = [call.get(name) for name in ("encoder_hidden_states", "encoder_hidden_states_1")]
        # AudioLDM 2's UNet takes the first text where there is no second.
        first, second = texts[0], texts[0] if texts[1] is None else texts[1]
        lengths = {"encoder_hidden_states": first, "encoder_hidden_states_1": second}
        lengths = {name: text.shape[1] for name, text in lengths.items() if text is not None}
        num_tokens = self.synapse.num_tokens(*sample.shape[-2:], lengths)
        if (step, num_tokens) == self.fitted_for:
            return
        features = self.image_features.select(step)
        keys, values, alphas = self.synapse(features.keys, features.values, num_tokens, self.synapse_scale)
        self.fitted, self.fitted_for = replace(features, keys=keys, values=values), (step, num_tokens)
        self.alphas = alphas[:, None].expand(-1, self.num_branches)

"""Counts the floating-point operations of MeLFusion against text-to-music, exactly, on the meta device.

python benchmarks/count_flops.py

Every number is counted on the code that runs, with the real architectures: no weights, no clock, any machine.
"""

import argparse
import functools
from collections.abc import Callable

import torch
from diffusers import AutoencoderTiny
from full_size import AUDIOLDM, BASE_MODELS, STABLE_DIFFUSION, build_components
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.attention_melfusion import KVBlenders, use_attn_processors
from melfusion_pipeline.denoising_melfusion import double_first_branch_in_decoder
from melfusion_pipeline.inversion_melfusion import record_image_features

MUSIC_MODELS = [name for name in BASE_MODELS["text_to_music"] if name.startswith("cvssp/audioldm-")]
FAMILIES = [AUDIOLDM, "audioldm-48k", "cvssp/audioldm2", "cvssp/audioldm2-large", "declare-lab/tango"]
AUDIO_LENGTH_IN_S = 10.24
# As `from_base_models` notes it: one window.
LENGTH = {"default_window_length_in_s": AUDIO_LENGTH_IN_S}
# Of T5's text: as much as AudioLDM 2 takes. GPT-2 makes eight tokens of it.
TEXT_TOKENS, GENERATED_TOKENS = 128, 8
INVERSION_STEPS = 10


def count(function: Callable, *args, **kwargs) -> tuple[float, object]:
    """Runs `function` and gives its TFLOP and its result."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        result = function(*args, **kwargs)
    return counter.get_total_flops() / 1e12, result


def text_arguments(unet: torch.nn.Module, rows: int = 2) -> dict[str, torch.Tensor | None]:
    """What a prompt becomes for a music UNet, for so many guidance branches, on the meta device."""
    config, meta = unet.config, torch.device("meta")
    if config.class_embed_type is not None:
        labels = torch.empty(rows, config.projection_class_embeddings_input_dim, device=meta)
        return {"encoder_hidden_states": None, "class_labels": labels}
    mask = torch.empty(rows, TEXT_TOKENS, device=meta)
    if isinstance(config.cross_attention_dim, int):
        text = torch.empty(rows, TEXT_TOKENS, config.cross_attention_dim, device=meta)
        return {"encoder_hidden_states": text, "encoder_attention_mask": mask}
    _, first, second = config.cross_attention_dim[0]
    return {
        "encoder_hidden_states": torch.empty(rows, GENERATED_TOKENS, first, device=meta),
        "encoder_hidden_states_1": torch.empty(rows, TEXT_TOKENS, second, device=meta),
        "encoder_attention_mask_1": mask,
    }


class Counted:
    """The TFLOP of each part of one pipeline at one picture size, for one prompt and one picture.

    The text encoders are left out: the same on both sides of every ratio, but for CLIP's single pass of 0.01 TFLOP.
    """

    def __init__(self, pipe: MelFusionPipeline, image_size: int, inversion_steps: int = INVERSION_STEPS) -> None:
        latents = torch.empty(2, *pipe._latent_shape(AUDIO_LENGTH_IN_S), device="meta")
        text = text_arguments(pipe.unet)
        prompts = {name: rows for name, rows in text.items() if rows is not None}
        timestep = torch.empty((), device="meta")
        side = image_size // pipe.image_vae_scale_factor
        image_latents = torch.empty(1, pipe.image_unet.config.in_channels, side, side, device="meta")
        null = torch.empty(1, 77, pipe.image_unet.config.cross_attention_dim, device="meta")

        pixels = torch.empty(1, 3, image_size, image_size, device="meta")
        self.image_vae, _ = count(pipe.image_vae.encode, pixels)
        self.image_pass, _ = count(pipe.image_unet, image_latents, timestep, null)
        layers = pipe.synapse.config.image_layers
        record = (pipe.image_unet, pipe.image_scheduler, image_latents, null, layers, inversion_steps)
        self.inversion, features = count(
            record_image_features, *record, progress_bar=functools.partial(tqdm, disable=True)
        )
        self.fit, (fitted, alphas) = count(pipe.fit_image_features, features, latents, 1.0, prompts)
        self.feature_bytes = features.nbytes // 2

        self.step, _ = count(pipe.unet, latents, timestep, **text)
        self.blended_step = self._count_blended_step(pipe, fitted.at(0), 2)
        self.guided_step = self._count_blended_step(pipe, fitted.at(0), 3)
        with double_first_branch_in_decoder(pipe.unet):
            self.shared_step = self._count_blended_step(pipe, fitted.at(0), 2, branches=3)
        mel = torch.empty(1, pipe._num_frames(AUDIO_LENGTH_IN_S), pipe.vocoder.config.model_in_dim, device="meta")
        self.vae, _ = count(pipe.decode_latents, latents[:1])
        self.vocoder, _ = count(pipe.vocoder, mel)

    def _count_blended_step(
        self, pipe: MelFusionPipeline, fitted: dict, rows: int, branches: int | None = None
    ) -> float:
        """Counts a music step with `rows` in the encoder and as many in the decoder, or `branches`."""
        latents = torch.empty(rows, *pipe._latent_shape(AUDIO_LENGTH_IN_S), device="meta")
        blenders = KVBlenders(pipe.synapse.config.music_layers)
        blenders.read(fitted, torch.empty(len(blenders), branches or rows, device="meta"))
        with use_attn_processors(pipe.unet, blenders):
            timestep = torch.empty((), device="meta")
            return count(pipe.unet, latents, timestep, **text_arguments(pipe.unet, rows))[0]

    def text_to_music(self, steps: int) -> float:
        return steps * self.step + self.vae + self.vocoder

    def with_features(self, steps: int) -> float:
        return self.fit + steps * self.blended_step + self.vae + self.vocoder

    def default(self, steps: int) -> float:
        return self.with_features(steps) + self.image_vae + self.inversion

    def guided(self, steps: int, shared: bool = True, end: float = 1.0) -> float:
        """With a fresh picture that guides beside the text, in that share of the steps."""
        first, guided_step = round(end * steps), self.shared_step if shared else self.guided_step
        music = first * guided_step + (steps - first) * self.blended_step
        return self.image_vae + self.inversion + self.fit + music + self.vae + self.vocoder

    def to_the_letter(self, steps: int) -> float:
        """As many inversion as denoising steps, then as many passes that record: section 3 of the paper."""
        return self.text_to_music(steps) + self.image_vae + 2 * steps * self.image_pass

    def authors(self, steps: int) -> float:
        """The authors' code: one pass of the picture's UNet a step, from noise; the picture is never encoded."""
        return self.text_to_music(steps) + steps * self.image_pass


def print_parts(counted: Counted) -> None:
    recording = counted.inversion / (INVERSION_STEPS * counted.image_pass) - 1
    print(
        f"\nParts, TFLOP: image VAE encoder {counted.image_vae:.3f}, one pass of the picture's UNet"
        f" {counted.image_pass:.3f}, one music step with guidance {counted.step:.3f}, VAE decoder {counted.vae:.3f},"
        f" vocoder {counted.vocoder:.3f}, fitting the features once {counted.fit:.4f}.\n"
        f"Recording adds {100 * recording:.2f}% to a pass; blending adds"
        f" {100 * (counted.blended_step / counted.step - 1):.2f}% to a step."
        f" Features of {INVERSION_STEPS} steps: {counted.feature_bytes / 1e6:.0f} MB in fp16."
    )


def print_goal() -> None:
    """Prints what a fresh picture and a prompt cost with picture guidance, change by change, with AudioLDM-S."""
    with torch.device("meta"):
        pipe = MelFusionPipeline(**build_components(music_model=AUDIOLDM), **LENGTH)
    ten, two = Counted(pipe, 512), Counted(pipe, 512, 2)
    smaller = Counted(pipe, 384, 2)
    pipe.image_vae = AutoencoderTiny().to("meta")
    tiny = Counted(pipe, 512, 2), Counted(pipe, 384, 2)
    rows = {
        "the paper to the letter, 50 steps": ten.to_the_letter(50),
        "text-to-music, 50 steps": ten.text_to_music(50),
        "text-to-music, 10 steps": ten.text_to_music(10),
        "text-to-music, 6 steps": ten.text_to_music(6),
        "25 steps of three branches, ten inversion steps: the small checkpoint's first setting": ten.guided(25, False),
        "10 steps": ten.guided(10, False),
        "and branches of one text share down and mid blocks (exact)": ten.guided(10),
        "and the picture guides in the first half": ten.guided(10, end=0.5),
        "and two inversion steps": two.guided(10, end=0.5),
        "and 6 steps": two.guided(6, end=0.5),
        "and a lightweight VAE for the picture": tiny[0].guided(6, end=0.5),
        "instead, 384 px": smaller.guided(6, end=0.5),
        "384 px and the lightweight VAE": tiny[1].guided(6, end=0.5),
    }
    print("\n| a fresh picture of 512 px and a prompt, AudioLDM-S | TFLOP | of text-to-music, 50 steps |")
    print("|---|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value:.2f} | {value / ten.text_to_music(50):.3f} |", flush=True)
    stages = (("ten inversion steps", ten), ("two", two), ("two, 384 px", smaller), ("two, lightweight VAE", tiny[0]))
    stages = [f"{name} {counted.image_vae + counted.inversion:.2f}" for name, counted in stages]
    print(f"\nThe picture's stage alone, TFLOP: {', '.join(stages)}.")


def print_family(music_model: str, steps: int = 50) -> None:
    """Prints one row: layers, parameters and operations of one music model with a picture of 512 pixels."""
    with torch.device("meta"):
        pipe = MelFusionPipeline(**build_components(music_model=music_model), **LENGTH)
    counted, synapse = Counted(pipe, 512), pipe.synapse
    base, latents = counted.text_to_music(steps), pipe._latent_shape(AUDIO_LENGTH_IN_S)
    attends = "the text" if synapse.music_texts[0] else "the music"
    cells = [music_model.split("/")[-1], " x ".join(map(str, latents)), f"{pipe.unet.num_parameters() / 1e6:.0f} M"]
    cells += [f"{len(synapse.music_texts)}, {attends}", f"{synapse.num_parameters() / 1e6:.2f} M"]
    cells += [f"{value:.3f}" for value in (counted.step, counted.fit, base)]
    cells += [f"{way(steps) / base:.3f}" for way in (counted.default, counted.with_features)]
    print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    print(f"{STABLE_DIFFUSION} with AudioLDM, {AUDIO_LENGTH_IN_S} s, {INVERSION_STEPS} inversion steps, one picture.")
    print("Ratios to text-to-music (in TFLOP) with the same model and steps.\n")
    print("| model | picture | steps | text-to-music | default | given features | to the letter | authors' code |")
    print("|---|---|---|---|---|---|---|---|")
    for music_model in MUSIC_MODELS:
        with torch.device("meta"):
            pipe = MelFusionPipeline(**build_components(music_model=music_model), **LENGTH)
        for image_size in (512, 256):
            counted = Counted(pipe, image_size)
            for steps in (10, 50, 200):
                base = counted.text_to_music(steps)
                ways = (counted.default, counted.with_features, counted.to_the_letter, counted.authors)
                ratios = " | ".join(f"{way(steps) / base:.3f}" for way in ways)
                print(f"| {music_model.split('/')[1]} | {image_size} px | {steps} | {base:.2f} | {ratios} |")
            if image_size == 512:
                print_parts(counted) if music_model == MUSIC_MODELS[0] else None
    print("\nAll families, 50 steps, picture of 512 px; TFLOP, ratios to text-to-music.\n")
    print(
        "| model | latents | UNet | layers, attend to | synapse | a step | fit | 50 steps | default | given features |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for music_model in FAMILIES:
        print_family(music_model)
    print_goal()


if __name__ == "__main__":
    main()

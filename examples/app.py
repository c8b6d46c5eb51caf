"""A web demo: a picture and a prompt become music. Needs the extra `app`.

python examples/app.py --checkpoint user/repo

Then open http://localhost:7860. From other machines (`--host 0.0.0.0`) browsers give the webcam to https pages only.
"""

import argparse
import hashlib
import html
import re
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import app_given_audio
import app_slideshow
import gradio as gr
import PIL.Image
import torch
from command_line import errors_in_one_line
from diffusers.utils.torch_utils import get_device

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.audio import save_audio
from melfusion_pipeline.features_melfusion import ImageFeatures
from melfusion_pipeline.pictures_melfusion import to_rgb
from melfusion_pipeline.plotting import plot_mel_spectrogram

EXAMPLES = Path(__file__).parent
MAX_VARIATIONS = 4
MAX_UPLOAD = "10mb"
# A small file can hold an enormous picture.
MAX_PIXELS = 50_000_000
MAX_CHARACTERS = 300
MAX_SEED = 99_999
MAX_QUEUE = 8
# With Stable Diffusion 1.5 one picture's features take 300 MB in float32.
MAX_CACHED_BYTES = 1_500_000_000
# After this many seconds the server deletes what was uploaded and made.
KEPT_SECONDS = 3600
THEME = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
INTRODUCTION = (
    "## A picture and a sentence become music\n"
    "Choose a picture, say what should play, and listen. Without a picture the sentence alone counts."
)


class FeatureCache:
    """The features of the last pictures: another prompt, seed or length does not invert the picture again.

    Args:
        pipe: The pipeline that encodes pictures.
        max_bytes: What the features together may take; the last picture's stay in any case.
    """

    def __init__(self, pipe: MelFusionPipeline, max_bytes: int = MAX_CACHED_BYTES) -> None:
        self.pipe, self.max_bytes = pipe, max_bytes
        self.features: OrderedDict[tuple, ImageFeatures] = OrderedDict()

    def __call__(self, image: PIL.Image.Image, **settings: Any) -> ImageFeatures:
        """Gives `pipe.encode_image(image, **settings)`, on the CPU; equal pixels and settings are encoded once."""
        image = to_rgb(image)
        key = (hashlib.sha256(image.tobytes()).hexdigest(), image.size, *sorted(settings.items()))
        if key not in self.features:
            self.features[key] = self.pipe.encode_image(image, **settings).to("cpu")
        self.features.move_to_end(key)
        while len(self.features) > 1 and sum(kept.nbytes for kept in self.features.values()) > self.max_bytes:
            self.features.popitem(last=False)
        return self.features[key]


@torch.no_grad()
def make_music(
    pipe: MelFusionPipeline,
    cache: FeatureCache,
    image: PIL.Image.Image | None,
    prompt: str,
    audio_length_in_s: float,
    num_inference_steps: int,
    guidance_scale: float,
    image_guidance_scale: float,
    synapse_scale: float,
    seeds: list[int],
    progress: Callable[..., Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Makes one piece of music for each seed; what is not explained here is as in the pipeline's call.

    Args:
        pipe: The pipeline.
        cache: Where the picture's features come from.
        image: None for plain text-to-music.
        seeds: One a variation; a variation depends on its own seed only.
        progress: Called as `progress((step, steps), desc=text)`, as `gradio.Progress`.

    Returns:
        Log-mel spectrograms `[seeds, frames, bands]` and waveforms `[seeds, samples]`, on the CPU.
    """
    features = None
    if image is not None:
        progress((0, num_inference_steps), desc="Looking at the picture")
        features = cache(image)

    def report(pipe: MelFusionPipeline, step: int, timestep: Any, tensors: dict) -> dict:
        progress((min(step + 1, num_inference_steps), num_inference_steps), desc="Making music")
        return {}

    mel_spectrograms = pipe(
        prompt=prompt,
        image_features=features,
        audio_length_in_s=audio_length_in_s,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        image_guidance_scale=image_guidance_scale if features else None,
        synapse_scale=synapse_scale,
        num_waveforms_per_prompt=len(seeds),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="mel",
        callback_on_step_end=report,
    ).audios
    return mel_spectrograms, pipe.mel_spectrogram_to_waveform(mel_spectrograms, audio_length_in_s)


def write_variation(
    folder: str, prompt: str, seed: int, mel_spectrogram: torch.Tensor, waveform: torch.Tensor, sampling_rate: int
) -> tuple[str, str]:
    """Writes the WAV of `waveform` `[samples]` and a drawing of `[frames, bands]`; returns the two paths."""
    words = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:40] or "music"
    wav = Path(folder, f"{words}-{seed}.wav")
    save_audio(wav, waveform, sampling_rate)
    figure = plot_mel_spectrogram(
        mel_spectrogram, len(waveform) / sampling_rate / len(mel_spectrogram), "mel spectrogram"
    )
    # Narrow and dense, so that the letters can be read on a phone.
    figure.set_size_inches(5.5, 2.5)
    figure.savefig(wav.with_suffix(".png"), dpi=160)
    return str(wav), str(wav.with_suffix(".png"))


class PictureInput(gr.Image):
    """Gradio's picture, which says what is wrong with a file instead of failing on it."""

    # To the browser it is its parent.
    is_template = True

    def preprocess(self, payload: Any) -> PIL.Image.Image | None:
        """Opens the upload.

        Raises:
            gradio.Error: If it is no picture, is damaged, or has too many pixels.
        """
        try:
            if payload is not None and payload.path is not None:
                # The header only: the parent may read the pixels.
                with PIL.Image.open(payload.path) as header:
                    if header.width * header.height > MAX_PIXELS:
                        raise PIL.Image.DecompressionBombError
            image = super().preprocess(payload)
            if image is not None:
                image.load()
            return image
        except PIL.Image.DecompressionBombError as error:
            raise user_error(f"The picture has more than {MAX_PIXELS:,} pixels. Make it smaller first.") from error
        # Pillow's decoders let anything out that a damaged file provokes.
        except Exception as error:
            raise user_error("This file cannot be read as a picture. Try a JPEG, PNG or WebP file.") from error


def user_error(message: str) -> gr.Error:
    """An error for the user of the page; `message` is plain text, and the page takes HTML."""
    return gr.Error(html.escape(message), print_exception=False)


def responder(pipe: MelFusionPipeline, cache: FeatureCache) -> Callable[..., Iterator[list]]:
    """Builds what the button calls: from the values of the inputs to those of the outputs."""

    def respond(
        image: PIL.Image.Image | None,
        prompt: str,
        audio_length_in_s: float,
        num_inference_steps: float,
        guidance_scale: float,
        image_guidance_scale: float,
        synapse_scale: float,
        seed: float,
        num_variations: float,
        progress: Callable[..., Any] = gr.Progress(),
    ) -> Iterator[list]:
        prompt = (prompt or "").strip()
        if image is None and not prompt:
            raise user_error("There is nothing to make music of: choose a picture, write a sentence, or both.")
        if len(prompt) > MAX_CHARACTERS:
            raise user_error(f"The sentence is longer than {MAX_CHARACTERS} characters.")
        try:
            seeds = [int(seed) + index for index in range(int(num_variations))]
            settings = (audio_length_in_s, int(num_inference_steps), guidance_scale, image_guidance_scale)
            arguments = (*settings, synapse_scale, seeds, progress)
            mel_spectrograms, waveforms = make_music(pipe, cache, image, prompt, *arguments)
        except (ValueError, TypeError, FloatingPointError) as error:
            raise user_error(str(error)) from error
        except torch.OutOfMemoryError as error:
            raise user_error("The memory does not suffice: try shorter music or fewer variations.") from error

        # Gradio copies the files to its own cache before it comes back for more.
        with tempfile.TemporaryDirectory() as folder:
            outputs = []
            for single in zip(seeds, mel_spectrograms, waveforms):
                wav, drawing = write_variation(folder, prompt, *single, pipe.sampling_rate)
                label = f"Variation with seed {single[0]}"
                shown = [gr.update(value=path, visible=True) for path in (wav, drawing)]
                outputs += [gr.update(visible=True), gr.update(value=wav, label=label), *shown]
            outputs += [gr.update(visible=False), None, None, None] * (MAX_VARIATIONS - len(seeds))
            yield outputs

    return respond


def settings_inputs(pipe: MelFusionPipeline) -> list[gr.Slider]:
    """Draws the sliders, in the order in which the button's function takes their values."""
    guidance = {"label": "Guidance", "info": "How closely the music follows the sentence."}
    image_guidance = {"label": "Picture guidance", "info": "How closely it follows the picture; 1: unguided."}
    steps = pipe.config.default_num_inference_steps
    default = pipe.default_audio_length_in_s
    return [
        gr.Slider(1.0, max(2 * default, 10.24), round(default, 2), step=0.01, label="Length (s)"),
        gr.Slider(1, max(2 * steps, 50), steps, step=1, label="Steps", info="More are slower and finer."),
        gr.Slider(1.0, 10.0, pipe.config.default_guidance_scale, step=0.1, **guidance),
        gr.Slider(1.0, 20.0, pipe.config.default_image_guidance_scale or 1.0, step=0.5, **image_guidance),
        gr.Slider(0.0, 2.0, 1.0, step=0.05, label="Synapse scale", info="How much the picture counts; 0: not at all."),
        gr.Slider(0, MAX_SEED, 0, step=1, label="Seed", info="Another number gives other music."),
        gr.Slider(1, MAX_VARIATIONS, 1, step=1, label="Variations", info="Made at once, with the next seeds."),
    ]


def draw_tab(pipe: MelFusionPipeline, cache: FeatureCache) -> None:
    """Draws the tab for one picture and connects its button, within the page that is being built."""
    pictures = sorted((EXAMPLES / "images").glob("*.jpg"))
    with gr.Row():
        with gr.Column(min_width=320):
            picture = PictureInput(
                type="pil", image_mode=None, sources=["upload", "webcam"], label="Picture", height=280
            )
            gr.Examples(
                [[str(path)] for path in pictures],
                picture,
                label="Or one of these",
                cache_examples=False,
                examples_per_page=len(pictures),
            )
            prompt = gr.Textbox(label="What should play", placeholder="a waltz for piano", max_length=MAX_CHARACTERS)
            with gr.Accordion("Settings", open=False):
                settings = settings_inputs(pipe)
            button = gr.Button("Make music", variant="primary")
        with gr.Column(min_width=320):
            outputs = []
            for index in range(MAX_VARIATIONS):
                with gr.Column(visible=index == 0) as column:
                    audio = gr.Audio(label="Music", interactive=False, buttons=[])
                    download = gr.DownloadButton("Download WAV", size="md", visible=False)
                    mel = gr.Image(
                        label="Mel spectrogram",
                        # It would cover the drawing, which has a title.
                        show_label=False,
                        interactive=False,
                        visible=False,
                        buttons=[],
                    )
                outputs += [column, audio, download, mel]
    # The function has nothing to do: opening an upload says at once what is wrong with it. Then it goes away.
    quietly = {"show_progress": "hidden", "api_visibility": "private"}
    picture.upload(lambda image: None, picture, None, **quietly).failure(lambda: None, None, picture, **quietly)
    gr.on(
        [button.click, prompt.submit],
        responder(pipe, cache),
        [picture, prompt, *settings],
        outputs,
        # A pipeline serves one caller at a time.
        concurrency_limit=1,
        concurrency_id="pipeline",
        trigger_mode="once",
        scroll_to_output=True,
        show_progress_on=outputs[1],
        api_name="make_music",
    )


def build_app(pipe: MelFusionPipeline, max_cached_bytes: int = MAX_CACHED_BYTES) -> gr.Blocks:
    """Builds the page, its sliders at the checkpoint's defaults; `launch_app` starts it."""
    forget, cache = (60, KEPT_SECONDS), FeatureCache(pipe, max_cached_bytes)
    with gr.Blocks(title="MeLFusion", analytics_enabled=False, delete_cache=forget) as app:
        gr.Markdown(INTRODUCTION)
        with gr.Tab("Picture"):
            draw_tab(pipe, cache)
        with gr.Tab("Slide show"):
            app_slideshow.draw_tab(pipe, MAX_PIXELS, MAX_CHARACTERS, MAX_SEED, user_error)
        with gr.Tab("Your music"):
            picture = PictureInput(
                type="pil", image_mode=None, sources=["upload"], label="Picture for it", render=False
            )
            app_given_audio.draw_tab(pipe, cache, picture, MAX_CHARACTERS, MAX_SEED, user_error)
    return app.queue(max_size=MAX_QUEUE)


def launch_app(app: gr.Blocks, host: str = "127.0.0.1", port: int | None = None, **options: Any) -> str:
    """Starts the server; returns its address. `options` are those of `gradio.Blocks.launch`."""
    _, address, _ = app.launch(
        server_name=host,
        server_port=port,
        max_file_size=MAX_UPLOAD,
        theme=THEME,
        footer_links=[],
        ssr_mode=False,
        **options,
    )
    return address


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=EXAMPLES.parent, help="folder or Hub id; default: the bundled one")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, default=7860)
    arguments = parser.parse_args()
    if not 0 < arguments.port < 65536:
        parser.error(f"--port must be in [1, 65535], got {arguments.port}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    pipe = MelFusionPipeline.from_pretrained(arguments.checkpoint)
    pipe.to(get_device())
    launch_app(build_app(pipe), arguments.host, arguments.port)


if __name__ == "__main__":
    with errors_in_one_line():
        main()

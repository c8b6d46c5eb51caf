"""The second tab of the web demo: several pictures and a sentence become a slide show with music."""

import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import PIL.Image
import torch
from slideshow import SIDE, lay_out

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.onsets import find_onsets, move_to_onsets
from melfusion_pipeline.scoring import read_picture, write_slideshow

MAX_PICTURES = 24
SIZE = (1280, 720)


def write_show(
    pipe: MelFusionPipeline,
    paths: list[str],
    prompt: str,
    seconds: float,
    seed: int,
    output: Path,
    progress: Callable[..., Any],
) -> None:
    """Writes the slide show of `paths`, `seconds` each, to `output`.

    Args:
        progress: Called as `progress((step, steps), desc=text)`, as `gradio.Progress`.
    """
    starts, duration = lay_out(len(paths), [seconds], None)
    steps = pipe.config.default_num_inference_steps
    progress((0, steps), desc="Looking at the pictures")

    def report(pipe: MelFusionPipeline, step: int, timestep: Any, tensors: dict) -> dict:
        progress((min(step + 1, steps), steps), desc="Making music")
        return {}

    waveform = pipe(
        [read_picture(path, SIDE) for path in paths],
        prompt,
        image_start_in_s=starts,
        audio_length_in_s=duration,
        generator=torch.Generator().manual_seed(seed),
        callback_on_step_end=report,
        output_type="pt",
    ).audios[0]
    progress((steps, steps), desc="Writing the film")
    changes = move_to_onsets(starts, duration, *find_onsets(waveform, pipe.sampling_rate))
    write_slideshow(output, map(read_picture, paths), changes, waveform, pipe.sampling_rate, SIZE)


def check_pictures(paths: list[str] | None, max_pixels: int, refuse: Callable[[str], Exception]) -> list[str]:
    """Checks uploads before anything is made of them.

    Args:
        paths: The files in their order.
        max_pixels: A small file can hold an enormous picture.
        refuse: Makes the error for the user of a message.

    Raises:
        gradio.Error: If there are too few, too many, or one is no usable picture; it is named.
    """
    if not paths or len(paths) > MAX_PICTURES:
        raise refuse(f"A slide show takes 1 to {MAX_PICTURES} pictures, and there are {len(paths or [])}.")
    for path in paths:
        name = Path(path).name
        try:
            with PIL.Image.open(path) as header:
                pixels = header.width * header.height
            if pixels <= max_pixels:
                read_picture(path)
        except Exception as error:
            raise refuse(f"{name} cannot be read as a picture. Try a JPEG, PNG or WebP file.") from error
        if pixels > max_pixels:
            raise refuse(f"{name} has more than {max_pixels:,} pixels. Make it smaller first.")
    return paths


def responder(
    pipe: MelFusionPipeline, max_pixels: int, max_characters: int, refuse: Callable[[str], Exception]
) -> Callable[..., Iterator[list]]:
    """Builds what the button calls: from the values of the inputs to the film and its download."""

    def respond(
        paths: list[str] | None, prompt: str, seconds: float, seed: float, progress: Callable = gr.Progress()
    ) -> Iterator[list]:
        paths, prompt = check_pictures(paths, max_pixels, refuse), (prompt or "").strip()
        if not prompt or len(prompt) > max_characters:
            raise refuse(f"Say in 1 to {max_characters} characters what should play.")
        if seed is None:
            raise refuse("The seed is empty: write a whole number, such as 0.")
        words = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:40] or "slideshow"
        # Gradio copies the file to its own cache before it comes back for more.
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder, f"{words}.mp4")
            try:
                write_show(pipe, paths, prompt, seconds, int(seed), output, progress)
            except (ValueError, TypeError, FloatingPointError) as error:
                raise refuse(str(error)) from error
            except torch.OutOfMemoryError as error:
                raise refuse("The memory does not suffice: try fewer pictures or less time for each.") from error
            yield [str(output), gr.update(value=str(output), visible=True)]

    return respond


def draw_tab(
    pipe: MelFusionPipeline, max_pixels: int, max_characters: int, max_seed: int, refuse: Callable[[str], Exception]
) -> None:
    """Draws the tab and connects its button, within the page that is being built."""
    with gr.Row():
        with gr.Column(min_width=320):
            files = gr.File(
                label="Pictures: drag them into their order",
                file_count="multiple",
                file_types=["image"],
                allow_reordering=True,
                height=220,
            )
            shown = gr.Gallery(
                label="In this order",
                show_label=False,
                interactive=False,
                columns=4,
                height=180,
                buttons=[],
                visible=False,
            )
            prompt = gr.Textbox(label="What should play", placeholder="a waltz for piano", max_length=max_characters)
            seconds = gr.Slider(2.0, 15.0, 5.0, step=0.5, label="Seconds for each picture")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=max_seed)
            button = gr.Button("Make a slide show", variant="primary")
        with gr.Column(min_width=320):
            film = gr.Video(label="Slide show", interactive=False, buttons=[])
            download = gr.DownloadButton("Download MP4", size="md", visible=False)

    def show(paths: list[str] | None) -> dict:
        paths = check_pictures(paths, max_pixels, refuse) if paths else []
        return gr.update(value=paths, visible=bool(paths))

    quietly = {"show_progress": "hidden", "api_visibility": "private"}
    files.change(show, files, shown, **quietly).failure(lambda: None, None, files, **quietly)
    button.click(
        responder(pipe, max_pixels, max_characters, refuse),
        [files, prompt, seconds, seed],
        [film, download],
        # A pipeline serves one caller at a time.
        concurrency_limit=1,
        concurrency_id="pipeline",
        trigger_mode="once",
        scroll_to_output=True,
        show_progress_on=film,
        api_name="make_slideshow",
    )

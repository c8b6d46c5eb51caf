"""The third tab of the web demo: music of yours is varied, made anew in a stretch, or goes on, to a picture."""

import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import PIL.Image
import torch

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.audio import audio_duration, load_audio, save_audio
from melfusion_pipeline.plotting import plot_mel_spectrogram
from melfusion_pipeline.waveforms_melfusion import Spectrogram, log_mel_spectrogram

MAX_SECONDS = 120.0
ANEW, GO_ON, VARY = CHOICES = ("Make a stretch anew", "Go on from its end", "Vary all of it")


def check_music(path: str | None, refuse: Callable[[str], Exception]) -> float:
    """Gives the length of an upload in seconds.

    Args:
        path: The file.
        refuse: Makes the error for the user of a message.

    Raises:
        gradio.Error: If there is none, or it cannot be read or is too long.
    """
    if path is None:
        raise refuse("There is no music to begin with: choose a file.")
    try:
        seconds = audio_duration(path)
        if seconds <= MAX_SECONDS:
            # A header says nothing of damage behind it.
            load_audio(path)
    except (ValueError, ImportError) as error:
        raise refuse(f"{Path(path).name} cannot be read as music. Try a WAV, FLAC, MP3 or OGG file.") from error
    if seconds > MAX_SECONDS:
        raise refuse(f"{Path(path).name} lasts {seconds:.0f} s, more than {MAX_SECONDS:.0f} s. Cut it first.")
    return seconds


def slider_limits(seconds: float) -> tuple[float, float]:
    """Where stretches of music end at most, and where it goes on from at least, in whole hundredths of a second."""
    return math.floor(seconds * 100) / 100, min(math.ceil(seconds * 100) / 100, MAX_SECONDS)


def choice_arguments(choice: str, start: float, end: float, length: float, strength: float) -> dict[str, Any]:
    """Gives the call's arguments for one of `CHOICES`; the values of the others do not count."""
    return {
        ANEW: {"mask_start_in_s": start, "mask_end_in_s": end},
        GO_ON: {"audio_length_in_s": length},
        VARY: {"strength": strength},
    }[choice]


def write_music(
    folder: str, name: str, waveform: torch.Tensor, made: tuple[float, float], spectrogram: Spectrogram
) -> tuple[str, str]:
    """Writes a WAV and its spectrogram, in which what was made is marked.

    Args:
        folder: Where to write.
        name: Of the files.
        waveform: `[samples]`.
        made: Where what was made begins and ends, in seconds.
        spectrogram: Its numbers.

    Returns:
        The two paths.
    """
    wav = Path(folder, f"{name}.wav")
    save_audio(wav, waveform, spectrogram.sampling_rate)
    seconds_per_frame = spectrogram.hop_length / spectrogram.sampling_rate
    figure = plot_mel_spectrogram(log_mel_spectrogram(waveform, spectrogram), seconds_per_frame, "new: between lines")
    for bound in made:
        figure.axes[0].axvline(bound, color="white", linestyle="--")
    figure.set_size_inches(5.5, 2.5)
    figure.savefig(wav.with_suffix(".png"), dpi=160)
    return str(wav), str(wav.with_suffix(".png"))


def make_music(
    pipe: MelFusionPipeline,
    cache: Callable,
    path: str,
    image: PIL.Image.Image | None,
    prompt: str,
    seed: int,
    progress: Callable[..., Any],
    **choice: Any,
) -> torch.Tensor:
    """Makes music of the file `path`.

    Args:
        pipe: The pipeline.
        cache: Where the features of `image` come from.
        progress: Called as `progress((step, steps), desc=text)`, as `gradio.Progress`.
        choice: What `choice_arguments` gives.

    Returns:
        `[samples]`.
    """
    steps = pipe.config.default_num_inference_steps
    progress((0, steps), desc="Listening and looking")

    def report(pipe: MelFusionPipeline, step: int, timestep: Any, tensors: dict) -> dict:
        progress((min(step + 1, pipe.num_timesteps), pipe.num_timesteps), desc="Making music")
        return {}

    audio, sampling_rate = load_audio(path)
    return pipe(
        prompt=prompt,
        image_features=None if image is None else cache(image),
        audio=audio,
        audio_sampling_rate=sampling_rate,
        generator=torch.Generator().manual_seed(seed),
        callback_on_step_end=report,
        output_type="pt",
        **choice,
    ).audios[0]


def responder(
    pipe: MelFusionPipeline, cache: Callable, max_characters: int, refuse: Callable[[str], Exception]
) -> Callable[..., Iterator[list]]:
    """Builds what the button calls: from the values of the inputs to the music, its download and its drawing."""

    def respond(
        path: str | None,
        choice: str,
        start: float,
        end: float,
        length: float,
        strength: float,
        image: PIL.Image.Image | None,
        prompt: str,
        seed: float,
        progress: Callable = gr.Progress(),
    ) -> Iterator[list]:
        seconds, prompt = check_music(path, refuse), (prompt or "").strip()
        if len(prompt) > max_characters:
            raise refuse(f"The sentence is longer than {max_characters} characters.")
        if seed is None:
            raise refuse("The seed is empty: write a whole number, such as 0.")
        if choice == ANEW and not start < end <= seconds:
            raise refuse(
                f"The stretch from {start:g} to {end:g} s must end after it begins, and within {seconds:.2f} s."
            )
        made = {ANEW: (start, end), GO_ON: (seconds, length), VARY: (0.0, seconds)}[choice]
        arguments = choice_arguments(choice, start, end, length, strength)
        # Gradio copies the files to its own cache before it comes back for more.
        with tempfile.TemporaryDirectory() as folder:
            try:
                waveform = make_music(pipe, cache, path, image, prompt, int(seed), progress, **arguments)
                files = write_music(folder, f"{Path(path).stem}-{int(seed)}", waveform, made, Spectrogram.of(pipe))
            except (ValueError, TypeError, FloatingPointError) as error:
                raise refuse(str(error)) from error
            except torch.OutOfMemoryError as error:
                raise refuse("The memory does not suffice: try shorter music.") from error
            wav, drawing = files
            yield [wav, gr.update(value=wav, visible=True), gr.update(value=drawing, visible=True)]

    return respond


def draw_tab(
    pipe: MelFusionPipeline,
    cache: Callable,
    picture: gr.Image,
    max_characters: int,
    max_seed: int,
    refuse: Callable[[str], Exception],
) -> None:
    """Draws the tab and connects its button, within the page that is being built; `picture` is not yet drawn."""
    with gr.Row():
        with gr.Column(min_width=320):
            music = gr.Audio(type="filepath", sources=["upload"], label="Your music", buttons=[])
            choice = gr.Radio(CHOICES, value=ANEW, label="What to do")
            start = gr.Slider(0.0, MAX_SECONDS, 1.0, step=0.01, label="From (s)")
            end = gr.Slider(0.0, MAX_SECONDS, 3.0, step=0.01, label="To (s)")
            length = gr.Slider(0.0, MAX_SECONDS, 10.0, step=0.01, label="Until (s)", visible=False)
            strength = gr.Slider(
                *(0.1, 1.0, 0.6), step=0.05, label="Strength", info="How much of it is forgotten.", visible=False
            )
            picture.render()
            prompt = gr.Textbox(label="What should play", placeholder="a waltz for piano", max_length=max_characters)
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=max_seed)
            button = gr.Button("Change the music", variant="primary")
        with gr.Column(min_width=320):
            changed = gr.Audio(label="Changed", interactive=False, buttons=[])
            download = gr.DownloadButton("Download WAV", size="md", visible=False)
            drawing = gr.Image(label="Mel spectrogram", show_label=False, interactive=False, visible=False, buttons=[])

    def show(choice: str) -> list:
        return [gr.update(visible=choice == one) for one in (ANEW, ANEW, GO_ON, VARY)]

    def measure(path: str | None) -> list:
        if path is None:
            return [gr.skip()] * 3
        most, least = slider_limits(check_music(path, refuse))
        third = round(most / 3, 2)
        bounds = [gr.update(value=value, maximum=most) for value in (third, 2 * third)]
        return [*bounds, gr.update(value=min(2 * least, MAX_SECONDS), minimum=least)]

    quietly = {"show_progress": "hidden", "api_visibility": "private"}
    choice.change(show, choice, [start, end, length, strength], **quietly)
    music.upload(measure, music, [start, end, length], **quietly).failure(lambda: None, None, music, **quietly)
    button.click(
        responder(pipe, cache, max_characters, refuse),
        [music, choice, start, end, length, strength, picture, prompt, seed],
        [changed, download, drawing],
        # A pipeline serves one caller at a time.
        concurrency_limit=1,
        concurrency_id="pipeline",
        trigger_mode="once",
        scroll_to_output=True,
        show_progress_on=changed,
        api_name="change_music",
    )

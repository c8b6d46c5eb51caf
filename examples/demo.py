"""Makes music for four photographs of different mood and two prompts, and measures whether it follows them.

Writes WAVs, a sheet (picture, mel spectrograms, alphas), the README's picture, and prints what was measured. Needs the
extra `demo`.
"""

import argparse
import sys
from pathlib import Path

import librosa
import numpy as np
import PIL.Image
import torch
from command_line import errors_in_one_line, new_folder, positive_int, random_seed
from diffusers.utils.torch_utils import get_device
from matplotlib.figure import Figure

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.audio import save_audio

EXAMPLES = Path(__file__).parent
sys.path.insert(0, str(EXAMPLES / "small_checkpoint"))
from measure_music import drum_presence, onset_rate, register  # noqa: E402
from mood import MoodRule  # noqa: E402

# Of the small checkpoint's test split: still and dark, still and bright, stirring and dark, stirring and bright.
PICTURES = ("rocket_at_night", "fog", "mountain_lake", "rocket_hall")
PROMPTS = ("a waltz for piano", "organ playing a march")
# What the README shows: the stillest and the most stirring of them.
OPPOSITES = ("rocket_at_night", "rocket_hall")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=EXAMPLES.parent, help="folder or Hub id; default: the bundled one")
    parser.add_argument("--num_inference_steps", type=positive_int, help="default: the checkpoint's own")
    parser.add_argument("--seed", type=random_seed, default=0)
    parser.add_argument(
        "--output", type=new_folder, default=Path("build/demo"), help="folder for the WAVs and the sheet"
    )
    return parser.parse_args()


@torch.no_grad()
def generate(pipe: MelFusionPipeline, features, prompt: str, arguments: argparse.Namespace) -> tuple:
    """Returns the log-mel spectrogram `[frames, 64]` and the waveform `[T]`."""
    mel_spectrogram = pipe(
        prompt=prompt,
        image_features=features,
        num_inference_steps=arguments.num_inference_steps,
        generator=torch.Generator().manual_seed(arguments.seed),
        output_type="mel",
    ).audios
    return mel_spectrogram[0], pipe.mel_spectrogram_to_waveform(mel_spectrogram)[0].numpy()


def measure(waveform: np.ndarray, sampling_rate: int) -> dict[str, float]:
    """Returns what the picture should decide, and the centre of the spectrum, which the instrument decides too."""
    return {
        "tempo (bpm)": float(np.ravel(librosa.feature.tempo(y=waveform, sr=sampling_rate))[0]),
        "onsets a second": onset_rate(waveform, sampling_rate),
        "drums": drum_presence(waveform, sampling_rate),
        "register (MIDI)": register(waveform, sampling_rate),
        "brightness (Hz)": float(librosa.feature.spectral_centroid(y=waveform, sr=sampling_rate).mean()),
    }


def draw_sheet(pictures: dict, mels: dict, alphas: torch.Tensor) -> Figure:
    """Draws a row a picture (picture, then a mel spectrogram for each prompt), and the alphas below."""
    figure = Figure(figsize=(14, 2.2 * len(pictures) + 2), layout="constrained")
    grid = figure.add_gridspec(len(pictures) + 1, len(PROMPTS) + 1)
    for row, (name, (image, arousal, valence)) in enumerate(pictures.items()):
        axes = figure.add_subplot(grid[row, 0])
        axes.imshow(image)
        axes.set_title(f"{name}: arousal {arousal:.2f}, valence {valence:.2f}", fontsize=9)
        axes.set_axis_off()
        for column, prompt in enumerate(PROMPTS):
            axes = figure.add_subplot(grid[row, column + 1])
            axes.imshow(mels[name, prompt].T, origin="lower", aspect="auto", cmap="magma", vmin=-11, vmax=2)
            axes.set(title=prompt, xlabel="frame (10 ms)", ylabel="mel band")
    axes = figure.add_subplot(grid[-1, :])
    axes.bar(range(len(alphas)), alphas)
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set(title="how far each layer of the music UNet looks at the picture", xlabel="layer", ylabel="alpha")
    return figure


def draw_opposites(pictures: dict, mels: dict) -> Figure:
    """Draws two photographs of opposite mood, each with what the first prompt became beside it."""
    figure = Figure(figsize=(8.4, 1.9), layout="constrained")
    for axes, name in zip(figure.subplots(1, 4)[::2], OPPOSITES):
        axes.imshow(pictures[name][0])
        axes.set_axis_off()
    for axes, name in zip(figure.axes[1::2], OPPOSITES):
        mel_spectrogram = mels[name, PROMPTS[0]]
        extent = (0, len(mel_spectrogram) / 100, 0, mel_spectrogram.shape[1])
        axes.imshow(mel_spectrogram.T, origin="lower", aspect="auto", cmap="magma", vmin=-11, vmax=2, extent=extent)
        axes.set_title(PROMPTS[0], fontsize=8)
        axes.set_xlabel("seconds", fontsize=7)
        axes.tick_params(labelsize=7)
        axes.set_yticks([])
    return figure


def format_table(rows: list[tuple[str, str, dict[str, float]]]) -> str:
    """Formats the rows (picture, prompt, what was measured)."""
    lines = [f"{'picture':16s} {'prompt':22s}" + "".join(f"  {quantity}" for quantity in rows[0][2])]
    for name, prompt, measured in rows:
        cells = "".join(f"{value:{len(quantity) + 2}.2f}" for quantity, value in measured.items())
        lines.append(f"{name:16s} {prompt:22s}{cells}")
    return "\n".join(lines)


def main() -> None:
    arguments = parse_arguments()
    pipe = MelFusionPipeline.from_pretrained(arguments.checkpoint)
    pipe.to(get_device())
    rule = MoodRule.load(EXAMPLES / "small_checkpoint" / "mood.json")
    arguments.output.mkdir(parents=True, exist_ok=True)
    sampling_rate = pipe.sampling_rate
    pictures, mels, rows = {}, {}, []
    for name in PICTURES:
        image = PIL.Image.open(EXAMPLES / "images" / f"{name}.jpg")
        pictures[name] = (image, *rule(image))
        features = pipe.encode_image(image)
        for prompt in PROMPTS:
            mels[name, prompt], waveform = generate(pipe, features, prompt, arguments)
            save_audio(arguments.output / f"{name}, {prompt}.wav", waveform, sampling_rate)
            mood = dict(zip(("arousal", "valence"), pictures[name][1:]))
            rows.append((name, prompt, mood | measure(waveform, sampling_rate)))
    # Only now, for until here the progress bars of the pipeline would run through it.
    print(format_table(rows))
    draw_sheet(pictures, mels, pipe.synapse.alphas.detach().float().cpu()).savefig(arguments.output / "sheet.png")
    draw_opposites(pictures, mels).savefig(arguments.output / "opposites.jpg", dpi=100, pil_kwargs={"quality": 85})
    print(f"wrote {len(mels)} WAVs, sheet.png and opposites.jpg to {arguments.output}")


if __name__ == "__main__":
    with errors_in_one_line():
        main()

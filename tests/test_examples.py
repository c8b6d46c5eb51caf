"""The scripts of `examples/`, run as a user runs them."""

import subprocess
import sys
from pathlib import Path

import PIL.Image
import soundfile

ROOT = Path(__file__).parents[1]


def run_example(script: str, *arguments: str | Path) -> str:
    command = [sys.executable, ROOT / "examples" / script, *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_generate_writes_a_wav_and_a_picture_and_says_that_it_is_untrained(tmp_path):
    output = run_example("generate.py", "--output", tmp_path, "--num_inference_steps", "2")
    assert "UNTRAINED" in output
    waveform, sampling_rate = soundfile.read(tmp_path / "forest_stream.wav")
    assert sampling_rate == 16000 and len(waveform) == 5.12 * 16000 and abs(waveform).max() > 1e-3
    assert PIL.Image.open(tmp_path / "forest_stream.png").size == (900, 300)


def test_generate_takes_a_checkpoint(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "checkpoint")
    arguments = ("--checkpoint", tmp_path / "checkpoint", "--output", tmp_path, "--num_inference_steps", "2")
    assert "UNTRAINED" not in run_example("generate.py", *arguments)
    assert (tmp_path / "forest_stream.wav").is_file()

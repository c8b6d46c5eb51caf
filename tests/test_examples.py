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


def test_generate_writes_a_wav_and_a_picture_with_the_bundled_checkpoint(tmp_path):
    run_example("generate.py", "--output", tmp_path, "--num_inference_steps", "10")
    waveform, sampling_rate = soundfile.read(tmp_path / "forest_stream.wav")
    assert sampling_rate == 16000 and len(waveform) == 5.12 * 16000 and abs(waveform).max() > 0.05
    assert PIL.Image.open(tmp_path / "forest_stream.png").size == (900, 300)


def test_generate_takes_a_checkpoint(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "checkpoint")
    arguments = ("--checkpoint", tmp_path / "checkpoint", "--output", tmp_path, "--num_inference_steps", "2")
    run_example("generate.py", *arguments)
    assert (tmp_path / "forest_stream.wav").is_file()


def test_the_demo_writes_eight_wavs_a_sheet_and_a_table(tmp_path):
    printed = run_example("demo.py", "--output", tmp_path, "--num_inference_steps", "2")
    assert len(list(tmp_path.glob("*.wav"))) == 8
    assert PIL.Image.open(tmp_path / "sheet.png").width > 1000
    rows = [line for line in printed.splitlines() if "waltz" in line or "march" in line]
    assert len(rows) == 8 and {row.split()[0] for row in rows} == set(
        "rocket_at_night fog mountain_lake rocket_hall".split()
    )

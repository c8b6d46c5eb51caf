"""The scripts of `examples/`, run as a user runs them."""

import os
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


def test_the_demo_writes_eight_wavs_two_pictures_and_a_whole_table(tmp_path):
    command = [sys.executable, ROOT / "examples/demo.py", "--output", tmp_path, "--num_inference_steps", "2"]
    # Both streams into one, as a terminal shows them: no progress bar may run through the table.
    printed = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    assert len(list(tmp_path.glob("*.wav"))) == 8
    assert PIL.Image.open(tmp_path / "sheet.png").width > 1000
    assert PIL.Image.open(tmp_path / "opposites.jpg").width == PIL.Image.open(ROOT / "examples/opposites.jpg").width
    header, *rows, last = printed.splitlines()[-10:]
    assert header.startswith("picture") and last.startswith("wrote 8 WAVs")
    assert {row.split()[0] for row in rows} == set("rocket_at_night fog mountain_lake rocket_hall".split())
    assert all("waltz" in row or "march" in row for row in rows)


def test_another_package_called_evaluate_is_not_taken_for_ours(tmp_path):
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate" / "__init__.py").write_text("raise ImportError('this is another package')")
    command = [sys.executable, ROOT / "examples/small_checkpoint/evaluate_checkpoint.py", "--help"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

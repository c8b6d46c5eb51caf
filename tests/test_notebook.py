"""`examples/quickstart.ipynb`: it runs, and what it promises is in it."""

import base64
import io
import re
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import PIL.Image
import pytest
import soundfile

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def texts(notebook):
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def media(notebook):
    """The waveforms and pictures in the outputs, in order."""
    waveforms, pictures = [], []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            for encoded in re.findall(r'src="data:audio/mpeg;base64,([^"]+)"', data.get("text/html", "")):
                waveforms.append(soundfile.read(io.BytesIO(base64.b64decode(encoded)))[0])
            # A PIL image comes in both forms.
            if encoded := data.get("image/jpeg", data.get("image/png")):
                pictures.append(PIL.Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"))
    return waveforms, pictures


def check_outputs(notebook):
    kinds = [output.output_type for cell in notebook.cells for output in cell.get("outputs", [])]
    assert "error" not in kinds
    waveforms, pictures = media(notebook)
    # With the picture, without it, the sweep, four pictures in time, and a stretch made anew.
    assert len(waveforms) == 8
    assert min(np.abs(waveform).max() for waveform in waveforms) > 1e-3
    with_picture, without, *sweep, storyboard, anew = waveforms
    assert len({len(waveform) for waveform in (with_picture, without, *sweep, anew)}) == 1
    # An MP3 ends with a whole block.
    assert len(storyboard) == pytest.approx(4 * len(without), abs=8000)
    assert np.array_equal(sweep[0], without) and np.array_equal(sweep[2], with_picture)
    assert np.abs(with_picture - without).max() > 1e-3
    assert np.abs(anew - with_picture)[32000:64000].max() > 1e-2
    # Picture, reconstruction, two spectrograms, alphas, influence, sweep, storyboard, stretch; none of them blank.
    assert len(pictures) == 9
    assert all(len(picture.resize((64, 64)).getcolors(4096)) > 20 for picture in pictures)

    printed = texts(notebook)
    changes = [float(change) for change in re.findall(r"mean change of the log-mel ([\d.]+)", printed)]
    assert changes[0] == 0 and len(changes) == 4 and min(changes[1:]) > 0
    assert "\n0 of 49920 samples around the stretch changed" in printed
    assert re.search(r"picture \d+\.\d+, inverted to noise \d+\.\d+\n", printed)
    layers = re.findall(r"up_blocks\S+: (\d+) moments, (\d+) x \2 regions, weights sum to -?[\d.]+", printed)
    sides = [int(side) for _, side in layers]
    assert len(layers) > 1 and sides == sorted(sides)


def test_the_notebook_runs_and_shows_what_it_promises(monkeypatch):
    """On the bundled checkpoint, or on the one that MELFUSION_CHECKPOINT names."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": NOTEBOOK.parent}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    check_outputs(notebook)


def test_the_outputs_that_are_kept_are_whole_small_and_of_one_run():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    check_outputs(notebook)
    assert not [output for cell in notebook.cells for output in cell.get("outputs", []) if "stderr" in output.values()]
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert NOTEBOOK.stat().st_size < 1_500_000
    assert not re.search(r"/(root|home|tmp|work|Users)/", NOTEBOOK.read_text())


def test_a_notebook_without_its_outputs_would_be_noticed():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.pop("outputs", None)
    with pytest.raises(AssertionError):
        check_outputs(notebook)

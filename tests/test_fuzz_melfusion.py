"""Bad inputs end in an error with a named cause; `python tests/bad_inputs.py` prints the table of all of them."""

import pickle
import shutil

import pytest
from bad_inputs import AREAS, Trap, format_table, try_area

from melfusion_pipeline import MelFusionPipeline


def test_at_least_150_bad_inputs_are_tried():
    assert sum(AREAS.values()) >= 150


@pytest.mark.parametrize("area", AREAS, ids=lambda area: area.__name__)
def test_bad_inputs_are_refused_with_a_named_cause(area):
    outcomes = try_area(area)
    assert len(outcomes) >= AREAS[area]
    assert len(format_table(outcomes).splitlines()) == len(outcomes) + 2


def test_a_pickle_beside_the_weights_is_never_read(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "checkpoint")
    for file in list((tmp_path / "checkpoint").rglob("*.safetensors")):
        for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin", "model.pkl"):
            file.with_name(name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    loaded = MelFusionPipeline.from_pretrained(tmp_path / "checkpoint")
    assert loaded.components.keys() == pipe.components.keys() and not (tmp_path / "sprung").exists()
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


def test_components_that_are_given_need_no_files(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "checkpoint")
    shutil.rmtree(tmp_path / "checkpoint" / "vae")
    assert MelFusionPipeline.from_pretrained(tmp_path / "checkpoint", vae=pipe.vae).vae is pipe.vae
    with pytest.raises(FileNotFoundError, match="vae"):
        MelFusionPipeline.from_pretrained(tmp_path / "checkpoint")

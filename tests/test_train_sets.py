"""`examples/train_melfusion.py` on the same triplets in every form: the same losses, streamed or not."""

import signal
import tracemalloc
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
import train_data
import train_melfusion
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import assert_near
from processes import prints, start
from test_train_melfusion import arguments, losses, train
from test_train_processes import on_two_processes
from train_checkpoints import list_checkpoints
from triplet_forms import FORMS, write_forms
from untrained import untrained_components

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.data import load_set, set_root

STEPS = 10


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """An untrained pipeline."""
    folder = tmp_path_factory.mktemp("training")
    components = untrained_components(mel_bands=64, latent_frames=16)
    pipe = MelFusionPipeline(**components, default_num_inference_steps=2)
    pipe.synapse.reset_parameters()
    pipe.save_pretrained(folder / "pipeline")
    return folder


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield write_forms(tmp_path_factory.mktemp("forms") / "sets", 24)


def flags_of(form: dict, **flags) -> dict:
    """The flags that name a set of `write_forms`."""
    named = {"train_data": form.get("path", ""), "dataset_name": form.get("name", "")}
    named |= {f"{column}_column": name for column, name in form.get("columns", {}).items()}
    named |= {"max_train_steps": STEPS, "checkpointing_steps": 3, "dataloader_num_workers": 0}
    return named | flags


@pytest.fixture(scope="module")
def expected(workspace, forms, tmp_path_factory) -> list[float]:
    return train(workspace, tmp_path_factory.mktemp("expected"), **flags_of(forms["jsonl"]))


def test_a_set_is_trained_on_as_its_files_streamed_and_not(workspace, forms, expected, tmp_path):
    assert len(expected) == STEPS and len(set(expected)) == STEPS
    for name in ("map", "stream"):
        streaming = {"streaming": True} if name == "stream" else {}
        assert_near(train(workspace, tmp_path / name, **flags_of(forms["parquet"], **streaming)), expected, steps=10)
    assert "| training data | " in (tmp_path / "stream" / "README.md").read_text()


def test_a_stream_whose_training_was_killed_in_mid_epoch_is_gone_on_with(workspace, forms, expected, tmp_path):
    """By SIGKILL, after the checkpoint of step 4 of six in an epoch; the losses are those of a run without an end."""
    flags, output = flags_of(forms["webdataset"], streaming=True, checkpointing_steps=4), tmp_path / "out"
    process = start(lambda: train(workspace, output, **flags), tmp_path / "printed")
    assert prints(process, output / "losses.jsonl", 5)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and list_checkpoints(output)
    # Two workers prepare batches ahead of the checkpoint, which must not be missing afterwards.
    more = {"resume_from_checkpoint": "latest", "dataloader_num_workers": 2}
    assert_near(train(workspace, output, **flags | more), expected, steps=10)


def test_a_split_of_the_set_is_validated_on(workspace, forms, tmp_path, capsys):
    table = pyarrow.parquet.read_table(Path(forms["parquet"]["name"], "train-00000.parquet"))
    for split, rows in {"train": table, "validation": table.slice(0, 2)}.items():
        pyarrow.parquet.write_table(rows, tmp_path / f"{split}.parquet")
    flags = flags_of({"name": str(tmp_path)}, max_train_steps=1, validation_split="validation", streaming=True)
    train(workspace, tmp_path / "out", **flags, num_validation_samples=1)
    assert "validation loss" in capsys.readouterr().out
    assert (tmp_path / "out" / "validation" / "step-1" / "0.wav").is_file()


def test_wrong_sets_end_training_before_anything_is_written(workspace, forms, tmp_path):
    parquet = forms["parquet"]
    wrong = [
        ({"train_data": forms["jsonl"]["path"]}, SystemExit, None),
        ({"dataset_name": ""}, SystemExit, None),
        ({"train_split": "train"}, SystemExit, None),
        ({"dataset_split": "test"}, ValueError, "split 'test' of .* cannot be read"),
        ({"audio_column": "music"}, ValueError, "has no columns \\['music'\\]"),
        ({"shuffle_buffer_size": 0}, SystemExit, None),
        ({"dataset_config_name": "other"}, ValueError, "cannot be read"),
    ]
    for number, (flags, error, message) in enumerate(wrong):
        with pytest.raises(error, match=message):
            train(workspace, tmp_path / str(number), **flags_of(parquet) | flags)
        written = (tmp_path / str(number)).rglob("*") if (tmp_path / str(number)).exists() else ()
        assert not [path for path in written if path.is_file()]


def test_a_damaged_row_of_a_stream_ends_training_by_its_number_and_leaves_the_checkpoints(workspace, forms, tmp_path):
    rows = datasets.Dataset.from_parquet(f"{forms['parquet']['name']}/train-00000.parquet")
    rows = rows.cast_column("image", datasets.Image(decode=False)).cast_column("audio", datasets.Image(decode=False))
    records = list(rows)
    records[5]["audio"]["bytes"] = b"no sound"
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "set" / "train.parquet")
    flags = flags_of({"name": str(tmp_path / "set")}, streaming=True, checkpointing_steps=1)
    with pytest.raises(ValueError, match="Row 5: .* cannot be read as a sound file"):
        train(workspace, tmp_path / "out", **flags)
    checkpoints = sorted(path.name for path in (tmp_path / "out").glob("*checkpoint-*"))
    assert checkpoints == [f"checkpoint-{step + 1}" for step in range(len(losses(tmp_path / "out")))]
    assert len(train(workspace, tmp_path / "skipping", **flags, skip_bad_rows=True)) == STEPS


def texts_of(workspace: Path, output: Path, **flags) -> list[str]:
    """The command's arguments; a flag that is "" is left out."""
    given = arguments(workspace, output, **flags)
    while "" in given:
        del given[given.index("") - 1 : given.index("") + 1]
    return given


def train_on_two_processes(workspace: Path, output: Path, **flags) -> list[float]:
    given = texts_of(workspace, output, train_batch_size=2, **flags)
    results = on_two_processes(workspace, lambda rank: train_melfusion.main(given))
    assert [status for status, _ in results] == [0, 0], results
    return losses(output)


def test_a_set_is_checked_as_files_are(workspace, forms, tmp_path, capsys):
    for streaming in ({}, {"streaming": True}):
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        train_melfusion.main(texts_of(workspace, tmp_path, **flags_of(forms["parquet"], check_data=True, **streaming)))
        assert "parquet: no problems" in capsys.readouterr().out


def test_what_lies_in_a_set_is_not_read_again_to_see_whether_it_changed(forms, tmp_path):
    digests, size = [], 4_000_000
    for content in (b"1", b"2"):
        row = {"image": {"bytes": content * size, "path": "a.png"}, "audio": {"bytes": b"-", "path": None}}
        (tmp_path / "set").mkdir(exist_ok=True)
        datasets.Dataset.from_list([row | {"caption": "x"}]).to_parquet(tmp_path / "set" / "train.parquet")
        rows = load_set(str(tmp_path / "set"))
        tracemalloc.start()
        digests += [train_data.digest_rows(rows, set_root(str(tmp_path / "set"))) for _ in range(2)]
        assert tracemalloc.get_traced_memory()[1] < size
        tracemalloc.stop()
    assert digests[0] == digests[1] != digests[2] == digests[3]


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_losses(workspace, forms, expected, tmp_path, form, streaming):
    """With 0 and 2 workers, with one and two processes; in mid-epoch two processes go on with what one began."""
    flags = flags_of(forms[form], **({"streaming": True} if streaming else {}))
    for num_workers in (0, 2):
        flags["dataloader_num_workers"] = num_workers
        one, two = (tmp_path / f"{number}-{num_workers}" for number in ("one", "two"))
        assert_near(train(workspace, one, **flags), expected, steps=10)
        if num_workers:
            train(workspace, two, **flags | {"max_train_steps": 4, "checkpointing_steps": 4})
        found = train_on_two_processes(workspace, two, **flags, resume_from_checkpoint="latest")
        assert_near(found, expected, steps=100)

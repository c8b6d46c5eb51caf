import os
import stat
from pathlib import Path

import pytest

from melfusion_pipeline.files_melfusion import atomic_write, staged_folder


def test_a_file_is_replaced_only_when_it_is_complete(tmp_path: Path):
    target = tmp_path / "file.txt"
    target.write_text("old")
    with atomic_write(target) as temporary:
        temporary.write_text("new")
        assert temporary.suffix == ".txt" and target.read_text() == "old"
    assert target.read_text() == "new" and os.listdir(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_after_an_error_the_old_file_is_there_and_nothing_else(tmp_path: Path, error: BaseException):
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(type(error)), atomic_write(str(target)) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]


def test_two_writers_of_one_process_id_do_not_meet(tmp_path: Path):
    target = tmp_path / "file.txt"
    with atomic_write(target) as one:
        one.write_text("one")
        with atomic_write(target) as other:
            other.write_text("other")
        assert target.read_text() == "other" and one.read_text() == "one"
    assert target.read_text() == "one"


def test_others_may_read_what_they_could_read_before(tmp_path: Path):
    (tmp_path / "plain").touch()
    with atomic_write(tmp_path / "file.txt") as temporary:
        temporary.write_text("content")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "file.txt")}
    assert len(modes) == 1


def test_a_name_may_be_as_long_as_the_file_system_takes(tmp_path: Path):
    target = tmp_path / f"{251 * 'n'}.txt"
    target.touch()
    with atomic_write(target) as temporary:
        temporary.write_text("content")
    assert target.read_text() == "content"


def test_a_missing_folder_is_an_error(tmp_path: Path):
    message = "missing/file.txt' cannot be written: there is no folder '.*missing'"
    with pytest.raises(FileNotFoundError, match=message), atomic_write(tmp_path / "missing" / "file.txt"):
        pass


def test_a_new_folder_is_there_only_when_it_is_complete(tmp_path: Path):
    with atomic_write(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "file.txt").write_text("new")
        assert not (tmp_path / "folder").exists()
    assert (tmp_path / "folder" / "file.txt").read_text() == "new" and os.listdir(tmp_path) == ["folder"]


def test_a_staged_folders_files_come_to_others_when_all_are_written_the_named_one_last(tmp_path, monkeypatch):
    (tmp_path / "index.json").write_text("old")
    (tmp_path / "other").write_text("old")
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: moved.append(target) or replace(source, target))
    with staged_folder(str(tmp_path), last="index.json") as staging:
        (staging / "index.json").write_text("new")
        (staging / "deep").mkdir()
        (staging / "deep" / "weights").write_text("new")
        assert (tmp_path / "index.json").read_text() == "old" and not (tmp_path / "deep").exists()
    assert moved == [tmp_path / "deep" / "weights", tmp_path / "index.json"]
    assert sorted(os.listdir(tmp_path)) == ["deep", "index.json", "other"]
    assert [(tmp_path / name).read_text() for name in ("index.json", "other")] == ["new", "old"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_after_an_error_nothing_of_a_staged_folder_is_left(tmp_path: Path, error: BaseException):
    (tmp_path / "file").write_text("old")
    with pytest.raises(type(error)), staged_folder(tmp_path) as staging:
        (staging / "file").write_text("half")
        raise error
    assert (tmp_path / "file").read_text() == "old" and os.listdir(tmp_path) == ["file"]

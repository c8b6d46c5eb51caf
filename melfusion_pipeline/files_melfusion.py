"""Writing files and folders whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a temporary path to write to, which takes the place of `path` when the block ends without an error.

    Whoever reads `path` finds the old file or the new one, never a part. After an error the old file is still there
    and the temporary one is removed.

    Args:
        path: The file to write or to replace, in a folder that exists; or a folder that does not exist when the block
            ends.

    Yields:
        A path with the suffix of `path` in a hidden folder beside it. The folder's name is drawn at random, because
        containers that share a file system have process ids in common.

    Raises:
        FileNotFoundError: If the folder does not exist.
        OSError: If it cannot be written to.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{str(path)!r} cannot be written: there is no folder {str(path.parent)!r}, make it.")
    # A folder, because only its owner may read a file that `tempfile` makes, and it would stay so under its new name.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".partial-") as folder:
        temporary = Path(folder, path.name)
        yield temporary
        os.replace(temporary, path)


@contextmanager
def staged_folder(folder: str | os.PathLike, last: str | None = None) -> Iterator[Path]:
    """Gives an empty folder to write to; its files are moved into `folder` when the block ends without an error.

    Files of `folder` that have no successor stay. After an error, such as that of a full disk, all are as before.

    Args:
        folder: An existing folder.
        last: The name of the file that is moved last: where it lies, what it names is complete.

    Yields:
        A hidden folder inside of `folder`: that may be a mount of its own, to which nothing can be moved from outside.

    Raises:
        OSError: If the folder does not exist or cannot be written to.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as staging:
        yield Path(staging)
        files = [file for file in Path(staging).rglob("*") if file.is_file()]
        for file in sorted(files, key=lambda file: file.name == last):
            destination = Path(folder) / file.relative_to(staging)
            destination.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, destination)

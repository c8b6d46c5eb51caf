"""Writing a file whole or not at all."""

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
        path: The file to write or to replace, in a folder that exists.

    Yields:
        A path with the suffix of `path` in a hidden folder beside it. The folder's name is drawn at random, because
        containers that share a file system have process ids in common.

    Raises:
        OSError: If the folder does not exist or cannot be written to.
    """
    path = Path(path)
    # A folder, because only its owner may read a file that `tempfile` makes, and it would stay so under its new name.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        temporary = Path(folder, path.name)
        yield temporary
        os.replace(temporary, path)

"""What the scripts here share: arguments that are checked where they are given, and errors in one line.

Those with a text as their argument are types for `add_argument`: argparse names the flag.
"""

import argparse
import math
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import melfusion_pipeline
from melfusion_pipeline.tables import find_encoding

# Where our own code lies, whose errors say what to do about them.
OURS = tuple(str(Path(module).resolve().parent) + os.sep for module in (__file__, melfusion_pipeline.__file__))
# Of `torch.Generator.manual_seed`.
MAX_SEED = 2**63 - 1


def existing_file(text: str) -> Path:
    """Takes a file that is there."""
    path = Path(text)
    if not path.is_file():
        found = "is a folder: give a file" if path.is_dir() else "does not exist"
        raise argparse.ArgumentTypeError(f"{text} {found}")
    return path


def existing_folder(text: str) -> Path:
    """Takes a folder that is there."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(
            f"{text} {'is a file: give a folder' if path.is_file() else 'does not exist'}"
        )
    return path


def new_file(text: str) -> Path:
    """Takes a file that can be written, in a folder that may have to be made."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder: give a file")
    new_folder(path.parent)
    return path


def new_folder(text: str) -> Path:
    """Takes a folder that can be written to, or made."""
    path = Path(text)
    there = next(parent for parent in (path, *path.absolute().parents) if os.path.lexists(parent))
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{text} cannot be made, for {there} is a file: give a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written: {there} is read-only for this user")
    return path


def positive_seconds(text: str) -> float:
    """Takes a length of time."""
    try:
        length = float(text)
    except ValueError:
        length = math.nan
    if not 0 < length < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds above 0")
    return length


def positive_int(text: str) -> int:
    """Takes a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number of at least 1")
    return int(text)


def random_seed(text: str) -> int:
    """Takes a whole number that random generators take."""
    if not text.isdecimal() or int(text) > MAX_SEED:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 0 to {MAX_SEED}")
    return int(text)


def read_lines(path: Path) -> list[str]:
    """Reads a text file, an entry a line, in the encodings that tables may have; empty lines do not count.

    Raises:
        ValueError: If it has none of them.
    """
    lines = path.read_text(encoding=find_encoding(path)).splitlines()
    return [line.strip() for line in lines if line.strip()]


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Ends the script with the message alone of an error that says what to do; any other keeps its traceback.

    That is one that a `raise` of our own code says, or one about a file. An error from inside of a library, or of an
    operation in our code, is a fault of ours, and its traceback the way to it.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        innermost = traceback.extract_tb(error.__traceback__)[-1]
        is_said = os.path.realpath(innermost.filename).startswith(OURS) and innermost.line.startswith("raise")
        if isinstance(error, OSError) or is_said:
            sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
        raise

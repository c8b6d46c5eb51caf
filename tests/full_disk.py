"""A disk that is full wherever a file grows beyond a size, for one child process."""

import multiprocessing
import os
import resource
from collections.abc import Callable
from pathlib import Path

from processes import start_anew


def on_a_full_disk(action: Callable[[], None], largest_file: int) -> str:
    """Runs `action` in a process that cannot write files beyond a size, and gives the error it ends in.

    To the program it is as if the disk were full there; only the number of the error is another.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def write() -> None:
        start_anew()
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        try:
            action()
            sender.send("written")
        except BaseException as error:
            sender.send(f"{type(error).__name__}: {error}")
            os._exit(1)

    process = context.Process(target=write)
    process.start()
    sender.close()
    message = receiver.recv()
    process.join()
    return message


def contents(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, by its path from there."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

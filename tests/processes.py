"""Scripts in processes that are copies of this one, in which torch, diffusers and transformers are imported already.

Importing them takes six seconds of the processor, several times what the scripts themselves do in a test. All else is
as `python script.py` has it: a process of its own, the script's folder first on the path, and nothing of ours imported
but the package, so that a script which needs a module finds it by itself.
"""

import functools
import importlib
import multiprocessing
import os
import random
import runpy
import sys
import time
import traceback
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from melfusion_pipeline.onsets import find_onsets

ROOT = Path(__file__).parents[1]


def forget_what_tests_imported() -> None:
    """Takes this repository's scripts and tests out of the process, as if they had not been imported."""
    folders = [str(ROOT / name) + os.sep for name in ("benchmarks", "examples", "tests")]
    for name, module in list(sys.modules.items()):
        if name != "__main__" and (getattr(module, "__file__", None) or "").startswith(tuple(folders)):
            del sys.modules[name]
    sys.path[:] = [entry for entry in sys.path if not f"{entry}{os.sep}".startswith(tuple(folders))]
    importlib.invalidate_caches()


def forget_the_package() -> None:
    """Makes the process one in which `melfusion_pipeline` is not installed."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "melfusion_pipeline"]:
        del sys.modules[name]
    sys.modules["melfusion_pipeline"] = None


def start_anew() -> None:
    """Gives a copied process the state of one that has just begun."""
    # The threads of the other process are not in its copy, and OpenMP would wait for them.
    torch.set_num_threads(1)
    torch.manual_seed(torch.default_generator.initial_seed())
    np.random.seed()
    random.seed()
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def run_as_main(code, output: Path, errors: Path) -> None:
    """Calls `code` with both streams going to files, and ends the process as Python would."""
    for name, file, descriptor in (("stdout", output, 1), ("stderr", errors, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        setattr(sys, name, os.fdopen(descriptor, "w", buffering=1, closefd=False))
    try:
        start_anew()
        code()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def start(code, output: Path, errors: Path | None = None) -> multiprocessing.Process:
    """Starts `code`, a function without arguments, in a copy of this process.

    Args:
        code: What runs as a script would: an exception ends the process with a traceback and the status 1.
        output: The file that takes what is printed.
        errors: The file for the stream of errors; the same as `output` by default.
    """
    context = multiprocessing.get_context("fork")
    process = context.Process(target=run_as_main, args=(code, output, errors or output))
    process.start()
    return process


def prints(process: multiprocessing.Process, output: Path, lines: int, seconds: float = 300) -> bool:
    """Waits until a process has printed so many lines, and says whether it did so in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        over = not process.is_alive()
        if output.exists() and output.read_text().count("\n") >= lines:
            return True
        assert not over, f"the process ended with {process.exitcode}"
        time.sleep(0.005)
    return False


@functools.cache
def compile_librosa() -> None:
    """librosa compiles parts of itself when they are first used, for three seconds of each process: here for all."""
    find_onsets(np.sin(np.arange(16000) / 9.0), 16000)


def start_script(
    script: str | Path, *arguments, output: Path, errors: Path | None = None, paths=(), **environment: str
) -> multiprocessing.Process:
    """Starts `python script arguments`, with `paths` as PYTHONPATH and further variables of the environment."""

    compile_librosa()
    script = Path(os.path.abspath(script))

    def code() -> None:
        os.environ.update(environment)
        forget_what_tests_imported()
        sys.path[:0] = [str(script.parent), *map(str, paths)]
        sys.argv = [str(script), *map(str, arguments)]
        runpy.run_path(str(script), run_name="__main__")

    return start(code, output, errors)


def run_script(script: str | Path, *arguments, folder: Path, **kwargs) -> CompletedProcess:
    """Runs a script to its end; `folder` takes the two files of what it prints."""
    output, errors = folder / "stdout", folder / "stderr"
    for file in (output, errors):
        file.unlink(missing_ok=True)
    process = start_script(script, *arguments, output=output, errors=errors, **kwargs)
    process.join()
    return CompletedProcess([script, *arguments], process.exitcode, output.read_text(), errors.read_text())


def run_launched(*arguments, folder: Path) -> CompletedProcess:
    """Runs `accelerate launch arguments` as accelerate does on one device: it sets variables for a script."""
    parsed, *_ = _validate_launch_command(launch_command_parser().parse_args([*map(str, arguments)]))
    (_, script, *flags), environment = prepare_simple_launcher_cmd_env(parsed)
    return run_script(script, *flags, folder=folder, **environment)

"""`examples/train_melfusion.py` on two processes (gloo): what one process alone cannot get wrong."""

import json
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import train_melfusion
from accelerate import DistributedType, PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import assert_near
from processes import start
from safetensors.torch import load_file
from test_train_melfusion import arguments, leave_at, losses, train, workspace  # noqa: F401 - a fixture

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.data import check_rows, format_problems, load_rows

CONFIGS = Path(__file__).parents[1] / "examples" / "accelerate"


def on_two_processes(folder: Path, train, seconds: float = 1200, **environment: str) -> list[tuple[int, str]]:
    """Calls `train(rank)` in two copies of this process that find each other, and gives exit status and output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= environment or {"ACCELERATE_USE_CPU": "true"}

    def started(rank: int):
        def code() -> None:
            os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
            if "ACCELERATE_USE_FSDP" in shared:
                shard_on_the_cpu()
            train(rank)

        return start(code, folder / f"output-{rank}.txt")

    for rank in range(2):
        (folder / f"output-{rank}.txt").unlink(missing_ok=True)
    processes = [started(rank) for rank in range(2)]
    for process in processes:
        process.join(seconds)
    still = [process for process in processes if process.is_alive()]
    for process in still:
        process.kill()
        process.join()
    outputs = [(folder / f"output-{rank}.txt").read_text() for rank in range(2)]
    assert not still, "a process waits for the other: " + "\n".join(outputs)
    return [(process.exitcode, output) for process, output in zip(processes, outputs)]


def shard_on_the_cpu() -> None:
    """accelerate shards only where it finds several GPUs. The processors become these here; what shards is torch's."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)


def environment_of(config: str, *flags: str) -> dict[str, str]:
    """What `accelerate launch` sets for the scripts that it starts with one of our files."""
    command = ["--config_file", str(CONFIGS / config), "--num_processes", "2", *flags, "script.py"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(command))
    return {name: value for name, value in prepare_multi_gpu_env(args).items() if os.environ.get(name) != value}


def trained_weights(folder: Path) -> torch.Tensor:
    """All but those that the normalisation behind them takes out again: AdamW follows the rounding of no gradient."""
    pipe = MelFusionPipeline.from_pretrained(folder)
    groups = pipe.unet.config.norm_num_groups

    def is_felt(name: str, parameter: torch.Tensor) -> bool:
        is_shift = "resnets" in name and (
            name.endswith(("conv1.bias", "conv2.bias", "shortcut.bias")) or "time" in name
        )
        return not is_shift or len(parameter) != groups

    named = [*pipe.synapse.named_parameters(), *pipe.unet.named_parameters()]
    return torch.cat([parameter.flatten() for name, parameter in named if is_felt(name, parameter)])


def test_processes_share_the_check_of_a_set(workspace, tmp_path):  # noqa: F811
    """What one finds wrong and what only both together can find, as one process says it."""
    rows = (workspace / "train.jsonl").read_text()
    data = workspace / "shared.jsonl"
    data.write_text(rows + rows.splitlines()[0] + '\n{"image": "0.png", "audio": "gone.flac", "caption": "x"}\n')
    flags = {"train_data": data, "check_data": True}

    def run(rank: int) -> None:
        train_melfusion.main(arguments(workspace, tmp_path / "two", **flags))

    results = on_two_processes(tmp_path, run)
    # What only checks ends like a linter, without a traceback, wherever it ran.
    assert [status for status, _ in results] == [1, 1] and "Traceback" not in str(results), results
    assert all("5/5" in output for _, output in results)
    expected = format_problems(check_rows(load_rows(data), workspace))
    assert "repeats row 0" in expected and "gone.flac" in expected
    assert [output.count(expected) for _, output in results] == [1, 0]
    assert [output.count("gone.flac") for _, output in results] == [1, 0]


def test_all_processes_resume_where_the_main_one_does(workspace, tmp_path):  # noqa: F811
    """Each is a machine with a disk of its own, on which it stands in the folder `out`."""
    disks = [tmp_path / "disk-0", tmp_path / "disk-1"]
    whole = train(workspace, tmp_path / "whole")
    leave_at(tmp_path / "whole", disks[0] / "out", 3)

    def run(rank: int) -> None:
        os.chdir(disks[rank])
        os.environ.update(LOCAL_WORLD_SIZE="1", LOCAL_RANK="0")
        flags = {"train_batch_size": 2, "resume_from_checkpoint": "latest", "trajectory_cache": "trajectories"}
        train_melfusion.main(arguments(workspace, Path("out"), **flags))

    disks[1].mkdir()
    for status, output in on_two_processes(tmp_path, run):
        assert "Checking" not in output, "the first training has checked the set"
        assert status == 1 and "checkpoint-3, which is missing for process 1 on" in output, output
    assert [len(list((disk / "trajectories").iterdir())) for disk in disks] == [8, 8], "each inverts for its own disk"
    # The other process has gone further, and its own latest checkpoint is another.
    shutil.copytree(disks[0] / "out", disks[1] / "out", dirs_exist_ok=True)
    shutil.copytree(tmp_path / "whole" / "checkpoint-6", disks[1] / "out" / "checkpoint-6")
    results = on_two_processes(tmp_path, run)
    assert [status for status, _ in results] == [0, 0], results
    assert_near(losses(disks[0] / "out"), whole, steps=100)
    assert not list(tmp_path.glob("disk-*/out/.partial-*"))


@pytest.mark.slow
def test_fsdp2_trains_as_one_process(workspace, tmp_path):  # noqa: F811
    """Losses, validation, the moving average, checkpoints and the pipeline that is published."""
    flags = {"train": "unet", "use_ema": True, "validation_data": workspace / "train.jsonl"}
    flags |= {"num_validation_samples": 1, "gradient_accumulation_steps": 1}
    whole = train(workspace, tmp_path / "one", train_batch_size=4, **flags)
    output = tmp_path / "two"

    def sharded(**further) -> str:
        def run(rank: int) -> None:
            train_melfusion.main(arguments(workspace, output, train_batch_size=2, **flags, **further))

        results = on_two_processes(tmp_path, run, **environment_of("fsdp.json", "--mixed_precision", "no"))
        assert [status for status, _ in results] == [0, 0], results[0][1][-3000:] + results[1][1][-3000:]
        return results[0][1]

    sharded()
    for name in ("checkpoint-6", "losses.jsonl", "model_index.json"):
        os.rename(output / name, tmp_path / name)
    resumed = sharded(resume_from_checkpoint="latest")
    assert (output / "checkpoint-3" / "pytorch_model_fsdp.bin").is_file(), "nothing was sharded"
    first = [json.loads(line)["loss"] for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert_near(first, whole, steps=100)
    assert "Resumed at step 3." in resumed
    assert_near(losses(output)[-3:], whole[3:], steps=100)
    assert (trained_weights(output) - trained_weights(tmp_path / "one")).abs().max() < 1e-5
    one, two = (soundfile.read(folder / "validation/step-6/0.wav")[0] for folder in (tmp_path / "one", output))
    assert np.abs(one).max() > 0 and np.abs(one - two).max() < 1e-3


@pytest.mark.slow
def test_two_processes_train_a_lora_as_one_and_do_not_shard_it(workspace, tmp_path):  # noqa: F811
    flags = {"train": "lora", "rank": 2, "use_ema": True}
    whole = train(workspace, tmp_path / "one", train_batch_size=4, **flags)

    def run(rank: int) -> None:
        train_melfusion.main(arguments(workspace, tmp_path / "two", train_batch_size=2, **flags))

    results = on_two_processes(tmp_path, run)
    assert [status for status, _ in results] == [0, 0], results[0][1][-3000:]
    assert_near(losses(tmp_path / "two"), whole, steps=100)
    assert (trained_weights(tmp_path / "two") - trained_weights(tmp_path / "one")).abs().max() < 1e-5
    file = Path("synapse", "pytorch_lora_weights.safetensors")
    one, two = (load_file(tmp_path / name / file) for name in ("one", "two"))
    for name, rows in one.items():
        torch.testing.assert_close(two[name], rows, rtol=0, atol=1e-5)
    # A run does not begin in the folder of another one.
    (tmp_path / "two").rename(tmp_path / "done")
    for status, output in on_two_processes(tmp_path, run, **environment_of("fsdp.json", "--mixed_precision", "no")):
        assert status == 1 and "FSDP shards the music UNet, but --train lora trains little of it" in output

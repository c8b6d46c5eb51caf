"""`examples/train_melfusion.py` as a user runs it, killed and resumed."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile
import torch
import train_arguments
import train_data
import train_melfusion
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import assert_near, generator, photograph
from diffusers.optimization import get_scheduler
from full_disk import contents, on_a_full_disk
from processes import start_anew
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_checkpoints import list_checkpoints, resume
from train_estimate import describe_step, forget_peak_memory, peak_memory
from train_state import State
from train_validation import compare_pictures, log_piece, validation_losses
from untrained import untrained_components

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.audio import save_audio

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """Eight triplets whose music depends on the picture, and an untrained pipeline."""
    folder = tmp_path_factory.mktemp("training")
    times = np.arange(16000) / 16000
    with (folder / "train.jsonl").open("w") as file:
        for index in range(8):
            photograph(index, 40, 36).save(folder / f"{index}.png")
            tone = 0.4 * np.sin(2 * np.pi * 220 * 2 ** (index / 4) * times) * np.exp(-times * index / 2)
            soundfile.write(folder / f"{index}.flac", tone, 16000)
            row = {"image": f"{index}.png", "audio": f"{index}.flac", "caption": f"music {index % 2}"}
            row["part"] = "test" if index == 7 else "train"
            file.write(json.dumps(row) + "\n")
    components = untrained_components(mel_bands=64, latent_frames=16)
    pipe = MelFusionPipeline(**components, default_num_inference_steps=2)
    pipe.synapse.reset_parameters()
    pipe.save_pretrained(folder / "pipeline")
    return folder


@pytest.fixture(scope="module")
def finished(workspace, tmp_path_factory) -> Path:
    """A training of six steps with a checkpoint after three."""
    output = tmp_path_factory.mktemp("finished") / "out"
    train(workspace, output)
    return output


def validation_flags(workspace: Path) -> dict:
    """Seven rows are trained on, and the eighth is to validate on."""
    split = {"split_column": "part", "train_split": "train", "validation_split": "test"}
    return {"validation_data": workspace / "train.jsonl", "num_validation_samples": 1} | split


def arguments(workspace: Path, output: Path, **flags) -> list[str]:
    flags = {
        "pretrained_model_name_or_path": workspace / "pipeline",
        "train_data": workspace / "train.jsonl",
        "output_dir": output,
        "audio_length_in_s": 0.64,
        "max_train_steps": 6,
        "train_batch_size": 4,
        "checkpointing_steps": 3,
        "num_inversion_steps": 3,
        "trajectory_cache": workspace / "trajectories",
        "report_to": "none",
        "dataloader_num_workers": 0,
        **flags,
    }
    texts = [[f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in flags.items()]
    return [text for pair in texts for text in pair]


def train(workspace: Path, output: Path, **flags) -> list[float]:
    """Trains in this process and gives the losses; a flag that is "" is left out."""
    reset_accelerate()
    given = arguments(workspace, output, **flags)
    while "" in given:
        del given[given.index("") - 1 : given.index("") + 1]
    train_melfusion.main(given)
    return losses(output)


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "losses.jsonl").read_text().splitlines()]


def leave_at(finished: Path, output: Path, step: int) -> None:
    """Copies a training as it was after a step: later checkpoints and the whole pipeline are not there yet."""
    late = [path.name for path in list_checkpoints(finished) if int(path.name.partition("-")[2]) > step]
    shutil.copytree(finished, output, ignore=shutil.ignore_patterns(*late, "model_index.json"))


def play(pipe: MelFusionPipeline) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    kwargs = {"num_inference_steps": 2, "num_inversion_steps": 3, "generator": generator()}
    return pipe(photograph(), "music 1", **kwargs).audios


def test_training_saves_a_pipeline_that_plays_differently_and_knows_how_it_was_trained(workspace, tmp_path):
    flags = validation_flags(workspace) | {"validation_steps": 6}
    train(workspace, tmp_path, use_ema=True, gradient_accumulation_steps=2, report_to="tensorboard", **flags)
    trained = MelFusionPipeline.from_pretrained(tmp_path)
    untrained = MelFusionPipeline.from_pretrained(workspace / "pipeline")
    assert trained.synapse.alphas.abs().min() > 0
    assert not np.array_equal(play(trained), play(untrained))
    before = untrained.unet.state_dict()
    for name, tensor in trained.unet.state_dict().items():
        assert torch.equal(tensor, before[name])
    config = trained.synapse.config
    assert (config.image_latents, config.num_inversion_steps, config.image_size) == ("inversion", 3, 32)
    card = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: text-to-audio" in card and "library_name: diffusers" in card and "inversion, 32 px" in card
    assert (tmp_path / "validation" / "step-6" / "0.wav").is_file() and list(tmp_path.glob("logs/*/events*"))


def test_a_resumed_run_is_the_uninterrupted_one(workspace, tmp_path):
    flags = {"use_ema": True, "lr_scheduler": "cosine", "lr_warmup_steps": 2, "train_batch_size": 3, "train": "unet"}
    whole = train(workspace, tmp_path / "whole", max_train_steps=7, **flags)
    leave_at(tmp_path / "whole", tmp_path / "parts", 3)
    parts = train(workspace, tmp_path / "parts", max_train_steps=7, resume_from_checkpoint="latest", **flags)
    assert len(whole) == len(parts) == 7
    assert_near(parts, whole, steps=10)
    one, other = (MelFusionPipeline.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    for name in ("synapse", "unet"):
        weights = getattr(other, name).state_dict()
        for key, tensor in getattr(one, name).state_dict().items():
            assert_near(weights[key], tensor)


def test_noising_streaming_and_published(workspace, tmp_path, hub):
    flags = {"image_latents": "noising", "streaming": True, "random_image_crops": True, "hub_model_id": "tester/mine"}
    assert len(train(workspace, tmp_path, push_to_hub=True, max_train_steps=3, **flags)) == 3
    files = hub.files("tester/mine")
    assert "pipeline_melfusion.py" in files and not any("checkpoint-" in name for name in files)
    loaded = MelFusionPipeline.from_pretrained("tester/mine")
    assert loaded.synapse.config.image_latents == "noising" and loaded.synapse.config.num_inversion_steps is None
    assert b"melfusion" in files["README.md"]


def test_checkpoints_are_limited_and_bad_rows_refused_or_skipped(workspace, tmp_path):
    train(workspace, tmp_path / "limited", checkpointing_steps=1, checkpoints_total_limit=2, max_train_steps=4)
    assert sorted(path.name for path in (tmp_path / "limited").glob("checkpoint-*")) == [
        "checkpoint-3",
        "checkpoint-4",
    ]
    bad = workspace / "bad.jsonl"
    bad.write_text(
        (workspace / "train.jsonl").read_text() + '{"image": "0.png", "audio": "gone.flac", "caption": "x"}\n'
    )
    with pytest.raises(ValueError, match="(?s)8 .*gone.flac.*missing"):
        train(workspace, tmp_path / "bad", train_data=bad)
    assert not (tmp_path / "bad" / "model_index.json").exists()
    assert len(train(workspace, tmp_path / "bad", train_data=bad, skip_bad_rows=True, max_train_steps=1)) == 1


def test_a_lora_is_trained_resumed_fused_into_the_pipeline_and_kept_beside_the_synapse(workspace, tmp_path):
    base = MelFusionPipeline.from_pretrained(workspace / "pipeline")
    models = {"pretrained_image_model": tmp_path / "image", "pretrained_music_model": tmp_path / "music"}
    for name, component in base.components.items():
        if name.startswith("image_"):
            component.save_pretrained(tmp_path / "image" / name.removeprefix("image_"))
        elif component is not None and name != "synapse":
            component.save_pretrained(tmp_path / "music" / name)
    flags = {"pretrained_model_name_or_path": "", **models, "train": "lora", "rank": 2, "learning_rate": 0.1}
    flags |= {"use_ema": True, "lora_alpha": 4, "max_train_steps": 4, "checkpointing_steps": 2}
    whole = train(workspace, tmp_path / "whole", **flags)
    leave_at(tmp_path / "whole", tmp_path / "parts", 2)
    assert_near(train(workspace, tmp_path / "parts", resume_from_checkpoint="latest", **flags), whole, steps=10)
    for name in ("whole", "parts"):
        trained = MelFusionPipeline.from_pretrained(tmp_path / name)
        weights = trained.unet.state_dict()
        changed = {key for key, value in base.unet.state_dict().items() if not torch.equal(weights[key], value)}
        assert changed and all(re.search(r"(\.to_(q|k|v|out\.0)|\.conv\w+)\.weight$", key) for key in changed)
        composed = MelFusionPipeline.from_base_models(*models.values(), synapse=tmp_path / name)
        assert composed.unet.peft_config["default_0"].lora_alpha == 4
        composed.register_to_config(default_window_length_in_s=None)
        assert_near(play(composed), play(trained))
    checkpoint = sum(path.stat().st_size for path in (tmp_path / "whole" / "checkpoint-4").glob("*.safetensors"))
    assert checkpoint < (tmp_path / "whole" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "the synapse and a LoRA of the music UNet" in card

    # Going on: with the LoRA, with the music UNet that it becomes a part of, and with a synapse alone.
    more = {"pretrained_model_name_or_path": "", **models, "synapse": tmp_path / "whole", "max_train_steps": 1}
    with pytest.raises(ValueError, match="The LoRA beside --synapse has rank 2 and alpha 4.0"):
        train(workspace, tmp_path / "more", train="lora", rank=3, **more)
    file = Path("synapse", "pytorch_lora_weights.safetensors")
    for choice, kept in (("lora", True), ("synapse", True), ("unet", False)):
        train(workspace, tmp_path / "more", train=choice, synapse_learning_rate=1e-9, learning_rate=1e-9, **more)
        assert (tmp_path / "more" / file).is_file() == kept
        assert_near(play(MelFusionPipeline.from_pretrained(tmp_path / "more")), play(trained), steps=10_000)
        shutil.rmtree(tmp_path / "more" / "checkpoint-1")


def test_the_pictures_models_leave_once_their_features_are_cached(workspace, tmp_path, capsys):
    flags = validation_flags(workspace) | {"train": "unet", "max_train_steps": 3}
    usual = train(workspace, tmp_path / "usual", **flags)
    flags |= {"offload_image_side": True, "trajectory_cache": tmp_path / "features"}
    offloaded = train(workspace, tmp_path / "offloaded", **flags)
    assert_near(torch.tensor(offloaded).half(), torch.tensor(usual).half(), steps=2)
    said = capsys.readouterr().out
    assert "7 pictures of 7 rows to invert" in said and "1 pictures of 1 rows to invert" in said
    assert said.count("Forward and backward of a batch take") == 2
    one, two = (soundfile.read(tmp_path / name / "validation/step-3/0.wav")[0] for name in ("usual", "offloaded"))
    assert np.abs(one).max() > 0 and np.abs(one - two).mean() < 0.05 * np.abs(one).mean()
    # What is published is whole: the picture's models are loaded again.
    assert np.isfinite(play(MelFusionPipeline.from_pretrained(tmp_path / "offloaded"))).all()
    state = set_up_again(workspace, tmp_path / "offloaded", resume_from_checkpoint="latest", **flags)
    resume(state)
    assert state.position.step == 3 and "0 pictures of 7 rows to invert" in capsys.readouterr().out
    assert (state.pipe.image_vae, state.pipe.image_text_encoder, state.pipe.image_unet) == (None, None, None)


def test_a_disk_that_is_too_small_for_the_cache_is_told_before_it_is_full(workspace, tmp_path):
    with pytest.raises(ValueError, match="GiB free, but 8 pictures take .* GiB: give a folder on a larger disk"):
        train(workspace, tmp_path, resolution=1_000_000, trajectory_cache=tmp_path / "trajectories")


WRONG = {
    "no model": ({"pretrained_model_name_or_path": None}, "both --pretrained_image_model"),
    "two models": ({"pretrained_image_model": "a", "pretrained_music_model": "b"}, "already holds"),
    "no hub id": ({"push_to_hub": True}, "--push_to_hub needs --hub_model_id"),
    "hub id": ({"hub_model_id": "a/b/c"}, "--hub_model_id must be like user/name"),
    "crops": ({"random_image_crops": True}, "--random_image_crops needs"),
    "offloaded noising": ({"offload_image_side": True, "image_latents": "noising"}, "needs --image_latents inversion"),
    "offloaded stream": ({"offload_image_side": True, "streaming": True}, "cannot be used with --streaming"),
    "no data": ({"train_data": "nowhere.jsonl"}, "does not exist"),
    "data in a folder": ({"train_data": "."}, "--train_data . is a folder: see --dataset_name"),
    "no steps": ({"max_train_steps": 0}, "--max_train_steps must be above 0"),
    "NaN rate": ({"learning_rate": "nan"}, "--learning_rate must be above 0"),
    "split": ({"validation_split": "test"}, "--validation_split needs --validation_data"),
    "dropout": ({"text_dropout": 1.5}, r"--text_dropout must lie in \[0, 1\]"),
    "resume": ({"resume_from_checkpoint": "nowhere"}, "nowhere holds no custom_checkpoint_1.pkl"),
    "a file as output": ({"output_dir": __file__}, "test_train_melfusion.py is a file: give a folder"),
    "tracker": ({"report_to": "tensorbord"}, "--report_to must be one of none, all, .*, got 'tensorbord'"),
    "resume from another folder": ({"resume_from_checkpoint": "/"}, "/ holds no .* is no checkpoint of this script"),
    "train": ({"train": "vae"}, "invalid choice"),
    "scheduler": ({"lr_scheduler": "piecewise_constant"}, "invalid choice: 'piecewise_constant'"),
    "workers": ({"dataloader_num_workers": -1}, "--dataloader_num_workers must be 0 or above"),
    "samples": ({"num_validation_samples": -1}, "--num_validation_samples must be 0 or above"),
    "warmup": ({"lr_warmup_steps": -1}, "--lr_warmup_steps must be 0 or above"),
    "seed": ({"seed": -1}, "--seed must be 0 or above"),
    "weight decay": ({"adam_weight_decay": -0.1}, "--adam_weight_decay must be 0 or above"),
    "beta": ({"adam_beta1": 1.0}, r"--adam_beta1 must lie in \[0, 1\)"),
    "endless clips": ({"audio_length_in_s": "inf"}, "--audio_length_in_s must be finite"),
    "infinite rate": ({"synapse_learning_rate": "inf"}, "--synapse_learning_rate must be finite"),
    "NaN timesteps": ({"logit_mean": "nan"}, "--logit_mean must be finite"),
    "split of a file": ({"dataset_split": "test"}, "--dataset_split need --dataset_name"),
    "rank without a LoRA": ({"rank": 4}, "--rank needs --train lora"),
    "targets without a LoRA": ({"train": "unet", "lora_targets": "to_q"}, "--lora_targets needs --train lora"),
    "no rank": ({"train": "lora", "rank": 0}, "--rank must be above 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_flags_are_refused_before_anything_loads(workspace, tmp_path, capsys, case):
    flags, message = WRONG[case]
    given = arguments(workspace, tmp_path / "out", **{**flags})
    if None in flags.values():
        given = given[2:]
    with pytest.raises(SystemExit):
        train_melfusion.main(given)
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_a_size_that_no_call_takes_is_refused(workspace, tmp_path):
    with pytest.raises(ValueError, match="--resolution must be a multiple of 4, got 33"):
        train(workspace, tmp_path, resolution=33)
    assert not (tmp_path / "model_index.json").exists()


def test_the_card_tells_the_steps_that_were_taken_and_what_they_began_with(workspace, finished, tmp_path):
    leave_at(finished, tmp_path / "out", 3)
    train(workspace, tmp_path / "out", max_train_steps=1, resume_from_checkpoint="latest")
    facts = json.loads((tmp_path / "out" / "training.json").read_text())["facts"]
    assert facts["steps"] == 3 and facts["starting from"] == "the whole pipeline pipeline"


def reset_accelerate() -> None:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def test_a_set_is_checked_once_until_it_changes(workspace, tmp_path, capsys):
    for name in ("train.jsonl", "0.png", "0.flac", "1.png", "1.flac"):
        shutil.copy(workspace / name, tmp_path)
    rows = (workspace / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(rows[:2]))
    flags = arguments(workspace, tmp_path, train_data=tmp_path / "train.jsonl", check_data=True)

    def checked() -> tuple[bool, str, int]:
        reset_accelerate()
        status = 0
        try:
            train_melfusion.main(flags)
        except SystemExit as end:
            status = end.code
        output, errors = capsys.readouterr()
        return "Checking" in errors, output, status

    assert checked() == (True, f"{tmp_path / 'train.jsonl'}: no problems\n", 0) and not checked()[0]
    (tmp_path / "1.flac").write_bytes(b"no music")
    again, output, status = checked()
    assert again and "1.flac" in output and status == 1 and checked() == (False, output, 1)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(rows[0])
    again, output, status = checked()
    assert again and "repeats row 0" in output and status == 1


def test_a_folder_with_a_name_of_its_own_is_no_checkpoint(workspace, tmp_path):
    """Nor is one that this script did not write."""
    for name in ("checkpoint-best", "checkpoint-10-copy", "checkpoint-7"):
        (tmp_path / name).mkdir()
    assert len(train(workspace, tmp_path, max_train_steps=2, resume_from_checkpoint="latest")) == 2
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2"]
    assert len(list(tmp_path.glob("checkpoint-*"))) == 4
    # A run that does not go on from it would replace what it made.
    with pytest.raises(SystemExit):
        train_arguments.parse_arguments("", arguments(workspace, tmp_path))
    assert train_arguments.parse_arguments("", arguments(workspace, tmp_path, check_data=True)).check_data


def test_a_piece_of_validation_that_fails_ends_no_training(workspace, tmp_path, capsys):
    """The music autoencoder encodes as before, but decodes to NaN."""
    pipe = MelFusionPipeline.from_pretrained(workspace / "pipeline")
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(torch.nan)
    pipe.save_pretrained(tmp_path / "broken")
    flags = validation_flags(workspace) | {"pretrained_model_name_or_path": tmp_path / "broken"}
    train(workspace, tmp_path / "out", max_train_steps=2, validation_steps=1, **flags)
    output = capsys.readouterr().out
    assert output.count("no music for validation row 0") == 2 and "NaN" in output
    assert (tmp_path / "out" / "model_index.json").is_file()


def test_validation_measures_the_weights_that_are_published(workspace, tmp_path, capsys):
    flags = validation_flags(workspace) | {"num_validation_samples": 0, "synapse_learning_rate": 0.3}
    train(workspace, tmp_path / "ema", use_ema=True, **flags)
    train(workspace, tmp_path / "raw", **flags)
    # As good as no training: the loss of the weights that the first run published.
    flags |= {"pretrained_model_name_or_path": tmp_path / "ema", "synapse_learning_rate": 1e-12}
    train(workspace, tmp_path / "again", max_train_steps=1, **flags)
    averaged, raw, published = map(float, re.findall(r"validation loss (\S+)", capsys.readouterr().out))
    assert abs(averaged - published) < 2e-5 < abs(raw - published) / 10


def test_a_step_that_overflows_moves_neither_schedule_nor_average_nor_position(workspace, tmp_path, capsys):
    """float16 needs a GPU, what scales its gradients does not; here the first gradient of the alphas is infinite."""
    flags = {"use_ema": True, "lr_scheduler": "linear", "max_train_steps": 2}
    args = train_arguments.parse_arguments("", arguments(workspace, tmp_path, **flags))
    reset_accelerate()
    accelerator = train_melfusion.make_accelerator(args)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    state = train_melfusion.set_up(args, accelerator)
    alphas, seen = state.pipe.synapse.alphas, []
    before = alphas.clone()

    def overflow_once(gradient: torch.Tensor) -> torch.Tensor:
        counts = (state.position.step, state.ema.optimization_step, state.lr_scheduler.last_epoch)
        seen.append((counts, torch.equal(alphas, before)))
        # The first gradient is that of the pass which is measured before training.
        return gradient * (torch.inf if len(seen) == 2 else 1.0)

    alphas.register_hook(overflow_once)
    train_melfusion.train(state)
    assert seen == [((0, 0, 0), True)] * 3 + [((1, 1, 1), False)]
    assert [json.loads(line)["step"] for line in (tmp_path / "losses.jsonl").read_text().splitlines()] == [1, 2]
    assert "step 1: float16 overflowed; taken anew with scale 32768" in capsys.readouterr().out
    accelerator.scaler.update(train_melfusion.SMALLEST_LOSS_SCALE / 2)
    with pytest.raises(FloatingPointError, match="lower --learning_rate"):
        train_melfusion.tell_overflow(state)


@pytest.mark.parametrize("name", train_arguments.LR_SCHEDULERS)
def test_every_schedule_that_is_offered_can_be_made(name):
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1e-3)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=4)
    optimizer.step()
    schedule.step()
    assert np.isfinite(schedule.get_last_lr()).all()


def test_precision_is_that_of_the_launch_unless_the_command_says_otherwise(workspace, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", os.environ.get("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16"))
    precision = torch.get_float32_matmul_precision()
    try:
        for flags, expected in (
            ({}, ("bf16", precision)),
            ({"mixed_precision": "no", "allow_tf32": True}, ("no", "high")),
        ):
            args = train_arguments.parse_arguments("", arguments(workspace, tmp_path, **flags))
            reset_accelerate()
            accelerator = train_melfusion.make_accelerator(args)
            assert (accelerator.mixed_precision, torch.get_float32_matmul_precision()) == expected
    finally:
        torch.set_float32_matmul_precision(precision)
        reset_accelerate()


def set_up_again(workspace: Path, output: Path, **flags) -> State:
    """The state of a training before its first step."""
    reset_accelerate()
    args = train_arguments.parse_arguments("", arguments(workspace, output, **flags))
    return train_melfusion.set_up(args, train_melfusion.make_accelerator(args))


def test_a_resumed_run_follows_its_own_command_and_says_so(workspace, tmp_path, capsys):
    flags = {"use_ema": True, "lr_scheduler": "cosine", "train_batch_size": 4}
    train(workspace, tmp_path, max_train_steps=3, **flags)
    changed = {"max_train_steps": 6, "synapse_learning_rate": 0.02, "adam_beta2": 0.9, "ema_decay": 0.5}
    changed |= {"train_batch_size": 2, "resume_from_checkpoint": "latest"}
    state = set_up_again(workspace, tmp_path, **{**flags, **changed})
    capsys.readouterr()
    resume(state)
    (group,) = state.optimizer.param_groups
    # Three of six steps: the middle of the cosine.
    assert group["lr"] == pytest.approx(0.01) and group["betas"] == (0.9, 0.9) and group["fused"]
    assert state.ema.decay == 0.5 and state.ema.optimization_step == 3
    # One batch of four into the second epoch.
    assert (state.position.step, state.position.epoch, state.position.batch) == (3, 1, 2)
    assert all(moments["step"] == 3 for moments in state.optimizer.state.values())
    said = capsys.readouterr().out.splitlines()
    assert "Resumed at step 3." in said and len(said) == 6
    assert "--synapse_learning_rate is 0.02 from here on, no longer 0.001." in said
    batches = train_data.endless_batches(state.loader, state.position, state.accelerator.device)
    with state.bare_objective.attached():
        train_melfusion.train_step(state, batches)
    assert state.lr_scheduler.get_last_lr() == [pytest.approx(0.02 * (1 + np.cos(np.pi * 4 / 6)) / 2)]
    with pytest.raises(ValueError, match="checkpoint-3 was trained with --use_ema True"):
        resume(set_up_again(workspace, tmp_path, resume_from_checkpoint="latest"))


def test_validation_shows_what_the_picture_does(workspace, tmp_path, capsys):
    rows = (workspace / "train.jsonl").read_text().splitlines(keepends=True)[:4]
    (workspace / "own_picture.jsonl").write_text("".join(rows))
    (workspace / "same_picture.jsonl").write_text(re.sub(r'"image": "\d', '"image": "3', "".join(rows)))
    losses = {}
    for name in ("own_picture", "same_picture"):
        state = set_up_again(workspace, tmp_path, validation_data=workspace / f"{name}.jsonl")
        for alpha in (0.0, 0.5):
            with torch.no_grad(), state.bare_objective.attached():
                state.pipe.synapse.alphas.fill_(alpha)
                losses[name, alpha] = validation_losses(state)
    off, on = losses["own_picture", 0.0], losses["own_picture", 0.5]
    assert off.shape == (4, 3) and torch.equal(off[:, 0], off[:, 1]) and torch.equal(off[:, 0], off[:, 2])
    assert_near(on[:, 2].float(), off[:, 2].float())
    assert (on[:, 0] - on[:, 2]).abs().mean() > 1e-4 < (on[:, 0] - on[:, 1]).abs().mean()
    same_on = losses["same_picture", 0.5]
    assert torch.equal(same_on[:, 0], same_on[:, 1]) and (same_on[:, 0] - same_on[:, 2]).abs().mean() > 1e-4
    figures, table = compare_pictures(torch.tensor([[1.0, 1.5, 3.0], [2.0, 2.7, 4.0]]).double())
    assert list(figures) == ["validation_loss", "validation_loss/another_picture", "validation_loss/no_picture"]
    assert list(figures.values()) == pytest.approx([1.5, 2.1, 3.5])
    assert "another row's   2.10000   +0.60000 +- 0.19600" in table and "none   3.50000   +2.00000 +- 0.00000" in table
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compare_pictures(torch.tensor([[1.0, 1.5, 3.0]]))[1].endswith("none   3.00000   +2.00000")


def test_no_more_workers_load_than_there_are_cores(workspace, tmp_path, capsys):
    """torch warns of them at every start."""
    given = arguments(workspace, tmp_path, dataloader_num_workers=1000)
    reset_accelerate()
    loading = train_data.loading(train_arguments.parse_arguments("", given), Accelerator(cpu=True))
    assert 1 <= loading["num_workers"] <= os.cpu_count()
    assert "--dataloader_num_workers 1000: there are" in capsys.readouterr().out


def test_the_memory_of_weights_is_counted_before_the_first_step(workspace, tmp_path, capsys):
    state = set_up_again(workspace, tmp_path, train="unet", use_ema=True)
    trained, pipe = [state.pipe.synapse, state.pipe.unet], state.pipe
    frozen = [pipe.vae, pipe.text_encoder, pipe.vocoder, pipe.image_vae, pipe.image_text_encoder, pipe.image_unet]
    counts = [
        sum(parameter.numel() for part in parts for parameter in part.parameters()) for parts in (trained, frozen)
    ]
    said = capsys.readouterr().out
    assert f"{4 * counts[1] / 2**30:.3f} GiB of frozen weights, {4 * 5 * counts[0] / 2**30:.3f} GiB" in said
    assert f"for {counts[0]:,} trained parameters (5 numbers each)" in said


def test_memory_and_time_of_a_step_are_measured_and_nothing_is_changed_by_that(workspace, tmp_path):
    state = set_up_again(workspace, tmp_path, max_train_steps=3600, gradient_accumulation_steps=2, train="unet")
    batch = next(train_data.endless_batches(state.loader, state.position, state.accelerator.device))
    before = {name: tensor.clone() for name, tensor in state.objective.state_dict().items()}
    began = time.perf_counter()
    with state.bare_objective.attached():
        said = describe_step(state, batch)
    seconds, memory, hours = map(float, re.search(r"take (\S+) s and at most (\S+) GiB.*about (\S+) h", said).groups())
    # What is said is rounded to hundredths.
    assert 0.01 <= seconds <= time.perf_counter() - began + 0.005 and hours == pytest.approx(2 * seconds, abs=0.06)
    # That of the process, in which torch alone takes a tenth.
    assert 0.1 < memory <= psutil.virtual_memory().total / 2**30
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.objective.state_dict().items())
    assert all(parameter.grad is None for parameter in state.objective.parameters())
    assert not state.optimizer.state and state.position.step == 0


def test_the_peak_of_memory_is_that_since_it_was_forgotten():
    device, size = torch.device("cpu"), 400_000_000
    forget_peak_memory(device)
    before = peak_memory(device)
    torch.ones(size, dtype=torch.uint8)
    assert peak_memory(device) - before > 0.8 * size
    forget_peak_memory(device)
    assert peak_memory(device) - before < 0.5 * size


def test_trackers_get_the_music_the_mel_and_the_figures(tmp_path, monkeypatch):
    """Each without an account or the net; what they were given is found in the files that they keep."""
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
    }.items():
        monkeypatch.setenv(name, value)
    audio, mel = tmp_path / "0.wav", tmp_path / "0.png"
    save_audio(audio, 0.4 * np.sin(np.arange(8000) / 5), 16000)
    photograph(0, 64, 32).save(mel)
    reset_accelerate()
    names = ["tensorboard", "trackio", "wandb"]
    accelerator = Accelerator(log_with=names, project_dir=tmp_path)
    accelerator.init_trackers("melfusion", config={"steps": "2"}, init_kwargs={"trackio": {"embed": False}})
    assert sorted(tracker.name for tracker in accelerator.trackers) == names
    accelerator.log({"alpha/00": 0.25}, step=1)
    for tracker in accelerator.trackers:
        log_piece(tracker, 0, audio, mel, 1)
    accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "melfusion"), {"audio": 0, "images": 0}).Reload()
    assert events.Scalars("alpha/00")[0].value == 0.25
    assert events.Audio("audio/0")[0].sample_rate == 16000 and events.Images("mel/0")[0].width == 64
    for folder in ("wandb", "trackio"):
        files = {path.suffix for path in (tmp_path / folder).rglob("*.*") if "media" in path.parts}
        assert {".wav", ".png"} <= files, (folder, files)


def train_forever(workspace: Path, output: Path, flags: dict) -> None:
    start_anew()
    sys.stdout = sys.stderr = open(os.devnull, "w")
    train(workspace, output, **flags)


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_sigkill_at_a_random_moment_loses_nothing(workspace, tmp_path, kills):
    """The run is killed while it trains or writes; the curve is that of a run that was never killed."""
    steps = 6 * kills
    flags = {"max_train_steps": steps, "checkpointing_steps": 1, "checkpoints_total_limit": 2, "use_ema": True}
    whole = train(workspace, tmp_path / "whole", **flags)
    chance, output = random.Random(0), tmp_path / "killed"
    context = multiprocessing.get_context("fork")
    killed = 0
    while killed < kills:
        process = context.Process(
            target=train_forever, args=(workspace, output, {**flags, "resume_from_checkpoint": "latest"})
        )
        process.start()
        goal = len(list_checkpoints(output)) and latest_step(output)
        seen = {}
        while process.is_alive() and latest_step(output) < goal + 2:
            seen.setdefault(latest_step(output), time.monotonic())
            time.sleep(0.005)
        # By the pace of the run: after half a second a fast machine would be at its end.
        time.sleep(chance.uniform(0, 1.5) * min(0.3, time.monotonic() - max(seen.values())))
        if not process.is_alive():
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        killed += 1
    assert killed == kills
    resumed = train(workspace, output, resume_from_checkpoint="latest", **flags)
    assert_near(resumed, whole, steps=10)


def test_a_full_disk_spares_the_checkpoints_and_the_pipeline_that_were_there(workspace, finished, tmp_path):
    whole, output = losses(finished), tmp_path / "full"
    train(workspace, output, max_train_steps=3)

    def largest(in_checkpoint: bool) -> int:
        files = contents(output).items()
        return max(len(content) for name, content in files if name.startswith("checkpoint-") == in_checkpoint)

    limits = {"checkpoint": largest(True) // 2, "pipeline": (largest(True) + largest(False)) // 2}
    assert limits["pipeline"] > largest(True)
    for broken, limit in limits.items():
        before = contents(output)
        message = on_a_full_disk(lambda: train(workspace, output, resume_from_checkpoint="latest"), limit)
        after = contents(output)
        assert message != "written" and "losses.jsonl" in before
        assert all(after[name] == content for name, content in before.items() if name != "losses.jsonl"), message
        new = {Path(name).parts[0] for name in after.keys() - before.keys()}
        assert new == (set() if broken == "checkpoint" else {"checkpoint-6"})
        assert np.isfinite(play(MelFusionPipeline.from_pretrained(output))).all()
    resumed = train(workspace, output, resume_from_checkpoint="latest")
    assert_near(resumed, whole, steps=10)
    one, other = (MelFusionPipeline.from_pretrained(folder) for folder in (finished, output))
    assert_near(play(one), play(other))


def latest_step(output: Path) -> int:
    checkpoints = list_checkpoints(output)
    return int(checkpoints[-1].name.rpartition("-")[2]) if checkpoints else 0


@pytest.mark.slow
def test_accelerate_launch_with_two_processes_trains_as_one(workspace, tmp_path):
    whole = train(workspace, tmp_path / "one", train_batch_size=4, max_train_steps=5)
    # On the CPU accelerate starts several processes only by its launcher for several GPUs.
    launch = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    script = ROOT / "examples" / "train_melfusion.py"
    command = [sys.executable, "-m", *launch.split(), "--dynamo_backend", "no", str(script)]
    flags = arguments(workspace, tmp_path / "two", train_batch_size=2, max_train_steps=5)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(command + flags, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert_near(losses(tmp_path / "two"), whole, steps=100)
    one, two = (MelFusionPipeline.from_pretrained(tmp_path / name).synapse for name in ("one", "two"))
    for key, tensor in one.state_dict().items():
        assert_near(two.state_dict()[key], tensor)

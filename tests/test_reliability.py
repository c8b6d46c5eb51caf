"""What must not break a pipeline: threads, Ctrl-C, a full disk, and time."""

import copy
import os
import pickle
import random
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import assert_near, generator, photograph
from full_disk import contents, on_a_full_disk
from processes import prints, start

from melfusion_pipeline import ImageFeatures, MelFusionPipeline
from melfusion_pipeline.attention_melfusion import BlendKVAttnProcessor, RecordKVAttnProcessor
from melfusion_pipeline.audio import save_audio
from melfusion_pipeline.caches import TrajectoryCache
from melfusion_pipeline.locks_melfusion import ComponentLocks

ROOT = Path(__file__).parents[1]
FAST = {"num_inference_steps": 4, "num_inversion_steps": 2}


def run(pipe: MelFusionPipeline, image, prompt: str, seed: int, **kwargs) -> np.ndarray:
    return pipe(image, prompt, generator=generator(seed), **{**FAST, **kwargs}).audios


def own_processors(pipe: MelFusionPipeline) -> list:
    """The processors of this package that are installed in the UNets."""
    processors = [*pipe.unet.attn_processors.values(), *pipe.image_unet.attn_processors.values()]
    return [single for single in processors if isinstance(single, (BlendKVAttnProcessor, RecordKVAttnProcessor))]


# ------------------------------------------------------------------------------------------------------- threads

# Calls that differ in everything that a call keeps in the pipeline, its UNets or its scheduler.
CALLS = [
    {"image": photograph(1), "prompt": "a calm piano", "seed": 1, "guidance_scale": 3.0},
    {"image": None, "prompt": "drums", "seed": 2, "guidance_scale": 1.0, "num_inference_steps": 6},
    {"image": photograph(2), "prompt": "a choir", "seed": 3, "image_guidance_scale": 2.0},
    {"image": photograph(3), "prompt": "wind", "seed": 4, "num_inversion_steps": 3, "num_inference_steps": 3},
]


def run_in_threads(pipes: list[MelFusionPipeline]) -> list[np.ndarray]:
    """Makes all calls at once, each in a thread of its own, the pipelines in turn."""
    barrier = threading.Barrier(len(CALLS))

    def play(index: int) -> np.ndarray:
        barrier.wait()
        return run(pipes[index % len(pipes)], **CALLS[index])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(len(CALLS)) as threads:
            return list(threads.map(play, range(len(CALLS))))
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("sharing", ["one pipeline", "from_pipe", "components"])
def test_calls_in_several_threads_give_what_they_give_one_after_the_other(pipe, sharing):
    expected = [run(pipe, **call) for call in CALLS]
    other = {
        "one pipeline": lambda: pipe,
        "from_pipe": lambda: MelFusionPipeline.from_pipe(pipe),
        "components": lambda: MelFusionPipeline(**pipe.components),
    }[sharing]()
    other.set_progress_bar_config(disable=True)
    assert other.unet is pipe.unet and other.scheduler is pipe.scheduler
    for _ in range(2):
        for one, alone in zip(run_in_threads([pipe, other]), expected):
            assert np.array_equal(one, alone)
    assert not own_processors(pipe)


def test_without_the_lock_threads_would_disturb_each_other(pipe, monkeypatch):
    """The test above can fail: without locks, results change or calls break."""
    expected = [run(pipe, **call) for call in CALLS]
    monkeypatch.setattr(ComponentLocks, "of", lambda self, components: [])
    for _ in range(5):
        try:
            results = run_in_threads([pipe])
        except Exception:
            return
        if not all(map(np.array_equal, results, expected)):
            return
    pytest.fail("calls at the same time gave the right results without a lock")


@pytest.mark.parametrize("shared", [None, "scheduler", "image_unet"])
def test_only_pipelines_that_share_a_component_wait_for_each_other(pipe, shared):
    """Two calls meet in their callbacks if neither waits for the other, as on two GPUs."""
    other = copy.deepcopy(pipe)
    if shared:
        other.register_modules(**{shared: getattr(pipe, shared)})
    barrier = threading.Barrier(2)

    def meet(*_):
        barrier.wait(timeout=2 if shared else 60)

    with ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(run, each, **CALLS[0], callback_on_step_end=meet) for each in (pipe, other)]
        errors = [call.exception() for call in calls]
    assert [type(error) for error in errors] == [threading.BrokenBarrierError if shared else type(None)] * 2
    assert not own_processors(pipe) and not own_processors(other)


def test_pictures_encoded_in_threads_while_music_is_made_are_the_same(pipe):
    pictures = [photograph(seed) for seed in range(3)]
    expected = [pipe.encode_image(picture, num_inversion_steps=3) for picture in pictures]
    audio = run(pipe, **CALLS[0])
    with ThreadPoolExecutor(4) as threads:
        features = [threads.submit(pipe.encode_image, picture, num_inversion_steps=3) for picture in pictures]
        assert np.array_equal(threads.submit(run, pipe, **CALLS[0]).result(), audio)
        for future, alone in zip(features, expected):
            assert all(torch.equal(future.result().keys[layer], key) for layer, key in alone.keys.items())


def test_only_one_thread_at_a_time_has_the_pictures_vae_which_runs_in_another_dtype_meanwhile(pipe, monkeypatch):
    encode, inside, most = pipe.image_vae.encode, [], []

    def count(pixel_values):
        inside.append(pixel_values)
        time.sleep(0.02)
        most.append(len(inside))
        inside.pop()
        return encode(pixel_values)

    monkeypatch.setattr(pipe.image_vae, "encode", count)
    with ThreadPoolExecutor(2) as threads:
        for latents in threads.map(pipe.prepare_image_latents, [photograph(0), photograph(1)]):
            assert latents.isfinite().all()
    assert most == [1, 1]


def test_a_callback_may_call_the_pipeline_again(pipe):
    nested = []

    def call_again(pipe, step, timestep, tensors):
        nested.append(pipe.encode_image(photograph(5), num_inversion_steps=2))

    assert np.isfinite(run(pipe, **CALLS[0], callback_on_step_end=call_again)).all() and len(nested) == 4


def test_pipelines_are_copied_pickled_and_saved_in_spite_of_their_locks(pipe, tmp_path):
    expected = run(pipe, **CALLS[0])
    pipe.save_pretrained(tmp_path)
    for other in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe)), MelFusionPipeline.from_pretrained(tmp_path)):
        other.set_progress_bar_config(disable=True)
        assert other.unet is not pipe.unet
        assert_near(run(other, **CALLS[0]), expected)


def test_the_lock_is_free_again_after_an_error(pipe):
    with pytest.raises(ValueError, match="num_inference_steps"):
        pipe(prompt="a", num_inference_steps=0)
    with pytest.raises(TypeError, match="`callback_on_step_end` must return a dict or None, got 5"):
        run(pipe, **CALLS[0], callback_on_step_end=lambda *_: 5)
    with ThreadPoolExecutor(1) as threads:
        assert np.isfinite(threads.submit(run, pipe, **CALLS[0]).result(timeout=60)).all()


# ------------------------------------------------------------------------------------------------------- Ctrl-C


def call_until_interrupted(pipe: MelFusionPipeline, attempts: int) -> None:
    expected = run(pipe, **CALLS[0])
    for attempt in range(attempts):
        try:
            # Also where the shell started the tests in the background, with SIGINT ignored.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            print("calling")
            while True:
                # More steps of the picture than of the music: the signal falls into either stage.
                run(pipe, photograph(attempt), "strings", 7, num_inversion_steps=12, num_inference_steps=12)
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            assert not own_processors(pipe)
            assert np.array_equal(run(pipe, **CALLS[0]), expected)
            print("usable")


def test_ctrl_c_at_any_moment_leaves_a_usable_pipeline(pipe, tmp_path):
    """A real SIGINT, several times, in the middle of calls in a process of their own."""
    chance, attempts = random.Random(0), 6
    printed = tmp_path / "printed"
    child = start(lambda: call_until_interrupted(pipe, attempts), printed)
    try:
        for lines in range(1, 2 * attempts, 2):
            assert prints(child, printed, lines), printed.read_text()
            time.sleep(chance.uniform(0.02, 0.5))
            os.kill(child.pid, signal.SIGINT)
            # Python drops an interrupt that falls into a destructor; a user would press the keys again.
            while not prints(child, printed, lines + 1, seconds=60):
                os.kill(child.pid, signal.SIGINT)
        child.join(timeout=60)
        assert child.exitcode == 0 and printed.read_text() == "calling\nusable\n" * attempts, printed.read_text()
    finally:
        child.kill()


@pytest.mark.parametrize("step", [0, 2, 3])
def test_an_interrupt_in_a_callback_leaves_the_next_call_as_it_would_have_been(pipe, step):
    expected = [run(pipe, **call) for call in CALLS]

    def interrupt(pipe, index, timestep, tensors):
        if index == step:
            assert own_processors(pipe)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pipe, **CALLS[0], callback_on_step_end=interrupt)
    assert not own_processors(pipe)
    assert all(np.array_equal(run(pipe, **call), alone) for call, alone in zip(CALLS, expected))


# ------------------------------------------------------------------------------------------------------- full disk


def test_a_full_disk_spares_the_features_and_the_music_that_were_there(pipe, tmp_path):
    features, audio = pipe.encode_image(photograph(), num_inversion_steps=2), np.sin(np.arange(9000) / 9.0)
    writers = {
        "features.safetensors": features.save,
        "music.wav": lambda path: save_audio(path, audio, 16000),
        "music.flac": lambda path: save_audio(path, audio, 16000),
    }
    for name, writer in writers.items():
        writer(tmp_path / name)
    before = contents(tmp_path)
    for name, writer in writers.items():
        message = on_a_full_disk(lambda name=name, writer=writer: writer(tmp_path / name), len(before[name]) // 2)
        assert message.startswith("OSError") and name in message
        assert contents(tmp_path) == before
        assert on_a_full_disk(lambda name=name, writer=writer: writer(tmp_path / name), 10**8) == "written"
        before = contents(tmp_path)
    assert ImageFeatures.load(tmp_path / "features.safetensors").num_images == 1


def test_a_full_disk_spares_the_pipeline_that_was_there(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipeline")
    before = contents(tmp_path)
    with torch.no_grad():
        pipe.unet.conv_in.weight.add_(1.0)
    largest = max(map(len, before.values()))
    for share in (0.01, 0.3, 0.9):
        message = on_a_full_disk(lambda: pipe.save_pretrained(tmp_path / "pipeline"), int(share * largest))
        assert message != "written" and contents(tmp_path) == before, message
    assert on_a_full_disk(lambda: pipe.save_pretrained(tmp_path / "pipeline"), 2 * largest) == "written"
    assert contents(tmp_path).keys() == before.keys() and contents(tmp_path) != before


def test_a_pipeline_is_staged_in_its_own_folder_which_may_be_a_mount(pipe, tmp_path, monkeypatch):
    stages, save = [], type(pipe.vocoder).save_pretrained

    def watch(self, folder, **kwargs):
        stages.append(Path(folder).parent)
        return save(self, folder, **kwargs)

    monkeypatch.setattr(type(pipe.vocoder), "save_pretrained", watch)
    pipe.save_pretrained(tmp_path / "pipeline")
    assert [stage.parent for stage in stages] == [tmp_path / "pipeline"] and not stages[0].exists()


def test_a_full_disk_leaves_no_half_of_a_trajectory(pipe, tmp_path):
    photograph().save(tmp_path / "picture.png")
    cache = TrajectoryCache(tmp_path / "cache", pipe, 3, 32)
    picture = [str(tmp_path / "picture.png")]
    message = on_a_full_disk(lambda: cache.build(picture), 500)
    assert message.startswith("OSError") and "cannot be written" in message
    assert not contents(tmp_path / "cache") and cache.missing(picture) == [0]


# ------------------------------------------------------------------------------------------------------- time


@pytest.mark.slow
def test_two_hundred_generations_keep_the_memory_flat(pipe):
    memory = []
    for index in range(200):
        picture = photograph(index % 7, 48 + index % 5, 32)
        run(pipe, picture, f"music {index}", index, image_guidance_scale=1.5 if index % 2 else None)
        memory.append(psutil.Process().memory_info().rss / 2**20)
    curve = {count: round(memory[count - 1], 1) for count in (1, 5, 10, *range(25, 201, 25))}
    print("resident memory in MiB after so many generations:", curve)
    assert max(memory[50:]) - memory[49] < 4

"""SD 1.5 with AudioLDM-S at full size, random weights: `make test-slow`."""

import resource
import time

import numpy as np
import pytest
import torch
from conftest import generator, photograph
from full_size import build_components

from melfusion_pipeline import MelFusionPipeline

# A CPU without bfloat16 instructions convolves in it at 0.3 GFLOP/s, 300 times slower than in float32: the models are
# as large there, but the picture and the music small.
CASES = [
    pytest.param(torch.float32, 512, 10.24, 2, id="float32"),
    pytest.param(torch.bfloat16, 64, 0.32, 1, id="bfloat16"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "image_size", "audio_length_in_s", "steps"), CASES)
def test_stable_diffusion_with_audioldm_runs_at_full_size(dtype, image_size, audio_length_in_s, steps, capsys):
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        components = build_components()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.nn.init.constant_(components["synapse"].alphas, 0.5)
    pipe = MelFusionPipeline(**components)
    start = time.perf_counter()
    audio = pipe(
        photograph(width=768, height=512),
        "a calm piano",
        image_size=image_size,
        audio_length_in_s=audio_length_in_s,
        num_inference_steps=steps,
        num_inversion_steps=steps,
        generator=generator(),
    ).audios
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    with capsys.disabled():
        size = f"{image_size} px, {audio_length_in_s} s, {steps} + {steps} steps"
        print(f"\n{dtype}, {size}: {seconds:.0f} s, peak resident memory of the process {peak:.2f} GiB")
    assert audio.shape == (1, round(audio_length_in_s * 16000)) and np.isfinite(audio).all()

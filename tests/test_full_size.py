"""SD 1.5 with AudioLDM-S at full size, random weights: `make test-slow`."""

import resource
import time

import numpy as np
import pytest
import torch
from conftest import generator, photograph
from full_size import build_components

from melfusion_pipeline import MelFusionPipeline


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_stable_diffusion_with_audioldm_runs_at_full_size(dtype, capsys):
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
        audio_length_in_s=10.24,
        num_inference_steps=2,
        num_inversion_steps=2,
        generator=generator(),
    ).audios
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    with capsys.disabled():
        print(f"\n{dtype}: {seconds:.0f} s for 2 + 2 steps, peak resident memory of the process {peak:.2f} GiB")
    assert audio.shape == (1, 163_840) and np.isfinite(audio).all()

"""Tiny components of the real classes, built locally, and the settings that all tests share.

The process that hands out the tests reads this file too and runs none: torch and the libraries on it take seconds to
import, and are imported where they are needed.
"""

from __future__ import annotations

import gc
import inspect
import os
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import pytest

if TYPE_CHECKING:
    import torch
    from diffusers import AudioLDM2Pipeline

    from melfusion_pipeline import MelFusionPipeline

# Read when torch is imported, here and in the processes that tests start. Tiny tensors gain nothing from threads: they
# wait for one another in busy loops, which is several times the work where the cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing in the tests may reach the network; tests that need a Hub start a loopback one and point to it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if os.environ.get("ATEN_CPU_CAPABILITY") == "default":
    # torch asks oneDNN whether the processor packs bfloat16, and fails where its own kernels were told not to.
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")

# What takes longest begins first: begun last, it would keep one process busy while the others have nothing left.
LONGEST = (
    "readme",
    "loading_melfusion",
    "train_melfusion",
    "long_pieces",
    "pipeline_melfusion",
    "loading_families",
    "examples",
    "adapters_melfusion",
    "small_checkpoint",
    "notebook",
    "small_checkpoint_training",
    "train_sets",
    "publish",
    "evaluate",
    "families_melfusion",
    "training",
    "given_audio_melfusion",
    "reliability",
    "app",
    "fuzz_melfusion",
    "attention_melfusion",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {f"test_{name}": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


@pytest.fixture(scope="module", autouse=True)
def imported_objects_stay() -> None:
    """Spares the collector, and processes copied from this one, half a million objects of the libraries imported."""
    gc.collect()
    gc.freeze()
    # By default it comes after every seven hundred new objects, and a model has thousands.
    gc.set_threshold(10_000)


def rounding_error(expected, steps: int = 1000) -> float:
    """How far apart two computations of `expected` may come out: so many steps of its dtype at its largest value.

    Kernels differ from processor to processor and with the size of the batch, and a small difference of large values
    carries the error of the large ones: neither an absolute bound nor one relative to each element holds everywhere.
    """
    import torch

    expected = torch.as_tensor(expected)
    return steps * torch.finfo(expected.dtype).eps * expected.abs().max().item()


def assert_near(actual, expected, steps: int = 1000) -> None:
    """Checks that two computations of the same thing agree up to `rounding_error`; their dtypes must be the same."""
    import torch

    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    torch.testing.assert_close(actual, expected, atol=rounding_error(expected, steps), rtol=0)


@pytest.fixture
def components() -> dict:
    from copies import untrained_components

    return untrained_components()


@pytest.fixture
def pipe(components: dict) -> MelFusionPipeline:
    from melfusion_pipeline import MelFusionPipeline

    pipe = MelFusionPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def photograph(seed: int = 0, width: int = 48, height: int = 32) -> PIL.Image.Image:
    """A picture with structure at several scales."""
    rng = np.random.default_rng(seed)
    coarse = PIL.Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)).resize((width, height))
    noise = rng.normal(0, 8, (height, width, 3))
    return PIL.Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture
def image() -> PIL.Image.Image:
    return photograph()


def generator(seed: int = 0) -> torch.Generator:
    import torch

    return torch.Generator().manual_seed(seed)


def audioldm2_oracle(components: dict) -> AudioLDM2Pipeline:
    """diffusers' own pipeline, in eval mode, which leaves the waveforms in the order of their noise."""
    import torch
    from diffusers import AudioLDM2Pipeline

    names = inspect.signature(AudioLDM2Pipeline).parameters.keys() - {"feature_extractor"}
    oracle = AudioLDM2Pipeline(feature_extractor=None, **{name: components[name] for name in names})
    for component in oracle.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    oracle.score_waveforms = lambda audio, **_: audio
    oracle.set_progress_bar_config(disable=True)
    return oracle


@pytest.fixture
def hub(tmp_path):
    """A Hub on the loopback interface, to which everything in this process and its children talks."""
    with pytest.MonkeyPatch.context() as monkeypatch, use_hub(tmp_path / "huggingface", monkeypatch) as hub:
        yield hub


@contextmanager
def use_hub(home: Path, monkeypatch: pytest.MonkeyPatch):
    """Starts a Hub and points to it all that reads the Hub's address, here and in child processes."""
    import diffusers.utils.dynamic_modules_utils
    import huggingface_hub
    import transformers.dynamic_module_utils
    import transformers.utils.hub
    from hub_standin import HubStandIn

    constants = huggingface_hub.constants
    with HubStandIn() as hub:
        for name, value in hub.environment(home).items():
            monkeypatch.setenv(name, value)
        url = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)
        # transformers 5.0 does not keep its client yet.
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
        if "datasets" in sys.modules:
            configuration = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": False, "HF_DATASETS_CACHE": home / "sets"}
            for name, value in configuration.items():
                monkeypatch.setattr(sys.modules["datasets"].config, name, value)
        for module in (diffusers.utils.dynamic_modules_utils, transformers.dynamic_module_utils):
            monkeypatch.setattr(module, "HF_MODULES_CACHE", str(home / "modules"))
        # What other Hubs of this process gave must not be found first.
        monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not entry.endswith("/modules")])
        for name in [name for name in sys.modules if name.startswith("diffusers_modules")]:
            monkeypatch.delitem(sys.modules, name)
        yield hub


@pytest.fixture
def browser(tmp_path):
    """Headless Chromium: `apt-get install chromium chromium-driver`."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,900"):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "downloads")})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)
    return result

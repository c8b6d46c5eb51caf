import statistics
import subprocess
import sys
import time

CLASSES = (
    "from diffusers import AudioPipelineOutput, AutoencoderKL, DDIMScheduler, DiffusionPipeline\n"
    "from diffusers import UNet2DConditionModel\n"
    "from diffusers.models.attention_processor import Attention\n"
    "from transformers import ClapTextModelWithProjection, CLIPTextModel, CLIPTokenizer, RobertaTokenizer\n"
    "from transformers import SpeechT5HifiGan\n"
)


def import_seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def test_importing_the_package_costs_little_more_than_the_classes_it_uses(capsys):
    pairs = [(import_seconds(CLASSES), import_seconds("import melfusion_pipeline")) for _ in range(3)]
    classes, package = (statistics.median(times) for times in zip(*pairs))
    ratio = statistics.median(package / classes for classes, package in pairs)
    with capsys.disabled():
        print(f"\nimport: classes {classes:.2f} s, melfusion_pipeline {package:.2f} s, ratio {ratio:.2f}")
    assert ratio < 1.3

import resource
import subprocess
import sys

CLASSES = (
    "from diffusers import AudioPipelineOutput, AutoencoderKL, DDIMScheduler, DiffusionPipeline\n"
    "from diffusers import UNet2DConditionModel\n"
    "from diffusers.models.attention_processor import Attention\n"
    "from transformers import ClapTextModelWithProjection, CLIPTextModel, CLIPTokenizer, RobertaTokenizer\n"
    "from transformers import SpeechT5HifiGan\n"
)


def import_seconds(code: str) -> float:
    """Seconds of the processor: other tests beside this one slow the clock on the wall."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_importing_the_package_costs_little_more_than_the_classes_it_uses(capsys):
    pairs = [(import_seconds(CLASSES), import_seconds("import melfusion_pipeline")) for _ in range(2)]
    classes, package = (min(times) for times in zip(*pairs))
    ratio = package / classes
    with capsys.disabled():
        print(f"\nimport: classes {classes:.2f} s, melfusion_pipeline {package:.2f} s, ratio {ratio:.2f}")
    assert ratio < 1.3

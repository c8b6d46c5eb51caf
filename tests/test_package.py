import subprocess
import sys

CLASSES = (
    "from diffusers import AudioPipelineOutput, AutoencoderKL, DDIMScheduler, DiffusionPipeline\n"
    "from diffusers import UNet2DConditionModel\n"
    "from diffusers.models.attention_processor import Attention\n"
    "from transformers import ClapTextModelWithProjection, CLIPTextModel, CLIPTokenizer, RobertaTokenizer\n"
    "from transformers import SpeechT5HifiGan\n"
)


# Seconds of the processor since Python started: other tests beside this one slow the clock on the wall.
MEASURED = f"""
import time
{CLASSES}
classes = time.process_time()
import melfusion_pipeline
print(classes, time.process_time())
"""


def test_importing_the_package_costs_little_more_than_the_classes_it_uses(capsys):
    result = subprocess.run([sys.executable, "-c", MEASURED], check=True, capture_output=True, text=True)
    classes, package = map(float, result.stdout.split())
    ratio = package / classes
    with capsys.disabled():
        print(f"\nimport: classes {classes:.2f} s, melfusion_pipeline {package:.2f} s, ratio {ratio:.2f}")
    assert ratio < 1.3

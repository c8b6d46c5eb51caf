"""Every row of the table of loading ways: local folders and a loopback Hub, with and without the package installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import assert_near, generator, photograph
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, PNDMScheduler
from transformers import ClapConfig, ClapModel
from untrained import picture_unet, untrained_components

from melfusion_pipeline import MelFusionPipeline, VisualSynapse

ROOT = Path(__file__).parents[1]
ROOMS = "attention checkpoint checks features inversion pictures pipeline".split()
CODE = {f"{room}_melfusion.py" for room in ROOMS} | {"synapse/modeling_melfusion.py"}


def play(pipe: DiffusionPipeline) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    kwargs = {"num_inference_steps": 2, "num_inversion_steps": 2, "generator": generator()}
    return pipe(photograph(), "a calm piano", **kwargs).audios


def assert_equal_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """Saved and loaded again, weights are bit for bit what they were, rounded to the dtype they are loaded in."""
    weights = other.state_dict()
    assert one.state_dict().keys() == weights.keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(weights[name], tensor.to(weights[name].dtype)), name


def booby_trap(folder: Path) -> None:
    """Makes every file of code in a checkpoint fail when it runs."""
    for name in CODE:
        (folder / name).write_text("raise RuntimeError('the code of the checkpoint ran')\n")


@pytest.fixture
def checkpoint(pipe, tmp_path) -> Path:
    pipe.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


# ------------------------------------------------------------ with the package installed


def test_a_folder_loads_and_plays_the_same_without_running_its_code(pipe, checkpoint):
    assert {name for name in CODE if (checkpoint / name).is_file()} == CODE
    assert not list(checkpoint.rglob("*.bin")) and len(list(checkpoint.rglob("*.safetensors"))) == 8
    booby_trap(checkpoint)
    loaded = MelFusionPipeline.from_pretrained(checkpoint)
    assert type(loaded.synapse) is VisualSynapse
    assert_near(play(loaded), play(pipe))
    synapse = VisualSynapse.from_pretrained(checkpoint, subfolder="synapse")
    assert_equal_weights(pipe.synapse, synapse)


def test_without_trust_diffusers_refuses_a_folder_and_a_repository(pipe, checkpoint, hub):
    hub.add_repo("tester/melfusion", checkpoint)
    for source in (checkpoint, "tester/melfusion"):
        with pytest.raises(ValueError, match="trust_remote_code"):
            DiffusionPipeline.from_pretrained(source)


def test_what_is_pushed_is_complete_and_loads_also_offline_and_after_pushing_again(pipe, hub, monkeypatch):
    pipe.push_to_hub("tester/melfusion")
    files = hub.files("tester/melfusion")
    assert CODE | {"model_index.json", "README.md"} <= files.keys()
    index = json.loads(files["model_index.json"])
    assert index["_class_name"] == ["pipeline_melfusion", "MelFusionPipeline"]
    assert index["synapse"] == ["modeling_melfusion", "VisualSynapse"]
    expected = play(pipe)
    assert_near(play(MelFusionPipeline.from_pretrained("tester/melfusion")), expected)
    assert_equal_weights(pipe.synapse, VisualSynapse.from_pretrained("tester/melfusion", subfolder="synapse"))

    with monkeypatch.context() as offline:
        offline.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        requests = len(hub.requests)
        assert_near(play(MelFusionPipeline.from_pretrained("tester/melfusion")), expected)
        assert len(hub.requests) == requests

    with torch.no_grad():
        pipe.synapse.alphas.add_(0.5)
    pipe.push_to_hub("tester/melfusion")
    assert_equal_weights(pipe.synapse, MelFusionPipeline.from_pretrained("tester/melfusion").synapse)
    pipe.synapse.push_to_hub("tester/synapse")
    assert_equal_weights(pipe.synapse, VisualSynapse.from_pretrained("tester/synapse"))


def test_variants_and_passed_components(pipe, checkpoint, hub):
    pipe.save_pretrained(checkpoint, variant="fp16")
    hub.add_repo("tester/melfusion", checkpoint)
    for source in (checkpoint, "tester/melfusion"):
        half = MelFusionPipeline.from_pretrained(source, variant="fp16", torch_dtype=torch.float16)
        assert half.synapse.dtype == half.unet.dtype == torch.float16
        assert_equal_weights(pipe.unet, half.unet)
        scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        synapse = VisualSynapse.from_unets(pipe.image_unet, pipe.unet, projection="pool")
        passed = MelFusionPipeline.from_pretrained(source, scheduler=scheduler, synapse=synapse)
        assert passed.scheduler is scheduler and passed.synapse is synapse
        assert MelFusionPipeline.from_pretrained(source, image_unet=None, image_vae=None).image_unet is None
        with pytest.raises(ValueError, match="variant=other"):
            MelFusionPipeline.from_pretrained(source, variant="other")
    dtypes = MelFusionPipeline.from_pretrained(
        checkpoint, torch_dtype={"unet": torch.bfloat16, "default": torch.float16}
    )
    assert dtypes.unet.dtype == torch.bfloat16 and dtypes.synapse.dtype == dtypes.vocoder.dtype == torch.float16


def test_saving_over_itself_and_a_failed_save_lose_nothing(pipe, checkpoint, monkeypatch):
    loaded = MelFusionPipeline.from_pretrained(checkpoint)
    with torch.no_grad():
        loaded.synapse.alphas.add_(1.0)
    loaded.save_pretrained(checkpoint)
    again = MelFusionPipeline.from_pretrained(checkpoint)
    assert_equal_weights(loaded.synapse, again.synapse)
    assert_equal_weights(pipe.unet, again.unet)

    before = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}

    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(again.vocoder), "save_pretrained", disk_full)
    with pytest.raises(OSError, match="No space left"):
        pipe.save_pretrained(checkpoint)
    assert {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()} == before
    assert [path.name for path in checkpoint.parent.iterdir() if path.name.startswith(".")] == []


def test_only_safetensors_are_written_and_read(pipe, tmp_path, caplog):
    import diffusers

    diffusers.utils.logging.enable_propagation()
    pipe.save_pretrained(tmp_path / "checkpoint", safe_serialization=False)
    diffusers.utils.logging.disable_propagation()
    assert "safetensors only" in caplog.text
    weights = tmp_path / "checkpoint" / "synapse" / "diffusion_pytorch_model.safetensors"
    assert weights.is_file() and not list(tmp_path.rglob("*.bin"))
    torch.save(pipe.synapse.state_dict(), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(OSError, match="safetensors"):
        MelFusionPipeline.from_pretrained(tmp_path / "checkpoint")


def test_components_round_trip_into_a_second_pipeline(pipe):
    again = MelFusionPipeline(**pipe.components)
    assert np.array_equal(play(again), play(pipe))
    assert set(pipe.components) == set(untrained_components())


# ------------------------------------------------------------ without the package installed

STRANGER = """
import sys
sys.modules["melfusion_pipeline"] = None  # what is not installed cannot be imported
import numpy as np, PIL.Image, torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler

def play(pipe):
    pipe.set_progress_bar_config(disable=True)
    image = PIL.Image.open("picture.png")
    generator = torch.Generator().manual_seed(0)
    return pipe(image, "a calm piano", num_inference_steps=2, num_inversion_steps=2, generator=generator).audios

expected = np.load("expected.npy")
source = sys.argv[1]
pipe = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
np.testing.assert_allclose(play(pipe), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
half = DiffusionPipeline.from_pretrained(source, trust_remote_code=True, variant="fp16", torch_dtype=torch.float16)
assert half.synapse.dtype == torch.float16
scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
assert DiffusionPipeline.from_pretrained(source, trust_remote_code=True, scheduler=scheduler).scheduler is scheduler
pipe.save_pretrained("resaved")
pipe = DiffusionPipeline.from_pretrained("resaved", trust_remote_code=True)
np.testing.assert_allclose(play(pipe), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
with torch.no_grad():
    pipe.synapse.alphas.zero_()
pipe.save_pretrained("resaved")
pipe = DiffusionPipeline.from_pretrained("resaved", trust_remote_code=True)
assert not pipe.synapse.alphas.any()
if len(sys.argv) > 2:
    pipe.push_to_hub(sys.argv[2])
    assert not DiffusionPipeline.from_pretrained(sys.argv[2], trust_remote_code=True).synapse.alphas.any()
print("loaded")
"""


def stranger(folder: Path, *arguments: str, **environment: str) -> None:
    environment = {**os.environ, "HF_HOME": str(folder / "home"), "PYTHONPATH": "", **environment}
    command = [sys.executable, "-c", STRANGER, *map(str, arguments)]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.endswith("loaded\n"), result.stderr


def test_a_stranger_who_trusts_the_code_needs_no_package(pipe, checkpoint, hub, tmp_path):
    pipe.save_pretrained(checkpoint, variant="fp16")
    hub.add_repo("tester/melfusion", checkpoint)
    np.save(tmp_path / "expected.npy", play(pipe))
    photograph().save(tmp_path / "picture.png")
    stranger(tmp_path, checkpoint)
    stranger(tmp_path, "tester/melfusion", "tester/again")
    assert CODE <= hub.files("tester/again").keys()

    # Offline diffusers 0.42.1 asks the Hub for the commit of remote code all the same; the cached folder loads.
    requests = len(hub.requests)
    cached = huggingface_hub.hf_hub_download(
        "tester/melfusion", "model_index.json", cache_dir=tmp_path / "home" / "hub", local_files_only=True
    )
    stranger(tmp_path, Path(cached).parent, HF_HUB_OFFLINE="1")
    assert len(hub.requests) == requests


# ------------------------------------------------------------ composing


@pytest.fixture
def base_models(components, tmp_path) -> tuple[Path, Path]:
    """A text-to-image and a text-to-music checkpoint, laid out as the public ones."""
    image_model, music_model = tmp_path / "image-model", tmp_path / "music-model"
    for name, component in components.items():
        if name.startswith("image_"):
            component.save_pretrained(image_model / name.removeprefix("image_"))
        elif name != "synapse":
            component.save_pretrained(music_model / name)
    return image_model, music_model


def test_base_models_compose_from_folders_and_from_the_hub(components, base_models, hub):
    image_model, music_model = base_models
    hub.add_repo("tester/image-model", image_model)
    hub.add_repo("tester/music-model", music_model)
    for image_source, music_source in (base_models, ("tester/image-model", "tester/music-model")):
        pipe = MelFusionPipeline.from_base_models(image_source, music_source)
        assert not pipe.synapse.alphas.any() and not pipe.unet.training and not pipe.synapse.training
        assert_equal_weights(components["image_unet"], pipe.image_unet)
        assert_equal_weights(components["text_encoder"], pipe.text_encoder)
        assert pipe.scheduler.config.beta_end == 0.0195 and pipe.image_scheduler.config.beta_end == 0.012
    half = MelFusionPipeline.from_base_models(image_model, music_model, torch_dtype=torch.bfloat16)
    assert {half.unet.dtype, half.text_encoder.dtype, half.vocoder.dtype, half.synapse.dtype} == {torch.bfloat16}


def test_a_trained_synapse_is_an_object_a_folder_a_pipeline_or_a_repository(pipe, base_models, hub, tmp_path):
    pipe.synapse.save_pretrained(tmp_path / "alone")
    pipe.save_pretrained(tmp_path / "whole")
    hub.add_repo("tester/alone", tmp_path / "alone")
    hub.add_repo("tester/whole", tmp_path / "whole")
    sources = [pipe.synapse, tmp_path / "alone", tmp_path / "whole", "tester/alone", "tester/whole"]
    for synapse in sources:
        composed = MelFusionPipeline.from_base_models(*base_models, synapse=synapse)
        assert_equal_weights(pipe.synapse, composed.synapse)
    assert_near(play(composed), play(pipe))


def test_another_scheduler_and_a_whole_clap_model_are_taken_as_they_are(components, base_models):
    """MusicLDM's checkpoint holds a `ClapModel` as its text encoder."""
    image_model, music_model = base_models
    text = components["text_encoder"]
    clap = ClapModel(
        ClapConfig(
            text_config=text.config.to_dict(),
            audio_config={"hidden_size": 16, "patch_embeds_hidden_size": 4, "depths": [1, 1], "num_hidden_layers": 2},
            projection_dim=32,
        )
    )
    clap.text_model.load_state_dict(text.text_model.state_dict())
    clap.text_projection.load_state_dict(text.text_projection.state_dict())
    clap.save_pretrained(music_model / "text_encoder")
    PNDMScheduler.from_config(components["scheduler"].config).save_pretrained(music_model / "scheduler")
    pipe = MelFusionPipeline.from_base_models(image_model, music_model)
    assert isinstance(pipe.scheduler, PNDMScheduler)
    texts = ["a calm piano", "drums"]
    assert torch.equal(pipe.encode_prompt(texts)[0], MelFusionPipeline(**components).encode_prompt(texts)[0])


def test_models_that_cannot_be_composed_are_refused(components, base_models, tmp_path):
    image_model, music_model = base_models
    with pytest.raises(ValueError, match="must condition on CLAP"):
        picture_unet().save_pretrained(tmp_path / "music-model" / "unet")
        MelFusionPipeline.from_base_models(image_model, music_model)
    components["unet"].save_pretrained(music_model / "unet")
    with pytest.raises(ValueError, match="does not fit `synapse`"):
        other = VisualSynapse.from_unets(picture_unet(block_out_channels=(8, 16, 32, 32)), components["unet"])
        MelFusionPipeline.from_base_models(image_model, music_model, synapse=other)
    picture_unet(class_embed_type="timestep").save_pretrained(image_model / "unet")
    with pytest.raises(ValueError, match="Stable Diffusion 1 or 2"):
        MelFusionPipeline.from_base_models(image_model, music_model)


# ------------------------------------------------------------ an index that points on


def test_the_root_of_the_repository_points_to_the_bundled_checkpoint(pipe, checkpoint, tmp_path):
    index = json.loads((ROOT / "model_index.json").read_text())
    saved = json.loads((checkpoint / "model_index.json").read_text())
    assert index.pop("_checkpoint") == "checkpoints/small"
    assert index.keys() == saved.keys()
    root = tmp_path / "root"
    root.mkdir()
    (root / "model_index.json").write_bytes((ROOT / "model_index.json").read_bytes())
    with pytest.raises(FileNotFoundError, match="bundled checkpoint is not there yet"):
        MelFusionPipeline.from_pretrained(root)
    pipe.save_pretrained(root / "checkpoints" / "small")
    assert_near(play(MelFusionPipeline.from_pretrained(root)), play(pipe))


@pytest.mark.parametrize("outside", ["../checkpoint", "/checkpoint", "link"])
def test_an_index_cannot_point_outside_of_its_folder(checkpoint, tmp_path, outside):
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(checkpoint)
    (root / "model_index.json").write_text(json.dumps({"_checkpoint": outside}))
    with pytest.raises(ValueError, match="lies outside"):
        MelFusionPipeline.from_pretrained(root)

"""Every row of the table of loading ways: local folders and a loopback Hub, with and without the package installed."""

import importlib.util
import json
import os
import pickle
import resource
import shutil
import sys
from pathlib import Path

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
from bad_inputs import Trap
from conftest import assert_near, generator, photograph
from copies import untrained_components
from diffusers import AutoencoderTiny, DiffusionPipeline, EulerDiscreteScheduler, PNDMScheduler
from diffusers.utils.dynamic_modules_utils import get_relative_import_files
from peft import LoraConfig
from processes import forget_the_package, start
from safetensors.torch import load_file, save_file
from transformers import ClapConfig, ClapModel
from untrained import picture_unet

from melfusion_pipeline import MelFusionPipeline, VisualSynapse
from melfusion_pipeline.pictures_melfusion import prepare_image

ROOT = Path(__file__).parents[1]
ROOMS = "attention checkpoint checks families features files inversion pictures pipeline prompts".split()
CODE = {f"{room}_melfusion.py" for room in ROOMS} | {"synapse/modeling_melfusion.py"}


def play(pipe: DiffusionPipeline, **kwargs) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    kwargs |= {"num_inference_steps": 2, "num_inversion_steps": 2, "generator": generator()}
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


def pickle_weights(folder: Path) -> Path:
    """Turns a component's safetensors into the `.bin` that older checkpoints hold."""
    (file,) = folder.glob("*.safetensors")
    name = "pytorch_model.bin" if file.name == "model.safetensors" else "diffusion_pytorch_model.bin"
    torch.save(load_file(file), folder / name)
    file.unlink()
    return folder / name


def rename_weights(file: Path, rename) -> None:
    """Rewrites a file of weights under the names that `rename` gives; what it names None is left out."""
    named = {rename(name): tensor for name, tensor in load_file(file).items()}
    named.pop(None, None)
    save_file(named, file, {"format": "pt"})


@pytest.fixture
def warnings_logged(caplog):
    diffusers.utils.logging.enable_propagation()
    yield caplog
    diffusers.utils.logging.disable_propagation()


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory) -> Path:
    """What `pipe` saves, and the components in the folders of a text-to-image and a text-to-music checkpoint."""
    folder, components = tmp_path_factory.mktemp("saved"), untrained_components()
    MelFusionPipeline(**components).save_pretrained(folder / "checkpoint")
    for name, component in components.items():
        if name.startswith("image_"):
            component.save_pretrained(folder / "image-model" / name.removeprefix("image_"))
        elif name != "synapse":
            component.save_pretrained(folder / "music-model" / name)
    return folder


@pytest.fixture
def checkpoint(saved_once, tmp_path) -> Path:
    return shutil.copytree(saved_once / "checkpoint", tmp_path / "checkpoint")


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


def test_only_safetensors_are_written_and_pickles_are_read_with_a_warning(pipe, tmp_path, warnings_logged):
    pipe.save_pretrained(tmp_path / "checkpoint", safe_serialization=False)
    assert "safetensors only" in warnings_logged.text
    assert not list(tmp_path.rglob("*.bin"))
    pickled = pickle_weights(tmp_path / "checkpoint" / "synapse")
    with pytest.raises(OSError, match="safetensors"):
        MelFusionPipeline.from_pretrained(tmp_path / "checkpoint", use_safetensors=True)
    loaded = MelFusionPipeline.from_pretrained(tmp_path / "checkpoint")
    assert f"restricted unpickler read {pickled}." in warnings_logged.text
    assert_equal_weights(pipe.synapse, loaded.synapse)


@pytest.mark.parametrize("missing", ["image_text_encoder image_tokenizer", "all but the synapse", "all"])
def test_what_the_picture_needs_may_be_missing(components, hub, tmp_path, missing):
    whole = MelFusionPipeline(**components)
    features = whole.encode_image(photograph(), num_inversion_steps=2)
    images = [name for name in components if name.startswith("image_")]
    missing = {"all but the synapse": images, "all": [*images, "synapse"]}.get(missing, missing.split())
    pipe = MelFusionPipeline(**{**components, **dict.fromkeys(missing)})
    pipe.save_pretrained(tmp_path / "checkpoint")
    hub.add_repo("tester/music", tmp_path / "checkpoint")
    for loaded in (
        MelFusionPipeline.from_pretrained(tmp_path / "checkpoint"),
        MelFusionPipeline.from_pretrained("tester/music"),
        MelFusionPipeline.from_pretrained("tester/music", unet=components["unet"]),
        DiffusionPipeline.from_pretrained("tester/music", trust_remote_code=True),
        MelFusionPipeline.from_pipe(pipe),
    ):
        assert {name for name in components if getattr(loaded, name) is None} == set(missing)
        call = {"prompt": "a calm piano", "num_inference_steps": 2}
        expected = whole(**call, generator=generator()).audios
        assert_near(loaded(**call, generator=generator()).audios, expected)
        if "image_unet" in missing:
            with pytest.raises(ValueError, match="without image_vae, image_unet, image_scheduler"):
                loaded(photograph(), "a calm piano")
    if "synapse" in missing:
        with pytest.raises(ValueError, match="`image_features` cannot be used: .* without synapse"):
            pipe(**call, image_features=features)
        return
    expected = whole(**call, image_features=features, generator=generator()).audios
    given = MelFusionPipeline.from_pretrained("tester/music")(**call, image_features=features, generator=generator())
    assert_near(given.audios, expected)


# ------------------------------------------------------------ what must not load, or not be saved


def test_an_adapter_is_not_saved_as_if_it_were_the_model(pipe, checkpoint):
    before = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    with pytest.raises(ValueError, match=r"`unet` has an adapter .* `pipe.fuse_lora\(\)`"):
        pipe.save_pretrained(checkpoint)
    assert {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()} == before
    adapted = play(pipe)
    # As older versions of this package saved it, and loaded random layers from it.
    pipe.unet.save_pretrained(checkpoint / "unet")
    with pytest.raises(ValueError, match="unet lacks .* weights of a UNet2DConditionModel: .*to_q.weight"):
        MelFusionPipeline.from_pretrained(checkpoint)
    pipe.unet.fuse_lora()
    pipe.unet.unload_lora()
    pipe.save_pretrained(checkpoint)
    assert_near(play(MelFusionPipeline.from_pretrained(checkpoint)), adapted)


MODELS = ["image_text_encoder", "image_unet", "image_vae", "synapse", "text_encoder", "unet", "vae", "vocoder"]


@pytest.mark.parametrize("name", MODELS)
def test_one_missing_layer_is_refused_whatever_else_the_file_holds(checkpoint, base_models, hub, name):
    (file,) = (checkpoint / name).glob("*.safetensors")
    tensors = load_file(file)
    missing = sorted(tensors)[len(tensors) // 2]
    tensors |= {f"unrelated.{index}": tensors[missing].clone() for index in range(len(tensors))}
    del tensors[missing]
    save_file(tensors, file, {"format": "pt"})
    hub.add_repo("tester/melfusion", checkpoint)
    for source in (checkpoint, "tester/melfusion"):
        with pytest.raises(ValueError, match=f"{name} lacks 1 weights of a"):
            MelFusionPipeline.from_pretrained(source)
    if name == "synapse":
        with pytest.raises(ValueError, match="synapse lacks 1 weights of a VisualSynapse"):
            MelFusionPipeline.from_base_models(*base_models, synapse=checkpoint)
        return
    folder = base_models[0] if name.startswith("image_") else base_models[1]
    (other,) = (folder / name.removeprefix("image_")).glob("*.safetensors")
    other.write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=f"{name.removeprefix('image_')} lacks 1 weights of a"):
        MelFusionPipeline.from_base_models(*base_models)


def test_a_layer_that_only_the_other_variant_holds_is_missing(pipe, checkpoint):
    pipe.save_pretrained(checkpoint, variant="fp16")
    file = checkpoint / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    rename_weights(file, lambda name: None if name == "conv_in.weight" else name)
    MelFusionPipeline.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="unet lacks 1 weights of a UNet2DConditionModel: conv_in.weight"):
        MelFusionPipeline.from_pretrained(checkpoint, variant="fp16")


# What older versions of diffusers and transformers called these weights.
OLD_NAMES = {
    "vae": {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."},
    "image_text_encoder": {"text_model.": "", "": "text_model."},
}


@pytest.mark.parametrize("name", OLD_NAMES)
def test_weights_under_older_names_are_found_and_missing_ones_among_them_too(pipe, checkpoint, base_models, name):
    def old(weight: str) -> str:
        for new, older in OLD_NAMES[name].items():
            if new in weight:
                return older + weight if not new else weight.replace(new, older)
        return weight

    folder = base_models[1] if name == "vae" else base_models[0]
    (file,), (other,) = (
        (checkpoint / name).glob("*.safetensors"),
        (folder / name.removeprefix("image_")).glob("*.safetensors"),
    )
    names = load_file(file).keys()
    for one in (file, other):
        rename_weights(one, old)
    assert names != load_file(file).keys() and len(names) == len(load_file(file))
    for loaded in (MelFusionPipeline.from_pretrained(checkpoint), MelFusionPipeline.from_base_models(*base_models)):
        assert_equal_weights(getattr(pipe, name), getattr(loaded, name))
    missing = next(weight for weight in sorted(load_file(file)) if weight not in names)
    for one in (file, other):
        rename_weights(one, lambda weight: None if weight == missing else weight)
    with pytest.raises(ValueError, match="lacks 1 weights of a"):
        MelFusionPipeline.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="lacks 1 weights of a"):
        MelFusionPipeline.from_base_models(*base_models)


def test_a_vocoder_saved_in_the_midst_of_training_is_refused(pipe, checkpoint):
    """With weight norm installed its weights are split in two, and transformers would leave them at random."""
    pipe.vocoder.apply_weight_norm()
    pipe.vocoder.save_pretrained(checkpoint / "vocoder")
    with pytest.raises(ValueError, match="vocoder lacks .* weights of a SpeechT5HifiGan: "):
        MelFusionPipeline.from_pretrained(checkpoint)


def test_a_repository_is_checked_as_a_folder_is(checkpoint, hub):
    damages = {
        "vae/diffusion_pytorch_model.safetensors": (lambda content: content[:-100], "no complete safetensors file"),
        "tokenizer/tokenizer.json": (lambda content: b"{", "tokenizer.json is no valid JSON"),
        "scheduler/scheduler_config.json": (lambda content: b"{}", "damaged or another file"),
        "image_unet/config.json": (
            lambda content: content.replace(b"UNet2DConditionModel", b"AutoencoderKL"),
            "folders swapped",
        ),
    }
    for path, (damage, message) in damages.items():
        good = (checkpoint / path).read_bytes()
        (checkpoint / path).write_bytes(damage(good))
        hub.add_repo("tester/damaged", checkpoint)
        for source in (checkpoint, "tester/damaged"):
            with pytest.raises((OSError, ValueError), match=message):
                MelFusionPipeline.from_pretrained(source)
        (checkpoint / path).write_bytes(good)
    hub.add_repo("tester/damaged", checkpoint)
    MelFusionPipeline.from_pretrained("tester/damaged")
    for source in ("tester/nowhere", "nowhere/at/all"):
        with pytest.raises(OSError, match=source):
            MelFusionPipeline.from_pretrained(source)


def load_into_little_memory(folder: Path) -> None:
    MelFusionPipeline.from_pretrained(folder)  # what is imported late is there
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, used + 2**27))
    try:
        MelFusionPipeline.from_pretrained(folder, torch_dtype=torch.float64)
    except Exception as error:
        print(type(error).__name__, "memory" in str(error), not isinstance(error, ValueError))


def test_running_out_of_memory_is_not_called_a_damaged_file(pipe, tmp_path):
    config = pipe.image_text_encoder.config
    config.vocab_size = 10**6
    pipe.image_text_encoder = type(pipe.image_text_encoder)(config).half()
    pipe.save_pretrained(tmp_path / "large")
    printed, errors = tmp_path / "printed", tmp_path / "errors"
    start(lambda: load_into_little_memory(tmp_path / "large"), printed, errors).join()
    assert printed.read_text() == "RuntimeError True True\n", errors.read_text()


# ------------------------------------------------------------ components of this package


TOY = """
from torch import nn
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config


class ToyVocoder(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, model_in_dim=8, sampling_rate=16000, upsample_rates=(5, 4, 2, 2, 2)):
        super().__init__()
        self.frames = nn.Linear(model_in_dim, 160)

    def forward(self, mel_spectrogram):
        return self.frames(mel_spectrogram).flatten(1)
"""


@pytest.fixture
def pipe_with_toy(components, tmp_path, monkeypatch) -> MelFusionPipeline:
    """A pipeline whose vocoder is of this package: of a module that is added to it for the test."""
    (tmp_path / "package").mkdir()
    file = tmp_path / "package" / "toy_melfusion.py"
    file.write_text(TOY)
    spec = importlib.util.spec_from_file_location("melfusion_pipeline.toy_melfusion", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return MelFusionPipeline(**{**components, "vocoder": module.ToyVocoder().eval()})


def load_and_save_as_a_stranger(folder: Path, *arguments: str | Path) -> None:
    """Loads and saves a checkpoint in a fork of this process that forgets the package."""

    def load_and_save() -> None:
        os.chdir(folder)
        forget_the_package()
        stranger = {}
        exec(STRANGER, stranger)
        stranger["load_and_save"](*arguments)

    process = start(load_and_save, folder / "printed")
    process.join()
    assert process.exitcode == 0, (folder / "printed").read_text()


def test_any_component_of_this_package_travels_with_its_code(pipe_with_toy, hub, tmp_path, warnings_logged):
    pipe, checkpoint = pipe_with_toy, tmp_path / "checkpoint"
    expected = play(pipe)
    pipe.save_pretrained(checkpoint)
    pipe.save_pretrained(checkpoint, variant="fp16")
    assert json.loads((checkpoint / "model_index.json").read_text())["vocoder"] == ["toy_melfusion", "ToyVocoder"]
    assert (checkpoint / "vocoder" / "toy_melfusion.py").read_text() == TOY
    hub.add_repo("tester/toy", checkpoint)
    np.save(tmp_path / "expected.npy", expected)
    photograph().save(tmp_path / "picture.png")

    load_and_save_as_a_stranger(tmp_path, "tester/toy", "tester/again")
    assert hub.files("tester/again")["vocoder/toy_melfusion.py"].decode() == TOY
    booby_trap(checkpoint)
    (checkpoint / "vocoder" / "toy_melfusion.py").write_text("raise RuntimeError('the code of the checkpoint ran')")
    hub.add_repo("tester/toy", checkpoint)
    for loaded in (
        MelFusionPipeline.from_pretrained(checkpoint),
        MelFusionPipeline.from_pretrained("tester/toy"),
        MelFusionPipeline.from_pipe(pipe),
    ):
        assert type(loaded.vocoder) is type(pipe.vocoder)
        assert_near(play(loaded), expected)
    assert "Expected types" not in warnings_logged.text


def test_components_round_trip_into_a_second_pipeline(pipe):
    again = MelFusionPipeline(**pipe.components)
    assert np.array_equal(play(again), play(pipe))
    own = {name for name, component in pipe.components.items() if component is not None}
    assert own == set(untrained_components())


# ------------------------------------------------------------ without the package installed

STRANGER = """
import numpy as np, PIL.Image, torch
from conftest import assert_near
from diffusers import DiffusionPipeline, EulerDiscreteScheduler

def play(pipe):
    pipe.set_progress_bar_config(disable=True)
    image = PIL.Image.open("picture.png")
    generator = torch.Generator().manual_seed(0)
    return pipe(image, "a calm piano", num_inference_steps=2, num_inversion_steps=2, generator=generator).audios

def load_and_save(source, again=None):
    expected = np.load("expected.npy")
    pipe = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
    assert_near(play(pipe), expected)
    half = DiffusionPipeline.from_pretrained(source, trust_remote_code=True, variant="fp16", torch_dtype=torch.float16)
    assert half.synapse.dtype == torch.float16
    euler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert DiffusionPipeline.from_pretrained(source, trust_remote_code=True, scheduler=euler).scheduler is euler
    pipe.save_pretrained("resaved")
    pipe = DiffusionPipeline.from_pretrained("resaved", trust_remote_code=True)
    assert_near(play(pipe), expected)
    with torch.no_grad():
        pipe.synapse.alphas.zero_()
    pipe.save_pretrained("resaved")
    pipe = DiffusionPipeline.from_pretrained("resaved", trust_remote_code=True)
    assert not pipe.synapse.alphas.any()
    if again:
        pipe.push_to_hub(again)
        assert not DiffusionPipeline.from_pretrained(again, trust_remote_code=True).synapse.alphas.any()
"""


def test_a_stranger_who_trusts_the_code_needs_no_package(pipe, checkpoint, hub, tmp_path, monkeypatch):
    pipe.save_pretrained(checkpoint, variant="fp16")
    hub.add_repo("tester/melfusion", checkpoint)
    np.save(tmp_path / "expected.npy", play(pipe))
    photograph().save(tmp_path / "picture.png")
    load_and_save_as_a_stranger(tmp_path, checkpoint)
    load_and_save_as_a_stranger(tmp_path, "tester/melfusion", "tester/again")
    assert CODE <= hub.files("tester/again").keys()

    # Offline diffusers 0.42.1 asks the Hub for the commit of remote code all the same; the cached folder loads.
    requests = len(hub.requests)
    cached = huggingface_hub.hf_hub_download("tester/melfusion", "model_index.json", local_files_only=True)
    with monkeypatch.context() as offline:
        offline.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        load_and_save_as_a_stranger(tmp_path, Path(cached).parent)
    assert len(hub.requests) == requests


# ------------------------------------------------------------ composing


@pytest.fixture
def base_models(saved_once, tmp_path) -> tuple[Path, Path]:
    """A text-to-image and a text-to-music checkpoint, laid out as the public ones."""
    return tuple(shutil.copytree(saved_once / name, tmp_path / name) for name in ("image-model", "music-model"))


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


def test_a_lightweight_vae_encodes_the_picture_wherever_it_comes_from(components, base_models, hub, tmp_path):
    torch.manual_seed(0)
    size = {"encoder_block_out_channels": (8,) * 3, "num_encoder_blocks": (1,) * 3}
    size |= {"decoder_block_out_channels": (8,) * 3, "num_decoder_blocks": (1,) * 3}
    vae = AutoencoderTiny(**size, scaling_factor=0.5).eval()
    vae.save_pretrained(tmp_path / "tiny")
    hub.add_repo("tester/tiny", tmp_path / "tiny")
    pixels = torch.stack([prepare_image(photograph(), 32)])
    with torch.no_grad():
        expected = vae.encoder(pixels) * 0.5
    call = {"synapse": components["synapse"]}
    for source in (vae, tmp_path / "tiny", "tester/tiny"):
        pipe = MelFusionPipeline.from_base_models(*base_models, image_vae=source, **call)
        assert type(pipe.image_vae) is AutoencoderTiny and pipe.image_vae_scale_factor == 4
        assert_near(pipe.prepare_image_latents(photograph(), 32).detach(), expected)
    kl = MelFusionPipeline.from_base_models(*base_models, image_vae=base_models[0], **call).image_vae
    assert_equal_weights(components["image_vae"], kl)
    pipe.save_pretrained(tmp_path / "saved")
    loaded = MelFusionPipeline.from_pretrained(tmp_path / "saved")
    assert_near(play(loaded), play(pipe))

    AutoencoderTiny(**size, latent_channels=16).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="`image_vae` has latents of 16 channels, but `image_unet` takes 4"):
        play(MelFusionPipeline.from_base_models(*base_models, image_vae=tmp_path / "other", **call))
    with pytest.raises(ValueError, match=r"`image_vae` must be one of .* holds a UNet2DConditionModel"):
        MelFusionPipeline.from_base_models(*base_models, image_vae=base_models[1] / "unet")


def test_a_piece_of_base_models_is_one_pass_up_to_the_length_they_were_trained_on(pipe, base_models, tmp_path):
    composed = MelFusionPipeline.from_base_models(*base_models, synapse=pipe.synapse)
    composed.save_pretrained(tmp_path / "saved")
    one_pass = play(pipe, audio_length_in_s=0.96, window_length_in_s=0.96)
    for loaded in (composed, MelFusionPipeline.from_pretrained(tmp_path / "saved")):
        assert loaded.config.default_window_length_in_s == 10.24
        assert_near(play(loaded, audio_length_in_s=0.96), one_pass)
    assert not np.allclose(play(pipe, audio_length_in_s=0.96), one_pass)


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


@pytest.fixture
def pickled_base_models(base_models) -> tuple[Path, Path]:
    """As public ones are reported to be: some components in safetensors, some in `.bin`."""
    for model, names in zip(base_models, (["text_encoder", "unet"], ["unet", "vae", "vocoder"])):
        for name in names:
            pickle_weights(model / name)
    return base_models


def test_base_models_without_safetensors_are_read_with_one_warning(
    components, pickled_base_models, hub, warnings_logged
):
    image_model, music_model = pickled_base_models
    hub.add_repo("tester/image-model", image_model)
    hub.add_repo("tester/music-model", music_model)
    for sources in (pickled_base_models, ("tester/image-model", "tester/music-model")):
        warnings_logged.clear()
        pipe = MelFusionPipeline.from_base_models(*sources)
        for name in MODELS:
            if name != "synapse":
                assert_equal_weights(components[name], getattr(pipe, name))
        (warning,) = (record.getMessage() for record in warnings_logged.records if ".bin" in record.getMessage())
        for source, name in [(sources[0], "text_encoder"), (sources[0], "unet"), (sources[1], "vae")]:
            assert f"{source}/{name}/" in warning
        with pytest.raises(FileNotFoundError, match="vae holds no safetensors files of weights, but config.json, "):
            MelFusionPipeline.from_base_models(*sources, use_safetensors=True)
    fetched = {path.rpartition("/")[2] for _, path, _ in hub.requests if "-model/resolve" in path}
    assert {"pytorch_model.bin", "diffusion_pytorch_model.bin", "model.safetensors"} <= fetched


@pytest.mark.parametrize("name", ["text_encoder", "unet"])
def test_a_pickle_that_would_run_code_is_refused_by_name(pickled_base_models, hub, tmp_path, name):
    image_model, music_model = pickled_base_models
    (file,) = (image_model / name).glob("*.bin")
    file.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    hub.add_repo("tester/trap", image_model)
    for source in (image_model, "tester/trap"):
        with pytest.raises((OSError, ValueError), match=file.name):
            MelFusionPipeline.from_base_models(source, music_model)
    assert not (tmp_path / "sprung").exists()


def test_a_variant_may_be_there_in_one_of_the_two_models_or_some_components(components, base_models, hub):
    image_model, music_model = base_models
    for name in ("unet", "text_encoder"):
        components[f"image_{name}"].half().save_pretrained(image_model / name, variant="fp16")
    hub.add_repo("tester/image-model", image_model)
    hub.add_repo("tester/music-model", music_model)
    for sources in (base_models, ("tester/image-model", "tester/music-model")):
        for asked in ({"variant": "fp16"}, {"image_variant": "fp16"}):
            pipe = MelFusionPipeline.from_base_models(*sources, torch_dtype=torch.float32, **asked)
            assert_equal_weights(components["image_unet"], pipe.image_unet)
            assert_equal_weights(components["unet"], pipe.unet)
        for asked in ({"variant": "other"}, {"music_variant": "fp16"}):
            with pytest.raises(ValueError, match=f"no weights of `variant={[*asked.values()][0]}`"):
                MelFusionPipeline.from_base_models(*sources, **asked)
    fetched = [path for _, path, _ in hub.requests if "image-model/resolve" in path]
    assert any(path.endswith("unet/diffusion_pytorch_model.fp16.safetensors") for path in fetched)
    assert not any(path.endswith("unet/diffusion_pytorch_model.safetensors") for path in fetched)


def test_each_model_has_a_revision_of_its_own(components, base_models, hub):
    image_model, music_model = base_models
    old = {"image": hub.add_repo("tester/image", image_model), "music": hub.add_repo("tester/music", music_model)}
    picture_unet(sample_size=16).save_pretrained(image_model / "unet")
    components["vocoder"].config.sampling_rate = 8000
    components["vocoder"].save_pretrained(music_model / "vocoder")
    hub.add_repo("tester/image", image_model)
    hub.add_repo("tester/music", music_model)

    def compose(**revisions) -> tuple[int, int]:
        pipe = MelFusionPipeline.from_base_models("tester/image", "tester/music", **revisions)
        return pipe.image_unet.config.sample_size, pipe.vocoder.config.sampling_rate

    assert compose() == (16, 8000)
    assert compose(image_revision=old["image"]) == (8, 8000)
    assert compose(music_revision=old["music"]) == (16, 16000)
    with pytest.raises(OSError, match="`music_model`: 'tester/music'"):
        compose(revision=old["image"])


def test_models_that_cannot_be_composed_are_refused(components, base_models, tmp_path):
    image_model, music_model = base_models
    with pytest.raises(
        ValueError, match="text_encoder is of the kind 'clap_text_model', but .* needs a T5EncoderModel"
    ):
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
    assert index.keys() == {name for name in saved if not name.startswith(("default_", "spectrogram_"))}
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


def test_this_repository_on_the_hub_loads_its_bundled_checkpoint(pipe, base_models, hub, tmp_path, monkeypatch):
    root = tmp_path / "root"
    pipe.save_pretrained(root / "checkpoints" / "small")
    (root / "model_index.json").write_bytes((ROOT / "model_index.json").read_bytes())
    (root / "setup.cfg").write_bytes((ROOT / "setup.cfg").read_bytes())
    hub.add_repo("tester/this-repository", root)
    expected = play(pipe)
    assert_near(play(MelFusionPipeline.from_pretrained("tester/this-repository")), expected)
    for synapse in (root, "tester/this-repository"):
        composed = MelFusionPipeline.from_base_models(*base_models, synapse=synapse)
        assert_equal_weights(pipe.synapse, composed.synapse)
    assert not [path for _, path, _ in hub.requests if path.endswith((".cfg", ".py"))]
    with monkeypatch.context() as offline:
        offline.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        requests = len(hub.requests)
        loaded = MelFusionPipeline.from_pretrained("tester/this-repository")
        assert_equal_weights(pipe.synapse, loaded.synapse)
        assert loaded.name_or_path == "tester/this-repository" and len(hub.requests) == requests
    with pytest.raises(ValueError, match="lies outside"):
        (root / "model_index.json").write_text('{"_checkpoint": "../other"}')
        hub.add_repo("tester/this-repository", root)
        MelFusionPipeline.from_pretrained("tester/this-repository")


def test_the_bundled_checkpoint_carries_the_code_of_the_package_as_links():
    """Where this fails a module is new: `ln -s ../../melfusion_pipeline/NAME_melfusion.py checkpoints/small/`."""
    bundled, package = ROOT / "checkpoints" / "small", ROOT / "melfusion_pipeline"
    pipeline_file = package / "pipeline_melfusion.py"
    code = {pipeline_file, *map(Path, get_relative_import_files(pipeline_file))}
    assert {file.resolve() for file in bundled.glob("*.py")} == code
    index = json.loads((bundled / "model_index.json").read_text())
    assert index["synapse"] == ["modeling_melfusion", "VisualSynapse"]
    assert (bundled / "synapse" / "modeling_melfusion.py").resolve() == package / "modeling_melfusion.py"
    assert index["vocoder"] == ["vocoder_melfusion", "MusicVocoder"]
    assert (bundled / "vocoder" / "vocoder_melfusion.py").resolve() == package / "vocoder_melfusion.py"
    assert all(file.is_symlink() for file in bundled.rglob("*.py"))


def test_the_bundled_checkpoint_loads_in_every_way(hub):
    hub.add_repo("tester/small", ROOT / "checkpoints" / "small")
    expected = MelFusionPipeline.from_pretrained(ROOT)
    for source in (ROOT / "checkpoints" / "small", "tester/small"):
        with pytest.raises(ValueError, match="trust_remote_code"):
            DiffusionPipeline.from_pretrained(source)
        for loaded in (
            MelFusionPipeline.from_pretrained(source),
            DiffusionPipeline.from_pretrained(source, trust_remote_code=True),
        ):
            assert_equal_weights(expected.synapse, loaded.synapse)
            assert_equal_weights(expected.vocoder, loaded.vocoder)
        assert type(loaded) is not MelFusionPipeline
    assert_equal_weights(expected.synapse, VisualSynapse.from_pretrained("tester/small", subfolder="synapse"))


def test_the_root_tells_plain_diffusers_what_to_call_instead():
    for trust in (False, True):
        with pytest.raises(AttributeError, match=r"melfusion_pipeline\.MelFusionPipeline\.from_pretrained"):
            DiffusionPipeline.from_pretrained(ROOT, trust_remote_code=trust)

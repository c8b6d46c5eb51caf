"""`examples/publish.py` against the loopback Hub: what it writes, uploads and leaves out, and how that loads."""

import json
import re
from pathlib import Path

import model_card
import numpy as np
import PIL.Image
import publish
import pytest
import soundfile
import torch
import yaml
from conftest import assert_near, generator, photograph, rounding_error
from copies import untrained_components
from diffusers.models import modeling_utils
from huggingface_hub import ModelCard
from processes import forget_the_package, start

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.adapters_melfusion import add_lora, lora_layers, lora_of_unet

ROOT = Path(__file__).parents[1]
STEPS = ("--num_inference_steps", "2", "--audio_length_in_s", "0.64")
FACTS = {"trained": "the synapse", "starting from": "/home/somebody/old-pipeline and maker/music", "steps": 6}
SCORES = {"FAD": [1.25, 1.0, 1.5], "IMSM matched": [0.5, 0.25, 0.75]}
RESULTS = {
    "settings": {"rows": 6, "triplets": "/home/somebody/set/test.jsonl", "IMSM": "CLIP /srv/models/clip, 6 captions"},
    "systems": {
        "melfusion": {"n": 6, "sampling_rate": 16000, "scores": SCORES},
        "text-only": {"n": 6, "sampling_rate": 16000, "scores": {"FAD": [2.5, 2.0, 3.0]}},
    },
    "remarks": {"FD": "needs --classifier"},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """What training leaves: the pipeline, its facts, and much that nobody should publish."""
    folder = tmp_path_factory.mktemp("trained")
    MelFusionPipeline(**untrained_components()).save_pretrained(folder)
    model_card.write_training(folder, ["maker/music"], FACTS)
    for name in (
        "checkpoint-3/optimizer.bin",
        "trajectories/1.safetensors",
        "logs/events",
        "unet/planted.bin",
        ".env",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not for the Hub")
    return folder


@pytest.fixture
def arguments(trained, tmp_path) -> list[str]:
    """A publication with everything: two samples, one of them with awkward names, and results."""
    photograph(0, 600, 400).save(tmp_path / "Lightning at night!.jpg")
    photograph(1).save(tmp_path / "fog.png")
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    given = ["--checkpoint", trained, "--hub_model_id", "you/mine", "--output", tmp_path / "published", *STEPS]
    given += ["--sample", tmp_path / "Lightning at night!.jpg", 'a "slow" cello | harp', "--credits", "Pictures: me"]
    given += ["--sample", tmp_path / "fog.png", "drums", "--results", tmp_path / "results.json"]
    return list(map(str, given))


def front_matter(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def snippets(card: str) -> list[str]:
    return re.findall("```python\n(.*?)```", card, re.DOTALL)


def test_a_dry_run_writes_a_complete_folder_and_uploads_nothing(arguments, tmp_path, hub):
    publish.main([*arguments, "--dry_run"])
    folder = tmp_path / "published"
    assert hub.requests == [] and not hub.repositories
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    samples = {f"samples/{name}.{suffix}" for name in ("0-lightning-at-night", "1-fog") for suffix in ("jpg", "wav")}
    assert samples | {"README.md", "LICENSE.md", "training.json", "pipeline_melfusion.py", "model_index.json"} <= names
    assert not any("checkpoint-" in name or name.endswith((".bin", ".env")) for name in names)
    assert len([name for name in names if name.endswith(".safetensors")]) == 8


def test_a_sample_is_what_the_pipeline_makes_of_picture_and_prompt(arguments, trained, tmp_path):
    publish.main([*arguments, "--dry_run", "--seed", "5"])
    pipe = MelFusionPipeline.from_pretrained(trained)
    call = {"num_inference_steps": 2, "audio_length_in_s": 0.64, "generator": generator(5)}
    expected = pipe(photograph(1), "drums", **call).audios[0]
    found, rate = soundfile.read(tmp_path / "published" / "samples" / "1-fog.wav")
    assert rate == 16000
    # Written in 16 bits.
    assert np.abs(found - expected / max(1, np.abs(expected).max())).max() < 2**-15 + rounding_error(expected)
    picture = PIL.Image.open(tmp_path / "published" / "samples" / "0-lightning-at-night.jpg")
    assert picture.size == (384, 256)


def test_front_matter_is_complete_and_valid(arguments, tmp_path, hub):
    choices = ["--license", "cc-by-nc-sa-4.0", "--base_model", "a/image", "b/music", "--dataset", "c/triplets"]
    publish.main([*arguments, "--dry_run", *choices])
    data = front_matter(tmp_path / "published")
    assert data["pipeline_tag"] == "text-to-audio" and data["library_name"] == "diffusers"
    assert data["license"] == "cc-by-nc-sa-4.0" and "license_name" not in data
    assert data["base_model"] == ["a/image", "b/music"] and data["datasets"] == ["c/triplets"]
    assert "image-to-music" in data["tags"]
    assert [entry["text"] for entry in data["widget"]] == ['a "slow" cello | harp', "drums"]
    for entry in data["widget"]:
        assert (tmp_path / "published" / entry["output"]["url"]).is_file()
    (entry,) = data["model-index"]
    figures = {result["name"]: result["value"] for result in entry["results"][0]["metrics"]}
    assert figures == {name: interval[0] for name, interval in SCORES.items()}
    ModelCard.load(tmp_path / "published" / "README.md").validate()
    assert hub.requests[-1][1:] == ("/api/validate-yaml", 200)


def test_the_card_tells_how_it_was_trained_and_how_it_scored_but_no_folder_of_this_machine(arguments, tmp_path):
    publish.main([*arguments, "--dry_run"])
    folder = tmp_path / "published"
    card, data = (folder / "README.md").read_text(), front_matter(folder)
    assert "| starting from | old-pipeline and maker/music |" in card and "| steps | 6 |" in card
    assert "| melfusion | 6 | 16000 | 1.25 [1, 1.5] |" in card and "- triplets: test.jsonl" in card
    assert "CLIP clip, 6 captions" in card and "Pictures: me" in card and 'a "slow" cello \\| harp |' in card
    assert "somebody" not in card and "/srv" not in card and str(tmp_path) not in card
    assert "somebody" not in (folder / "training.json").read_text()
    assert data["base_model"] == ["maker/music"] and (data["license"], data["license_link"]) == ("other", "LICENSE.md")
    assert "https://huggingface.co/maker/music" in (folder / "LICENSE.md").read_text()
    assert card.count("```python") == 2 and "@inproceedings{chowdhury2024melfusion," in card


def test_what_is_published_loads_with_both_snippets_of_its_card(arguments, trained, tmp_path, hub, monkeypatch):
    publish.main(arguments)
    files = hub.files("you/mine")
    assert not any(name.startswith(("checkpoint-", "trajectories/", "logs/", ".env")) for name in files)
    assert not any(name.endswith(".bin") for name in files) and "samples/1-fog.wav" in files
    card = files["README.md"].decode()
    assert f'<audio controls src="{hub.endpoint}/you/mine/resolve/main/samples/1-fog.wav">' in card

    photograph().save(tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    with_package, without_package = snippets(card)
    namespace = {}
    torch.manual_seed(0)
    exec(compile(with_package, "card", "exec"), namespace)
    assert type(namespace["pipe"]) is MelFusionPipeline and namespace["audio"].shape == (0.32 * 16000,)
    for name, weight in MelFusionPipeline.from_pretrained(trained).synapse.state_dict().items():
        assert torch.equal(namespace["pipe"].synapse.state_dict()[name], weight)

    def load_without_the_package() -> None:
        forget_the_package()
        torch.manual_seed(0)
        namespace = {}
        exec(compile(without_package, "card", "exec"), namespace)
        np.save("audio.npy", namespace["audio"])

    process = start(load_without_the_package, tmp_path / "printed")
    process.join()
    assert process.exitcode == 0, (tmp_path / "printed").read_text()
    assert_near(np.load("audio.npy"), namespace["audio"])


def test_only_what_may_be_published_is_uploaded_of_a_training_folder(trained, hub):
    assert publish.upload(trained, "you/raw", private=True) == "you/raw"
    files = hub.files("you/raw")
    assert {"unet/diffusion_pytorch_model.safetensors", "training.json"} <= files.keys()
    assert not files.keys() & {"checkpoint-3/optimizer.bin", "trajectories/1.safetensors", "unet/planted.bin", ".env"}
    assert hub.repositories["you/raw"].private


def test_diffusers_does_not_warn_of_the_dtype_that_the_weights_have(trained, tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr(modeling_utils.logger, "warning", lambda *message: warned.append(message))
    given = ["--checkpoint", str(trained), "--hub_model_id", "you/a", "--output", str(tmp_path / "a"), "--dry_run"]
    publish.main(given)
    assert not warned


def test_half_precision_halves_the_weights(arguments, trained, tmp_path):
    given = [text for text in arguments if text not in ("--sample", "--results")]
    given = given[: given.index("--output") + 2]
    publish.main([*given, "--dry_run", "--dtype", "float16"])
    half, full = (
        sum(path.stat().st_size for path in folder.glob("*/*.safetensors"))
        for folder in (tmp_path / "published", trained)
    )
    assert half < 0.65 * full
    assert not (tmp_path / "published" / "samples").exists()
    assert front_matter(tmp_path / "published")["widget"] == [{"text": "a slow cello"}]


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--sample", "nowhere.jpg", "drums"], "these files do not exist: nowhere.jpg"),
        (["--results", __file__], "is no results.json of evaluate.py: JSONDecodeError"),
        (["--results", str(ROOT / "model_index.json")], "is no results.json of evaluate.py: KeyError"),
        (["--results", "nowhere.json"], "these files do not exist: nowhere.json"),
        (["--hub_model_id", "mine"], "must be like user/name, but is 'mine'"),
        (["--hub_model_id", "you/mine/weights"], "must be like user/name"),
        (["--dtype", "int8"], "invalid choice"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(arguments, tmp_path, capsys, changes, message):
    with pytest.raises(SystemExit):
        publish.main([*arguments, *changes])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "published").exists()


def test_the_checkpoint_itself_is_not_overwritten(arguments, trained, capsys):
    with pytest.raises(SystemExit):
        publish.main([*arguments, "--output", str(trained)])
    assert "--output must be another folder" in capsys.readouterr().err


# ------------------------------------------------------------ only what was learned


@pytest.fixture
def trained_lora(tmp_path, hub) -> Path:
    """What `--train lora` leaves, and its base models on the Hub."""
    pipe = MelFusionPipeline(**untrained_components())
    for name, component in pipe.components.items():
        if name.startswith("image_"):
            component.save_pretrained(tmp_path / "image" / name.removeprefix("image_"))
        elif component is not None and name != "synapse":
            component.save_pretrained(tmp_path / "music" / name)
    hub.add_repo("maker/image", tmp_path / "image")
    hub.add_repo("maker/music", tmp_path / "music")
    add_lora(pipe.unet, rank=2)
    for layer in lora_layers(pipe.unet):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.5)
    lora = lora_of_unet(pipe.unet)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "trained")
    pipe.save_lora_weights(tmp_path / "trained" / "synapse", *lora)
    facts = {"trained": model_card.TRAINED["lora"], "starting from": "maker/image and maker/music"}
    model_card.write_training(tmp_path / "trained", ["maker/image", "maker/music"], facts)
    return tmp_path / "trained"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_only_what_was_learned_is_a_small_repository_that_sounds_like_the_whole(
    trained_lora, tmp_path, hub, monkeypatch, capsys, dtype
):
    output = tmp_path / "small"
    given = ["--checkpoint", trained_lora, "--hub_model_id", "you/small", "--output", output, "--dtype", dtype]
    publish.main([*map(str, given), "--only_learned"])
    files = hub.files("you/small")
    weights = {name: len(content) for name, content in files.items() if name.endswith(".safetensors")}
    assert weights.keys() == {"diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors"}
    assert {"config.json", "README.md", "LICENSE.md", "training.json"} <= files.keys()
    assert not any(name.endswith(".py") or name == "model_index.json" for name in files)
    whole = sum(path.stat().st_size for path in trained_lora.glob("*/*.safetensors")) / 1e6
    printed = capsys.readouterr().out
    expected = [f"({size / 1e6:,.2f} MB)" for size in weights.values()]
    assert all(size in printed and size in files["README.md"].decode() for size in expected)
    said = float(re.search(r"of a whole pipeline of ([\d.,]+) MB", printed)[1])
    assert sum(weights.values()) / 1e6 < 0.3 * said
    if dtype == "float32":
        assert said == pytest.approx(whole, rel=0.1)
    assert front_matter(output)["base_model"] == ["maker/image", "maker/music"]

    photograph().save(tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    (snippet,) = snippets(files["README.md"].decode())
    assert "pip install peft" in files["README.md"].decode()
    namespace = {}
    exec(compile(snippet, "card", "exec"), namespace)
    call = {"image": photograph(), "prompt": "drums", "num_inference_steps": 2, "output_type": "latent"}
    whole, small = (
        pipe(**call, generator=generator()).audios
        for pipe in (MelFusionPipeline.from_pretrained(trained_lora), namespace["pipe"])
    )
    # What is stored with 11 bits differs by more.
    atol = (1e-5 if dtype == "float32" else 1e-2) * whole.abs().max().item()
    torch.testing.assert_close(small, whole, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "trained, base_models, flags, message",
    [
        ("unet", ["maker/image", "maker/music"], [], "the music UNet itself was trained"),
        ("synapse", [], [], "needs --base_model PICTURE_MODEL MUSIC_MODEL, .* the training tells none"),
        ("synapse", ["you/old"], [], r"the training tells \['you/old'\]"),
        ("lora", [], ["--base_model", "maker/music"], "needs --base_model"),
    ],
)
def test_what_cannot_be_loaded_from_a_small_repository_is_not_published_so(
    tmp_path, capsys, trained, base_models, flags, message
):
    model_card.write_training(tmp_path, base_models, {"trained": model_card.TRAINED[trained]})
    given = ["--checkpoint", str(tmp_path), "--hub_model_id", "you/small", "--output", str(tmp_path / "small")]
    with pytest.raises(SystemExit):
        publish.main([*given, "--only_learned", *flags])
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert not (tmp_path / "small").exists()


def test_what_was_learned_on_a_whole_pipeline_is_not_published_for_base_models(tmp_path, capsys):
    facts = {"trained": model_card.TRAINED["lora"], "starting from": model_card.WHOLE_PIPELINE + "my-lora"}
    model_card.write_training(tmp_path, [], facts)
    given = ["--checkpoint", str(tmp_path), "--hub_model_id", "you/small", "--output", str(tmp_path / "small")]
    with pytest.raises(SystemExit):
        publish.main([*given, "--only_learned", "--base_model", "maker/image", "maker/music"])
    assert "training started from a whole pipeline" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    "text, shown",
    [
        ("/home/me/set/test.jsonl", "test.jsonl"),
        (
            "CLIP /a/b/clip, CLAP laion/clap-htsat-unfused, 6 captions of /c/set",
            "CLIP clip, CLAP laion/clap-htsat-unfused, 6 captions of set",
        ),  # noqa: E501
        ("see https://huggingface.co/you/mine", "see https://huggingface.co/you/mine"),
        ("| FAD (lower) | 3 / 4 |", "| FAD (lower) | 3 / 4 |"),
    ],
)
def test_folders_are_hidden_and_nothing_else(text, shown):
    assert model_card.hide_folders(text) == shown

import shutil
import sys

import librosa
import numpy as np
import pytest
import torch
from conftest import assert_near
from extractor_checkpoints import save_ast, save_clap, save_clip
from PIL import Image
from safetensors.torch import load_file, save_file, save_model
from scipy.special import softmax

from melfusion_pipeline.extractors import (
    AstExtractor,
    ClapExtractor,
    ClipExtractor,
    LogMelExtractor,
    PannsExtractor,
    PasstExtractor,
    VggishExtractor,
)

CAPTIONS = ["a calm piano", "loud drums", "a"]


def music(seconds=1.5, rate=16000, count=5):
    time = np.arange(int(seconds * rate)) / rate
    tones = [np.sin(2 * np.pi * 110 * (index + 1) * time) * np.exp(-3 * (time % 0.31)) for index in range(count)]
    return 0.3 * np.stack(tones).astype(np.float32)


def pictures(count=3):
    pixels = np.random.default_rng(0).integers(0, 256, (count, 40, 60, 3), dtype=np.uint8)
    return [Image.fromarray(array) for array in pixels]


@pytest.fixture(scope="module", params=["fusion", "rand_trunc"])
def clap_folder(request, tmp_path_factory):
    return save_clap(tmp_path_factory.mktemp("clap"), truncation=request.param)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def ast_folder(tmp_path_factory):
    return save_ast(tmp_path_factory.mktemp("ast"))


def test_clap_agrees_with_the_full_model(clap_folder):
    clap = ClapExtractor.from_pretrained(str(clap_folder), batch_size=2)
    audio = music(seconds=1, rate=12000)
    inputs = clap.processor(text=CAPTIONS, audio=list(audio), sampling_rate=12000, padding=True, return_tensors="pt")
    inputs["is_longer"] = torch.zeros(5, 1, dtype=torch.bool)
    with torch.no_grad():
        outputs = clap.model(**{**inputs, "input_features": inputs["input_features"].float()})
    assert_near(clap.embed(audio=audio, sampling_rate=12000), outputs.audio_embeds)
    assert_near(clap.embed(text=CAPTIONS), outputs.text_embeds)
    probabilities = clap.probabilities(audio=audio, text=CAPTIONS, sampling_rate=12000)
    assert_near(torch.from_numpy(probabilities).float(), outputs.logits_per_audio.softmax(1))
    assert_near(probabilities.sum(1), np.ones(len(probabilities)))


def test_clap_crops_long_clips_to_their_middle_whatever_the_random_state(clap_folder):
    clap = ClapExtractor.from_pretrained(str(clap_folder), batch_size=2)
    audio = music(seconds=1.5, rate=12000)
    results = []
    for seed in range(4):
        np.random.seed(seed)
        results.append(clap.embed(audio=audio, sampling_rate=12000))
    middle = clap.embed(audio=audio[:, 3000:15000], sampling_rate=12000)
    for result in results:
        np.testing.assert_array_equal(result, middle)
    assert np.abs(middle - clap.embed(audio=audio[:, :12000], sampling_rate=12000)).max() > 1e-4


def test_clip_agrees_with_the_full_model(clip_folder):
    clip = ClipExtractor.from_pretrained(str(clip_folder), batch_size=2)
    inputs = clip.processor(text=CAPTIONS, images=pictures(), padding=True, return_tensors="pt")
    with torch.no_grad():
        outputs = clip.model(**inputs)
    assert_near(clip.embed(images=pictures()), outputs.image_embeds)
    assert_near(clip.embed(text=CAPTIONS), outputs.text_embeds)
    probabilities = clip.probabilities(images=pictures(), text=CAPTIONS)
    assert_near(torch.from_numpy(probabilities).float(), outputs.logits_per_image.softmax(1))
    grey = [picture.convert("L") for picture in pictures()]
    assert clip.embed(images=grey).shape == (3, 16)


def test_ast_agrees_with_the_full_model(ast_folder):
    ast = AstExtractor.from_pretrained(str(ast_folder), batch_size=2)
    audio = music(seconds=1)
    with torch.no_grad():
        inputs = ast.feature_extractor(list(audio), sampling_rate=16000, return_tensors="pt")
        logits = ast.model(**inputs).logits
    probabilities = ast.probabilities(audio=audio, sampling_rate=16000)
    assert_near(torch.from_numpy(probabilities).float(), logits.softmax(1))
    embedding = torch.from_numpy(ast.embed(audio=audio, sampling_rate=16000))
    assert_near(ast.model.classifier(embedding).detach(), logits)


def test_precision_is_the_callers(clip_folder, ast_folder):
    full = ClipExtractor.from_pretrained(str(clip_folder)).embed(images=pictures())
    half = ClipExtractor.from_pretrained(str(clip_folder), dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16
    assert_near(
        torch.from_numpy(half.embed(images=pictures())).bfloat16(), torch.from_numpy(full).bfloat16(), steps=10
    )
    ast = AstExtractor.from_pretrained(str(ast_folder), device="cpu", dtype=torch.bfloat16)
    probabilities = ast.probabilities(audio=music(seconds=1), sampling_rate=16000)
    assert_near(probabilities.sum(1), np.ones(len(probabilities)))


def test_a_model_of_another_kind_or_without_all_weights_is_refused(clip_folder, clap_folder, tmp_path):
    for extractor, folder, found, needed in (
        (ClapExtractor, clip_folder, "clip", "clap"),
        (ClipExtractor, clap_folder, "clap", "clip"),
        (AstExtractor, clip_folder, "clip", "audio-spectrogram-transformer"),
    ):
        with pytest.raises(ValueError, match=f"holds a model of the type '{found}', but '{needed}' is needed"):
            extractor.from_pretrained(str(folder))
    with pytest.raises(OSError, match="'.*nowhere' is no model"):
        ClapExtractor.from_pretrained(str(tmp_path / "nowhere"))
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    tensors = load_file(folder / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights, visual_projection.weight the first"):
        ClipExtractor.from_pretrained(str(folder))


@pytest.mark.parametrize("rate", [22050, 32000, 48000])
def test_audio_is_resampled_to_the_extractors_rate(ast_folder, rate):
    ast = AstExtractor.from_pretrained(str(ast_folder))
    expected = ast.embed(audio=music(seconds=1), sampling_rate=16000)
    found = ast.embed(audio=music(seconds=1, rate=rate), sampling_rate=rate)
    wrong = ast.embed(audio=music(seconds=1, rate=rate), sampling_rate=16000)
    assert np.abs(found - expected).max() < 0.5 * np.abs(wrong - expected).max()


def test_log_mel_agrees_with_librosa():
    audio = music() + 1e-3 * np.random.default_rng(0).normal(size=(5, 24000)).astype(np.float32)
    arguments = dict(sr=16000, n_fft=1024, hop_length=160, n_mels=64, fmax=8000, power=1.0, pad_mode="reflect")
    expected = np.log(np.maximum(librosa.feature.melspectrogram(y=audio, **arguments), 1e-5))
    expected = np.concatenate([expected.mean(-1), expected.std(-1, ddof=1)], axis=1)
    found = LogMelExtractor(batch_size=2).embed(audio=torch.from_numpy(audio), sampling_rate=16000)
    assert_near(found, expected)


def test_panns_loads_converted_weights(tmp_path):
    from panns_hear.models import Cnn14

    torch.manual_seed(0)
    model = Cnn14(32000, 1024, 320, 64, 50, 14000, 527).eval()
    save_model(model, str(tmp_path / "model.safetensors"))
    panns = PannsExtractor.from_pretrained(str(tmp_path), batch_size=1)
    (tmp_path / "model.safetensors").unlink()
    audio = music(seconds=1.1, rate=32000, count=2)
    with torch.no_grad():
        outputs = model(torch.from_numpy(audio))
    assert_near(panns.embed(audio=audio, sampling_rate=32000), outputs["embedding"])
    expected = softmax(torch.logit(outputs["clipwise_output"].double()).numpy(), axis=1)
    probabilities = panns.probabilities(audio=audio, sampling_rate=32000)
    assert_near(probabilities.astype(np.float32), expected.astype(np.float32))


def test_vggish_loads_converted_weights(tmp_path):
    import torchvggish

    torch.manual_seed(0)
    model = torchvggish.VGG(torchvggish.make_layers(), postprocess=False)
    save_model(model, str(tmp_path / "model.safetensors"))
    vggish = VggishExtractor.from_pretrained(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    audio = music(seconds=2, count=2)
    found = vggish.embed(audio=audio, sampling_rate=16000)
    assert found.shape == (2, 2, 128) and (found < 0).any()
    with torch.no_grad():
        expected = [model(torchvggish.waveform_to_examples(clip, 16000)) for clip in audio]
    assert_near(np.maximum(found, 0), torch.stack(expected))


@pytest.mark.parametrize(
    "extractor, module, command",
    [
        (PannsExtractor, "panns_hear.models", "pip install panns-hear"),
        (PasstExtractor, "hear21passt.models.passt", "pip install hear21passt"),
        (VggishExtractor, "torchvggish", "pip install torchvggish soundfile"),
    ],
)
def test_missing_extras_name_the_pip_command(extractor, module, command, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=command):
        extractor.from_pretrained(str(tmp_path))


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="model.safetensors does not exist: convert"):
        VggishExtractor.from_pretrained(str(tmp_path))


def test_progress_is_shown(capsys):
    LogMelExtractor(batch_size=2).embed(audio=music(), sampling_rate=16000)
    assert "LogMelExtractor: 100%" in capsys.readouterr().err


def broken(change):
    audio = music()
    change(audio)
    return audio


@pytest.mark.parametrize(
    "audio, sampling_rate, message",
    [
        ([], 16000, "shape"),
        (music()[0], 16000, "must be mono floats of shape"),
        (np.zeros((2, 2, 16000), np.float32), 16000, "must be mono floats of shape"),
        ((music() * 32767).astype(np.int16), 16000, "int16"),
        ([music()[0], music()[0, :-1]], 16000, "equally long"),
        (broken(lambda audio: audio[3].fill(0)), 16000, "Clip 3 of `audio` is silent"),
        (broken(lambda audio: audio[2, 7:8].fill(np.nan)), 16000, "Clip 2 of `audio` has NaN"),
        (broken(lambda audio: audio[1, :1].fill(np.inf)), 16000, "Clip 1 of `audio` has NaN or infinite"),
        (music(seconds=0.9), 16000, "at least a second, got 14400 samples at 16000 Hz"),
        (music(), None, "`sampling_rate` must be"),
        (music(), -1, "`sampling_rate` must be"),
        (music(), [16000, 48000], "`sampling_rate` must be"),
    ],
)
def test_bad_audio_is_refused(audio, sampling_rate, message):
    with pytest.raises(ValueError, match=message):
        LogMelExtractor().embed(audio=audio, sampling_rate=sampling_rate)


def test_bad_pictures_and_texts_are_refused(clip_folder):
    clip = ClipExtractor.from_pretrained(str(clip_folder))
    with pytest.raises(ValueError, match="either `images` or `text`"):
        clip.embed()
    with pytest.raises(ValueError, match="either `images` or `text`"):
        clip.embed(images=pictures(), text=CAPTIONS)
    with pytest.raises(ValueError, match="`images` must not be empty"):
        clip.embed(images=[])
    with pytest.raises(TypeError, match="got str at 0: open it with PIL"):
        clip.embed(images=["picture.png"])
    with pytest.raises(ValueError, match="`text` must not be empty"):
        clip.embed(text=[])
    with pytest.raises(TypeError, match="put one string into a list"):
        clip.embed(text="a calm piano")

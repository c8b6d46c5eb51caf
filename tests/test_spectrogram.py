"""Other numbers of the spectrogram than AudioLDM's at 16 kHz: from the front end to training and evaluation."""

import librosa
import numpy as np
import pytest
import soundfile
import torch
from conftest import assert_near, generator, photograph
from copies import untrained_components
from evaluate_systems import reconstruct
from test_audio import polyphonic_music
from test_training import make_batch, make_objective
from untrained import autoencoder, components_at_48_khz

from melfusion_pipeline import MelFusionPipeline
from melfusion_pipeline.audio import (
    Spectrogram,
    load_random_crop,
    log_mel_spectrogram,
    waveform_to_latents,
)
from melfusion_pipeline.caches import MusicLatentCache
from melfusion_pipeline.waveforms_melfusion import mel_filters

# AudioLDM's at 48 kHz.
NUMBERS = {"spectrogram_fft_length": 2048, "spectrogram_min_frequency": 20.0, "spectrogram_max_frequency": 24000.0}
SPECTROGRAM = Spectrogram(48000, 2048, 480, 256, 20.0, 24000.0)


@pytest.fixture
def pipe() -> MelFusionPipeline:
    pipe = MelFusionPipeline(**components_at_48_khz(), **NUMBERS)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_log_mel_at_48_khz_with_256_bands_equals_librosa():
    waveform = torch.from_numpy(np.stack([polyphonic_music(48000, 1.28, seed) for seed in range(2)]))
    settings = {"sr": 48000, "n_fft": 2048, "n_mels": 256, "fmin": 20, "fmax": 24000}
    filters = librosa.filters.mel(**settings, dtype=np.float64)
    assert np.abs(mel_filters(SPECTROGRAM).numpy().T - filters).max() < 1e-6
    magnitudes = np.abs(librosa.stft(waveform.numpy(), n_fft=2048, hop_length=480, pad_mode="reflect"))
    expected = np.log((filters @ magnitudes).clip(1e-5)).transpose(0, 2, 1)[:, :128]
    log_mel = log_mel_spectrogram(waveform, SPECTROGRAM)
    assert log_mel.dtype == torch.float64 and log_mel.shape == (2, 128, 256)
    assert np.abs(log_mel.numpy() - expected).max() < 1e-4


def test_a_pipeline_tells_its_spectrogram_and_keeps_it(pipe, tmp_path):
    assert Spectrogram.of(pipe) == SPECTROGRAM
    assert Spectrogram.of(MelFusionPipeline(**untrained_components(mel_bands=64))) == Spectrogram()
    pipe.save_pretrained(tmp_path)
    loaded = MelFusionPipeline.from_pretrained(tmp_path)
    assert Spectrogram.of(loaded) == SPECTROGRAM
    assert Spectrogram.of(MelFusionPipeline.from_pipe(loaded)) == SPECTROGRAM


def test_a_stack_at_48_khz_runs_end_to_end(pipe, tmp_path):
    assert pipe.sampling_rate == 48000 and pipe.vae_scale_factor == 8
    assert pipe.default_audio_length_in_s == pytest.approx(8 * 8 * 480 / 48000)
    call = {"num_inference_steps": 2, "num_inversion_steps": 2, "generator": generator()}
    audio = pipe(photograph(), "a calm piano", audio_length_in_s=1.5, **call).audios
    assert audio.shape == (1, 72000) and np.isfinite(audio).all() and np.abs(audio).max() > 1e-3
    latents = pipe(photograph(), "a calm piano", output_type="latent", **call).audios
    assert latents.shape == (1, 16, 8, 32)

    soundfile.write(tmp_path / "0.flac", polyphonic_music(44100, 1.5) / 2, 44100)
    crop = load_random_crop(tmp_path / "0.flac", 0.0, None, 1.28, generator(), 48000)
    assert crop.shape == (61440,)
    latents = waveform_to_latents(crop, 48000, pipe.vae, 1.28, spectrogram=SPECTROGRAM)
    assert latents.shape == (1, 16, 16, 32)
    row = {"audio": tmp_path / "0.flac", "start": None}
    with torch.no_grad():
        found = reconstruct(pipe, row, 1.28)
    assert found.shape == (61440,) and found.abs().max() > 1e-3


def test_training_takes_the_pipelines_spectrogram(pipe, tmp_path):
    batch = make_batch(tmp_path, 2) | {"waveforms": torch.randn(2, 30720) * 0.1}
    objective = make_objective(pipe)
    with objective.attached():
        expected = objective.per_sample_loss(batch, 0)
        expected.mean().backward()
    assert pipe.synapse.alphas.grad.all()
    objective.music_latents = MusicLatentCache(tmp_path / "music", pipe.vae, SPECTROGRAM)
    with torch.no_grad(), objective.attached():
        torch.testing.assert_close(objective.per_sample_loss(batch, 0), expected.detach(), atol=1e-2, rtol=1e-2)
        others = MusicLatentCache(tmp_path / "music", pipe.vae, Spectrogram(48000, 1024, 480, 256, 20.0, 24000.0))
        draw = objective.draw(batch["indices"], 0)
        assert not torch.allclose(
            others.encode(batch["waveforms"], draw.generators),
            objective.music_latents.encode(batch["waveforms"], objective.draw(batch["indices"], 0).generators),
        )


def test_the_default_is_audioldms():
    waveform = torch.from_numpy(polyphonic_music(16000, 1.28))
    vae = autoencoder(in_channels=1, out_channels=1, latent_channels=8).eval()
    with torch.no_grad():
        assert_near(
            waveform_to_latents(waveform, 16000, vae),
            waveform_to_latents(waveform, 16000, vae, spectrogram=Spectrogram(16000, 1024, 160, 64, 0.0, 8000.0)),
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling_rate": 8000}, "`min_frequency` and `max_frequency` must ascend within 0 and 4000 Hz"),
        ({"sampling_rate": 0}, "`sampling_rate` must be a positive"),
        ({"fft_length": 1023}, "`fft_length` must be even"),
        ({"hop_length": 0}, "`hop_length` must be a positive whole number"),
        ({"num_mel_bands": 6.5}, "`num_mel_bands` must be a positive whole number"),
        ({"min_frequency": -1.0}, "`min_frequency`"),
        ({"min_frequency": 8000.0}, "`min_frequency`"),
        ({"max_frequency": float("nan")}, "`max_frequency`"),
    ],
)
def test_numbers_that_make_no_spectrogram_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Spectrogram(**changes)


def test_stereo_is_refused_by_name():
    components = untrained_components()
    pipe = MelFusionPipeline(**{**components, "vae": autoencoder(in_channels=2, out_channels=2)})
    with pytest.raises(ValueError, match="`vae` must decode to 1 channels, but has 2. Stereo music is not served"):
        pipe(prompt="a calm piano")

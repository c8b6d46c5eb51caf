import importlib.util
import math
from pathlib import Path

import pytest
import torch
from conftest import assert_near

from melfusion_pipeline import MelFusionPipeline, MusicVocoder, vocoder_melfusion

HOP = 160
TINY = {"width": 32, "hidden_width": 64, "num_layers": 2}


@pytest.fixture
def vocoder() -> MusicVocoder:
    torch.manual_seed(0)
    return MusicVocoder(**TINY).eval()


def mels(frames: int = 40, batch: int = 2) -> torch.Tensor:
    return 2.5 * torch.randn(batch, frames, 64, generator=torch.Generator().manual_seed(1)) - 5


def spectrum_of(waveform: torch.Tensor) -> torch.Tensor:
    """Power at whole Hz, of the last second."""
    return torch.fft.rfft(waveform[-16000:] * torch.hann_window(16000)).abs().square()


@torch.no_grad()
def test_a_batch_is_what_its_rows_are_and_every_frame_gives_its_samples(vocoder):
    waveforms = vocoder(mels())
    assert waveforms.shape == (2, 40 * HOP) and waveforms.dtype == torch.float32
    assert_near(vocoder(mels()[1]), waveforms[1])
    config = vocoder.config
    assert (math.prod(config.upsample_rates), config.sampling_rate, config.model_in_dim) == (HOP, 16000, 64)


def test_the_default_stays_below_two_million_parameters():
    assert sum(parameter.numel() for parameter in MusicVocoder().parameters()) < 2_000_000


@torch.no_grad()
def test_the_same_spectrogram_gives_the_same_waveform_and_leaves_the_random_state_alone(vocoder):
    torch.manual_seed(3)
    first, state = vocoder(mels()), torch.get_rng_state()
    torch.manual_seed(4)
    assert torch.equal(first, vocoder(mels()))
    torch.manual_seed(3)
    assert torch.equal(state, torch.get_rng_state())


@torch.no_grad()
def test_another_default_device_changes_nothing(vocoder):
    spectrogram = torch.randn(1, 20, 64)
    expected = vocoder(spectrogram, first_frame=7)
    with torch.device("meta"):
        assert torch.equal(vocoder(spectrogram, first_frame=7), expected)


@torch.no_grad()
def test_what_the_backbone_sees_is_normalised(vocoder):
    # Without a bias the norm that follows would hide every scale.
    torch.nn.init.normal_(vocoder.embed.bias)
    scaled = MusicVocoder(**TINY, mel_mean=-2.0, mel_std=0.5).eval()
    scaled.load_state_dict(vocoder.state_dict())
    mean, std = vocoder.config.mel_mean, vocoder.config.mel_std
    assert_near(scaled((mels() - mean) / std * 0.5 - 2), vocoder(mels()))


@pytest.mark.parametrize("tone", [40, 144, 250])
def test_a_tone_that_stays_the_same_sounds_at_its_own_frequency(vocoder, tone):
    strengths = torch.zeros(1, 200, vocoder.num_tones, dtype=torch.complex64)
    strengths[..., tone] = 1j
    waveform = vocoder.add_tones(strengths, first_frame=0)[0]
    frequency = vocoder.tone_frequencies()[tone]
    time = torch.arange(200 * HOP, dtype=torch.float64) / 16000
    expected = -torch.sin(2 * torch.pi * frequency * time).float()
    # The last frame has no next one to glide to.
    assert_near(waveform[:-HOP], expected[:-HOP])


def test_the_tones_are_those_of_the_piano_and_two_between_each(vocoder):
    frequencies = vocoder.tone_frequencies()
    keys = 69 + 12 * torch.log2(frequencies / 440)
    assert_near(keys[::3], torch.arange(21, 21 + len(keys[::3]), dtype=torch.float64))
    assert frequencies[-1] < 8000 <= frequencies[-1] * 2 ** (1 / 36)


@torch.no_grad()
def test_what_goes_on_unchanged_is_no_multiple_of_the_frame_rate(vocoder):
    # Without running oscillators a spectrogram that stands still can only give multiples of 100 Hz.
    power = spectrum_of(vocoder(torch.full((200, 64), -3.0)))
    on_grid = sum(power[hz - 3 : hz + 4].sum() for hz in range(100, 8000, 100)) / power.sum()
    assert on_grid < 0.6


@torch.no_grad()
def test_oscillators_that_have_run_for_a_while_go_on(vocoder):
    strengths = torch.polar(torch.rand(1, 60, vocoder.num_tones), torch.rand(1, 60, vocoder.num_tones))
    whole = vocoder.add_tones(strengths, 0)
    second = vocoder.add_tones(strengths[:, 25:], 25)
    assert_near(second[:, HOP:], whole[:, 26 * HOP :])


def test_a_waveform_s_own_spectrum_gives_it_back(vocoder):
    waveform = torch.randn(1, 50 * HOP, generator=torch.Generator().manual_seed(0))
    spectrum = torch.stft(waveform, 512, HOP, window=torch.hann_window(512), pad_mode="constant", return_complex=True)
    silence = torch.zeros(1, 50, 257)
    inverted = vocoder.invert(spectrum.mT[:, :50], silence, 0)
    assert_near(inverted[:, :-512], waveform[:, :-512])
    noise = vocoder.invert(torch.zeros(1, 50, 257, dtype=torch.complex64), silence + 1, 0)
    assert noise[:, 512:-512].std().item() == pytest.approx(1, abs=0.05)


def test_every_parameter_learns():
    vocoder = MusicVocoder(**TINY)
    vocoder(mels()).square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in vocoder.parameters())


@torch.no_grad()
def test_half_precision_weights_give_a_waveform_in_float32(vocoder):
    expected = vocoder(mels())
    found = vocoder.bfloat16()(mels().bfloat16())
    assert found.dtype == torch.float32 and found.shape == expected.shape and found.isfinite().all()


def test_the_file_alone_saves_and_loads(vocoder, tmp_path):
    vocoder.save_pretrained(tmp_path)
    path = Path(vocoder_melfusion.__file__)
    specification = importlib.util.spec_from_file_location("alone", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    loaded = module.MusicVocoder.from_pretrained(tmp_path)
    with torch.no_grad():
        assert_near(loaded(mels()), vocoder(mels()))
    assert "from ." not in path.read_text()


def test_the_pipeline_plays_through_it(components, image, vocoder):
    components["vocoder"] = MusicVocoder(**TINY, model_in_dim=components["vocoder"].config.model_in_dim).eval()
    pipe = MelFusionPipeline(**components)
    settings = {"num_inference_steps": 2, "num_inversion_steps": 2, "audio_length_in_s": 0.64}
    audio = pipe(image, "calm piano", **settings, generator=torch.Generator().manual_seed(0)).audios
    assert audio.shape == (1, 10240) and abs(audio).max() > 0


@torch.no_grad()
def test_a_long_piece_sounds_the_same_whole_and_window_by_window(components, vocoder):
    pipe = MelFusionPipeline(**{**components, "vocoder": vocoder})
    pipe.set_progress_bar_config(disable=True)
    # Long enough that the noise begins again in the midst of it.
    mel = mels(frames=1800, batch=1)
    assert_near(pipe.mel_spectrogram_to_waveform(mel), vocoder(mel))


@pytest.mark.parametrize("shape", [(64,), (2, 40, 80), (1, 2, 40, 64), (2, 0, 64)])
def test_another_shape_is_refused(vocoder, shape):
    with pytest.raises(ValueError, match=r"`spectrogram` must be \[batch, frames, 64\]"):
        vocoder(torch.zeros(shape))


@pytest.mark.parametrize(("name", "value"), [("fft_length", 300), ("lowest_tone", 8000.0), ("lowest_tone", 0.0)])
def test_unusable_settings_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        MusicVocoder(**TINY, **{name: value})

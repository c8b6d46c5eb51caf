"""Reading and writing sound files, and the mel front end against librosa."""

import logging
import os
import sys
from pathlib import Path

import av
import librosa
import numpy as np
import pytest
import soundfile
import torch
from conftest import assert_near, rounding_error
from diffusers import AutoencoderKL
from full_disk import on_a_full_disk

from melfusion_pipeline.audio import (
    audio_duration,
    encode_mel,
    load_audio,
    log_mel_spectrogram,
    normalize_waveform,
    resample,
    save_audio,
    waveform_to_latents,
)
from melfusion_pipeline.waveforms_melfusion import mel_filters


def polyphonic_music(sampling_rate: int, seconds: float, seed: int = 0) -> np.ndarray:
    """Chords of decaying harmonic notes, a drum of filtered noise, and the noise floor of a recording."""
    rng = np.random.default_rng(seed)
    music = 1e-5 * rng.standard_normal(round(sampling_rate * seconds))
    for onset in range(0, len(music), sampling_rate * 2 // 5):
        age = np.arange(min(sampling_rate, len(music) - onset)) / sampling_rate
        pitches = rng.choice([110, 131, 165, 220, 262, 330, 440, 523], size=(3, 1, 1), replace=False)
        harmonics = np.arange(1, 9)[:, None]
        notes = (np.sin(2 * np.pi * pitches * harmonics * age) / harmonics**1.5).sum(axis=(0, 1)) * np.exp(-4 * age)
        music[onset:][: len(age)] += notes + 0.5 * np.exp(-40 * age) * rng.standard_normal(len(age))
    return 0.8 * music / np.abs(music).max()


def librosa_log_mel(waveform: np.ndarray) -> np.ndarray:
    spectrum = np.abs(
        librosa.stft(waveform, n_fft=1024, hop_length=160, window="hann", center=True, pad_mode="reflect")
    )
    filters = librosa.filters.mel(sr=16000, n_fft=1024, n_mels=64, fmin=0, fmax=8000, dtype=np.float64)
    return np.log(np.maximum(filters @ spectrum, 1e-5)).T[: len(waveform) // 160]


def strongest_frequency(waveform: torch.Tensor, sampling_rate: int) -> float:
    samples = waveform.double() * torch.hann_window(waveform.shape[-1], dtype=torch.float64)
    spectrum = torch.fft.rfft(samples, 16 * waveform.shape[-1]).abs()
    return spectrum.argmax().item() * sampling_rate / (16 * waveform.shape[-1])


def write_film(path: Path, waveform: np.ndarray | None, sampling_rate: int = 44100, codec: str = "aac") -> None:
    """Writes AAC or ALAC by the suffix of `path`, or, without a waveform, a film that has pictures only."""
    with av.open(str(path), "w", format="adts" if path.suffix.lower() == ".aac" else "mp4") as container:
        if waveform is None:
            stream = container.add_stream("mpeg4", rate=25, width=32, height=32, pix_fmt="yuv420p")
            frames = [av.VideoFrame(32, 32, "yuv420p")]
        else:
            layout = "stereo" if len(waveform) == 2 else "mono"
            stream = container.add_stream(codec, rate=sampling_rate, layout=layout)
            stream.bit_rate = 192000
            frames = []
            for start in range(0, waveform.shape[1], 1024):
                samples = np.ascontiguousarray(waveform[:, start : start + 1024], dtype=np.float32)
                kind = "fltp"
                if codec == "alac":
                    samples, kind = np.round(samples * 32768).astype(np.int16), "s16p"
                frames.append(av.AudioFrame.from_ndarray(samples, format=kind, layout=layout))
                frames[-1].sample_rate, frames[-1].pts = sampling_rate, start
        for frame in [*frames, None]:
            container.mux(stream.encode(frame))


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        latent_channels=8,
        scaling_factor=0.9,
    ).eval()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-4), (torch.float32, 2e-3)])
def test_log_mel_equals_librosa(dtype, tolerance):
    clips = [polyphonic_music(16000, 10.24, seed) for seed in range(2)]
    clips += [librosa.chirp(fmin=50, fmax=7000, sr=16000, length=163840) / 2, np.sin(0.17 * np.arange(163840)) / 2]
    waveform = torch.tensor(np.stack(clips), dtype=dtype)
    log_mel = log_mel_spectrogram(waveform)
    expected = np.stack([librosa_log_mel(clip) for clip in waveform.double().numpy()])
    assert log_mel.dtype == dtype and log_mel.shape == (4, 1024, 64)
    assert np.abs(log_mel.double().numpy() - expected).max() < tolerance


def test_mel_filters_equal_librosa():
    expected = librosa.filters.mel(sr=16000, n_fft=1024, n_mels=64, fmin=0, fmax=8000, dtype=np.float64)
    assert np.abs(mel_filters().numpy().T - expected).max() < 1e-6


@pytest.mark.parametrize("length", [513, 16000, 16001, 16159, 16160])
def test_number_of_frames_and_batching(length):
    waveform = torch.from_numpy(polyphonic_music(16000, 2.2)[: 2 * length].reshape(2, 1, length))
    log_mel = log_mel_spectrogram(waveform)
    assert log_mel.shape == (2, 1, length // 160, 64)
    assert_near(log_mel[1, 0], log_mel_spectrogram(waveform[1, 0]))


def test_log_mel_is_differentiable():
    waveform = torch.from_numpy(polyphonic_music(16000, 0.05)).requires_grad_()
    assert torch.autograd.gradcheck(log_mel_spectrogram, waveform, fast_mode=True)


def test_log_mel_on_a_device_without_float64_and_under_autocast(monkeypatch):
    monkeypatch.setattr("melfusion_pipeline.waveforms_melfusion.working_dtype", lambda device: torch.float32)
    waveform = torch.from_numpy(polyphonic_music(16000, 2.0)).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_mel = log_mel_spectrogram(waveform)
    assert np.abs(log_mel.double().numpy() - librosa_log_mel(waveform.double().numpy())).max() < 2e-3


def test_normalize_waveform_sets_mean_and_peak_and_keeps_silence():
    waveform = torch.tensor([[0.2, 0.3, 0.9, 0.2], [0.0, 0.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1], [0.0, 0.0, 1e-6, 0.0]])
    normalized = normalize_waveform(waveform)
    assert normalized.mean(dim=-1).abs().max() < rounding_error(normalized, 10)
    assert_near(normalized.abs().amax(dim=-1), torch.tensor([0.5, 0.0, 0.0, 0.5]))
    assert torch.equal(normalized[1:3], torch.zeros(2, 4))
    constant = torch.full((163840,), 0.3)
    assert torch.equal(normalize_waveform(constant), torch.zeros(163840))
    # A wave of three of the smallest numbers is a wave of nothing; in float64 there are many below these.
    wave = torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=torch.float64) * 4e-45
    assert torch.equal(normalize_waveform(wave.float()), torch.zeros(4))
    assert_near(normalize_waveform(wave), torch.tensor([0.5, -0.5, 0.25, -0.25], dtype=torch.float64))


@pytest.mark.parametrize("sampling_rate", [8000, 11025, 22050, 44100, 44101, 48000, 96000])
def test_resample_keeps_length_pitch_and_level(sampling_rate):
    time = torch.arange(2 * sampling_rate, dtype=torch.float64) / sampling_rate
    tone = resample(torch.sin(2 * torch.pi * 440 * time), sampling_rate)
    expected = torch.sin(2 * torch.pi * 440 * torch.arange(32000, dtype=torch.float64) / 16000)
    assert tone.shape == (32000,)
    assert (tone - expected)[2000:-2000].abs().max() < 1e-3


def test_resample_keeps_samples_when_doubling_the_rate_and_removes_what_would_alias():
    music = torch.from_numpy(polyphonic_music(8000, 1.0))
    assert torch.allclose(resample(music, 8000)[::2], music, rtol=0, atol=1e-5)
    time = torch.arange(44100, dtype=torch.float64) / 44100
    assert resample(torch.sin(2 * torch.pi * 10000 * time), 44100)[1600:-1600].abs().max() < 1e-5
    music = music[:300].requires_grad_()
    assert torch.autograd.gradcheck(lambda waveform: resample(waveform, 44100), music, fast_mode=True)


@pytest.mark.parametrize("num_samples", [1, 163841, 8_000_003])
def test_resample_takes_no_ffts_of_large_prime_factors(monkeypatch, num_samples):
    lengths = []
    monkeypatch.setattr(
        torch.fft, "rfft", lambda waveform, length: lengths.append(length) or torch.zeros(1, dtype=torch.cfloat)
    )
    monkeypatch.setattr(torch.fft, "irfft", lambda spectrum, length: lengths.append(length) or torch.zeros(1))
    for sampling_rate in (8000, 11025, 22050, 44100, 48000, 96000):
        resample(torch.zeros(1).expand(num_samples), sampling_rate)
    # Of lengths of such factors alone some power of their product is a multiple.
    assert len(lengths) == 12 and all((2 * 3 * 5 * 7) ** 64 % length == 0 for length in lengths)


@pytest.mark.parametrize("suffix, sampling_rate, channels", [("mp3", 44100, 2), ("flac", 8000, 1), ("ogg", 48000, 2)])
def test_files_of_any_rate_keep_length_and_pitch(tmp_path, suffix, sampling_rate, channels):
    time = np.arange(3 * sampling_rate) / sampling_rate
    tone = np.stack([0.6 * np.sin(2 * np.pi * 440 * time)] * channels, axis=1)
    soundfile.write(tmp_path / f"tone.{suffix}", tone, sampling_rate, format=suffix.upper())
    waveform, rate = load_audio(tmp_path / f"tone.{suffix}")
    assert rate == sampling_rate and waveform.shape == (channels, 3 * sampling_rate)
    mono = resample(waveform.mean(dim=0), rate)
    assert mono.shape == (48000,)
    assert abs(strongest_frequency(mono, 16000) - 440) < 0.1


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_load_audio_reads_only_the_wanted_frames(tmp_path, suffix):
    path = tmp_path / f"music.{suffix}"
    time = np.arange(6 * 44100) / 44100
    tones = np.stack([np.sin(2 * np.pi * (200 + 50 * time) * time), np.sin(2 * np.pi * 440 * time) / 2], axis=1)
    soundfile.write(path, 0.8 * tones, 44100)
    whole, _ = load_audio(path)
    for start in (0.0, 0.3, 3.3):
        part, rate = load_audio(path, start=start, duration=2.0)
        assert rate == 44100 and part.shape == (2, 88200)
        assert_near(part, whole[:, round(start * 44100) :][:, :88200])
    assert load_audio(path, start=5.5, duration=2.0)[0].shape == (2, 22050)
    with pytest.raises(ValueError, match="holds no samples at 7.0 s"):
        load_audio(path, start=7.0)


@pytest.mark.parametrize("name, priming", [("music.m4a", 0), ("FILM.MP4", 0), ("PHONE.MOV", 0), ("music.aac", 1024)])
def test_the_sound_of_films_is_read_from_any_moment(tmp_path, name, priming):
    time = np.arange(6 * 44100) / 44100
    tones = np.stack([np.sin(2 * np.pi * (200 + 50 * time) * time), np.sin(2 * np.pi * 440 * time) / 2]) * 0.8
    write_film(tmp_path / name, tones)
    whole, rate = load_audio(tmp_path / name)
    assert rate == 44100 and whole.dtype == torch.float32 and abs(whole.shape[1] - 6 * 44100 - priming) < 1024
    assert audio_duration(tmp_path / name) * 44100 == whole.shape[1]
    assert np.abs(whole[:, priming:][:, 1000:264000].numpy() - tones[:, 1000:264000]).max() < 0.01
    for start in (0.0, 0.3, 0.7, 3.3):
        part, _ = load_audio(tmp_path / name, start, 2.0)
        assert part.shape == (2, 88200)
        assert_near(part, whole[:, round(start * 44100) :][:, :88200], steps=10)
    assert torch.equal(load_audio(tmp_path / name, 5.5)[0], load_audio(tmp_path / name, 5.5, 9.0)[0])
    for start in (7.0, 1e300):
        with pytest.raises(ValueError, match=f"{name}' holds no samples at"):
            load_audio(tmp_path / name, start)


def test_lossless_m4a_keeps_every_sample(tmp_path):
    mono = polyphonic_music(16000, 1.0)[None]
    write_film(tmp_path / "music.m4a", mono, 16000, "alac")
    waveform, rate = load_audio(tmp_path / "music.m4a")
    assert rate == 16000 and waveform.shape == (1, 16000) and np.abs(waveform.numpy() - mono).max() < 1 / 32000


def test_films_that_cannot_be_heard_are_refused(tmp_path, monkeypatch):
    write_film(tmp_path / "silent.mp4", None)
    write_film(tmp_path / "good.m4a", polyphonic_music(44100, 1.0)[None])
    good = (tmp_path / "good.m4a").read_bytes()
    (tmp_path / "cut.m4a").write_bytes(good[: len(good) // 2])
    (tmp_path / "empty.aac").write_bytes(b"")
    # A playlist, from which FFmpeg would open other files and addresses.
    (tmp_path / "list.m4a").write_text(f"#EXTM3U\n#EXTINF:1,\n{tmp_path / 'good.m4a'}\n#EXT-X-ENDLIST\n")
    for name in ("silent.mp4", "cut.m4a", "empty.aac", "list.m4a", "missing.mp4"):
        for read in (load_audio, audio_duration):
            with pytest.raises(ValueError, match=rf"{name}' cannot be read as a sound file: "):
                read(tmp_path / name)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"good\.m4a.*pip install av"):
        load_audio(tmp_path / "good.m4a")


def test_load_audio_refuses_what_it_cannot_read(tmp_path):
    (tmp_path / "empty.wav").write_bytes(b"")
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan]), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "short.wav", np.zeros(0), 16000)
    for name, message in [
        ("empty", "cannot be read"),
        ("missing", "cannot be read"),
        ("nan", "NaN"),
        ("short", "no samples"),
    ]:
        with pytest.raises(ValueError, match=rf"{name}\.wav.*{message}"):
            load_audio(tmp_path / f"{name}.wav")
    for arguments in ({"start": -1.0}, {"start": float("nan")}, {"duration": 0.0}, {"duration": float("inf")}):
        with pytest.raises(ValueError, match=f"`{next(iter(arguments))}`"):
            load_audio(tmp_path / "nan.wav", **arguments)


@torch.no_grad()
def test_waveform_to_latents_equals_the_steps_written_out(vae):
    stereo = np.stack([polyphonic_music(16000, 1.5, seed) + 0.1 for seed in range(2)])
    mono = stereo.mean(axis=0) - stereo.mean()
    mono = np.pad(mono / np.abs(mono).max() * 0.5, (0, 40960 - 24000))
    mel = torch.from_numpy(librosa_log_mel(mono)).float()[None, None]
    expected = vae.encode(mel).latent_dist
    latents = waveform_to_latents(stereo, 16000, vae, audio_length_in_s=2.56)
    assert latents.shape == (1, 8, 64, 16) and latents.dtype == torch.float32
    assert_near(latents, expected.mode() * 0.9)
    arguments = {"audio_length_in_s": 2.56, "sample_mode": "sample"}
    sampled = waveform_to_latents(stereo, 16000, vae, generator=torch.Generator().manual_seed(3), **arguments)
    assert_near(sampled, expected.sample(torch.Generator().manual_seed(3)) * 0.9)
    assert not torch.allclose(sampled, latents, atol=1e-2)


@torch.no_grad()
def test_waveform_to_latents_takes_every_shape_rate_and_length(vae):
    music = torch.from_numpy(polyphonic_music(44100, 1.0)).float()
    single = waveform_to_latents(music, 44100, vae, audio_length_in_s=0.64)
    assert single.shape == (1, 8, 16, 16)
    for waveform in (music[None], music.expand(2, -1), music.expand(1, 2, -1)):
        assert_near(waveform_to_latents(waveform, 44100, vae, audio_length_in_s=0.64), single)
    batch = torch.stack([music, music.flip(0)])[:, None]
    latents = waveform_to_latents(batch, 44100, vae, audio_length_in_s=0.64)
    assert latents.shape == (2, 8, 16, 16)
    assert_near(latents[:1], single)
    assert waveform_to_latents(music, 44100, vae).shape == (1, 8, 25, 16)
    assert waveform_to_latents(music[:10000].half(), 44100, vae).shape == (1, 8, 6, 16)
    half_vae = AutoencoderKL.from_config(vae.config).to(torch.bfloat16)
    assert waveform_to_latents(music, 44100, half_vae).dtype == torch.bfloat16


def test_waveform_to_latents_is_differentiable(vae):
    waveform = torch.from_numpy(polyphonic_music(22050, 0.5)).float().requires_grad_()
    waveform_to_latents(waveform, 22050, vae).square().sum().backward()
    assert waveform.grad.isfinite().all() and waveform.grad.abs().max() > 0


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"waveform": [0.0, 1.0]}, TypeError, "`waveform` .*list"),
        ({"waveform": np.zeros(9, dtype=np.int16)}, TypeError, "`waveform` .*int16"),
        ({"waveform": torch.zeros(2, 0)}, ValueError, "`waveform` must hold samples"),
        ({"waveform": torch.tensor([0.0, float("nan")])}, ValueError, "`waveform` holds NaN"),
        ({"waveform": torch.zeros(1, 1, 1, 900)}, ValueError, "`waveform` must be"),
        ({"sampling_rate": 0}, ValueError, "`sampling_rate`"),
        ({"sampling_rate": 44100.5}, ValueError, "`sampling_rate`"),
        ({"audio_length_in_s": -1.0}, ValueError, "`audio_length_in_s`"),
        ({"audio_length_in_s": float("nan")}, ValueError, "`audio_length_in_s`"),
        ({"sample_mode": "mean"}, ValueError, "`sample_mode` .* 'mean'"),
    ],
)
def test_waveform_to_latents_refuses_bad_arguments(vae, changes, error, message):
    arguments = {"waveform": torch.zeros(16000), "sampling_rate": 16000, "vae": vae} | changes
    with pytest.raises(error, match=message):
        waveform_to_latents(**arguments)


def test_single_steps_refuse_bad_shapes(vae):
    with pytest.raises(ValueError, match="longer than 512"):
        log_mel_spectrogram(torch.zeros(512))
    with pytest.raises(ValueError, match=r"`mel` .* \[1, 1, 64, 64\]"):
        encode_mel(torch.zeros(1, 1, 64, 64), vae)


@pytest.mark.parametrize("name", ["music.wav", "music.FLAC"])
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_save_audio_round_trip(tmp_path, name, kind):
    stereo = np.stack([polyphonic_music(22050, 0.5, seed) for seed in range(2)])
    for waveform in (stereo, stereo[0], stereo.astype(np.float32)):
        save_audio(tmp_path / name, kind(waveform), 22050)
        written, rate = soundfile.read(tmp_path / name)
        assert rate == 22050 and np.abs(written.T - waveform).max() < 1 / 32000
    assert soundfile.info(tmp_path / name).format == name[-4:].strip(".").upper()
    assert os.listdir(tmp_path) == [name]


def test_save_audio_scales_loud_waveforms_with_a_warning(tmp_path, caplog):
    loud = 2.5 * polyphonic_music(16000, 0.5)
    with caplog.at_level(logging.WARNING):
        save_audio(tmp_path / "loud.wav", loud, 16000)
    written, _ = soundfile.read(tmp_path / "loud.wav")
    assert np.abs(written - loud / np.abs(loud).max()).max() < 1 / 32000
    assert "2.000" in caplog.text and "loud.wav" in caplog.text
    caplog.clear()
    save_audio(tmp_path / "quiet.wav", loud / 4, 16000)
    assert not caplog.text and np.abs(soundfile.read(tmp_path / "quiet.wav")[0] - loud / 4).max() < 1 / 32000


@pytest.mark.parametrize(
    "name, waveform, sampling_rate, error",
    [
        ("a.m4a", np.zeros(9), 16000, ValueError),
        ("a.mp3", np.zeros(9), 16001, ValueError),
        ("a.mp3", np.zeros((3, 9)), 16000, ValueError),
        ("a.ogg", np.zeros(9), 200001, ValueError),
        ("a", np.zeros(9), 16000, ValueError),
        ("missing/a.wav", np.zeros(9), 16000, ValueError),
        ("a.wav", np.array([0.0, np.nan]), 16000, ValueError),
        ("a.wav", np.array([0.0, np.inf]), 16000, ValueError),
        ("a.wav", np.zeros(0), 16000, ValueError),
        ("a.wav", np.zeros((900, 2)), 16000, ValueError),
        ("a.wav", np.zeros((1, 2, 9)), 16000, ValueError),
        ("a.flac", np.zeros((9, 900)), 16000, ValueError),
        ("a.wav", np.zeros(9), 0, ValueError),
        ("a.wav", np.zeros(9), 16000.5, ValueError),
        ("a.wav", np.zeros(9), True, ValueError),
        ("a.wav", np.zeros(9, dtype=np.int16), 16000, TypeError),
        ("a.wav", [0.0], 16000, TypeError),
    ],
)
def test_save_audio_refuses_and_keeps_the_existing_file(tmp_path, name, waveform, sampling_rate, error):
    for existing in ("a.wav", "a.flac"):
        (tmp_path / existing).write_bytes(b"kept")
    with pytest.raises(error, match="`waveform`|`path`|`sampling_rate`|make no FLAC"):
        save_audio(tmp_path / name, waveform, sampling_rate)
    assert sorted(os.listdir(tmp_path)) == ["a.flac", "a.wav"]
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "a.flac").read_bytes() == b"kept"


@pytest.mark.parametrize("suffix", ["mp3", "ogg"])
def test_save_audio_writes_compressed_files_at_their_level(tmp_path, suffix):
    stereo = np.stack([polyphonic_music(44100, 2.0, seed) for seed in range(2)])
    for waveform, rate in ((stereo, 44100), (polyphonic_music(16000, 2.0), 16000)):
        save_audio(tmp_path / f"music.{suffix}", waveform, rate)
        written, written_rate = load_audio(tmp_path / f"music.{suffix}")
        waveform = np.atleast_2d(waveform)
        assert written_rate == rate and written.shape == waveform.shape
        for channel, original in zip(written.numpy(), waveform):
            assert np.corrcoef(channel, original)[0, 1] > 0.95
            assert channel.std() == pytest.approx(original.std(), rel=0.05)
    assert soundfile.info(tmp_path / f"music.{suffix}").format == suffix.upper()
    assert os.listdir(tmp_path) == [f"music.{suffix}"]


@pytest.mark.parametrize("suffix", ["mp3", "ogg"])
def test_a_full_disk_keeps_the_compressed_file(tmp_path, suffix):
    path = tmp_path / f"music.{suffix}"
    save_audio(path, polyphonic_music(16000, 0.1), 16000)
    before = path.read_bytes()
    music = polyphonic_music(16000, 20.0)
    assert on_a_full_disk(lambda: save_audio(path, music, 16000), 8000).startswith("OSError")
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_long_ogg_files_are_written(tmp_path):
    """In one block of this length libsndfile dies of a segmentation fault."""
    save_audio(tmp_path / "long.ogg", np.zeros((2, 90 * 44100), dtype=np.float32), 44100)
    assert soundfile.info(tmp_path / "long.ogg").frames == 90 * 44100

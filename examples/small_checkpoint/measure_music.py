"""What a clip measurably does, from its waveform alone: onset rate, loudness, drums, register, mode, and noise."""

import librosa
import numpy as np

HOP = 512
LOWEST_NOTE = 24
# Weights of the scale's notes above the tonic: the tonic triad counts most, harmonic minor as in `music.SCALES`.
MAJOR = np.array([1.0, 0, 0.5, 0, 0.8, 0.6, 0, 0.9, 0, 0.4, 0, 0.5])
MINOR = np.array([1.0, 0, 0.5, 0.8, 0, 0.6, 0, 0.9, 0.4, 0, 0, 0.5])


def onset_rate(waveform: np.ndarray, sampling_rate: int) -> float:
    """Returns the onsets a second of a waveform `[T]`."""
    # The square root keeps one loud drum from hiding the soft notes beside it.
    flux = np.sqrt(librosa.onset.onset_strength(y=waveform, sr=sampling_rate, hop_length=256, n_mels=64))
    onsets = librosa.onset.onset_detect(onset_envelope=flux, sr=sampling_rate, hop_length=256, delta=0.1)
    return len(onsets) * sampling_rate / len(waveform)


def loudness(waveform: np.ndarray) -> float:
    """Returns the level of a waveform `[T]` in dB under its own peak (the model hears every clip at one peak)."""
    return float(20 * np.log10(np.sqrt(np.mean(waveform**2)) / max(np.abs(waveform).max(), 1e-8)))


def drum_presence(waveform: np.ndarray, sampling_rate: int) -> float:
    """Returns the mean square root of the spectral flux above 3 kHz of a waveform `[T]`: hi-hat and snare activity."""
    flux = librosa.onset.onset_strength(y=waveform, sr=sampling_rate, hop_length=256, n_mels=16, fmin=3000, fmax=8000)
    return float(np.sqrt(flux).mean())


def _harmonic_notes(waveform: np.ndarray, sampling_rate: int) -> np.ndarray:
    """Energy of each note `[84, frames]` from C1, percussion removed."""
    harmonic = librosa.effects.harmonic(waveform, margin=2.0)
    return np.abs(librosa.cqt(harmonic, sr=sampling_rate, hop_length=HOP, fmin=librosa.midi_to_hz(LOWEST_NOTE))) ** 2


def register(waveform: np.ndarray, sampling_rate: int) -> float:
    """Returns the median over frames of the energy's centre in MIDI notes, of a waveform `[T]`."""
    notes = _harmonic_notes(waveform, sampling_rate)
    loud = notes[:, notes.sum(axis=0) > 0.01 * notes.sum(axis=0).max()]
    return float(np.median((np.arange(len(notes))[:, None] * loud).sum(axis=0) / loud.sum(axis=0)) + LOWEST_NOTE)


def major_minor(waveform: np.ndarray, sampling_rate: int) -> float:
    """Returns the best major key's correlation minus the best minor key's (above 0: major), of a waveform `[T]`."""
    notes = _harmonic_notes(waveform, sampling_rate)
    chroma = notes[12:72].reshape(5, 12, -1).sum(axis=(0, 2))
    fit = {
        name: max(np.corrcoef(np.roll(profile, key), chroma)[0, 1] for key in range(12))
        for name, profile in (("major", MAJOR), ("minor", MINOR))
    }
    return float(fit["major"] - fit["minor"])


def spectral_flatness(waveform: np.ndarray) -> float:
    """Returns the median over frames of the power spectrum's geometric over its arithmetic mean; noise has 0.56."""
    return float(np.median(librosa.feature.spectral_flatness(y=waveform)))


def harmonic_to_noise(waveform: np.ndarray, sampling_rate: int) -> float:
    """Returns the median harmonics-to-noise ratio in dB of the frames above -40 dB (Boersma 1993, by FFT)."""
    length = round(0.064 * sampling_rate)
    frames = librosa.util.frame(waveform, frame_length=length, hop_length=length // 2).T
    levels = np.sqrt((frames**2).mean(axis=1))
    frames = frames[levels > 0.01 * max(levels.max(), 1e-8)]
    window = np.hanning(length)

    def autocorrelation(signal):
        power = np.abs(np.fft.rfft(signal, 2 * length)) ** 2
        return np.fft.irfft(power)[..., :length]

    # Dividing by the window's own autocorrelation makes a periodic sound's first peak 1.
    correlation = autocorrelation((frames - frames.mean(axis=1, keepdims=True)) * window)
    correlation = correlation / correlation[:, :1] / (autocorrelation(window) / autocorrelation(window)[0])
    peaks = correlation[:, sampling_rate // 1500 : sampling_rate // 60].max(axis=1).clip(1e-4, 1 - 1e-4)
    return float(np.median(10 * np.log10(peaks / (1 - peaks))))


def measure_music(waveform: np.ndarray, sampling_rate: int) -> dict[str, float]:
    """Measures a clip.

    Args:
        waveform: samples `[T]`.
        sampling_rate: in Hz.

    Returns:
        `onset_rate` (a second), `loudness` (dB under the peak), `drum_presence`, `register` (MIDI notes),
        `major_minor` (above 0: major), `spectral_flatness` and `harmonic_to_noise` (dB).
    """
    return {
        "onset_rate": onset_rate(waveform, sampling_rate),
        "loudness": loudness(waveform),
        "drum_presence": drum_presence(waveform, sampling_rate),
        "register": register(waveform, sampling_rate),
        "major_minor": major_minor(waveform, sampling_rate),
        "spectral_flatness": spectral_flatness(waveform),
        "harmonic_to_noise": harmonic_to_noise(waveform, sampling_rate),
    }

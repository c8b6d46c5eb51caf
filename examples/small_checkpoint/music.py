"""Composes and renders a short piece: the caption decides instrument and genre, the mood decides how it is played.

Arousal decides tempo, note density, drums and loudness; valence decides mode and register. Key, melody and chord
progression are random. Rendered with a General MIDI sound font (`pip install --no-deps tinysoundfont`).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.signal import resample_poly

SAMPLING_RATE = 16000
RENDERING_RATE = 48000
DURATION = 5.12

# General MIDI programs, chosen to be told apart by ear.
INSTRUMENTS = {
    "piano": 0,
    "harpsichord": 6,
    "marimba": 12,
    "organ": 19,
    "guitar": 24,
    "violin": 40,
    "trumpet": 56,
    "flute": 73,
}
SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 11)}
PROGRESSIONS = ((0, 3, 4, 0), (0, 4, 0, 3), (0, 3, 0, 4), (0, 0, 4, 0), (0, 4, 3, 0))
BLUES = ((0, 3, 0, 4), (0, 0, 3, 0))
KICK, SNARE, HAT, DRUM_CHANNEL = 36, 38, 42, 9


@dataclass(frozen=True)
class Genre:
    """How a genre is played: beats in a bar, when in the bar (in beats) bass, chords, kick and snare sound."""

    beats: int
    bass: tuple[float, ...]
    chords: tuple[float, ...]
    kick: tuple[float, ...]
    snare: tuple[float, ...]
    swing: float = 0.5


GENRES = {
    "waltz": Genre(3, (0,), (1, 2), (0,), (1, 2)),
    "march": Genre(2, (0, 1), (0.5, 1.5), (0, 1), (0.5, 1, 1.5)),
    "blues": Genre(4, (0, 1, 2, 3), (0, 2), (0, 2), (1, 3), swing=2 / 3),
    "bossa nova": Genre(4, (0, 1.5, 2, 3.5), (0, 1, 2.5), (0, 1.5, 2, 3.5), (0, 1.5, 3)),
}


@dataclass(frozen=True)
class Note:
    """One note: start and end in seconds, MIDI channel, key and velocity."""

    start: float
    end: float
    channel: int
    key: int
    velocity: int


def tempo_of(arousal: float) -> float:
    """Returns the tempo in beats a minute: 60 at arousal 0, 160 at arousal 1, geometric between."""
    return 60 * (160 / 60) ** arousal


def _bar_times(positions: tuple[float, ...], swing: float) -> list[float]:
    return [np.floor(position) + (swing if position % 1 else 0.0) for position in positions]


def _melody_rhythm(genre: Genre, arousal: float, generator: np.random.Generator) -> list[float]:
    """Draws when in a bar (in beats) the melody sounds: more beats, then more half beats, with rising arousal."""
    on_beat, off_beat = 0.15 + 0.85 * min(1.0, 1.6 * arousal), np.clip(1.6 * arousal - 0.6, 0, 1)
    beats = np.arange(0, genre.beats, 0.5)
    chances = np.where(beats % 1 == 0, on_beat, off_beat)
    chances[0] = 1.0
    return _bar_times(tuple(beats[generator.random(len(beats)) < chances]), genre.swing)


def _degree_key(degree: int, tonic: int, mode: str) -> int:
    octave, step = divmod(degree, 7)
    return tonic + 12 * octave + SCALES[mode][step]


def _nearest_octave(key: int, centre: float) -> int:
    return int(key + 12 * round((centre - key) / 12))


def _melody(bars, genre, arousal, centre, tonic, mode, velocity, generator) -> list[tuple[float, float, int, int]]:
    """Draws a melody `[(beat, beats long, key, velocity)]`: a walk over the scale that meets the chord on the bar."""
    rhythms = [_melody_rhythm(genre, arousal, generator) for _ in range(2)]
    onsets = [(bar, bar * genre.beats + time) for bar in range(len(bars)) for time in rhythms[bar % 2]]
    ends = [beat for _, beat in onsets[1:]] + [len(bars) * genre.beats]
    notes, offset = [], 0
    for (bar, beat), end in zip(onsets, ends, strict=True):
        on_bar = beat == bar * genre.beats
        offset = int(np.clip(offset + generator.integers(-2, 3), -3, 3))
        degree = bars[bar] + (2 * generator.integers(0, 3) if on_bar else offset)
        key = _nearest_octave(_degree_key(degree, tonic, mode), centre)
        notes.append((beat, 0.8 * (end - beat), key, velocity + (8 if on_bar else 0)))
    return notes


def _accompaniment(bars, genre, arousal, centre, tonic, mode, velocity) -> list[tuple[float, float, int, int]]:
    """Bass and chords `[(beat, beats long, key, velocity)]`; the calmest music holds one chord a bar."""
    notes = []
    for bar, root in enumerate(bars):
        start = bar * genre.beats
        keys = [_nearest_octave(_degree_key(root + third, tonic, mode), centre - 9) for third in (0, 2, 4)]
        bass = _nearest_octave(keys[0], centre - 18)
        if arousal < 1 / 3:
            notes += [(start, 0.95 * genre.beats, key, velocity - 15) for key in (bass, *keys)]
            continue
        notes += [(start + time, 0.7, bass, velocity - 5) for time in _bar_times(genre.bass, genre.swing)]
        notes += [(start + t, 0.5, key, velocity - 15) for t in _bar_times(genre.chords, genre.swing) for key in keys]
    return notes


def _drums(bars, genre, arousal) -> list[tuple[float, float, int, int]]:
    """Drum hits `[(beat, beats long, key, velocity)]`: none below arousal 0.3, then ever louder."""
    if arousal < 0.3:
        return []
    velocity = int(45 + 60 * (arousal - 0.3) / 0.7)
    hats = tuple(np.arange(0, genre.beats, 0.5))
    pattern = [(HAT, hats, velocity), (KICK, genre.kick, velocity), (SNARE, genre.snare, velocity)]
    return [
        (bar * genre.beats + time, 0.2, key, loudness)
        for bar in range(len(bars))
        for key, positions, loudness in pattern
        for time in _bar_times(positions, genre.swing)
    ]


def compose(genre: str, arousal: float, valence: float, generator: np.random.Generator) -> list[Note]:
    """Composes `DURATION` seconds of music.

    Args:
        genre: key of `GENRES`.
        arousal: 0 to 1, decides tempo, note density, drums and loudness.
        valence: 0 to 1, decides the mode (major above 0.5) and the register.
        generator: draws key, progression, rhythm and melody.

    Returns:
        The notes, in seconds.
    """
    style, beat = GENRES[genre], 60 / tempo_of(arousal)
    mode, centre = ("major" if valence > 0.5 else "minor"), 50 + 36 * valence
    progressions = BLUES if genre == "blues" else PROGRESSIONS
    progression = progressions[generator.integers(len(progressions))]
    bars = [progression[bar % 4] for bar in range(int(np.ceil(DURATION / beat / style.beats)))]
    tonic, velocity = int(generator.integers(0, 12)), int(65 + 40 * arousal)
    melody = _melody(bars, style, arousal, centre, tonic, mode, velocity, generator)
    voices = (melody + _accompaniment(bars, style, arousal, centre, tonic, mode, velocity), 0)
    drums = (_drums(bars, style, arousal), DRUM_CHANNEL)
    return [
        Note(time * beat, (time + length) * beat, channel, key, loudness)
        for notes, channel in (voices, drums)
        for time, length, key, loudness in notes
        if time * beat < DURATION
    ]


def render(notes: list[Note], instrument: str, sound_font: Path) -> np.ndarray:
    """Renders notes with a sound font.

    Args:
        notes: what to play (see `compose`).
        instrument: key of `INSTRUMENTS`, for every channel but the drums.
        sound_font: a General MIDI `.sf2` file.

    Returns:
        The waveform `[81920]` in float32 at 16 kHz, peak at most 1.

    Raises:
        ImportError: if tinysoundfont is not installed.
    """
    try:
        import tinysoundfont
    except ImportError as error:
        raise ImportError("Rendering needs tinysoundfont: pip install --no-deps tinysoundfont") from error
    synth = tinysoundfont.Synth(gain=-9, samplerate=RENDERING_RATE)
    font = synth.sfload(str(sound_font))
    synth.program_select(0, font, 0, INSTRUMENTS[instrument])
    synth.program_select(DRUM_CHANNEL, font, 128, 0, True)
    total = int(DURATION * RENDERING_RATE)
    events = [(int(note.end * RENDERING_RATE), 0, note) for note in notes]
    events += [(int(note.start * RENDERING_RATE), 1, note) for note in notes]
    pieces, now = [], 0
    for time, starts, note in sorted(events, key=lambda event: event[:2]):
        if min(time, total) > now:
            pieces.append(np.frombuffer(synth.generate(min(time, total) - now), dtype=np.float32).copy())
            now = min(time, total)
        synth.noteon(note.channel, note.key, note.velocity) if starts else synth.noteoff(note.channel, note.key)
    pieces.append(np.frombuffer(synth.generate(total - now), dtype=np.float32).copy())
    waveform = np.concatenate(pieces).reshape(-1, 2).mean(axis=1)
    waveform = resample_poly(waveform, SAMPLING_RATE, RENDERING_RATE).astype(np.float32)
    return waveform / max(1.0, np.abs(waveform).max())

"""The rule by which a picture decides the mood of its music: written down, measurable, and made by us, not natural.

- *Arousal* is the mean rank of the picture's contrast, saturation and edge density, ranked again.
- *Valence* is the mean rank of its brightness and warmth, ranked again.

Every rank is taken among the training pictures, so that arousal and valence are uniform on [0, 1] there and the bins
of `MOOD_SENTENCES` are balanced.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

PICTURE_SIZE = 64
QUANTILES = np.linspace(0.0, 1.0, 201)
LUMINANCE = np.array([0.2126, 0.7152, 0.0722])
AROUSAL = ("contrast", "saturation", "edge_density")
VALENCE = ("brightness", "warmth")

MOOD_SENTENCES = {
    (0, 0): ("slow dark music, sad and still", "gloomy sparse music in a low register", "a quiet sorrowful mood"),
    (0, 1): ("slow calm music", "a still and thoughtful mood", "quiet sparse music in a middle register"),
    (0, 2): ("slow gentle music, bright and peaceful", "a serene warm mood", "quiet sparse music in a high register"),
    (1, 0): (
        "steady dark music in a minor key",
        "a brooding mood",
        "moderate music in a low register",
    ),
    (1, 1): ("steady music at a moderate pace", "a balanced even mood", "moderate music in a middle register"),
    (1, 2): ("steady cheerful music in a major key", "a friendly warm mood", "moderate music in a high register"),
    (2, 0): ("fast dark music with drums, tense", "a stormy threatening mood", "busy loud music in a low register"),
    (2, 1): ("fast busy music with drums", "a restless excited mood", "busy loud music in a middle register"),
    (2, 2): ("fast happy music with drums", "a joyful festive mood", "busy loud music in a high register"),
}


def prepare_picture(picture: Image.Image, size: int = PICTURE_SIZE) -> Image.Image:
    """Returns the picture upright, RGB and cropped to its centre, `size` x `size` pixels."""
    return ImageOps.fit(ImageOps.exif_transpose(picture).convert("RGB"), (size, size), Image.Resampling.LANCZOS)


def measure_picture(picture: Image.Image) -> dict[str, float]:
    """Measures what the rule looks at, on the picture prepared at 64 x 64 pixels with values in [0, 1].

    Args:
        picture: any picture.

    Returns:
        `contrast` (standard deviation of luminance), `saturation` (mean of the largest minus the smallest channel),
        `edge_density` (mean luminance gradient a pixel), `brightness` (mean luminance), `warmth` (mean red - blue).
    """
    pixels = np.asarray(prepare_picture(picture), dtype=np.float64) / 255
    luminance = pixels @ LUMINANCE
    down, across = np.gradient(luminance)
    return {
        "contrast": float(luminance.std()),
        "saturation": float((pixels.max(axis=-1) - pixels.min(axis=-1)).mean()),
        "edge_density": float(np.hypot(down, across).mean()),
        "brightness": float(luminance.mean()),
        "warmth": float((pixels[..., 0] - pixels[..., 2]).mean()),
    }


class MoodRule:
    """Arousal and valence of a picture, each in [0, 1] by rank among the training pictures.

    Args:
        quantiles: for each measured quantity, and for `arousal` and `valence`, its 201 quantiles on the training
            pictures, ascending.
    """

    def __init__(self, quantiles: dict[str, list[float]]):
        self.quantiles = quantiles

    @classmethod
    def fit(cls, measured: list[dict[str, float]]) -> "MoodRule":
        """Returns the rule standardised on the training pictures' measurements (see `measure_picture`)."""
        quantiles = {name: np.quantile([row[name] for row in measured], QUANTILES) for name in AROUSAL + VALENCE}
        for mood, names in (("arousal", AROUSAL), ("valence", VALENCE)):
            means = [np.mean([np.interp(row[name], quantiles[name], QUANTILES) for name in names]) for row in measured]
            quantiles[mood] = np.quantile(means, QUANTILES)
        return cls({name: values.tolist() for name, values in quantiles.items()})

    @classmethod
    def load(cls, path: Path) -> "MoodRule":
        """Reads a rule that `save` wrote."""
        return cls(json.loads(Path(path).read_text()))

    def save(self, path: Path) -> None:
        """Writes the quantiles as JSON."""
        Path(path).write_text(json.dumps(self.quantiles))

    def _rank(self, name: str, value: float) -> float:
        return float(np.interp(value, self.quantiles[name], QUANTILES))

    def __call__(self, picture: Image.Image) -> tuple[float, float]:
        """Returns the picture's (arousal, valence)."""
        measured = measure_picture(picture)
        arousal = np.mean([self._rank(name, measured[name]) for name in AROUSAL])
        valence = np.mean([self._rank(name, measured[name]) for name in VALENCE])
        return self._rank("arousal", arousal), self._rank("valence", valence)


def mood_bin(arousal: float, valence: float) -> tuple[int, int]:
    """Returns the row and column (0, 1 or 2) of `MOOD_SENTENCES` that a mood falls into."""
    return min(int(arousal * 3), 2), min(int(valence * 3), 2)

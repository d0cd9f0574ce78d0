"""Beeps: an alphabet of tones and chords, each letter a short sound, and clips of a few letters.

The image tower hears them: a clip is drawn as a small spectrogram (mobilevlm/media/sound_image.py).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from mobilevlm.nano.scenes import TRAINING_SEEDS, Split

SAMPLE_RATE = 16_000
TONES = tuple(500.0 * step for step in range(1, 7))
"""Frequencies of the alphabet, in hertz."""
CHORDS = (*((tone,) for tone in TONES), *combinations(TONES, 2))
"""One tone or two for each letter."""
LETTERS = "abcdefghijklmnopqrstu"
LETTER_SECONDS = 0.16
"""Time from the beginning of a letter to that of the next."""
MOST_LETTERS = 6
SILENCE = "silence"
"""Answer about a clip without letters."""
QUESTION = "What do you hear?"


@dataclass(frozen=True)
class Clip:
    """Letters that sound one after the other, and what differs from clip to clip."""

    seed: int
    letters: str
    detune: float
    """Factor of all frequencies."""
    start: float
    """Seconds before the first letter."""
    length: float
    """Seconds that each letter sounds."""
    loudness: float
    noise: float

    @property
    def answer(self) -> str:
        """Letters with spaces between."""
        return " ".join(self.letters) or SILENCE


def sample_clip(seed: int, split: Split = "train") -> Clip:
    """Return the clip of a seed.

    Raises:
        ValueError: the seed belongs to the other split.
    """
    if (seed < TRAINING_SEEDS) != (split == "train"):
        raise ValueError(f"seed {seed} does not belong to the {split} split")
    rng = random.Random(seed)
    count = rng.choice((0, *range(1, 1 + MOST_LETTERS), *range(2, 1 + MOST_LETTERS)))
    return Clip(
        seed=seed,
        letters="".join(rng.choice(LETTERS) for _ in range(count)),
        detune=rng.uniform(0.985, 1.015),
        start=rng.uniform(0.0, 0.025),
        length=rng.uniform(0.1, 0.13),
        loudness=rng.uniform(0.05, 0.9),
        noise=rng.choice((0.0, 0.003, 0.01)),
    )


def sound(clip: Clip) -> NDArray[np.float32]:
    """Return the samples of a clip, from -1 to 1, at ``SAMPLE_RATE``."""
    total = round(MOST_LETTERS * LETTER_SECONDS * SAMPLE_RATE)
    rng = np.random.default_rng(clip.seed)
    samples = clip.noise * clip.loudness * rng.standard_normal(total, np.float32)
    count = round(clip.length * SAMPLE_RATE)
    time = np.arange(count, dtype=np.float32) / SAMPLE_RATE
    ends = np.minimum(1, np.minimum(time, time[::-1]) / 0.008)
    for index, letter in enumerate(clip.letters):
        first = round((clip.start + index * LETTER_SECONDS) * SAMPLE_RATE)
        chord = CHORDS[LETTERS.index(letter)]
        waves = [np.sin(2 * np.pi * tone * clip.detune * time + rng.random()) for tone in chord]
        tone = clip.loudness * ends * sum(waves) / len(chord)
        samples[first : first + count] += tone[: total - first]
    return samples.astype(np.float32)

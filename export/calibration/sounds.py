"""Sounds to calibrate and measure on where a model hears: made of seeds, the same ones every time.

Each has parts like speech: syllables of a voice whose pitch glides, some of them hissed, pauses of
quiet noise between.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mobilevlm.prompt import Sound

RATE = 16_000
PROMPTS = (
    "What can you hear?",
    "Describe the sound in a few words.",
    "Is somebody speaking? Answer yes or no.",
    "Write down what is said.",
)
_SECONDS = (2.0, 5.0)
_HARMONICS = 12


def made_sound(seed: int) -> Sound:
    """Return a sound of two to five seconds."""
    random = np.random.default_rng(seed)
    samples = np.empty(int(random.uniform(*_SECONDS) * RATE), np.float32)
    place = 0
    while place < len(samples):
        part = _syllable(random)
        part = part[: len(samples) - place]
        samples[place : place + len(part)] = part
        place += len(part)
    noise = random.normal(0, 0.003, len(samples))
    return Sound(((samples + noise).clip(-1, 1).astype(np.float32), RATE))


def _syllable(random: np.random.Generator) -> NDArray[np.float32]:
    """Return a syllable, hiss or pause of about a fifth of a second."""
    count = int(random.uniform(0.08, 0.3) * RATE)
    shape = np.sin(np.linspace(0, np.pi, count)) ** 2
    kind = random.uniform()
    if kind < 0.25:
        return np.zeros(count, np.float32)
    if kind < 0.4:
        hiss = np.diff(random.normal(0, 0.1, count + 1))
        return np.asarray(hiss * shape, np.float32)
    low, high = (float(end) for end in random.uniform(90, 260, 2))
    pitch = np.linspace(low, high, count)
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    centre, width = random.uniform(300, 2500), random.uniform(200, 900)
    voice = np.zeros(count)
    for harmonic in range(1, _HARMONICS + 1):
        loudness = np.exp(-(((harmonic * pitch - centre) / width) ** 2)) + 0.1 / harmonic
        voice += loudness * np.sin(harmonic * phase)
    return np.asarray(0.2 * voice * shape, np.float32)

"""Sound as a small image for a vision tower: a spectrogram in grey, low tones at the bottom."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mobilevlm.errors import AudioError
from mobilevlm.media.resampling import reach, resample, resampled_length
from mobilevlm.media.sound_file import open_sound
from mobilevlm.prompt import SoundInput

RATE = 16_000
"""Samples in a second that spectrograms are made of."""
_WINDOW = 512
_HOP = 320
_FIRST_BIN = 8
_BINS_PER_ROW = 2
_RANGE = 60.0
"""Decibels from black to white."""
_FAINT = 1e-2
"""Power of a row below which even the loudest stays dark."""


def read_sound_image(source: SoundInput, edge: int) -> Image.Image:
    """Return a sound of at most ``edge`` hops as an image, see :func:`sound_image`.

    Raises:
        AudioError: there is no such file, it is no sound, damaged, empty, or too long.
        MissingExtraError: its format needs a package that is not installed.
    """
    with open_sound(source) as sound:
        count, most = resampled_length(sound.count, sound.rate, RATE), edge * _HOP
        if count > most:
            raise AudioError(
                f"{sound.name}: a sound of {sound.seconds:.2f} s, this model hears "
                f"{most / RATE:.2f} s: cut it into clips"
            )
        needed = -(-count * sound.rate // RATE) + reach(sound.rate, RATE)
        samples = resample(sound.mono(needed), sound.rate, RATE)[:count]
    return Image.fromarray(sound_image(samples, edge))


def sound_image(samples: NDArray[np.float32], edge: int) -> NDArray[np.uint8]:
    """Return the image ``(edge, edge, 3)`` of mono sound with 16,000 samples a second.

    A column is a hop of 20 ms, a row 62.5 Hz from 250 Hz on, white the loudest, black 60 dB below;
    what is shorter than ``edge`` hops is followed by silence, what is longer is left out.
    """
    padded = np.zeros((edge - 1) * _HOP + _WINDOW, np.float32)
    kept = samples[: edge * _HOP]
    padded[: len(kept)] = kept[: len(padded)]
    frames = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::_HOP]
    window = np.hanning(_WINDOW + 1)[:-1]
    power = np.abs(np.fft.rfft(frames * window)) ** 2
    rows = power[:, _FIRST_BIN : _FIRST_BIN + _BINS_PER_ROW * edge]
    rows = rows.reshape(edge, edge, _BINS_PER_ROW).sum(-1)
    loudest = max(float(rows.max()), _FAINT)
    decibels = 10 * np.log10(np.maximum(rows, loudest * 1e-12) / loudest)
    levels = np.clip(255 * (1 + decibels / _RANGE), 0, 255).astype(np.uint8)
    return np.repeat(levels.T[::-1, :, None], 3, axis=2)

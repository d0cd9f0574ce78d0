"""Sound at another sampling rate: a windowed sinc, one set of weights for each phase (polyphase).

The filter is a sinc with its cutoff at 0.95 of the lower of both Nyquist frequencies, 32 zeros on
either side, under a Kaiser window of beta 12: what lies above is damped by more than 100 dB, what
lies below 0.9 of it is unchanged to 1e-5. Official processors leave this step to librosa, whose
filter (soxr) is another one of this quality: samples differ by about 1e-3 of the loudest.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

ZEROS, CUTOFF, BETA = 32, 0.95, 12.0
_ROWS = 4096
"""Samples of a phase that are made at a time."""


def resampled_length(count: int, rate: int, wanted: int) -> int:
    """Return how many samples at the rate ``wanted`` as many at ``rate`` become."""
    return -(-count * wanted // rate)


def reach(rate: int, wanted: int) -> int:
    """Return how many samples on either side one of the result is made of."""
    return math.ceil(ZEROS * max(1.0, rate / wanted) / CUTOFF)


def resample(samples: Float32, rate: int, wanted: int) -> Float32:
    """Return mono samples at ``rate`` a second at the rate ``wanted``. Before the first and behind
    the last there is silence."""
    if rate == wanted:
        return samples
    common = math.gcd(rate, wanted)
    up, down = wanted // common, rate // common
    half, count = reach(rate, wanted), resampled_length(len(samples), rate, wanted)
    padded = np.pad(samples, (half, half + down))
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    scale = CUTOFF * min(1.0, wanted / rate)  # zeros of the sinc are 1 / scale samples apart
    made = np.empty(count, np.float32)
    for phase in range(min(up, count)):
        first, rest = divmod(phase * down, up)
        distances = np.arange(-half, half + 1) - rest / up
        shares = np.clip(1 - (distances * scale / ZEROS) ** 2, 0, None)
        weights = scale * np.sinc(distances * scale) * np.i0(BETA * np.sqrt(shares)) / np.i0(BETA)
        part, kernel = made[phase::up], (weights / weights.sum()).astype(np.float32)
        for start in range(0, len(part), _ROWS):
            rows = len(part[start : start + _ROWS])
            places = windows[first + start * down :: down][:rows]
            part[start : start + rows] = places @ kernel
    return made

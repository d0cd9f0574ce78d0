"""Sound as the log-mel spectrograms that an audio encoder takes (Whisper, Radford et al. 2022,
section 2.2): one for each window, the last one filled up with silence."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mobilevlm.errors import AudioError
from mobilevlm.input_spec import InputSpec, Mel
from mobilevlm.prompt import Prepared, Run

Float32 = NDArray[np.float32]

MAX_WINDOWS = 60
"""Half an hour in windows of 30 seconds."""
_LINEAR_HZ, _LINEAR_STEP, _LOG_STEP = 1000.0, 200.0 / 3, np.log(6.4) / 27
"""Slaney's mel scale: linear up to the first, then logarithmic."""
_LEAST, _RANGE = 1e-10, 8.0
"""Smallest power, and decades below the loudest that are told apart."""


def prepare_sound(samples: Float32, mel: Mel, spec: InputSpec) -> Prepared:
    """Return mono samples from -1 to 1 at the sampling rate of ``mel`` as arrays ``mel`` ``(bins,
    frames)``, one for each window.

    Raises:
        AudioError: no samples, too many, of more than one channel, or not numbers.
    """
    length = mel.frames * mel.hop
    if samples.ndim != 1 or not len(samples) or not np.isfinite(samples).all():
        raise AudioError(
            f"sound of shape {samples.shape}: expected finite mono samples, one or more"
        )
    if len(samples) > MAX_WINDOWS * length:
        raise AudioError(
            f"sound of {len(samples) / mel.sampling_rate:.0f} s: this model takes up to "
            f"{MAX_WINDOWS * length / mel.sampling_rate:.0f} s: cut it first"
        )
    count = -(-len(samples) // length)
    padded = np.zeros(count * length, np.float32)
    padded[: len(samples)] = samples
    arrays = tuple({"mel": log_mel(part, mel)} for part in padded.reshape(count, length))
    run = Run(spec.connector.num_tokens)
    return Prepared("audio", arrays, (*[run] * count, *spec.layout.end_ids))


def log_mel(samples: Float32, mel: Mel) -> Float32:
    """Return the spectrogram ``(bins, frames)`` of one window of samples."""
    half = mel.window // 2
    padded = np.pad(samples.astype(np.float64), half, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, mel.window)[:: mel.hop]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(mel.window) / mel.window)
    power = np.abs(np.fft.rfft(frames[: mel.frames] * hann)) ** 2
    decades = np.log10(np.maximum(power @ mel_filters(mel).T, _LEAST))
    scaled = (np.maximum(decades, decades.max() - _RANGE) + 4) / 4
    return np.ascontiguousarray(scaled.T, np.float32)


def mel_filters(mel: Mel) -> NDArray[np.float64]:
    """Return triangles of equal area ``(bins, window // 2 + 1)`` up to half the sampling rate."""
    top = mel.sampling_rate / 2
    edges = _hertz(np.linspace(0, float(_mels(np.array(top))), mel.bins + 2))
    places = np.linspace(0, top, mel.window // 2 + 1)
    widths = np.diff(edges)
    slopes = edges[:, None] - places
    rising, falling = -slopes[:-2] / widths[:-1, None], slopes[2:] / widths[1:, None]
    triangles: NDArray[np.float64] = np.maximum(0, np.minimum(rising, falling))
    return triangles * (2 / (edges[2:] - edges[:-2]))[:, None]


def _mels(hertz: NDArray[np.float64]) -> NDArray[np.float64]:
    above = _LINEAR_HZ / _LINEAR_STEP + np.log(np.maximum(hertz, 1) / _LINEAR_HZ) / _LOG_STEP
    return np.where(hertz < _LINEAR_HZ, hertz / _LINEAR_STEP, above)


def _hertz(mels: NDArray[np.float64]) -> NDArray[np.float64]:
    first = _LINEAR_HZ / _LINEAR_STEP
    above = _LINEAR_HZ * np.exp(_LOG_STEP * (mels - first))
    return np.where(mels < first, mels * _LINEAR_STEP, above)

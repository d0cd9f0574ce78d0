"""Sound as the log-mel spectrograms that an audio encoder takes (Whisper, Radford et al. 2022,
section 2.2), and the rows that it takes in a prompt."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

from mobilevlm.audio_encoder import ConformerEncoder, WhisperEncoder
from mobilevlm.errors import AudioError, AudioWarning
from mobilevlm.image import RoomFor
from mobilevlm.input_spec import InputSpec, Mel
from mobilevlm.media.resampling import reach, resample, resampled_length
from mobilevlm.media.sound_file import SoundStream, open_sound
from mobilevlm.prompt import Arrays, Piece, Prepared, Run, SoundInput, count_positions, count_rows

Float32 = NDArray[np.float32]

_LINEAR_HZ, _LINEAR_STEP, _LOG_STEP = 1000.0, 200.0 / 3, np.log(6.4) / 27
"""Slaney's mel scale: linear up to the first, then logarithmic."""
_LEAST, _RANGE = 1e-10, 8.0
"""Smallest power, and decades below the loudest that are told apart."""
_FRAMES = 2048
"""Frames that are transformed at a time."""
_BESIDE = 40
"""Bytes that a sample takes while it is prepared: itself, its frames, and its share of them."""


def prepare_sound(
    source: SoundInput,
    spec: InputSpec,
    positions: int | None = None,
    room_for: RoomFor | None = None,
) -> Prepared:
    """Return a sound as a model takes it: arrays ``mel`` ``(bins, frames)`` of each run of the
    encoder; what is prepared already as it is. ``positions``: room in the prompt; ``room_for``:
    memory that this may take.

    Raises:
        AudioError: no sound, damaged, too short, too long, or prepared for another model.
        MissingExtraError: its format needs a package that is not installed.
    """
    mel = spec.mel
    if isinstance(source, Prepared):
        return _checked(source, spec)
    with open_sound(source) as sound:
        count = resampled_length(sound.count, sound.rate, mel.sampling_rate)
        if mel.windows == "first":
            count = _heard(count, sound, mel)
        pieces = sound_pieces(count, spec)
        if not count_rows(pieces):
            raise AudioError(
                f"{sound.name}: a sound of {sound.seconds:.3f} s is too short for this model"
            )
        if positions is not None:
            _check_fits(pieces, sound, spec, positions)
        needed = -(-count * sound.rate // mel.sampling_rate) + reach(sound.rate, mel.sampling_rate)
        _check_room(_BESIDE * max(count, needed), sound, room_for)
        samples = resample(sound.mono(needed), sound.rate, mel.sampling_rate)[:count]
    return Prepared("audio", _runs(samples, spec), pieces)


def _heard(count: int, sound: SoundStream, mel: Mel) -> int:
    """Return how many samples the one window of a model has room for; warn of what is left."""
    if count > mel.window_samples:
        seconds = mel.window_samples / mel.sampling_rate
        warnings.warn(
            f"{sound.name}: a sound of {sound.seconds:.1f} s, of which this model hears the first "
            f"{seconds:.0f} s: cut it into clips",
            AudioWarning,
            stacklevel=4,
        )
    return min(count, mel.window_samples)


def _check_fits(
    pieces: tuple[Piece, ...], sound: SoundStream, spec: InputSpec, positions: int
) -> None:
    taken = count_positions(pieces)
    if taken > positions:
        seconds = most_seconds(spec, positions)
        room = f"{seconds:.1f} s of it" if seconds else "none of it"
        raise AudioError(
            f"{sound.name}: a sound of {sound.seconds:.1f} s takes {taken} positions, and the "
            f"context has room for {max(positions, 0)} beside the rest of the prompt, {room}: cut "
            f"the sound into parts, or shorten it"
        )


def _check_room(needed: float, sound: SoundStream, room_for: RoomFor | None) -> None:
    if room_for is not None and needed > (room := room_for(needed)).size:
        raise AudioError(
            f"{sound.name}: a sound of {sound.seconds:.1f} s takes {needed / 1e6:.0f} MB of "
            f"memory, {room.where} leaves {max(room.size, 0) / 1e6:.0f} MB: cut it into parts"
        )


def most_seconds(spec: InputSpec, positions: int) -> float:
    """Return the length of the longest sound that takes no more positions, in seconds."""
    rate = spec.mel.sampling_rate
    low, high = 0, rate * 24 * 3600
    while low < high:
        middle = (low + high + 1) // 2
        if count_positions(sound_pieces(middle, spec)) <= positions:
            low = middle
        else:
            high = middle - 1
    return low / rate if count_rows(sound_pieces(low, spec)) else 0.0


def usual_samples(spec: InputSpec) -> int:
    """Return the samples of a window of the encoder, or of half a minute where it takes sounds of
    any length."""
    mel = spec.mel
    return 30 * mel.sampling_rate if mel.windows == "any" else mel.window_samples


def sound_pieces(count: int, spec: InputSpec) -> tuple[Piece, ...]:
    """Return the pieces of a sound of so many samples at the model's rate."""
    mel, encoder, layout = spec.mel, spec.encoder, spec.layout
    runs = -(-count // mel.window_samples) if mel.windows == "all" else 1
    if isinstance(encoder, WhisperEncoder):
        features = encoder.positions // encoder.pooling
        if encoder.cut:
            features = _seen(count, mel) // encoder.pooling
        rows = features // spec.connector.factor
    else:
        assert isinstance(encoder, ConformerEncoder)
        former = spec.connector.qformer
        assert former is not None
        frames = (count // mel.hop + 1) // mel.joined
        rows = -(-frames // former.window) * former.num_queries
    return (*layout.begin_ids, *[Run(rows)] * runs, *layout.end_ids)


def _seen(count: int, mel: Mel) -> int:
    """Return the positions of a cut encoder that a sound has behind the convolutions."""
    return (-(-count // mel.hop) + 1) // 2


def _runs(samples: Float32, spec: InputSpec) -> tuple[Arrays, ...]:
    mel, count = spec.mel, len(samples)
    if mel.windows == "any":
        whole = log_mel(samples, mel)
        frames = whole.shape[1] // mel.joined
        rows = whole[:, : frames * mel.joined].T.reshape(frames, -1)
        return ({"mel": np.ascontiguousarray(rows.T)},)
    length = -(-count // mel.window_samples) * mel.window_samples
    whole = log_mel(np.pad(samples, (0, length - count)), mel)
    if isinstance(spec.encoder, WhisperEncoder) and spec.encoder.cut:
        needed = 2 * _seen(count, mel) + 1
        whole = np.pad(whole[:, :needed], ((0, 0), (0, max(needed - whole.shape[1], 0))))
        return ({"mel": np.ascontiguousarray(whole)},)
    parts = np.split(whole, whole.shape[1] // mel.frames, axis=1)
    return tuple({"mel": np.ascontiguousarray(part)} for part in parts)


def _checked(sound: Prepared, spec: InputSpec) -> Prepared:
    """Return what is prepared; refuse what was prepared for another encoder."""
    mel, encoder = spec.mel, spec.encoder
    bins = mel.bins * mel.joined
    shapes = [arrays["mel"].shape for arrays in sound.arrays if "mel" in arrays]
    known = len(shapes) == len(sound.arrays) and all(shape[0] == bins for shape in shapes)
    if known and isinstance(encoder, WhisperEncoder):
        most = encoder.frames + encoder.cut
        known = all(shape[1] <= most if encoder.cut else shape[1] == most for shape in shapes)
    if not known or sound.kind != "audio":
        raise AudioError("a sound that was prepared for another model: prepare it with this one")
    return sound


def log_mel(samples: Float32, mel: Mel) -> Float32:
    """Return the spectrogram ``(bins, frames)`` of samples at the rate of ``mel``. The loudest of
    all frames sets the floor."""
    half = mel.fft // 2
    padded = np.pad(samples, half, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, mel.fft)[:: mel.hop]
    if mel.windows != "any":
        frames = frames[: len(samples) // mel.hop]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(mel.window) / mel.window)
    edge = (mel.fft - mel.window) // 2
    hann = np.pad(hann, (edge, mel.fft - mel.window - edge))
    filters, decades = mel_filters(mel).T, np.empty((len(frames), mel.bins), np.float32)
    for start in range(0, len(frames), _FRAMES):
        part = frames[start : start + _FRAMES].astype(np.float64)
        power = np.abs(np.fft.rfft(part * hann)) ** 2
        decades[start : start + _FRAMES] = np.log10(np.maximum(power @ filters, _LEAST))
    scaled = (np.maximum(decades, decades.max() - _RANGE) + 4) / 4
    return np.ascontiguousarray(scaled.T, np.float32)


def mel_filters(mel: Mel) -> NDArray[np.float64]:
    """Return triangles ``(bins, fft // 2 + 1)`` up to half the sampling rate, of equal area on
    Slaney's scale, of equal height on HTK's."""
    top = mel.sampling_rate / 2
    if mel.scale == "htk":
        highest = 2595 * float(np.log10(1 + top / 700))
        edges = 700 * (10 ** (np.linspace(0, highest, mel.bins + 2) / 2595) - 1)
    else:
        edges = _hertz(np.linspace(0, float(_mels(np.array(top))), mel.bins + 2))
    places = np.linspace(0, top, mel.fft // 2 + 1)
    widths = np.diff(edges)
    slopes = edges[:, None] - places
    rising, falling = -slopes[:-2] / widths[:-1, None], slopes[2:] / widths[1:, None]
    triangles: NDArray[np.float64] = np.maximum(0, np.minimum(rising, falling))
    if mel.scale == "htk":
        return triangles
    areas: NDArray[np.float64] = (edges[2:] - edges[:-2])[:, None] / 2
    return triangles / areas


def _mels(hertz: NDArray[np.float64]) -> NDArray[np.float64]:
    above = _LINEAR_HZ / _LINEAR_STEP + np.log(np.maximum(hertz, 1) / _LINEAR_HZ) / _LOG_STEP
    return np.where(hertz < _LINEAR_HZ, hertz / _LINEAR_STEP, above)


def _hertz(mels: NDArray[np.float64]) -> NDArray[np.float64]:
    first = _LINEAR_HZ / _LINEAR_STEP
    above = _LINEAR_HZ * np.exp(_LOG_STEP * (mels - first))
    return np.where(mels < first, mels * _LINEAR_STEP, above)

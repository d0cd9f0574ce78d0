"""Sound files as mono samples: WAV by itself, other formats by libsndfile ([audio] extra).

A header is enough to know how long a sound is, so that one which is too long is refused before
anything is decoded.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm.console.terminal import shown
from mobilevlm.errors import AudioError, require
from mobilevlm.media.image_source import open_source
from mobilevlm.prompt import SoundInput
from mobilevlm.regular_file import LFS_POINTER, LFS_REMEDY

Float32 = NDArray[np.float32]

RATES = (1_000, 768_000)
"""Samples in a second, at least and at most."""
MAX_CHANNELS = 64
_BLOCK = 1 << 18
"""Samples of each channel that are decoded at a time."""
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_WHOLE = {8: "u1", 16: "<i2", 24: "u1", 32: "<i4"}
"""Types of whole numbers by their bits; those of 24 are read as bytes."""
_FLOATS = {32: "<f4", 64: "<f8"}
_OTHER_RIFF = (b"AVI ", b"WEBP", b"RMID")
_STREAMED = (0, 0xFFFFFFFF)
"""Sizes in the header of a file whose writer did not know its length."""


@dataclass(frozen=True)
class SoundStream:
    """A sound file that is open."""

    name: str
    rate: int
    """Samples of each channel in a second."""
    count: int
    """Samples of each channel."""
    blocks: Callable[[], Iterator[NDArray[Any]]]
    """Decodes it: floats from -1 to 1 ``(samples, channels)``, block by block."""

    @property
    def seconds(self) -> float:
        return self.count / self.rate

    def mono(self, count: int) -> Float32:
        """Return the mean of all channels of the first ``count`` samples.

        Raises:
            AudioError: the file is damaged, or has what is no number.
        """
        found, left = np.empty(min(count, self.count), np.float32), 0
        for block in self.blocks():
            part = block[: len(found) - left].mean(axis=1, dtype=np.float64)
            found[left : left + len(part)] = part
            left += len(part)
            if left == len(found):
                break
        if left < len(found):
            raise _cut(self.name, f"{left} of {self.count} samples can be read")
        if not np.isfinite(found).all():
            raise AudioError(f"{self.name}: samples that are infinite or no numbers: mend the file")
        return found


@contextlib.contextmanager
def open_sound(source: SoundInput) -> Iterator[SoundStream]:
    """Open a sound and read its header.

    Raises:
        AudioError: there is no such file, it is no sound, empty, or damaged.
        MissingExtraError: soundfile is needed and not installed.
    """
    if isinstance(source, tuple):
        yield _given(source)
        return
    with open_source(source, "sound", AudioError) as (name, file):
        start = file.read(64)
        file.seek(0)
        if not start:
            raise AudioError(f"{name}: the file is empty")
        if start.startswith(LFS_POINTER):
            raise AudioError(f"{name}: {LFS_REMEDY}")
        stream = _wav(file, name) if _is_wav(start) else None
        if stream is not None:
            yield _checked(stream)
            return
        with _by_library(file, name) as opened:
            yield _checked(opened)


def _is_wav(start: bytes) -> bool:
    return start[:4] == b"RIFF" and start[8:12] == b"WAVE"


def _given(source: tuple[Any, ...]) -> SoundStream:
    """Return samples of an array as a stream."""
    samples = np.asarray(source[0])
    is_rate = len(source) == 2 and isinstance(source[1], (int, np.integer))
    if not is_rate or samples.ndim not in (1, 2) or samples.dtype.kind not in "fiu":
        raise AudioError(
            f"sound of shape {samples.shape} and type {samples.dtype}: expected samples (count,) "
            f"or (count, channels), and the sampling rate"
        )
    columns = samples if samples.ndim == 2 else samples[:, None]

    def blocks() -> Iterator[NDArray[Any]]:
        for start in range(0, len(columns), _BLOCK):
            yield _as_floats(columns[start : start + _BLOCK])

    return _checked(SoundStream("sound", int(source[1]), columns.size and len(columns), blocks))


def _as_floats(samples: NDArray[Any]) -> NDArray[Any]:
    """Return samples from -1 to 1; whole numbers fill the range of their type."""
    if samples.dtype.kind == "f":
        return samples
    info = np.iinfo(samples.dtype)
    half = (int(info.max) - int(info.min) + 1) // 2
    return (samples.astype(np.float64) - (int(info.min) + half)) / half


def _checked(stream: SoundStream) -> SoundStream:
    least, most = RATES
    if not least <= stream.rate <= most:
        raise AudioError(
            f"{stream.name}: {stream.rate} samples in a second, expected {least} to {most}"
        )
    if stream.count <= 0:
        raise AudioError(f"{stream.name}: a sound without samples")
    return stream


def _wav(file: IO[bytes], name: str) -> SoundStream | None:
    """Return a WAV file as a stream; none where its samples are in a format that only the library
    knows."""
    size = file.seek(0, 2)
    form: tuple[int, int, int, int] | None = None
    place = 12
    while place + 8 <= size:
        file.seek(place)
        kind, length = struct.unpack("<4sI", file.read(8))
        place += 8
        if kind == b"fmt ":
            form = _wav_form(file.read(min(length, 40)), name)
            if form is None:
                return None
        elif kind == b"data":
            if form is None:
                raise AudioError(f"{name}: damaged WAV: the format does not stand before the sound")
            return _wav_stream(file, name, form, (place, length, size))
        place += length + length % 2
    raise _cut(name, "its header ends before the sound begins")


def _wav_form(header: bytes, name: str) -> tuple[int, int, int, int] | None:
    """Return the kind of numbers, channels, rate and bits of a WAV file; none of others."""
    if len(header) < 16:
        raise AudioError(f"{name}: damaged WAV: a format of {len(header)} bytes")
    kind, channels, rate, _, align, bits = struct.unpack("<HHIIHH", header[:16])
    if kind == _EXTENSIBLE and len(header) >= 26:
        [kind] = struct.unpack("<H", header[24:26])
    known = _WHOLE if kind == _PCM else _FLOATS if kind == _FLOAT else {}
    if bits not in known:
        return None
    if not 0 < channels <= MAX_CHANNELS or align != channels * bits // 8:
        raise AudioError(f"{name}: damaged WAV: {channels} channels in {align} bytes")
    return kind, channels, rate, bits


def _wav_stream(
    file: IO[bytes], name: str, form: tuple[int, int, int, int], data: tuple[int, int, int]
) -> SoundStream:
    (kind, channels, rate, bits), (start, length, size) = form, data
    if length in _STREAMED and start + length != size:
        length = size - start
    if start + length > size:
        raise _cut(name, f"its header tells of {length} bytes of sound, {size - start} are there")
    step = channels * bits // 8

    def blocks() -> Iterator[NDArray[Any]]:
        file.seek(start)
        left = length // step
        while left:
            content = file.read(min(left, _BLOCK) * step)
            if not content:
                return
            part = _numbers(content[: len(content) // step * step], kind, bits)
            left -= len(part) // channels
            yield part.reshape(-1, channels)

    return SoundStream(name, rate, length // step, blocks)


def _numbers(content: bytes, kind: int, bits: int) -> NDArray[Any]:
    """Return samples as floats from -1 to 1."""
    if kind == _FLOAT:
        return np.frombuffer(content, _FLOATS[bits])
    values = np.frombuffer(content, _WHOLE[bits])
    if bits == 8:
        return (values.astype(np.float32) - 128) / 128
    if bits == 24:
        parts = values.reshape(-1, 3).astype(np.int32)
        values = (parts[:, 0] << 8 | parts[:, 1] << 16 | parts[:, 2] << 24) >> 8
    return values / np.float64(1 << (bits - 1))


@contextlib.contextmanager
def _by_library(file: IO[bytes], name: str) -> Iterator[SoundStream]:
    """Open a sound of any format that libsndfile knows."""
    file.seek(0)
    start = file.read(12)
    file.seek(0)
    if start[:4] == b"RIFF" and start[8:12] in _OTHER_RIFF:
        raise AudioError(f"{name}: not a sound: give a WAV, FLAC, Ogg or MP3 file")
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: the package without its library
        known = _known_start(start)
        if known is None:
            raise AudioError(f"{name}: not a WAV file, nor another sound that is known") from None
        raise require("soundfile", "audio", f"{name}: {known} sound") from None
    try:
        with soundfile.SoundFile(file) as opened:

            def blocks() -> Iterator[NDArray[Any]]:
                try:
                    yield from opened.blocks(_BLOCK, dtype="float32", always_2d=True)
                except soundfile.SoundFileError as error:
                    raise AudioError(f"{name}: damaged ({shown(error, 200)})") from None

            yield SoundStream(name, int(opened.samplerate), int(opened.frames), blocks)
    except soundfile.SoundFileError as error:
        why = getattr(error, "error_string", error)  # without the name of the open file
        raise AudioError(
            f"{name}: not a sound that can be read ({shown(why, 200)}): give a WAV, FLAC, Ogg or "
            f"MP3 file"
        ) from None


def _known_start(start: bytes) -> str | None:
    """Return the name of a format of sound by the beginning of a file."""
    names = {
        b"RIFF": "compressed WAV", b"RF64": "RF64", b"fLaC": "FLAC", b"OggS": "Ogg", b"ID3": "MP3",
        b"FORM": "AIFF", b"caff": "CAF",
    }  # fmt: skip
    for begin, name in names.items():
        if start.startswith(begin):
            return name
    return "MP3" if start[:1] == b"\xff" and len(start) > 1 and start[1] & 0xE0 == 0xE0 else None


def _cut(name: str, what: str) -> AudioError:
    return AudioError(f"{name}: a WAV file that is cut short ({what}): copy or record it again")

"""Sound files as mono samples, at the rate that a model takes."""

from __future__ import annotations

import io
import struct
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mobilevlm.errors import AudioError, MissingExtraError
from mobilevlm.media import sound_file
from mobilevlm.media.resampling import resample, resampled_length
from mobilevlm.media.sound_file import open_sound

RATE = 16_000
TONE = (0.5 * np.sin(np.arange(1600) * 0.2)).astype(np.float64)


def wav(
    samples: NDArray[Any], bits: int, kind: int = 1, channels: int = 1, extensible: bool = False
) -> bytes:
    """A WAV file of samples ``(count * channels,)`` as they are stored."""
    if bits == 24:
        body = samples.astype("<i4").tobytes()
        body = b"".join(body[place : place + 3] for place in range(0, len(body), 4))
    else:
        body = samples.tobytes()
    step = channels * bits // 8
    tag = 0xFFFE if extensible else kind
    form = struct.pack("<HHIIHH", tag, channels, RATE, RATE * step, step, bits)
    if extensible:
        form += struct.pack("<HHIH", 22, bits, 0, kind) + bytes(14)
    chunks = b"fmt " + struct.pack("<I", len(form)) + form
    chunks += b"LIST" + struct.pack("<I", 3) + b"abc\0"  # odd, so a byte fills it up
    chunks += b"data" + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def read(source: Any) -> NDArray[np.float32]:
    with open_sound(source) as sound:
        return sound.mono(sound.count)


@pytest.mark.parametrize("extensible", [False, True])
@pytest.mark.parametrize(
    ("stored", "bits", "kind", "step"),
    [
        ((TONE * 127 + 128).round().astype("u1"), 8, 1, 1 / 128),
        ((TONE * 32768).round().astype("<i2"), 16, 1, 1 / 32768),
        ((TONE * 2**23).round().astype("<i4"), 24, 1, 2**-23),
        ((TONE * 2**31).round().astype("<i4"), 32, 1, 2**-24),
        (TONE.astype("<f4"), 32, 3, 2**-24),
        (TONE.astype("<f8"), 64, 3, 2**-24),
    ],
)
def test_wav_of_every_width_gives_the_samples_that_were_written(
    stored: NDArray[Any], bits: int, kind: int, step: float, extensible: bool
) -> None:
    found = read(wav(stored, bits, kind, extensible=extensible))
    assert found.dtype == np.float32 and len(found) == len(TONE)
    assert np.abs(found - TONE).max() <= step


def test_16_bits_are_divided_by_32768_as_official_processors_do() -> None:
    found = read(wav(np.array([-32768, 1, 32767], "<i2"), 16))
    assert found.tolist() == [-1.0, 1 / 32768, 32767 / 32768]


def test_stereo_becomes_the_mean_of_its_channels() -> None:
    both = np.array([[100, 300], [-2, 0], [0, 32767]], "<i2").reshape(-1)
    assert read(wav(both, 16, channels=2)).tolist() == pytest.approx(
        [200 / 32768, -1 / 32768, 16383.5 / 32768]
    )


def test_a_sound_is_a_path_bytes_a_file_a_uri_or_samples(tmp_path: Path) -> None:
    import base64

    content = wav((TONE * 32768).round().astype("<i2"), 16)
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    uri = f"data:audio/wav;base64,{base64.b64encode(content).decode()}"
    expected = read(path)
    for source in (str(path), content, io.BytesIO(content), path.as_uri(), uri):
        assert np.array_equal(read(source), expected)
    assert np.array_equal(read((TONE.astype(np.float32), RATE)), TONE.astype(np.float32))
    assert read((np.array([[-32768, 0], [16384, 16384]], np.int16), RATE)).tolist() == [-0.5, 0.5]


def test_a_wav_whose_writer_did_not_know_its_length_goes_to_the_end_of_the_file() -> None:
    content = bytearray(wav(np.arange(10, dtype="<i2"), 16))
    for size in (0, 0xFFFFFFFF):
        content[-24:-20] = struct.pack("<I", size)
        assert len(read(bytes(content))) == 10


def header(**changes: int) -> bytes:
    """A WAV file with another number in its header."""
    content = bytearray(wav(np.zeros(8, "<i2"), 16))
    places = {"tag": (20, "<H"), "channels": (22, "<H"), "rate": (24, "<I"), "bits": (34, "<H")}
    for name, value in changes.items():
        place, form = places[name]
        struct.pack_into(form, content, place, value)
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "the file is empty"),
        (b"not a sound at all, but a text", "not a WAV file, nor another sound that is known"),
        (wav(np.zeros(0, "<i2"), 16), "without samples"),
        (wav(np.zeros(100, "<i2"), 16)[:-50], "cut short.*200 bytes of sound, 150 are there"),
        (wav(np.zeros(100, "<i2"), 16)[:40], "cut short.*header ends before the sound"),
        (header(rate=0), "0 samples in a second, expected 1000 to 768000"),
        (header(rate=4_000_000_000), "4000000000 samples in a second"),
        (header(channels=0), "0 channels in 2 bytes"),
        (header(channels=9), "9 channels in 2 bytes"),
        (wav(np.array([0, np.nan], "<f4"), 32, 3), "infinite or no numbers"),
        (wav(np.array([np.inf], "<f8"), 64, 3), "infinite or no numbers"),
        (b"RIFF\x10\0\0\0AVI LIST", "not a sound: give a WAV, FLAC, Ogg or MP3 file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
)
def test_what_is_no_sound_is_refused_in_one_line(
    content: bytes, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    with pytest.raises(AudioError, match=told) as caught:
        read(content)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("start", "kind"),
    [(b"fLaC", "FLAC"), (b"OggS", "Ogg"), (b"ID3\x04", "MP3"), (b"\xff\xfb\x90d", "MP3")],
)
def test_other_formats_name_the_extra_where_it_is_not_installed(
    start: bytes, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    with pytest.raises(MissingExtraError, match=rf"{kind} sound needs .*mobilevlm-edge\[audio\]"):
        read(start + bytes(100))
    with pytest.raises(MissingExtraError, match="compressed WAV"):
        read(header(tag=7))  # mu-law


@pytest.mark.parametrize(
    "source", [3, None, (TONE,), (TONE, "fast"), (TONE.reshape(2, 2, -1), RATE), (["a"], RATE)]
)
def test_what_is_neither_a_file_nor_samples_is_named(source: Any) -> None:
    with pytest.raises(AudioError, match="expected"):
        read(source)


def test_other_formats_are_read_by_the_library() -> None:
    soundfile = pytest.importorskip("soundfile")
    for form, subtype in (("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III")):
        content = io.BytesIO()
        soundfile.write(content, np.tile(TONE, 10), RATE, format=form, subtype=subtype)
        with open_sound(content.getvalue()) as sound:
            assert sound.rate == RATE and abs(sound.count - 16_000) <= 2400
            found = sound.mono(8000)
        assert len(found) == 8000 and 0.4 <= np.abs(found).max() <= 0.6
    with pytest.raises(AudioError, match=r"damaged|cannot|can be read"):
        read(b"fLaC" + bytes(1000))


def test_a_long_sound_is_decoded_in_blocks_as_far_as_it_is_heard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sound_file, "_BLOCK", 7)
    content = wav(np.arange(100, dtype="<i2"), 16)
    with open_sound(content) as sound:
        assert np.array_equal(sound.mono(20) * 32768, np.arange(20))


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 24_000, 44_100, 48_000])
def test_resampling_keeps_a_tone_and_takes_away_what_the_new_rate_cannot_hold(rate: int) -> None:
    places = np.arange(rate) / rate
    found = resample(np.sin(2 * np.pi * 1000 * places).astype(np.float32), rate, RATE)
    assert len(found) == resampled_length(rate, rate, RATE) == RATE
    expected = np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE)
    assert np.abs(found - expected)[500:-500].max() <= 2e-5
    if rate > 2 * 9000:
        high = np.sin(2 * np.pi * 9000 * places).astype(np.float32)
        assert np.abs(resample(high, rate, RATE))[500:-500].max() <= 1e-5


def test_the_standard_library_writes_what_is_read() -> None:
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setparams((2, 2, RATE, 0, "NONE", ""))
        file.writeframes(np.array([1, 3, -5, -7], "<i2").tobytes())
    assert (read(content.getvalue()) * 32768).tolist() == [2, -6]

"""Numbers of an input for sound in a manifest, against each other and the size of the files."""

from __future__ import annotations

from collections.abc import Iterator

from mobilevlm.audio_encoder import ConformerEncoder, SoundEncoder, WhisperEncoder
from mobilevlm.input_spec import InputSpec, Mel
from mobilevlm.linear_groups import tower_groups
from mobilevlm.media.sound_file import RATES
from mobilevlm.number_checks import (
    Check,
    check_heads,
    check_layers,
    check_positive,
    check_weights,
    check_whole,
    size_of,
)

MOST_FFT = 1 << 14
MOST_BINS = 1 << 10
MOST_FRAMES = 1 << 20
"""Frames of a window"""
MOST_BLOCK = 1 << 12
"""Frames that see each other in a Conformer"""


def check_sound(spec: InputSpec, total: int) -> Iterator[Check]:
    """Yield the checks of an input for sound. ``total``: bytes of the bundle's files."""
    mel, encoder = spec.preparation, spec.encoder
    yield "audio.preparation.kind", mel.kind, isinstance(mel, Mel), "mel"
    is_sound = isinstance(encoder, SoundEncoder)
    yield "audio.encoder.kind", encoder.kind, is_sound, "whisper or conformer"
    assert isinstance(mel, Mel) and isinstance(encoder, SoundEncoder)
    yield from _mel(mel)
    yield "audio.encoder.bins", encoder.bins, encoder.bins == mel.bins * mel.joined, "those of mel"
    names = "bins hidden_size intermediate_size num_hidden_layers num_attention_heads"
    yield from check_whole("audio", encoder, names)
    yield check_layers("audio.num_hidden_layers", encoder.num_hidden_layers)
    if isinstance(encoder, WhisperEncoder):
        yield from _whisper(spec, mel, encoder)
    else:
        yield from _conformer(spec, mel, encoder)
    yield check_weights("audio", size_of(tower_groups(encoder)), total)


def _mel(mel: Mel) -> Iterator[Check]:
    yield from check_whole("audio.mel", mel, "bins sampling_rate window hop frames fft joined")
    for name, most in (
        ("bins", MOST_BINS), ("fft", MOST_FFT), ("window", mel.fft), ("hop", mel.fft),
        ("frames", MOST_FRAMES), ("joined", MOST_BINS),
    ):  # fmt: skip
        value = getattr(mel, name)
        yield f"audio.mel.{name}", value, value <= most, f"at most {most}"
    rate, (least, most) = mel.sampling_rate, RATES
    yield "audio.mel.sampling_rate", rate, least <= rate <= most, f"{least} to {most}"


def _whisper(spec: InputSpec, mel: Mel, encoder: WhisperEncoder) -> Iterator[Check]:
    yield from check_whole("audio", encoder, "positions pooling")
    yield from check_positive("audio", encoder, "layer_norm_eps")
    yield check_heads("audio", encoder)
    frames, connector = encoder.frames, spec.connector
    yield "audio.mel.frames", mel.frames, mel.frames == frames, f"the encoder's {frames}"
    expected = "first" if encoder.cut else "all"
    yield "audio.mel.windows", mel.windows, mel.windows == expected, f"{expected} of this encoder"
    yield "projector.kind", connector.kind, connector.kind == "stack", "stack"
    features = encoder.positions // encoder.pooling
    is_right = features >= connector.factor and (encoder.cut or features % connector.factor == 0)
    expected = f"a divisor of {features} features"
    yield "projector.factor", connector.factor, is_right, expected
    is_right = not encoder.cut or connector.factor == 1
    yield "projector.factor", connector.factor, is_right, "1 behind an encoder that is cut"


def _conformer(spec: InputSpec, mel: Mel, encoder: ConformerEncoder) -> Iterator[Check]:
    sizes = "head_dim block distances conv_kernel conv_size guesses"
    yield from check_whole("audio", encoder, sizes)
    yield from check_positive("audio", encoder, "norm_eps")
    for name in ("block", "conv_kernel"):
        value = getattr(encoder, name)
        yield f"audio.{name}", value, value <= MOST_BLOCK, f"at most {MOST_BLOCK}"
    yield "audio.mel.windows", mel.windows, mel.windows == "any", "any of this encoder"
    former = spec.connector.qformer
    window = 0 if former is None else former.window
    yield "qformer.window", window, 0 < window <= MOST_BLOCK, f"1 to {MOST_BLOCK} of this encoder"

"""Tensors and vocabulary of GGUF files, before a library sees them.

llama.cpp and ggml end the process at shapes or types that do not fit, at tokens that are the same,
at numbers beyond their tables; and what they do not look for they pass over. So each tensor is one
that the spec asks for, and of its shape and of a type that the operation takes.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable

import numpy as np

from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import BundleError
from mobilevlm.gguf.architectures import gguf_architecture
from mobilevlm.gguf.encoder import Encoder
from mobilevlm.gguf.file import TENSOR_TYPES, GgufFile, GgufTensor
from mobilevlm.gguf.mmproj import mmproj_entries, mmproj_keys
from mobilevlm.gguf.names import Entry, decoder_entries
from mobilevlm.gguf.split import refuse_split
from mobilevlm.input_spec import InputSpec

MAX_LAYERS = 512
"""llama.cpp's LLAMA_MAX_LAYERS"""
MAX_VOCABULARY = 1 << 19
MAX_TOKEN = 512
"""Bytes of one token."""
KEY_VALUE_SHARE, KEY_VALUE_ALLOWANCE = 8, 256 << 20
"""Keys and values of the whole context take at most so many times the file's bytes, and so many
more: a small file cannot ask for gigabytes."""
ROTARY_FACTORS = "rope_freqs.weight"

_MATRIX_TYPES = frozenset(label for label, *_ in TENSOR_TYPES.values()) - {
    "I8", "I16", "I32", "I64", "F64",
}  # fmt: skip
_STORED_TYPES = {
    "matrix": _MATRIX_TYPES,
    "convolution": frozenset({"F32", "F16"}),
    "depthwise": frozenset({"F16"}),
    "float": frozenset({"F32"}),
}
_FLOATS = frozenset({"F32", "F16"})
_SINGLE = {"v.position_embd.weight": _FLOATS, "mm.input_projection.weight": _FLOATS}
"""Types of single tensors, beside those of how they are stored."""
_WIDE_MLP = ("mm.0.weight", "mm.0.bias", "mm.2.weight")
"""Tensors of a projector with one Linear layer: it is written as two, of double width between
them."""
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
_BYTE = 6
"""Type of the tokens that stand for bytes."""


def check_decoder_file(file: GgufFile, spec: DecoderSpec) -> None:
    """Refuse a file that has not exactly the tensors of a decoder, or keys and values that do not
    fit its size.

    Raises:
        BundleError: names the first tensor that is missing, too many, or of another shape or type.
    """
    architecture = gguf_architecture(spec)
    if file.architecture != architecture:
        raise other(
            file, f"general.architecture is {file.architecture!r:.60}, expected {architecture!r}"
        )
    _check_layers(file, "blk", spec.num_hidden_layers)
    _check_tensors(file, decoder_entries(spec), _neutral_rotary(file, spec))
    for key, expected in (
        ("attention.value_length", spec.head_dim),
        ("vocab_size", spec.vocab_size),
    ):
        value = file.metadata.get(f"{architecture}.{key}", expected)
        if value != expected:
            raise other(file, f"{architecture}.{key} is {value!r:.60}, expected {expected}")
    check_key_values(file, spec)


def check_key_values(file: GgufFile, spec: DecoderSpec) -> None:
    """Refuse a file whose whole context would take more memory than the file can ask for.

    Raises:
        BundleError: names both sizes.
    """
    needed = (
        4 * spec.attention_layers * spec.context_length * spec.num_key_value_heads * spec.head_dim
    )
    if needed > KEY_VALUE_SHARE * file.size + KEY_VALUE_ALLOWANCE:
        raise BundleError(
            f"{file.path}: keys and values of {spec.context_length} positions take "
            f"{needed / 1e6:.0f} MB, more than a model of {file.size / 1e6:.0f} MB has: the file "
            f"is damaged, convert the model again"
        )


def check_encoder_file(file: GgufFile, encoder: Encoder) -> None:
    """Refuse a file that has not exactly the tensors of an image encoder and its projector.

    Raises:
        BundleError: names the first tensor that is missing, too many, or of another shape or type.
    """
    refuse_split(file, "an image encoder")
    newline = next((name for name in file.tensors if name.endswith("image_newline")), "")
    if newline and not encoder.projector.newline:
        raise BundleError(
            f"{file.path}: tensor {newline[:80]!r}: images cut into tiles (LLaVA-1.6), which is "
            f"not supported"
        )
    _check_layers(file, "v.blk", encoder.blocks)
    _check_tensors(file, encoder.entries, frozenset(), _WIDE_MLP)
    _check_wide_mlp(file)


def check_exact_encoder_file(file: GgufFile, image: InputSpec) -> None:
    """Refuse a file that has not exactly the keys and tensors that our export writes for an image
    encoder and its projector.

    Raises:
        BundleError: names the first key or tensor that is missing, too many, or another one.
    """
    refuse_split(file, "an image encoder")
    keys = mmproj_keys(image)
    for key, expected in keys.items():
        found = file.metadata.get(key)
        if found != _stored_value(expected):
            raise other(file, f"{key} is {found!r:.60}, expected {expected!r:.60}")
    for key in file.metadata:
        if key.startswith("clip.") and key not in keys:
            raise BundleError(
                f"{file.path}: key {key[:80]!r} is not known to this version: its effect "
                f"would be missing: take the file without it, or update mobilevlm"
            )
    count = file.metadata["clip.vision.block_count"]
    _check_layers(file, "v.blk", count)
    _check_tensors(file, mmproj_entries(image), frozenset())


def _stored_value(value: object) -> object:
    """Return a value as a file holds it: numbers in float32."""
    if isinstance(value, list):
        return [_stored_value(entry) for entry in value]
    return float(np.float32(value)) if isinstance(value, float) else value


def check_vocabulary(file: GgufFile, vocab_size: int) -> None:
    """Refuse tokens that a library ends the process at: too few or many, the same twice, no text,
    bytes that are none; and ids beyond them.

    Raises:
        BundleError: names the first such token.
    """
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind not in ("llama", "gpt2"):
        raise BundleError(f"{file.path}: tokenizer {kind!r:.60}, expected 'llama' or 'gpt2'")
    tokens = _texts(file, "tokenizer.ggml.tokens")
    if len(tokens) != vocab_size or not 1 <= vocab_size <= MAX_VOCABULARY:
        raise _tokens(
            file,
            f"{len(tokens)} tokens, the model has embeddings for {vocab_size} (at most "
            f"{MAX_VOCABULARY} are read)",
        )
    if len(set(tokens)) < len(tokens):
        [(twice, _)] = Counter(tokens).most_common(1)
        raise _tokens(
            file,
            f"{len(tokens)} tokens ({len(set(tokens))} different): {twice[:60]!r} stands twice",
        )
    for index, token in enumerate(tokens):
        if not token or len(token) > MAX_TOKEN:
            raise _tokens(file, f"token {index} has {len(token)} characters")
    for name in ("scores", "token_type"):
        values = file.metadata.get(f"tokenizer.ggml.{name}")
        if values is None and kind == "gpt2":
            continue
        if not isinstance(values, list) or len(values) != len(tokens):
            count = len(values) if isinstance(values, list) else 0
            raise _tokens(file, f"{len(tokens)} tokens, {count} {name}")
        if not all(map(math.isfinite, values)):
            raise _tokens(file, f"{name} that are no numbers")
    types = file.metadata.get("tokenizer.ggml.token_type", [])
    for index, (token, its) in enumerate(zip(tokens, types, strict=False)):
        if its == _BYTE and not _BYTE_TOKEN.fullmatch(token):
            raise _tokens(file, f"token {index}, {token[:60]!r}, should be a byte")
    if kind == "gpt2":
        for index, merge in enumerate(_texts(file, "tokenizer.ggml.merges")):
            if " " not in merge[1:]:
                raise _tokens(file, f"merge {index} is {merge[:60]!r}, expected two pieces")
    for name in ("bos", "eos", "eot", "eom"):
        key = f"tokenizer.ggml.{name}_token_id"
        value = file.metadata.get(key, 0)
        if type(value) is not int or not 0 <= value < len(tokens):
            raise _tokens(file, f"{key} is {value!r:.60}, there are {len(tokens)} tokens")


def _texts(file: GgufFile, key: str) -> list[str]:
    values = file.metadata.get(key)
    if not isinstance(values, list) or not all(type(value) is str for value in values):
        raise BundleError(f"{file.path}: {key} is missing or not a list of str")
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        index = next(index for index, text in enumerate(values) if not is_utf8(text))
        raise _tokens(file, f"entry {index} of {key} is not UTF-8") from None
    return values


def is_utf8(text: str) -> bool:
    """Return whether a text of the file was UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _tokens(file: GgufFile, what: str) -> BundleError:
    return BundleError(f"{file.path}: damaged tokenizer: {what}: convert the model again")


def _check_layers(file: GgufFile, prefix: str, count: int) -> None:
    """Refuse a number of layers that is not that of the tensors: it may be any number."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d{1,9})\.")
    found = {int(match[1]) for name in file.tensors if (match := pattern.match(name))}
    most = max(found, default=-1) + 1
    if count != most or count > MAX_LAYERS:
        raise other(file, f"block_count is {count}, the file has tensors of {most} layers")


def _check_tensors(
    file: GgufFile,
    entries: Iterable[Entry],
    neutral: frozenset[str],
    any_shape: Collection[str] = (),
) -> None:
    left = set(file.tensors) - neutral
    for entry in entries:
        tensor = file.tensors.get(entry.theirs)
        if tensor is None:
            raise other(file, f"tensor {entry.theirs!r} is missing")
        left.discard(entry.theirs)
        if not (entry.theirs in any_shape or _has_shape(tensor, entry)):
            raise other(file, f"{entry.theirs} is {tensor.shape}, expected {entry.stored}")
        types = _SINGLE.get(entry.theirs, _STORED_TYPES[entry.store])
        if entry.store == "convolution" and len(entry.stored) == 2:  # a product with a matrix
            types = _MATRIX_TYPES
        if tensor.type not in types:
            raise other(file, f"{entry.theirs} is of type {tensor.type}")
    if left:
        more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        raise BundleError(
            f"{file.path}: tensor {min(left)[:80]!r}{more} is not read by this version: its "
            f"effect would be missing: take a file without it, or update mobilevlm"
        )


def _has_shape(tensor: GgufTensor, entry: Entry) -> bool:
    """Return whether ggml sees the shape that is asked for: it fills up with ones from outside."""
    expected = {_inner(entry.stored)}
    if entry.store == "depthwise":
        expected.add(_inner(entry.shape))
    return _inner(tensor.shape) in expected


def _inner(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _check_wide_mlp(file: GgufFile) -> None:
    """Refuse a projector whose two layers do not fit each other."""
    if not all(name in file.tensors for name in (*_WIDE_MLP, "mm.2.bias")):
        return
    first, bias, second = (file.tensors[name].shape for name in _WIDE_MLP)
    size = _inner(file.tensors["mm.2.bias"].shape)[-1]
    hidden = file.metadata.get("clip.vision.embedding_length")
    inner = _inner(first)[0]
    fits = _inner(first) == (inner, hidden) and _inner(bias) == (inner,)
    if not fits or _inner(second) != (size, inner) or inner not in (size, 2 * size):
        raise other(
            file, f"the projector's layers are {first} and {second}, bias {bias}: they do not fit"
        )


def _neutral_rotary(file: GgufFile, spec: DecoderSpec) -> frozenset[str]:
    """Return the name of rotary factors that are all one.

    Raises:
        BundleError: they are others: only llama.cpp itself would heed them.
    """
    tensor = file.tensors.get(ROTARY_FACTORS)
    if tensor is None or file.architecture != "llama":
        return frozenset()
    shape = (spec.rotary_channels // 2,)
    if tensor.type != "F32" or _inner(tensor.shape) != shape:
        raise other(file, f"{ROTARY_FACTORS} is {tensor.shape} of {tensor.type}, expected {shape}")
    if (np.fromfile(tensor.path, "<f4", shape[0], offset=tensor.offset) != 1).any():
        raise BundleError(
            f"{file.path}: tensor {ROTARY_FACTORS!r}: rotary scaling other than linear (as in "
            f"Llama 3.1), which is not supported"
        )
    return frozenset({ROTARY_FACTORS})


def other(file: GgufFile, what: str) -> BundleError:
    """Return the error for a file that is not what it should be."""
    return BundleError(f"{file.path}: damaged or of another model: {what}: copy or export it again")

"""The tokenizer inside a GGUF file, for the tokenizers library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from mobilevlm.errors import BundleError
from mobilevlm.gguf.file import GgufFile
from mobilevlm.tokenizers.json_file import open_tokenizer_json
from mobilevlm.tokenizers.tokenizer import begin_with, build_tokenizer

_WHOLE = "tokenizer.huggingface.json"
_BYTE = 6
"""Type of the pieces that stand for bytes."""


# What build_tokenizer reads of a sentencepiece ModelProto, under the same names. GGUF numbers the
# types of pieces as sentencepiece does.


@dataclass(frozen=True)
class _Piece:
    piece: str
    score: float
    type: int


@dataclass(frozen=True)
class _Normalizer:
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool = False
    precompiled_charsmap: bytes = b""


@dataclass(frozen=True)
class _Trainer:
    byte_fallback: bool


@dataclass(frozen=True)
class _Model:
    pieces: list[_Piece]
    normalizer_spec: _Normalizer
    trainer_spec: _Trainer


def gguf_tokenizer(file: GgufFile) -> Tokenizer:
    """The tokenizer.json in it, else what pieces, scores and types make.

    Raises:
        BundleError: it is of another kind, or incomplete.
    """
    if _WHOLE in file.metadata:
        return open_tokenizer_json(str(file.metadata[_WHOLE]), str(file.path), BundleError)
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind != "llama":
        raise BundleError(f"{file.path}: tokenizer {kind!r:.60}, expected 'llama' (sentencepiece)")
    texts, scores, types = (
        _list(file, f"tokenizer.ggml.{name}", item)
        for name, item in (("tokens", str), ("scores", float), ("token_type", int))
    )
    if not len(texts) == len(scores) == len(types) > 0 or len(set(texts)) < len(texts):
        raise BundleError(
            f"{file.path}: damaged tokenizer: {len(texts)} tokens ({len(set(texts))} different), "
            f"{len(scores)} scores, {len(types)} types"
        )
    pieces = [_Piece(*row) for row in zip(texts, scores, types, strict=True)]
    space = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", True))
    tokenizer = build_tokenizer(
        _Model(pieces, _Normalizer(space), _Trainer(_BYTE in types)), legacy=True
    )
    bos = file.metadata.get("tokenizer.ggml.bos_token_id", 1)
    if file.metadata.get("tokenizer.ggml.add_bos_token", True) and bos in range(len(texts)):
        begin_with(tokenizer, texts[bos])
    return tokenizer


def _list(file: GgufFile, key: str, item: type) -> list[Any]:
    value = file.metadata.get(key)
    if not isinstance(value, list) or not all(type(entry) is item for entry in value):
        raise BundleError(f"{file.path}: {key} is missing or not a list of {item.__name__}")
    return value

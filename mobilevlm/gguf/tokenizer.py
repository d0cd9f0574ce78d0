"""The tokenizer inside a GGUF file, for the tokenizers library."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from mobilevlm.errors import BundleError
from mobilevlm.gguf.file import GgufFile
from mobilevlm.tokenizers.json_file import open_tokenizer_json
from mobilevlm.tokenizers.tokenizer import begin_with, build_tokenizer

_WHOLE = "tokenizer.huggingface.json"
_CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 3, 4, 5, 6
"""Types of tokens; ``_BYTE``: pieces that stand for bytes."""


@dataclass(frozen=True)
class WordSplit:
    """How text is split into words before byte-level BPE, as a ``tokenizer.json`` says it."""

    steps: tuple[dict[str, Any], ...]
    ignore_merges: bool = False
    """A word that is a token becomes that token, whatever the merges say."""
    composed: bool = False
    """Text is brought to NFC first. llama.cpp leaves that out."""


def _pattern(regex: str, **options: bool) -> WordSplit:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    return WordSplit((split, byte_level), **options)


_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS_WITH_MARKS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT_2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
WORD_SPLITS = {
    "qwen2": _pattern(_WORDS % "", composed=True),
    "qwen35": _pattern(_WORDS_WITH_MARKS, composed=True),
    "llama-bpe": _pattern(_WORDS % "{1,3}", ignore_merges=True),
    "dbrx": _pattern(_WORDS % "{1,3}"),
    "gpt-2": WordSplit((_GPT_2,)),
    "smollm": WordSplit((_DIGITS, _GPT_2)),
}
"""By ``tokenizer.ggml.pre``, llama.cpp's names of them (src/llama-vocab.cpp)."""
_SAME = {
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "smaug-bpe": "dbrx",
    "phi-2": "gpt-2", "olmo": "gpt-2", "mpt": "gpt-2", "jais": "gpt-2", "trillion": "gpt-2",
    "granite-docling": "gpt-2", "deepseek-r1-qwen": "qwen2", "megrez": "qwen2", "hunyuan": "qwen2",
    "stablelm2": "qwen2", "starcoder": "smollm", "refact": "smollm", "command-r": "smollm",
    "codeshell": "smollm", "exaone": "smollm", "minerva-7b": "smollm",
}  # fmt: skip
"""Other names that llama.cpp has for the same."""
_BEGINS = "llama-bpe"
"""Texts begin with a token unless the file says otherwise."""


def word_split_name(state: dict[str, Any]) -> str | None:
    """Return llama.cpp's name of how a ``tokenizer.json`` splits text, if it has one.

    A normalizer to NFC, which llama.cpp leaves out, is passed over.
    """
    normalizer = state.get("normalizer")
    if normalizer is not None and normalizer != {"type": "NFC"}:
        return None
    found = state.get("pre_tokenizer") or {}
    steps = found["pretokenizers"] if found.get("type") == "Sequence" else [found]
    plain = tuple(
        {key: value for key, value in step.items() if key != "trim_offsets"} for step in steps
    )
    ignore = bool(state["model"].get("ignore_merges"))
    for name, split in WORD_SPLITS.items():
        if (split.steps, split.ignore_merges) == (plain, ignore):
            return name
    return None


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
    """Return the tokenizer.json in it, else what tokens and scores or merges make.

    Raises:
        BundleError: it is of another kind, or incomplete.
    """
    if _WHOLE in file.metadata:
        return open_tokenizer_json(str(file.metadata[_WHOLE]), str(file.path), BundleError)
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        return _byte_level(file)
    if kind != "llama":
        raise BundleError(f"{file.path}: tokenizer {kind!r:.60}, expected 'llama' or 'gpt2'")
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
    if begins_texts(file) and bos in range(len(texts)):
        begin_with(tokenizer, texts[bos])
    return tokenizer


def begins_texts(file: GgufFile) -> bool:
    """Return whether texts begin with a token; files that do not say so leave it to the kind of
    their tokenizer."""
    name = str(file.metadata.get("tokenizer.ggml.pre"))
    is_pieces = file.metadata.get("tokenizer.ggml.model") != "gpt2"
    default = is_pieces or _SAME.get(name, name) == _BEGINS
    return bool(file.metadata.get("tokenizer.ggml.add_bos_token", default))


def _byte_level(file: GgufFile) -> Tokenizer:
    """Return the tokenizer that tokens, their types and merges make."""
    name = file.metadata.get("tokenizer.ggml.pre")
    split = WORD_SPLITS.get(_SAME.get(str(name), str(name)))
    if split is None:
        raise BundleError(
            f"{file.path}: tokenizer.ggml.pre is {name!r:.60}: how it splits text into words is "
            f"not known to this version: expected {', '.join(WORD_SPLITS)}"
        )
    texts = _list(file, "tokenizer.ggml.tokens", str)
    types = _list(file, "tokenizer.ggml.token_type", int)
    merges = _list(file, "tokenizer.ggml.merges", str)
    parts = [merge.partition(" ") for merge in merges]
    usable = {
        text: i for i, (text, kind) in enumerate(zip(texts, types, strict=True)) if kind != _UNUSED
    }
    state = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": index,
                "content": text,
                "special": types[index] == _CONTROL,
                "normalized": False,
                **dict.fromkeys(("single_word", "lstrip", "rstrip"), False),
            }
            for text, index in usable.items()
            if types[index] in (_CONTROL, _USER_DEFINED)
        ],
        "normalizer": {"type": "NFC"} if split.composed else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {**step, "trim_offsets": False} if step["type"] == "ByteLevel" else step
                for step in split.steps
            ],
        },
        "decoder": {**_GPT_2, "trim_offsets": False},
        "model": {
            "type": "BPE",
            "vocab": usable,
            "merges": [[left, right] for left, _, right in parts],
            "ignore_merges": split.ignore_merges,
        },
    }
    tokenizer = open_tokenizer_json(json.dumps(state), str(file.path), BundleError)
    bos: Any = file.metadata.get("tokenizer.ggml.bos_token_id")
    if begins_texts(file) and bos in range(len(texts)):
        begin_with(tokenizer, texts[bos])
    return tokenizer


def _list(file: GgufFile, key: str, item: type) -> list[Any]:
    value = file.metadata.get(key)
    if not isinstance(value, list) or not all(type(entry) is item for entry in value):
        raise BundleError(f"{file.path}: {key} is missing or not a list of {item.__name__}")
    return value

"""The tokenizer inside a GGUF file: sentencepiece's pieces with scores and types, or tokens and
merges of byte-level BPE."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf

from mobilevlm.checkpoint import read_json
from mobilevlm.errors import CheckpointError, FileWarning
from mobilevlm.gguf.architectures import needs_own_engine
from mobilevlm.gguf.tokenizer import WORD_SPLITS, word_split_name
from mobilevlm.model import Model
from mobilevlm.tokenizers.tokenizer import (
    added_tokens,
    parse_sentencepiece,
    token_text,
    tokenizer_settings,
)

_ADDED_SCORE = -1000.0
"""Score of tokens that are matched as they stand, as llama.cpp's converter sets it."""


@dataclass(frozen=True)
class Vocabulary:
    """Vocabulary for llama.cpp's tokenizer of type ``llama``."""

    tokens: list[str]
    scores: list[float]
    types: list[int]
    special: dict[str, int]
    """Ids of ``bos``, ``eos``, ``unk`` and ``pad``, as far as there are any."""
    add_bos: bool
    add_space_prefix: bool


def vocabulary_of(model: Model) -> Callable[[gguf.GGUFWriter], None]:
    """Return what adds a checkpoint's tokenizer to the metadata.

    Raises:
        CheckpointError: there is no tokenizer.model (tokenizer.json has no scores), or llama.cpp
            has no name for how text is split into words.
    """
    state, size = json.loads(model.tokenizer.to_str()), model.spec.decoder.vocab_size
    ends = model.spec.conversation.eos_token_ids
    if (state.get("decoder") or {}).get("type") == "ByteLevel":
        split = "default" if needs_own_engine(model.spec.decoder) else word_split_name(state)
        if split is None:
            raise CheckpointError(
                f"{model.folder}: the tokenizer splits text into words in a way that has no name "
                f"in GGUF, none of {', '.join(WORD_SPLITS)}: use --format onnx"
            )
        return partial(_describe_byte_level, model=model, state=state, split=split)
    folder = model.tokenizer_folder or model.folder
    return partial(_describe_pieces, vocabulary=read_vocabulary(folder, size), ends=ends)


def _describe_byte_level(
    writer: gguf.GGUFWriter, model: Model, state: dict[str, Any], split: str
) -> None:
    """Add tokens and merges as llama.cpp has them, and tokenizer.json itself, which alone says all.
    ``split``: name of how text is split into words."""
    vocabulary = {index: text for text, index in model.tokenizer.get_vocab().items()}
    special = {token["id"]: bool(token["special"]) for token in state["added_tokens"]}
    tokens, types = [], []
    for index in range(model.spec.decoder.vocab_size):
        kind = gguf.TokenType.NORMAL if index in vocabulary else gguf.TokenType.UNUSED
        if index in special:
            kind = gguf.TokenType.CONTROL if special[index] else gguf.TokenType.USER_DEFINED
        tokens.append(vocabulary.get(index, f"[PAD{index}]"))
        types.append(kind)
    merges = state["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    eos, *others = model.spec.conversation.eos_token_ids
    writer.add_eos_token_id(eos)
    _describe_ends(writer, others)
    begin = model.tokenizer.encode("").ids
    if begin:
        writer.add_bos_token_id(begin[0])
    writer.add_add_bos_token(bool(begin))
    writer.add_string(gguf.Keys.Tokenizer.HF_JSON, model.tokenizer.to_str())


def read_vocabulary(folder: Path, vocab_size: int) -> Vocabulary:
    """The tokens of a checkpoint folder, as many as the model has embeddings.

    Raises:
        CheckpointError: there is no tokenizer.model (tokenizer.json has no scores).
    """
    path = folder / "tokenizer.model"
    if not path.is_file():
        raise CheckpointError(
            f"{path}: the file is missing: a GGUF file needs its scores, tokenizer.json has none"
        )
    model = parse_sentencepiece(path)
    tokens = [piece.piece for piece in model.pieces]
    scores = [float(piece.score) for piece in model.pieces]
    types = [int(piece.type) for piece in model.pieces]  # numbered as in llama.cpp
    for text, index in added_tokens(folder):
        if index == len(tokens) and index < vocab_size:
            tokens.append(text)
            scores.append(_ADDED_SCORE)
            types.append(int(gguf.TokenType.USER_DEFINED))
    for index in range(len(tokens), vocab_size):
        tokens.append(f"[PAD{index}]")
        scores.append(_ADDED_SCORE)
        types.append(int(gguf.TokenType.UNUSED))
    settings = tokenizer_settings(folder)
    return Vocabulary(
        tokens,
        scores,
        types,
        _special_ids(folder, tokens),
        bool(settings.get("add_bos_token", True)),
        bool(model.normalizer_spec.add_dummy_prefix),
    )


def _special_ids(folder: Path, tokens: list[str]) -> dict[str, int]:
    path = folder / "special_tokens_map.json"
    named = {**(read_json(path) if path.is_file() else {}), **tokenizer_settings(folder)}
    defaults = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": None}
    found = {}
    for name, default in defaults.items():
        text = token_text(named.get(f"{name}_token")) or default
        if text in tokens:
            found[name] = tokens.index(text)
    return found


def _describe_ends(writer: gguf.GGUFWriter, ends: Sequence[int]) -> None:
    """Add tokens, besides ``eos``, that end an answer: GGUF has places for two of them."""
    if len(ends) > 2:
        warnings.warn(
            f"GGUF has places for three ends of an answer: other programs than this one will not "
            f"know {', '.join(map(str, ends[2:]))}",
            FileWarning,
            stacklevel=2,
        )
    for end, add in zip(ends, (writer.add_eot_token_id, writer.add_eom_token_id), strict=False):
        add(end)


def _describe_pieces(writer: gguf.GGUFWriter, vocabulary: Vocabulary, ends: Sequence[int]) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    setters = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }
    for name, index in vocabulary.special.items():
        setters[name](index)
    _describe_ends(writer, [end for end in ends if end != vocabulary.special.get("eos")])
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)

"""The tokenizer inside a GGUF file: sentencepiece's pieces with scores and types."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf

from mobilevlm.checkpoint import read_json
from mobilevlm.errors import CheckpointError
from mobilevlm.tokenizer import added_tokens, parse_sentencepiece, token_text, tokenizer_settings

_ADDED_SCORE = -1000.0
"""Of tokens that are matched as they stand, as llama.cpp's converter sets it."""


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp's tokenizer of type ``llama`` needs."""

    tokens: list[str]
    scores: list[float]
    types: list[int]
    special: dict[str, int]
    """Ids of ``bos``, ``eos``, ``unk`` and ``pad``, as far as there are any."""
    add_bos: bool
    add_space_prefix: bool


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


def describe_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    """Adds it to the metadata."""
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
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)

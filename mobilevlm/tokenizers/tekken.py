"""Mistral's tekken.json to ``tokenizer.json``, with the same ids: ranks of tiktoken behind control
tokens (mistral_common/tokens/tokenizers/tekken.py)."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from mobilevlm.checkpoint import read_json
from mobilevlm.errors import CheckpointError
from mobilevlm.tokenizers.byte_level import bpe_of_ranks, check_ranks

TEKKEN = "tekken.json"


def from_tekken(path: Path) -> Tokenizer:
    """Return the tokenizer of a tekken.json. The id of a token is its rank, behind as many control
    tokens as the file says; ranks for which the vocabulary has no room are left out.

    Raises:
        CheckpointError: the file is damaged.
    """
    data = read_json(path)
    try:
        config = data["config"]
        size, reserved = int(config["default_vocab_size"]), config["default_num_special_tokens"]
        names = _control_names(data.get("special_tokens") or [], int(reserved))
        entries = sorted(data["vocab"], key=lambda entry: int(entry["rank"]))[: size - len(names)]
        ranks = {
            base64.b64decode(entry["token_bytes"], validate=True): int(entry["rank"])
            for entry in entries
        }
        pattern = Regex(config["pattern"])
    except (KeyError, TypeError, ValueError, IndexError, binascii.Error) as error:
        raise CheckpointError(
            f"{path}: not a tekken vocabulary ({type(error).__name__}: {error!s:.100}): download "
            f"it again"
        ) from None
    except Exception as error:  # the tokenizers library raises plain Exception
        raise CheckpointError(f"{path}: its 'pattern' is damaged: {error!s:.100}") from None
    check_ranks(path, ranks)
    vocabulary, merges = bpe_of_ranks(ranks)
    known = {name: index for index, name in enumerate(names)}
    ids = {token: rank + len(names) for token, rank in vocabulary.items()}
    tokenizer = Tokenizer(BPE(vocab={**ids, **known}, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(name, normalized=False, special=True) for name in names]
    )
    return tokenizer


def _control_names(entries: list[Any], count: int) -> list[str]:
    """Return the names of control tokens by id; those that the file does not name are reserved."""
    named = {int(entry["rank"]): str(entry["token_str"]) for entry in entries}
    if not 0 < count <= 1 << 20 or any(not 0 <= rank < count for rank in named):
        raise ValueError(f"{count} control tokens")
    names = [named.get(index, f"<SPECIAL_{index}>") for index in range(count)]
    if len(set(names)) < count:
        raise ValueError("two control tokens of one name")
    return names

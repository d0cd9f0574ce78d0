"""Byte-level BPE vocabularies to ``tokenizer.json``, with the same ids: tiktoken's ranks
(arcade100k of StableLM, the first Qwen) and GPT-2's vocab.json with merges.txt (CodeGen of Phi-2).

No code of a checkpoint runs, and tiktoken is not needed.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from mobilevlm.checkpoint import read_json
from mobilevlm.errors import CheckpointError
from mobilevlm.shards import refuse_pointer
from mobilevlm.tokenizers.pieces import byte_level_name

VOCAB, MERGES = "vocab.json", "merges.txt"

_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How both tiktoken vocabularies, and Qwen2's tokenizer, split text into words
(tokenization_qwen.py, tokenization_qwen2.py)."""
_GPT2 = ("", "GPT2Tokenizer", "CodeGenTokenizer")
_QWEN2 = "Qwen2Tokenizer"
"""Classes of tokenizers that vocab.json is read for."""
_END = "<|endoftext|>"
_IM = ("<|im_start|>", "<|im_end|>")
_CODE = (
    *("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<gh_stars>", "<filename>", "<issue_start>", "<issue_comment>", "<issue_closed>"),
    *("<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>"),
    *("<empty_output>", "<commit_before>", "<commit_msg>", "<commit_after>", "<reponame>"),
)


@dataclass(frozen=True)
class _Ranks:
    """A tiktoken vocabulary: its special tokens, and the ids between the ranks and them."""

    special: tuple[str, ...]
    unused: int


_TIKTOKEN = {
    "arcade100k.tiktoken": _Ranks(
        (
            *(_END, *_CODE, "<|endofprompt|>", *_IM, "<|pause|>"),
            *(f"<|reg{index}|>" for index in range(8)),
            "<|extra0|>",
        ),
        unused=1,
    ),
    "qwen.tiktoken": _Ranks((_END, *_IM, *(f"<|extra_{index}|>" for index in range(205))), 0),
}
"""By file name (tokenization_arcade100k.py, tokenization_qwen.py)."""


def find_ranks(folder: Path) -> Path | None:
    """A tiktoken vocabulary that is known here."""
    return next((folder / name for name in _TIKTOKEN if (folder / name).is_file()), None)


def from_tiktoken(path: Path) -> Tokenizer:
    """The tokenizer of a file of ranks: ``base64 rank`` on each line.

    A word that is a token becomes that token; else neighbours whose bytes together have the lowest
    rank are joined first, as in tiktoken's ``byte_pair_encode``.

    Raises:
        CheckpointError: the file is damaged.
    """
    ranks = _read_ranks(path)
    layout = _TIKTOKEN[path.name]
    start = len(ranks) + layout.unused
    special = {text: start + index for index, text in enumerate(layout.special)}
    vocabulary, merges = bpe_of_ranks(ranks)
    tokenizer = Tokenizer(BPE(vocab={**vocabulary, **special}, merges=merges, ignore_merges=True))
    _split_as_qwen(tokenizer)
    tokenizer.decoder = decoders.ByteLevel()
    # Found after normalisation, as the reference code looks for them.
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=True, special=True) for text in layout.special]
    )
    return tokenizer


def bpe_of_ranks(ranks: dict[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the ranks by byte-level names, and the pairs that make tokens, in their order."""
    names = {token: byte_level_name(token) for token in ranks}
    merges = [
        (names[parts[0]], names[parts[1]])
        for token in ranks
        if len(parts := _parts(token, ranks)) == 2
    ]
    return {names[token]: rank for token, rank in ranks.items()}, merges


def from_vocab_and_merges(folder: Path, settings: dict[str, Any]) -> Tokenizer:
    """The tokenizer of vocab.json and merges.txt. ``settings``: tokenizer_config.json, which says
    what the added tokens are.

    Raises:
        CheckpointError: a file is damaged, or an added token's id does not follow.
    """
    vocabulary = read_json(folder / VOCAB)
    if not vocabulary or any(type(index) is not int for index in vocabulary.values()):
        raise CheckpointError(f"{folder / VOCAB}: expected tokens with their ids")
    try:
        lines = (folder / MERGES).read_text(encoding="utf-8").split("\n")
        pairs = [line.partition(" ") for line in lines if line and not line.startswith("#version")]
        merges = [(left, right) for left, _, right in pairs]
        tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise CheckpointError(f"{folder / MERGES}: damaged tokenizer: {error}") from None
    kind = str(settings.get("tokenizer_class") or "").removesuffix("Fast")
    prefix = bool(settings.get("add_prefix_space", False))
    if kind == _QWEN2:
        _split_as_qwen(tokenizer)
    elif kind in _GPT2:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    else:
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: how {kind!r:.60} splits text is not supported: "
            f"save the tokenizer as tokenizer.json beside it"
        )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([token for _, token in _added(folder, settings)])
    for index, token in _added(folder, settings):
        if tokenizer.token_to_id(token.content) != index:
            raise CheckpointError(
                f"{folder / 'tokenizer_config.json'}: token {token.content!r:.60} has id {index}, "
                f"expected {tokenizer.token_to_id(token.content)}: ids go on from {VOCAB}"
            )
    return tokenizer


def _split_as_qwen(tokenizer: Tokenizer) -> None:
    """Set how text is normalised and split into words."""
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _added(folder: Path, settings: dict[str, Any]) -> list[tuple[int, AddedToken]]:
    """Tokens of ``added_tokens_decoder`` in order of their ids."""
    entries = settings.get("added_tokens_decoder", {})
    try:
        return [
            (
                index,
                AddedToken(
                    entries[str(index)]["content"],
                    normalized=bool(entries[str(index)].get("normalized", True)),
                    special=bool(entries[str(index)].get("special", False)),
                ),
            )
            for index in sorted(map(int, entries))
        ]
    except (TypeError, ValueError, KeyError, AttributeError):
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: 'added_tokens_decoder' is not as expected: ids "
            f"with their 'content'"
        ) from None


def _read_ranks(path: Path) -> dict[bytes, int]:
    refuse_pointer(path)
    ranks: dict[bytes, int] = {}
    try:
        for line in path.read_bytes().splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error):
        raise CheckpointError(f"{path}: not a tiktoken vocabulary: download it again") from None
    check_ranks(path, ranks)
    return ranks


def check_ranks(path: Path, ranks: dict[bytes, int]) -> None:
    """Raise CheckpointError unless the ranks are 0, 1, 2 … and each byte has one."""
    if not ranks or sorted(ranks.values()) != list(range(len(ranks))):
        raise CheckpointError(f"{path}: the ranks are not 0, 1, 2 …: download it again")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise CheckpointError(f"{path}: byte {missing[0]} has no rank: download it again")


def _parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Return the parts of a token when only those of lower rank may be joined: the two that make
    it."""
    parts = [token[index : index + 1] for index in range(len(token))]
    limit = ranks[token]
    while len(parts) > 1:
        rank, index = min(
            (ranks.get(parts[index] + parts[index + 1], limit), index)
            for index in range(len(parts) - 1)
        )
        if rank >= limit:
            break
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    return parts

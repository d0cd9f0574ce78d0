"""The tokenizer of a checkpoint as ``tokenizer.json``, with the same ids; here that of a
sentencepiece ``tokenizer.model`` (byte-level ones: ``tokenizer_bytes.py``).

The runtime then needs only the tokenizers library. Source of the rules: sentencepiece's BPE
(merge the pair whose piece has the highest score) and transformers' LlamaTokenizer (added tokens,
beginning-of-text id, the ``legacy`` switch).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE

from mobilevlm.checkpoint import read_json
from mobilevlm.errors import CheckpointError, require
from mobilevlm.shards import refuse_pointer
from mobilevlm.tokenizers.byte_level import (
    MERGES,
    VOCAB,
    find_ranks,
    from_tiktoken,
    from_vocab_and_merges,
)
from mobilevlm.tokenizers.json_file import open_tokenizer_json
from mobilevlm.tokenizers.pieces import SPACE
from mobilevlm.tokenizers.tekken import TEKKEN, from_tekken

ADDED, SETTINGS, WHOLE = "added_tokens.json", "tokenizer_config.json", "tokenizer.json"

_BPE = 2
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write a ``tokenizer.json``. (The library's own ``save`` takes UTF-8 names only.)"""
    path.write_bytes(tokenizer.to_str(pretty=True).encode())


def read_tokenizer(folder: Path, legacy: bool | None = None, ready: bool = False) -> Tokenizer:
    """The tokenizer of a checkpoint folder: ``tokenizer.model``, ranks of tiktoken, ``vocab.json``
    with ``merges.txt``, else ``tokenizer.json``. ``legacy``: as the official loader sets it for a
    ``tokenizer.model``, by default as tokenizer_config.json has it. ``ready``: ``tokenizer.json``
    goes first.

    Raises:
        CheckpointError: no tokenizer, a damaged one, or a sentencepiece model that is not BPE.
    """
    if ready and (folder / WHOLE).is_file():
        return _begin_and_end(_from_json(folder / WHOLE), folder)
    if (folder / "tokenizer.model").is_file():
        return _from_sentencepiece(folder, legacy)
    if (ranks := find_ranks(folder)) is not None:
        return from_tiktoken(ranks)
    if (folder / TEKKEN).is_file():
        return from_tekken(folder / TEKKEN)
    if (folder / VOCAB).is_file() and (folder / MERGES).is_file():
        return from_vocab_and_merges(folder, tokenizer_settings(folder))
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: no tokenizer: expected tokenizer.model, tokenizer.json, {VOCAB} and "
            f"{MERGES}, {TEKKEN}, arcade100k.tiktoken or qwen.tiktoken"
        )
    return _begin_and_end(_from_json(path), folder)


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder has the files of a tokenizer."""
    names = ("tokenizer.model", "tokenizer.json", VOCAB, TEKKEN)
    return any((folder / name).is_file() for name in names) or find_ranks(folder) is not None


def _from_json(path: Path) -> Tokenizer:
    refuse_pointer(path)
    return open_tokenizer_json(path, str(path), CheckpointError)


def vocabulary_length(tokenizer: Tokenizer) -> int:
    """One more than the highest id; some below may be unused."""
    return max(tokenizer.get_vocab().values()) + 1


def _from_sentencepiece(folder: Path, legacy: bool | None) -> Tokenizer:
    path = folder / "tokenizer.model"
    model = parse_sentencepiece(path)
    if model.trainer_spec.model_type != _BPE:
        raise CheckpointError(f"{path}: expected a sentencepiece BPE model (LLaMA's kind)")
    settings = tokenizer_settings(folder)
    _check_ending(folder, settings)
    if legacy is None:
        legacy = bool(settings.get("legacy", True))
    tokenizer = build_tokenizer(model, legacy)
    _add_file_tokens(tokenizer, folder, len(model.pieces))
    if settings.get("add_bos_token", True):
        begin_with(tokenizer, token_text(settings.get("bos_token")) or "<s>")
    return tokenizer


def build_tokenizer(model: Any, legacy: bool) -> Tokenizer:
    """The tokenizer of a sentencepiece BPE model (a ``ModelProto`` or what has its attributes).

    With ``legacy``, text after an added token gets a leading space piece too.
    """
    vocab = {piece.piece: index for index, piece in enumerate(model.pieces)}
    unknown = [piece.piece for piece in model.pieces if piece.type == _UNKNOWN]
    tokenizer = Tokenizer(
        BPE(
            vocab=vocab,
            merges=_merges(model, vocab),
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=bool(model.trainer_spec.byte_fallback),
        )
    )
    _set_spaces(tokenizer, model.normalizer_spec, legacy)
    special = [piece.piece for piece in model.pieces if piece.type in (_CONTROL, _UNKNOWN)]
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for text in special]
    )
    defined = [piece.piece for piece in model.pieces if piece.type == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in defined])
    return tokenizer


def begin_with(tokenizer: Tokenizer, bos: str) -> None:
    """Puts this token in front of every text, if the vocabulary has it."""
    if tokenizer.token_to_id(bos) is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )


def parse_sentencepiece(path: Path) -> Any:
    """The content of a ``tokenizer.model``.

    Raises:
        CheckpointError: damaged or empty.
    """
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise require("sentencepiece", "export", f"reading {path}") from None
    refuse_pointer(path)
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        raise CheckpointError(f"{path}: damaged sentencepiece model: download it again") from None
    if not model.pieces:
        raise CheckpointError(f"{path}: the sentencepiece model holds no pieces")
    return model


def _merges(model: Any, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """All ways to build a piece from two others, best score first.

    Pairs of one piece are ordered by their parts' ids: a piece that can be split in several ways
    is reached the same way as in sentencepiece, where the pair found is the one that is there.
    """
    ranked = []
    for index, piece in enumerate(model.pieces):
        if piece.type in (_CONTROL, _UNKNOWN, _UNUSED):
            continue
        text = piece.piece
        pairs = [
            (vocab[text[:cut]], vocab[text[cut:]], text[:cut], text[cut:])
            for cut in range(1, len(text))
            if text[:cut] in vocab and text[cut:] in vocab
        ]
        ranked += [(-piece.score, index, *pair) for pair in sorted(pairs)]
    ranked.sort(key=lambda row: row[:4])
    return [(left, right) for *_, left, right in ranked]


def _set_spaces(tokenizer: Tokenizer, rules: Any, legacy: bool) -> None:
    """Normalisation, leading space piece, and the way back from pieces to text."""
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if legacy and rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    if rules.add_dummy_prefix and not legacy:
        # The first step puts a space in front of the whole text only (Metaspace would leave it
        # out where the text begins with its own replacement character), the second renames it.
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="first", split=False),
                pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=False),
            ]
        )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []),
        ]
    )


def _add_file_tokens(tokenizer: Tokenizer, folder: Path, num_pieces: int) -> None:
    vocab = tokenizer.get_vocab()
    added: list[AddedToken] = []
    for token in _described_tokens(folder):
        known = vocab.get(token.text)
        expected = num_pieces + len(added) if known is None else known
        if token.index != expected:
            after = f" (ids go on from the {num_pieces} pieces of tokenizer.model)"
            raise CheckpointError(
                f"{token.path}: token {token.text!r:.60} has id {token.index}, expected "
                f"{expected}{after if known is None else ''}"
            )
        if known is None:
            added.append(AddedToken(token.text, normalized=False, special=token.special))
    tokenizer.add_tokens(added)


@dataclass(frozen=True)
class _Described:
    """A token beside those of the model, as a file has it."""

    text: str
    index: int
    path: Path
    special: bool = False


def added_tokens(folder: Path) -> list[tuple[str, int]]:
    """Tokens of added_tokens.json, tokenizer_config.json (added_tokens_decoder) and tokenizer.json
    with their ids, in order of the ids. Those of the model itself may be among them.

    Raises:
        CheckpointError: an id is not a number, or two files contradict each other.
    """
    return [(token.text, token.index) for token in _described_tokens(folder)]


def _described_tokens(folder: Path) -> list[_Described]:
    found: dict[str, _Described] = {}
    for path, entries in (
        (folder / ADDED, _of_added_file),
        (folder / SETTINGS, _of_settings),
        (folder / WHOLE, _of_whole_file),
    ):
        for text, index, special in entries(path) if path.is_file() else ():
            if not text or not isinstance(text, str) or type(index) is not int:
                raise CheckpointError(
                    f"{path}: token {text!r:.60} has id {index!r:.60}, expected a number"
                )
            known = found.setdefault(text, _Described(text, index, path, special))
            if known.index != index:
                raise CheckpointError(
                    f"{path}: token {text!r:.60} has id {index}, but {known.index} in "
                    f"{known.path.name}: these files are of different models"
                )
            if special and not known.special:
                found[text] = replace(known, special=True)
    return sorted(found.values(), key=lambda token: token.index)


_Entries: TypeAlias = "list[tuple[Any, Any, bool]]"
"""Text, id, and whether the token is special."""


def _of_added_file(path: Path) -> _Entries:
    return [(text, index, False) for text, index in read_json(path).items()]


def _of_settings(path: Path) -> _Entries:
    entries = read_json(path).get("added_tokens_decoder") or {}
    if not isinstance(entries, dict) or not all(isinstance(at, dict) for at in entries.values()):
        raise CheckpointError(f"{path}: added_tokens_decoder: expected ids with their tokens")
    return [
        (entry.get("content"), int(index) if index.isdecimal() else index, _is_special(entry))
        for index, entry in entries.items()
    ]


def _of_whole_file(path: Path) -> _Entries:
    entries = read_json(path).get("added_tokens") or []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise CheckpointError(f"{path}: added_tokens: expected a list of tokens")
    return [(entry.get("content"), entry.get("id"), _is_special(entry)) for entry in entries]


def _is_special(entry: dict[str, Any]) -> bool:
    return entry.get("special") is True


def _begin_and_end(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json with the ids around a text that the settings say, as
    LlamaTokenizer sets them anew; other classes leave what the file has.

    Raises:
        CheckpointError: a text would end with a special token.
    """
    settings = tokenizer_settings(folder)
    _check_ending(folder, settings)
    llama = str(settings.get("tokenizer_class", "")).startswith("LlamaTokenizer")
    if settings.get("add_bos_token", llama):
        if llama or tokenizer.post_processor is None:
            begin_with(tokenizer, token_text(settings.get("bos_token")) or "<s>")
    elif llama:
        tokenizer.post_processor = None
    return tokenizer


def _check_ending(folder: Path, settings: dict[str, Any]) -> None:
    if settings.get("add_eos_token"):
        raise CheckpointError(
            f"{folder / SETTINGS}: 'add_eos_token' is true: each prompt would be finished before "
            f"the answer begins: set it to false"
        )


def tokenizer_settings(folder: Path) -> dict[str, Any]:
    """The content of tokenizer_config.json, empty where there is none."""
    path = folder / SETTINGS
    return read_json(path) if path.is_file() else {}


def token_text(entry: Any) -> str | None:
    """A token in tokenizer_config.json is text or an object with its ``content``."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None

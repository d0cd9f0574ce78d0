"""``tokenizer.json`` of strangers: opened and used without letting it grow, hang or abort.

The tokenizers library is Rust: where it panics, pyo3 raises an exception that is not an
``Exception``, and where it runs out of memory the process ends. So what a file may ask for is
checked when it is opened, and every call goes through :func:`foreign`.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import Unigram, WordPiece

from mobilevlm.console.terminal import plain
from mobilevlm.errors import MobileVLMError, PromptError

LARGEST = 64 << 20
"""Bytes of a file; the largest of published models have 34 million."""
GROWTH = 256
"""How many times as long a text may become before it is split into tokens."""
STEPS = 32
PREFIX = 64
"""Most characters, or ids, that a tokenizer adds to a text."""
WORD = 400
"""Most characters of a word that are looked up piece by piece, and of a piece where all that a text
may begin with are looked up: the time grows with their cube and their number. Published word pieces
have 100 or 200, published pieces tens."""
_PATTERN_LENGTH = 4000
_REPEATS = 2
"""Most long repetitions in one alternative of a regular expression; published ones have two, and
nothing behind both that can fail. Each that can multiplies the time by the length of a text."""
_ALL_REPEATS = 32
"""Most long repetitions in all alternatives; published ones have about 12."""
_SHORT_REPEAT = 16
_WAYS = 256
"""Most ways to take and leave the optional parts of an alternative; published ones have 32."""


@contextmanager
def foreign(place: str, kind: type[MobileVLMError] = PromptError) -> Iterator[None]:
    """Turn whatever the tokenizers library raises in the block into one line.

    ``place``: what failed, as the message begins.
    """
    try:
        yield
    except MobileVLMError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # KeyboardInterrupt and its like
        raise kind(f"{place}: {plain(error)[:200]}") from None


def encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
    """Return the ids of a text.

    Raises:
        PromptError: the tokenizer fails on it.
    """
    with foreign("the bundle's tokenizer failed on the prompt"):
        ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
    return ids


def open_tokenizer_json(source: Path | str, place: str, kind: type[MobileVLMError]) -> Tokenizer:
    """Return the tokenizer of a file, or of its text.

    Its truncation and padding are left out, as Transformers sets both anew for every call.
    ``place``: the file's name for messages; ``kind``: of the errors.

    Raises:
        MobileVLMError: the file is damaged, or asks for what no tokenizer needs.
    """
    damaged = f"{place}: damaged tokenizer"
    with foreign(damaged, kind):
        size = source.stat().st_size if isinstance(source, Path) else len(source)
        if size > LARGEST:
            raise kind(f"{place}: a tokenizer of {size} bytes, more than {LARGEST}: not a model's")
        text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
        _refuse(_merges_problem(text), place, kind)
        for state in _normalizers(text):  # before the library uses it for the added tokens
            _refuse(_precompiled_problem(state) or _problem({"normalizer": state}), place, kind)
        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        parts = {
            name: _state(getattr(tokenizer, name))
            for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder")
        }
        _refuse(_added_problem(tokenizer) or _model_problem(tokenizer), place, kind)
    _refuse(_problem(parts) or _template_problem(parts["post_processor"]), place, kind)
    return tokenizer


def _refuse(problem: str, place: str, kind: type[MobileVLMError]) -> None:
    if problem:
        raise kind(f"{place}: its {problem}: no published tokenizer does, use another file")


_ESCAPED = re.compile(r"\\u00[4-7]")
"""A letter or "_" that is written by its number, as a key may be."""
_KEY = "continuing_subword_prefix"
_PREFIX = re.compile(rf'"{_KEY}"\s*:\s*(?!null\b|""|\s)')


def _merges_problem(text: str) -> str:
    """Return whether merges have a prefix for what continues a word.

    The library removes the prefix's number of bytes from what each merge joins, unchecked: the rest
    may be no text, and the process aborts.
    """
    if not _PREFIX.search(text) and not _ESCAPED.search(text):
        return ""
    found = []

    def note(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # all pairs, as the library reads each of several of one name
        prefixes = [value for name, value in pairs if name == _KEY and isinstance(value, str)]
        found.append(any(prefixes) and any(name == "merges" for name, _ in pairs))
        return dict(pairs)

    json.loads(text, object_pairs_hook=note)
    return "merges have a continuing_subword_prefix" if any(found) else ""


def _normalizers(text: str) -> list[Any]:
    """Return every normalizer that a tokenizer.json may have, without reading its vocabulary."""
    places = [match.end() for match in re.finditer(r'"normalizer"\s*:\s*(?=[{\[])', text)]
    if len(places) > 4 or _ESCAPED.search(text):
        data = json.loads(text)
        return [data.get("normalizer")] if isinstance(data, dict) else []
    return [json.JSONDecoder().raw_decode(text, place)[0] for place in places]


def _state(part: Any) -> Any:
    """Return a part of a tokenizer as JSON data."""
    return {} if part is None else json.loads(part.__getstate__())


def _problem(parts: dict[str, Any]) -> str:
    """Return what is wrong with the parts of a tokenizer; nothing if they are as usual."""
    for name, state in parts.items():
        steps = list(_steps(state))
        if len(steps) > STEPS:
            return f"{name} has more than {STEPS} steps"
        growth = 1
        for step in steps:
            growth *= _growth(step)
            if growth > GROWTH or len(str(step.get("prepend", ""))) > PREFIX:
                return f"{name} makes texts more than {GROWTH} times as long"
            if step.get("type") == "FixedLength" and not step.get("length"):
                return f"{name} splits texts into nothing"
            pattern = step.get("pattern")
            if isinstance(pattern, dict) and not _is_simple(str(pattern.get("Regex", ""))):
                return f"{name} has a regular expression that can take forever"
    return ""


def _added_problem(tokenizer: Tokenizer) -> str:
    """Return whether an added token is empty once it is normalized: the library finds such a token
    again and again in the same place."""
    for token in tokenizer.get_added_tokens_decoder().values():
        text = token.content
        if token.normalized and tokenizer.normalizer is not None:
            text = tokenizer.normalizer.normalize_str(text)
        if not text:
            return f"added token {token.content!r:.60} is empty"
    return ""


def _model_problem(tokenizer: Tokenizer) -> str:
    """Return whether splitting a long word would take minutes."""
    model = tokenizer.model
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if len(getattr(model, name, None) or "") > PREFIX:
            return f"model has a {name} of more than {PREFIX} characters"
    if isinstance(model, WordPiece) and model.max_input_chars_per_word > WORD:
        return f"model splits words of more than {WORD} characters"
    if isinstance(model, Unigram):
        longest = max(map(len, tokenizer.get_vocab(with_added_tokens=False)), default=0)
        if longest > WORD:
            return f"model has a piece of {longest} characters, more than {WORD}"
    return ""


def _steps(state: Any) -> Iterator[dict[str, Any]]:
    """Yield the steps of a part, those of sequences one by one."""
    rest = [state]
    while rest:
        item = rest.pop()
        if isinstance(item, list):
            rest.extend(reversed(item))
        elif isinstance(item, dict) and item.get("type") == "Sequence":
            rest.extend(reversed([part for part in item.values() if isinstance(part, list)]))
        elif isinstance(item, dict):
            yield item


def _growth(step: dict[str, Any]) -> int:
    """Return how many times as long a step makes a text at most."""
    kind = step.get("type")
    if kind == "ByteLevel":
        return 2
    if kind == "CTC":  # a space goes between all characters where nothing marks the words
        return 3 if step.get("cleanup") and not step.get("word_delimiter_token") else 1
    if kind == "BPEDecoder":
        return 1 if step.get("suffix") else 3
    if kind == "Precompiled":
        return -(-_longest_replacement(step) // 3)
    if kind != "Replace":
        return 1
    content = len(str(step.get("content", "")).encode("utf-8", "replace"))
    pattern = step.get("pattern", {})
    literal = str(pattern.get("String", "")).encode("utf-8", "replace")
    if "String" in pattern and literal:
        return max(1, -(-content // len(literal)))
    return 1 + content


def _longest_replacement(step: dict[str, Any]) -> int:
    """Return the bytes of the longest text that sentencepiece's table puts for a character."""
    table = base64.b64decode(step["precompiled_charsmap"])
    size = int.from_bytes(table[:4], "little")
    return max(map(len, table[4 + size :].split(b"\0")))


def _precompiled_problem(state: Any) -> str:
    """Return what is wrong with sentencepiece's tables, on which the library would panic."""
    for step in _steps(state):
        if step.get("type") != "Precompiled":
            continue
        try:
            table = base64.b64decode(step.get("precompiled_charsmap") or "", validate=True)
            size = int.from_bytes(table[:4], "little")
            table[4 + size :].decode("utf-8")
        except (ValueError, TypeError):
            return "normalizer has a damaged table of characters"
        if len(table) <= 4 or size > len(table) - 4 or size % 4:
            return "normalizer has a damaged table of characters"
    return ""


def _template_problem(state: Any) -> str:
    for step in _steps(state):
        if step.get("type") != "TemplateProcessing":
            continue
        names = [
            piece.get("Sequence", {}).get("id") for piece in step["single"] if "Sequence" in piece
        ]
        special = step.get("special_tokens", {})
        added = sum(
            len(special.get(piece["SpecialToken"]["id"], {}).get("ids", ()))
            for piece in step["single"]
            if "SpecialToken" in piece
        )
        if names != ["A"] or added > PREFIX:
            return "post_processor does not put a text between a few special tokens"
    return ""


_ATOM = re.compile(
    r"\\(?:[pP]\{[^}]*\}|x\{[^}]*\}|x..|u....|.)"
    r"|\(\?[a-zA-Z-]+[:)]|\(\?(?:[:=!>]|<[=!])|.",
    re.DOTALL,
)
_QUANTIFIER = re.compile(r"(?:[*+?]|\{\d*(?:,\d*)?\})[?+]?")


def _is_simple(pattern: str) -> bool:
    """Return whether a regular expression takes a time that grows with the square of a text at
    most: no repeated group has a choice or a repetition inside, few repetitions follow each other,
    and nothing that can fail follows those."""
    if len(pattern) > _PATTERN_LENGTH or re.search(r"\\[kg]|\(\?[<P]\w", pattern):
        return False
    groups: list[_Group] = []
    place, unbounded, total, ways = 0, 0, 0, 1
    while place < len(pattern):
        if pattern[place] == "[":
            place, atom = _end_of_class(pattern, place), "["
        else:
            match = _ATOM.match(pattern, place)
            assert match is not None
            place, atom = match.end(), match[0]
        if atom == "|":
            if groups:
                groups[-1].ways += 1
            else:
                unbounded, ways = 0, 1
            for group in groups:
                group.is_complex = True
            continue
        if atom.startswith("(") and not atom.endswith(")"):
            groups.append(_Group())
            continue
        closed = groups.pop() if atom == ")" and groups else _Group()
        can_fail = closed.can_fail if atom == ")" else unbounded >= _REPEATS
        ways *= closed.ways
        quantifier = _QUANTIFIER.match(pattern, place)
        sign = quantifier[0] if quantifier else "{1}"
        numbers = [int(number) for number in re.findall(r"\d+", sign)]
        if sign[0] in "?*" or sign.startswith(("{0", "{,")):
            can_fail = False
        if can_fail and not groups:
            return False
        if can_fail:
            groups[-1].can_fail = True
        if quantifier is not None:
            place = quantifier.end()
            if sign[0] == "?":
                ways *= 2
            elif closed.is_complex or max(numbers, default=0) > 1000:
                return False
            elif sign[0] in "*+" or ",}" in sign or max(numbers, default=0) > _SHORT_REPEAT:
                unbounded, total = unbounded + 1, total + 1
            elif "," in sign:
                ways *= 1 + numbers[-1] - (numbers[0] if len(numbers) > 1 else 0)
            for group in groups if sign[0] != "?" else []:
                group.is_complex = True
        if unbounded > _REPEATS or total > _ALL_REPEATS or ways > _WAYS:
            return False
        if quantifier is not None and _QUANTIFIER.match(pattern, place):
            return False
    return True


@dataclass
class _Group:
    """A group of a regular expression that is read."""

    is_complex: bool = False
    """It has a choice or a repetition inside."""
    can_fail: bool = False
    """It has a part that must be there, behind as many repetitions as there may be."""
    ways: int = 1
    """Number of its alternatives."""


def _end_of_class(pattern: str, place: int) -> int:
    """Return the place after a character class, which may have others inside."""
    depth = 0
    while place < len(pattern):
        if pattern[place] == "\\":
            place += 1
        elif pattern[place] == "[":
            depth += 1
            if pattern[place + 1 : place + 2] == "]" or pattern[place + 1 : place + 3] == "^]":
                place += pattern[place + 1 : place + 3].index("]") + 1
        elif pattern[place] == "]":
            depth -= 1
            if depth == 0:
                return place + 1
        place += 1
    return place

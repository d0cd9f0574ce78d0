"""Text of people in which special tokens are ordinary words.

The official code finds special tokens anywhere in a prompt, in a question too: ``</s>`` typed by a
person ends a turn. Where that is not wanted, the text is marked before the template puts it into
the prompt (:func:`protect`), and a marked prompt is tokenized by a twin of the tokenizer whose
special tokens have other names (:func:`encode_marked`): the template's own are renamed in the
prompt, those in people's text fall into plain pieces. Everything else is split as ever.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer

from mobilevlm.errors import PromptError
from mobilevlm.messages import Message
from mobilevlm.spec import IMAGE_PLACEHOLDER
from mobilevlm.tokenizers.json_file import encode, foreign
from mobilevlm.tokenizers.library import LibraryTokenizer

_BREAK, _OPEN, _CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"
"""Noncharacters of Unicode: no text has them."""
_STRUCTURE = frozenset((
    "type", "function", "name", "description", "parameters", "properties", "required", "strict",
    "arguments", "id", "object",
))  # fmt: skip
"""Words that templates look for in definitions and calls of tools."""


def check_text(text: str) -> None:
    """Refuse text with the noncharacters that mark others.

    Raises:
        PromptError: it has one.
    """
    for mark in (_BREAK, _OPEN, _CLOSE):
        if mark in text:
            raise PromptError(f"the prompt has U+{ord(mark):04X}, which is no character")


def protect(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    special_tokens: bool = True,
    image_mark: str = IMAGE_PLACEHOLDER,
) -> list[Message]:
    """Return messages whose texts are marked where they must not be read as special tokens:
    ``<image>`` and ``image_mark`` in what is not the user's (an answer may say it), and without
    ``special_tokens`` everything that could begin one."""
    user, others = _markers(tokenizer, special_tokens, image_mark)
    found: list[Any] = []
    for message in messages:
        marked = user if message["role"] == "user" else others
        content = message["content"]
        more = {key: _marked_in(value, marked) for key, value in message.items()
                     if key not in ("role", "content")}  # fmt: skip
        if isinstance(content, str):
            found.append({**more, "role": message["role"], "content": marked(content)})
            continue
        parts = [
            {**part, "text": marked(part["text"])} if "text" in part else part for part in content
        ]
        found.append({**more, "role": message["role"], "content": parts})
    return found


def protect_data(
    data: Any,
    tokenizer: Tokenizer,
    special_tokens: bool = True,
    image_mark: str = IMAGE_PLACEHOLDER,
) -> Any:
    """Return JSON data for a template, its texts marked as :func:`protect` marks what is not the
    user's."""
    return _marked_in(data, _markers(tokenizer, special_tokens, image_mark)[1])


def _marked_in(data: Any, marked: Callable[[str], str]) -> Any:
    if isinstance(data, str):
        return data if data in _STRUCTURE else marked(data)
    if isinstance(data, Mapping):
        return {
            _marked_in(str(key), marked): _marked_in(value, marked) for key, value in data.items()
        }
    if isinstance(data, (list, tuple)):
        return [_marked_in(value, marked) for value in data]
    return data


def _markers(
    tokenizer: Tokenizer, special_tokens: bool, image_mark: str
) -> tuple[Callable[[str], str], Callable[[str], str]]:
    """Return what marks a text of the user, and any other text."""
    starts = {"<"} if special_tokens else {"<", *(name[0] for name in _special_names(tokenizer))}
    table = {ord(start): f"{start}{_BREAK}" for start in starts}

    def checked(text: str) -> str:
        check_text(text)
        return text

    def without_images(text: str) -> str:
        check_text(text)
        for name in (IMAGE_PLACEHOLDER, image_mark):
            text = text.replace(name, f"{name[0]}{_BREAK}{name[1:]}")
        return text

    def without_any(text: str) -> str:
        return checked(text).translate(table)

    return (checked, without_images) if special_tokens else (without_any, without_any)


def encode_marked(tokenizer: Tokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
    """Return the ids of text that may be marked.

    Raises:
        PromptError: the tokenizer fails on it.
    """
    if _BREAK not in text:
        return encode(tokenizer, text, add_special_tokens)
    if isinstance(tokenizer, LibraryTokenizer):
        return tokenizer.encode_marked(text, _BREAK, add_special_tokens)
    twin, names = _twin(tokenizer)
    for name, other in names.items():
        text = text.replace(name, other)
    return encode(twin, text.replace(_BREAK, ""), add_special_tokens)


def _special_names(tokenizer: Tokenizer) -> list[str]:
    """Return the added tokens that are not just spaces, the longest first."""
    added = tokenizer.get_added_tokens_decoder().values()
    names = {token.content for token in added if token.content.strip()}
    return sorted(names, key=lambda name: (-len(name), name))


@lru_cache(maxsize=2)
def _twin(tokenizer: Tokenizer) -> tuple[Tokenizer, dict[str, str]]:
    """Return the tokenizer with its special tokens renamed, same ids, and the new names."""
    names = {
        name: f"{_OPEN}{number}{_CLOSE}" for number, name in enumerate(_special_names(tokenizer))
    }
    state = json.loads(tokenizer.to_str())
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(name, name): index for name, index in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(name, name), score] for name, score in model["vocab"]]
    if "merges" in model:
        model["merges"] = list(_merges(model["merges"], names))
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    with foreign("the bundle's tokenizer cannot read special tokens as plain text"):
        return Tokenizer.from_str(json.dumps(state)), names


def _merges(merges: Iterable[Any], names: dict[str, str]) -> Iterable[Any]:
    """Yield the merges that neither use nor make a special token."""
    for merge in merges:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        if not {left, right, left + right} & names.keys():
            yield merge

"""The chat template and the ends of an answer that a GGUF file names."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from typing import Any

from mobilevlm.conversation import (
    CONVERSATIONS,
    render,
    turns_template,
    two_separator_template,
    user_message,
)
from mobilevlm.errors import BundleError, FileWarning, PromptError
from mobilevlm.gguf.checks import is_utf8
from mobilevlm.gguf.file import GgufFile
from mobilevlm.gguf.tokenizer import begins_texts
from mobilevlm.spec import IMAGE_PLACEHOLDER, ConversationSpec

FALLBACK = "v1"
"""LLaVA's conversation, where the file has none that can hold an image."""
_QUESTION = "Which colour is it?"
_BEFORE = "Look: "
"""Text before an image that stands inside a question."""
_ENDS = ("eos", "eot", "eom")

_FLATTENED = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- if message['content'] is string -%}
    {%- set flat.messages = flat.messages + [message] -%}
  {%- else -%}
    {%- set text = namespace(content='') -%}
    {%- for part in message['content'] if part['type'] == 'image' -%}
      {%- set text.content = text.content ~ '<image>\\n' -%}
    {%- endfor -%}
    {%- for part in message['content'] if part['type'] == 'text' -%}
      {%- set text.content = text.content ~ part['text'] -%}
    {%- endfor -%}
    {%- set flat.messages = flat.messages + [dict(message, content=text.content)] -%}
  {%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""
"""Goes before a template that knows texts alone: images stand first in their turn, as LLaVA has
them."""


_INLINE = _FLATTENED.replace("'<image>\\n'", "'<image>'")
"""Goes before such a template as llama.cpp has it: no line break behind an image."""
_TYPED = """\
{%- set typed = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- set part = namespace(text='') -%}
  {%- if message['content'] is string -%}
    {%- set part.text = message['content'] -%}
  {%- else -%}
    {%- for given in message['content'] -%}
      {%- set part.text = part.text ~ (given['text'] if given['type'] == 'text' else '<image>') -%}
    {%- endfor -%}
  {%- endif -%}
  {%- set content = [{'type': 'text', 'text': part.text}] -%}
  {%- set typed.messages = typed.messages + [dict(message, content=content)] -%}
{%- endfor -%}
{%- set messages = typed.messages -%}
"""
"""Goes before a template that knows lists of texts alone, as llama.cpp has it."""
_LISTED = """\
{%- set listed = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- set content = message['content'] -%}
  {%- if content is string -%}{%- set content = [{'type': 'text', 'text': content}] -%}{%- endif -%}
  {%- set listed.messages = listed.messages + [dict(message, content=content)] -%}
{%- endfor -%}
{%- set messages = listed.messages -%}
"""
"""Goes before a template that knows lists of parts alone."""
CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
"""The template that llama.cpp takes where a file has none."""
_MARKS = re.compile(r"<\|?[^<>\s]+\|?>|\[[A-Z_]+\]")


def gguf_conversation(file: GgufFile) -> ConversationSpec:
    """Return the conversation of a file whose vocabulary was checked.

    LLaVA's template is the fallback, with a FileWarning, for one that cannot hold an image.

    Raises:
        BundleError: the template is not UTF-8.
    """
    tokens: list[str] = file.metadata["tokenizer.ggml.tokens"]
    ids = _ends_of(file, tokens)
    stops = tuple(tokens[index] for index in ids)
    return ConversationSpec(_template(file, tokens, ids[0]), ids, stops)


def _ends_of(file: GgufFile, tokens: Sequence[str]) -> tuple[int, ...]:
    """Return the ids that end an answer."""
    ends = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in _ENDS]
    ids = tuple(dict.fromkeys(end for end in ends if end is not None))
    return ids or ((2,) if len(tokens) > 2 else (0,))


def marked_conversation(file: GgufFile, mark: str) -> ConversationSpec:
    """Return the conversation of a file whose vocabulary was checked and has a token for an image,
    ``mark``, which templates write in its place.

    A template that knows texts alone gets the images of a turn before its text, each with a line
    break; without a template ChatML is taken, else LLaVA's with a FileWarning.

    Raises:
        BundleError: the template is not UTF-8.
    """
    tokens: list[str] = file.metadata["tokenizer.ggml.tokens"]
    ids = _ends_of(file, tokens)
    source = _source(file)
    if not source and "<|im_start|>" in tokens:
        source = CHATML
    reason = "it has none"
    if source:
        named = _named(file, source, tokens, ids[0], begins_texts(file))
        flattened = _FLATTENED.replace(IMAGE_PLACEHOLDER, mark)
        for ahead, parts in (("", True), ("", False), (flattened, True)):
            found = ConversationSpec(named + ahead + source, ids, (), "joined", mark, parts)
            if not (reason := _obstacle(found, in_place=not ahead)):
                return found
    _warn_of_fallback(file, reason)
    template = two_separator_template(CONVERSATIONS[FALLBACK], mark)
    return ConversationSpec(template, ids, (), "joined", mark)


def text_conversation(file: GgufFile) -> ConversationSpec:
    """Return the conversation of a language model alone, whose vocabulary was checked. Without a
    template, or with one that fails, a question is the whole prompt.

    Raises:
        BundleError: the template is not UTF-8.
    """
    tokens: list[str] = file.metadata["tokenizer.ggml.tokens"]
    ids = _ends_of(file, tokens)
    if source := _source(file):
        named = _named(file, source, tokens, ids[0], begins_texts(file))
        for ahead in ("", _LISTED):
            found = ConversationSpec(named + ahead + source, ids, (), "joined")
            try:
                if _QUESTION in render(found, [user_message(_QUESTION, 0)]):
                    return found
            except PromptError as error:
                reason = " ".join(str(error).split())
        warnings.warn(
            f"{file.path}: the file's chat template fails ({reason:.200}): a question is the whole "
            f"prompt",
            FileWarning,
            stacklevel=3,
        )
    return ConversationSpec(turns_template(), ids, (), "joined")


def pair_conversation(file: GgufFile, begins: bool, ends: Sequence[int]) -> ConversationSpec:
    """Return the conversation of a language model whose images llama.cpp alone knows.

    The template may write its own marks of an image: llama.cpp writes marks, too, so those of the
    template become one ``<image>``. ``begins``: the tokenizer begins texts with a token; ``ends``:
    ids that end an answer.

    Raises:
        BundleError: the template is not UTF-8.
    """
    tokens: list[str] = file.metadata["tokenizer.ggml.tokens"]
    eos: Any = file.metadata.get("tokenizer.ggml.eos_token_id")
    known: list[int] = [eos] if type(eos) is int and 0 <= eos < len(tokens) else []
    ids = tuple(dict.fromkeys([*known, *(end for end in ends if 0 <= end < len(tokens))])) or (0,)
    source = _source(file)
    if not source and "<|im_start|>" in tokens:
        source = CHATML
    fallback = two_separator_template(CONVERSATIONS[FALLBACK])
    template, reason = fallback, "it has none"
    if source:
        named = _named(file, source, tokens, ids[0], begins) + source
        template, reason = _with_marks(named, tokens)
    if not template:
        _warn_of_fallback(file, reason)
        template = fallback
    return ConversationSpec(template, ids, tuple(tokens[index] for index in ids))


def _with_marks(source: str, tokens: Sequence[str]) -> tuple[str, str]:
    """Return a template that writes ``<image>`` for each image and nothing else of it, empty where
    there is none, and why."""
    special = {token for token in tokens if _MARKS.fullmatch(token)} | {IMAGE_PLACEHOLDER}
    reason = ""
    for ahead in ("", _LISTED):
        mark = _image_mark(ahead + source, special)
        if mark is None:
            continue
        template = ahead + source
        if mark != IMAGE_PLACEHOLDER:
            # Inside a block Jinja keeps the line break that it leaves out at the end of a template.
            template = re.sub(r"\r?\n\Z", "", template)
            replaced = f"replace({json.dumps(mark, ensure_ascii=False)}, '{IMAGE_PLACEHOLDER}')"
            template = f"{{% set written %}}{template}{{% endset %}}{{{{ written | {replaced} }}}}"
        if not (reason := _obstacle(ConversationSpec(template, (), ()))):
            return template, ""
    for ahead in (_INLINE, _TYPED):
        if not (reason := _obstacle(ConversationSpec(ahead + source, (), ()))):
            return ahead + source, ""
    return "", reason


def _image_mark(source: str, special: set[str]) -> str | None:
    """Return the marks that a template writes in the place of an image, from the first to the last
    of them; none where it writes no image."""
    conversation = ConversationSpec(source, (), ())
    try:
        one = render(conversation, [user_message(_QUESTION, 1)])
        none = render(conversation, [user_message(_QUESTION, 0)])
    except PromptError:
        return None
    found = [
        match for match in _MARKS.finditer(one) if match[0] in special and match[0] not in none
    ]
    mark = one[found[0].start() : found[-1].end()] if found else ""
    return None if not mark or _QUESTION in mark else mark


def _source(file: GgufFile) -> str:
    source: str = file.metadata.get("tokenizer.chat_template", "")
    if not is_utf8(source):
        raise BundleError(f"{file.path}: tokenizer.chat_template is not UTF-8: convert it again")
    return source


def _named(file: GgufFile, source: str, tokens: list[str], eos: int, begins: bool) -> str:
    """Return what gives a template the names of tokens that it uses. ``begins``: the tokenizer
    writes the first."""
    bos = file.metadata.get("tokenizer.ggml.bos_token_id")
    names = {
        "bos_token": "" if begins or bos is None else tokens[bos],
        "eos_token": tokens[eos],
    }
    return "".join(
        f"{{%- set {name} = {json.dumps(text)} -%}}"
        for name, text in names.items()
        if name in source
    )


def _template(file: GgufFile, tokens: list[str], eos: int) -> str:
    source = _source(file)
    fallback = two_separator_template(CONVERSATIONS[FALLBACK])
    if not source:
        return fallback
    named = _named(file, source, tokens, eos, begins_texts(file))
    reasons = []
    for template in (named + source, named + _LISTED + source, named + _FLATTENED + source):
        if not (reason := _obstacle(ConversationSpec(template, (), ()))):
            return template
        reasons.append(reason)
    _warn_of_fallback(file, reasons[-1])
    return fallback


def _warn_of_fallback(file: GgufFile, reason: str) -> None:
    warnings.warn(
        f"{file.path}: the file's chat template cannot hold an image ({reason:.200}): LLaVA's "
        f"conversation '{FALLBACK}' is used instead",
        FileWarning,
        stacklevel=3,
    )


def _obstacle(conversation: ConversationSpec, in_place: bool = False) -> str:
    """Return why a question about an image cannot be put with a template; empty where it can.
    ``in_place``: an image inside a text must stand where it is said to."""
    mark = conversation.image_mark
    inside = f"{_BEFORE}{IMAGE_PLACEHOLDER} {_QUESTION}"
    try:
        as_part = render(conversation, [user_message(_QUESTION, 1)])
        in_text = render(conversation, [user_message(inside, 1)])
        without = render(conversation, [user_message(_QUESTION, 0)])
    except PromptError as error:
        return " ".join(str(error).split())
    for prompt, expected in ((as_part, 1), (in_text, 1), (without, 0)):
        marks = prompt.count(mark)
        if marks != expected:
            return f"{marks} {mark} for {'one image' if expected else 'none'}"
        if _QUESTION not in prompt:
            return "the question is not in the prompt"
    if in_place and not in_text.find(_BEFORE) < in_text.find(mark) < in_text.find(_QUESTION):
        return f"{mark} does not stand where the image is in a text"
    return ""

"""The chat template and the ends of an answer that a GGUF file names."""

from __future__ import annotations

import json
import warnings

from mobilevlm.conversation import (
    CONVERSATIONS,
    render,
    two_separator_template,
    user_message,
)
from mobilevlm.errors import BundleError, FileWarning, PromptError
from mobilevlm.gguf.checks import is_utf8
from mobilevlm.gguf.file import GgufFile
from mobilevlm.spec import IMAGE_PLACEHOLDER, ConversationSpec

FALLBACK = "v1"
"""LLaVA's conversation, where the file has none that can hold an image."""
_QUESTION = "Which colour is it?"
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


def gguf_conversation(file: GgufFile) -> ConversationSpec:
    """Return the conversation of a file whose vocabulary was checked.

    A template that cannot hold an image gives way to LLaVA's, with a FileWarning.

    Raises:
        BundleError: the template is not UTF-8.
    """
    tokens: list[str] = file.metadata["tokenizer.ggml.tokens"]
    ends = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in _ENDS]
    ids = tuple(dict.fromkeys(end for end in ends if end is not None))
    if not ids:
        ids = (2,) if len(tokens) > 2 else (0,)
    stops = tuple(tokens[index] for index in ids)
    return ConversationSpec(_template(file, tokens, ids[0]), ids, stops)


def _template(file: GgufFile, tokens: list[str], eos: int) -> str:
    source: str = file.metadata.get("tokenizer.chat_template", "")
    fallback = two_separator_template(CONVERSATIONS[FALLBACK])
    if not source:
        return fallback
    if not is_utf8(source):
        raise BundleError(f"{file.path}: tokenizer.chat_template is not UTF-8: convert it again")
    adds_bos = file.metadata.get("tokenizer.ggml.add_bos_token", True)
    bos = file.metadata.get("tokenizer.ggml.bos_token_id")
    names = {
        "bos_token": "" if adds_bos or bos is None else tokens[bos],
        "eos_token": tokens[eos],
    }
    named = "".join(
        f"{{%- set {name} = {json.dumps(text)} -%}}"
        for name, text in names.items()
        if name in source
    )
    reasons = []
    for template in (named + source, named + _FLATTENED + source):
        if not (reason := _obstacle(template)):
            return template
        reasons.append(reason)
    warnings.warn(
        f"{file.path}: the file's chat template cannot hold an image ({reasons[-1]:.200}): LLaVA's "
        f"conversation '{FALLBACK}' is used instead",
        FileWarning,
        stacklevel=2,
    )
    return fallback


def _obstacle(template: str) -> str:
    """Return why a question about an image cannot be put with a template; empty where it can."""
    conversation = ConversationSpec(template, (), ())
    try:
        with_image = render(conversation, [user_message(_QUESTION, 1)])
        without = render(conversation, [user_message(_QUESTION, 0)])
    except PromptError as error:
        return " ".join(str(error).split())
    marks = with_image.count(IMAGE_PLACEHOLDER)
    if marks != 1 or without.count(IMAGE_PLACEHOLDER):
        return f"{marks} {IMAGE_PLACEHOLDER} for one image"
    if _QUESTION not in with_image or _QUESTION not in without:
        return "the question is not in the prompt"
    return ""

"""Chat messages to prompt text to input ids, as the reference code of the LLaVA lineage does it.

Templates are Jinja chat templates, stored in the bundle and rendered in a sandbox. ``<image>`` in
the rendered text becomes a mark; the text between images is tokenized piece by piece.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Tokenizer

from mobilevlm.errors import PromptError
from mobilevlm.input_spec import LayoutSpec
from mobilevlm.messages import Message
from mobilevlm.prompt import Mark, Piece, Run, Token, expand
from mobilevlm.spec import IMAGE_PLACEHOLDER, ConversationSpec
from mobilevlm.templates.plain_text import encode_marked

SHORTEST_SYSTEM_PROMPT = 16
"""Tokens. Computing a piece of a prompt apart costs a pass over the weights, about as much as
computing some more tokens."""


@dataclass(frozen=True)
class TwoSeparators:
    """LLaVA's ``SeparatorStyle.TWO``: Vicuna's USER and ASSISTANT turns."""

    system: str
    end: str = "</s>"
    """After each answer."""


def two_separator_template(
    style: TwoSeparators, image_mark: str = IMAGE_PLACEHOLDER, line_break: bool = True
) -> str:
    """The Jinja template of such a conversation.

    An image given as a part stands first in its turn, followed by a line break where the
    checkpoint was trained with one. ``image_mark`` is what it was trained to see in the image's
    place (``<im_start><image><im_end>`` for some).
    """
    system = style.system.replace("'", "\\'")
    part = image_mark + ("\\n" if line_break else "")
    template = _TWO_SEPARATORS.replace("SYSTEM", system).replace("MARK", image_mark)
    return template.replace("PART", part).replace("END", style.end)


_TWO_SEPARATORS = """\
{%- macro marked(text) -%}{{ text | replace('<image>', 'MARK') }}{%- endmacro -%}
{%- if messages and messages[0]['role'] == 'system' -%}
  {{- messages[0]['content'] ~ ' ' -}}{%- set messages = messages[1:] -%}
{%- else -%}
  {{- 'SYSTEM ' -}}
{%- endif -%}
{%- for message in messages -%}
  {{- 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' -}}
  {%- if message['content'] is string -%}
    {{- marked(message['content']) -}}
  {%- else -%}
    {%- for part in message['content'] if part['type'] == 'image' -%}{{- 'PART' -}}{%- endfor -%}
    {%- for part in message['content'] if part['type'] == 'text' -%}
      {{- marked(part['text']) -}}
    {%- endfor -%}
  {%- endif -%}
  {{- ' ' if message['role'] == 'user' else 'END' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""

_INSTRUCTIONS = """\
{%- macro marked(text) -%}{{ text | replace('<image>', 'MARK') }}{%- endmacro -%}
{%- set system = namespace(text='') -%}
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {%- set system.text = '<<SYS>>\\n' ~ message['content'] ~ '\\n<</SYS>>\\n\\n' -%}
  {%- elif message['role'] == 'user' -%}
    {{- '[INST] ' ~ system.text -}}{%- set system.text = '' -%}
    {%- if message['content'] is string -%}
      {{- marked(message['content']) -}}
    {%- else -%}
      {%- for part in message['content'] if part['type'] == 'image' -%}{{- 'MARK\\n' -}}
      {%- endfor -%}
      {%- for part in message['content'] if part['type'] == 'text' -%}
        {{- marked(part['text']) -}}
      {%- endfor -%}
    {%- endif -%}
    {{- ' [/INST]' -}}
  {%- else -%}
    {{- ' ' ~ message['content'] ~ ' </s>' -}}
  {%- endif -%}
{%- endfor -%}
"""
INSTRUCTIONS = "mistral_instruct"
"""Name of LLaVA's conversation for Mistral."""


def instructions_template(image_mark: str = IMAGE_PLACEHOLDER) -> str:
    """Return the Jinja template of LLaVA's ``SeparatorStyle.LLAMA_2`` as it is for Mistral: turns
    of the user between ``[INST]`` and ``[/INST]``, no system message of its own. ``image_mark`` as
    of :func:`two_separator_template`."""
    return _INSTRUCTIONS.replace("MARK", image_mark)


_TURNS = """\
{%- for message in messages -%}
  {%- if not loop.first -%}{{- ' ' -}}{%- endif -%}
  {{- BEFORE if message['role'] == 'user' else '' -}}
  {%- if message['content'] is string -%}
    {{- message['content'] -}}
  {%- else -%}
    {%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}
    {%- endfor -%}
  {%- endif -%}
  {{- AFTER if message['role'] == 'user' else '' -}}
{%- endfor -%}
"""
_IMAGES_FIRST = """\
{%- for message in messages if message['content'] is not string -%}
  {%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>' -}}{%- endfor -%}
{%- endfor -%}
"""


def turns_template(before: str = "", after: str = "") -> str:
    """The Jinja template of a conversation without roles: images that are parts first of all,
    then the turns, the user's between ``before`` and ``after``."""
    turns = _TURNS.replace("BEFORE", repr(before)).replace("AFTER", repr(after))
    return _IMAGES_FIRST + turns


IMAGES_IN_TEXT = """\
{%- set turns = namespace(found=[]) -%}
{%- for message in messages -%}
  {%- set text -%}
    {%- if message['content'] is string -%}{{- message['content'] -}}
    {%- else -%}
      {%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>\\n' -}}
      {%- endfor -%}
      {%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}
      {%- endfor -%}
    {%- endif -%}
  {%- endset -%}
  {%- set turns.found = turns.found + [{'role': message['role'], 'content': text}] -%}
{%- endfor -%}
{%- set messages = turns.found -%}
"""
"""Goes before a template that takes contents as strings only: images that are parts become marks
with a line break each, before the text."""
_ASSISTANT = (
    "an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
    "answers to the"
)
_USER = f"A chat between a curious user and {_ASSISTANT} user's questions."
_HUMAN = f"A chat between a curious human and {_ASSISTANT} human's questions."
CONVERSATIONS = {
    "v1": TwoSeparators(_USER),
    "llava_v1": TwoSeparators(_HUMAN),
    "phi": TwoSeparators(_USER, "<|endoftext|>"),
    "stablelm": TwoSeparators(_USER, "<|endoftext|>"),
    "qwen": TwoSeparators(_USER, "<|endoftext|>"),
}
"""By the reference code's names."""


def user_message(
    prompt: str,
    num_images: int,
    marks_in_text: bool = True,
    shows: Literal["image", "audio"] = "image",
) -> Message:
    """A user's turn: images where ``<image>`` stands in the prompt, else before the text; always
    before it without ``marks_in_text``. ``shows``: type of the parts in their place.

    Raises:
        PromptError: the prompt is empty, or its number of ``<image>`` is not the number of images.
    """
    marks = prompt.count(IMAGE_PLACEHOLDER) if marks_in_text else 0
    if marks and marks != num_images:
        raise PromptError(_other_number(marks, IMAGE_PLACEHOLDER, num_images, "image"))
    if not prompt.strip():
        raise PromptError("the prompt is empty: ask a question")
    if marks:
        return {"role": "user", "content": prompt}
    parts: list[dict[str, Any]] = [{"type": shows}] * num_images
    return {"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}


def render(
    conversation: ConversationSpec,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Return the prompt's text up to where the assistant begins to speak. ``tools``: definitions of
    those that the model may call."""
    from mobilevlm.templates.chat_template import render_template  # brings Jinja

    return render_template(
        conversation.chat_template,
        messages=[_in_parts(message, conversation.shows) for message in messages]
        if conversation.parts
        else messages,
        tools=list(tools) or None,
        add_generation_prompt=True,
        bos_token="",
        eos_token="",
    )


def _in_parts(message: Message, shows: str) -> Message:
    """Return a message with its content as parts, ``<image>`` in a text of the user as an image
    where ``shows`` says that it has some."""
    content = message["content"]
    given = [{"type": "text", "text": content}] if isinstance(content, str) else content
    parts: list[dict[str, Any]] = []
    for part in given:
        if part["type"] != "text" or message["role"] != "user" or shows != "image":
            parts.append(part)
            continue
        for index, text in enumerate(part["text"].split(IMAGE_PLACEHOLDER)):
            parts += [{"type": "image"}] if index else []
            parts += [{"type": "text", "text": text}] if text else []
    if message.get("tool_calls") and content == "":
        parts = []
    elif not parts:
        parts = [{"type": "text", "text": ""}]
    return {**message, "content": parts}


def tokenize(
    tokenizer: Tokenizer, text: str, conversation: ConversationSpec | None = None
) -> list[Token]:
    """Prompt text to ids, with marks where ``<image>`` stands.

    Unless the conversation says otherwise, each piece of text between images is tokenized alone, so
    it begins with the tokenizer's leading space piece; the beginning-of-text id is kept in front of
    the first only (``tokenizer_image_token`` of the reference code).

    Raises:
        PromptError: the text holds what is no character (from a command line that is not UTF-8).
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the prompt has {text[error.start]!r} at character {error.start}, which is not "
            f"text: give it in UTF-8"
        ) from None
    if conversation is not None and conversation.tokenization == "joined":
        image = tokenizer.token_to_id(conversation.image_mark)
        margin, mark = conversation.image_margin, conversation.image_mark
        found = encode_marked(tokenizer, text.replace(mark, f"{margin}{mark}{margin}"))
        added = tokenizer.num_special_tokens_to_add(False)
        if added and found[:added] == found[added : 2 * added]:  # the template writes it too
            found = found[added:]
        return [Mark() if token == image else token for token in found]
    rest, first = text, 0
    if conversation is not None and conversation.tokenization == "images_first":
        while rest.startswith(IMAGE_PLACEHOLDER):
            rest, first = rest.removeprefix(IMAGE_PLACEHOLDER), first + 1
    return [Mark()] * first + _tokenize_apart(tokenizer, rest)


def _tokenize_apart(tokenizer: Tokenizer, text: str) -> list[Token]:
    tokens: list[Token] = []
    for index, chunk in enumerate(text.split(IMAGE_PLACEHOLDER)):
        piece = encode_marked(tokenizer, chunk, add_special_tokens=index == 0)
        tokens += piece if index == 0 else [Mark(), *piece]
    return tokens


def official_ids(
    tokens: Sequence[Token], layout: LayoutSpec, images: Iterable[Sequence[Piece]] = ()
) -> list[int]:
    """Return tokens as the ids of the official code, with its own mark for an image, or for each of
    its visual tokens. ``images``: the pieces of each, where there is a ``row_id``."""
    if layout.row_id is None:
        marked = itertools.repeat(layout.placeholder_ids)
        return [piece for piece in expand(tokens, marked) if isinstance(piece, int)]
    of_video = layout.row_id if layout.video_row_id is None else layout.video_row_id
    ids: list[int] = []
    for piece in expand(tokens, images):
        if isinstance(piece, Run):
            ids += [of_video if piece.from_video else layout.row_id] * piece.rows
        else:
            ids.append(piece)
    return ids


def system_ids(
    tokenizer: Tokenizer, conversation: ConversationSpec, has_images: bool = True
) -> list[int]:
    """The ids that every prompt begins with, whatever is asked: the system prompt and what comes
    before the user's words. Empty where these are so few that keeping them apart is not worth it.

    Raises:
        PromptError: the chat template failed.
    """
    shown, shows = int(has_images), conversation.shows
    questions = [("What is it?", 0), ("What is it?", shown), ("0", 0), ("été", shown)]
    messages = [user_message(text, images, shows=shows) for text, images in questions]
    prompts = [
        tokenize(tokenizer, render(conversation, [message]), conversation) for message in messages
    ]
    agreed = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False))
    shared = [token for token, *_ in agreed if isinstance(token, int)]
    return shared if len(shared) >= SHORTEST_SYSTEM_PROMPT else []


def read_text(
    tokenizer: Tokenizer, conversation: ConversationSpec, text: str, images: int, vocab_size: int
) -> list[Token]:
    """Prompt text to tokens that the model can take: see :func:`tokenize`.

    Raises:
        PromptError: a token that the model has no embedding for, or the number of ``<image>`` is
            not the number of images.
    """
    tokens = tokenize(tokenizer, text, conversation)
    beyond = [token for token in tokens if isinstance(token, int) and token >= vocab_size]
    if beyond:
        raise PromptError(
            f"the prompt has {tokenizer.id_to_token(beyond[0])!r}, a token that the "
            f"model has no embedding for: leave it out"
        )
    marks = tokens.count(Mark())
    if marks != images:
        what = "sound" if conversation.shows == "audio" else "image"
        raise PromptError(_other_number(marks, conversation.image_mark, images, what))
    return tokens


def _other_number(marks: int, mark: str, given: int, what: str) -> str:
    """Return the message for another number of images or sounds than of their marks."""
    said = f"{given} {what}s were" if given > 1 else f"{'one' if given else 'no'} {what} was"
    return (
        f"the prompt has {marks} {mark} mark{'s' * (marks != 1)}, but {said} given: give one "
        f"{what} for each mark"
    )

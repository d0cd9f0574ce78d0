"""Calls of tools in answers: read as the text comes, and forced by a grammar where asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from mobilevlm.errors import PromptError
from mobilevlm.runtime.answer.grammar import SEPARATORS
from mobilevlm.runtime.answer.keywords import about_unknown, unknown_keywords
from mobilevlm.runtime.answer.options import AnswerOptions, is_structured
from mobilevlm.runtime.answer.text import overlap
from mobilevlm.spec import ConversationSpec
from mobilevlm.tokenizers.pieces import AnswerBytes
from mobilevlm.tools import CallForm, read_tools, tool_places

_NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class ToolCall:
    """A call that a model asks for."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class ToolUse:
    """Tools of an answer that may call them."""

    tools: tuple[dict[str, Any], ...]
    form: CallForm
    forced: tuple[str, ...] = ()
    """Names of tools one of which must be called; none: the model decides"""
    single: bool = False
    """One call at most"""

    @property
    def ends(self) -> tuple[str, ...]:
        """Strings that end the answer."""
        return (self.form.marks[1],) if self.single else ()

    @property
    def names(self) -> frozenset[str]:
        """Names of all tools."""
        return frozenset(tool["function"]["name"] for tool in self.tools)

    def grammar(self) -> str:
        """Return a grammar (Lark) of answers that are calls of the forced tools and nothing else.

        Raises:
            PromptError: the parameters of one have keywords that JSON Schema does not have.
        """
        rules, calls = [], []
        for number, tool in enumerate(self.tools):
            function = tool["function"]
            if function["name"] not in self.forced:
                continue
            schema = {"type": "object", **function.get("parameters", _NOTHING)}
            if unknown := unknown_keywords(schema):
                raise PromptError(f"tools[{number}].function.parameters: {about_unknown(unknown)}")
            name = json.dumps(function["name"])
            head = f'{self.form.begin}{{"name": {name}, "{self.form.arguments}": '
            tail = json.dumps(f"}}{self.form.end}")
            rules.append(f"call_{number}: {json.dumps(head)} arguments_{number} {tail}")
            text = json.dumps({**schema, "x-guidance": SEPARATORS})
            rules.append(f"arguments_{number}: %json {text}")
            calls.append(f"call_{number}")
        start = "start: call" if self.single else 'start: call ("\\n" call)*'
        return "\n".join([start, f"call: {' | '.join(calls)}", *rules])


def read_tool_use(
    options: AnswerOptions, conversation: ConversationSpec, tokenizer: Tokenizer
) -> ToolUse | None:
    """Return how an answer uses tools; none where it may not call any.

    Raises:
        PromptError: they are wrong, or the chat template has no place for them.
    """
    given, choice = options.get("tools"), options.get("tool_choice", "auto")
    tools = read_tools(() if given is None else given)
    forced = _forced(choice, [tool["function"]["name"] for tool in tools])
    if not tools or choice == "none":
        return None
    if is_structured(options):
        raise PromptError("a schema or grammar and tools do not go together: give one of both")
    places = tool_places(conversation.chat_template, conversation.parts)
    if not places.definitions:
        raise PromptError("tools: this model's chat template has no place for them: leave them out")
    special = AnswerBytes(tokenizer).special
    marks = places.form.marks if places.form is not None else ()
    if places.form is None or any(tokenizer.token_to_id(mark) in special for mark in marks):
        raise PromptError(
            "tools: this model's chat template writes calls in a form that is not read here: "
            "leave them out"
        )
    single = not options.get("parallel_tool_calls", True)
    return ToolUse(tools, places.form, forced, single)


def _forced(choice: Any, names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of tools one of which must be called."""
    if isinstance(choice, Mapping):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if name not in names or choice.get("type") != "function":
            raise PromptError(f"tool_choice: no tool is called {name!r:.80}")
        return (str(name),)
    if choice not in ("none", "auto", "required"):
        told = "expected none, auto, required, or a function"
        raise PromptError(f"tool_choice is {choice!r:.60}, {told}")
    if choice == "required" and not names:
        raise PromptError("tool_choice: required, but there are no tools")
    return tuple(names) if choice == "required" else ()


class CallReader:
    """Reader of an answer's text that takes calls out of it. ``found`` grows by each call. What
    looks like a call but is none of these tools' stays text."""

    def __init__(self, use: ToolUse, found: list[ToolCall]) -> None:
        self._names, self._key, self.found = use.names, use.form.arguments, found
        self._begin, self._end = use.form.marks
        self._held = ""

    def add(self, piece: str) -> str:
        """Return text that belongs to no call; what may become one is held back."""
        self._held += piece
        shown = ""
        while (start := self._held.find(self._begin)) >= 0:
            before = self._held[:start].rstrip()
            shown, self._held = shown + before, self._held[len(before) :]
            if not (text := self._whole_call()):
                return shown
            call = self._read(text.strip()[len(self._begin) : -len(self._end)])
            self._held = self._held[len(text) :]
            if call is None:
                shown += text
            else:
                self.found.append(call)
        rest = self._held[: len(self._held) - overlap(self._held, self._begin)].rstrip()
        self._held = self._held[len(rest) :]
        return shown + rest

    def finish(self) -> str:
        """Return what was held back, when the text ends."""
        held, self._held = self._held, ""
        text = held.strip()
        if text.startswith(self._begin):  # its end may be a stop string
            call = self._read(text[len(self._begin) :])
            if call is not None:
                self.found.append(call)
                return ""
        return "" if self.found and not text else held

    def _whole_call(self) -> str:
        """Return the held text up to the end of its first call; empty if the end is missing."""
        start = self._held.index(self._begin) + len(self._begin)
        end = start
        while (end := self._held.find(self._end, end)) >= 0:
            if not _is_in_string(self._held[start:end]):
                return self._held[: end + len(self._end)]
            end += len(self._end)
        return ""

    def _read(self, text: str) -> ToolCall | None:
        try:
            call = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(call, dict) or call.keys() - {"name", self._key}:
            return None
        name, arguments = call.get("name"), call.get(self._key, {})
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return None
        return ToolCall(name, arguments) if name in self._names else None


def _is_in_string(text: str) -> bool:
    """Return whether JSON that is cut here is cut inside a string."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.msg.startswith("Unterminated string")
    except (ValueError, RecursionError):
        return False
    return False

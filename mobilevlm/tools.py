"""Tools (functions) that a model may call: their definitions, the calls in messages, and what a
chat template has for them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mobilevlm.errors import PromptError

MAX_TOOLS = 128
MAX_CALLS = 128
"""Calls in a message"""
MAX_DEPTH = 64
"""Levels of objects and lists inside each other"""
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_KEYS = {"name": str, "description": str, "parameters": Mapping, "strict": bool}
_SPEAKERS = ("user", "assistant")
"""Roles that some templates take any other for"""
_PROBE, _ANSWER, _RESULT = "probe_of_tools", "probe of an answer", "probe of a result"
_CALL = re.compile(
    r"(?P<begin>.*\S\s*)"
    rf'\{{"name": "{_PROBE}", "(?P<key>arguments|parameters)": \{{"key": "value"\}}\}}'
    r"(?P<end>\s*\S.*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class CallForm:
    """Form in which a template writes a call: a JSON object between two marks."""

    begin: str
    """``<tool_call>`` and a line break"""
    end: str
    arguments: str
    """Key of the arguments, beside ``name``"""

    @property
    def marks(self) -> tuple[str, str]:
        """The marks alone."""
        return self.begin.strip(), self.end.strip()


@dataclass(frozen=True)
class ToolPlaces:
    """Places of tools in a chat template."""

    definitions: bool
    calls: bool
    results: bool
    form: CallForm | None
    """Form of calls, if it is JSON between marks"""


def read_tools(tools: object) -> tuple[dict[str, Any], ...]:
    """Return checked definitions of tools, in OpenAI's form.

    Raises:
        PromptError: one is wrong; it is named.
    """
    if not isinstance(tools, Sequence) or isinstance(tools, (str, bytes)):
        raise PromptError(f"tools is {type(tools).__name__}, expected a list of functions")
    if len(tools) > MAX_TOOLS:
        raise PromptError(f"tools: expected {MAX_TOOLS} at most, found {len(tools)}")
    found = tuple(_read_tool(f"tools[{index}]", tool) for index, tool in enumerate(tools))
    names = [tool["function"]["name"] for tool in found]
    for name in names:
        if names.count(name) > 1:
            raise PromptError(f"tools: two are called {name!r}")
    return found


def _read_tool(place: str, tool: Any) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    expected = '{"type": "function", "function": {"name": …}}'
    if not isinstance(function, Mapping) or tool.keys() != {"type", "function"}:
        raise PromptError(f"{place}: expected {expected}")
    if tool["type"] != "function":
        raise PromptError(f"{place}: type is {tool['type']!r:.60}, expected 'function'")
    for key, value in function.items():
        if key not in _KEYS:
            told = f"{key!r:.60} is not known, expected {', '.join(_KEYS)}"
            raise PromptError(f"{place}.function: {told}")
        if not isinstance(value, _KEYS[key]):
            raise PromptError(f"{place}.function.{key} is {type(value).__name__}")
    name = function.get("name", "")
    if not _NAME.fullmatch(name):
        told = "expected 1 to 64 letters, digits, '_', '-' or '.'"
        raise PromptError(f"{place}.function.name is {name!r:.80}, {told}")
    if (kind := function.get("parameters", {}).get("type", "object")) != "object":
        told = f"its type is {kind!r:.60}, expected 'object'"
        raise PromptError(f"{place}.function.parameters: {told}")
    _check_depth(place, function)
    return {"type": "function", "function": dict(function)}


def read_calls(place: str, calls: Any) -> list[dict[str, Any]]:
    """Return the calls in a message of the assistant, arguments as objects.

    Raises:
        PromptError: one is wrong.
    """
    if not isinstance(calls, (list, tuple)) or len(calls) > MAX_CALLS:
        raise PromptError(f"{place}: expected a list of {MAX_CALLS} calls at most")
    return [_read_call(f"{place}[{index}]", call) for index, call in enumerate(calls)]


def _read_call(place: str, call: Any) -> dict[str, Any]:
    if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
        raise PromptError(f'{place}: expected {{"id": …, "function": {{"name", "arguments"}}}}')
    function = call["function"]
    unknown = [*(call.keys() - {"id", "type", "function", "index"})]
    unknown += function.keys() - {"name", "arguments"}
    if unknown or call.get("type", "function") != "function":
        told = f"{unknown[0]!r:.60}" if unknown else f"type {call['type']!r:.60}"
        raise PromptError(f"{place}: {told} is not known: expected id, type and function")
    name, arguments = function.get("name"), function.get("arguments", {})
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise PromptError(f"{place}: name is {name!r:.80}, expected a function's")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise PromptError(f"{place}: the arguments are not JSON") from None
    if not isinstance(arguments, dict):
        raise PromptError(f"{place}: the arguments are no object")
    _check_depth(place, arguments)
    given = {"id": call["id"]} if call.get("id") is not None else {}
    if not isinstance(given.get("id", ""), str):
        raise PromptError(f"{place}: id is {type(call['id']).__name__}, expected a text")
    return {"type": "function", **given, "function": {"name": name, "arguments": arguments}}


def _check_depth(place: str, data: Any) -> None:
    level, depth = [data], 0
    while level:
        if (depth := depth + 1) > MAX_DEPTH:
            raise PromptError(f"{place}: more than {MAX_DEPTH} objects and lists in each other")
        inner = [one.values() if isinstance(one, Mapping) else one for one in level]
        level = [
            value for values in inner for value in values
            if isinstance(value, (Mapping, list, tuple))
        ]  # fmt: skip


@lru_cache(maxsize=8)
def tool_places(template: str, parts: bool) -> ToolPlaces:
    """Return what a chat template writes of tools, found by rendering probes. ``parts``: it takes
    contents as lists of parts."""
    from mobilevlm.templates.chat_template import render_template  # brings Jinja

    def rendered(*more: dict[str, Any], tools: list[dict[str, Any]] | None = None) -> str:
        said = [{"role": "user", "content": "probe"}, *more]
        messages = [{**one, "content": _content(one["content"], parts)} for one in said]
        try:
            return render_template(
                template, messages=messages, tools=tools, add_generation_prompt=False,
                bos_token="", eos_token="",
            )  # fmt: skip
        except PromptError:
            return ""

    function = {"name": _PROBE, "description": "probe", "parameters": {"type": "object"}}
    call = {"type": "function", "id": "call_1", "function": {
        "name": _PROBE, "arguments": {"key": "value"},
    }}  # fmt: skip
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "content": _RESULT, "tool_call_id": "call_1", "name": _PROBE}
    called, told = rendered(calling), rendered(calling, result)
    of_others = [rendered(calling, {"role": role, "content": _RESULT}) for role in _SPEAKERS]
    before, _, after = rendered({"role": "assistant", "content": _ANSWER}).partition(_ANSWER)
    form = None
    if after and called.startswith(before) and called.endswith(after):
        match = _CALL.fullmatch(called[len(before) : len(called) - len(after)])
        form = match and CallForm(match["begin"], match["end"], match["key"])
    return ToolPlaces(
        _PROBE in rendered(tools=[{"type": "function", "function": function}]),
        _PROBE in called,
        _PROBE in called and _RESULT in told and told not in of_others,
        form,
    )


def _content(text: str, parts: bool) -> Any:
    return ([{"type": "text", "text": text}] if text else []) if parts else text


def check_places(places: ToolPlaces, messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuse messages with calls or results of tools that a template would leave out.

    Raises:
        PromptError: it would.
    """
    for message in messages:
        if "tool_calls" in message and not places.calls:
            raise PromptError("this model's chat template has no place for calls of tools")
        if message["role"] == "tool" and not places.results:
            raise PromptError(
                "this model's chat template has no place for messages of the role tool: say it in "
                "a message of the user"
            )

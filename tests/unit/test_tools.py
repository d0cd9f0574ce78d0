"""Tools: shown to the model by its chat template, called in answers, results read."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import HUB_FIXTURES, fixture_named
from tools import TEMPLATE, TOOLS, calling, result

from mobilevlm.errors import PromptError
from mobilevlm.runtime import VLM
from mobilevlm.runtime.answer.tool_calls import CallReader, ToolCall, ToolUse
from mobilevlm.tools import MAX_DEPTH, CallForm, tool_places

QUESTION: dict[str, Any] = {"role": "user", "content": "How many?"}
FORM = CallForm("<tool_call>\n", "\n</tool_call>", "arguments")
CALL = '<tool_call>\n{"name": "count_birds", "arguments": {"place": "here"}}\n</tool_call>'
BIRDS = ToolCall("count_birds", {"place": "here"})


def with_template(vlm: VLM, monkeypatch: pytest.MonkeyPatch, template: str = TEMPLATE) -> VLM:
    monkeypatch.setitem(vlm.spec.conversation.__dict__, "chat_template", template)
    return vlm


def text_of(vlm: VLM, messages: list[Any], **options: Any) -> str:
    """The prompt in its template."""
    tools = options.pop("tools", ())
    return vlm._prompts._read(messages, [], False, options.get("special_tokens", True),
                              None, tools)[0]  # fmt: skip


def test_the_form_of_calls_is_found_in_the_template() -> None:
    places = tool_places(TEMPLATE, False)
    assert (places.definitions, places.calls, places.results) == (True, True, True)
    assert places.form == FORM
    assert tool_places(TEMPLATE, True) == places
    other = TEMPLATE.replace("<tool_call>", "[CALL]").replace("</tool_call>", "[END]")
    form = tool_places(other.replace('"arguments"', '"parameters"'), False).form
    assert form == CallForm("[CALL]\n", "\n[END]", "parameters")


@pytest.mark.parametrize("name", HUB_FIXTURES)
def test_qwen3_vl_alone_of_the_families_has_tools_in_its_template(name: str) -> None:
    conversation = fixture_named(name).model.spec.conversation
    assert conversation.chat_template is not None
    places = tool_places(conversation.chat_template, conversation.parts)
    has = name == "qwen3_vl"
    assert (places.definitions, places.calls, places.form) == (has, has, FORM if has else None)


@pytest.mark.parametrize("left_out", ["<tool_call>\n", "\n</tool_call>", '"name": '])
def test_calls_that_are_not_json_between_marks_have_no_form(left_out: str) -> None:
    assert left_out in TEMPLATE
    places = tool_places(TEMPLATE.replace(left_out, ""), False)
    assert places.calls and places.form is None


def test_the_prompt_has_tools_calls_and_results(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with_template(vlm, monkeypatch)
    arguments = {"place": "here", "count": 1}
    for given in (arguments, json.dumps(arguments)):
        said = [QUESTION, calling("count_birds", given), result("3 birds"), QUESTION]
        assert text_of(vlm, said, tools=TOOLS) == (
            f"<tools>{json.dumps(TOOLS[0])}{json.dumps(TOOLS[1])}</tools>\n"
            "user: How many?\n"
            'assistant: <tool_call>\n{"name": "count_birds", "arguments": '
            '{"place": "here", "count": 1}}\n</tool_call>\n'
            "tool: 3 birds\nuser: How many?\nassistant: "
        )
    parts = [QUESTION, calling("count_birds", {}), result([{"type": "text", "text": "3 birds"}])]
    assert text_of(vlm, parts).endswith("tool: 3 birds\nassistant: ")


def test_special_tokens_in_tools_and_results_are_words(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_template(vlm, monkeypatch)
    tool = {"type": "function", "function": {"name": "f", "description": "</s><image>"}}
    said = [QUESTION, calling("f", {"a</s>": "</s><image>"}), result("</s><image>")]
    text = text_of(vlm, said, tools=[tool], special_tokens=False)
    assert "</s>" not in text and "<image>" not in text
    assert text.replace("\ufdd0", "").count("</s>") == 4
    assert "<image>" not in text_of(vlm, said, tools=[tool])


def test_the_tools_are_part_of_the_prompt_unless_none_may_be_called(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_template(vlm, monkeypatch)
    few: Any = {"max_new_tokens": 1}
    bare = vlm.generate([QUESTION], **few).prompt_tokens  # type: ignore[list-item]
    shown = vlm.generate([QUESTION], tools=TOOLS, **few).prompt_tokens  # type: ignore[list-item]
    hidden = vlm.generate([QUESTION], tools=TOOLS, tool_choice="none", **few)  # type: ignore[list-item]
    assert shown > bare + 100 and hidden.prompt_tokens == bare


def read(*pieces: str, names: str = "count_birds") -> tuple[str, list[ToolCall]]:
    """Text and calls of an answer in pieces."""
    tools = [{"type": "function", "function": {"name": name}} for name in names.split()]
    found: list[ToolCall] = []
    reader = CallReader(ToolUse(tuple(tools), FORM), found)
    text = "".join(map(reader.add, pieces))
    return text + reader.finish(), found


@pytest.mark.parametrize(
    ("answer", "text", "calls"),
    [
        ("There are 3.", "There are 3.", []),
        (" 3 < 4 <tool ", " 3 < 4 <tool ", []),
        (CALL, "", [BIRDS]),
        (f"I look.\n{CALL}\n{CALL}\n", "I look.", [BIRDS, BIRDS]),
        (f"{CALL} There.", " There.", [BIRDS]),
        (CALL.removesuffix("\n</tool_call>"), "", [BIRDS]),
        (CALL.replace("birds", "boats"), CALL.replace("birds", "boats"), []),
        (CALL.replace('"here"', "here"), CALL.replace('"here"', "here"), []),
        (f"<tool_call>no\n</tool_call>\n{CALL}", "<tool_call>no\n</tool_call>", [BIRDS]),
        (CALL.replace("{", "[", 1), CALL.replace("{", "[", 1), []),
        ('<tool_call>{"name": ["a"], "arguments": {}}</tool_call>',) * 2 + ([],),
        (CALL.replace("here", "</tool_call>"), "",
         [ToolCall("count_birds", {"place": "</tool_call>"})]),
    ],
)  # fmt: skip
def test_calls_are_taken_out_of_the_text_whatever_the_pieces(
    answer: str, text: str, calls: list[ToolCall]
) -> None:
    assert read(answer) == (text, calls)
    assert read(*answer) == (text, calls)
    assert read(*(answer[start : start + 7] for start in range(0, len(answer), 7))) == (text, calls)


def test_text_is_given_as_soon_as_it_cannot_become_a_call() -> None:
    reader = CallReader(ToolUse(tuple(TOOLS), FORM), [])
    assert [reader.add(piece) for piece in ("a <", "tool", "x b")] == ["a", "", " <toolx b"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {
    "name": "count_boats"}}])  # fmt: skip
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_an_answer_that_must_be_calls_is_calls(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch, choice: Any, temperature: float
) -> None:
    pytest.importorskip("llguidance", reason="pip install '.[structured]'")
    with_template(vlm, monkeypatch)
    stream = vlm.stream(
        [QUESTION], tools=TOOLS, tool_choice=choice, parallel_tool_calls=False,  # type: ignore[list-item]
        max_new_tokens=200, temperature=temperature, seed=3,
    )  # fmt: skip
    answer = stream.finish()
    assert answer.text == "" and answer.finish_reason == "stop"
    [call] = answer.tool_calls
    assert call.name in (
        ["count_boats"] if isinstance(choice, dict) else ["count_birds", "count_boats"]
    )
    assert call.arguments.keys() == {"place", "count"}
    assert call.arguments["place"] in ("here", "there") and call.arguments["count"] in (1, 2)
    assert stream.tool_calls == [call]


def wrong_tool(**function: Any) -> list[Any]:
    return [{"type": "function", "function": function}]


def nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"a": value}
    return value


WRONG: list[tuple[list[Any], dict[str, Any], str]] = [
    ([QUESTION], {"tools": {}}, "tools is dict, expected a list"),
    ([QUESTION], {"tools": "f"}, "tools is str, expected a list"),
    ([QUESTION], {"tools": [3]}, r"tools\[0\]: expected"),
    ([QUESTION], {"tools": wrong_tool(name="a b")}, r"tools\[0\].function.name is 'a b'"),
    ([QUESTION], {"tools": wrong_tool(name="a", colour=1)}, "'colour' is not known"),
    ([QUESTION], {"tools": wrong_tool(name="a", description=1)}, "description is int"),
    ([QUESTION], {"tools": wrong_tool(name="a", parameters={"type": "array"})}, "its type is"),
    ([QUESTION], {"tools": wrong_tool(name="a", parameters=nested(MAX_DEPTH))}, "more than 64"),
    ([QUESTION], {"tools": [TOOLS[0], TOOLS[0]]}, "two are called 'count_birds'"),
    ([QUESTION], {"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice is 'maybe'"),
    ([QUESTION], {"tool_choice": "required"}, "there are no tools"),
    ([QUESTION], {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
     "no tool is called 'x'"),
    ([QUESTION], {"tools": TOOLS, "json_schema": {}}, "do not go together"),
    ([QUESTION, {"role": "assistant", "tool_calls": [{}]}, QUESTION], {}, r"tool_calls\[0\]"),
    ([QUESTION, calling("f", "{"), QUESTION], {}, "the arguments are not JSON"),
    ([QUESTION, calling("f", "3"), QUESTION], {}, "the arguments are no object"),
    ([QUESTION, calling("f", nested(MAX_DEPTH)), QUESTION], {}, "more than 64"),
    ([QUESTION, calling("f", {}), result("3", "call_2")], {}, "'call_2' is of no call before"),
    ([QUESTION, calling("f", {}), result(None)], {}, "it has no content"),
    ([QUESTION, {"role": "tool", "tool_call_id": 3, "content": "a"}], {}, "tool_call_id is int"),
    ([{**QUESTION, "tool_calls": [{}]}], {}, "'tool_calls' is not known"),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "options", "expected"), WRONG, ids=lambda v: str(v)[:40])
def test_what_is_wrong_is_named_in_one_line(
    vlm: VLM,
    monkeypatch: pytest.MonkeyPatch,
    messages: list[Any],
    options: dict[str, Any],
    expected: str,
) -> None:
    with_template(vlm, monkeypatch)
    with pytest.raises(PromptError, match=expected) as caught:
        vlm.stream(messages, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_template_without_a_place_for_them_refuses_tools(vlm: VLM) -> None:
    with pytest.raises(PromptError, match="has no place for them"):
        vlm.stream([QUESTION], tools=TOOLS)  # type: ignore[list-item]
    with pytest.raises(PromptError, match="role tool"):
        vlm.stream([QUESTION, {"role": "tool", "content": "3"}])  # type: ignore[list-item]
    taken = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ m.tool_calls }}{% endfor %}"
    for speaker in ("user", "assistant"):
        template = taken.replace("m.role", f"m.role.replace('tool', '{speaker}')")
        assert not tool_places(template, False).results
    with pytest.raises(PromptError, match="place for calls of tools"):
        vlm.stream([QUESTION, calling("f", {}), QUESTION])  # type: ignore[list-item]


def test_a_form_that_is_not_read_refuses_tools(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with_template(vlm, monkeypatch, TEMPLATE.replace("\n</tool_call>", ""))
    with pytest.raises(PromptError, match="in a form that is not read here"):
        vlm.stream([QUESTION], tools=TOOLS)  # type: ignore[list-item]

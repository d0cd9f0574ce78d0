"""Examples before the questions of a suite."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mobilevlm.errors import PromptError, SuiteError
from mobilevlm.runtime import VLM
from mobilevlm.runtime.suites.evaluate import evaluate, read_questions
from mobilevlm.runtime.suites.question import Question, Suite
from mobilevlm.runtime.suites.registry import NAMES, find_suite
from mobilevlm.runtime.suites.shots import messages

pytestmark = pytest.mark.pure
RED, BLUE = b"red", b"blue"
EXAMPLES = [
    Question("d1", "One <image>?", (lambda: RED,), ("A",), "art", lead="About art.\n"),
    Question("d2", "Two?", (), ("b", "c", "c"), "art", lead="About art.\n"),
    Question("d3", "Three?", (), ("C",), "math"),
]
QUESTIONS = [
    Question("t1", "What <image> is <image>?", (lambda: BLUE, lambda: RED), ("A",), "art",
             lead="About art.\n"),
    Question("t2", "Which?", (lambda: BLUE,), ("A",), "art", lead="About art.\n"),
]  # fmt: skip
SUITE = Suite(
    "mmmu",
    lambda data, split: EXAMPLES if split == "dev" else QUESTIONS,
    lambda question, answer: 1.0,
    8,
    split="validation",
    shots="dev",
)


def part(value: str | bytes) -> dict[str, Any]:
    text = isinstance(value, str)
    return {"type": "text", "text": value} if text else {"type": "image", "image": value}


def test_examples_of_the_kind_are_earlier_turns_with_their_images() -> None:
    first, second = read_questions(SUITE, Path(), shots=2)
    turns = messages(first)
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2 + ["user"]
    assert turns[0]["content"] == [part("About art.\nOne "), part(RED), part("?")]
    assert [turns[1]["content"], turns[3]["content"]] == ["A", "c"], "what most people said"
    asked: list[str | bytes] = ["What ", BLUE, " is ", RED, "?"]
    assert turns[4]["content"] == [part(value) for value in asked], "the lead stands once"
    assert messages(second)[4]["content"] == [part(BLUE), part("Which?")]


def test_without_examples_the_lead_stands_before_the_question() -> None:
    first, _ = read_questions(SUITE, Path())
    assert first.prompt == "About art.\nWhat <image> is <image>?" and not first.examples


def test_suites_without_examples_and_kinds_with_too_few_are_refused() -> None:
    with pytest.raises(SuiteError, match="the suite 'pope' has no examples: leave it out"):
        read_questions(replace(SUITE, name="pope", shots=""), Path(), shots=1)
    with pytest.raises(SuiteError, match=r"--shots 3: 'dev' has 2 examples of art"):
        read_questions(SUITE, Path(), shots=3)
    same = replace(SUITE, read=lambda data, split: QUESTIONS)
    with pytest.raises(SuiteError, match="would be the questions themselves: give the folder"):
        read_questions(same, Path(), shots=1)


def test_the_command_names_the_suites_with_examples() -> None:
    from mobilevlm.cli.eval import command

    (said,) = [option.help for option in command.params if option.name == "shots"]
    assert said is not None
    for name in NAMES:
        assert (name in said.replace("(", " ").replace(",", " ").replace(")", " ").split()) == bool(
            find_suite(name).shots
        )


class Model:
    """In place of a model: a context of so many turns."""

    def __init__(self, turns: int) -> None:
        named = SimpleNamespace(name="model")
        manifest = SimpleNamespace(spec=named, recipe=named)
        self.bundle = SimpleNamespace(digest="0" * 64, folder=Path("model"), manifest=manifest)
        self.engine, self.asked, self._turns = "onnx", 0, turns

    def generate(self, prompt: Any, max_new_tokens: int) -> Any:
        self.asked += 1
        if len(prompt) > self._turns:
            raise PromptError("the prompt takes 900 tokens, the context holds 512")
        return SimpleNamespace(text="A", token_seconds=[])


def test_examples_that_do_not_fit_are_refused_before_the_first_question(tmp_path: Path) -> None:
    asked = read_questions(SUITE, Path(), shots=2)
    small = Model(turns=3)
    with pytest.raises(SuiteError, match=r"--shots 2: t1: the prompt takes 900 .* fewer examples"):
        evaluate(cast(VLM, small), SUITE, asked, tmp_path)
    assert small.asked == 1
    assert evaluate(cast(VLM, Model(5)), SUITE, asked, tmp_path).overall.right == 2
    again, other = Model(5), Model(5)
    evaluate(cast(VLM, again), SUITE, asked, tmp_path)
    assert again.asked == 1, "from the stored answers"
    evaluate(cast(VLM, other), SUITE, read_questions(SUITE, Path(), shots=1), tmp_path)
    assert other.asked == 3, "with other examples the questions are others"

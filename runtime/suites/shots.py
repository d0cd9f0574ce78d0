"""Examples before a question: earlier turns of the conversation, asked and answered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mobilevlm.console.terminal import shown
from mobilevlm.errors import SuiteError
from mobilevlm.messages import Message
from mobilevlm.runtime.suites.question import Question, Suite
from mobilevlm.spec import IMAGE_PLACEHOLDER


def with_examples(
    suite: Suite, questions: Sequence[Question], data: Path, count: int
) -> list[Question]:
    """Return the questions with so many examples each: the first of their kind.

    Raises:
        SuiteError: the suite or the data have none, or not as many of a kind.
    """
    if not suite.shots:
        raise SuiteError(f"--shots: the suite {suite.name!r} has no examples: leave it out")
    examples = suite.read(data, suite.shots)
    if {example.prompt for example in examples} <= {question.prompt for question in questions}:
        raise SuiteError(
            f"{data}: the examples would be the questions themselves: give the folder that has the "
            f"files of {suite.shots!r} beside those that are asked"
        )
    by_kind: dict[str, list[Question]] = {}
    for example in examples:
        by_kind.setdefault(example.kind, []).append(example)
    for kind in dict.fromkeys(question.kind for question in questions):
        there = len(by_kind.get(kind, ()))
        if there < count:
            of_kind = f" of {shown(kind, 60)}" if kind else ""
            raise SuiteError(
                f"{data}: --shots {count}: {suite.shots!r} has {there} examples{of_kind}"
            )
    return [replace(question, examples=_led(by_kind[question.kind][:count], question.lead), lead="")
            for question in questions]  # fmt: skip


def _led(examples: Sequence[Question], lead: str) -> tuple[Question, ...]:
    first, *others = examples
    return replace(first, prompt=lead + first.prompt, lead=""), *others


def without_examples(questions: Sequence[Question]) -> list[Question]:
    """Return the questions with their leads in their prompts."""
    return [replace(question, prompt=question.lead + question.prompt, lead="") if question.lead
            else question for question in questions]  # fmt: skip


def messages(question: Question) -> list[Message]:
    """Return the turns of a question with examples; images are read."""
    turns: list[Message] = []
    for example in question.examples:
        (answer, _), *_ = Counter(example.answers).most_common(1)
        turns += [_user(example), {"role": "assistant", "content": answer}]
    return [*turns, _user(question)]


def _user(question: Question) -> Message:
    """Return a turn with its images where they are marked, else before the text."""
    images = [{"type": "image", "image": read()} for read in question.images]
    texts = question.prompt.split(IMAGE_PLACEHOLDER)
    if len(texts) == 1:
        return {"role": "user", "content": [*images, {"type": "text", "text": texts[0]}]}
    parts: list[dict[str, Any]] = []
    for text, image in zip(texts, [*images, None], strict=True):
        parts += [{"type": "text", "text": text}] if text else []
        parts += [image] if image else []
    return {"role": "user", "content": parts}

"""The built-in questions about drawn scenes, as a suite whose answers can be compared."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from PIL import Image

from mobilevlm.nano.evaluate import LONGEST_ANSWER, is_right
from mobilevlm.nano.suite import Example, evaluation_set, images_of
from mobilevlm.runtime.suites.question import Question, Suite


def scenes_suite(count: int) -> Suite:
    """Return the suite of so many questions, without data."""
    examples = {str(index): example for index, example in enumerate(evaluation_set(count))}

    def read(data: Path, split: str) -> list[Question]:
        return [_question(name, example) for name, example in examples.items()]

    def judge(question: Question, answer: str) -> float:
        return float(is_right(examples[question.id].question, answer))

    return Suite("scenes", read, judge, LONGEST_ANSWER)


def _question(name: str, example: Example) -> Question:
    asked = example.question
    images = tuple(partial(_image, example, index) for index in range(len(example.seeds)))
    return Question(name, asked.text, images, (asked.truth,), asked.kind, tuple(asked.choices))


def _image(example: Example, index: int) -> Image.Image:
    return images_of(example)[index]

"""Prompts of calibration data, against what models are measured on."""

from __future__ import annotations

import re

import pytest
from real.quality import QUESTIONS
from real.text import default_texts, read_text

from mobilevlm.export.calibration.prompts import IMAGES, TEXTS
from mobilevlm.export.quality.passages import PASSAGES, PROMPT, QUESTION

MEASURED = {
    "passages": (PROMPT, PASSAGES, QUESTION),
    "questions": QUESTIONS,
    **{name: (read_text(name),) for name in default_texts()},
}
SUBJECTS = (
    "python", "exception", "expression", "class", "method", "attribute", "tuple", "operator",
    "argument", "command", "licence", "license", "software", "warranty", "copying",
    "lighthouse", "fishermen", "sunlight", "atmosphere", "awning",
    "capital", "sky", "sea", "energy", "romeo", "virus", "vaccine", "pancake", "recipe", "curie",
    "desert", "meeting",
)  # fmt: skip
"""Subjects of the passages, the questions and the texts of benchmarks/real"""


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def runs(text: str, length: int) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + length]) for i in range(len(found) - length + 1)}


@pytest.mark.parametrize("name", MEASURED)
def test_no_prompt_shares_a_run_of_five_words_with_what_models_are_measured_on(name: str) -> None:
    measured = set().union(*(runs(text, 5) for text in MEASURED[name]))
    assert {run for prompt in (*TEXTS, *IMAGES) for run in runs(prompt, 5)} & measured == set()


def test_no_prompt_is_about_what_models_are_measured_on() -> None:
    pattern = re.compile(rf"\b({'|'.join(SUBJECTS)})(s|es)?\b")
    assert [prompt for prompt in (*TEXTS, *IMAGES) if pattern.search(prompt.lower())] == []


def test_prompts_differ() -> None:
    assert len(set(TEXTS)) == len(TEXTS) == 32

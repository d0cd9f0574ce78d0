"""MMMU and MMMU-Pro (Yue et al. 2023, 2024): multiple choice and open questions of 30 subjects.

Answers are read by the official rules. Where no choice can be read the official code draws one;
here the question's id draws it, the same in every run.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from mobilevlm.console.terminal import shown
from mobilevlm.errors import SuiteError
from mobilevlm.runtime.suites.question import (
    Judged,
    OpenImage,
    Question,
    Suite,
    drawn_letter,
    letters,
    mean_scores,
)
from mobilevlm.runtime.suites.rows import Row, read_rows

LETTER = "\n\nAnswer with the option's letter from the given choices directly."
SHORT = "\nAnswer the question using a single word or phrase."
PRO_LETTER = "Answer with the option letter from the given choices directly."
PRO_VISION = (
    f"{PRO_LETTER} The last line of your response should be of the following format: "
    "'Answer: $LETTER' (without quotes) where LETTER is one of options."
)
DOMAINS = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine "
    "Diagnostics_and_Laboratory_Medicine Pharmacy Public_Health",
    "Humanities and Social Science": "History Literature Sociology Psychology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics "
    "Energy_and_Power Materials Mechanical_Engineering",
}
"""Subjects by domain."""
DOMAIN_OF = {subject: name for name, subjects in DOMAINS.items() for subject in subjects.split()}
MARK = re.compile(r"<image (\d+)>")
EDGES = ",.!?;:'"
"""Marks that an answer loses at its ends, each once around in this order."""
KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
"""Words after which an open answer is said."""
NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)
"""With commas, scientific, plain."""
Value: TypeAlias = "str | float"


def read_choice(answer: str, choices: Sequence[str]) -> str:
    """Return the letter that an answer says, or an empty text: ``(B)``, else ``B`` as a word, else
    in a sentence a choice's text; of several the last."""
    said = answer
    for mark in EDGES:
        said = said.strip(mark)
    said = f" {said} "
    for form in ("({})", " {} "):
        found = [(said.rfind(form.format(name)), name) for name in letters(len(choices))]
        if (last := max(found, key=_place))[0] >= 0:
            return last[1]
    return _said_text(said, choices)


def read_pro_choice(answer: str, choices: Sequence[str]) -> str:
    """Return the letter that an answer to MMMU-Pro says, or an empty text: the only one after the
    last ``Answer:``, else ``(B)``, ``B `` and ``B.``, else a choice's text."""
    names = letters(len(choices))
    _, mark, tail = answer.rpartition("Answer:")
    stated = [name for name in names if mark and name in tail.strip()]
    if len(stated) == 1:
        return stated[0]
    said = answer
    for mark in EDGES:
        said = said.strip(mark)
    said = f" {said} "
    for form in ("({})", "{} ", "{}."):
        held = [name for name in names if form.format(name) in said]
        if held:
            # Whatever the form, the official code looks for the last one as a word.
            place = form if form == "({})" else " {} "
            return max((said.rfind(place.format(name)), -names.index(name), name)
                       for name in held)[2]  # fmt: skip
    return _said_text(said, choices)


def _place(found: tuple[int, str]) -> int:
    return found[0]


def _said_text(said: str, choices: Sequence[str]) -> str:
    """Return the letter of the choice whose text stands last in a sentence of more than five
    words."""
    if len(said.split()) <= 5:
        return ""
    lower = said.lower()
    found = [
        (lower.rfind(choice.lower()), name)
        for name, choice in zip(letters(len(choices)), choices, strict=True)
    ]
    last = max(found, key=_place, default=(-1, ""))
    return last[1] if last[0] >= 0 else ""


def normalized(text: str) -> list[Value]:
    """Return a number rounded to two places, or text in lower case; a single letter with a space
    before or behind, so that it is not found inside words."""
    said = text.strip()
    try:
        return [round(float(said.replace(",", "")), 2)]
    except ValueError:
        said = said.lower()
        return [f" {said}", f"{said} "] if len(said) == 1 else [said]


def open_values(answer: str) -> list[Value]:
    """Return what an open answer says: the shortest text after a key word of each line, or the
    whole answer, and the numbers in it."""
    said = answer.strip().strip(".").lower()
    parts = re.split(r"\.\s(?=[A-Z])|\n", said)
    keyed = []
    for index, part in enumerate(parts):
        keys = (*KEYS, "=") if index == len(parts) - 1 else KEYS
        tails = [part.split(key)[-1].strip() for key in keys if key in part]
        shortest = _shortest(tails)
        if shortest and shortest not in tuple(EDGES):
            keyed.append(shortest)
    found = keyed or [said]
    texts = found + [
        number for text in found for form in NUMBERS for number in re.findall(form, text)
    ]
    return [value for text in texts for value in normalized(text)]


def _shortest(tails: Sequence[str]) -> str:
    """Return the shortest text; after an empty one the next counts, as in the official loop."""
    shortest = ""
    for tail in tails:
        if not shortest or len(tail) < len(shortest):
            shortest = tail
    return shortest


def open_match(answer: str, truths: Sequence[str]) -> bool:
    """Return whether an open answer holds a truth: text inside text, or the same number."""
    true = [value for truth in truths for value in normalized(truth)]
    for value in open_values(answer):
        if isinstance(value, str):
            if any(isinstance(other, str) and other in value for other in true):
                return True
        elif value in true:
            return True
    return False


def read_mmmu(data: Path, split: str) -> list[Question]:
    """Read MMMU's parquet files, one folder a subject."""
    return [_question(row) for row in read_rows(data, split)]


def _question(row: Row) -> Question:
    name = str(row.need("id"))
    subject = re.sub(r"^[^_]+_|_\d+$", "", name)
    choices = _listed(row, "options")
    truths = _listed(row, "answer") or (str(row.need("answer")).strip(),)
    question = str(row.need("question"))
    if row.text("question_type") == "multiple-choice" or (choices and not row.get("question_type")):
        lines = [f"({name}) {text}" for name, text in zip(letters(len(choices)), choices,
                                                          strict=True)]  # fmt: skip
        prompt, images = with_images(f"{question}\n" + "\n".join(lines) + LETTER, row)
        return Question(name, prompt, images, truths, subject, choices)
    prompt, images = with_images(question + SHORT, row)
    return Question(name, prompt, images, truths, subject)


def _listed(row: Row, column: str) -> tuple[str, ...]:
    """Return a list that a column holds as Python text, or as it is; empty where it is no list."""
    value = row.get(column)
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise SuiteError(
                f"{row.place}: {column}: no list of texts: {shown(value, 80)}"
            ) from None
    return tuple(map(str, value)) if isinstance(value, (list, tuple)) else ()


def with_images(text: str, row: Row) -> tuple[str, tuple[OpenImage, ...]]:
    """Return a prompt with ``<image>`` for each ``<image N>``, and these images; without marks the
    first image goes before the text."""
    numbers = MARK.findall(text)
    images = tuple(row.need_image(f"image_{number}") for number in numbers)
    if not images:
        first = row.image("image_1", "image")
        images = () if first is None else (first,)
    return MARK.sub("<image>", text), images


def read_mmmu_pro(data: Path, split: str) -> list[Question]:
    """Read MMMU-Pro: the standard sets, whose options are in the prompt, or the vision set, whose
    question is in the image."""
    found = []
    for row in read_rows(data, split):
        choices, name = _listed(row, "options"), str(row.need("id"))
        images: tuple[OpenImage, ...]
        if row.get("question") is None:
            prompt, images = PRO_VISION, (row.need_image("image"),)
        else:
            lines = [f"{letter}. {text}" for letter, text in
                     zip(letters(len(choices)), choices, strict=True)]  # fmt: skip
            text = f"{row.need('question')}\n" + "\n".join(lines) + f"\n{PRO_LETTER}"
            prompt, images = with_images(text, row)
        truth = str(row.need("answer")).strip()
        kind = row.text("subject") or re.sub(r"^[^_]+_|_\d+$", "", name)
        found.append(Question(name, prompt, images, (truth,), kind, choices))
    return found


def judge_mmmu(question: Question, answer: str) -> float:
    """Return whether an answer to MMMU is right."""
    if not question.choices:
        return float(open_match(answer, question.answers))
    said = read_choice(answer, question.choices) or drawn_letter(question)
    return float(said in question.answers)


def judge_mmmu_pro(question: Question, answer: str) -> float:
    """Return whether an answer to MMMU-Pro is right."""
    said = read_pro_choice(answer, question.choices) or drawn_letter(question)
    return float(said in question.answers)


def mmmu_figures(judged: Sequence[Judged]) -> dict[str, float]:
    """Return the accuracy of each domain: the mean over its questions, as the official script has
    it, and so is the accuracy of all."""
    found = mean_scores(judged, DOMAIN_OF)
    return {name: found[name] for name in DOMAINS if name in found}


SUITES = (
    Suite("mmmu", read_mmmu, judge_mmmu, 128, split="validation", figures=mmmu_figures,
          shots="dev"),
    Suite("mmmu-pro", read_mmmu_pro, judge_mmmu_pro, 128, split="test"),
)  # fmt: skip

"""Suites of multiple choice: ScienceQA, MMBench with CircularEval and SEED-Bench."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mobilevlm.console.terminal import shown
from mobilevlm.errors import SuiteError
from mobilevlm.runtime.suites.question import Judged, OpenImage, Question, Suite, letters
from mobilevlm.runtime.suites.rows import Row, read_rows

LETTER = "\nAnswer with the option's letter from the given choices directly."
PUNCTUATION = ".()[],:;!*#{}"
"""Separates words when a letter is looked for (VLMEvalKit)."""
LAST_WORDS = 4
"""Words at the end of an answer among which a letter by itself counts."""
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
"""Texts by which an answer is wrong, whatever else it says."""
STATED = re.compile(r"answer\s+is\s+\**([A-D])\**", re.IGNORECASE)
TURN = 10**6
"""Added to a question's index in MMBench's files for each turn of its choices."""


def listed(choices: Sequence[str]) -> str:
    """Return the choices as lines ``A. …``."""
    names = letters(len(choices))
    return "\n".join(f"{name}. {choice}" for name, choice in zip(names, choices, strict=True))


def matched_choice(answer: str, choices: Sequence[str]) -> str:
    """Return the letter that an answer says, or an empty text: the only letter among its words, if
    it is one of the last four, else a letter after ``answer is``, else the only choice whose text
    is in a short answer. This is what VLMEvalKit does before it asks another model."""
    words = "".join(" " if letter in PUNCTUATION else letter for letter in answer).split()
    names = letters(len(choices))
    said = [name for name in names if name in words]
    if any(text in answer for text in REFUSALS) or (not said and "Z" in words):
        return ""
    if len(said) == 1 and words.index(said[0]) >= len(words) - LAST_WORDS:
        return said[0]
    stated = STATED.search(answer)
    if stated and stated[1].upper() in names:
        return stated[1].upper()
    lower = answer.lower()
    if len(lower) > 2 * sum(map(len, choices)):
        return ""
    held = [name for name, choice in zip(names, choices, strict=True) if choice.lower() in lower]
    return held[0] if len(held) == 1 else ""


def scienceqa_choice(answer: str, count: int) -> str:
    """Return the letter that an answer is, begins with (``B. …``) or states as ``The answer is
    B.``, or an empty text (LLaVA's reading)."""
    names = letters(count)
    said = answer.strip()
    if said in names:
        return said
    if len(said) >= 3 and said[0] in names and said[1:3] == ". ":
        return said[0]
    stated = re.findall(r"The answer is ([A-Z]).", said)
    return stated[0] if len(stated) == 1 and stated[0] in names else ""


def read_scienceqa(data: Path, split: str) -> list[Question]:
    """Read the questions of ScienceQA that have an image."""
    found = []
    for number, row in enumerate(read_rows(data, split)):
        image = _scienceqa_image(row)
        if image is None:
            continue
        choices = row.texts("choices")
        truth = _letter_at(row, int(row.need("answer")), choices)
        hint = row.text("hint")
        context = f"Context: {hint}\n" if hint else ""
        prompt = f"{context}{row.need('question')}\n{listed(choices)}{LETTER}"
        kind, name = row.text("subject"), row.text("id", "question_id") or str(number)
        found.append(Question(name, prompt, (image,), (truth,), kind, choices))
    return found


def _scienceqa_image(row: Row) -> OpenImage | None:
    name = row.get("image")
    if isinstance(name, str) and row.get("id") and "/" not in name and len(name) < 256:
        nested = Row(row.place, row.file, {"image": f"{row.text('id')}/{name}"}, row.folder)
        return nested.image("image")
    return row.image("image")


def _letter_at(row: Row, index: int, choices: Sequence[str]) -> str:
    if not 0 <= index < len(choices):
        raise SuiteError(f"{row.place}: answer {index}: there are {len(choices)} choices")
    return letters(len(choices))[index]


def read_mmbench(data: Path, split: str) -> list[Question]:
    """Read MMBench, each question once for each choice, the choices turned by one each time. Data
    that hold the turns themselves, as rows with a million added to their index (OpenCompass, the
    hub), are asked as they are."""
    rows = read_rows(data, split)
    images = {row.text("index"): row for row in rows}
    numbers = [_whole(row, "index") for row in rows]
    turned = any(number >= TURN for number in numbers)
    found = []
    for row, number in zip(rows, numbers, strict=True):
        choices = [row.text(name) for name in "ABCDE" if _is_there(row, name)]
        named = row.get("image")
        source = images.get(named, row) if isinstance(named, str) else row
        image = source.need_image("image")
        truth = str(row.need("answer")).strip()
        if truth not in letters(len(choices)):
            raise SuiteError(f"{row.place}: answer {truth!r}: there are {len(choices)} choices")
        kind = row.text("l2-category", "L2-category", "category")
        head = f"{row.text('hint')}\n" if _is_there(row, "hint") else ""
        for turn in range(1 if turned else len(choices)):
            group, place = (number % TURN, number // TURN) if turned else (number, turn)
            order = tuple(choices[turn:] + choices[:turn])
            right = letters(len(choices))[(ord(truth) - ord("A") - turn) % len(choices)]
            prompt = f"{head}{row.need('question')}\n{listed(order)}{LETTER}"
            found.append(
                Question(f"{group}+{place}", prompt, (image,), (right,), kind, order,
                         group=str(group))
            )  # fmt: skip
    return found


def _is_there(row: Row, name: str) -> bool:
    """Return whether a column has a text; the hub's files say ``nan`` where it has none."""
    return row.text(name) not in ("", "nan")


def _whole(row: Row, name: str) -> int:
    text = str(row.need(name))
    if not text.isdecimal():
        raise SuiteError(f"{row.place}: {name} {shown(text, 40)}: expected a whole number")
    return int(text)


def mmbench_figures(judged: Sequence[Judged]) -> dict[str, float]:
    """Return the accuracy without CircularEval: each question in its own order alone."""
    first = [item.score for item in judged if item.question.id.endswith("+0")]
    return {"vanilla_accuracy": sum(first) / len(first) if first else 0.0}


SEED_KINDS = {
    "1": "scene understanding", "2": "instance identity", "3": "instance attribute",
    "4": "instance location", "5": "instance counting", "6": "spatial relation",
    "7": "instance interaction", "8": "visual reasoning", "9": "text recognition",
}  # fmt: skip


def read_seed(data: Path, split: str) -> list[Question]:
    """Read the questions of SEED-Bench about images; those about videos are left out."""
    found = []
    for row in read_rows(data, split):
        if row.text("data_type") == "video" or row.text("question_type_id") not in SEED_KINDS:
            continue
        image = row.image("image") or row.need_image("data_id")
        choices = tuple(str(row.need(f"choice_{name}")) for name in "abcd")
        prompt = f"{row.need('question')}\n{listed(choices)}{LETTER}"
        kind = SEED_KINDS[row.text("question_type_id")]
        truth = str(row.need("answer")).strip().upper()
        name = str(row.need("question_id"))
        found.append(Question(name, prompt, (image,), (truth,), kind, choices))
    return found


def _judge_match(question: Question, answer: str) -> float:
    return float(matched_choice(answer, question.choices) == question.answers[0])


SUITES = (
    Suite(
        name="scienceqa",
        read=read_scienceqa,
        judge=lambda question, answer: float(
            scienceqa_choice(answer, len(question.choices)) == question.answers[0]
        ),
        max_new_tokens=32,
        split="test",
        shots="train",
    ),
    Suite(
        name="mmbench",
        read=read_mmbench,
        judge=_judge_match,
        max_new_tokens=32,
        measure="accuracy, CircularEval",
        split="dev",
        figures=mmbench_figures,
        grouped=True,
    ),
    Suite(name="seed", read=read_seed, judge=_judge_match, max_new_tokens=32),
)

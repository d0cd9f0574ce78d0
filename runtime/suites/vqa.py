"""Suites of short answers to many people's taste: VQAv2, TextVQA and GQA.

Answers are processed as EvalAI does it for VQA and TextVQA, those of people too: in lower case,
punctuation and articles dropped, numbers as digits, contractions with their apostrophe. VQA's old
script leaves people's answers as they are where all ten agree.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mobilevlm.runtime.suites.question import Question, Suite
from mobilevlm.runtime.suites.rows import Row, read_rows

SHORT = "\nAnswer the question using a single word or phrase."
ARTICLES = {"a", "an", "the"}
DIGITS = {
    word: str(value)
    for value, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't "
    "haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll "
    "ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't "
    "'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll "
    "somebody's someone'd someone'd've someone'll someone's something'd something'd've "
    "something'll that's there'd there'd've there're there's they'd they'd've they'll they're "
    "they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd "
    "where's where've who'd who'd've who'll who's who've why'll why're why's won't would've "
    "wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
)


_SPELLED = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}
"""Contractions by their spellings without one apostrophe; the last as in the official table."""


def normalized(answer: str) -> str:
    """Return an answer as it is compared."""
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    return _plain_words(_without_punctuation(text))


def _without_punctuation(text: str) -> str:
    """Drop a mark that stands at the edge of a word, and each in a text with a number such as
    ``1,000``; another becomes a space. Periods go, except before a digit."""
    number = re.search(r"\d,\d", text) is not None
    found = text
    for mark in PUNCTUATION:
        at_edge = f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if at_edge or number else " ")
    return re.sub(r"\.(?!\d)", "", found)


def _plain_words(text: str) -> str:
    words = (DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(_SPELLED.get(word, word) for word in words if word not in ARTICLES)


def tokenized(answer: str) -> str:
    """Return an answer as TextVQA's evaluator compares it (M4C's in MMF): commas and question marks
    go first, and ``'s`` is a word by itself."""
    return normalized(answer.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def soft_accuracy(
    answer: str, people: Sequence[str], compared: Callable[[str], str] = normalized
) -> float:
    """Return VQA's accuracy (Antol et al. 2015): min(n / 3, 1) for the n people who said the same,
    averaged over the subsets that leave one person out. ``compared``: how a text is compared."""
    said, others = compared(answer), [compared(text) for text in people]
    same = [text == said for text in others]
    agreeing = sum(same)
    parts = (min(1.0, (agreeing - held) / 3) for held in same)
    return sum(parts) / len(same) if same else 0.0


def gqa_match(answer: str, truth: str) -> float:
    """Return whether an answer is the truth, in lower case and without a period (LLaVA's
    conversion for GQA's script, which compares exactly)."""
    return float(answer.strip().rstrip(".").lower() == truth.strip().lower())


def read_vqa(data: Path, split: str) -> list[Question]:
    """Read VQAv2: rows of the hub, or the official questions and annotations, which are joined by
    ``question_id``; images beside are ``COCO_val2014_…jpg``."""
    found = []
    for row in joined(read_rows(data, split), "question_id"):
        image = row.image("image") or _coco_image(row)
        kind = row.text("answer_type")
        prompt = str(row.need("question")) + SHORT
        name = str(row.need("question_id"))
        found.append(Question(name, prompt, (image,), row.texts("answers"), kind))
    return found


def joined(rows: Sequence[Row], key: str) -> list[Row]:
    """Return rows with one key as one row, each with the columns of all of them."""
    gathered: dict[Any, Row] = {}
    for row in rows:
        name = row.need(key)
        known = gathered.get(name)
        values = {**known.values, **row.values} if known else row.values
        gathered[name] = Row((known or row).place, row.file, values, row.folder)
    return list(gathered.values())


def _coco_image(row: Row) -> Any:
    number = int(row.need("image_id"))
    name = f"COCO_val2014_{number:012}.jpg"
    return Row(row.place, row.file, {"image": name}, row.folder).need_image("image")


def read_textvqa(data: Path, split: str) -> list[Question]:
    """Read TextVQA: rows of the hub, or the official file with ``image_id`` as the image's name."""
    found = []
    for row in read_rows(data, split):
        image = row.image("image")
        if image is None:
            name = f"{row.need('image_id')}.jpg"
            image = Row(row.place, row.file, {"image": name}, row.folder).need_image("image")
        prompt = str(row.need("question")).capitalize() + SHORT
        name = str(row.need("question_id"))
        found.append(Question(name, prompt, (image,), row.texts("answers")))
    return found


def read_gqa(data: Path, split: str) -> list[Question]:
    """Read GQA: questions of the hub or the official file, with the images of the hub's second part
    or files named after ``imageId``."""
    rows = read_rows(data, split)
    images = {row.text("id"): row for row in rows if row.get("question") is None}
    found = []
    for row in rows:
        if row.get("question") is None:
            continue
        number = row.text("imageId")
        if number in images:
            image = images[number].need_image("image")
        else:
            named = Row(row.place, row.file, {"image": f"{number}.jpg"}, row.folder)
            image = row.image("image") or named.need_image("image")
        types = row.get("types")
        kind = str(types.get("structural", "")) if isinstance(types, dict) else ""
        prompt = str(row.need("question")) + SHORT
        found.append(Question(str(row.need("id")), prompt, (image,), row.texts("answer"), kind))
    return found


def _judge_people(question: Question, answer: str) -> float:
    return soft_accuracy(answer, question.answers)


def _judge_textvqa(question: Question, answer: str) -> float:
    return soft_accuracy(answer, question.answers, tokenized)


SUITES = (
    Suite("vqav2", read_vqa, _judge_people, 16, "soft accuracy", "validation"),
    Suite("textvqa", read_textvqa, _judge_textvqa, 16, "soft accuracy", "validation",
          shots="train"),
    Suite("gqa", read_gqa, lambda q, answer: gqa_match(answer, q.answers[0]), 16, split="testdev"),
)  # fmt: skip

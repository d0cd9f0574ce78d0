"""A question of a benchmark, its judged answer, and a benchmark as a table of functions."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from mobilevlm.image import ImageInput

OpenImage: TypeAlias = Callable[[], ImageInput]
"""Reads an image when its question is asked: all images of a suite may not fit in memory."""


@dataclass(frozen=True)
class Question:
    """A question in the words that the model gets; ``<image>`` marks, if any, place the images."""

    id: str
    prompt: str
    images: tuple[OpenImage, ...] = ()
    answers: tuple[str, ...] = ()
    """Right ones; for multiple choice a letter"""
    kind: str = ""
    """Subject or kind, for scores apart"""
    choices: tuple[str, ...] = ()
    """Texts of the choices A, B, …"""
    form: str = ""
    """How its answer is read, where a suite has several ways"""
    group: str = ""
    """Questions that count together (CircularEval), or are of one image (MME)"""
    lead: str = ""
    """Text that stands once, before the first question of a prompt: before the first example, if
    there are some"""
    examples: tuple[Question, ...] = ()
    """Questions that are asked and answered before this one, as earlier turns"""


@dataclass(frozen=True)
class Judged:
    """A question's answer and its score, 0 to 1."""

    question: Question
    answer: str
    score: float
    error: str = ""
    """Why the question could not be asked; its score is 0 then"""


@dataclass(frozen=True)
class Unit:
    """Unit of the score: a question, or a group of questions."""

    id: str
    kind: str
    score: float


def no_figures(judged: Sequence[Judged]) -> dict[str, float]:
    """Return the figures of a suite that has none beside its score."""
    return {}


@dataclass(frozen=True)
class Suite:
    """A benchmark."""

    name: str
    read: Callable[[Path, str], list[Question]]
    """Reads the questions of a folder or file, given the name of a split"""
    judge: Callable[[Question, str], float]
    max_new_tokens: int
    measure: str = "accuracy"
    split: str = ""
    """Part of the data that papers report; empty: all that is there"""
    figures: Callable[[Sequence[Judged]], Mapping[str, float]] = no_figures
    grouped: bool = False
    """True where a group counts as one, right where all its questions are"""
    shots: str = ""
    """Part of the data with examples; empty: the suite has none"""


def units(suite: Suite, judged: Sequence[Judged]) -> list[Unit]:
    """Return what counts, in the questions' order."""
    if not suite.grouped:
        return [Unit(item.question.id, item.question.kind, item.score) for item in judged]
    groups: dict[str, Unit] = {}
    for item in judged:
        name = item.question.group
        least = min(item.score, groups[name].score if name in groups else 1.0)
        groups[name] = Unit(name, item.question.kind, least)
    return list(groups.values())


def mean_scores(
    judged: Sequence[Judged], name_of: Mapping[str, str] | None = None
) -> dict[str, float]:
    """Return the mean score of each kind, or of the questions whose kinds have one name in a
    mapping; kinds that it does not name are left out."""
    gathered: dict[str, list[float]] = {}
    for item in judged:
        kind = item.question.kind
        name = kind if name_of is None else name_of.get(kind, "")
        gathered.setdefault(name, []).append(item.score)
    return {name: sum(scores) / len(scores) for name, scores in gathered.items() if name}


def letters(count: int) -> list[str]:
    """Return the names of choices: A, B, …"""
    return [chr(ord("A") + index) for index in range(count)]


def drawn_letter(question: Question) -> str:
    """Return a letter drawn by the question's id, where official code guesses: the same again in
    every run, so that two models differ only where their answers do."""
    return letters(len(question.choices))[zlib.crc32(question.id.encode()) % len(question.choices)]

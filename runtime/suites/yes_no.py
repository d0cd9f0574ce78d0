"""Suites of yes-or-no questions: POPE (Li et al. 2023) and MME (Fu et al. 2023)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from mobilevlm.runtime.suites.question import Judged, Question, Suite
from mobilevlm.runtime.suites.rows import read_rows

SHORT = "\nAnswer the question using a single word or phrase."
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene",
              "landmark", "artwork", "OCR")  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def pope_answer(text: str) -> str:
    """Return ``yes`` or ``no``: no, if the first sentence has ``no`` or ``not`` as a word."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def mme_answer(text: str) -> str:
    """Return ``yes``, ``no`` or ``other`` by the first four characters."""
    said = text.strip().lower()
    if said in ("yes", "no"):
        return said
    return "yes" if "yes" in said[:4] else "no" if "no" in said[:4] else "other"


def read_pope(data: Path, split: str) -> list[Question]:
    """Read POPE: ``question``, ``answer``, ``category`` of the hub, or the official lines of
    ``text`` and ``label`` in files named after their category."""
    found = []
    for row in read_rows(data, split):
        kind = row.text("category") or row.file.stem.rpartition("_")[2]
        number = row.text("question_id", "id")
        image = row.need_image("image")
        truth = str(row.need("answer", "label")).strip().lower()
        prompt = str(row.need("question", "text")) + SHORT
        found.append(Question(f"{kind}/{number}", prompt, (image,), (truth,), kind))
    return found


def pope_figures(judged: Sequence[Judged]) -> dict[str, float]:
    """Return precision, recall, F1 and the share of yes over all questions, and the mean of the
    three categories' F1, which papers report; a question that could not be asked counts as answered
    wrongly."""
    kinds: dict[str, list[Judged]] = defaultdict(list)
    for item in judged:
        kinds[item.question.kind].append(item)
    f1 = [_yes_figures(items)["f1"] for items in kinds.values()]
    return {**_yes_figures(judged), "f1_mean": sum(f1) / len(f1) if f1 else 0.0}


def _yes_figures(judged: Sequence[Judged]) -> dict[str, float]:
    counts = Counter((_said(item), item.question.answers[0]) for item in judged)
    said_yes = counts["yes", "yes"] + counts["yes", "no"]
    truly_yes = counts["yes", "yes"] + counts["no", "yes"]
    precision = counts["yes", "yes"] / said_yes if said_yes else 0.0
    recall = counts["yes", "yes"] / truly_yes if truly_yes else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    share = said_yes / len(judged) if judged else 0.0
    return {"precision": precision, "recall": recall, "f1": f1, "yes_ratio": share}


def _said(item: Judged) -> str:
    if item.error:
        return "no" if item.question.answers[0] == "yes" else "yes"
    return pope_answer(item.answer)


def read_mme(data: Path, split: str) -> list[Question]:
    """Read MME; two questions about an image have one id in the data."""
    found, seen = [], Counter[str]()
    for row in read_rows(data, split):
        kind, image_id = row.text("category"), str(row.need("question_id"))
        group = f"{kind}/{image_id}"
        seen[group] += 1
        truth = str(row.need("answer")).strip().lower()
        image = row.need_image("image")
        prompt = str(row.need("question"))
        name = f"{group}#{seen[group]}"
        found.append(Question(name, prompt, (image,), (truth,), kind, group=group))
    return found


def mme_figures(judged: Sequence[Judged]) -> dict[str, float]:
    """Return each category's score, 100 times the share of right answers plus the share of images
    with both right, and the sums over perception and cognition."""
    images: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for item in judged:
        images[item.question.kind][item.question.group].append(item.score)
    figures = {}
    for kind, groups in images.items():
        answers = [right for group in groups.values() for right in group]
        both = [min(group) for group in groups.values()]
        figures[kind] = 100 * (sum(answers) / len(answers) + sum(both) / len(both))
    totals = {
        "perception": sum(figures.get(kind, 0.0) for kind in PERCEPTION),
        "cognition": sum(figures.get(kind, 0.0) for kind in COGNITION),
    }
    return {**totals, **figures}


SUITES = (
    Suite(
        name="pope",
        read=read_pope,
        judge=lambda question, answer: float(pope_answer(answer) == question.answers[0]),
        max_new_tokens=16,
        split="test",
        figures=pope_figures,
    ),
    Suite(
        name="mme",
        read=read_mme,
        judge=lambda question, answer: float(mme_answer(answer) == question.answers[0]),
        max_new_tokens=16,
        figures=mme_figures,
    ),
)

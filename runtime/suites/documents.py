"""Suites about charts, documents and text in images: ChartQA, DocVQA and OCRBench."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mobilevlm.runtime.suites.question import Judged, Question, Suite
from mobilevlm.runtime.suites.rows import read_rows

SHORT = "\nAnswer the question using a single word or phrase."
WORD = "\nAnswer the question with a single word."
CHART_TOLERANCE = 0.05
"""Relative error that a number of ChartQA may have (Methani et al. 2020)."""
ANLS_THRESHOLD = 0.5
"""Similarity below which an answer is wrong (Biten et al. 2019)."""


def relaxed_match(answer: str, truth: str) -> float:
    """Return whether an answer is the truth: a number within 5%, other text in any case. A percent
    sign divides by 100; a truth of zero is compared as text."""
    said, true = _number(answer), _number(truth)
    if said is not None and true:
        return float(abs(said - true) / abs(true) <= CHART_TOLERANCE)
    return float(answer.strip().lower() == truth.strip().lower())


def _number(text: str) -> float | None:
    said = text.strip()
    try:
        return float(said.rstrip("%")) / 100 if said.endswith("%") else float(said)
    except ValueError:
        return None


def edit_distance(first: str, second: str) -> int:
    """Return Levenshtein's distance in characters."""
    row = list(range(len(second) + 1))
    for index, letter in enumerate(first, 1):
        above, row[0] = row[0], index
        for place, other in enumerate(second, 1):
            above, row[place] = (
                row[place],
                min(row[place] + 1, row[place - 1] + 1, above + (letter != other)),
            )
    return row[-1]


def anls(answer: str, truths: Sequence[str]) -> float:
    """Return the best similarity with a truth, 1 minus the distance over the longer length, and 0
    where it is below one half. As in the script of the ICDAR challenge the distance is that of
    texts in lower case with single spaces, and the lengths are those of the texts as they are; a
    similarity of exactly one half counts, which the paper's formula excludes."""
    said, best = _spaced(answer), 0.0
    for truth in truths:
        longest = max(len(answer.upper()), len(truth.upper()))
        distance = edit_distance(said, _spaced(truth)) / longest if longest else 0.0
        best = max(best, 1 - distance)
    return best if best >= ANLS_THRESHOLD else 0.0


def _spaced(text: str) -> str:
    return " ".join(text.strip().lower().split())


def ocrbench_match(answer: str, truths: Sequence[str], dataset: str) -> float:
    """Return whether a truth is in the answer; of handwritten formulas (HME100k) without regard to
    spaces, else to case."""
    if dataset == "HME100k":
        said = answer.strip().replace("\n", " ").replace(" ", "")
        return float(any(text.strip().replace("\n", " ").replace(" ", "") in said
                         for text in truths))  # fmt: skip
    said = answer.lower().strip().replace("\n", " ")
    return float(any(text.lower().strip().replace("\n", " ") in said for text in truths))


def read_chartqa(data: Path, split: str) -> list[Question]:
    """Read ChartQA: rows of the hub, or the official ``test_human.json`` and
    ``test_augmented.json`` with the images beside."""
    found, seen = [], Counter[str]()
    for row in read_rows(data, split):
        kind = row.text("type") or row.file.stem.rpartition("_")[2]
        seen[kind] += 1
        image = row.need_image("image", "imgname")
        prompt = str(row.need("question", "query")) + WORD
        truths = row.texts("answer", "label")
        found.append(Question(f"{kind}/{seen[kind]}", prompt, (image,), truths, kind))
    return found


def read_docvqa(data: Path, split: str) -> list[Question]:
    """Read DocVQA: rows of the hub, or the official file with the images beside."""
    found = []
    for row in read_rows(data, split):
        image = row.need_image("image")
        prompt = str(row.need("question")) + SHORT
        name = str(row.need("questionId"))
        types = row.get("question_types")
        kind = str(types[0]) if isinstance(types, list) and types else ""
        found.append(Question(name, prompt, (image,), row.texts("answers"), kind))
    return found


def read_ocrbench(data: Path, split: str) -> list[Question]:
    """Read OCRBench: rows of the hub, or the official file with the images beside."""
    found = []
    for number, row in enumerate(read_rows(data, split), 1):
        image = row.need_image("image", "image_path")
        dataset = str(row.need("dataset", "dataset_name"))
        kind, prompt = str(row.need("question_type", "type")), str(row.need("question"))
        truths = row.texts("answer", "answers")
        found.append(Question(str(number), prompt, (image,), truths, kind, form=dataset))
    return found


def ocrbench_figures(judged: Sequence[Judged]) -> dict[str, float]:
    """Return OCRBench's own score, the number of right answers (of 1,000)."""
    return {"score": sum(item.score for item in judged)}


def _chart(question: Question, answer: str) -> float:
    return max(relaxed_match(answer, truth) for truth in question.answers)


def _ocr(question: Question, answer: str) -> float:
    return ocrbench_match(answer, question.answers, question.form)


SUITES = (
    Suite("chartqa", read_chartqa, _chart, 16, "relaxed accuracy", "test"),
    Suite("docvqa", read_docvqa, lambda q, answer: anls(answer, q.answers), 32, "ANLS",
          "validation"),
    Suite("ocrbench", read_ocrbench, _ocr, 128, "accuracy", "test", ocrbench_figures),
)  # fmt: skip

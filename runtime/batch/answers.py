"""The answer to a row, as the journal and the output have it."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobilevlm.errors import MobileVLMError, PromptError
from mobilevlm.runtime.answer.generation import Generation
from mobilevlm.runtime.answer.options import AnswerOptions
from mobilevlm.runtime.batch.rows import Row
from mobilevlm.runtime.batch.template import Template, filled
from mobilevlm.runtime.vlm import VLM

NO_ANSWER: dict[str, Any] = dict.fromkeys(
    ("answer", "finish_reason", "prompt_tokens", "visual_tokens", "new_tokens", "timings")
)
"""Fields of a row with an error, all empty"""


@dataclass(frozen=True)
class Questions:
    """Questions about the rows of a batch."""

    template: Template
    folder: Path
    """Folder in which paths of images begin"""
    options: AnswerOptions
    id_column: str | None = None

    @property
    def columns(self) -> frozenset[str]:
        """All that are read of a row."""
        return self.template.columns | ({self.id_column} if self.id_column else set())


def answer_row(vlm: VLM, questions: Questions, row: Row) -> dict[str, Any]:
    """Return the record of a row: its answer, or the error that it has instead."""
    try:
        name = _row_id(row, questions.id_column)
    except PromptError as error:
        return failed_row(row, questions, str(error))
    if row.error is not None:
        return failed_row(row, questions, row.error)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            prompt, images = filled(questions.template, row.columns, questions.folder)
            answer = vlm.generate(prompt, images, **questions.options)
        except MobileVLMError as error:
            return failed_row(row, questions, str(error))
    told = list(dict.fromkeys(str(warning.message) for warning in said))
    return {
        "index": row.index,
        "id": name,
        **_answer(answer, bool(questions.options.get("logprobs"))),
        "warnings": told,
        "error": None,
    }


def images_key(questions: Questions, row: Row) -> object:
    """Return what is equal of rows about the same images, and another for each row without any."""
    found = [row.columns.get(name) for name in questions.template.image_columns]
    return found if any(found) else row.index


def failed_row(row: Row, questions: Questions, error: str) -> dict[str, Any]:
    """Return the record of a row that has no answer."""
    try:
        name = _row_id(row, questions.id_column)
    except PromptError:
        name = None
    more = {"logprobs": None} if questions.options.get("logprobs") else {}
    return {"index": row.index, "id": name, **NO_ANSWER, **more, "warnings": [], "error": error}


def _row_id(row: Row, column: str | None) -> str | int | None:
    if column is None:
        return row.index
    found = row.columns.get(column)
    if found is None and row.error is not None:
        return None
    if isinstance(found, bool) or not isinstance(found, (str, int)):
        raise PromptError(f"column {column!r:.80}: expected an id, a text or a whole number")
    return found


def _answer(answer: Generation, logprobs: bool) -> dict[str, Any]:
    times = dataclasses.asdict(answer.timings)
    del times["load"]  # of the process, not of the row
    data: dict[str, Any] = {
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "visual_tokens": answer.visual_tokens,
        "new_tokens": len(answer.token_ids),
        "timings": {name: round(value, 6) for name, value in times.items()},
    }
    if logprobs:
        data["logprobs"] = [dataclasses.asdict(token) for token in answer.logprobs or []]
    return data

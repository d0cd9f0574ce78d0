"""A batch from its input to its output."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobilevlm._version import __version__
from mobilevlm.bundle import MANIFEST
from mobilevlm.console import progress
from mobilevlm.console.terminal import shown
from mobilevlm.errors import MobileVLMError
from mobilevlm.runtime.batch.answers import Questions, answer_row, failed_row, images_key
from mobilevlm.runtime.batch.output import check_output, write_output
from mobilevlm.runtime.batch.processes import opened_processes
from mobilevlm.runtime.batch.rows import Input, Row
from mobilevlm.runtime.batch.workers import Job, Record, Workers
from mobilevlm.runtime.builtin_bundle import bundle_path
from mobilevlm.runtime.journal import Journal, JournalKind, open_journal
from mobilevlm.runtime.loading import check_paths
from mobilevlm.whole_file import file_sha256

OF_PROCESSES = ("threads", "max_memory_mb", "max_resident_mb")
"""Arguments of ``load`` that a run may be continued with others of"""
JOURNAL = JournalKind(
    "mobilevlm batch",
    lambda record: operator.index(record["index"]),
    "give another -o",
    "give the same options to go on, --restart to begin anew, or another -o",
)
"""The rows that are done, beside the output until it is made from them"""


@dataclass(frozen=True)
class Batch:
    """Options of a batch."""

    source: Input
    output: Path
    questions: Questions
    loading: dict[str, Any]
    """Arguments of ``mobilevlm.load``"""
    processes: int | None = None
    """By default as many as cores and memory allow"""
    ordered: bool = True
    """True for the order of the input, false for that in which rows were done"""
    restart: bool = False
    """True to forget an earlier run"""
    ray: str | None = None
    """Address of a Ray cluster whose nodes answer; ``processes`` are those of each node"""

    @property
    def journal(self) -> Path:
        """File that keeps the rows that are done."""
        return self.output.with_name(f"{self.output.name}.journal")


@dataclass(frozen=True)
class Done:
    """Counts of a batch."""

    rows: int
    errors: int
    cut: int
    """Answers that ``max_new_tokens`` or the context ended"""


def run_batch(batch: Batch) -> Done:
    """Answer all rows that are not done yet, and write the output.

    Raises:
        MobileVLMError: the output exists already, or the journal of another run; the bundle or an
            option is wrong; workers end again and again. What is done stays in the journal.
    """
    check_output(batch.output)
    if batch.output.exists() and not batch.restart and not batch.journal.exists():
        raise MobileVLMError(
            f"-o {shown(batch.output)}: exists already: give --restart to replace it, or "
            f"another name"
        )
    count = batch.source.count
    with open_journal(batch.journal, JOURNAL, run_identity(batch), batch.restart) as journal:
        if _left(batch, journal):
            _answer(batch, journal)
        done = _counted(journal.records())
        logprobs = bool(batch.questions.options.get("logprobs"))
        order = range(count) if batch.ordered else None
        write_output(batch.output, journal.records(order), logprobs=logprobs)
        journal.remove()
    return done


def run_identity(batch: Batch) -> dict[str, str]:
    """Return what makes a run another one, by names that a message can say."""
    loading = {name: batch.loading[name] for name in batch.loading if name not in OF_PROCESSES}
    bundle, mmproj = Path(loading.pop("bundle")), loading.pop("mmproj")
    path = bundle_path(bundle, loading["engine"])
    check_paths(path, mmproj)
    files = [path, Path(mmproj)] if mmproj is not None else [path / MANIFEST]
    if not all(file.is_file() for file in files):
        raise MobileVLMError(f"{shown(path)}: no bundle: expected a folder that has {MANIFEST}")
    questions = batch.questions
    options = {name: value for name, value in questions.options.items() if value is not None}
    return {
        "mobilevlm": __version__,
        "bundle": " ".join(map(file_sha256, files)),
        "input": batch.source.digest,
        "prompt": json.dumps(questions.template.pieces),
        "image columns": json.dumps(questions.template.image_columns),
        "id column": json.dumps(questions.id_column),
        "model options": _digest(loading),
        "answer options": _digest(options),
    }


def _digest(data: dict[str, Any]) -> str:
    text = json.dumps(data, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def _left(batch: Batch, journal: Journal) -> int:
    """Return how many rows the journal does not have."""
    return sum(index not in journal for index in range(batch.source.count))


def _answer(batch: Batch, journal: Journal) -> None:
    """Answer the rows that the journal does not have."""
    source, questions = batch.source, batch.questions
    left = _left(batch, journal)
    if done := source.count - left:
        progress.say(f"{done} of {source.count} rows are done already")
    with _answers(batch, left) as answers:
        rows = source.read(questions.columns, journal.__contains__)
        with progress.track("rows", source.count, done=done, unit="rows") as advance:
            for record in answers(rows):
                journal.append(record)
                advance(1)
    if _left(batch, journal):
        raise MobileVLMError(f"{shown(source.path)}: it lost rows while it was read")


@contextmanager
def _answers(batch: Batch, left: int) -> Iterator[Callable[[Iterable[Row]], Iterator[Record]]]:
    """Give what answers rows, of which so many are left: processes here, or a cluster."""
    questions = batch.questions
    if batch.ray is not None:
        from mobilevlm.runtime.batch.ray_workers import ray_answers

        with ray_answers(batch.ray, batch.loading, questions, batch.processes) as answers:
            yield answers
        return
    with opened_processes(batch.loading, questions.options, batch.processes, left) as opened:
        job = Job(
            opened.open,
            lambda vlm, row: answer_row(vlm, questions, row),
            lambda row, error: failed_row(row, questions, error),
            lambda row: images_key(questions, row),
        )
        each = f"{opened.threads} thread{'s' * (opened.threads > 1)} each"
        progress.say(f"{opened.count} process{'es' * (opened.count > 1)}, {each}")
        with Workers(job, opened.count) as workers:
            yield workers.answers


def _counted(records: Iterable[dict[str, Any]]) -> Done:
    rows = errors = cut = 0
    for record in records:
        rows += 1
        errors += record["error"] is not None
        cut += record["finish_reason"] == "length"
    return Done(rows, errors, cut)

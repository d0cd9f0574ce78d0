"""A bundle's answers to a benchmark, judged, and two bundles' answers compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobilevlm.accuracy import Difference, Score, difference, plain_score, score
from mobilevlm.console.terminal import shown
from mobilevlm.errors import ImageError, PromptError, SuiteError
from mobilevlm.runtime.journal import Journal, JournalKind, open_journal
from mobilevlm.runtime.suites.question import Judged, Question, Suite, Unit, units
from mobilevlm.runtime.suites.shots import messages, with_examples, without_examples

if TYPE_CHECKING:
    from mobilevlm.runtime import VLM


IMAGE_CHARACTERS = 2000
"""Characters that an image counts for, where the longest question is looked for."""


@dataclass(frozen=True)
class Entry:
    """An answer, and what it took."""

    id: str
    question: str
    """Digest of what was asked"""
    answer: str
    error: str = ""
    tokens: int = 0
    """After the first"""
    seconds: float = 0.0

    @property
    def key(self) -> tuple[str, str]:
        return self.id, self.question


JOURNAL = JournalKind(
    "mobilevlm eval",
    lambda record: Entry(**record).key,
    "give another folder with --answers",
    "give another folder with --answers, or remove the file",
)
"""Answers of a bundle to a suite"""


@dataclass(frozen=True)
class Evaluation:
    """Scores of one bundle."""

    suite: Suite
    bundle: str
    engine: str
    judged: tuple[Judged, ...]
    tokens_per_second: float
    checkpoint: str = ""
    """Name of the model that the bundle was exported from"""
    recipe: str = ""

    @property
    def units(self) -> list[Unit]:
        return units(self.suite, self.judged)

    @property
    def overall(self) -> Score:
        return score(unit.score for unit in self.units)

    @property
    def kinds(self) -> dict[str, Score]:
        """Scores by kind or subject, in the order of the data; none if it has none."""
        gathered: dict[str, list[float]] = {}
        for unit in self.units:
            gathered.setdefault(unit.kind, []).append(unit.score)
        return {kind: score(scores) for kind, scores in gathered.items() if kind}

    @property
    def failed(self) -> list[Judged]:
        """Questions that could not be asked, which count as wrong."""
        return [item for item in self.judged if item.error]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, accuracies included."""
        return {
            "suite": self.suite.name,
            "measure": self.suite.measure,
            "bundle": self.bundle,
            "engine": self.engine,
            "overall": plain_score(self.overall),
            "kinds": {kind: plain_score(found) for kind, found in self.kinds.items()},
            "figures": dict(self.suite.figures(self.judged)),
            "questions": len(self.judged),
            "not_asked": [{"id": item.question.id, "error": item.error} for item in self.failed],
            "tokens_per_second": self.tokens_per_second,
        }


def read_questions(
    suite: Suite,
    data: Path,
    limit: int | None = None,
    split: str | None = None,
    shots: int = 0,
) -> list[Question]:
    """Return a suite's questions; with ``limit`` so many units of them, spread evenly. ``shots``:
    examples before each.

    Raises:
        SuiteError: the data cannot be read, two questions have one id, or there are too few
            examples.
    """
    questions = suite.read(data, suite.split if split is None else split)
    if not questions:
        raise SuiteError(f"{data}: no question of the suite {suite.name!r} among its rows")
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise SuiteError(
                f"{data}: two questions have the id {shown(question.id)}: give the files of one "
                f"split alone"
            )
        seen.add(question.id)
    if shots:
        questions = with_examples(suite, questions, data, shots)
    else:
        questions = without_examples(questions)
    if limit is None:
        return questions
    names = [question.group or question.id for question in questions]
    groups = list(dict.fromkeys(names))
    count = min(limit, len(groups))
    kept = {groups[index * len(groups) // count] for index in range(count)}
    return [question for question, name in zip(questions, names, strict=True) if name in kept]


def evaluate(
    vlm: VLM,
    suite: Suite,
    questions: Sequence[Question],
    answers: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Ask a bundle every question and judge its answers.

    ``answers``: a folder that keeps them; those that it has already are not asked for again.
    ``settings``: what else they depend on, such as the number of tiles.

    Raises:
        MobileVLMError: the stored answers are of other settings, or another process adds to them.
        SuiteError: the longest question does not fit behind its examples.
    """
    header = {"suite": suite.name, "bundle": vlm.bundle.digest, "engine": vlm.engine,
              "max_new_tokens": suite.max_new_tokens, **(settings or {})}  # fmt: skip
    if any(question.examples for question in questions):
        _check_room(vlm, questions)
    judged, tokens, seconds = [], 0, 0.0
    opened: AbstractContextManager[Journal | None] = nullcontext()
    if answers is not None:
        answers.mkdir(parents=True, exist_ok=True)
        name = f"{suite.name}-{vlm.bundle.digest[:12]}-{vlm.engine}.jsonl"
        opened = open_journal(answers / name, JOURNAL, header)
    with opened as journal:
        for done, question in enumerate(questions, 1):
            digest = question_digest(question)
            stored = None if journal is None else journal.get((question.id, digest))
            entry = Entry(**stored) if stored else _ask(vlm, question, digest, suite)
            if journal is not None and not stored:
                journal.append(asdict(entry))
            right = 0.0 if entry.error else suite.judge(question, entry.answer)
            judged.append(Judged(question, entry.answer, right, entry.error))
            tokens, seconds = tokens + entry.tokens, seconds + entry.seconds
            if progress is not None:
                progress(done, len(questions))
    rate = tokens / seconds if seconds else 0.0
    manifest = vlm.bundle.manifest
    return Evaluation(suite, str(vlm.bundle.folder), vlm.engine, tuple(judged), rate,
                      manifest.spec.name, manifest.recipe.name)  # fmt: skip


def question_digest(question: Question) -> str:
    """Return what tells questions apart: their words and their number of images, and those of their
    examples."""
    turns = (question, *question.examples)
    said = json.dumps([part for turn in turns for part in (turn.prompt, len(turn.images))])
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _check_room(vlm: VLM, questions: Sequence[Question]) -> None:
    """Raise SuiteError if the question with the longest turns does not fit in the context."""
    longest = max(questions, key=lambda question: sum(
        len(turn.prompt) + IMAGE_CHARACTERS * len(turn.images)
        for turn in (question, *question.examples)))  # fmt: skip
    try:
        vlm.generate(messages(longest), max_new_tokens=1)
    except PromptError as error:
        count = len(longest.examples)
        raise SuiteError(f"--shots {count}: {longest.id}: {error}: give fewer examples") from None
    except ImageError:
        return  # it will be said of the question


def _ask(vlm: VLM, question: Question, digest: str, suite: Suite) -> Entry:
    try:
        if question.examples:
            said = vlm.generate(messages(question), max_new_tokens=suite.max_new_tokens)
        else:
            images = [read() for read in question.images]
            said = vlm.generate(question.prompt, images, max_new_tokens=suite.max_new_tokens)
    except (ImageError, PromptError) as error:  # one broken image does not end the evaluation
        return Entry(question.id, digest, "", str(error))
    rates = said.token_seconds
    return Entry(question.id, digest, said.text, "", len(rates), sum(rates))


def compare(first: Evaluation, second: Evaluation) -> Difference:
    """Return the second's score minus the first's on the same questions.

    Raises:
        ValueError: they were asked other questions.
    """
    if [item.question.id for item in first.judged] != [item.question.id for item in second.judged]:
        raise ValueError("two evaluations of different questions: expected the same ones")
    return difference([unit.score for unit in first.units], [unit.score for unit in second.units])

"""Scores of the ``scenes`` suite: accuracy per kind of question, with intervals, beside blind.

Any callable ``(prompt, images) -> answer`` can be judged, so the float32 reference, a quantized
bundle and an unrelated model answer the same questions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from mobilevlm.accuracy import Score, plain_score, score
from mobilevlm.console.tables import Column, Table
from mobilevlm.nano.questions import Question
from mobilevlm.nano.suite import SUITE_KINDS, Example, images_of, noise

if TYPE_CHECKING:
    from mobilevlm.runtime import VLM

Answerer = Callable[[str, list[Image.Image]], str]
"""Takes the user's text and the images, gives the model's text."""

NUMBERS = {
    word: str(value)
    for value, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
SYNONYMS = {"colour": "color", "centre": "center", "middle": "center", "gray": "grey"}
LONGEST_ANSWER = 24
"""Tokens; the longest true answers of the suite take fewer."""
DROPPED = frozenset(("a", "an", "the"))


@dataclass(frozen=True)
class SuiteResult:
    """Scores by kind of question and over all; ``blind`` ones had noise for images."""

    kinds: dict[str, Score]
    overall: Score
    blind: dict[str, Score] | None
    blind_overall: Score | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, accuracies included."""
        return {
            "suite": "scenes",
            "overall": plain_score(self.overall),
            "kinds": {kind: plain_score(score) for kind, score in self.kinds.items()},
            "blind_overall": plain_score(self.blind_overall) if self.blind_overall else None,
            "blind": {kind: plain_score(score) for kind, score in self.blind.items()}
            if self.blind
            else None,
        }


def normalize(text: str) -> list[str]:
    """Lower-case words of a text: no punctuation, no articles, digits for number words.

    ``yo-yo`` stays one word; ``colour`` and ``centre`` become the American spelling, and
    ``middle`` means the center.
    """
    words = re.findall(r"[a-z0-9]+(?:-[a-z0-9]+)*", text.lower())
    words = [NUMBERS.get(word, SYNONYMS.get(word, word)) for word in words]
    return [word for word in words if word not in DROPPED]


def is_right(question: Question, answer: str) -> bool:
    """Return whether an answer is true, in either style.

    It is right when, after normalisation, it equals the short or the full answer. Otherwise: a
    yes-or-no answer is judged by its first word; an answer from a closed list is right when the
    truth is the only entry of the list found in it (longer entries are found first, so ``top``
    is not seen in ``top left``); an open answer is right when the truth's words occur in it.
    """
    said, truth = normalize(answer), normalize(question.truth)
    if said in (truth, normalize(question.answer)):
        return True
    if question.choices == ("yes", "no"):
        return said[:1] == truth
    if not question.choices:
        return _find(said, truth) is not None
    found = set()
    for choice in sorted((normalize(entry) for entry in question.choices), key=len, reverse=True):
        place = _find(said, choice)
        if place is not None:
            found.add(tuple(choice))
            said = [*said[:place], "|", *said[place + len(choice) :]]
    return found == {tuple(truth)}


def evaluate(
    answer: Answerer,
    examples: Sequence[Example],
    blind: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> SuiteResult:
    """Asks every example and scores the answers; ``progress`` hears (done, total).

    With ``blind`` the questions about images are asked again with noise in their place.
    """
    seen: list[tuple[str, bool]] = []
    unseen: list[tuple[str, bool]] = []
    for done, example in enumerate(examples):
        question = example.question
        right = is_right(question, answer(question.text, images_of(example)))
        seen.append((question.kind, right))
        if blind:
            # Noise changes nothing for a text-only question: its score counts for both.
            if example.seeds:
                right = is_right(question, answer(question.text, noise(example)))
            unseen.append((question.kind, right))
        if progress is not None:
            progress(done + 1, len(examples))
    return result_of(seen, unseen if blind else None)


def evaluate_vlm(
    vlm: VLM,
    examples: Sequence[Example],
    blind: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[SuiteResult, float]:
    """Scores of a loaded bundle, and the tokens per second of its decoding (0 without any)."""
    tokens, seconds = 0, 0.0

    def answer(prompt: str, images: list[Image.Image]) -> str:
        nonlocal tokens, seconds
        said = vlm.generate(prompt, images, max_new_tokens=LONGEST_ANSWER)
        tokens += len(said.token_seconds)
        seconds += sum(said.token_seconds)
        return said.text

    result = evaluate(answer, examples, blind, progress)
    return result, tokens / seconds if seconds else 0.0


def result_of(
    seen: Sequence[tuple[str, bool]], unseen: Sequence[tuple[str, bool]] | None
) -> SuiteResult:
    """Scores of ``(kind, right)`` outcomes with images and with noise in their place."""
    return SuiteResult(
        kinds=by_kind(seen),
        overall=score(right for _, right in seen),
        blind=by_kind(unseen) if unseen is not None else None,
        blind_overall=score(right for _, right in unseen) if unseen is not None else None,
    )


def by_kind(outcomes: Sequence[tuple[str, bool]]) -> dict[str, Score]:
    """Scores of ``(kind, right)`` outcomes, in the suite's order of kinds."""
    return {
        kind: score(right for other, right in outcomes if other == kind)
        for kind in SUITE_KINDS
        if any(other == kind for other, _ in outcomes)
    }


def table(result: SuiteResult, title: str = "scenes") -> Table:
    """Return the result, one row per kind of question."""
    figures = ("asked", "accuracy", "95% interval", "blind")
    columns = (Column("kind", whole=True), *(Column(name, True, True) for name in figures))
    view = Table(columns, title=title)
    for kind, value in result.kinds.items():
        view.add(kind, *_cells(value, (result.blind or {}).get(kind)))
    view.rule()
    view.add("all", *_cells(result.overall, result.blind_overall), style="bold")
    return view


def _cells(value: Score, blind: Score | None) -> tuple[str, str, str, str]:
    return (
        str(value.asked),
        f"{100 * value.accuracy:.1f}%",
        f"{100 * value.low:.1f}–{100 * value.high:.1f}%",
        f"{100 * blind.accuracy:.1f}%" if blind else "–",
    )


def _find(words: list[str], wanted: list[str]) -> int | None:
    """Return the index at which ``wanted`` begins in ``words``, none if it does not occur."""
    for place in range(len(words) - len(wanted) + 1):
        if words[place : place + len(wanted)] == wanted:
            return place
    return None

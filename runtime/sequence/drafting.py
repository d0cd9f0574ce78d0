"""Speculative decoding with drafts from the text itself (prompt lookup).

Where the last tokens have stood before, in the prompt or in the answer, what followed them is a
guess at what follows now. One run of the decoder over the guess checks it (Leviathan et al. 2023,
the greedy case): each token is chosen from the logits after the ones before it, and the first that
is not the guessed one ends the run. Copies, lists and repetitions come several tokens at a time.

The tokens are the same as without drafts if the decoder's kernels give a row the same bits whether
it is alone or among others. That differs between kernels and processors, so it is tried: the first
draft is run both ways. What a run over several positions costs is measured then too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np

from mobilevlm.errors import MobileVLMError
from mobilevlm.prompt import Piece
from mobilevlm.runtime.answer.sampling import Sampler
from mobilevlm.runtime.engines import Float32
from mobilevlm.runtime.sequence.session import Session

DEFAULT_DRAFT_TOKENS = 4
MAX_DRAFT_TOKENS = 64
NGRAM = 3
"""Last tokens that are looked up."""
FIRST_PAUSE, LONGEST_PAUSE = 8, 128
"""Tokens without a draft after one that took longer than single steps; twice as many each time."""
INEXACT = "this engine's results for one position and for several differ in the last digits"


@dataclass
class Drafts:
    """Counts of drafts for one answer."""

    proposed: int = 0
    """Tokens that were guessed and run."""
    accepted: int = 0
    """Guesses that were right."""
    note: str = ""
    """Why there were none, if they were possible."""


class Drafting:
    """Costs of drafts on one loaded model, for all its sessions. ``clock``: seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._costs: dict[int, float] = {}
        """Time of a run over so many positions, in single steps; infinite where its bits differ."""

    def rows(self, session: Session, tokens: Sequence[int]) -> Float32 | None:
        """Appends tokens; the logits after each ``(len(tokens), vocab_size)``. None, with nothing
        appended, where they would not be those of single steps."""
        count, length = len(tokens), session.length
        if self._costs.get(count) == math.inf or not session.can_draft:
            return None
        start = self._clock()
        rows = session.extend(tokens)
        if count in self._costs:
            return rows
        middle = self._clock()
        session.rewind(length)
        exact = [
            np.array_equal(session.step(token), row)
            for token, row in zip(tokens, rows, strict=True)
        ]
        step = (self._clock() - middle) / count
        self._costs[count] = (middle - start) / step if all(exact) else math.inf
        if not all(exact):
            session.rewind(length)
        return rows if all(exact) else None

    def pays(self, guessed: int, right: int) -> bool:
        """Return whether a draft with ``right`` right tokens took less time than single steps."""
        return right + 1 > self._costs[guessed + 1]


def check_draft_tokens(count: int | None, temperature: float) -> int:
    """How many tokens to guess at a time. ``count``: what was asked for; none means the default
    where tokens are chosen greedily, else 0.

    Raises:
        MobileVLMError: out of range, or tokens are drawn.
    """
    if count is None:
        return 0 if temperature > 0 else DEFAULT_DRAFT_TOKENS
    if not 0 <= count <= MAX_DRAFT_TOKENS:
        raise MobileVLMError(f"draft_tokens is {count}, expected 0 to {MAX_DRAFT_TOKENS}")
    if count and temperature > 0:
        raise MobileVLMError(
            "draft_tokens goes with greedy choice: leave temperature at 0, or draft_tokens out"
        )
    return count


class Lookup:
    """Tokens so far, and what followed last after each few of them."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._ids: list[Piece] = []
        self._next: dict[tuple[Piece, ...], int] = {}
        for piece in pieces:
            self.add(piece)

    def add(self, token: Piece) -> None:
        """The next token."""
        self._next[tuple(self._ids[-NGRAM:])] = len(self._ids)
        self._ids.append(token)

    def guess(self, count: int) -> list[int]:
        """The next ``count`` tokens, or none. What is guessed may repeat itself."""
        start = self._next.get(tuple(self._ids[-NGRAM:]))
        if start is None:
            return []
        known = self._ids[start:]
        guess = [known[index % len(known)] for index in range(count)]
        tokens = [token for token in guess if isinstance(token, int)]
        return tokens if len(tokens) == count else []


def drafted_tokens(
    session: Session,
    logits: Float32,
    sampler: Sampler,
    produced: Sequence[int],
    lookup: Lookup,
    count: int,
    limit: int,
    drafting: Drafting,
    drafts: Drafts,
) -> Generator[int, None, None]:
    """The tokens of :func:`mobilevlm.runtime.answer.generation.single_tokens`, in fewer runs where
    guesses of ``count`` tokens are right. ``limit``: of ``produced``."""
    pause, wait = FIRST_PAUSE, 0
    yield sampler(logits, produced)
    while not session.full:
        lookup.add(produced[-1])
        wait -= 1
        possible = count < min(session.room, limit - len(produced))
        guess = lookup.guess(count) if possible and wait < 0 and not drafts.note else []
        start = session.length
        rows = drafting.rows(session, [produced[-1], *guess]) if guess else None
        if rows is None:
            drafts.note = INEXACT if guess else drafts.note
            yield sampler(session.step(produced[-1]), produced)
            continue
        right = 0
        try:
            for row, guessed in zip(rows, [*guess, None], strict=True):
                token = sampler(row, produced)
                right += token == guessed
                yield token
                if token != guessed:
                    break
                lookup.add(token)
        finally:
            session.rewind(start + 1 + right)
            drafts.proposed += count
            drafts.accepted += right
        if drafting.pays(count, right):
            pause = FIRST_PAUSE
        else:
            wait, pause = pause, min(2 * pause, LONGEST_PAUSE)

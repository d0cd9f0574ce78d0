"""Drafts change how many runs an answer takes, never the answer.

On a stand-in for a session whose logits follow from the last token: periodic, so that guesses are
often right, with breaks, so that they are often wrong.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import cast

import numpy as np
import pytest

from mobilevlm.errors import MobileVLMError
from mobilevlm.prompt import Run
from mobilevlm.runtime.answer.generation import single_tokens
from mobilevlm.runtime.answer.sampling import Sampler, SamplingOptions
from mobilevlm.runtime.engines import Float32
from mobilevlm.runtime.sequence.drafting import (
    INEXACT,
    Drafting,
    Drafts,
    Lookup,
    check_draft_tokens,
    drafted_tokens,
)
from mobilevlm.runtime.sequence.session import Session

pytestmark = pytest.mark.pure

VOCABULARY = 40


class StandIn:
    """Behaves like a session. ``noise``: what a run over several tokens adds to its logits."""

    def __init__(self, seed: int, prompt: Sequence[int], context: int, noise: float = 0) -> None:
        self.ids, self.runs = list(prompt), 0
        self._seed, self._context, self._noise = seed, context, np.float32(noise)
        self.can_draft = True

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def room(self) -> int:
        return self._context - self.length

    @property
    def full(self) -> bool:
        return self.room <= 0

    def logits(self) -> Float32:
        broken = self.length % 23 == 0  # here the text leaves its period
        state = [self._seed, self.ids[-1], self.length if broken else 0]
        return np.random.default_rng(state).normal(0, 3, VOCABULARY).astype(np.float32)

    def step(self, token: int) -> Float32:
        self.runs += 1
        self.ids.append(token)
        return self.logits()

    def extend(self, tokens: Sequence[int]) -> Float32:
        rows = np.stack([self.step(token) for token in tokens]) + self._noise
        self.runs -= len(tokens) - 1
        return rows

    def rewind(self, length: int) -> None:
        del self.ids[length:]


PROMPT = [1, 5, 6, 7, 8, 9, 5, 6, 7]


def answer(
    seed: int, draft: int, limit: int, context: int = 400, noise: float = 0, penalty: float = 1.0
) -> tuple[list[int], StandIn, Drafts]:
    """The first ``limit`` tokens after the prompt, as generate_text takes them."""
    stand_in = StandIn(seed, PROMPT, context, noise)
    session, drafts, produced = cast(Session, stand_in), Drafts(), list[int]()
    sampler = Sampler(SamplingOptions(repetition_penalty=penalty))
    start = stand_in.logits()
    if draft:
        drafting = Drafting(lambda: stand_in.runs)
        source = drafted_tokens(
            session, start, sampler, produced, Lookup(PROMPT), draft, limit, drafting, drafts
        )
    else:
        source = single_tokens(session, start, sampler, produced)
    for token in source:
        produced.append(token)
        if len(produced) == limit:
            break
    source.close()
    return produced, stand_in, drafts


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("draft", [1, 4, 7])
def test_drafts_leave_the_tokens_as_they_are(draft: int, penalty: float) -> None:
    accepted = 0
    for seed in range(30):
        expected, _, _ = answer(seed, 0, 120, penalty=penalty)
        found, _, drafts = answer(seed, draft, 120, penalty=penalty)
        assert found == expected, seed
        accepted += drafts.accepted
    assert accepted > 0


def test_a_repeating_text_takes_fewer_runs() -> None:
    _, plain, _ = answer(0, 0, 200)
    _, drafted, drafts = answer(0, 4, 200)
    assert plain.runs == 199
    # The first draft is run twice, to compare.
    assert drafted.runs == plain.runs - drafts.accepted + 5
    assert drafts.accepted > 70


def test_what_was_run_is_in_the_sequence_and_nothing_else() -> None:
    for seed, limit in itertools.product(range(5), range(1, 60, 7)):
        tokens, session, _ = answer(seed, 4, limit)
        # The last token is not run, unless it was guessed.
        assert session.ids in ([*PROMPT, *tokens[:-1]], [*PROMPT, *tokens])


def test_a_full_context_ends_the_answer_at_the_same_token() -> None:
    for seed, context in itertools.product(range(5), range(len(PROMPT) + 1, 60, 3)):
        expected, _, _ = answer(seed, 0, 1000, context)
        assert len(expected) == context - len(PROMPT) + 1
        assert answer(seed, 4, 1000, context)[0] == expected


def test_an_engine_whose_rows_differ_by_a_bit_gets_no_drafts() -> None:
    for seed in range(10):
        expected, _, _ = answer(seed, 0, 120)
        found, _, drafts = answer(seed, 4, 120, noise=1e-6)
        assert found == expected
        assert drafts == Drafts(0, 0, INEXACT)


def test_the_guess_follows_the_latest_place_and_repeats_itself() -> None:
    assert Lookup([1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3]).guess(2) == [8, 1]
    assert Lookup([7, 7, 7, 7]).guess(5) == [7] * 5
    assert Lookup([4, 5, 4, 5, 4, 5]).guess(3) == [4, 5, 4]
    assert Lookup([1, 2, 3, 4]).guess(3) == []
    assert Lookup([]).guess(3) == []


def test_two_tokens_are_too_few() -> None:
    assert Lookup([1, 2, 3, 4, 5, 2, 3]).guess(2) == []


def test_no_picture_is_guessed() -> None:
    assert Lookup([1, 2, 3, Run(4), 1, 2, 3]).guess(2) == []


def test_guesses_that_cost_more_than_they_save_become_rare() -> None:
    """A text that repeats three tokens with something else behind them each time."""

    class Contrary(StandIn):
        def logits(self) -> Float32:
            scores = np.random.default_rng(self.length).random(VOCABULARY, np.float32)
            scores[2 + self.length % 6] += self.length % 6 < 3
            return scores

    stand_in, drafts, produced = Contrary(0, PROMPT, 1000), Drafts(), list[int]()
    source = drafted_tokens(
        cast(Session, stand_in),
        stand_in.logits(),
        Sampler(SamplingOptions()),
        produced,
        Lookup(PROMPT),
        4,
        300,
        Drafting(lambda: stand_in.runs),
        drafts,
    )
    for token in source:
        produced.append(token)
    followers = list(itertools.pairwise(produced))
    assert followers.count((3, 4)) > 45 and drafts.accepted < 3
    # Without pauses there are 48.
    assert 0 < drafts.proposed // 4 < 24


def test_drafts_are_refused_where_they_have_no_meaning() -> None:
    assert check_draft_tokens(None, 0.0) == 4
    assert check_draft_tokens(None, 0.7) == 0
    assert check_draft_tokens(0, 0.7) == 0
    with pytest.raises(MobileVLMError, match="draft_tokens goes with greedy choice"):
        check_draft_tokens(4, 0.7)
    with pytest.raises(MobileVLMError, match="draft_tokens is -1, expected 0 to 64"):
        check_draft_tokens(-1, 0.0)

"""Intervals of shares and of paired differences."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from mobilevlm.accuracy import difference, difference_interval, mcnemar, score, wilson

pytestmark = pytest.mark.pure


def test_wilson_interval_agrees_with_published_values() -> None:
    low, high = wilson(8, 10)  # Brown, Cai & DasGupta 2001: 0.490 to 0.943
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)
    assert wilson(0, 0) == (0.0, 1.0)


def test_a_soft_score_counts_by_its_parts() -> None:
    found = score([1, 0.5, 0.25, 0])
    assert (found.asked, found.right, found.accuracy) == (4, 1.75, 0.4375)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (3, 3), (1, 5), (12, 5), (0, 9), (200, 260)])
def test_mcnemars_p_is_the_exact_binomial(first: int, second: int) -> None:
    count, least = first + second, min(first, second)
    exact = sum(comb(count, index) for index in range(least + 1)) * 2 / 2**count
    assert mcnemar(first, second) == pytest.approx(min(exact, 1.0), rel=1e-9)


def test_mcnemars_p_of_very_many_questions_is_a_number() -> None:
    assert mcnemar(20_000, 21_000) < 1e-5
    assert mcnemar(0, 100_000) == 0.0


def test_the_difference_is_of_the_second_model_and_counts_unlike_answers() -> None:
    found = difference([1, 1, 1, 0, 0, 1], [1, 0, 0, 1, 0, 1])
    assert (found.asked, found.first_better, found.second_better) == (6, 2, 1)
    assert found.mean == pytest.approx(-1 / 6)
    assert found.low < found.mean < found.high and found.p == 1.0
    with pytest.raises(ValueError, match="expected the same questions"):
        difference([1], [1, 0])


def test_two_equal_models_differ_by_nothing_within_an_interval() -> None:
    found = difference([1, 0, 1] * 100, [1, 0, 1] * 100)
    assert found.mean == 0 and found.low < 0 < found.high and found.p == 1.0
    assert found.high < 0.01


@pytest.mark.parametrize(
    ("asked", "lost", "won"),
    [(100, 0.05, 0.02), (300, 0.03, 0.03), (1000, 0.02, 0.01), (1000, 0.2, 0.15), (900, 0.01, 0.0)],
)
def test_the_interval_covers_the_true_difference_as_often_as_it_says(
    asked: int, lost: float, won: float
) -> None:
    """2,000 draws of questions that one of two models alone answers right."""
    rng = np.random.default_rng(1)
    counts = rng.multinomial(asked, [lost, won, 1 - lost - won], size=2000)
    total, squares = counts[:, 1] - counts[:, 0], counts[:, 1] + counts[:, 0]
    low, high = difference_interval(total, squares, asked)
    covered = np.mean((low <= won - lost) & (won - lost <= high))
    assert 0.93 <= covered <= 0.97, covered


def test_the_interval_of_soft_scores_covers_too() -> None:
    rng = np.random.default_rng(2)
    change = rng.choice([-1, -0.6, -0.3, 0, 0.3, 1], p=[0.04, 0.03, 0.03, 0.84, 0.04, 0.02],
                        size=(2000, 500))  # fmt: skip
    truth = float(np.dot([-1, -0.6, -0.3, 0, 0.3, 1], [0.04, 0.03, 0.03, 0.84, 0.04, 0.02]))
    low, high = difference_interval(change.sum(1), (change**2).sum(1), 500)
    assert 0.93 <= np.mean((low <= truth) & (truth <= high)) <= 0.97

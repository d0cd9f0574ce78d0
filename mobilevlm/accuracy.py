"""Shares of right answers with their intervals, and the difference of two models on the same
questions.

A score is 0 or 1, or between (VQA's soft accuracy, ANLS). The intervals hold for both: a score
between 0 and 1 varies no more than a coin of the same mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Z95 = 1.959964
"""Standard deviations of a two-sided 95% interval."""


@dataclass(frozen=True)
class Score:
    """Right answers out of ``asked``, and the Wilson 95% interval of their share."""

    asked: int
    right: float
    """Sum of the scores; a whole number where each is 0 or 1"""
    low: float
    high: float

    @property
    def accuracy(self) -> float:
        return self.right / self.asked if self.asked else 0.0


@dataclass(frozen=True)
class Difference:
    """Score of a second model minus that of a first one, on the same questions."""

    asked: int
    mean: float
    low: float
    high: float
    """95% interval of the mean"""
    first_better: int
    second_better: int
    """Questions with unlike scores: what McNemar's test counts"""
    p: float
    """Exact two-sided probability of a split at least as uneven if both are equally good"""


def wilson(right: float, asked: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927); 0 and 1 when nothing was asked."""
    if asked == 0:
        return 0.0, 1.0
    share = right / asked
    middle = share + z * z / (2 * asked)
    reach = z * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    scale = 1 + z * z / asked
    return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)


def score(outcomes: Iterable[float]) -> Score:
    """Sum scores and bound their mean."""
    results = list(outcomes)
    low, high = wilson(sum(results), len(results))
    return Score(len(results), sum(results), low, high)


def difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Compare the scores of two models, question by question.

    Raises:
        ValueError: not as many of both.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} scores: expected the same questions")
    change = np.asarray(second, float) - np.asarray(first, float)
    total, asked = float(change.sum()), len(change)
    low, high = difference_interval(total, float((change**2).sum()), asked)
    worse, better = int((change < 0).sum()), int((change > 0).sum())
    mean = total / asked if asked else 0.0
    return Difference(asked, mean, float(low), float(high), worse, better, mcnemar(worse, better))


def difference_interval(
    total: ArrayLike, squares: ArrayLike, asked: int, z: float = Z95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the interval of the mean of paired differences, given their sum and the sum of their
    squares: Wald's with half an observation more in each of the four cells (Agresti & Min 2005),
    which covers 95% also where few questions differ."""
    mean = np.asarray(total, float) / (asked + 2)
    variance = (np.asarray(squares, float) + 1) / (asked + 2) - mean**2
    reach = z * np.sqrt(variance / (asked + 2))
    return np.maximum(mean - reach, -1.0), np.minimum(mean + reach, 1.0)


def mcnemar(first_better: int, second_better: int) -> float:
    """Return the exact two-sided p of McNemar's test: a fair coin falls so unevenly or more."""
    count, least = first_better + second_better, min(first_better, second_better)
    if 2 * least == count:
        return 1.0
    log_term = math.lgamma(count + 1) - math.lgamma(least + 1) - math.lgamma(count - least + 1)
    term, share = 1.0, 1.0
    for index in range(least, 0, -1):  # binomial coefficients, relative to the largest
        term *= index / (count - index + 1)
        share += term
        if term < 1e-18:
            break
    return min(1.0, 2 * share * math.exp(log_term - count * math.log(2)))


def plain_score(value: Score) -> dict[str, Any]:
    """Return a score in plain JSON types, its accuracy included."""
    return {"accuracy": round(value.accuracy, 4), **vars(value)}

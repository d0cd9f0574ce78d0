"""Bits for each layer, against all combinations of small cases."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mobilevlm.export.search.bit_allocation import Option, front, hull, within_kl, within_size
from mobilevlm.recipe import LinearFormat

pytestmark = pytest.mark.pure

Q4 = LinearFormat("q4")


def random_choices(seed: int) -> list[list[Option]]:
    """Four groups with four options: larger is mostly better, not always."""
    random = np.random.default_rng(seed)
    return [
        [
            Option(Q4, int(random.integers(50, 100)) * bits, float(random.exponential(2.0**-bits)))
            for bits in (2, 3, 4, 8)
        ]
        for _ in range(4)
    ]


def all_totals(choices: list[list[Option]]) -> list[tuple[int, float]]:
    """Size and divergence of every combination."""
    return [
        (sum(option.size for option in found), sum(option.kl for option in found))
        for found in itertools.product(*choices)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_nothing_of_the_same_size_is_better_than_the_front(seed: int) -> None:
    choices = random_choices(seed)
    totals, found = all_totals(choices), front(choices)
    for allocation in found:
        best = min(kl for size, kl in totals if size <= allocation.size)
        assert allocation.kl == pytest.approx(best)
    assert found[0].size == min(size for size, _ in totals)
    assert found[-1].kl == pytest.approx(min(kl for _, kl in totals))


@pytest.mark.parametrize("seed", range(20))
def test_between_two_points_of_the_front_the_next_one_bounds_what_is_lost(seed: int) -> None:
    choices = random_choices(seed)
    totals, corners = all_totals(choices), front(choices)
    for size in range(corners[0].size, corners[-1].size, 7):
        found = within_size(choices, size)
        assert found is not None and found.size <= size
        best = min(kl for total, kl in totals if total <= size)
        before = [corner for corner in corners if corner.size <= size][-1]
        after = next(corner for corner in corners if corner.size > size)
        assert best - 1e-12 <= found.kl <= before.kl + 1e-12
        assert best >= after.kl - 1e-12


@pytest.mark.parametrize("seed", range(20))
def test_a_limit_of_divergence_gives_the_least_size_of_the_front(seed: int) -> None:
    choices = random_choices(seed)
    corners = front(choices)
    for corner in corners:
        assert within_kl(choices, corner.kl) == corner
    assert within_kl(choices, corners[-1].kl * 0.99) is None


def test_too_small_a_size_gives_nothing_and_a_large_one_the_least_divergence() -> None:
    choices = random_choices(0)
    least = front(choices)[0].size
    assert within_size(choices, least - 1) is None
    assert within_size(choices, least) == front(choices)[0]
    assert within_size(choices, 1 << 40) == front(choices)[-1]


def test_the_hull_leaves_out_what_is_larger_and_worse_or_above_the_line() -> None:
    a, b, c = Option(Q4, 10, 1.0), Option(Q4, 20, 0.4), Option(Q4, 30, 0.2)
    worse, above = Option(Q4, 25, 0.5), Option(Q4, 15, 0.9)
    assert hull([c, worse, above, b, a]) == [a, b, c]
    assert hull([a]) == [a]
    assert hull([a, Option(Q4, 10, 2.0)]) == [a]

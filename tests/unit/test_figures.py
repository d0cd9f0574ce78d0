"""Figures of merit on logits and vectors made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mobilevlm.export.quality import metrics as figures
from mobilevlm.export.quality.metrics import (
    TextFigures,
    compare_logits,
    compare_vectors,
    greedy_figures,
    greedy_match,
    perplexity_figures,
    text_figures,
    token_figures,
    vision_figures,
)

pytestmark = pytest.mark.pure

EVEN = np.zeros((1, 8), np.float32)
"""Eight tokens, each with 1/8."""


def test_equal_distributions_have_no_divergence_and_agree() -> None:
    logits = np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32)
    found = compare_logits(logits + 7, logits)  # the same after softmax
    assert found.kl == pytest.approx([0, 0, 0], abs=1e-6)
    assert found.top1.all() and (found.top5 == 1).all()


def test_divergence_is_that_of_the_formula() -> None:
    half = np.log(np.array([[0.5, 0.25, 0.125, 0.125, 1e-9, 1e-9]], np.float32))
    found = np.log(np.array([[0.25, 0.5, 0.125, 0.125, 1e-9, 1e-9]], np.float32))
    # 0.5 ln 2 - 0.25 ln 2
    assert compare_logits(found, half).kl[0] == pytest.approx(0.25 * math.log(2), rel=1e-5)
    assert not compare_logits(found, half).top1[0]
    assert compare_logits(found, half).kl[0] >= 0


def test_divergence_goes_from_the_reference_to_the_found_one() -> None:
    sure = np.array([[30, 0, 0, 0, 0, 0, 0, 0]], np.float32)
    # All the reference's mass where the artifact has 1/8: ln 8. The other way round it is larger.
    assert compare_logits(EVEN, sure).kl[0] == pytest.approx(math.log(8), rel=1e-5)
    assert compare_logits(sure, EVEN).kl[0] > 20


def test_top5_counts_the_tokens_in_common_whatever_their_order() -> None:
    exact = np.array([[9, 8, 7, 6, 5, 0, 0, 0]], np.float32)
    found = np.array([[5, 6, 7, 0, 0, 8, 9, 0]], np.float32)  # 0, 1, 2 of the five
    assert compare_logits(found, exact).top5[0] == pytest.approx(3 / 5)


def test_positions_are_compared_in_chunks_that_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = np.random.default_rng(1)
    found, exact = (random.standard_normal((2, 11, 40)) * 3).astype(np.float32)
    whole = compare_logits(found, exact)
    monkeypatch.setattr(figures, "CHUNK", 4)
    parts = compare_logits(found, exact)
    for name in ("kl", "top1", "top5"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))


def test_token_figures_take_all_positions_of_all_samples_together() -> None:
    sure = np.array([[30, 0, 0, 0, 0, 0, 0, 0]], np.float32)
    parts = [
        compare_logits(EVEN, sure),
        compare_logits(np.repeat(sure, 3, 0), np.repeat(sure, 3, 0)),
    ]
    found = token_figures(parts)
    assert found["kl"] == pytest.approx(math.log(8) / 4, rel=1e-3)
    assert found["kl_max"] == pytest.approx(math.log(8), rel=1e-3)
    assert found["kl"] < found["kl_p99"] < found["kl_max"]
    assert found["top1_agreement"] == 1  # ties: the first token is the likeliest of equals


def test_perplexity_ratio_is_over_all_tokens() -> None:
    # 3 tokens at 1 nat more, 1 token at 1 nat less: exp(2 / 4).
    parts = [TextFigures(6.0, 3.0, 3), TextFigures(0.5, 1.5, 1)]
    assert perplexity_figures(parts)["perplexity_ratio"] == pytest.approx(math.exp(0.5), rel=1e-3)
    assert perplexity_figures(parts)["perplexity"] == pytest.approx(math.exp(6.5 / 4), rel=1e-3)


def test_a_text_beyond_what_a_float_holds_is_infinitely_unlikely() -> None:
    """Over 709 nats per token, as a head with broken scales makes them."""
    found = perplexity_figures([TextFigures(8000.0, 30.0, 10)])
    assert found == {"perplexity": math.inf, "perplexity_ratio": math.inf}


def test_text_is_judged_by_the_probabilities_of_its_tokens() -> None:
    exact = np.log(np.array([[0.5, 0.5], [0.25, 0.75]], np.float32))
    found = np.log(np.array([[0.1, 0.9], [0.25, 0.75]], np.float32))
    judged = text_figures(found, exact, [0, 1])
    assert judged.exact == pytest.approx(-math.log(0.5 * 0.75), rel=1e-5)
    assert judged.found == pytest.approx(-math.log(0.1 * 0.75), rel=1e-5)
    assert judged.tokens == 2


def test_vectors_are_compared_row_by_row_and_as_a_whole() -> None:
    exact = np.array([[3, 4], [0, 5]], np.float32)
    found = np.array([[3, 4], [5, 0]], np.float32)  # the second at a right angle
    near = vision_figures([compare_vectors(found, exact)])
    assert near["cosine"] == 0 and near["cosine_mean"] == 0.5
    assert near["relative_error"] == pytest.approx(math.sqrt(50 / 50), rel=1e-3)


@pytest.mark.parametrize(
    ("expected", "share"), [([5, 6, 7, 8], 1), ([5, 6, 0, 8], 0.5), ([0, 6, 7, 8], 0)]
)
def test_greedy_match_ends_at_the_first_token_that_differs(
    expected: list[int], share: float
) -> None:
    assert greedy_match([5, 6, 7, 8], expected) == share


def test_exact_answers_are_those_that_match_throughout() -> None:
    assert greedy_figures([1, 0.5, 1, 0]) == {"greedy_match": 0.625, "greedy_exact": 0.5}

"""Capacity of experts, by hand: who queues where, and who is left out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import fixture_named

from mobilevlm.decoder_spec import ExpertsSpec
from mobilevlm.reference.experts import Capacity, SparseMLP


@pytest.mark.parametrize(
    ("capacity", "tokens", "slots"),
    [
        (Capacity(1.0, 4), 99, 50),  # ceil(99 / 4 * 2), as in the phi2 fixture
        (Capacity(1.5, 0), 100, 75),
        (Capacity(2.0, 0), 1, 1),  # a decoding step always has room for its choices
        (Capacity(1.0, 4), 1, 4),
    ],
)
def test_places_in_each_of_four_experts(capacity: Capacity, tokens: int, slots: int) -> None:
    assert capacity.slots(tokens, experts=4, top_k=2) == slots


def routed(
    logits: list[list[float]], capacity: Capacity | None, renormalize: bool = True
) -> SparseMLP:
    """Experts of two channels after a pass; the router hands its input on as logits."""
    experts = ExpertsSpec((0,), (3,), 2, renormalize=renormalize)
    base = fixture_named("moe_llava_stablelm").model.spec.decoder
    spec = replace(base, hidden_size=3, intermediate_size=4, experts=experts)
    sparse = SparseMLP(spec, 0)
    torch.nn.init.eye_(sparse.router.weight)
    sparse.capacity = capacity
    with torch.no_grad():
        sparse(torch.tensor(logits))
    return sparse


HIGH, MIDDLE, LOW = 2.0, 1.0, -9.0
FIRST = [[HIGH, MIDDLE, LOW], [MIDDLE, HIGH, LOW], [HIGH, LOW, MIDDLE]]
"""First and second choices: 0 then 1, 1 then 0, 0 then 2."""


def test_first_choices_go_before_all_second_ones() -> None:
    """Two places each: expert 0 is full of first choices, so the second token loses it."""
    sparse = routed(FIRST, Capacity(1.0, 0))
    assert sparse.chosen.tolist() == [[0, 1], [1, 0], [0, 2]]
    assert (sparse.weights > 0).tolist() == [[True, True], [True, False], [True, True]]
    assert sparse.weights[1].tolist() == [1.0, 0.0]


def test_a_token_without_any_place_gets_nothing() -> None:
    same = [[HIGH, MIDDLE, LOW]] * 3
    sparse = routed(same, Capacity(0.5, 0))  # one place each
    assert sparse.weights[1:].tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_without_capacity_nobody_is_left_out_and_weights_sum_to_one() -> None:
    sparse = routed(FIRST, None)
    assert torch.allclose(sparse.weights.sum(dim=-1), torch.ones(3))
    share = torch.tensor([HIGH, MIDDLE]).softmax(0)
    assert torch.allclose(sparse.weights[0], share)


def test_weights_may_stay_probabilities() -> None:
    sparse = routed(FIRST, None, renormalize=False)
    assert torch.equal(sparse.weights, sparse.probabilities.gather(1, sparse.chosen))

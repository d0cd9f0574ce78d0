"""Measurements for a plan and its choice, with invented times on an invented clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from mobilevlm.plan import PREFILL_FROM, MemorySetting, Plan
from mobilevlm.runtime.tuning.plan_file import TunedPlan
from mobilevlm.runtime.tuning.questions import (
    LENGTHS,
    ROUNDS,
    Budget,
    StageTimes,
    draft_cost,
    fastest,
    prefill_from,
    thread_counts,
    tune,
)

pytestmark = pytest.mark.pure


@dataclass
class Machine:
    """A device: each measurement takes a second of its clock."""

    vision: dict[int, float] = field(default_factory=lambda: {4: 1.0, 3: 1.1, 2: 1.5})
    """Seconds by threads"""
    step: dict[int, float] = field(default_factory=lambda: {4: 0.05, 3: 0.04, 2: 0.03})
    hybrid: float = 2.0
    """Time of that engine, in times of onnx"""
    spinning_off: float = 1.2
    packed: float = 0.9
    vision_packed: float = 1.0
    tile: dict[int, float] = field(default_factory=lambda: {1: 1.0, 2: 0.7, 4: 0.8})
    """Seconds of some tiles by how many are encoded at the same time"""
    now: float = 0.0
    opened: list[Plan] = field(default_factory=list)

    def stages(self, plan: Plan) -> StageTimes:
        self.now += 1
        self.opened.append(plan)
        scale = self.hybrid if plan.engine == "hybrid" else 1.0
        scale *= 1 if plan.spinning else self.spinning_off
        prefill = 2 * (self.packed if plan.prefill_weights == "packed" else 1)
        vision, step = self.vision[plan.vision_threads or 4], self.step[plan.decoder_threads or 4]
        vision *= self.vision_packed if plan.vision_weights == "packed" else 1
        return StageTimes(scale * vision, scale * prefill, scale * step)

    def pieces(self, plan: Plan, lengths: Sequence[int]) -> dict[int, tuple[float, float]]:
        self.now += 1
        return {length: (0.01 * length, 0.2 + 0.005 * length) for length in lengths}

    def chunks(self, plan: Plan, sizes: Sequence[int]) -> dict[int, float]:
        self.now += 1
        return {size: 1 + abs(size - 256) / 256 for size in sizes}

    def tiles(self, plan: Plan, counts: Sequence[int]) -> dict[int, float]:
        self.now += 1
        return {count: self.tile[count] for count in counts}

    def drafts(self, plan: Plan, counts: Sequence[int]) -> dict[int, float]:
        self.now += 1
        return {count: 1 + 0.2 * count for count in counts}


def tuned(
    machine: Machine, seconds: float = 100, engines: Sequence[str] = ("onnx",), **options: Any
) -> TunedPlan:
    budget = Budget(seconds, lambda: machine.now)
    return tune(machine, budget, "digest", engines, 4, **options)


def test_each_stage_gets_the_threads_that_are_fastest_for_it() -> None:
    found = tuned(Machine())
    assert found.plans[0] == Plan("onnx", decoder_threads=2, prefill_chunk=256)
    assert found.complete
    chosen = {item.question: item.label for item in found.candidates if item.chosen}
    assert chosen["onnx: vision threads"] == "4" and chosen["onnx: decoder threads"] == "2"
    assert chosen["onnx: spinning"] == "on"
    runs = {item.label: item.runs for item in found.candidates if "decoder" in item.question}
    assert runs == {"4": ROUNDS + 1, "3": ROUNDS, "2": ROUNDS}


def test_every_candidate_is_told_and_one_of_each_question_is_chosen() -> None:
    found = tuned(Machine(), prompts=["onnx"], packing=True)
    questions = {item.question for item in found.candidates}
    assert len(questions) == 7 + len(LENGTHS)
    for question in questions:
        items = [item for item in found.candidates if item.question == question]
        assert len(items) > (question != "engine") and sum(item.chosen for item in items) == 1


def test_threads_that_wait_asleep_are_chosen_where_that_is_faster() -> None:
    assert not tuned(Machine(spinning_off=0.8)).plans[0].spinning


def test_the_engine_that_answers_a_question_first_comes_first() -> None:
    names = ["onnx", "hybrid"]
    assert [p.engine for p in tuned(Machine(hybrid=0.9), engines=names).plans] == ["hybrid", "onnx"]
    assert [p.engine for p in tuned(Machine(hybrid=1.1), engines=names).plans] == names


def test_an_engine_without_a_chance_is_measured_once() -> None:
    machine = Machine(hybrid=1.6)
    found = tuned(machine, engines=["onnx", "hybrid"])
    assert [plan.engine for plan in machine.opened].count("hybrid") == 1
    assert found.plans[1] == Plan("hybrid")


def test_drafts_are_measured_only_where_they_are_exact() -> None:
    found = tuned(Machine(hybrid=1.1), engines=["onnx", "hybrid"])
    drafts = {plan.engine: plan.draft_tokens for plan in found.plans}
    assert drafts["onnx"] is None
    # Seconds per token: 1; 1.4 / 1.96; 1.8 / 2.3056; 2.6 / 2.4748.
    assert drafts["hybrid"] == 2


def test_the_graph_for_prompts_is_used_from_where_it_pays() -> None:
    """By the times above from 40 positions on."""
    found = tuned(Machine(), prompts=["onnx"]).plans[0]
    assert (found.prefill_from, found.prefill_weights) == (48, "mapped")
    found = tuned(Machine(), prompts=["onnx"], packing=True).plans[0]
    assert found.prefill_weights == "packed"


@pytest.mark.parametrize(
    ("time", "packing", "expected"),
    [(0.5, True, "packed"), (0.5, False, "mapped"), (0.99, True, "mapped")],
)
def test_weights_of_the_image_encoder_are_copied_where_there_is_room_and_it_pays(
    time: float, packing: bool, expected: str
) -> None:
    found = tuned(Machine(vision_packed=time), packing=packing).plans[0]
    assert found.vision_weights == expected


@pytest.mark.parametrize(
    ("times", "allowed", "expected"),
    [
        ({}, [1, 2, 4], 2),
        ({}, [1], 1),
        ({2: 0.98, 4: 0.98}, [1, 2, 4], 1),
        ({2: 0.9, 4: 0.5}, [1, 2], 2),
        ({2: 0.9, 4: 0.5}, [1, 2, 4], 4),
    ],
)
def test_tiles_are_encoded_at_the_same_time_where_there_is_room_and_it_pays(
    times: dict[int, float], allowed: list[int], expected: int
) -> None:
    machine = Machine()
    machine.tile |= times
    found = tuned(machine, tiles={"onnx": allowed})
    assert found.plans[0].tiles_at_once == expected
    told = [item.label for item in found.candidates if "tiles of an image" in item.question]
    assert told == [str(count) for count in allowed if len(allowed) > 1]


def test_no_more_tiles_are_tried_at_the_same_time_than_the_stage_has_threads() -> None:
    machine = Machine(vision={4: 1.0, 3: 1.0, 2: 0.5}, tile={1: 1.0, 2: 0.9, 4: 0.1})
    [found] = tuned(machine, tiles={"onnx": [1, 2, 4]}).plans
    assert (found.vision_threads, found.tiles_at_once) == (2, 2)


@pytest.mark.parametrize(("memory", "positions"), [("compact", 48), ("in turn", PREFILL_FROM)])
def test_all_is_measured_with_the_memory_that_there_is(
    memory: MemorySetting, positions: int
) -> None:
    """Chunks are short then, and the prefill graph is measured where it can be kept open."""
    machine = Machine()
    found = tuned(machine, prompts=["onnx"], memory={"onnx": memory})
    assert {plan.memory for plan in machine.opened} == {memory}
    expected = replace(Plan("onnx", decoder_threads=2), prefill_from=positions)
    assert found.plans == (replace(expected, memory=memory),)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({8: (1, 2), 16: (2, 1), 24: (3, 2)}, 16),
        ({8: (2, 1), 16: (1, 2), 24: (3, 2)}, 24),
        ({8: (2, 1), 16: (3, 2)}, 8),
        ({8: (1, 2), 16: (1, 2)}, 1 << 20),
    ],
)
def test_no_longer_piece_loses_behind_the_threshold(
    times: dict[int, tuple[float, float]], expected: int
) -> None:
    assert prefill_from(times) == expected


def test_without_a_clear_gain_the_default_stays() -> None:
    assert fastest({"default": [1.0, 1.0], "other": [0.98, 0.98]}) == "default"
    assert fastest({"default": [1.0, 1.0], "other": [0.96, 0.96, 9]}) == "other"
    assert fastest({"default": [2.0], "a": [1.5], "b": [1.2]}) == "b"
    assert draft_cost(0, 1.0) == 1.0


def test_processors_to_try() -> None:
    assert [thread_counts(most) for most in (1, 2, 4, 8)] == [[1], [2, 1], [4, 3, 2], [8, 6, 4]]


@pytest.mark.parametrize("seconds", range(1, 14))
def test_a_small_budget_is_kept_and_told(seconds: int) -> None:
    """A measurement that has begun is finished, so the budget may be exceeded by one."""
    machine = Machine()
    found = tuned(machine, seconds, engines=["onnx", "hybrid"], prompts=["onnx"], packing=True)
    assert machine.now <= seconds + 1
    assert not found.complete
    assert found.plans[0].engine == "onnx" and found.candidates


def test_what_was_not_asked_keeps_its_default() -> None:
    found = tuned(Machine(), 1, prompts=["onnx"])
    assert found.plans == (replace(Plan("onnx"), prefill_from=PREFILL_FROM),)
    assert not found.complete

"""A short run of every fuzzer (tests/fuzz); ``make fuzz MINUTES=30`` runs them longer."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from fuzz.harness import NAMES, Fuzzer, run
from fuzz.mutations import mutate_json
from fuzz.worker import run_case

COUNTS = {"checkpoints": 60, "gguf": 100, "gguf_pairs": 8, "manifests": 40, "templates": 60}
"""Cases of fuzzers that are slower, or much faster, than most."""


@pytest.mark.parametrize("name", NAMES)
def test_no_case_ends_in_a_signal_a_hang_or_a_raw_exception(name: str) -> None:
    figures = run(name, COUNTS.get(name, 200), seed=1)
    assert figures.failures == []
    assert figures.accepted + figures.refused == figures.cases > 0
    assert figures.refused > 0 or name == "plans"  # a wrong plan is a warning


def test_a_mutation_changes_one_of_equal_parts_that_are_one_object() -> None:
    step: dict[str, Any] = {"type": "Strip", "content": {"a": [1]}}
    for seed in range(100):
        mutated = mutate_json(random.Random(seed), [step] * 20, 1)
        assert sum(part != step for part in mutated) <= 1


def test_a_fault_of_a_fuzzer_is_told_apart_from_a_signal(tmp_path: Path) -> None:
    def mutate(base: Path, source: random.Random, scratch: Path) -> Any:
        return [][source.randrange(3)]

    fuzzer = Fuzzer(lambda base: None, mutate, lambda case: None)
    outcome = run_case(fuzzer, tmp_path, random.Random(1), tmp_path)
    assert outcome == "raw no case was made: IndexError: list index out of range"

"""A short run of every fuzzer (tests/fuzz); ``make fuzz MINUTES=30`` runs them longer."""

from __future__ import annotations

import pytest
from fuzz.harness import NAMES, run

COUNTS: dict[str, int] = {"checkpoints": 60, "gguf": 100, "manifests": 40, "templates": 60}
"""Cases of fuzzers that are slower, or much faster, than most."""


@pytest.mark.parametrize("name", NAMES)
def test_no_case_ends_in_a_signal_a_hang_or_a_raw_exception(name: str) -> None:
    figures = run(name, COUNTS.get(name, 200), seed=1)
    assert figures.failures == []
    assert figures.accepted + figures.refused == figures.cases > 0
    assert figures.refused > 0 or name == "plans"  # a wrong plan is a warning

"""The long runs of tests/endurance, briefly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["kills", "--count", "12"], "kills=1"),
        (["replaced", "--count", "8", "--loads", "24"], "loads=24"),
        (["replaced", "--count", "8", "--loads", "24", "--two-renames"], "loads=24"),
        (["first-use", "--count", "1"], "8 answers"),
    ],
    ids=["kills", "replaced", "replaced by two renames", "first use"],
)
def test_a_short_run(arguments: list[str], expected: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "endurance", *arguments],
        cwd=TESTS,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert expected in done.stdout

"""How threads of the libraries that we start wait for work: briefly awake, then asleep.

GNU OpenMP, which llama.cpp and torch may be built with, spins for some milliseconds at each barrier
by default, and a decoder has hundreds for each token. On a quiet machine that costs nothing. Where
other programs want the processors, each wait takes away the time that the awaited thread needs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SPINS = "1000"
"""Rounds of waiting awake, a few microseconds."""
_SPIN_COUNT = "GOMP_SPINCOUNT"
_SAID = (_SPIN_COUNT, "OMP_WAIT_POLICY")
"""Variables by which a person has decided already."""
_LOOKS, _APART = 3, 0.003
"""Looks at what runs, and seconds between them: what runs at each of them is no passing visitor."""


def wait_asleep() -> None:
    """Have the libraries that this process and its children load from now on sleep soon."""
    if not any(name in os.environ for name in _SAID):
        os.environ[_SPIN_COUNT] = SPINS


@contextmanager
def waiting_asleep() -> Iterator[None]:
    """Have a library that is loaded in this block sleep soon. OpenMP reads the variable then."""
    before = os.environ.get(_SPIN_COUNT)
    wait_asleep()
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_SPIN_COUNT, None)


def processors_wanted(threads: int, root: Path = Path("/proc")) -> bool:
    """Return whether other programs run on processors that so many threads would use. Where the
    system does not tell they do not."""
    for look in range(_LOOKS):
        if look:
            time.sleep(_APART)
        others = _running_elsewhere(root)
        if others is None or others + threads <= (os.cpu_count() or 1):
            return False
    return True


def _running_elsewhere(root: Path) -> int | None:
    """Return how many threads of other programs run or wait for a processor."""
    try:
        running = int((root / "loadavg").read_text().split()[3].partition("/")[0])
        states = [path.read_text() for path in root.glob("self/task/*/stat")]
    except (OSError, ValueError, IndexError):
        return None
    return running - sum(state.rpartition(")")[2].split()[0] == "R" for state in states)

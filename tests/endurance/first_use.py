"""Several processes that use a built-in model at once, with an empty cache folder: all answer."""

from __future__ import annotations

import tempfile
from pathlib import Path

from endurance.processes import finish, own_cache, start


def run(count: int, processes: int = 8, model: str = "nano-moe") -> int:
    """Begin ``count`` times with an empty cache; the answers that were given.

    Raises:
        AssertionError: a process failed.
    """
    answers = 0
    for _ in range(count):
        cache = own_cache()
        children = [start(_answer, model) for _ in range(processes)]
        codes = [finish(child) for child in children]
        assert codes == [0] * processes, codes
        left = sorted(path.suffix for path in (cache / "mobilevlm" / "models").iterdir())
        assert len(left) == 2 and ".lock" in left, left
        answers += processes
    return answers


def _answer(model: str) -> None:
    import mobilevlm

    with mobilevlm.load(model, threads=1) as vlm:
        assert "5" in vlm.generate("What is 2 plus 3?", max_new_tokens=8).text


def folder() -> Path:
    """A new folder for a run."""
    return Path(tempfile.mkdtemp(prefix="endurance-"))

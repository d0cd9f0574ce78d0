"""Running a fuzzer: mutated inputs in a worker process that is watched from outside.

A case is made from a seed and its number alone, so a failure can be made again:
``python -m fuzz plans --seed 1 --only 812``.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).parent
NAMES = tuple(
    sorted(
        path.stem
        for path in HERE.glob("[a-z]*.py")
        if path.stem not in ("harness", "image_damage", "mutations", "worker")
    )
)
"""Names of the fuzzers, which are those of their files."""
WATCHED_EVERY = 0.05
"""Seconds between two looks at a worker's memory."""
BACKSTOP = 6 << 30
"""Bytes from which on a worker is ended before its case is finished."""


@dataclass(frozen=True)
class Fuzzer:
    """How to make one kind of input wrong, and what is done with it."""

    prepare: Callable[[Path], None]
    """Write the well-formed inputs to a folder; called once for a run."""
    mutate: Callable[[Path, random.Random, Path], Any]
    """Make one case from the folder of ``prepare``, below an empty scratch folder."""
    attempt: Callable[[Any], None]
    """Give a case to the product. It may return (accepted) or raise MobileVLMError (refused);
    any other exception is a failure."""
    warm: Callable[[Path], None] | None = None
    """Called once in each worker before its first case, with the folder of ``prepare``: imports and
    first calls that would count as a case's time and memory."""
    seconds: float = 5.0
    """Longest time of a case; longer is a hang."""
    memory: int = 256 << 20
    """Most bytes that a case may add to the worker's resident memory."""


@dataclass
class Figures:
    """Outcome of a run."""

    name: str
    seed: int
    cases: int = 0
    accepted: int = 0
    refused: int = 0
    raw: list[str] = field(default_factory=list)
    """Cases that ended in an exception other than MobileVLMError: ``N: Type: message``."""
    signals: list[str] = field(default_factory=list)
    """Cases that ended the worker: ``N: SIGABRT``."""
    hangs: list[str] = field(default_factory=list)
    memory: list[str] = field(default_factory=list)
    """Cases that took more memory than the fuzzer allows: ``N: bytes``."""
    seconds: float = 0.0

    @property
    def failures(self) -> list[str]:
        """All that must not happen."""
        return [
            f"{kind} {line}"
            for kind in ("raw", "signals", "hangs", "memory")
            for line in getattr(self, kind)
        ]

    def note(self, number: int, outcome: str) -> None:
        """Count one case. ``outcome``: ``accepted``, ``refused`` or ``KIND DETAIL``."""
        self.cases += 1
        if outcome in ("accepted", "refused"):
            setattr(self, outcome, getattr(self, outcome) + 1)
            return
        kind, _, detail = outcome.partition(" ")
        getattr(self, kind).append(f"{number}: {detail}")

    def line(self) -> str:
        """The figures as one line of text."""
        return (
            f"{self.name:<12} {self.cases} cases, {self.accepted} accepted, {self.refused} "
            f"refused; signals {len(self.signals)}, hangs {len(self.hangs)}, raw exceptions "
            f"{len(self.raw)}, over memory {len(self.memory)}; {self.seconds:.0f} s"
        )


def find_fuzzer(name: str) -> Fuzzer:
    """Return the fuzzer of a module here."""
    fuzzer: Fuzzer = importlib.import_module(f"fuzz.{name}").FUZZER
    return fuzzer


def case_random(seed: int, number: int) -> random.Random:
    """Return the source of randomness of one case."""
    return random.Random(f"{seed}-{number}")


def run(
    name: str, count: int, seed: int = 0, minutes: float | None = None, first: int = 0
) -> Figures:
    """Run cases ``first`` to ``first + count`` of a fuzzer, or as many as fit into ``minutes``."""
    fuzzer, figures, start = find_fuzzer(name), Figures(name, seed), time.monotonic()
    end = None if minutes is None else start + 60 * minutes
    with tempfile.TemporaryDirectory(prefix=f"fuzz-{name}-") as folder:
        base = Path(folder) / "base"
        base.mkdir()
        fuzzer.prepare(base)
        number, last = first, first + count
        while number < last and (end is None or time.monotonic() < end):
            number = _run_worker(name, fuzzer, figures, Path(folder), (number, last), end)
    figures.seconds = time.monotonic() - start
    return figures


def _run_worker(
    name: str,
    fuzzer: Fuzzer,
    figures: Figures,
    folder: Path,
    span: tuple[int, int],
    end: float | None,
) -> int:
    """Start a worker for the cases of a span; return the number of the next case after it."""
    number, last = span
    command = [sys.executable, "-m", "fuzz.worker", name, str(figures.seed), str(number), str(last)]
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    errors = folder / "errors.txt"
    errors.unlink(missing_ok=True)
    with errors.open("ab") as stderr:  # which the worker empties before each case
        worker = subprocess.Popen(
            [*command, str(folder)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)},
            start_new_session=True,
        )
    assert worker.stdout is not None
    # A worker imports the product before its first case; "ready" tells when that is done.
    patience = 120.0
    try:
        while number < last and (end is None or time.monotonic() < end):
            line = _next_line(worker, worker.stdout, patience)
            if line == "ready":
                patience = fuzzer.seconds + 1
                continue
            if line.startswith("signals exit"):  # Python ended by itself, and said why
                said = errors.read_text(errors="replace").strip().splitlines()[-1:]
                line = ": ".join([line, *said])[:300]
            figures.note(number, line or "signals before a case")
            number += 1
            if line.startswith(("signals", "hangs", "memory over")):
                break
    finally:
        _end(worker)
        shutil.rmtree(folder / "scratch", ignore_errors=True)
    return number


def _next_line(worker: subprocess.Popen[bytes], stdout: IO[bytes], patience: float) -> str:
    """Return the next outcome, which may be the end of the worker."""
    deadline = time.monotonic() + patience
    with selectors.DefaultSelector() as selector:
        selector.register(stdout, selectors.EVENT_READ)
        while time.monotonic() < deadline:
            if selector.select(WATCHED_EVERY):
                line = stdout.readline().decode(errors="replace").strip()
                if line:
                    return line
                code = worker.wait()
                return f"signals {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"
            if _resident(worker.pid) > BACKSTOP:
                return f"memory over {BACKSTOP}"
    return f"hangs over {patience:g} s"


def _resident(group: int) -> int:
    """Return the resident bytes of the processes of a group."""
    total = 0
    for entry in Path("/proc").glob("[0-9]*/statm"):
        try:
            if os.getpgid(int(entry.parent.name)) == group:
                total += int(entry.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError, ValueError):  # it has just ended
            continue
    return total


def _end(worker: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    if worker.stdout is not None:
        worker.stdout.close()

"""Soak of one model in one process: many questions, many openings, and what grows meanwhile.

    python benchmarks/soak.py nano --generates 10000 --loads 1000 [--engine onnx]

Prints resident memory, threads and open files at 10%, 50% and 100% of each, and fails where one of
them grew after 10%: memory by more than ``ALLOWED`` bytes, the others at all. Linux only.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import mobilevlm
from mobilevlm.runtime import VLM

ALLOWED = 16 << 20
"""Bytes that a heap may differ by between two looks."""
IMAGES, QUESTIONS = 7, ("What is it?", "Where?", "Is there a circle?", "Describe it in detail.")


@dataclass(frozen=True)
class Look:
    """Resources that the process holds."""

    done: int
    resident: int
    """Bytes"""
    threads: int
    files: int

    def line(self) -> str:
        """Return the look as text."""
        return (
            f"{self.done:>7}  {self.resident / 1e6:8.1f} MB  {self.threads:3} threads  "
            f"{self.files:3} files"
        )


def look(done: int) -> Look:
    """Return what this process has after so many rounds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    tasks, files = (len([*Path(f"/proc/self/{name}").iterdir()]) for name in ("task", "fd"))
    return Look(done, pages * os.sysconf("SC_PAGE_SIZE"), tasks, files)


def soak(rounds: int, work: Callable[[int], None]) -> list[Look]:
    """Do the work so many times; looks at 10%, 50% and 100%."""
    looks, moments = [], {max(rounds // 10, 1), rounds // 2, rounds}
    for done in range(1, rounds + 1):
        work(done)
        if done in moments:
            looks.append(look(done))
    return looks


def asking(vlm: VLM) -> Callable[[int], None]:
    """Return the work of one question: images, questions and settings in turns; some streams are
    left in the middle."""
    size = vlm.spec.image.square.size
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (size, size, 3), np.uint8) for _ in range(IMAGES)]

    def ask(number: int) -> None:
        chosen = [images[number % IMAGES]] if number % 3 else []
        stream = vlm.stream(QUESTIONS[number % len(QUESTIONS)], chosen, max_new_tokens=4)
        if number % 5:
            stream.finish()
        else:
            next(stream, None)
            stream.close()

    return ask


def opening(bundle: str, engine: str) -> Callable[[int], None]:
    """Return the work of one opening, with a question and without in turns."""

    def open_and_close(number: int) -> None:
        with mobilevlm.load(bundle, engine) as vlm:
            if number % 2:
                vlm.generate("What is it?", max_new_tokens=2)

    return open_and_close


def growth(looks: list[Look]) -> list[str]:
    """Return what grew from the first look to the last."""
    first, last = looks[0], looks[-1]
    found = []
    if last.resident > first.resident + ALLOWED:
        found.append(f"memory by {(last.resident - first.resident) / 1e6:.1f} MB")
    found += [
        f"{name} from {before} to {after}"
        for name, before, after in (
            ("threads", first.threads, last.threads),
            ("files", first.files, last.files),
        )
        if after > before
    ]
    return found


def main() -> None:
    """Soak and print; exit with 1 where something grew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--generates", type=int, default=10_000)
    parser.add_argument("--loads", type=int, default=1000)
    options = parser.parse_args()
    grown = []
    if options.generates:
        with mobilevlm.load(options.bundle, options.engine) as vlm:
            grown += _show("questions", soak(options.generates, asking(vlm)))
    if options.loads:
        grown += _show("loads", soak(options.loads, opening(options.bundle, options.engine)))
    sys.exit(1 if grown else 0)


def _show(what: str, looks: list[Look]) -> list[str]:
    print(what)
    for item in looks:
        print(item.line(), flush=True)
    grown = growth(looks)
    if grown:
        print(f"grew: {', '.join(grown)}")
    return grown


if __name__ == "__main__":
    main()

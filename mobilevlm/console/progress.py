"""Progress of long work on stderr. Silent unless the command line turns it on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from mobilevlm.console.terminal import plain

LINES_EVERY = 20.0
"""Seconds between lines of progress in a pipe or a log."""

Advance: TypeAlias = Callable[[int], None]
"""Called with the amount of work that was just done."""


def ignore(amount: int) -> None:
    """Shows nothing."""


_enabled = False


def enable(on: bool = True) -> None:
    """Shows progress from now on (or hides it)."""
    global _enabled
    _enabled = on


def say(message: str) -> None:
    """One line about what was done, when progress is shown."""
    if _enabled:
        print(plain(message), file=sys.stderr, flush=True)


@contextmanager
def track(label: str, total: int) -> Iterator[Advance]:
    """Show a bar while the block runs; where there is no terminal, a line now and then."""
    if not _enabled:
        yield ignore
        return
    if not sys.stderr.isatty():
        yield _lines(label, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns: list[Any] = [
        TextColumn("{task.description:<12}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(plain(label), total=max(total, 1))
        yield lambda amount: bar.advance(task, amount)


def _lines(label: str, total: int) -> Advance:
    """Return what prints how far the work is, every ``LINES_EVERY`` seconds at most."""
    done, last = 0, time.monotonic()

    def advance(amount: int) -> None:
        nonlocal done, last
        done += amount
        if time.monotonic() - last >= LINES_EVERY and done < total:
            last = time.monotonic()
            say(f"{label:<12}{100 * done // total} %")

    return advance


@contextmanager
def track_share(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for work that tells how much of a total is done: call with ``(done, total)``."""
    with track(label, 100) as advance:
        shown = 0

        def show(done: int, total: int) -> None:
            nonlocal shown
            percent = 100 * done // max(total, 1)
            advance(percent - shown)
            shown = percent

        yield show

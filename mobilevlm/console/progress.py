"""Progress of long work on stderr. Silent unless the command line turns it on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeAlias

from mobilevlm.console.terminal import filled, plain

LINES_EVERY = 10.0
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
        print(filled(plain(message), sys.stderr, indent=12), file=sys.stderr, flush=True)


def step(message: str) -> None:
    """Print one line about a step that begins, when progress is shown and no bar shows it."""
    if not sys.stderr.isatty():
        say(message)


@contextmanager
def track(label: str, total: int, *, done: int = 0, unit: str = "") -> Iterator[Advance]:
    """Show a bar while the block runs; where there is no terminal, a line now and then. ``done``:
    what was done of the total before; ``unit``: of amounts, whose rate is shown."""
    if not _enabled:
        yield ignore
        return
    if not sys.stderr.isatty():
        yield _lines(label, total, done, unit)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns: list[Any] = [
        TextColumn("{task.description:<12}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        *([TextColumn("{task.fields[rate]}", markup=False)] if unit else []),
        TimeRemainingColumn(),
    ]
    start, before = time.monotonic(), done
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(plain(label), total=max(total, 1), completed=done, rate="")

        def advance(amount: int) -> None:
            nonlocal done
            done += amount
            rate = _rate(done - before, time.monotonic() - start)
            bar.update(task, advance=amount, rate=f"{rate:.3g} {unit}/s")

        yield advance


def _rate(amount: int, seconds: float) -> float:
    return amount / max(seconds, 1e-3)


def _lines(label: str, total: int, done: int, unit: str) -> Advance:
    """Return what prints how far the work is, every ``LINES_EVERY`` seconds at most."""
    start = last = time.monotonic()
    before = done

    def advance(amount: int) -> None:
        nonlocal done, last
        done += amount
        now = time.monotonic()
        if now - last >= LINES_EVERY and done < total:
            last = now
            rate = _rate(done - before, now - start)
            line = f"{label:<12}{100 * done // total} %"
            if unit:
                line += f", {rate:.3g} {unit}/s"
            if rate:
                line += f", {timedelta(seconds=round((total - done) / rate))} left"
            say(line)

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

"""How many processes answer, with how many threads, and whether they share one copy of the weights.

A process that is forked after the model was loaded has the same pages of its weights, also of those
that the kernels have packed. It has no threads of the parent, so it computes with one. Where there
are to be more threads each process loads the model by itself, and shares what lies in mapped files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from mobilevlm.errors import MemoryLimitError, PromptError
from mobilevlm.plan import default_threads
from mobilevlm.runtime.answer.options import AnswerOptions
from mobilevlm.runtime.loading import load
from mobilevlm.runtime.memory.estimate import estimate
from mobilevlm.runtime.memory.limits import memory_limits, room_left

if TYPE_CHECKING:
    from collections.abc import Callable

    from mobilevlm.runtime.vlm import VLM

MOST = 4096
"""Processes that are counted"""
CACHE_MB = 64.0
"""Cache of each process: rows of a batch have less in common than the turns of a chat."""


@dataclass(frozen=True)
class Opened:
    """Processes to start."""

    count: int
    threads: int
    """Threads of each process"""
    open: Callable[[int], AbstractContextManager[VLM]]
    """Gives the process of this number its model."""
    shared: bool
    """True where they share one copy of the weights"""


@contextmanager
def opened_processes(
    loading: dict[str, Any],
    options: AnswerOptions,
    asked: int | None,
    rows: int,
    cores: int | None = None,
) -> Iterator[Opened]:
    """Decide how a bundle is run, and load it if its weights are to be shared. ``loading``:
    arguments of ``load``; ``asked``: the number of processes that a person wants; ``rows``: those
    that there is work for; ``cores``: those that may be used, where processes are not forked from
    this one.

    Raises:
        MobileVLMError: as of ``load``, or an option that no answer can have.
    """
    loading = {**loading, "cache_mb": CACHE_MB}
    may_fork, threads = cores is None, loading["threads"]
    cores = min(cores or MOST, default_threads())
    if asked and not threads:
        threads = max(cores // asked, 1)
    most = asked or max(cores // (threads or 1), 1)
    with load(**{**loading, "threads": 1}) as vlm:
        check_answers(vlm, options)
        memory = estimate(vlm.bundle.manifest, vlm.plan)
        room = room_left(memory_limits(asked_mb=loading["max_memory_mb"])).size
        forks = may_fork and vlm.engine == "onnx" and threads in (None, 1)
        fitting = _fitting(memory.own - forks * memory.weights, room)
        if asked and loading["max_memory_mb"] and asked > fitting:
            raise MemoryLimitError(
                f"--processes {asked}: {fitting} fit{'s' * (fitting == 1)} into --max-memory: give "
                f"fewer, or raise it"
            )
        count = min(asked or min(most, fitting), rows)
        if forks and (threads or 2 * count > cores or count == rows):
            yield Opened(count, 1, partial(_forked, vlm), shared=True)
            return
    count = min(asked or min(most, _fitting(memory.own, room)), rows)
    threads = threads or max(cores // count, 1)
    share = loading["max_memory_mb"] and loading["max_memory_mb"] / count
    own = {**loading, "threads": threads, "max_memory_mb": share}
    yield Opened(count, threads, partial(_loaded, own, options), shared=False)


def _fitting(each: float, room: float) -> int:
    """Return how many processes there may be, of which one is loaded. ``each``: bytes that another
    takes."""
    return 1 + int(min(max(room, 0.0) / (each + 1e6 * CACHE_MB), MOST))


def check_answers(vlm: VLM, options: AnswerOptions) -> None:
    """Refuse options, a schema or a grammar that no answer can have; nothing is computed.

    Raises:
        MobileVLMError: names what is wrong.
    """
    try:
        vlm.stream("a", **options).close()
    except PromptError:  # of a prompt that is not asked
        return


@contextmanager
def _forked(vlm: VLM, number: int) -> Iterator[VLM]:
    """Give the model of the parent."""
    vlm.go_on_in_child()
    yield vlm


@contextmanager
def _loaded(loading: dict[str, Any], options: AnswerOptions, number: int) -> Iterator[VLM]:
    """Give a model of the process's own."""
    with load(**loading) as vlm:
        check_answers(vlm, options)
        yield vlm

"""Processes that answer rows: as many at a time as there are, each row once.

They are forked, so that they have what their parent has loaded. A worker that ends before its
answer is started again; if the row ends it once more, that is the row's error. Neighbouring rows
about the same images go to one worker, which has the images in its cache.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import groupby, islice
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any, Generic, TypeAlias, TypeVar

from mobilevlm.errors import MobileVLMError
from mobilevlm.runtime.batch.rows import Row

ATTEMPTS = 2
"""Workers that a row may end."""
MOST_LOST = 3
"""Rows in a row, without an answer between, after which the workers are given up"""
TOGETHER = 8
"""Rows about the same images that go to a worker at a time, at most"""
GRACE = 2.0
"""Seconds that a worker without work may take to end"""
_DIES_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of Linux's prctl"""

T = TypeVar("T")
Record: TypeAlias = dict[str, Any]
"""A row of the output"""


@dataclass(frozen=True)
class Job(Generic[T]):
    """Job of workers."""

    open: Callable[[int], AbstractContextManager[T]]
    """Gives the worker of this number what it works with."""
    answer: Callable[[T, Row], dict[str, Any]]
    failed: Callable[[Row, str], dict[str, Any]]
    """Record of a row that no worker survives"""
    key: Callable[[Row], object] = lambda row: row.index
    """Neighbouring rows of equal keys go to one worker."""


@dataclass
class _Worker:
    number: int
    process: ForkProcess
    connection: Connection
    is_ready: bool = False
    rows: list[Row] = field(default_factory=list)
    """Rows that it has not answered; it is at the first"""


@dataclass
class Workers(Generic[T]):
    """Running processes."""

    job: Job[T]
    count: int
    _workers: list[_Worker] = field(default_factory=list)
    _lost: int = 0

    def __enter__(self) -> Workers[T]:
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()

    def answers(self, rows: Iterable[Row]) -> Iterator[dict[str, Any]]:
        """Yield the record of each row as soon as it is there; rows are read when a worker is free.

        Raises:
            MobileVLMError: a worker cannot begin, or the workers end again and again.
        """
        attempts: dict[int, int] = {}
        again: list[list[Row]] = []
        groups = neighbours(rows, self.job.key)
        following = next(groups, None)
        while len(self._workers) < self.count:
            self._workers.append(self._start(len(self._workers)))
        while True:
            for worker in self._workers:
                if not worker.is_ready or worker.rows or not (again or following):
                    continue
                if again:
                    worker.rows = again.pop()
                else:
                    worker.rows, following = following or [], next(groups, None)
                with contextlib.suppress(OSError):  # it ended; found out below
                    worker.connection.send(worker.rows)
            if not (again or following or any(worker.rows for worker in self._workers)):
                return
            for connection in wait([worker.connection for worker in self._workers]):
                worker = next(one for one in self._workers if one.connection is connection)
                try:
                    told = worker.connection.recv()
                except (EOFError, OSError):
                    record = self._replace(worker, attempts, again)
                    if record is not None:
                        yield record
                    continue
                if isinstance(told, MobileVLMError):
                    raise told
                if worker.is_ready:
                    self._lost = 0
                    worker.rows = worker.rows[1:]
                    yield told
                worker.is_ready = True

    def _replace(
        self, worker: _Worker, attempts: dict[int, int], again: list[list[Row]]
    ) -> dict[str, Any] | None:
        """Start another worker in place of one that ended; return the record of a row that it was
        the last worker of."""
        worker.process.join()
        cause = _cause(worker.process.exitcode)
        if not worker.is_ready:
            raise MobileVLMError(
                f"a worker process ended while it loaded the model ({cause}): give fewer "
                f"--processes"
            )
        worker.connection.close()
        record, left = None, worker.rows
        if left:
            row = left[0]
            attempts[row.index] = attempts.get(row.index, 0) + 1
            if attempts[row.index] == ATTEMPTS:
                self._lost += 1
                record = self.job.failed(row, f"it ended {ATTEMPTS} worker processes ({cause})")
                left = left[1:]
        if left:
            again.append(left)
        if self._lost >= MOST_LOST:
            raise MobileVLMError(
                f"worker processes ended at each of {MOST_LOST} rows ({cause}): give fewer "
                f"--processes, or look at these rows"
            )
        self._workers[self._workers.index(worker)] = self._start(worker.number)
        return record

    def _start(self, number: int) -> _Worker:
        ours, theirs = multiprocessing.Pipe()
        others = [worker.connection for worker in self._workers if not worker.connection.closed]
        process = multiprocessing.get_context("fork").Process(
            target=_work, args=(self.job, number, theirs, [ours, *others]), daemon=True
        )
        with warnings.catch_warnings():  # of threads: those of ours hold no lock that a child takes
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        theirs.close()
        return _Worker(number, process, ours)

    def close(self) -> None:
        """End all processes."""
        for worker in self._workers:
            worker.connection.close()
            if worker.rows or not worker.is_ready:
                worker.process.kill()
        for worker in self._workers:
            worker.process.join(GRACE)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._workers.clear()


def neighbours(rows: Iterable[Row], key: Callable[[Row], object]) -> Iterator[list[Row]]:
    """Yield the rows in groups of equal keys, none larger than :data:`TOGETHER`."""
    for _, group in groupby(rows, key):
        while part := list(islice(group, TOGETHER)):
            yield part


def _work(job: Job[Any], number: int, parent: Connection, others: list[Connection]) -> None:
    """Answer rows until the parent closes its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _die_with_parent()
    for connection in others:  # else nobody sees that the parent or a worker has ended
        connection.close()
    try:
        with job.open(number) as opened:
            parent.send(True)
            while True:
                for row in parent.recv():
                    parent.send(job.answer(opened, row))
    except MobileVLMError as error:
        parent.send(error)
    except (EOFError, ConnectionError):
        return


def _die_with_parent() -> None:
    """Have Linux end this process when its parent is killed; elsewhere it ends after its row."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)


def _cause(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        memory = ", perhaps for want of memory" if -exit_code == signal.SIGKILL else ""
        return f"by {name}{memory}"
    return f"exit code {exit_code}"

"""Rounds of the same work on every candidate in turn (A B A B), each in a process of its own."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from comparison.candidates import Candidate
from comparison.process import Worker, WorkerError, one_line
from comparison.work import NEW_TOKENS, PROMPT_TOKENS, NotSupportedError, Shapes
from mobilevlm.console import progress
from mobilevlm.console.progress import Advance

LENGTHS = (64, 128, 256, 512, 1024)
"""Prompts of the curves."""
CURVE_TOKENS = 16
PAUSE = 0.2
"""Seconds between two requests, in which the threads of the last peer stop spinning."""
COLD = 0.02
"""Share of a file that may still be in the page cache for a load to count as cold."""


@dataclass(frozen=True)
class Rounds:
    """How many of each kind."""

    loads: int = 0
    stages: int = 0
    curves: int = 0


@dataclass(frozen=True)
class Schedule:
    """How much is measured."""

    rounds: int = 5
    load_rounds: int = 3
    curve_rounds: int = 2
    lengths: tuple[int, ...] = LENGTHS
    new_tokens: int = NEW_TOKENS
    threads: int = 2
    memory: float = 8e9
    """Bytes that all workers together may hold: where the candidates do not fit side by side, each
    is started again in every round."""

    @property
    def planned(self) -> Rounds:
        return Rounds(self.load_rounds, self.rounds, self.curve_rounds)


@dataclass
class Samples:
    """Measurements of one candidate: values by row (comparison/figures.py), curves by prompt
    length, and failures."""

    rows: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    prefill: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    decode: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    notes: list[str] = field(default_factory=list)


def measure(
    candidates: Sequence[Candidate],
    shapes: Shapes,
    schedule: Schedule,
    samples: Mapping[str, Samples],
    done: Rounds,
) -> Generator[Rounds, None, None]:
    """The rounds that are not ``done``, into ``samples`` by candidate; after each of them yields
    how many are. A candidate that fails keeps what it gave until then, with a note."""
    steps = len(candidates) * sum(asdict(schedule.planned).values())
    with progress.track("rounds", steps) as advance:
        advance(len(candidates) * sum(asdict(done).values()))
        for round_ in range(done.loads, schedule.load_rounds):
            for candidate in candidates:
                with _noted(samples[candidate.name], "load"):
                    _loads(candidate, shapes, schedule, samples[candidate.name], round_)
                advance(1)
            done = replace(done, loads=round_ + 1)
            yield done
        yield from _stages(candidates, shapes, schedule, samples, done, advance)


def _loads(
    candidate: Candidate, shapes: Shapes, schedule: Schedule, found: Samples, variation: int
) -> None:
    """A load from disk, then one from the page cache, each in a fresh process."""
    left = drop_from_cache(candidate.files)
    with closing(Worker(candidate.python)) as worker:
        seconds = open_in(worker, candidate, shapes, schedule.threads)
        if left <= COLD:
            found.rows["cold_load"].append(seconds["load"])
        elif not found.rows["cold_load"]:
            found.notes.append(f"no cold load: {left:.0%} of its files stay in the page cache")
    with closing(Worker(candidate.python)) as worker:
        seconds = open_in(worker, candidate, shapes, schedule.threads)
        found.rows["import"].append(seconds["import"])
        found.rows["warm_load"].append(seconds["load"])
        with _unless_unsupported():
            found.rows["load_and_first"].append(seconds["load"] + worker.ask("ask", variation)[0])
        for action, arguments in (
            ("encode", (variation,)),
            ("generate", (PROMPT_TOKENS, schedule.new_tokens, variation)),
        ):
            with _unless_unsupported():
                worker.ask(action, *arguments)
        memory = worker.ask("memory")
        found.rows["peak"].append(memory["peak"])
        found.rows["own"].append(memory["own"])


def _stages(
    candidates: Sequence[Candidate],
    shapes: Shapes,
    schedule: Schedule,
    samples: Mapping[str, Samples],
    done: Rounds,
    advance: Advance,
) -> Iterator[Rounds]:
    """The stages: side by side if memory allows, so that the candidates alternate at each task."""
    peaks = {c.name: max(samples[c.name].rows["peak"], default=0.0) * 1e6 for c in candidates}
    running = [candidate for candidate in candidates if peaks[candidate.name]]
    together = sum(peaks.values()) <= schedule.memory
    groups = [running] if together else [[candidate] for candidate in running]
    progress.say(f"stages      {'all side by side' if together else 'one process at a time'}")
    first = done.stages + done.curves
    with ExitStack() as kept:
        workers: dict[str, Worker] = {}
        for round_ in range(first, schedule.rounds + schedule.curve_rounds):
            curve = round_ >= schedule.rounds
            tasks = _curve_tasks(schedule, shapes) if curve else _tasks(schedule)
            for group in groups:
                with ExitStack() as stack:
                    for candidate in group:
                        if not together or round_ == first:
                            with _noted(samples[candidate.name], "start"):
                                workers[candidate.name] = _ready(
                                    kept if together else stack, candidate, shapes, schedule
                                )
                    for task, candidate in itertools.product(tasks, group):
                        if candidate.name in workers:
                            time.sleep(PAUSE)
                            with _noted(samples[candidate.name], "stages"):
                                task(workers[candidate.name], samples[candidate.name], 100 + round_)
                if not together:
                    workers.clear()
                advance(len(group))
            if curve:
                done = replace(done, curves=done.curves + 1)
            else:
                done = replace(done, stages=done.stages + 1)
            yield done


Task = Callable[[Worker, Samples, int], None]


def _tasks(schedule: Schedule) -> list[Task]:
    def encode(worker: Worker, found: Samples, variation: int) -> None:
        found.rows["encode"].append(worker.ask("encode", variation))

    def generate(worker: Worker, found: Samples, variation: int) -> None:
        prefill, decode = worker.ask("generate", PROMPT_TOKENS, schedule.new_tokens, variation)
        found.rows["prefill"].append(prefill)
        found.rows["decode"].append(schedule.new_tokens / decode)

    def ask(worker: Worker, found: Samples, variation: int) -> None:
        first, second = worker.ask("ask", variation)
        found.rows["first"].append(first)
        found.rows["second"].append(second)
        found.rows["second_share"].append(second / first)

    return [encode, generate, ask]


def _curve_tasks(schedule: Schedule, shapes: Shapes) -> list[Task]:
    def at(length: int) -> Task:
        def generate(worker: Worker, found: Samples, variation: int) -> None:
            prefill, decode = worker.ask("generate", length, CURVE_TOKENS, variation)
            found.prefill[length].append(prefill)
            found.decode[length].append(CURVE_TOKENS / decode)

        return generate

    fitting = (n for n in schedule.lengths if n + CURVE_TOKENS < shapes.context_length)
    return [at(length) for length in fitting]


def _ready(stack: ExitStack, candidate: Candidate, shapes: Shapes, schedule: Schedule) -> Worker:
    """A worker with the model loaded and every stage run once."""
    worker = stack.enter_context(closing(Worker(candidate.python)))
    open_in(worker, candidate, shapes, schedule.threads)
    for action, arguments in (("encode", (0,)), ("generate", (PROMPT_TOKENS, 2, 0)), ("ask", (0,))):
        with _unless_unsupported():
            worker.ask(action, *arguments)
    return worker


def open_in(worker: Worker, candidate: Candidate, shapes: Shapes, threads: int) -> dict[str, float]:
    """Loads a candidate: seconds for importing its packages and for loading the model."""
    seconds: dict[str, float] = worker.ask(
        "open",
        peer=candidate.module,
        shapes=asdict(shapes),
        threads=threads,
        options=candidate.options,
    )
    return seconds


def drop_from_cache(files: Sequence[Path]) -> float:
    """Asks the system to forget the files' pages; the largest share of one that stays (another
    process may hold it)."""
    if not hasattr(os, "posix_fadvise"):
        return 1.0
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # pages not yet written are kept otherwise
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return max((_cached_share(path) for path in files), default=0.0)


def _cached_share(path: Path) -> float:
    """Share of a file's pages that are in memory (mincore)."""
    size = path.stat().st_size
    pages = -(-size // mmap.PAGESIZE)
    if not pages:
        return 0.0
    # a private writable mapping: ctypes gives the address of no other kind
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as view:
        start = ctypes.c_char.from_buffer(view)
        found = (ctypes.c_ubyte * pages)()
        code = ctypes.CDLL(None).mincore(
            ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), found
        )
        del start
    return 1.0 if code else sum(flag & 1 for flag in found) / pages


@contextmanager
def _unless_unsupported() -> Iterator[None]:
    with suppress(NotSupportedError):
        yield


@contextmanager
def _noted(found: Samples, where: str) -> Iterator[None]:
    """Note the stages that a peer does not support and those that fail; their rows stay empty."""
    try:
        yield
    except NotSupportedError as error:
        _note(found, str(error))
    except WorkerError as error:
        _note(found, f"{where}: {one_line(error)}")


def _note(found: Samples, note: str) -> None:
    if note not in found.notes:
        found.notes.append(note)

"""Rows answered on the nodes of a Ray cluster: on each a pool of actors that have loaded the model.

A node that joins is used, and the rows of one that is lost go to others. An actor that ends by
itself is started again; rows go alone then, and one that ends actors again is a row with an error.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mobilevlm._version import __version__
from mobilevlm.console import progress
from mobilevlm.console.terminal import shown
from mobilevlm.errors import ImageError, MobileVLMError
from mobilevlm.media.image_source import MAX_FILE_BYTES, ImageFile, is_uri, open_source
from mobilevlm.runtime.answer.options import AnswerOptions
from mobilevlm.runtime.batch.answers import Questions, answer_row, failed_row, images_key
from mobilevlm.runtime.batch.processes import Opened, opened_processes
from mobilevlm.runtime.batch.rows import Row
from mobilevlm.runtime.batch.workers import ATTEMPTS, MOST_LOST, Record, neighbours
from mobilevlm.runtime.builtin_bundle import bundle_path
from mobilevlm.runtime.ray_cluster import (
    ModelFiles,
    Node,
    NodeStore,
    bundle_files,
    connected,
    living_nodes,
    on_node,
    ray_module,
    ship,
    single_files,
)

if TYPE_CHECKING:
    from mobilevlm.runtime.vlm import VLM

AHEAD = 2
"""Groups of rows that an actor has: what it answers, and what comes next"""
LOOK = 2.0
"""Seconds after which joined nodes are looked for"""
PATIENCE = 60.0
"""Seconds without any node after which the run ends"""

Answers: TypeAlias = Callable[[Iterable[Row]], Iterator[Record]]


class NodeStart(NodeStore):
    """An actor that gets a node ready."""

    def plan(
        self, loading: dict[str, Any], options: AnswerOptions, asked: int | None, cores: int
    ) -> Opened:
        """Return how many processes fit here, and how one opens the model."""
        with opened_processes(loading, options, asked, asked or cores, cores) as opened:
            return opened


class Answerer:
    """An actor with a loaded model."""

    def __init__(
        self, open: Callable[[int], AbstractContextManager[VLM]], questions: Questions
    ) -> None:
        self._opening, self._questions = open(0), questions
        self._vlm: VLM | None = None

    def begin(self) -> None:
        """Load the model."""
        self._vlm = self._opening.__enter__()

    def answer(self, rows: list[Row]) -> list[Record]:
        """Return the records of rows."""
        assert self._vlm is not None
        return [answer_row(self._vlm, self._questions, row) for row in rows]


@dataclass
class _Actor:
    node: Node
    open: Callable[[int], AbstractContextManager[VLM]]
    threads: int
    handle: Any
    begun: Any
    """Reference of its loading; none when it has loaded"""
    calls: list[tuple[Any, list[Row]]] = field(default_factory=list)
    """References of answers that it has not given, each with its rows"""

    @property
    def waits_for(self) -> list[Any]:
        return [self.begun] if self.begun is not None else [call for call, _ in self.calls[:1]]


@contextmanager
def ray_answers(
    address: str,
    loading: dict[str, Any],
    questions: Questions,
    asked: int | None,
) -> Iterator[Answers]:
    """Give a function that answers rows on a cluster. ``loading``: arguments of ``load``;
    ``asked``: processes on each node, by default as many as its cores and memory allow.

    Raises:
        MobileVLMError: there is no cluster, or no node of it can answer.
    """
    files, there = _model_files(loading)
    with connected(address):
        cluster = _Cluster(files, there, questions, asked)
        try:
            yield cluster.answers
        finally:
            cluster.close()


def _model_files(
    loading: dict[str, Any],
) -> tuple[ModelFiles, Callable[[Path], dict[str, Any]]]:
    """Return the files to ship, and what gives the arguments of ``load`` for their folder."""
    path, mmproj = bundle_path(Path(loading["bundle"]), loading["engine"]), loading["mmproj"]
    if mmproj is None:
        return bundle_files(path), lambda folder: {**loading, "bundle": folder}
    names = path.name, Path(mmproj).name
    return single_files(path, Path(mmproj)), lambda folder: {
        **loading, "bundle": folder / names[0], "mmproj": folder / names[1]
    }  # fmt: skip


class _Cluster:
    """Nodes and their actors."""

    def __init__(
        self,
        files: ModelFiles,
        loading: Callable[[Path], dict[str, Any]],
        questions: Questions,
        asked: int | None,
    ) -> None:
        self._files, self._loading, self._questions, self._asked = files, loading, questions, asked
        self._ray = ray_module()
        self._actors: list[_Actor] = []
        self._nodes: dict[str, Node] = {}
        self._starting: set[str] = set()
        self._started: queue.Queue[tuple[Node, Opened | Exception]] = queue.Queue()
        self._looked = -LOOK
        self._lost = 0
        """Rows given up in a row"""
        self._attempts: dict[int, int] = {}
        self._again: list[list[Row]] = []

    def close(self) -> None:
        """End all actors."""
        for actor in self._actors:
            self._ray.kill(actor.handle)
        self._actors.clear()

    def answers(self, rows: Iterable[Row]) -> Iterator[Record]:
        """Yield the record of each row as soon as it is there.

        Raises:
            MobileVLMError: no node is left, a node cannot begin, or actors end again and again.
        """
        groups = neighbours(rows, lambda row: images_key(self._questions, row))
        following = next(groups, None)
        began = alone = time.monotonic()
        waiting_is_told = False
        while True:
            self._look_for_nodes()
            for depth in range(AHEAD):
                for actor in self._actors:
                    if actor.begun is None and len(actor.calls) == depth:
                        if self._again:
                            self._send(actor, self._again.pop())
                        elif following:
                            self._send(actor, following)
                            following = next(groups, None)
            if not (following or self._again or any(actor.calls for actor in self._actors)):
                return
            if self._actors or self._starting:
                alone = time.monotonic()
            elif time.monotonic() - alone > PATIENCE:
                raise MobileVLMError(f"no node of the cluster is left for {PATIENCE:.0f} s")
            if any(actor.begun is None for actor in self._actors):
                waiting_is_told = True
            elif not waiting_is_told and time.monotonic() - began > PATIENCE:
                progress.say("no process has begun yet: others may have the cluster's CPUs")
                waiting_is_told = True
            waited = {ref: actor for actor in self._actors for ref in actor.waits_for}
            if not waited:
                self._wait_for_start()
                continue
            for ref in self._ray.wait(list(waited), timeout=LOOK)[0]:
                yield from self._take(waited[ref], ref)

    def _send(self, actor: _Actor, rows: list[Row]) -> None:
        known: dict[str | Path, Any] = {}
        sent = [with_images(row, self._questions, known) for row in rows]
        actor.calls.append((actor.handle.answer.remote(sent), rows))

    def _take(self, actor: _Actor, ref: Any) -> Iterator[Record]:
        """Yield what an actor has answered; replace one that ended."""
        errors = self._ray.exceptions
        try:
            told = self._ray.get(ref)
        except errors.RayTaskError as error:
            raise _of_node(actor.node, error) from None
        except errors.ObjectLostError:  # the answers were on a node that is lost
            self._again.append(actor.calls.pop(0)[1])
            return
        except errors.RayError as error:
            yield from self._replace(actor, error)
            return
        if actor.begun is not None:
            actor.begun = None
            return
        actor.calls.pop(0)
        self._lost = 0
        yield from told

    def _replace(self, actor: _Actor, error: Exception) -> Iterator[Record]:
        """Start another actor in place of one that ended, if its node is there; yield the record of
        a row that it was the last actor of."""
        self._actors.remove(actor)
        self._ray.kill(actor.handle)
        self._again += [[row] for _, rows in reversed(actor.calls) for row in reversed(rows)]
        if actor.node.id not in {node.id for node in living_nodes()}:
            if self._nodes.pop(actor.node.id, None):
                progress.say(f"node {actor.node.address} is lost: its rows go to others")
            return
        if not isinstance(error, self._ray.exceptions.ActorUnavailableError):  # else: its node
            if actor.begun is not None:
                raise MobileVLMError(
                    f"node {actor.node.address}: a process ended while it loaded the model: give "
                    f"fewer --processes"
                )
            yield from self._blame(actor)
        self._start_actor(actor.node, actor.open, actor.threads)

    def _blame(self, actor: _Actor) -> Iterator[Record]:
        """Count the rows that an actor had begun when it ended; yield the record of one that ended
        as many as it may."""
        for row in actor.calls[0][1] if actor.calls else ():
            self._attempts[row.index] = self._attempts.get(row.index, 0) + 1
            if self._attempts[row.index] < ATTEMPTS or len(actor.calls[0][1]) > 1:
                continue
            self._again.remove([row])
            self._lost += 1
            if self._lost >= MOST_LOST:
                raise MobileVLMError(
                    f"worker processes ended at each of {MOST_LOST} rows: give fewer --processes, "
                    f"or look at these rows"
                )
            yield failed_row(row, self._questions, f"it ended {ATTEMPTS} worker processes")

    def _look_for_nodes(self) -> None:
        """Get nodes ready that have joined, each in a thread; start actors where that is done."""
        while not self._started.empty():
            self._begin_on(*self._started.get())
        if time.monotonic() - self._looked < LOOK:
            return
        self._looked = time.monotonic()
        for node in living_nodes():
            if node.id not in self._nodes and node.id not in self._starting:
                self._starting.add(node.id)
                threading.Thread(target=self._prepare, args=(node,), daemon=True).start()

    def _wait_for_start(self) -> None:
        try:
            self._begin_on(*self._started.get(timeout=LOOK))
        except queue.Empty:
            return

    def _prepare(self, node: Node) -> None:
        """Ship the model to a node and ask how many processes fit there."""
        try:
            start = self._ray.remote(NodeStart).options(**on_node(node, 0)).remote(__version__)
            loading = self._loading(ship(start, self._files))
            plan = start.plan.remote(loading, self._questions.options, self._asked, node.cores)
            opened: Opened | Exception = self._ray.get(plan)
            self._ray.kill(start)
        except Exception as error:  # the thread that waits for it raises it
            opened = error
        self._started.put((node, opened))

    def _begin_on(self, node: Node, opened: Opened | Exception) -> None:
        self._starting.discard(node.id)
        if isinstance(opened, self._ray.exceptions.RayTaskError):
            raise _of_node(node, opened)
        if isinstance(opened, Exception):
            if isinstance(opened, self._ray.exceptions.RayError):
                if node.id not in {living.id for living in living_nodes()}:
                    return
                raise MobileVLMError(
                    f"node {node.address}: {shown(opened, 300)}: mobilevlm {__version__} and Ray "
                    f"must be installed there as here"
                ) from None
            raise opened
        self._nodes[node.id] = node
        count = max(min(opened.count, node.cores // opened.threads), 1)
        each = f"{opened.threads} thread{'s' * (opened.threads > 1)} each"
        progress.say(f"node {node.address}: {count} process{'es' * (count > 1)}, {each}")
        for _ in range(count):
            self._start_actor(node, opened.open, min(opened.threads, node.cores))

    def _start_actor(
        self, node: Node, open: Callable[[int], AbstractContextManager[VLM]], threads: int
    ) -> None:
        kind = self._ray.remote(Answerer).options(**on_node(node, threads))
        handle = kind.remote(open, self._questions)
        self._actors.append(_Actor(node, open, threads, handle, handle.begin.remote()))


def _of_node(node: Node, error: Any) -> Exception:
    """Return the error that a node's code raised; a bug stays as it is."""
    cause = error.cause
    if isinstance(cause, MobileVLMError):
        return type(cause)(f"node {node.address}: {cause}")
    found: Exception = error
    return found


def with_images(row: Row, questions: Questions, known: dict[str | Path, Any]) -> Row:
    """Return a row that has the content of its image files in their places. What cannot be read
    stays as it is, and is the row's error where it is answered. ``known``: files that were read."""
    names = questions.template.image_columns
    found = {name: _content(row.columns.get(name), questions.folder, known) for name in names}
    return replace(row, columns={**row.columns, **found})


def _content(value: Any, folder: Path, known: dict[str | Path, Any]) -> Any:
    if isinstance(value, (list, tuple)):
        return [_content(item, folder, known) for item in value]
    if isinstance(value, Mapping) and value.get("bytes") is None and "path" in value:
        return _content(value["path"], folder, known)
    if not isinstance(value, str) or value.lower().startswith("data:"):
        return value
    source = value if is_uri(value) else folder / value
    if source not in known:
        try:
            with open_source(source) as (name, file):
                content = file.read(MAX_FILE_BYTES + 1)
            known[source] = ImageFile(content, name) if len(content) <= MAX_FILE_BYTES else value
        except (ImageError, OSError):
            known[source] = value
    return known[source]

"""Rows on a Ray cluster, without Ray: a stand-in for it computes when it is asked for a result.

tests/robustness/test_batch_ray.py has the same on a real cluster, where Ray is installed.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mobilevlm._version import __version__
from mobilevlm.builtin import BUNDLES
from mobilevlm.bundle import MANIFEST
from mobilevlm.errors import BundleError, ImageError, MissingExtraError, MobileVLMError
from mobilevlm.media.image_source import open_source
from mobilevlm.runtime import ray_cluster
from mobilevlm.runtime.batch import ray_workers
from mobilevlm.runtime.batch.answers import Questions
from mobilevlm.runtime.batch.processes import Opened
from mobilevlm.runtime.batch.ray_workers import ray_answers, with_images
from mobilevlm.runtime.batch.rows import Row
from mobilevlm.runtime.batch.template import filled, read_template
from mobilevlm.runtime.ray_cluster import Node, NodeStore, bundle_files, ray_module, ship

pytestmark = pytest.mark.pure

LOADING = {"bundle": BUNDLES / "nano", "engine": "auto", "mmproj": None}
QUESTIONS = Questions(read_template("{a}", ("a", "image")), Path(), {})


class RayError(Exception):
    """RayError"""


class ActorError(RayError):
    """RayActorError"""


class UnavailableError(ActorError):
    """ActorUnavailableError"""


class TaskError(RayError):
    """RayTaskError"""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"a long\ntraceback\n{cause}")
        self.cause = cause


class LostError(RayError):
    """ObjectLostError"""


class Thread:
    """A thread that runs at once"""

    def __init__(self, target: Callable[..., None], args: tuple[Any, ...], daemon: bool) -> None:
        self.start = lambda: target(*args)


class Actor:
    """Calls methods of an object when their results are asked for."""

    def __init__(self, made: Any) -> None:
        self.made = made

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.made, name)
        return SimpleNamespace(remote=lambda *given: Call(lambda: method(*given)))


class Call:
    """A reference of a result."""

    def __init__(self, get: Callable[[], Any]) -> None:
        self.get = get


class Ray:
    """In place of the module: ``nodes`` may be lost, and ``answer`` is what actors do."""

    exceptions = SimpleNamespace(
        RayError=RayError,
        RayTaskError=TaskError,
        ActorUnavailableError=UnavailableError,
        ObjectLostError=LostError,
    )

    def __init__(self, answer: Callable[[str, Row], Any]) -> None:
        self.nodes = [Node("1", "one", 2), Node("2", "two", 1)]
        self.answer, self.begun = answer, 0

    def remote(self, kind: type) -> Any:
        def make(node: Node, *given: Any) -> Actor:
            if kind is not ray_workers.Answerer:
                return Actor(kind(*given))

            def begin() -> None:
                self.begun += 1
                if node not in self.nodes:
                    raise ActorError

            def answer(rows: list[Row]) -> list[dict[str, Any]]:
                if node not in self.nodes:
                    raise UnavailableError
                return [self.answer(node.id, row) or {"index": row.index} for row in rows]

            return Actor(SimpleNamespace(begin=begin, answer=answer))

        def options(node: Node, cpus: int) -> Any:
            return SimpleNamespace(remote=lambda *given: make(node, *given))

        return SimpleNamespace(options=options)

    def get(self, call: Call) -> Any:
        try:
            return call.get()
        except MobileVLMError as error:
            raise TaskError(error) from None

    def wait(self, calls: list[Call], timeout: float) -> tuple[list[Call], list[Call]]:
        return calls, []

    def kill(self, actor: Actor) -> None:
        """Nothing to end"""


@pytest.fixture
def answered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[Ray, int], list[dict[str, Any]]]:
    """Answers so many rows on a stand-in."""

    def run(ray: Ray, rows: int) -> list[dict[str, Any]]:
        for module in (ray_workers, ray_cluster):
            monkeypatch.setattr(module, "ray_module", lambda: ray)
        monkeypatch.setattr(ray_workers, "connected", lambda address: nullcontext())
        monkeypatch.setattr(ray_workers, "living_nodes", lambda: list(ray.nodes))
        monkeypatch.setattr(ray_workers, "on_node", lambda node, cpus: {"node": node, "cpus": cpus})
        monkeypatch.setattr(ray_workers.NodeStart, "plan", plan)
        monkeypatch.setattr(ray_workers, "threading", SimpleNamespace(Thread=Thread))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        with ray_answers("auto", LOADING, QUESTIONS, None) as answers:
            return list(answers(Row(index, {"a": "?"}) for index in range(rows)))

    return run


def plan(self: Any, loading: dict[str, Any], *more: Any) -> Opened:
    """Return two processes, once the bundle is there."""
    assert (loading["bundle"] / MANIFEST).is_file()
    return Opened(2, 1, lambda number: cast(Any, nullcontext()), shared=False)


def indices(records: list[dict[str, Any]]) -> list[int]:
    return sorted(record["index"] for record in records)


def test_each_row_is_answered_once_by_as_many_actors_as_nodes_have_cores(answered: Any) -> None:
    seen: set[str] = set()
    ray = Ray(lambda node, row: seen.add(node))
    assert indices(answered(ray, 50)) == list(range(50))
    assert seen == {"1", "2"} and ray.begun == 3


def test_rows_of_a_lost_node_go_to_others_and_blame_nobody(answered: Any) -> None:
    def answer(node: str, row: Row) -> None:
        if row.index == 20 and node == "1":
            ray.nodes = ray.nodes[1:]
            raise UnavailableError

    ray = Ray(answer)
    found = answered(ray, 50)
    assert indices(found) == list(range(50)) and not any("error" in record for record in found)


def test_a_row_that_ends_two_actors_is_a_row_with_an_error(answered: Any) -> None:
    ended: list[int] = []

    def answer(node: str, row: Row) -> None:
        if row.index == 7 or (row.index == 9 and 9 not in ended):
            ended.append(row.index)
            raise ActorError

    found = answered(Ray(answer), 30)
    assert indices(found) == list(range(30)) and sorted(ended) == [7, 7, 9]
    [lost] = [record for record in found if "error" in record]
    assert lost["index"] == 7 and lost["error"] == "it ended 2 worker processes"


def test_actors_that_end_at_each_row_end_the_run(answered: Any) -> None:
    def answer(node: str, row: Row) -> None:
        raise ActorError

    with pytest.raises(MobileVLMError, match="ended at each of 3 rows"):
        answered(Ray(answer), 30)


def test_answers_that_are_lost_with_their_node_are_made_again(answered: Any) -> None:
    lost: list[int] = []

    def answer(node: str, row: Row) -> None:
        if not lost:
            lost.append(row.index)
            raise LostError

    assert indices(answered(Ray(answer), 9)) == list(range(9)) and lost


def test_errors_of_a_node_name_it_and_bugs_stay_loud(answered: Any) -> None:
    def refuse(node: str, row: Row) -> None:
        raise BundleError("damaged")

    with pytest.raises(BundleError, match=r"^node one: damaged$"):
        answered(Ray(refuse), 3)

    def fail(node: str, row: Row) -> None:
        raise TaskError(KeyError("x"))

    with pytest.raises(TaskError, match="traceback"):
        answered(Ray(fail), 3)


def test_a_cluster_without_nodes_ends_the_run(
    answered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_workers, "PATIENCE", 0.0)
    monkeypatch.setattr(ray_workers, "LOOK", 0.01)
    ray = Ray(lambda node, row: None)
    ray.nodes = []
    with pytest.raises(MobileVLMError, match="no node of the cluster is left"):
        answered(ray, 3)


class LocalStore:
    """A store of a node whose calls are made at once."""

    def __init__(self, store: NodeStore) -> None:
        self.store, self.written = store, 0

    def __getattr__(self, name: str) -> Any:
        def call(*given: Any) -> Any:
            self.written += name == "write"
            return getattr(self.store, name)(*given)

        return SimpleNamespace(remote=call)


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Ray's ``get`` that gives what it is given."""
    monkeypatch.setattr(ray_cluster, "ray_module", lambda: SimpleNamespace(get=lambda found: found))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(ray_cluster, "CHUNK", 100_000)
    yield


def test_a_bundle_is_shipped_once_and_is_the_same_there(local: None) -> None:
    files = bundle_files(BUNDLES / "nano")
    store = LocalStore(NodeStore(__version__))
    folder = ship(store, files)
    written = store.written
    assert written > len(files.paths) and folder.name == files.digest
    assert bundle_files(folder).sums == files.sums
    assert ship(LocalStore(NodeStore(__version__)), files) == folder
    assert [path.name for path in folder.parent.iterdir()] == [files.digest]


def test_files_that_change_on_the_way_are_not_kept(local: None, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"a" * 10)
    files = ray_cluster.single_files(path)
    path.write_bytes(b"b" * 10)
    with pytest.raises(MobileVLMError, match=r"model\.gguf: it was changed while it was sent"):
        ship(LocalStore(NodeStore(__version__)), files)
    assert not list((tmp_path / "cache/mobilevlm/nodes").iterdir())
    with pytest.raises(
        MobileVLMError, match="is installed on a node, and 0 where the command runs"
    ):
        ship(LocalStore(NodeStore("0")), files)


def test_rows_take_their_images_along_under_the_names_of_their_files(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"content")
    row = Row(3, {"image": ["a.png", (tmp_path / "a.png").as_uri(), "b.png"], "n": 1,
                  "other": {"bytes": None, "path": "a.png"}})  # fmt: skip
    template = read_template("{n}", tuple(row.columns), ("image", "other"))
    questions = Questions(template, tmp_path, {})
    sent: Row = pickle.loads(pickle.dumps(with_images(row, questions, {})))
    (tmp_path / "a.png").unlink()
    _, images = filled(template, sent.columns, Path("/elsewhere"))
    for index in (0, 1, 3):
        with open_source(images[index]) as (name, file):
            assert (name, file.read()) == (str(tmp_path / "a.png"), b"content")
    with pytest.raises(ImageError, match=r"b\.png: no such image file"), open_source(images[2]):
        pass


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"mobilevlm-edge\[ray\]"):
        ray_module()

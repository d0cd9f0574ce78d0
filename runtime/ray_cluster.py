"""Nodes of a Ray cluster, and model files that are brought to them once.

Files go into the node's cache folder, by their digest: ``$XDG_CACHE_HOME/mobilevlm/nodes/DIGEST``.
Ray is of the extra ``[ray]``; nodes need it and mobilevlm in the versions that are here.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mobilevlm._version import __version__
from mobilevlm.bundle import MANIFEST, cache_folder, read_manifest
from mobilevlm.console.terminal import shown
from mobilevlm.errors import MobileVLMError, require
from mobilevlm.whole_file import file_sha256

CHUNK = 32 << 20
"""Bytes of a file that travel at a time"""
ATTEMPTS = 3
"""Nodes that may be lost with a task after the first"""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ModelFiles:
    """Files of a model, by their names in a folder of their own."""

    paths: Mapping[str, Path]
    sums: Mapping[str, str]
    """SHA-256 of each"""
    digest: str


@dataclass(frozen=True)
class Node:
    """A node that can compute."""

    id: str
    address: str
    cores: int
    """CPUs that Ray may use there"""


def ray_module() -> Any:
    """Return ``ray``.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import ray
    except ImportError:
        raise require("ray", "ray", "--ray") from None
    return ray


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Be a driver of a cluster. ``address``: as of ``ray.init``.

    Raises:
        MobileVLMError: there is no cluster.
        MissingExtraError: Ray is not installed.
    """
    ray = ray_module()
    try:
        ray.init(address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise MobileVLMError(
            f"--ray {shown(address)}: {shown(error, 200)}: start a cluster with 'ray start "
            f"--head', and give the address that it says, or auto on one of its nodes"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def living_nodes() -> list[Node]:
    """Return the nodes that have CPUs and are not known to be lost."""
    return [
        Node(node["NodeID"], node["NodeManagerAddress"], int(node["Resources"]["CPU"]))
        for node in ray_module().nodes()
        if node["Alive"] and node["Resources"].get("CPU", 0) >= 1
    ]


def on_node(node: Node, cpus: int) -> dict[str, Any]:
    """Return options of an actor that runs on a node and takes so many of its CPUs."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    strategy = NodeAffinitySchedulingStrategy(node.id, soft=False)
    return {"num_cpus": cpus, "scheduling_strategy": strategy, "max_restarts": 0}


def bundle_files(folder: Path) -> ModelFiles:
    """Return the files of a bundle.

    Raises:
        BundleError: it has no manifest, or a damaged one.
    """
    manifest, digest = read_manifest(folder)
    sums = {name: entry.sha256 for name, entry in manifest.files.items()}
    sums[MANIFEST] = file_sha256(folder / MANIFEST)
    return ModelFiles({name: folder / name for name in sums}, sums, digest)


def single_files(*paths: Path) -> ModelFiles:
    """Return files that are known by their last names."""
    sums = {path.name: file_sha256(path) for path in paths}
    digest = hashlib.sha256(repr(sorted(sums.items())).encode()).hexdigest()
    return ModelFiles({path.name: path for path in paths}, sums, digest)


class NodeStore:
    """An actor that keeps files in its node's cache folder."""

    def __init__(self, version: str) -> None:
        self._version = version
        self._draft: Path | None = None

    def find(self, digest: str) -> Path | None:
        """Return the folder with these files, if it is there.

        Raises:
            MobileVLMError: another version of mobilevlm is installed here.
        """
        check_version(self._version)
        folder = _place(digest)
        return folder if folder.is_dir() else None

    def write(self, name: str, chunk: bytes) -> None:
        """Append to a file of a draft."""
        if self._draft is None:
            _place("").mkdir(parents=True, exist_ok=True)
            self._draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=_place("")))
        path = self._draft / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(chunk)

    def finish(self, digest: str, sums: Mapping[str, str]) -> Path:
        """Put the draft in its place, unless another was faster; return the folder.

        Raises:
            MobileVLMError: a file has another content than it had where it came from.
        """
        assert self._draft is not None
        draft, self._draft, folder = self._draft, None, _place(digest)
        try:
            for name, expected in sums.items():
                if file_sha256(draft / name) != expected:
                    raise MobileVLMError(f"{name}: it was changed while it was sent: start again")
            if not folder.is_dir():
                draft.chmod(0o755)
                draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return folder


def _place(digest: str) -> Path:
    return cache_folder() / "nodes" / digest


def ship(store: Any, files: ModelFiles) -> Path:
    """Bring files to the node of a :class:`NodeStore` if it does not have them; return the folder.

    Raises:
        MobileVLMError: they cannot be read, or not be kept there.
    """
    get = ray_module().get
    found: Path | None = get(store.find.remote(files.digest))
    if found is not None:
        return found
    for name, path in files.paths.items():
        with path.open("rb") as file:
            get(store.write.remote(name, file.read(CHUNK)))
            while chunk := file.read(CHUNK):
                get(store.write.remote(name, chunk))
    folder: Path = get(store.finish.remote(files.digest, dict(files.sums)))
    return folder


@contextmanager
def tasks(
    address: str, work: Callable[[Item], Result], lost: Callable[[str], Result]
) -> Iterator[Callable[[Iterable[Item]], Iterator[tuple[Item, Result]]]]:
    """Give a function that does work on the nodes of a cluster, and yields each item with its
    result as soon as it is there. Each takes as many CPUs as the smallest node has, so nodes of one
    size do one thing at a time. Ray does it again where its node is lost; ``lost`` makes the result
    of what was lost too often.

    Raises:
        MobileVLMError: there is no cluster, or another version of mobilevlm on a node.
    """
    with connected(address):
        ray = ray_module()
        cores = min((node.cores for node in living_nodes()), default=0)
        if not cores:
            raise MobileVLMError(f"--ray {shown(address)}: no node of the cluster has a CPU")
        remote = ray.remote(num_cpus=cores, max_retries=ATTEMPTS)(_checked)

        def run(items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
            waiting = {remote.remote(__version__, work, item): item for item in items}
            while waiting:
                for reference in ray.wait(list(waiting))[0]:
                    try:
                        result = ray.get(reference)
                    except ray.exceptions.RayTaskError as error:
                        if isinstance(error.cause, MobileVLMError):
                            raise error.cause from None
                        raise
                    except ray.exceptions.RayError as error:
                        result = lost(shown(error, 300))
                    yield waiting.pop(reference), result

        yield run


def _checked(version: str, work: Callable[[Item], Result], item: Item) -> Result:
    check_version(version)
    return work(item)


def check_version(version: str) -> None:
    """Refuse work for another version of mobilevlm than is installed here.

    Raises:
        MobileVLMError: it is another.
    """
    if version != __version__:
        raise MobileVLMError(
            f"mobilevlm {__version__} is installed on a node, and {version} where the command "
            f"runs: install the same"
        )

"""The models of a server by their names: loaded at first use, and closed when another one needs
their memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobilevlm.bundle import open_bundle
from mobilevlm.errors import MemoryLimitError, MobileVLMError
from mobilevlm.plan import Plan
from mobilevlm.runtime.builtin_bundle import bundle_path
from mobilevlm.runtime.loading import check_paths, load
from mobilevlm.runtime.memory.estimate import LIBRARIES, LIBRARY_FILES, estimate
from mobilevlm.runtime.memory.fitting import fit_plan
from mobilevlm.runtime.memory.limits import Limit, memory_limits
from mobilevlm.runtime.server.errors import ApiError
from mobilevlm.runtime.tuning.plan_file import PlanChoice, settle_plans
from mobilevlm.runtime.vlm import VLM


@dataclass(frozen=True)
class Loading:
    """How models are loaded, as ``mobilevlm.load`` takes it."""

    engine: str = "auto"
    threads: int | None = None
    plan: PlanChoice = "auto"
    max_tiles: int | None = None
    mmproj: Path | None = None
    max_memory_mb: float | None = None
    """For all models together"""
    at_once: int = 1
    """Answers that are made at the same time, each with keys and values of its own"""
    image_tokens: int | None = None
    cache_dir: Path | None = None
    cache_dir_mb: float | None = None
    """For all models together"""


@dataclass
class _Entry:
    path: Path
    vlm: VLM | None = None
    draws: bool = False
    """True if its bundle says that it makes images"""
    loading: asyncio.Task[None] | None = None
    """It goes on when the requests that wait for it are gone: a thread cannot be stopped"""
    users: int = 0
    """Requests that have it now"""
    taken: float = 0.0
    """Bytes that it is estimated to take at its peak, libraries aside"""


def named_models(bundles: Sequence[str]) -> dict[str, Path]:
    """Return the bundles of a command line by their names: ``NAME=BUNDLE``, or the folder's.

    Raises:
        MobileVLMError: two have one name, or one is no bundle.
    """
    found: dict[str, Path] = {}
    for given in bundles:
        name, equals, place = given.partition("=")
        path = Path(place if equals else given)
        name = name if equals else path.resolve().name.removesuffix(".gguf")
        if not name or (equals and not place):
            raise MobileVLMError(f"{given}: expected NAME=BUNDLE, with a name and a bundle")
        if name in found:
            raise MobileVLMError(f"{given}: another model is called {name!r}: say NAME={path}")
        found[name] = path
    return found


class Models:
    """Gives models to requests. ``load`` and closing run in threads; all else on one event loop."""

    def __init__(self, paths: dict[str, Path], loading: Loading) -> None:
        self._loading = loading
        self._entries = {name: _Entry(path) for name, path in paths.items()}
        """The one used last at the end"""
        self.names = tuple(paths)
        self._lock = asyncio.Lock()
        self._freed = asyncio.Condition()
        self._is_waiting = False
        """True while a model waits for memory: others queue behind it"""

    def check(self) -> None:
        """Look at each bundle, without loading it.

        Raises:
            MobileVLMError: one cannot be used.
        """
        for entry in self._entries.values():
            path = bundle_path(entry.path, self._loading.engine)
            check_paths(path, self._loading.mmproj)
            if self._loading.mmproj is None:
                entry.draws = open_bundle(path).manifest.spec.draws

    def find(self, name: str | None) -> str:
        """Return the name of the model that is asked for.

        Raises:
            ApiError: there is none of this name, or none is named and there are several.
        """
        known = ", ".join(self.names)
        if name is None:
            if len(self.names) > 1:
                raise ApiError(400, f"model: missing: this server has {known}", "model")
            return self.names[0]
        if name not in self._entries:
            told = f"model: {name!r:.80} is not here: this server has {known}"
            raise ApiError(404, told, "model", "model_not_found")
        return name

    def draws(self, name: str) -> bool:
        """Return whether a model makes images, once its bundle was looked at."""
        entry = self._entries[name]
        return entry.draws if entry.vlm is None else entry.vlm.spec.draws

    @property
    def loaded(self) -> dict[str, VLM]:
        """Models that are loaded."""
        return {name: entry.vlm for name, entry in self._entries.items() if entry.vlm is not None}

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[VLM]:
        """Load a model unless it is there, and keep it while it is used.

        Raises:
            MobileVLMError: it cannot be loaded.
        """
        entry = self._entries[name]
        if self._is_waiting:
            async with self._lock:
                pass
        while entry.vlm is None:
            if entry.loading is None:
                entry.loading = asyncio.create_task(self._load(entry))
            await asyncio.shield(entry.loading)
        entry.users += 1
        self._entries[name] = self._entries.pop(name)
        assert entry.vlm is not None
        try:
            yield entry.vlm
        finally:
            entry.users -= 1
            async with self._freed:
                self._freed.notify_all()

    async def close(self) -> None:
        """Free all models."""
        await asyncio.shield(asyncio.create_task(self._close_all()))

    async def _close_all(self) -> None:
        async with self._lock:
            for entry in self._entries.values():
                await self._close(entry)

    async def _load(self, entry: _Entry) -> None:
        try:
            async with self._lock:
                await self._load_locked(entry)
        finally:
            entry.loading = None

    async def _load_locked(self, entry: _Entry) -> None:
        while True:
            others = [item for item in self._entries.values() if item.vlm is not None]
            beside = sum(item.taken for item in others)
            try:
                entry.vlm, entry.taken = await asyncio.to_thread(self._loaded, entry, beside)
                return
            except MemoryLimitError:
                if not others:
                    raise
            await self._free_one(others)

    async def _free_one(self, others: list[_Entry]) -> None:
        """Close the model that was not used for longest, when it is free."""
        self._is_waiting = True
        try:
            async with self._freed:
                await self._freed.wait_for(lambda: any(not item.users for item in others))
            await self._close(next(item for item in others if not item.users))
        finally:
            self._is_waiting = False

    async def _close(self, entry: _Entry) -> None:
        vlm, entry.vlm, entry.taken = entry.vlm, None, 0.0
        if vlm is not None:
            await asyncio.to_thread(vlm.close)

    def _loaded(self, entry: _Entry, beside: float) -> tuple[VLM, float]:
        """Return a model, and the bytes that it takes; ``beside``: those of others."""
        said = self._loading
        keywords: dict[str, Any] = {
            "engine": said.engine,
            "threads": said.threads,
            "max_memory_mb": said.max_memory_mb,
            "max_tiles": said.max_tiles,
            "image_tokens": said.image_tokens,
            "cache_dir": said.cache_dir,
            "cache_dir_mb": said.cache_dir_mb,
        }
        if said.mmproj is not None:  # the only one there is
            return load(entry.path, mmproj=said.mmproj, **keywords), 0.0
        plan = self._fitting_plan(entry.path, beside)
        vlm = load(entry.path, plan=plan, **keywords)
        return vlm, _taken(vlm, said.at_once)

    def _fitting_plan(self, path: Path, beside: float) -> Plan:
        """Return a plan by which a model fits beside others, and beside answers that are made at
        the same time.

        Raises:
            MemoryLimitError: there is none.
        """
        said = self._loading
        bundle = open_bundle(bundle_path(path, said.engine))
        first, *others = settle_plans(bundle, said.engine, said.threads, said.plan)
        more = beside + _further_states(estimate(bundle.manifest, first).states, said.at_once)
        limits = [
            Limit(limit.kind, max(limit.size - more, 0.0) if asked else limit.size, limit.where)
            for limit in memory_limits(asked_mb=said.max_memory_mb)
            for asked in (limit.kind == "asked",)
        ]
        try:
            return fit_plan(bundle, first, limits, others)
        except MemoryLimitError as error:
            if not more:
                raise
            raise MemoryLimitError(
                f"{error} (of the limit {more / 1e6:.0f} MB are for other models and for "
                f"{said.at_once} answers at once: --parallel 1 takes less)"
            ) from None


def _further_states(states: float, at_once: int) -> float:
    return (at_once - 1) * states


def _taken(vlm: VLM, at_once: int) -> float:
    memory = estimate(vlm.bundle.manifest, vlm.plan)
    whole = memory.peak + _further_states(memory.states, at_once)
    return max(whole - LIBRARIES - LIBRARY_FILES, 0.0)

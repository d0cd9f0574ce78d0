"""``mobilevlm tune``: measures a bundle on this machine and keeps what was chosen beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

from mobilevlm.bundle import Bundle, open_bundle
from mobilevlm.console import progress
from mobilevlm.errors import BundleError, MemoryLimitError, MissingExtraError
from mobilevlm.plan import (
    ENGINES,
    LLAMA_ENGINES,
    MemorySetting,
    Plan,
    choose_engine,
    default_threads,
    stage_formats,
)
from mobilevlm.preparation import most_runs
from mobilevlm.runtime.builtin_bundle import bundle_path
from mobilevlm.runtime.machine import available_memory
from mobilevlm.runtime.memory.fitting import fit_plan
from mobilevlm.runtime.memory.limits import Limit, memory_limits
from mobilevlm.runtime.tuning.plan_file import TunedPlan, check_writable, write_plan
from mobilevlm.runtime.tuning.probe import EngineProbe
from mobilevlm.runtime.tuning.questions import DEFAULT_BUDGET, TILES, Budget, tune


def tune_bundle(
    bundle: str | PathLike[str],
    budget_seconds: float = DEFAULT_BUDGET,
    engine: str = "auto",
    show: Callable[[int, int], None] = lambda done, total: None,
    max_memory_mb: float | None = None,
) -> tuple[TunedPlan, Path]:
    """Measures engines and settings (runtime/tuning/questions.py) and writes the plan; the path of
    its file. ``engine``: that one only; ``show`` hears ``(done, total)``. ``max_memory_mb`` and the
    limits of the system as in ``mobilevlm.load``: engines that need more are left out, settings
    too.

    Raises:
        MemoryLimitError: every engine needs more than a limit. Nothing was loaded.
        BundleError: no bundle there, damaged, or nothing in it that the engine can run; or its
            folder cannot be written to.
        MissingExtraError: what the only engine needs is not installed.
    """
    ready = open_bundle(bundle_path(Path(bundle), engine, writable=True))
    check_writable(ready)
    engines = [engine] if engine != "auto" else _engines(ready)
    for name in engines:
        choose_engine(ready, name)
    limits = memory_limits(asked_mb=max_memory_mb)
    memory = _fitting(ready, engines, limits)
    engines = list(memory)
    prompts = [name for name in engines if "prefill" in stage_formats(ready, name)]
    probe = EngineProbe(ready)
    last = ""

    def advance(share: float, what: str) -> None:
        nonlocal last
        show(int(100 * share), 100)
        if what != last:
            last = what
            progress.step(f"tuning      {int(100 * share)} %  {what}")

    budget = Budget(budget_seconds, advance=advance)
    try:
        tuned = tune(
            probe,
            budget,
            ready.digest,
            engines,
            default_threads(),
            prompts=prompts,
            packing="onnx" in engines and _may_pack(ready, limits),
            memory=memory,
            tiles={
                name: _tiles(ready, Plan(name), limits)
                for name in engines
                if memory[name] == "fast"
            },
        )
    finally:
        probe.close()
    return tuned, write_plan(ready, tuned)


def _engines(bundle: Bundle) -> list[str]:
    """Those that can run the bundle here: ``auto`` means the first of them."""
    found = [choose_engine(bundle, "auto")]
    for name in ENGINES:
        try:
            choose_engine(bundle, name)
            if name in LLAMA_ENGINES:
                from mobilevlm.runtime.engines.llama.native import llama_library

                llama_library()
        except (BundleError, MissingExtraError):
            continue
        if name not in found:
            found.append(name)
    return found


def _fitting(
    bundle: Bundle, engines: Sequence[str], limits: list[Limit]
) -> dict[str, MemorySetting]:
    """The engines that the limits allow, and by which setting of memory."""
    found: dict[str, MemorySetting] = {}
    refusals = []
    for name in engines:
        try:
            found[name] = fit_plan(bundle, Plan(name), limits).memory
        except MemoryLimitError as error:
            refusals.append(error)
    if not found:
        raise refusals[0]
    return found


def _tiles(bundle: Bundle, plan: Plan, limits: list[Limit]) -> list[int]:
    """Return how many tiles of an image an engine may encode at the same time: one if it has no
    others, or no stage that does so; else as many as the limits allow."""
    most = 1
    if stage_formats(bundle, plan.engine).get("vision") in ("onnx", "ort"):
        most = most_runs(bundle.manifest.spec.image)
    plans = [replace(plan, tiles_at_once=count) for count in TILES if count <= most]
    return [item.tiles_at_once for item in plans if fit_plan(bundle, item, limits) == item]


def _may_pack(bundle: Bundle, limits: list[Limit]) -> bool:
    """Return whether the limits allow copies of the weights that may stay in their file (of the
    image encoder and the prefill graph), and these take less than half of the free memory."""
    files = [
        name
        for artifact in bundle.manifest.artifacts
        if artifact.format == "onnx" and artifact.stage in ("vision", "audio", "prefill")
        for name in artifact.files
    ]
    packed = Plan("onnx", vision_weights="packed", prefill_weights="packed")
    return (
        2 * sum(bundle.path(name).stat().st_size for name in files) < available_memory()
        and fit_plan(bundle, packed, limits) == packed
    )

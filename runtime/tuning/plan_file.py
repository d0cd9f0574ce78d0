"""Measurements of ``tune`` on this kind of processor, in a file beside the bundle's manifest.

The file belongs to devices, not to the bundle: it may hold several processors, and the manifest
does not know it. Whatever is wrong with it, the bundle runs without.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from mobilevlm.bundle import Bundle
from mobilevlm.errors import BundleError, MobileVLMError, PlanWarning
from mobilevlm.input_spec import MOST_TILES
from mobilevlm.plain_types import from_dict, to_dict
from mobilevlm.plan import ENGINES, LLAMA_ENGINES, Plan, available_processors, choose_engine
from mobilevlm.regular_file import NotRegularError, read_regular
from mobilevlm.runtime.machine import installed_extras, processor_key
from mobilevlm.runtime.sequence.drafting import MAX_DRAFT_TOKENS
from mobilevlm.runtime.settings import fitting_plan, fitting_threads
from mobilevlm.whole_file import written_whole

PLAN = "plan.json"
SCHEMA_VERSION = 1
MOST_FILE = 1 << 24
"""Bytes of it"""
MOST_PER_PROCESSOR = 4
"""Threads that a plan may want for each processor"""
MOST_MEGABYTES = 1e9

PlanChoice: TypeAlias = Literal["auto", "none"]


@dataclass(frozen=True)
class Candidate:
    """Settings that were tried for one question."""

    question: str
    """Choice to make: ``onnx: decoder threads`` …"""
    label: str
    """The settings, in words."""
    seconds: float
    """Median of what was timed; lower is better."""
    runs: int
    chosen: bool


@dataclass(frozen=True)
class TunedPlan:
    """Plans chosen for one processor."""

    bundle: str
    """Digest of the manifest that it was measured on."""
    plans: tuple[Plan, ...]
    """One for each engine that was measured, the fastest first."""
    candidates: tuple[Candidate, ...]
    budget_seconds: float
    spent_seconds: float
    complete: bool
    """True if the budget sufficed for all questions."""


def settle_plans(
    bundle: Bundle,
    engine: str,
    threads: int | None,
    plan: Plan | PlanChoice,
    max_resident_mb: float | None = None,
) -> list[Plan]:
    """The plan that the bundle is to run by, its engine settled: ``engine``, ``threads`` and
    ``max_resident_mb``, where they say something, win over it. Where it was measured, further ones
    follow: those of slower engines, and the defaults.

    Raises:
        BundleError: the bundle has no artifacts for the engine.
        MobileVLMError: ``max_resident_mb`` of a decoder without experts.
    """
    if isinstance(plan, Plan):
        chosen = plan.engine if engine == "auto" else engine
        found = [replace(fitting_plan(plan), engine=chosen)]
    else:
        tuned = read_plan(bundle) if plan == "auto" else None
        found = [*(_plans_for(tuned, engine) if tuned else ()), Plan(engine)]
    said: dict[str, Any] = {}
    if threads is not None:
        threads = fitting_threads(threads)
        said = {"vision_threads": threads, "decoder_threads": threads}
    if max_resident_mb is not None:
        if bundle.manifest.spec.decoder.experts is None:
            raise MobileVLMError("--max-resident: this decoder has no experts: leave it out")
        said["max_resident_mb"] = max_resident_mb
    return [replace(item, engine=choose_engine(bundle, item.engine), **said) for item in found]


def read_plan(bundle: Bundle) -> TunedPlan | None:
    """Return the plans measured for this bundle on this kind of processor, none if there are none.
    A file that cannot be read or belongs to another bundle is skipped with a warning."""
    path = bundle.path(PLAN)
    entries = _read_entries(path)
    if entries is None:
        return None
    key = processor_key()
    if key not in entries:
        return None
    try:
        found = from_dict(TunedPlan, entries[key], f"{path}: {key}")
        for plan in found.plans:
            _check(plan, str(path))
    except MobileVLMError as error:
        _warn(f"{error}: not used: run 'mobilevlm tune {bundle.folder}' again")
        return None
    if found.bundle != bundle.digest:
        _warn(
            f"{path}: measured on another export of this bundle: not used: run 'mobilevlm tune "
            f"{bundle.folder}' again"
        )
        return None
    return found


def check_writable(bundle: Bundle) -> None:
    """Refuse a bundle whose folder cannot be written to, before anything is measured for it.

    Raises:
        BundleError: it is read-only.
    """
    try:
        with tempfile.TemporaryFile(dir=bundle.folder):
            pass
    except OSError as error:
        raise BundleError(
            f"{bundle.folder}: {PLAN} cannot be written there ({error.strerror}): tune a copy of "
            f"the bundle in a folder of your own"
        ) from None


def write_plan(bundle: Bundle, tuned: TunedPlan) -> Path:
    """Puts the plan into the file, beside those of other processors, in one rename.

    Raises:
        OSError: the folder cannot be written to.
    """
    path = bundle.path(PLAN)
    processors = dict(_read_entries(path) or {})
    processors[processor_key()] = to_dict(tuned)
    data = {"schema_version": SCHEMA_VERSION, "processors": processors}
    text = json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    with written_whole(path) as draft:
        draft.write_text(text, encoding="utf-8")
    return path


def _read_entries(path: Path) -> dict[str, Any] | None:
    """By processor. None where there is no file, or none that can be read."""
    try:
        data = json.loads(read_regular(path, MOST_FILE).decode("utf-8"))
    except FileNotFoundError:
        return None
    except NotRegularError:
        _warn(f"{path}: not a regular file: not used: delete it, or run 'mobilevlm tune' again")
        return None
    except (OSError, ValueError, RecursionError):
        _warn(f"{path}: damaged plan: not used: delete it, or run 'mobilevlm tune' again")
        return None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION or not isinstance(data.get("processors"), dict):
        _warn(f"{path}: no plan of this program's version: not used: delete it, or tune again")
        return None
    processors: dict[str, Any] = data["processors"]
    return processors


def _plans_for(tuned: TunedPlan, engine: str) -> list[Plan]:
    """That of the engine; of ``auto`` all whose packages are still there, the fastest first."""
    lacks_llama = bool(installed_extras()["gguf"])
    return [
        plan
        for plan in tuned.plans
        if engine == plan.engine
        or (engine == "auto" and not (lacks_llama and plan.engine in LLAMA_ENGINES))
    ]


def _check(plan: Plan, where: str) -> None:
    """Raises MobileVLMError: a value that no engine could work with."""
    most_threads = MOST_PER_PROCESSOR * available_processors()
    ranges: dict[str, tuple[float, float]] = {
        "vision_threads": (0, most_threads),
        "decoder_threads": (0, most_threads),
        "tiles_at_once": (1, MOST_TILES + 1),
        "prefill_chunk": (1, 1 << 20),
        "prefill_from": (1, 1 << 20),
        "draft_tokens": (0, MAX_DRAFT_TOKENS),
        "max_resident_mb": (1, MOST_MEGABYTES),
    }
    for name, (least, most) in ranges.items():
        value = getattr(plan, name)
        if value is not None and not least <= value <= most:
            raise MobileVLMError(f"{where}: {name} is {value!r:.60}, expected {least} to {most}")
    if plan.engine not in ENGINES:
        raise MobileVLMError(f"{where}: engine {plan.engine!r} is not known")


def _warn(message: str) -> None:
    warnings.warn(message, PlanWarning, stacklevel=4)

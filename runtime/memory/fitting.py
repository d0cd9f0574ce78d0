"""Fit a plan to the memory that there is, or refuse a model before anything of it is loaded.

Each limit is compared with its own figure: a limit that a person asks for (``--max-memory``) with
the whole peak; a control group's limit, and free memory, with the memory that the process must have
for itself, since pages of files can be taken back; RLIMIT_AS with the address space in use and what
comes on top; RLIMIT_DATA with data likewise, without keys and values (they are shared pages).

A plan that needs more than a limit is replaced by one that takes less; if ``tune`` wrote it, a line
says so. A model is refused only if even the leanest plan exceeds the limit by more than the margin
:data:`DOUBT`: the estimate may err, and a model that would run must not be turned away. A limit
that a person asks for has no margin.

A model that draws gets a plan that has room for drawing too, if there is one. Else it answers, and
is refused when it is asked to draw.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

from mobilevlm.bundle import Bundle
from mobilevlm.errors import MemoryLimitError, PlanWarning
from mobilevlm.plan import Plan, lighter_plans
from mobilevlm.runtime.memory.estimate import LIBRARIES, Memory, drawing_bytes, estimate
from mobilevlm.runtime.memory.limits import Limit, in_use

DOUBT = 0.9
"""Share of the estimate that must be more than a limit of the system for a refusal."""


def fit_plan(bundle: Bundle, plan: Plan, limits: list[Limit], others: Sequence[Plan] = ()) -> Plan:
    """Return the first plan that all limits allow, with room for drawing if one leaves some; as
    :func:`_fit_plan`, whose errors it raises."""
    if bundle.manifest.spec.draws and plan.engine == "onnx":
        try:
            return _fit_plan(bundle, plan, limits, others, drawing_bytes(bundle.manifest))
        except MemoryLimitError:
            pass  # it answers; drawing is refused when it is asked for
    return _fit_plan(bundle, plan, limits, others, 0.0)


def check_drawing_fits(
    bundle: Bundle, plan: Plan, limits: Sequence[Limit], prompt: int, sequences: int
) -> None:
    """Raise if a loaded model has no memory for drawing. ``prompt`` and ``sequences`` as of
    :func:`~mobilevlm.runtime.memory.estimate.drawing_bytes`.

    Raises:
        MemoryLimitError: drawing needs more than a limit.
    """
    more, used = drawing_bytes(bundle.manifest, prompt, sequences), in_use()
    loaded = estimate(bundle.manifest, plan)
    for limit in limits:
        there, own = need(loaded, limit, used)
        needed = there + more if limit.kind in _WHAT else own + more  # what is used has the model
        if needed * (1.0 if limit.kind == "asked" else DOUBT) > limit.size:
            half = ", draw with guidance 1" if sequences > 1 else ""
            raise MemoryLimitError(
                f"{bundle.folder}: drawing takes {needed / 1e6:.0f} MB of "
                f"{_WHAT.get(limit.kind, 'memory')}, the limit is {limit.size / 1e6:.0f} MB "
                f"({limit.where}): {_remedy(limit)}{half}, or {_SMALLER}"
            )


def _fit_plan(
    bundle: Bundle, plan: Plan, limits: list[Limit], others: Sequence[Plan], beside: float
) -> Plan:
    """Return the first plan that all limits allow: of the lighter forms of ``plan``
    (mobilevlm.plan.lighter_plans), then of those of ``others``; else the leanest, if it is within
    the margin. ``others``: fallbacks of a measured plan; a PlanWarning names the one that is used;
    ``beside``: bytes that are needed besides.

    Raises:
        MemoryLimitError: the model needs more than a limit, whatever the plan.
    """
    plans = [choice for item in (plan, *others) for choice in lighter_plans(item)]
    memories = [estimate(bundle.manifest, choice) for choice in plans]
    choices = {
        choice: replace(memory, working=memory.working + beside)
        for choice, memory in zip(plans, memories, strict=True)
    }
    used = in_use()
    found = _fitting(bundle, choices, limits, used)
    if others and found != plans[0]:
        needed = {limit: _total(choices[plans[0]], limit, used) for limit in limits}
        limit = next(limit for limit in limits if needed[limit] > limit.size)
        warnings.warn(
            f"{bundle.folder}: the plan that 'mobilevlm tune' wrote takes "
            f"{needed[limit] / 1e6:.0f} MB, the limit is {limit.size / 1e6:.0f} MB "
            f"({limit.where}): instead {found.describe()}",
            PlanWarning,
            stacklevel=5,
        )
    return found


def _fitting(
    bundle: Bundle, choices: dict[Plan, Memory], limits: list[Limit], used: tuple[float, float]
) -> Plan:
    for choice, memory in choices.items():
        if all(_total(memory, limit, used) <= limit.size for limit in limits):
            return choice
    for limit in limits:
        there, more = min((need(memory, limit, used) for memory in choices.values()), key=sum)
        if there + more * (1.0 if limit.kind == "asked" else DOUBT) > limit.size:
            what = _WHAT.get(limit.kind, "memory")
            raise MemoryLimitError(
                f"{bundle.folder}: running it takes {(there + more) / 1e6:.0f} MB of {what}, the "
                f"limit is {limit.size / 1e6:.0f} MB ({limit.where}): "
                f"{_remedy(limit)}, or {_SMALLER}"
            )
    return min(choices, key=lambda choice: choices[choice].own)


def _total(memory: Memory, limit: Limit, used: tuple[float, float]) -> float:
    return sum(need(memory, limit, used))


def need(memory: Memory, limit: Limit, used: tuple[float, float]) -> tuple[float, float]:
    """Bytes to compare with a limit: those that are taken already, and those that come on top.
    ``used``: address space and data of this process."""
    if limit.kind == "asked":
        return 0.0, memory.peak
    if limit.kind == "address space":
        return used[0], memory.own - LIBRARIES + memory.mapped + memory.reserved
    if limit.kind == "data":
        return used[1], memory.own - LIBRARIES - memory.states
    return 0.0, memory.own


def _remedy(limit: Limit) -> str:
    return "close other programs" if limit.kind == "available" else "raise it"


_WHAT = {"address space": "address space", "data": "data"}
_SMALLER = "export it with a recipe of fewer bits, or choose a smaller model"

"""Fits a plan to the memory that there is, or refuses a model before anything of it is loaded.

What is compared with what: a limit that a person asks for (``--max-memory``) with the whole peak; a
control group's, and memory that is free, with what the process must have for itself, since pages of
files can be taken back; RLIMIT_AS with the address space that is in use already and what comes on
top; RLIMIT_DATA with data likewise, of which keys and values are none (they are shared pages).

A plan that needs more than a limit gives way to one that takes less; where ``tune`` wrote it, a
line says so. Refused is only what needs more than :data:`DOUBT` allows by the plan that takes
least: the estimate may err, and a model that would run must not be turned away. What a person asks
for has no such margin.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from mobilevlm.bundle import Bundle
from mobilevlm.errors import MemoryLimitError, PlanWarning
from mobilevlm.plan import Plan, lighter_plans
from mobilevlm.runtime.memory.estimate import LIBRARIES, Memory, estimate
from mobilevlm.runtime.memory.limits import Limit, in_use

DOUBT = 0.9
"""Share of the estimate that must be more than a limit of the system for a refusal."""


def fit_plan(bundle: Bundle, plan: Plan, limits: list[Limit], others: Sequence[Plan] = ()) -> Plan:
    """The first that all limits allow of what the plan can be made (mobilevlm.plan.lighter_plans),
    then of what ``others`` can; or that which takes least, where they may do so. ``others``: where
    the plan was measured, what there is besides it; if it gives way, a PlanWarning says to what.

    Raises:
        MemoryLimitError: the model needs more than a limit, whatever the plan.
    """
    plans = [choice for item in (plan, *others) for choice in lighter_plans(item)]
    choices = {choice: estimate(bundle.manifest, choice) for choice in plans}
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
            stacklevel=4,
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

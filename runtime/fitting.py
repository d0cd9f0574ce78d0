"""Fits a plan to the memory that there is, or refuses a model before anything of it is loaded.

What is compared with what: a limit that a person asks for (``--max-memory``) with the whole peak; a
control group's, and memory that is free, with what the process must have for itself, since pages of
files can be taken back; RLIMIT_AS with the address space that is in use already and what comes on
top; RLIMIT_DATA with data likewise, of which keys and values are none (they are shared pages).

A plan that needs more than a limit gives way to one that takes less. Refused is only what needs
more than :data:`DOUBT` allows by the plan that takes least: the estimate may err, and a model that
would run must not be turned away. What a person asks for has no such margin.
"""

from __future__ import annotations

from dataclasses import replace

from mobilevlm.bundle import Bundle
from mobilevlm.errors import MemoryLimitError
from mobilevlm.plan import Plan, memory_settings
from mobilevlm.runtime.memory import LIBRARIES, Memory, estimate
from mobilevlm.runtime.memory_limits import Limit, in_use

DOUBT = 0.9
"""Share of the estimate that must be more than a limit of the system for a refusal."""


def fit_plan(bundle: Bundle, plan: Plan, limits: list[Limit]) -> Plan:
    """The plan with the first ``memory`` setting, from its own on, that all limits allow; or with
    the last, where they may do so.

    Raises:
        MemoryLimitError: the model needs more than a limit, whatever the setting.
    """
    settings = memory_settings(plan.engine, plan.memory)
    choices = {
        replace(plan, memory=setting): estimate(bundle.manifest, replace(plan, memory=setting))
        for setting in settings
    }
    used = in_use()
    for choice, memory in choices.items():
        if all(sum(need(memory, limit, used)) <= limit.size for limit in limits):
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

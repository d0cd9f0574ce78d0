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
from mobilevlm.plan import Plan
from mobilevlm.runtime.memory import LIBRARIES, LIBRARY_FILES, Memory, estimate
from mobilevlm.runtime.memory_limits import Limit, in_use

DOUBT = 0.9
"""Share of the estimate that a limit of the system must be below for a refusal."""
MODES = ("fast", "compact", "in turn")
"""See :class:`mobilevlm.plan.Plan`; each takes less memory than the one before."""


def fit_plan(bundle: Bundle, plan: Plan, limits: list[Limit]) -> Plan:
    """The plan with the first ``memory`` setting, from its own on, that all limits allow; or with
    the last, where they may do so.

    Raises:
        MemoryLimitError: the model needs more than a limit, whatever the setting.
    """
    choices = [replace(plan, memory=mode) for mode in _modes(plan)]  # type: ignore[arg-type]
    used = in_use()
    for choice in choices:
        needed = estimate(bundle.manifest, choice)
        if all(need(needed, limit, used) <= limit.size for limit in limits):
            return choice
    for limit in limits:
        least = min(need(estimate(bundle.manifest, choice), limit, used) for choice in choices)
        if least * (1.0 if limit.kind == "asked" else DOUBT) > limit.size:
            raise MemoryLimitError(
                f"{bundle.folder}: running it takes {least / 1e6:.0f} MB of {_WHAT[limit.kind]}, "
                f"the limit is {limit.size / 1e6:.0f} MB ({limit.where}): {_REMEDY[limit.kind]}"
            )
    return min(choices, key=lambda choice: estimate(bundle.manifest, choice).own)


def need(memory: Memory, limit: Limit, used: tuple[float, float]) -> float:
    """Bytes to compare with a limit. ``used``: address space and data of this process."""
    if limit.kind == "asked":
        return memory.peak
    if limit.kind == "address space":
        model = memory.peak - LIBRARY_FILES - LIBRARIES + memory.reserved
        return used[0] + model
    if limit.kind == "data":
        return used[1] + memory.own - LIBRARIES - memory.states
    return memory.own


def _modes(plan: Plan) -> tuple[str, ...]:
    """Those that an engine knows, from the plan's own on."""
    if plan.engine in ("gguf", "ggml", "npu"):
        return (plan.memory,)
    known = MODES if plan.engine == "onnx" else MODES[:2]
    return known[known.index(plan.memory) :] if plan.memory in known else known[-1:]


_WHAT = {
    "asked": "memory",
    "address space": "address space",
    "data": "data",
    "cgroup": "memory",
    "available": "memory",
}
_SMALLER = "export it with a recipe of fewer bits, or choose a smaller model"
_REMEDY = {
    "asked": f"raise it, or {_SMALLER}",
    "address space": f"raise it, or {_SMALLER}",
    "data": f"raise it, or {_SMALLER}",
    "cgroup": f"raise it, or {_SMALLER}",
    "available": f"close other programs, or {_SMALLER}",
}

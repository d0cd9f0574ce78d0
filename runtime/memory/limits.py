"""Limits on a process's memory here: rlimits, its control groups, and free memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from mobilevlm.control_groups import group_files
from mobilevlm.media.image_file import Room
from mobilevlm.runtime.machine import proc_bytes

Kind: TypeAlias = Literal["asked", "address space", "data", "cgroup", "available"]
"""``asked``: by the person; ``address space``, ``data``: RLIMIT_AS and RLIMIT_DATA; ``cgroup``: of
this process or one above; ``available``: memory and swap that programs may still take."""
_NONE = 1 << 60
"""Bytes from which on a limit is none (cgroup v1 says none by a number just below 2^63)."""


@dataclass(frozen=True)
class Limit:
    """Bytes, and what sets them."""

    kind: Kind
    size: float
    where: str
    """For a person: what to look at."""


def memory_limits(root: Path = Path("/"), asked_mb: float | None = None) -> list[Limit]:
    """All that are set, the least first. ``root``: where /proc and /sys are; ``asked_mb``: a limit
    in megabytes that a person gives."""
    found = [*_rlimits(), *_cgroups(root), *_available(root)]
    if asked_mb is not None:
        found.append(Limit("asked", asked_mb * 1e6, "--max-memory"))
    return sorted(found, key=lambda limit: limit.size)


def in_use(root: Path = Path("/")) -> tuple[float, float]:
    """Bytes of address space and of data that this process has (0 where the system does not
    tell)."""
    status = proc_bytes(root / "proc/self/status")
    return status.get("VmSize", 0.0), status.get("VmData", 0.0)


def room_left(limits: Sequence[Limit], root: Path = Path("/")) -> Room:
    """Return the memory that this process may take now beside what it has, by the limit of
    :func:`memory_limits` that leaves least. Pages of files count as taken only where a person sets
    the limit: the system can take them back."""
    status = proc_bytes(root / "proc/self/status")
    own = status.get("RssAnon", 0.0) + status.get("RssShmem", 0.0)
    fields: dict[Kind, str] = {"asked": "VmRSS", "address space": "VmSize", "data": "VmData"}
    rooms = [Room(float("inf"), "no limit")]
    for limit in limits:
        if limit.kind == "available":
            rooms += [Room(now.size, now.where) for now in _available(root)]
        elif limit.kind == "cgroup":
            rooms.append(Room(limit.size - _group_use(Path(limit.where), own), limit.where))
        else:
            rooms.append(Room(limit.size - status.get(fields[limit.kind], 0.0), limit.where))
    return min(rooms, key=lambda room: room.size)


def _group_use(path: Path, own: float) -> float:
    """Return the bytes in use by a control group, pages of files not counted. ``path``: of its
    limit; ``own``: this process's, where the group does not tell."""
    is_unified = path.name == "memory.max"
    usage = path.with_name("memory.current" if is_unified else "memory.usage_in_bytes")
    try:
        total = float(usage.read_text(encoding="ascii"))
        lines = path.with_name("memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return own
    names = ["inactive_file", "active_file"]
    fields = dict(line.split() for line in lines if line.count(" ") == 1)
    files = sum(float(fields.get(name if is_unified else f"total_{name}", 0)) for name in names)
    return max(total - files, own)


def _rlimits() -> list[Limit]:
    try:
        import resource
    except ImportError:
        return []
    found = []
    kinds: tuple[tuple[Kind, int, str], ...] = (
        ("address space", resource.RLIMIT_AS, "ulimit -v"),
        ("data", resource.RLIMIT_DATA, "ulimit -d"),
    )
    for kind, number, where in kinds:
        soft, _ = resource.getrlimit(number)
        if soft != resource.RLIM_INFINITY:
            found.append(Limit(kind, float(soft), where))
    return found


def _cgroups(root: Path) -> list[Limit]:
    """Return those of version 2 (``memory.max``) and 1 (``memory.limit_in_bytes``)."""
    found = []
    for path in group_files(root, "memory", "memory.max", "memory.limit_in_bytes"):
        try:
            text = path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            continue
        if text.isdigit() and int(text) < _NONE:
            found.append(Limit("cgroup", float(text), str(path)))
    return found


def _available(root: Path) -> list[Limit]:
    fields = proc_bytes(root / "proc/meminfo")
    if "MemAvailable" not in fields:
        return []
    free = fields["MemAvailable"] + fields.get("SwapFree", 0.0)
    return [Limit("available", free, "memory and swap that are free")]

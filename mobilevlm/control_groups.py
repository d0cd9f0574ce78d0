"""Limits that Linux control groups set for this process, on processors and on memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessorLimit:
    """Processors' worth of time that a control group gets."""

    processors: float
    where: str
    """For a person: what to look at."""

    @property
    def threads(self) -> int:
        """Whole threads that can run all the time; at least one."""
        return max(int(self.processors), 1)


def processor_limits(root: Path = Path("/")) -> list[ProcessorLimit]:
    """Return all that are set, the least first. ``root``: where /proc and /sys are."""
    found = []
    for path in group_files(root, "cpu", "cpu.max", "cpu.cfs_quota_us"):
        words = _text(path).split()
        if path.name != "cpu.max":
            words.append(_text(path.with_name("cpu.cfs_period_us")).strip())
        # No limit is "max" in version 2, and -1 in version 1.
        if len(words) == 2 and all(word.isdigit() and int(word) for word in words):
            quota, period = map(int, words)
            found.append(ProcessorLimit(quota / period, str(path)))
    return sorted(found, key=lambda limit: limit.processors)


def group_files(root: Path, controller: str, unified: str, legacy: str) -> list[Path]:
    """Return the files of a controller, of this process's group and all above it. ``unified``:
    their name in version 2; ``legacy``: in version 1. In a container the group's path may not be
    there: its own root is then."""
    found: list[Path] = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            mounts, name = ["sys/fs/cgroup", "sys/fs/cgroup/unified"], unified
        elif controller in controllers.split(","):
            # Controllers that share a mount may have a link of their own to it.
            places = [f"sys/fs/cgroup/{place}" for place in (controller, controllers)]
            mounts, name = [place for place in places if (root / place).is_dir()][:1], legacy
        else:
            continue
        for mount in mounts:
            folder = root / mount
            place = folder / group.lstrip("/")
            for path in (place, *place.parents):
                if (path / name).is_file():
                    found.append(path / name)
                if path == folder:
                    break
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # another system, or one that hides it
        return ""

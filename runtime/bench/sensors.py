"""Sensors of a machine at work: temperatures, clocks, power.

Everything is read from Linux' /sys (Documentation/ABI/testing/: sysfs-class-thermal,
sysfs-devices-system-cpu, sysfs-class-power, sysfs-class-powercap), the Raspberry Pi's flags from
``vcgencmd get_throttled``. What a system does not show is absent.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

CREDIBLE = (-50.0, 200.0)
"""Degrees; some sensors answer with nonsense while they are off."""


@dataclass(frozen=True)
class Sample:
    """One look."""

    seconds: float
    """Since the first one."""
    celsius: dict[str, float] = field(default_factory=dict)
    """By thermal zone: its number and type."""
    megahertz: dict[str, float] = field(default_factory=dict)
    """Clocks by processor."""
    limit_megahertz: dict[str, float] = field(default_factory=dict)
    """Present limits of the clocks."""
    battery_watts: dict[str, float] = field(default_factory=dict)
    """Into or out of each battery."""
    battery_percent: dict[str, float] = field(default_factory=dict)
    joules: dict[str, float] = field(default_factory=dict)
    """Counters of x86 packages (RAPL), which start anywhere."""


class Sensors:
    """The files to read, found once: sampling must cost next to nothing."""

    def __init__(self, root: Path | None = None) -> None:
        """``root``: where /sys is; without it the environment's ``MOBILEVLM_SYSFS``, else /sys."""
        root = root or Path(os.environ.get("MOBILEVLM_SYSFS") or "/sys")
        self._zones: dict[str, Path] = {}
        self.passive_celsius: dict[str, float] = {}
        for zone in _numbered(root / "class/thermal", "thermal_zone"):
            name = f"{zone.name[len('thermal_zone') :]} {_text(zone / 'type') or 'unknown'}"
            self._zones[name] = zone / "temp"
            trips = [
                _number(zone / kind.name.replace("_type", "_temp"))
                for kind in zone.glob("trip_point_*_type")
                if _text(kind) == "passive"
            ]
            known = [trip / 1e3 for trip in trips if trip is not None and trip > 0]
            if known:
                self.passive_celsius[name] = min(known)
        processors = _numbered(root / "devices/system/cpu", "cpu")
        self._clocks = {cpu.name: cpu / "cpufreq/scaling_cur_freq" for cpu in processors}
        self._limits = {cpu.name: cpu / "cpufreq/scaling_max_freq" for cpu in processors}
        self._events = [
            cpu / "thermal_throttle" / f"{kind}_throttle_count"
            for cpu in processors
            for kind in ("core", "package")
        ]
        supplies = sorted((root / "class/power_supply").glob("*"))
        self._batteries = [path for path in supplies if _text(path / "type") == "Battery"]
        packages = _numbered(root / "class/powercap", "intel-rapl:")
        self._energy = {
            f"{path.name} {_text(path / 'name')}": path / "energy_uj"
            for path in packages
            if (_text(path / "name") or "").startswith("package")
        }
        self.joules_range = {
            name: (_number(path.with_name("max_energy_range_uj")) or 0) / 1e6
            for name, path in self._energy.items()
        }
        self._vcgencmd = shutil.which("vcgencmd")

    def sample(self, seconds: float) -> Sample:
        """One look at everything; what cannot be read is left out."""
        degrees = _scaled(self._zones, 1e-3)
        return Sample(
            seconds=round(seconds, 3),
            celsius={
                name: value for name, value in degrees.items() if CREDIBLE[0] < value < CREDIBLE[1]
            },
            megahertz=_scaled(self._clocks, 1e-3),
            limit_megahertz=_scaled(self._limits, 1e-3),
            battery_watts={
                path.name: watts
                for path in self._batteries
                if _text(path / "status") == "Discharging"
                and (watts := _battery_watts(path)) is not None
            },
            battery_percent=_scaled({path.name: path / "capacity" for path in self._batteries}),
            joules=_scaled(self._energy, 1e-6),
        )

    def throttle_events(self) -> dict[str, float]:
        """The x86 processors' counters."""
        return _scaled({str(path): path for path in self._events})

    def flags(self) -> int | None:
        """The Raspberry Pi's flags."""
        if self._vcgencmd is None:
            return None
        try:
            done = subprocess.run(
                [self._vcgencmd, "get_throttled"], capture_output=True, text=True, timeout=5
            )
            return int(done.stdout.strip().removeprefix("throttled="), 16)
        except (OSError, ValueError, subprocess.TimeoutExpired):
            return None


def _battery_watts(path: Path) -> float | None:
    """Microwatts, or microamperes by microvolts; signs differ between drivers."""
    power = _number(path / "power_now")
    if power is not None:
        return abs(power) / 1e6
    current, voltage = _number(path / "current_now"), _number(path / "voltage_now")
    return None if current is None or voltage is None else abs(current * voltage) / 1e12


def _numbered(folder: Path, prefix: str) -> list[Path]:
    """The entries of a folder whose name is the prefix and a number, in order."""
    found = (path for path in folder.glob(f"{prefix}*") if path.name[len(prefix) :].isdigit())
    return sorted(found, key=lambda path: int(path.name[len(prefix) :]))


def _scaled(files: dict[str, Path], factor: float = 1.0) -> dict[str, float]:
    read = ((name, _number(path)) for name, path in files.items())
    return {name: round(value * factor, 6) for name, value in read if value is not None}


def _number(path: Path) -> float | None:
    try:
        return float(int(path.read_bytes()))
    except (OSError, ValueError):
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None

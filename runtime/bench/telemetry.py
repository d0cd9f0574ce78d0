"""Sensor values during a measurement, and whether the machine was slowed down meanwhile, for heat
or for power. docs/devices.md has the rules."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

from mobilevlm.runtime.bench.sensors import Sample, Sensors

INTERVAL = 0.5
"""Seconds between samples."""
DROP = 0.1
"""Share of its clock that the fastest processor must lose to count as slowed down."""
STEADY = 3
"""Samples for which a clock must be held to count."""
FEWEST = 2 * STEADY + 2
"""Samples without which clocks say nothing; the first and the last are left out."""
VCGENCMD_FLAGS = {
    0: "under-voltage",
    1: "clock capped",
    2: "throttled",
    3: "soft temperature limit",
}
"""Bits that hold now; 16 higher, that held since the machine was started (Raspberry Pi's
documentation, ``get_throttled``)."""


@dataclass(frozen=True)
class Limits:
    """Limits that samples are judged by; the counters count from the first sample to the last."""

    passive_celsius: dict[str, float] = field(default_factory=dict)
    """Temperature at which the system begins to slow things down, by thermal zone."""
    throttle_events: int | None = None
    """How often x86 processors slowed themselves down. None: they do not tell."""
    flags: tuple[str, ...] | None = None
    """Complaints of ``vcgencmd get_throttled``. None: there is no such program."""


@dataclass(frozen=True)
class Course:
    """A quantity over time."""

    start: float
    end: float
    most: float


@dataclass(frozen=True)
class Telemetry:
    """Sensor values of a measurement, and whether the machine was slowed down."""

    interval_seconds: float
    throttled: bool | None
    """None where nothing that the system shows could tell."""
    reason: str
    celsius: dict[str, Course]
    megahertz: Course | None
    """Clock of the processor that is the fastest at each time."""
    battery_watts: float | None
    """Mean, while all batteries are on their own."""
    battery_percent: dict[str, Course]
    processor_watts: float | None
    """Mean, of the x86 packages."""
    samples: tuple[Sample, ...]


class Recorder:
    """Samples in a thread of its own, see :func:`recorded`."""

    def __init__(self, sensors: Sensors, interval: float = INTERVAL) -> None:
        self._sensors, self._interval = sensors, interval
        self._samples: list[Sample] = []
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
        self._events = sensors.throttle_events()
        self._flags = sensors.flags()
        self._start = time.monotonic()
        self._look()
        self._thread.start()

    def stop(self) -> Telemetry | None:
        """Takes the last sample and tells. None where the system shows nothing at all."""
        self._enough.set()
        self._thread.join()
        self._look()
        before, after = self._events, self._sensors.throttle_events()
        new = [after[name] - value for name, value in before.items() if name in after]
        limits = Limits(
            self._sensors.passive_celsius,
            int(max(new)) if new else None,
            new_flags(self._flags, self._sensors.flags()),
        )
        return summarize(self._samples, limits, self._interval, self._sensors.joules_range)

    def close(self) -> None:
        """Ends the thread."""
        self._enough.set()

    def _run(self) -> None:
        while not self._enough.wait(self._interval):
            self._look()

    def _look(self) -> None:
        self._samples.append(self._sensors.sample(time.monotonic() - self._start))


@contextmanager
def recorded(sensors: Sensors | None = None, interval: float = INTERVAL) -> Iterator[Recorder]:
    """Samples while the block runs; call ``stop`` at the end of what is measured."""
    recorder = Recorder(sensors or Sensors(), interval)
    try:
        yield recorder
    finally:
        recorder.close()


def summarize(
    samples: Sequence[Sample],
    limits: Limits,
    interval: float = INTERVAL,
    joules_range: dict[str, float] | None = None,
) -> Telemetry | None:
    """Courses and the verdict. ``joules_range``: where each package's counter begins again."""
    if limits.flags is None and limits.throttle_events is None:
        shown = (any(vars(sample)[name] for sample in samples) for name in _QUANTITIES)
        if not any(shown):
            return None
    throttled, reason = judge(samples, limits)
    watts = [sum(s.battery_watts.values()) for s in samples if s.battery_watts]
    clocks = _fastest(samples)
    return Telemetry(
        interval_seconds=interval,
        throttled=throttled,
        reason=reason,
        celsius=_courses([sample.celsius for sample in samples]),
        megahertz=Course(clocks[0], clocks[-1], max(clocks)) if clocks else None,
        battery_watts=round(sum(watts) / len(watts), 3) if watts else None,
        battery_percent=_courses([sample.battery_percent for sample in samples]),
        processor_watts=_package_watts(samples, joules_range or {}),
        samples=tuple(samples),
    )


def judge(samples: Sequence[Sample], limits: Limits) -> tuple[bool | None, str]:
    """Return whether the machine was slowed down, and the evidence.

    It was, if the limit of a clock fell below what it was at the start; if the clock of the fastest
    processor, held for ``STEADY`` samples, stayed more than ``DROP`` below for so many later; if a
    thermal zone reached its passive trip point; if processors counted events; or if the Raspberry
    Pi's firmware says so.
    """
    found: list[str] = []
    if limits.flags:
        found.append(f"vcgencmd: {', '.join(limits.flags)}")
    if limits.throttle_events:
        found.append(f"the processors slowed down {limits.throttle_events} times for heat")
    for name, trip in limits.passive_celsius.items():
        most = max((s.celsius[name] for s in samples if name in s.celsius), default=None)
        if most is not None and most >= trip:
            found.append(f"{name} reached {most:.1f} °C (its trip point is {trip:.1f})")
    found.extend(_lowered_limits(samples)[:1])
    clocks = _fastest(samples)
    high, low = _fall(clocks[1:-1])  # those were taken before and after the work
    if low < (1 - DROP) * high:
        found.append(f"the clock fell from {high:.0f} to {low:.0f} MHz")
    if found:
        return True, "; ".join(found)
    if len(clocks) >= FEWEST:
        return False, f"the clock never fell by {DROP:.0%}"
    told = [
        text
        for text, known in (
            ("no firmware flag", limits.flags is not None),
            ("no event counted", limits.throttle_events is not None),
            ("no clock's limit lowered", any(s.limit_megahertz for s in samples)),
            ("no trip point reached", any(n in s.celsius for s in samples
                                          for n in limits.passive_celsius)),
        )
        if known
    ]  # fmt: skip
    if told:
        return False, ", ".join(told)
    if clocks:
        return None, f"fewer than {FEWEST} samples of the clock"
    return None, "the system shows neither clocks nor limits"


def new_flags(before: int | None, after: int | None) -> tuple[str, ...] | None:
    """Return the flags that held at either time, or began in between."""
    if before is None or after is None:
        return None
    begun = (after & ~before) >> 16
    return tuple(
        name for bit, name in VCGENCMD_FLAGS.items() if (before | after | begun) >> bit & 1
    )


def describe(telemetry: Telemetry | None) -> str:
    """In one line."""
    if telemetry is None:
        return "Throttled: unknown (the system shows neither temperature, clock nor power)"
    verdict = {True: "yes", False: "no", None: "unknown"}[telemetry.throttled]
    parts = []
    if telemetry.megahertz is not None:
        course = telemetry.megahertz
        parts.append(f"clock {course.start:.0f} → {course.end:.0f} MHz")
    if telemetry.celsius:
        name, course = max(telemetry.celsius.items(), key=lambda item: item[1].most)
        parts.append(
            f"hottest {name} {course.start:.1f} → {course.end:.1f} °C, at most {course.most:.1f}"
        )
    if telemetry.processor_watts is not None:
        parts.append(f"processor {telemetry.processor_watts:.1f} W")
    if telemetry.battery_watts is not None:
        parts.append(f"battery {telemetry.battery_watts:.1f} W")
    for course in telemetry.battery_percent.values():
        parts.append(f"charge {course.start:.0f} → {course.end:.0f} %")
    return "; ".join([f"Throttled: {verdict} ({telemetry.reason})", *parts])


_QUANTITIES = ("celsius", "megahertz", "limit_megahertz", "battery_percent", "joules")


def _lowered_limits(samples: Sequence[Sample]) -> list[str]:
    """Return a line for each processor whose clock limit fell, the worst first."""
    found = []
    for name, start in samples[0].limit_megahertz.items() if samples else ():
        least = min(s.limit_megahertz.get(name, start) for s in samples)
        if least < start:
            found.append(
                (least / start, f"{name}'s limit fell from {start:.0f} to {least:.0f} MHz")
            )
    return [text for _, text in sorted(found)]


def _fastest(samples: Iterable[Sample]) -> list[float]:
    found = (max(sample.megahertz.values(), default=0.0) for sample in samples)
    return [clock for clock in found if clock > 0]


def _fall(clocks: Sequence[float]) -> tuple[float, float]:
    """A clock that was held, and the least share of it that was held later: ``STEADY`` samples at
    or above the former, so many at or below the latter. The same twice where it never fell."""
    starts = range(len(clocks) - STEADY + 1)
    held = [min(clocks[start : start + STEADY]) for start in starts]
    reached = [max(clocks[start : start + STEADY]) for start in starts]
    highest = max(held, default=0.0)
    falls = [
        (max(held[: start - STEADY + 1]), reached[start]) for start in starts if start >= STEADY
    ]
    return min(falls, key=lambda fall: fall[1] / fall[0], default=(highest, highest))


def _courses(values: Sequence[dict[str, float]]) -> dict[str, Course]:
    names = {name: None for sample in values for name in sample}
    series = {name: [sample[name] for sample in values if name in sample] for name in names}
    return {name: Course(found[0], found[-1], max(found)) for name, found in series.items()}


def _package_watts(samples: Sequence[Sample], ranges: dict[str, float]) -> float | None:
    if len(samples) < 2 or not samples[0].joules:
        return None
    total = 0.0
    for before, after in pairwise(samples):
        for name, start in before.joules.items():
            spent = after.joules.get(name, start) - start
            total += spent + ranges.get(name, 0.0) if spent < 0 else spent
    seconds = samples[-1].seconds - samples[0].seconds
    return round(total / seconds, 3) if seconds > 0 else None

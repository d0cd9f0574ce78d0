"""The whole result of a comparison, as it is stored in compare.json."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comparison.candidates import LLAMA, OURS
from comparison.figures import Figure, Verdict, memory_verdict, summarize, verdicts
from comparison.profiling import OperatorTime
from comparison.roofline import Peaks, Work
from mobilevlm.spec import from_dict


@dataclass(frozen=True)
class Entry:
    """What was measured of one candidate."""

    name: str
    group: str
    rows: dict[str, tuple[float, ...]]
    """Samples in seconds, tokens per second or megabytes, by row (comparison/figures.py)."""
    prefill: dict[str, tuple[float, ...]]
    """Seconds by prompt length."""
    decode: dict[str, tuple[float, ...]]
    """Tokens per second by context length."""
    work: dict[str, Work]
    """Of ``encode``, ``prefill`` and ``decode``, where it takes part in them."""
    notes: tuple[str, ...]

    def figure(self, key: str) -> Figure | None:
        return summarize(self.rows.get(key, ()))


@dataclass(frozen=True)
class Comparison:
    """One run of benchmarks/compare.py."""

    model: str
    command: str
    threads: int
    rounds: int
    machine: dict[str, Any]
    peaks: Peaks
    entries: tuple[Entry, ...]
    absent: dict[str, str]
    profiles: dict[str, tuple[OperatorTime, ...]] = field(default_factory=dict)
    profiled: str = ""
    """The candidate of the profiles."""

    def verdicts(self) -> list[Verdict]:
        """The targets, ours against llama.cpp; memory for the int4 bundle."""
        rows = {entry.name: entry.rows for entry in self.entries}
        ours = [entry.name for entry in self.entries if entry.group == OURS]
        peers = [entry.name for entry in self.entries if entry.group == LLAMA]
        memory = [memory_verdict(rows, name) for name in ours if name.endswith("onnx int4")]
        return verdicts(rows, ours, peers) + [verdict for verdict in memory if verdict]


def write_result(result: Comparison, path: Path) -> None:
    """As JSON, every sample included."""
    text = json.dumps(dataclasses.asdict(result), indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def read_result(path: Path) -> Comparison:
    """What :func:`write_result` wrote.

    Raises:
        MobileVLMError: it is something else.
    """
    return from_dict(Comparison, json.loads(path.read_text(encoding="utf-8")), str(path))

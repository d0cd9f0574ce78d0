"""The whole result of a comparison, as it is stored in compare.json."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comparison.candidates import LLAMA, OURS
from comparison.figures import (
    STAGES,
    Figure,
    Measure,
    Verdict,
    memory_verdict,
    peak_over_size,
    summarize,
    verdicts,
)
from comparison.measure import Rounds
from comparison.profiling import OperatorTime
from comparison.roofline import Peaks, Work
from mobilevlm.errors import MobileVLMError
from mobilevlm.plain_types import from_dict


@dataclass(frozen=True)
class Entry:
    """Measurements of one candidate."""

    name: str
    group: str
    rows: dict[str, tuple[float, ...]]
    """Samples in seconds, tokens per second or megabytes, by row (comparison/figures.py)."""
    prefill: dict[str, tuple[float, ...]]
    """Seconds by prompt length."""
    decode: dict[str, tuple[float, ...]]
    """Tokens per second by context length."""
    work: dict[str, Work]
    """Work of ``encode``, ``prefill`` and ``decode``, where it takes part in them."""
    notes: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """True if it runs all stages: loads and memory of others are not comparable."""
        return bool(self.rows.get("load_and_first"))

    def figure(self, key: str) -> Figure | None:
        if key == "peak_over_size":
            return summarize(peak_over_size(self.rows))
        return summarize(self.rows.get(key, ()))


@dataclass(frozen=True)
class Comparison:
    """One run of benchmarks/compare.py."""

    model: str
    command: str
    threads: int
    rounds: int
    """Complete ones of the stages."""
    machine: dict[str, Any]
    peaks: Peaks
    entries: tuple[Entry, ...]
    absent: dict[str, str]
    profiles: dict[str, tuple[OperatorTime, ...]] = field(default_factory=dict)
    profiled: str = ""
    """The candidate of the profiles."""
    planned: Rounds | None = None
    done: Rounds | None = None
    """Rounds that are complete; results of an interrupted round are left out."""
    finished: bool = True

    def best(self, measure: Measure, group: str | None = None) -> Entry | None:
        """The candidate (of a group) with the best median; in loads and memory of those that run
        all stages."""
        rivals = [
            (figure.median, entry)
            for entry in self.entries
            if (figure := entry.figure(measure.key))
            and (measure.key in STAGES or entry.whole)
            and group in (None, entry.group)
        ]
        choose = max if measure.better == "more" else min
        return choose(rivals, key=lambda rival: rival[0])[1] if rivals else None

    def ratio(self, measure: Measure, group: str) -> float | None:
        """Our best over a group's best."""
        ours, theirs = self.best(measure, OURS), self.best(measure, group)
        if ours is None or theirs is None:
            return None
        mine, other = ours.figure(measure.key), theirs.figure(measure.key)
        assert mine is not None and other is not None
        return mine.median / other.median

    def verdicts(self) -> list[Verdict]:
        """The targets, ours against llama.cpp; memory for the int4 bundle."""
        rows = {entry.name: entry.rows for entry in self.entries}
        ours = [entry.name for entry in self.entries if entry.group == OURS]
        peers = [entry.name for entry in self.entries if entry.group == LLAMA]
        memory = [memory_verdict(rows, name) for name in ours if name.endswith("onnx int4")]
        return verdicts(rows, ours, peers) + [verdict for verdict in memory if verdict]


def write_result(result: Comparison, path: Path) -> None:
    """As JSON, every sample included, in one rename."""
    text = json.dumps(dataclasses.asdict(result), indent=1)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text + "\n", encoding="utf-8")
    draft.replace(path)


def read_result(path: Path) -> Comparison:
    """Read a file of :func:`write_result`.

    Raises:
        MobileVLMError: it is something else, or not there.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MobileVLMError(f"{path}: no result of compare.py: {error}") from None
    return from_dict(Comparison, data, str(path))

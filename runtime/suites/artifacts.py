"""Artifacts side by side: what each scores, and its speed, memory and energy on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mobilevlm.console.tables import Column, Table
from mobilevlm.console.terminal import shown
from mobilevlm.errors import MobileVLMError
from mobilevlm.plain_types import from_dict
from mobilevlm.runtime.bench.bench import BenchResult, Row, described_machine
from mobilevlm.runtime.suites.evaluate import Evaluation


@dataclass(frozen=True)
class Artifact:
    """A bundle's answers and its latency."""

    name: str
    evaluation: Evaluation
    bench: BenchResult

    def row(self, name: str) -> Row:
        """Return a measured quantity of the bench."""
        return next(row for row in self.bench.rows if f"{row.name}/{row.unit}" == name)

    @property
    def watts(self) -> float | None:
        """Mean power during the bench: of the batteries if the machine runs on them, else of the
        processor; none where the system shows neither."""
        seen = self.bench.telemetry
        if seen is None:
            return None
        return seen.processor_watts if seen.battery_watts is None else seen.battery_watts

    @property
    def joules(self) -> float | None:
        """Energy of an answer of the bench: its time by the mean power."""
        if self.watts is None:
            return None
        others = (self.bench.new_tokens - 1) * self.row("next token/ms").p50
        return self.watts * (self.row("first token/ms").p50 + others) / 1e3

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "evaluation": self.evaluation.to_dict(),
            "bench": asdict(self.bench),
            "watts": self.watts,
            "joules_per_answer": self.joules,
        }


@dataclass(frozen=True)
class Measure:
    """A column of the table."""

    title: str
    value: Callable[[Artifact], float | None]
    form: str = "{:.0f}"
    samples: Callable[[Artifact], Sequence[float]] = lambda artifact: ()

    def cell(self, artifact: Artifact) -> str:
        """Return the value for people."""
        value = self.value(artifact)
        return "–" if value is None else self.form.format(value)


MEASURES = (
    Measure("size, MB", lambda found: found.bench.artifact_mb),
    Measure("first token, ms", lambda found: found.row("first token/ms").p50,
            samples=lambda found: found.row("first token/ms").samples),
    Measure("tokens/s", lambda found: found.row("decode/tokens/s").p50, "{:.1f}",
            samples=lambda found: found.row("decode/tokens/s").samples),
    Measure("peak memory, MB", lambda found: found.bench.peak_memory_mb),
    Measure("energy, J/answer", lambda found: found.joules, "{:.2f}"),
)  # fmt: skip


def measure_bench(bundle: Path, options: Sequence[str]) -> BenchResult:
    """Run ``mobilevlm bench`` in a process of its own, so that its memory is that of one bundle.

    Raises:
        MobileVLMError: it failed.
    """
    command = [sys.executable, "-m", "mobilevlm", "bench", str(bundle), *options, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        reason = said[-1].removeprefix("mobilevlm: error: ")
        raise MobileVLMError(f"{bundle}: it could not be measured: {shown(reason, 300)}")
    return from_dict(BenchResult, json.loads(done.stdout), f"{bundle}: result")


def titles(artifacts: Sequence[Artifact]) -> tuple[str, ...]:
    """Return the names of the table's columns."""
    measure = artifacts[0].evaluation.suite.measure
    return ("artifact", measure, "95% interval", *(column.title for column in MEASURES))


def cells(artifact: Artifact) -> tuple[str, ...]:
    """Return a line of the table."""
    score = artifact.evaluation.overall
    interval = f"{100 * score.low:.1f}–{100 * score.high:.1f}%"
    values = (column.cell(artifact) for column in MEASURES)
    return (artifact.name, f"{100 * score.accuracy:.1f}%", interval, *values)


def described(artifacts: Sequence[Artifact]) -> list[str]:
    """Return what the table says nothing of: the questions, the measured answer, the machine."""
    first = artifacts[0]
    bench = first.bench
    asked = len(first.evaluation.judged)
    lines = [
        f"Suite {first.evaluation.suite.name}: {asked} questions. Speed of an answer to "
        f"{bench.visual_tokens} visual and {bench.text_tokens} text tokens with {bench.new_tokens} "
        f"new ones, median of {bench.runs} runs; memory of the process that measured it.",
        described_machine(bench),
    ]
    throttled = [
        found.name
        for found in artifacts
        if found.bench.telemetry is not None and found.bench.telemetry.throttled
    ]
    if throttled:
        lines.append(f"The machine was slowed down while it measured {', '.join(throttled)}.")
    if all(found.watts is None for found in artifacts):
        lines.append("The system shows no power, so energy is unknown.")
    return lines


def artifact_table(artifacts: Sequence[Artifact]) -> Table:
    """Return the table for a terminal."""
    first, *others = titles(artifacts)
    columns = (Column(first, whole=True), *(Column(title, True, True) for title in others))
    view = Table(columns)
    for found in artifacts:
        view.add(*cells(found))
    return view


def as_markdown(artifacts: Sequence[Artifact]) -> str:
    """Return the table for a document."""
    names = titles(artifacts)
    lines = [f"| {' | '.join(names)} |", "|---" + "|---:" * (len(names) - 1) + "|"]
    for found in artifacts:
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells(found))} |")
    return "\n".join([*lines, "", *described(artifacts)])

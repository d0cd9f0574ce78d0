"""Decode speed of sparse and dense models against the bytes that a token activates, in turns.

    python benchmarks/sparse_decode.py moe-int4:onnx dense-int4:onnx --rounds 5
    python benchmarks/sparse_decode.py moe-q4:ggml moe-q4:ggml:400MB dense-q4:ggml --rounds 5

A candidate is a bundle, an engine and, for the engine ggml, a limit on resident experts. Each run
is a process of its own, `mobilevlm bench` without an image; candidates take turns within each
round, and so does reading memory, the floor. Figures are medians, with the best. The last candidate
is what the others are compared with.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from comparison.roofline import measure_read

from mobilevlm.plan import default_threads


@dataclass
class Candidate:
    """A bundle in an engine, and what was measured of it."""

    bundle: str
    engine: str
    max_resident: str = ""
    token_mb: float = 0.0
    peak_mb: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    """Tokens per second, one for each round"""
    brought_in: list[float] = field(default_factory=list)
    """Megabytes of experts that came back into memory, per token"""

    @property
    def read(self) -> float:
        """GB/s of activated weights, the median."""
        return statistics.median(self.rates) * self.token_mb / 1e3


def measure(candidate: Candidate, threads: int, new_tokens: int) -> None:
    """One run."""
    limit = ["--max-resident", candidate.max_resident] if candidate.max_resident else []
    command = [
        sys.executable, "-m", "mobilevlm", "bench", candidate.bundle, "--engine", candidate.engine,
        "--threads", threads, "--no-image", "--text-tokens", 16, "--new-tokens", new_tokens,
        "--runs", 1, "--json", *limit,
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{candidate.bundle}: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads(done.stdout)
    rows = {row["name"]: row for row in found["rows"]}
    candidate.token_mb = found["token_mb"]
    candidate.peak_mb.append(found["peak_memory_mb"])
    # By the median interval: one that was disturbed does not count for all.
    candidate.rates.append(1e3 / rows["next token"]["p50"])
    if candidate.max_resident:
        candidate.brought_in.append(rows["experts brought in"]["p50"] / new_tokens)


def table(candidates: Sequence[Candidate], floor: float) -> str:
    """In Markdown; ``floor``: bytes of memory read per second."""
    lines = [
        "| bundle | engine | activated MB | peak MB | tokens/s (best) | GB/s | of memory reading "
        "| of the last | experts in, MB/token |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for item in candidates:
        rate, best = statistics.median(item.rates), max(item.rates)
        label = f"{item.engine}, {item.max_resident}" if item.max_resident else item.engine
        brought = f"{statistics.median(item.brought_in):.1f}" if item.brought_in else ""
        lines.append(
            f"| {item.bundle} | {label} | {item.token_mb:.0f} | "
            f"{statistics.median(item.peak_mb):.0f} | {rate:.1f} ({best:.1f}) | {item.read:.1f} | "
            f"{item.read * 1e9 / floor:.0%} | {item.read / candidates[-1].read:.2f} | {brought} |"
        )
    return "\n".join([*lines, "", f"memory reading: {floor / 1e9:.1f} GB/s"])


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("candidates", nargs="+", metavar="BUNDLE:ENGINE[:LIMIT]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=default_threads())
    arguments = parser.parse_args()
    candidates = [Candidate(*text.split(":")) for text in arguments.candidates]
    reading = []
    for number in range(arguments.rounds):
        for item in candidates:
            measure(item, arguments.threads, arguments.new_tokens)
        reading.append(measure_read(arguments.threads))
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
    print(table(candidates, statistics.median(reading)))


if __name__ == "__main__":
    main()

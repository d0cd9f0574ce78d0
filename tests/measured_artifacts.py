"""Made-up results of three bundles, for tests of what shows them."""

from __future__ import annotations

from mobilevlm.runtime.bench.bench import BenchResult, Row
from mobilevlm.runtime.bench.telemetry import Telemetry
from mobilevlm.runtime.suites.artifacts import Artifact
from mobilevlm.runtime.suites.evaluate import Evaluation
from mobilevlm.runtime.suites.question import Judged, Question, Suite

SUITE = Suite("pope", lambda data, split: [], lambda question, answer: 0.0, 8)
MACHINE = {"board": "Raspberry Pi 5", "processor": "Cortex-A76", "memory_gb": 8.0,
           "system": "Linux", "onnxruntime": "1.32.0"}  # fmt: skip


def row(name: str, unit: str, *samples: float) -> Row:
    return Row(name, unit, sorted(samples)[len(samples) // 2], None, None, samples)


def artifact(name: str, right: int, first: float, rate: float, watts: float | None) -> Artifact:
    """A bundle that answers so many of 200 questions right."""
    judged = tuple(
        Judged(Question(str(n), "?", kind=("random", "popular")[n % 2]), "", float(n < right))
        for n in range(200)
    )
    bench = BenchResult(
        model="nano", recipe="int4", engine="onnx", plan="", runs=3, text_tokens=56,
        visual_tokens=144, new_tokens=64, threads=4, load_seconds=0.1, peak_memory_mb=3000 / rate,
        artifact_mb=5000 / rate, token_mb=None, machine=MACHINE,
        rows=(row("first token", "ms", first, 1.1 * first, 0.9 * first),
              row("next token", "ms", *([1e3 / rate] * 3)),
              row("decode", "tokens/s", rate, 0.96 * rate, 1.02 * rate)),
        telemetry=None if watts is None else Telemetry(
            0.5, False, "no event counted", {}, None, None, {}, watts, ()),
    )  # fmt: skip
    return Artifact(name, Evaluation(SUITE, name, "onnx", judged, rate), bench)


ARTIFACTS = [
    artifact("float32", 172, 900, 10.0, 6.0),
    artifact("int8-vision-int4", 170, 420, 31.0, 5.0),
    artifact("int4", 151, 390, 34.0, 4.8),
]

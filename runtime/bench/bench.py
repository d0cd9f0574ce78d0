"""Latency of each stage on this machine, over several runs of the same question.

Definitions as MLPerf Client has them: time to first token counts from the question; tokens per
second from the mean interval after the first token.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mobilevlm.console.progress import Advance, ignore
from mobilevlm.image import ImageInput
from mobilevlm.plan import engine_files, stage_formats
from mobilevlm.prompt import Sound
from mobilevlm.runtime.answer.generation import Generation
from mobilevlm.runtime.bench.telemetry import Telemetry, describe, recorded
from mobilevlm.runtime.machine import describe_machine, machine_line, peak_memory_mb
from mobilevlm.runtime.vlm import VLM

LEAST_BEYOND = 0.5
"""Samples that must lie beyond a percentile on average: p90 needs 5 samples, p99 needs 50."""


@dataclass(frozen=True)
class Row:
    """One measured quantity. A percentile is none where there are too few samples for it."""

    name: str
    unit: str
    p50: float
    p90: float | None
    p99: float | None
    samples: tuple[float, ...]


@dataclass(frozen=True)
class BenchResult:
    """Result of ``mobilevlm bench``."""

    model: str
    recipe: str
    engine: str
    plan: str
    """Settings that are not the defaults."""
    runs: int
    text_tokens: int
    visual_tokens: int
    new_tokens: int
    threads: int
    load_seconds: float
    peak_memory_mb: float
    artifact_mb: float
    """Model files that the engine reads."""
    token_mb: float | None
    """Weights that a decoding step reads (of sparse experts those that a token uses), if known."""
    rows: tuple[Row, ...]
    machine: dict[str, Any]
    telemetry: Telemetry | None = None
    """None where the system shows nothing."""
    device: str | None = None
    """Name of the machine it was measured on; none: this one."""
    notes: tuple[str, ...] = ()
    """Differences between what was asked and what was measured."""


_STAGES = {"vision": ("preprocess", "vision"), "audio": ("mel", "audio encoder")}
"""Names of what comes before the decoder, by the stage that a model has."""


def run_bench(
    vlm: VLM,
    image: ImageInput | Sound | None,
    *,
    text_tokens: int = 56,
    new_tokens: int = 64,
    runs: int = 5,
    draft_tokens: int = 0,
    codes: int = 16,
    advance: Advance = ignore,
) -> BenchResult:
    """Runs the same prompt ``runs`` times, after one run that does not count. The conversation is
    left out, so that ``text_tokens`` is what the decoder sees. Each run begins with empty caches;
    then comes another question of that length about the same image. ``draft_tokens``: guessed at
    a time, see runtime/sequence/drafting.py; ``codes``: of an image that is begun in each run, and
    decoded, by a model that makes images."""
    images = [] if image is None else [image]
    prompt = prompt_of_length(vlm, text_tokens, len(images))
    other = prompt_of_length(vlm, text_tokens, len(images), word=" b")
    samples: dict[str, list[float]] = {}
    with recorded() as recorder:
        for run in range(runs + 1):
            vlm.clear_caches()
            before = vlm.brought_in_bytes
            answer = vlm.generate(
                prompt,
                images,
                max_new_tokens=new_tokens,
                draft_tokens=draft_tokens,
                ignore_eos=True,
                raw=True,
            )
            after = vlm.brought_in_bytes
            second = vlm.generate(other, images, max_new_tokens=1, raw=True)
            advance(1)
            if run == 0:
                continue
            times = answer.timings
            before_encoder, encoder = _STAGES[vlm.spec.encoder_stage]
            for name, value in (
                (before_encoder, times.preprocess),
                (encoder, times.vision),
                ("prefill", times.prefill),
                ("first token", times.ttft),
            ):
                samples.setdefault(f"{name}/ms", []).append(1e3 * value)
            if images:
                first_token = 1e3 * second.timings.ttft
                samples.setdefault("first token, second question/ms", []).append(first_token)
            if answer.drafts.proposed:
                share = 100 * answer.drafts.accepted / answer.drafts.proposed
                samples.setdefault("guesses that were right/%", []).append(share)
            if before is not None and after is not None:
                samples.setdefault("experts brought in/MB", []).append((after - before) / 1e6)
            if codes and vlm.spec.draws and vlm.engine == "onnx":
                for name, values in _drawing_samples(vlm, codes).items():
                    samples.setdefault(name, []).extend(values)
            samples.setdefault("next token/ms", []).extend(1e3 * s for s in answer.token_seconds)
            samples.setdefault("prefill/tokens/s", []).append(answer.prompt_tokens / times.prefill)
            samples.setdefault("decode/tokens/s", []).append(times.tokens_per_second)
        telemetry = recorder.stop()
    manifest = vlm.bundle.manifest
    decoder = vlm.bundle.artifact("decoder", stage_formats(vlm.bundle, vlm.engine)["decoder"])
    token_mb = None if decoder.bytes_per_token is None else decoder.bytes_per_token / 1e6
    if token_mb is not None:
        samples["weights read/GB/s"] = [
            rate * token_mb / 1e3 for rate in samples["decode/tokens/s"]
        ]
    return BenchResult(
        model=vlm.spec.name,
        recipe=manifest.recipe.name,
        engine=vlm.engine,
        plan=vlm.plan.describe(),
        runs=runs,
        text_tokens=answer.prompt_tokens - answer.visual_tokens,
        visual_tokens=answer.visual_tokens,
        new_tokens=len(answer.token_ids),
        threads=vlm.threads,
        load_seconds=vlm.load_seconds,
        peak_memory_mb=peak_memory_mb(),
        artifact_mb=sum(manifest.files[name].size for name in engine_files(vlm.bundle, vlm.engine))
        / 1e6,
        token_mb=token_mb,
        rows=tuple(_row(name, values) for name, values in samples.items() if values),
        machine=describe_machine(),
        telemetry=telemetry,
        notes=_notes(answer, text_tokens, new_tokens),
    )


def _drawing_samples(vlm: VLM, count: int) -> dict[str, list[float]]:
    """Return times of an image that is begun with so many codes, and of decoding a whole one. The
    first code takes the prompt too, and the stages are loaded before."""
    output = vlm.spec.drawing
    start = time.perf_counter()
    vlm.decode_codes([0] * output.num_tokens)
    decoded = time.perf_counter() - start
    steps, times = vlm.draw_steps(" a" * 16, temperature=0), []
    for _ in range(min(count, output.num_tokens)):
        next(steps)
        times.append(time.perf_counter())
    steps.close()
    each = np.diff(times)
    return {
        "next code/ms": (1e3 * each).tolist(),
        "codes/codes/s": [len(each) / float(each.sum())] if len(each) else [],
        "image decoder/ms": [1e3 * decoded],
    }


def prompt_of_length(vlm: VLM, text_tokens: int, images: int, word: str = " a") -> str:
    """A raw prompt of exactly this many text tokens (images not counted), if its pieces allow:
    one word over and over."""
    prompt = vlm.spec.conversation.image_mark * images
    while vlm.count_text_tokens(prompt, images, raw=True) < text_tokens:
        prompt += word
    return prompt


def _notes(answer: Generation, text_tokens: int, new_tokens: int) -> tuple[str, ...]:
    """Return where the numbers of tokens are not those that were asked for, and why."""
    notes = []
    text = answer.prompt_tokens - answer.visual_tokens
    if text != text_tokens:
        notes.append(f"{text} text tokens instead of {text_tokens}: the prompt's shortest form")
    if len(answer.token_ids) != new_tokens:
        notes.append(
            f"{len(answer.token_ids)} new tokens instead of {new_tokens}: the context was full"
        )
    return tuple(notes)


def summary(result: BenchResult) -> str:
    """Return the settings and sizes of a measurement, in one line."""
    reads = "" if result.token_mb is None else f" (a token reads {result.token_mb:.1f} MB)"
    return (
        f"{result.model}, recipe {result.recipe}, engine {result.engine}, "
        f"{result.artifact_mb:.0f} MB{reads}: "
        f"{result.visual_tokens} visual + {result.text_tokens} text tokens, "
        f"{result.new_tokens} new tokens, {result.runs} runs, "
        f"{result.threads} thread{'s' * (result.threads > 1)}; load {result.load_seconds:.2f} s, "
        f"peak memory {result.peak_memory_mb:.0f} MB" + "".join(f"; {n}" for n in result.notes)
    )


def described_machine(result: BenchResult) -> str:
    """Return one line on the machine of a measurement, and whether it slowed down."""
    where = f"{result.device or 'this machine'}: {machine_line(result.machine)}"
    return f"Measured on {where}. {describe(result.telemetry)}"


def as_markdown(result: BenchResult) -> str:
    """The result as a table for a document."""
    lines = [
        summary(result),
        "",
        described_machine(result),
        "",
        "| stage | unit | p50 | p90 | p99 |",
        "|---|---|---|---|---|",
    ]
    for row in result.rows:
        lines.append(f"| {row.name} | {row.unit} | {' | '.join(percentiles(row))} |")
    return "\n".join(lines)


def percentiles(row: Row) -> list[str]:
    """Return p50, p90 and p99 for people."""
    return ["–" if value is None else f"{value:.1f}" for value in (row.p50, row.p90, row.p99)]


def _row(label: str, samples: Sequence[float]) -> Row:
    """``label``: name and unit, as in ``vision/ms``. ``p90`` and ``p99`` are on the slow side: high
    times, low rates."""
    name, unit = label.split("/", 1)
    shares = [
        float(np.percentile(samples, q if unit == "ms" else 100 - q))
        if len(samples) * (100 - q) >= LEAST_BEYOND * 100
        else None
        for q in (90, 99)
    ]
    rounded = tuple(round(sample, 4) for sample in samples)
    return Row(name, unit, float(np.median(samples)), shares[0], shares[1], rounded)

"""The result as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from comparison.candidates import OURS
from comparison.figures import MEASURES, Figure, Measure, Verdict
from comparison.results import Comparison, Entry
from comparison.roofline import Peaks, share_of_roof

PROFILE_ROWS = 8
RATIOS = ("encode", "prefill", "first", "decode", "second", "cold_load", "warm_load", "peak")
TITLES = {measure.key: measure.title for measure in MEASURES} | {
    "second_share": "second question over its own first",
}


def as_markdown(result: Comparison) -> str:
    """Tables: all figures, targets, roofline, operators."""
    return "\n".join(
        [
            _title(result),
            "",
            f"`{result.command}`",
            "",
            *_unfinished(result),
            _machine(result),
            "",
            "Median, in brackets least and most. Bold: the best of a column, in loads and memory "
            "of those that run the whole model.",
            "",
            *_figures(result),
            "",
            *_notes(result),
            *_verdicts(result),
            *_ratios(result),
            *_roofline(result),
            *_profiles(result),
        ]
    )


def targets(result: Comparison) -> list[str]:
    """The tables of targets and ratios alone, under a heading."""
    return [_title(result), "", *_unfinished(result), *_verdicts(result), *_ratios(result)]


def rounds_in_words(result: Comparison) -> str:
    """How many rounds are complete, as ``3 of 3 rounds of loads, …``."""
    assert result.done is not None and result.planned is not None
    done, planned = vars(result.done), vars(result.planned)
    return ", ".join(f"{done[kind]} of {planned[kind]} rounds of {kind}" for kind in planned)


def cell(figure: Figure | None, measure: Measure, bold: bool = False) -> str:
    """``812 (790–1043)``, or a dash. ``bold``: the median."""
    if figure is None:
        return "–"
    median, low, high = (
        f"{value * measure.scale:.{measure.digits}f}"
        for value in (figure.median, figure.low, figure.high)
    )
    shown = f"**{median}**" if bold else median
    return shown if low == high else f"{shown} ({low}–{high})"


def _title(result: Comparison) -> str:
    rounds = f"{result.rounds} round{'s' * (result.rounds != 1)}"
    return f"## {result.model}, {result.threads} threads, {rounds}"


def _unfinished(result: Comparison) -> list[str]:
    if result.finished:
        return []
    return [
        f"**Interrupted.** Complete are {rounds_in_words(result)}; the rest is left out, and the "
        "same command goes on from here.",
        "",
    ]


def _verdicts(result: Comparison) -> list[str]:
    return _section(
        ["### Targets: our best over llama.cpp's best"],
        ("", "ours", "llama.cpp", "ratio", "target", "met"),
        [_verdict_row(verdict) for verdict in result.verdicts()],
    )


def _ratios(result: Comparison) -> list[str]:
    """Every peer's best, as ``_verdicts`` has llama.cpp's."""
    measures = [measure for measure in MEASURES if measure.key in RATIOS]
    groups = dict.fromkeys(entry.group for entry in result.entries if entry.group != OURS)
    rows = [(group, *(result.ratio(measure, group) for measure in measures)) for group in groups]
    return _section(
        [
            "### Our best over each peer's best",
            "",
            "Less is better, except for tokens/s. A dash: one of the two lacks the stage, or does "
            "not run the whole model.",
        ],
        ("", *(measure.title for measure in measures)),
        [
            (group, *("–" if ratio is None else f"{ratio:.2f}" for ratio in ratios))
            for group, *ratios in rows
            if any(ratios)
        ],
    )


def _section(
    heading: Sequence[str], header: Sequence[str], rows: Sequence[Sequence[object]]
) -> list[str]:
    """A heading and a table, with an empty line after it; nothing without rows."""
    return [*heading, "", *_table(header, rows), ""] if rows else []


def _machine(result: Comparison) -> str:
    facts = result.machine
    peaks = result.peaks
    packages = [f"mobilevlm {facts['mobilevlm']}", *facts.get("packages", {}).values()]
    return (
        f"{facts['processor']}, {' '.join(facts['features'])}, {facts['memory_gb']} GB; "
        f"{facts['system']}; Python {facts['python']}, onnxruntime {facts['onnxruntime']}, "
        f"{', '.join(packages)}. "
        f"Measured in this run: reads {peaks.read / 1e9:.1f} GB/s, "
        f"float32 products {peaks.float32 / 1e9:.0f} GFLOP/s, int8 products "
        f"{peaks.int8 / 1e9:.0f} Gop/s."
    )


def _figures(result: Comparison) -> list[str]:
    shown = [
        measure
        for measure in MEASURES
        if any(entry.figure(measure.key) for entry in result.entries)
    ]
    winners = {measure.key: result.best(measure) for measure in shown}
    return _table(
        ("", *(f"{measure.title}, {measure.unit}" for measure in shown)),
        (
            (
                entry.name,
                *(
                    cell(entry.figure(measure.key), measure, winners[measure.key] is entry)
                    for measure in shown
                ),
            )
            for entry in result.entries
        ),
    )


def _notes(result: Comparison) -> list[str]:
    notes = [f"{name}: {reason}" for name, reason in result.absent.items()]
    notes += [f"{entry.name}: {note}" for entry in result.entries for note in entry.notes]
    return [f"- {note}" for note in notes] + ([""] if notes else [])


def _verdict_row(verdict: Verdict) -> tuple[str, ...]:
    measure = next((m for m in MEASURES if m.key == verdict.key), None)

    def shown(value: float) -> str:
        if measure is None:
            return f"{value:.2f}" if value < 10 else f"{value:.0f}"
        return f"{value * measure.scale:.{measure.digits}f} {measure.unit}"

    peer = "–"
    if verdict.peer is not None and verdict.peer_value is not None:
        peer = f"{shown(verdict.peer_value)} ({verdict.peer})"
    sign = "≥" if verdict.key == "decode" else "≤"
    digits = 0 if verdict.key == "peak_over_size" else 2
    return (
        TITLES[verdict.key],
        f"{shown(verdict.value)} ({verdict.ours})",
        peer,
        f"{verdict.ratio:.{digits}f}",
        f"{sign} {verdict.limit:.{digits}f}",
        "yes" if verdict.met else "no",
    )


def _roofline(result: Comparison) -> list[str]:
    header = (
        "", "stage", "Gop/s", "weights and KV, GB/s",
        "of the int8 roof", "of the float32 roof",
    )  # fmt: skip
    rows = [
        roof
        for entry in result.entries
        for stage in ("encode", "prefill", "decode")
        if (roof := roofline_row(entry, stage, result.peaks))
    ]
    heading = [
        "### Distance from the roofline",
        "",
        "The roof is the least time that the stage's operations take at the peak of the matrix "
        "products, or its weights at the reading speed, whichever is more; the share says how much "
        "of the time taken that is.",
    ]
    return _section(heading, header, rows)


def roofline_row(entry: Entry, stage: str, peaks: Peaks) -> tuple[str, ...] | None:
    """A stage of a candidate against the machine's peaks; none where it was not measured."""
    figure, work = entry.figure(stage), entry.work.get(stage)
    if figure is None or work is None:
        return None
    seconds = 1 / figure.median if stage == "decode" else figure.median
    return (
        entry.name,
        stage,
        f"{work.operations / seconds / 1e9:.0f}",
        f"{work.bytes_read / seconds / 1e9:.1f}",
        f"{share_of_roof(work, seconds, peaks.int8, peaks.read):.0%}",
        f"{share_of_roof(work, seconds, peaks.float32, peaks.read):.0%}",
    )


def _profiles(result: Comparison) -> list[str]:
    lines = [f"### Where the time goes: {result.profiled}, by operator", ""]
    for stage, rows in result.profiles.items():
        rest = rows[PROFILE_ROWS:]
        cells = [
            (row.what, row.count, f"{row.milliseconds:.2f}", f"{row.share:.1%}")
            for row in rows[:PROFILE_ROWS]
        ]
        if rest:
            sums = sum(r.count for r in rest), sum(r.milliseconds for r in rest)
            share = sum(row.share for row in rest)
            cells.append(("other", sums[0], f"{sums[1]:.2f}", f"{share:.1%}"))
        total = sum(row.milliseconds for row in rows)
        lines += [f"{stage}: {total:.1f} ms in operators", ""]
        lines += [*_table(("operator → outputs", "calls", "ms", "share"), cells), ""]
    return lines if result.profiles else []


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    return [
        "| " + " | ".join(map(str, cells)) + " |"
        for cells in (header, ["---"] * len(header), *rows)
    ]

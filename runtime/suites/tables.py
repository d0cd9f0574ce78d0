"""Results of suites as tables for people."""

from __future__ import annotations

from mobilevlm.accuracy import Difference, Score, difference
from mobilevlm.console.tables import Column, Table
from mobilevlm.runtime.suites.evaluate import Evaluation


def result_table(found: Evaluation) -> Table:
    """Return scores by kind and the suite's further figures."""
    titles = ("asked", found.suite.measure, "95% interval")
    columns = (Column("kind", whole=True), *(Column(title, True, True) for title in titles))
    view = Table(columns, title=f"{found.suite.name}: {found.bundle}")
    for kind, value in found.kinds.items():
        view.add(kind, *_cells(value))
    view.rule()
    view.add("all", *_cells(found.overall), style="bold")
    figures = found.suite.figures(found.judged)
    if figures:
        view.rule()
    for name, figure in figures.items():
        view.add(name, "", f"{figure:.4g}", "")
    return view


def comparison_table(first: Evaluation, second: Evaluation) -> Table:
    """Return both bundles' scores by kind and the difference, in points."""
    titles = ("asked", "first", "second", "difference", "95% interval")
    columns = (Column("kind", whole=True), *(Column(title, True, True) for title in titles))
    view = Table(columns, title=f"{first.suite.name}: {first.bundle} and {second.bundle}")
    for kind in first.kinds:
        ours, theirs = (
            [unit.score for unit in found.units if unit.kind == kind] for found in (first, second)
        )
        cells = _pair_cells(first.kinds[kind], second.kinds[kind], difference(ours, theirs))
        view.add(kind, *cells)
    view.rule()
    ours, theirs = ([unit.score for unit in found.units] for found in (first, second))
    total = difference(ours, theirs)
    view.add("all", *_pair_cells(first.overall, second.overall, total), style="bold")
    return view


def difference_line(found: Difference) -> str:
    """Return the difference in one sentence."""
    return (
        f"second minus first: {100 * found.mean:+.2f} points (95% interval "
        f"{100 * found.low:+.2f} to {100 * found.high:+.2f}); better on {found.second_better} "
        f"questions, worse on {found.first_better}; McNemar's exact p = {found.p:.3g}"
    )


def _cells(value: Score) -> tuple[str, str, str]:
    interval = f"{100 * value.low:.1f}–{100 * value.high:.1f}%"
    return str(value.asked), f"{100 * value.accuracy:.1f}%", interval


def _pair_cells(first: Score, second: Score, found: Difference) -> tuple[str, ...]:
    return (
        str(first.asked),
        f"{100 * first.accuracy:.1f}%",
        f"{100 * second.accuracy:.1f}%",
        f"{100 * found.mean:+.1f}",
        f"{100 * found.low:+.1f} to {100 * found.high:+.1f}",
    )

"""``mobilevlm tune``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mobilevlm.cli import show_json
from mobilevlm.cli.options import engine_option, max_memory_option
from mobilevlm.console import progress

if TYPE_CHECKING:
    from mobilevlm.runtime.tuning.plan_file import TunedPlan


EXAMPLES = """\b
Examples:
  mobilevlm tune bundle/ --budget 2m
  mobilevlm tune bundle/ --max-memory 512MB
"""


def _seconds(context: Any, option: Any, value: str) -> float:
    """``60s`` or ``2m`` as seconds."""
    number = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m)?", value)
    if number is None or float(number[1]) <= 0:
        raise click.BadParameter(f"{value!r}: expected a time, as in 60s or 2m")
    return float(number[1]) * (60 if number[2] == "m" else 1)


@click.command("tune", epilog=EXAMPLES)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--budget",
    callback=_seconds,
    default="60s",
    show_default=True,
    metavar="TIME",
    help="Time to measure for; a measurement under way is finished.",
)
@engine_option("Measure this one only.")
@max_memory_option("The most that may be resident: what needs more is not tried.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    bundle: Path, budget: float, engine: str, max_memory_mb: float | None, as_json: bool
) -> None:
    """Find the fastest settings for BUNDLE on this machine and keep them in its plan.json.

    run, chat, bench and eval use them from then on; their options win, --no-plan does without.
    """  # fmt: skip
    progress.enable()
    from mobilevlm.plain_types import to_dict
    from mobilevlm.runtime.tuning.tune import tune_bundle

    with progress.track_share("tuning") as show:
        tuned, path = tune_bundle(bundle, budget, engine, show, max_memory_mb)
    if as_json:
        show_json(to_dict(tuned))
        return
    show_plan(tuned)
    print(f"written to {path}")


def show_plan(tuned: TunedPlan) -> None:
    """Print the plan that was chosen and the measurements behind it."""
    from mobilevlm.console.tables import Column, Table, show

    table = Table((Column("question"), Column("candidate"), Column("ms", True, True), Column("")))
    last = ""
    for item in tuned.candidates:
        question = "" if item.question == last else item.question
        last = item.question
        mark = "chosen" if item.chosen else ""
        table.add(question, item.label, f"{1e3 * item.seconds:.1f}", mark)
    show(table)
    for plan in tuned.plans:
        print(plan.describe())
    spent = f"{tuned.spent_seconds:.0f} s of {tuned.budget_seconds:.0f} s"
    print(spent if tuned.complete else f"{spent}: the budget did not suffice for all questions")

"""``mobilevlm eval``."""

from __future__ import annotations

import click

from mobilevlm.cli import show_json
from mobilevlm.cli.options import ModelOptions, model_options
from mobilevlm.console import progress


@click.command(
    "eval", epilog="\b\nExample:\n  mobilevlm eval bundle/ --suite scenes --questions 200"
)
@model_options
@click.option("--suite", type=click.Choice(["scenes"]), default="scenes", show_default=True)
@click.option(
    "--questions",
    type=click.IntRange(12),
    default=2000,
    show_default=True,
    help="How many, spread over all kinds.",
)
@click.option(
    "--no-blind", is_flag=True, help="Do not ask again with noise for pictures (twice as fast)."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    model: ModelOptions,
    suite: str,
    questions: int,
    no_blind: bool,
    as_json: bool,
) -> None:
    """Measure how many questions about drawn scenes BUNDLE answers right, per kind of question with
    95% intervals, beside the same questions with noise for pictures."""
    progress.enable()
    from mobilevlm.nano.evaluate import evaluate_vlm, table
    from mobilevlm.nano.suite import evaluation_set

    examples = evaluation_set(questions)
    with model.open() as vlm, progress.track_share("questions") as show:
        result, rate = evaluate_vlm(vlm, examples, not no_blind, show)
    if as_json:
        show_json({**result.to_dict(), "tokens_per_second": rate})
        return
    from mobilevlm.console.tables import show as show_table

    show_table(table(result, title=f"{suite}: {vlm.spec.name}"))
    print(f"{rate:.1f} tokens/s")

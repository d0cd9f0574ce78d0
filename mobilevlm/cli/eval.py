"""``mobilevlm eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mobilevlm import progress
from mobilevlm.cli import show_json
from mobilevlm.cli.options import model_options

if TYPE_CHECKING:
    from PIL import Image

LONGEST_ANSWER = 24
"""Tokens; the longest true answers of the suite take fewer."""


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
    bundle: Path,
    mmproj: Path | None,
    engine: str,
    threads: int | None,
    suite: str,
    questions: int,
    no_blind: bool,
    as_json: bool,
) -> None:
    """Measure how many questions about drawn scenes BUNDLE answers right, per kind of question with
    95% intervals, beside the same questions with noise for pictures."""
    progress.enable()
    from mobilevlm.nano.evaluate import evaluate, table
    from mobilevlm.nano.suite import evaluation_set
    from mobilevlm.runtime import load

    examples = evaluation_set(questions)
    with load(bundle, engine, threads, mmproj) as vlm, progress.track_share("questions") as show:
        tokens, seconds = 0, 0.0

        def answer(prompt: str, pictures: list[Image.Image]) -> str:
            nonlocal tokens, seconds
            said = vlm.generate(prompt, pictures, max_new_tokens=LONGEST_ANSWER)
            tokens += len(said.token_seconds)
            seconds += sum(said.token_seconds)
            return said.text

        result = evaluate(answer, examples, not no_blind, show)
        rate = tokens / seconds if seconds else 0.0
    if as_json:
        show_json({**result.to_dict(), "tokens_per_second": rate})
        return
    from rich.console import Console

    console = Console()
    console.print(table(result, title=f"{suite}: {vlm.spec.name}"))
    console.print(f"{rate:.1f} tokens/s")

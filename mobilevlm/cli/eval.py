"""``mobilevlm eval``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mobilevlm.cli import show_json
from mobilevlm.cli.options import F, ModelOptions, html_option, model_options
from mobilevlm.console import progress

if TYPE_CHECKING:
    from mobilevlm.runtime.suites.evaluate import Evaluation
    from mobilevlm.runtime.suites.question import Question, Suite

SUITES = (
    *(
        "scenes",
        "mmmu",
        "mmmu-pro",
        "cmmmu",
        "tmmlu+",
        "pope",
        "mme",
        "scienceqa",
        "mmbench",
        "seed",
    ),
    *("vqav2", "textvqa", "gqa", "chartqa", "docvqa", "ocrbench"),
)
"""Names of ``mobilevlm.runtime.suites.registry``, and the built-in questions."""
EXAMPLES = """\b
Examples:
  mobilevlm eval bundle/ --questions 200
  mobilevlm eval bundle/ --suite pope --data POPE/ --limit 500
  mobilevlm eval float/ int4/ --suite mmbench --data mmbench_dev_en.tsv --max-drop 1.0
"""


@dataclass(frozen=True)
class Task:
    """Options of the command: what is asked, and what becomes of the answers."""

    pair: bool
    """True with a second bundle"""
    name: str
    data: Path | None
    split: str | None
    limit: int | None
    shots: int
    answers: Path | None
    max_drop: float | None
    questions: int | None
    no_blind: bool
    html: Path | None


def suite_options(questions: int) -> Callable[[F], F]:
    """Options for the questions that are asked; ``questions``: number of those about scenes."""

    def decorate(function: F) -> F:
        for option in (
            click.option("--questions", type=click.IntRange(12),
                         help=f"Number of questions about scenes.  [default: {questions}]"),
            click.option("--answers", type=click.Path(path_type=Path, file_okay=False),
                         metavar="DIR",
                         help="Keep answers here as JSON lines: 'mobilevlm eval' and 'report' go "
                         "on where one of them was stopped."),
            click.option("--shots", type=click.IntRange(0), default=0, metavar="N",
                         help="Examples before each question, as earlier turns, where the suite "
                         "has some (mmmu, cmmmu, tmmlu+, scienceqa, textvqa)."),
            click.option("--limit", type=click.IntRange(1), metavar="N",
                         help="Number of questions, spread over the data."),
            click.option("--split",
                         help="Part of the data.  [default: the one that papers report]"),
            click.option("--data", type=click.Path(path_type=Path), metavar="DIR|FILE",
                         help="Files of the suite: parquet as the hub has them, JSON, JSONL, TSV "
                         "or CSV. Nothing is downloaded; docs/how-to/evaluation.md tells where "
                         "they come from."),
            click.option("--suite", "name", type=click.Choice(SUITES), default="scenes",
                         show_default=True),
        ):  # fmt: skip
            function = option(function)
        return function

    return decorate


@click.command("eval", epilog=EXAMPLES)
@model_options
@click.argument("other", required=False, type=click.Path(path_type=Path))
@suite_options(2000)
@click.option(
    "--max-drop",
    type=click.FloatRange(0),
    metavar="POINTS",
    help="Fail with exit code 1 if OTHER scores lower than BUNDLE by more.",
)
@click.option(
    "--no-blind", is_flag=True, help="Do not ask again with noise for images (twice as fast)."
)
@html_option("Write a report with the images of wrong answers, or of those that differ.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(model: ModelOptions, other: Path | None, as_json: bool, **options: Any) -> None:
    """Measure how many questions BUNDLE answers right, per kind of question with 95% intervals.
    With OTHER, a second bundle, both answer the same questions, and the difference is shown with
    its interval. Without --suite the questions are about drawn scenes; one bundle's are asked again
    with noise for images."""
    task = Task(pair=other is not None, **options)
    check_usage(task)
    progress.enable()
    if task.name == "scenes" and other is None:
        _scenes(model, task.questions or 2000, task.no_blind, as_json)
        return
    from mobilevlm.page import check_page_target
    from mobilevlm.runtime.suites.report import write_report

    if task.html is not None:
        check_page_target(task.html)
    suite, asked = read_task(task)
    first = evaluation(model, suite, asked, task.answers)
    bundles = [first]
    if other is not None:
        bundles.append(evaluation(replace(model, bundle=other), suite, asked, task.answers))
    if task.html is not None:
        write_report(task.html, bundles)
        progress.say(f"report      {task.html}")
    if other is None:
        _show_one(first, as_json)
        return
    first, second = bundles
    _show_two(first, second, task.max_drop, as_json)


def read_task(task: Task) -> tuple[Suite, list[Question]]:
    """Return the suite and its questions."""
    from mobilevlm.runtime.suites.evaluate import read_questions
    from mobilevlm.runtime.suites.registry import find_suite
    from mobilevlm.runtime.suites.scenes import scenes_suite

    scenes = task.name == "scenes"
    suite = scenes_suite(task.questions or 2000) if scenes else find_suite(task.name)
    data = task.data or Path()
    return suite, read_questions(suite, data, task.limit, task.split, task.shots)


def check_usage(task: Task) -> None:
    """Raise click.UsageError for options that do not go together."""
    if task.name == "scenes":
        if task.data or task.split or task.limit or task.shots:
            raise click.UsageError("--data, --split, --limit and --shots go with another --suite")
        if task.answers and not task.pair:
            raise click.UsageError("--answers goes with another --suite, or with two bundles")
        if task.html and not task.pair:
            raise click.UsageError("--html goes with another --suite, or with two bundles")
    elif task.data is None:
        raise click.UsageError(
            f"--suite {task.name} needs --data: the folder or file of its questions"
        )
    elif task.questions or task.no_blind:
        raise click.UsageError("--questions and --no-blind go with --suite scenes: use --limit")
    if not task.pair and task.max_drop is not None:
        raise click.UsageError("--max-drop goes with two bundles")
    if task.pair and task.no_blind:
        raise click.UsageError("--no-blind goes with one bundle")


def _scenes(model: ModelOptions, questions: int, no_blind: bool, as_json: bool) -> None:
    from mobilevlm.nano.evaluate import evaluate_vlm, table
    from mobilevlm.nano.suite import evaluation_set

    examples = evaluation_set(questions)
    progress.step(f"questions   {len(examples)} about scenes")
    with model.open() as vlm, progress.track_share("questions") as show:
        result, rate = evaluate_vlm(vlm, examples, not no_blind, show)
    if as_json:
        show_json({**result.to_dict(), "tokens_per_second": rate})
        return
    from mobilevlm.console.tables import show as show_table

    show_table(table(result, title=f"scenes: {vlm.spec.name}"))
    print(f"{rate:.1f} tokens/s")


def evaluation(
    model: ModelOptions, suite: Suite, questions: Sequence[Question], answers: Path | None
) -> Evaluation:
    """Return a bundle's answers; say how many questions could not be asked."""
    from mobilevlm.runtime.suites.evaluate import evaluate

    settings = {"max_tiles": model.max_tiles, "max_image_tokens": model.max_image_tokens}
    if model.image_tokens is not None:  # answers of versions without it go on
        settings["image_tokens"] = model.image_tokens
    progress.step(f"questions   {len(questions)} of {suite.name}, bundle {model.bundle}")
    with model.open() as vlm, progress.track_share("questions") as show:
        found = evaluate(vlm, suite, questions, answers, settings, show)
    if found.failed:
        first = found.failed[0]
        progress.say(
            f"{len(found.failed)} of {len(questions)} questions could not be asked and count as "
            f"wrong, the first one: {first.question.id}: {first.error}"
        )
    return found


def _show_one(found: Evaluation, as_json: bool) -> None:
    if as_json:
        show_json(found.to_dict())
        return
    from mobilevlm.console.tables import show as show_table
    from mobilevlm.runtime.suites.tables import result_table

    show_table(result_table(found))
    print(f"{found.tokens_per_second:.1f} tokens/s")


def _show_two(first: Evaluation, second: Evaluation, max_drop: float | None, as_json: bool) -> None:
    from mobilevlm.console.tables import say
    from mobilevlm.console.tables import show as show_table
    from mobilevlm.errors import QualityError
    from mobilevlm.runtime.suites.evaluate import compare
    from mobilevlm.runtime.suites.tables import comparison_table, difference_line

    found = compare(first, second)
    missed = max_drop is not None and -100 * found.mean > max_drop
    if as_json:
        bundles = [first.to_dict(), second.to_dict()]
        gate = {"max_drop": max_drop, "passed": None if max_drop is None else not missed}
        show_json({"suite": first.suite.name, "bundles": bundles, "difference": asdict(found),
                   **gate})  # fmt: skip
    else:
        show_table(comparison_table(first, second))
        say(difference_line(found))
    if missed:
        raise QualityError(
            f"{second.bundle}: {-100 * found.mean:.2f} points below {first.bundle} on "
            f"{first.suite.name}, --max-drop allows {max_drop:g} (95% interval of the drop "
            f"{-100 * found.high:+.2f} to {-100 * found.low:+.2f})"
        )

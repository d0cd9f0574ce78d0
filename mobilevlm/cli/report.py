"""``mobilevlm report``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from mobilevlm.cli import show_json
from mobilevlm.cli.eval import Task, check_usage, evaluation, read_task, suite_options
from mobilevlm.cli.options import ModelOptions, format_options, html_option, model_options
from mobilevlm.console import progress
from mobilevlm.errors import BundleError

EXAMPLES = """\b
Examples:
  mobilevlm report bundle/ --suite pope --data POPE/ --limit 500 --html report.html
  mobilevlm report float/ int8/ int4/ --suite chartqa --data ChartQA/ --format md
"""


@click.command("report", epilog=EXAMPLES)
@model_options
@click.argument("others", nargs=-1, type=click.Path(path_type=Path))
@suite_options(500)
@click.option(
    "--runs", type=click.IntRange(1), default=5, show_default=True, help="Runs of the bench."
)
@click.option("--new-tokens", type=click.IntRange(2), default=64, show_default=True)
@click.option("--text-tokens", type=click.IntRange(1), default=56, show_default=True)
@html_option("Write a page with the table and plots.")
@format_options
def command(
    model: ModelOptions,
    others: tuple[Path, ...],
    runs: int,
    new_tokens: int,
    text_tokens: int,
    html: Path | None,
    form: str,
    **options: Any,
) -> None:
    """Show score, time to first token, tokens/s, memory and energy of BUNDLE and OTHERS on this
    machine, a line each. All answer the same questions of a suite; speed is measured as by
    'mobilevlm bench', each bundle in a process of its own."""
    task = Task(pair=True, max_drop=None, no_blind=False, html=html, **options)
    check_usage(task)
    if task.name == "scenes" and task.questions is None:
        task = replace(task, questions=500)
    progress.enable()
    from mobilevlm.page import check_page_target
    from mobilevlm.runtime.builtin_bundle import bundle_path
    from mobilevlm.runtime.suites.artifact_page import write_artifact_page
    from mobilevlm.runtime.suites.artifacts import (
        Artifact,
        artifact_table,
        as_markdown,
        described,
        measure_bench,
    )

    if html is not None:
        check_page_target(html)
    for bundle in others:
        if not bundle_path(bundle, model.engine).exists():
            raise BundleError(f"{bundle}: no such bundle")
    suite, asked = read_task(task)
    words = [*model.words(), f"--runs={runs}", f"--new-tokens={new_tokens}",
               f"--text-tokens={text_tokens}"]  # fmt: skip
    words += [f"--mmproj={model.mmproj}"] if model.mmproj else []
    words += [] if any(question.images for question in asked) else ["--no-image"]
    artifacts = []
    for bundle in (model.bundle, *others):
        progress.say(f"bundle      {bundle}")
        found = evaluation(replace(model, bundle=bundle), suite, asked, task.answers)
        name_shown = bundle.name or str(bundle)
        artifacts.append(Artifact(name_shown, found, measure_bench(bundle, words)))
    if html is not None:
        write_artifact_page(html, artifacts)
        progress.say(f"report      {html}")
    if form == "json":
        show_json({"suite": suite.name, "artifacts": [found.to_dict() for found in artifacts]})
    elif form == "md":
        print(as_markdown(artifacts))
    else:
        from mobilevlm.console.tables import say, show

        show(artifact_table(artifacts))
        for line in described(artifacts):
            say(line)

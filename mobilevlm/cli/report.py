"""``mobilevlm report``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from mobilevlm.cli import show_json
from mobilevlm.cli.eval import SUITES, Task, check_usage, evaluation, read_task
from mobilevlm.cli.options import ModelOptions, model_options
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
@click.option("--suite", "name", type=click.Choice(SUITES), default="scenes", show_default=True)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    metavar="DIR|FILE",
    help="Files of the suite; docs/how-to/evaluation.md tells where they come from.",
)
@click.option("--split", help="Part of the data.  [default: the one that papers report]")
@click.option(
    "--limit",
    type=click.IntRange(1),
    metavar="N",
    help="Number of questions, spread over the data.",
)
@click.option(
    "--shots", type=click.IntRange(0), default=0, metavar="N", help="Examples before each question."
)
@click.option(
    "--answers",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Keep answers here, as 'mobilevlm eval' does; its answers are used too.",
)
@click.option(
    "--questions", type=click.IntRange(12), help="Number of questions about scenes.  [default: 500]"
)
@click.option(
    "--runs", type=click.IntRange(1), default=5, show_default=True, help="Runs of the bench."
)
@click.option("--new-tokens", type=click.IntRange(2), default=64, show_default=True)
@click.option("--text-tokens", type=click.IntRange(1), default=56, show_default=True)
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write a page with the table and plots.",
)
@click.option(
    "--format", "form", type=click.Choice(["table", "md", "json"]), default="table",
    show_default=True,
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
def command(
    model: ModelOptions,
    others: tuple[Path, ...],
    name: str,
    data: Path | None,
    split: str | None,
    limit: int | None,
    shots: int,
    answers: Path | None,
    questions: int | None,
    runs: int,
    new_tokens: int,
    text_tokens: int,
    html: Path | None,
    form: str,
    as_json: bool,
) -> None:
    """Show score, time to first token, tokens/s, memory and energy of BUNDLE and OTHERS on this
    machine, a line each. All answer the same questions of a suite; speed is measured as by
    'mobilevlm bench', each bundle in a process of its own."""
    task = Task(
        pair=True, name=name, data=data, split=split, limit=limit, shots=shots, answers=answers,
        max_drop=None, questions=questions or (500 if name == "scenes" else None), no_blind=False,
        html=html,
    )  # fmt: skip
    check_usage(task)
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
    options = [*model.words(), f"--runs={runs}", f"--new-tokens={new_tokens}",
               f"--text-tokens={text_tokens}"]  # fmt: skip
    options += [f"--mmproj={model.mmproj}"] if model.mmproj else []
    options += [] if any(question.images for question in asked) else ["--no-image"]
    artifacts = []
    for bundle in (model.bundle, *others):
        progress.say(f"bundle      {bundle}")
        found = evaluation(replace(model, bundle=bundle), suite, asked, answers)
        name_shown = bundle.name or str(bundle)
        artifacts.append(Artifact(name_shown, found, measure_bench(bundle, options)))
    if html is not None:
        write_artifact_page(html, artifacts)
        progress.say(f"report      {html}")
    if as_json or form == "json":
        show_json({"suite": suite.name, "artifacts": [found.to_dict() for found in artifacts]})
    elif form == "md":
        print(as_markdown(artifacts))
    else:
        from mobilevlm.console.tables import say, show

        show(artifact_table(artifacts))
        for line in described(artifacts):
            say(line)

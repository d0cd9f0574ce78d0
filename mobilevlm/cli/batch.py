"""``mobilevlm batch``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mobilevlm.cli.options import (
    ModelOptions,
    model_options,
    output_option,
    plain_text_option,
    sampling_options,
)
from mobilevlm.cli.text_input import given_text, structure_options, system_option
from mobilevlm.console import progress

if TYPE_CHECKING:
    from mobilevlm.runtime.batch.batch import Batch, Done

EXAMPLES = """\b
Examples:
  mobilevlm batch bundle/ photos/ -o answers.jsonl -p "What is in the image?"
  mobilevlm batch bundle/ rows.jsonl -o answers.jsonl -p "Is there a {thing} in {image}?" --id key
  mobilevlm batch bundle/ test.parquet -o answers.parquet -p "{question}" -n 16
  mobilevlm batch bundle/ photos/ -o tags.jsonl -p "Describe {image}." --json-schema tags.json
"""


@click.command("batch", epilog=EXAMPLES)
@model_options
@click.argument("source", type=click.Path(path_type=Path), metavar="INPUT")
@output_option(
    "output",
    "Answers: a .jsonl or a .parquet file ([batch] extra). Beside it OUTPUT.journal keeps what is "
    "done until all is.",
    metavar="OUTPUT",
)
@click.option(
    "-p",
    "--prompt",
    required=True,
    metavar="TEXT",
    help="Question about each row: {column} stands for the row's text there, or for its image, "
    "{{ for a brace. @FILE reads it from a file.",
)
@click.option(
    "--image-column",
    "image_columns",
    multiple=True,
    metavar="NAME",
    help="Column of images: paths from INPUT's folder on, data: URIs, bytes, or lists of them; "
    "repeat for more. Default: image.",
)
@click.option(
    "--id", "id_column", metavar="NAME", help="Column of the rows' ids. Default: their numbers."
)
@click.option(
    "--processes",
    type=click.IntRange(1),
    metavar="N",
    help="Rows to answer at a time. Default: as many as cores and memory allow.",
)
@click.option(
    "--ray",
    metavar="ADDRESS",
    help="Answer on the nodes of a Ray cluster ([ray] extra): HOST:PORT, or auto on one of its "
    "nodes. --processes and --threads are those of each node.",
)
@click.option(
    "--ordered/--no-ordered",
    default=True,
    show_default=True,
    help="Rows as in INPUT, or in the order in which they were done.",
)
@click.option(
    "--restart", is_flag=True, help="Forget OUTPUT and what an interrupted run left of it."
)
@click.option("--fail-on-error", is_flag=True, help="Exit with 1 if a row has an error.")
@click.option("--logprobs", is_flag=True, help="Give the log probability of each token.")
@click.option(
    "--top-logprobs",
    type=click.IntRange(0, 20),
    default=0,
    metavar="N",
    help="Likeliest tokens beside each, with --logprobs.",
)
@system_option
@plain_text_option
@structure_options
@sampling_options
def command(
    model: ModelOptions,
    source: Path,
    output: Path,
    prompt: str,
    image_columns: tuple[str, ...],
    id_column: str | None,
    processes: int | None,
    ray: str | None,
    ordered: bool,
    restart: bool,
    fail_on_error: bool,
    **options: Any,
) -> None:
    """Ask the model in BUNDLE about each row of INPUT: a folder of images, a .jsonl or a .parquet
    file. An interrupted run goes on where it was by the same command."""
    if options["top_logprobs"] and not options["logprobs"]:
        raise click.UsageError("--top-logprobs belongs to --logprobs: give both")
    progress.enable()
    from mobilevlm.runtime.batch.answers import Questions
    from mobilevlm.runtime.batch.batch import Batch
    from mobilevlm.runtime.batch.rows import open_input
    from mobilevlm.runtime.batch.template import check_column, read_template

    text = given_text("--prompt", prompt)
    rows = open_input(source)
    template = read_template(text, rows.columns, image_columns or None)
    if template.places_images and not options["special_tokens"]:
        raise click.UsageError("--plain-text takes no image's place in --prompt: leave one out")
    if id_column is not None:
        check_column("--id", id_column, rows.columns)
    questions = Questions(template, rows.folder, options, id_column)  # type: ignore[arg-type]
    batch = Batch(rows, output, questions, vars(model), processes, ordered, restart, ray)
    done = _run(batch)
    told = f"{done.rows} rows, {done.errors} with an error"
    if done.cut:
        told += f", {done.cut} cut at the longest answer"
    progress.say(f"{told}: {output}")
    if done.errors and fail_on_error:
        sys.exit(1)


def _run(batch: Batch) -> Done:
    from mobilevlm.runtime.batch.batch import run_batch

    try:
        return run_batch(batch)
    except KeyboardInterrupt:
        said = [word for word in sys.argv[1:] if word != "--restart"]
        progress.say(f"stopped: {shlex.join(['mobilevlm', *said])} goes on where it was")
        raise

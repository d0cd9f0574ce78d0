"""``mobilevlm export-matrix``."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import click

from mobilevlm.cli import show_json
from mobilevlm.console import progress

EXAMPLES = """\b
Examples:
  mobilevlm export-matrix matrix.toml > results.md
  mobilevlm export-matrix matrix.toml --ray auto --json

\b
matrix.toml:
  checkpoints = ["MobileVLM_V2-1.7B", "SmolVLM2-500M"]
  recipes = ["int8", "int4", "mixed.toml"]
  bench = ["--runs", "3"]
"""


@click.command("export-matrix", epilog=EXAMPLES)
@click.argument("spec", type=click.Path(path_type=Path), metavar="SPEC.toml")
@click.option(
    "--ray",
    metavar="ADDRESS",
    help="Run the jobs on the nodes of a Ray cluster ([ray] extra): HOST:PORT, or auto on one of "
    "its nodes. Checkpoints and output are on storage that all nodes have under one path.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def command(spec: Path, ray: str | None, as_json: bool, quiet: bool) -> None:
    """Export each checkpoint of SPEC.toml by each recipe or for each target, verify and measure the
    bundles, and print a table in Markdown. The same command goes on where it was stopped and tries
    again what failed. Exit code 1 if a job failed."""
    progress.enable(not quiet)
    from mobilevlm.export.matrix import run_matrix, table_lines

    rows = run_matrix(spec, ray)
    if as_json:
        show_json({"rows": [asdict(row) for row in rows]})
    else:
        click.echo("\n".join(table_lines(rows)))
    if any(row.error for row in rows):
        sys.exit(1)

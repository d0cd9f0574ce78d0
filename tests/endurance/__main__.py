"""Command line of the long runs."""

from __future__ import annotations

import shutil

import click

from endurance import first_use, kills, replaced
from endurance.processes import own_cache


def _import_all() -> None:
    """Import modules once, so that child processes need not do it."""
    import mobilevlm.export.graph.author
    import mobilevlm.export.pipeline
    import mobilevlm.runtime.engines.onnx.engine  # noqa: F401


@click.command(help=__doc__)
@click.argument("what", type=click.Choice(["kills", "replaced", "first-use"]))
@click.option("--count", type=int, required=True, help="Kills, exports, or empty caches.")
@click.option("--loads", type=int, default=1000, show_default=True, help="Beside exports.")
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--two-renames", is_flag=True, help="As on a system without an exchange.")
def main(what: str, count: int, loads: int, seed: int, two_renames: bool) -> None:
    _import_all()
    folder = first_use.folder()
    own_cache()
    if what == "kills":
        click.echo(kills.run(folder, count, seed))
    elif what == "replaced":
        click.echo(replaced.run(folder, count, loads, not two_renames))
    else:
        click.echo(f"{first_use.run(count)} answers")
    shutil.rmtree(folder)


main()

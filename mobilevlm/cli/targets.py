"""``mobilevlm targets``."""

from __future__ import annotations

import click

from mobilevlm.cli import show_json
from mobilevlm.errors import require


@click.command("targets")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool) -> None:
    """List the devices that 'mobilevlm export --target NAME' exports for: artifacts, memory, and
    what the export proves on this machine."""
    try:
        from mobilevlm.export.targets import find_target, target_names
    except ImportError as error:
        raise require(error.name or "numpy", "export", "listing targets") from None
    from mobilevlm.plain_types import to_dict

    targets = [find_target(name) for name in target_names()]
    if as_json:
        found = {item.name: {**to_dict(item), "verified": item.verified} for item in targets}
        show_json({"targets": found})
        return
    from mobilevlm.console.tables import Column, Table, show

    table = Table(
        (
            Column("target", whole=True),
            Column("device"),
            Column("artifacts"),
            Column("recipe", whole=True),
            Column("memory", whole=True, right=True),
            Column("verified here"),
        )
    )
    for item in targets:
        memory = f"{item.memory_mb:.0f} MB"
        kinds = ", ".join((*item.formats, *(["HTP binary"] if item.htp else [])))
        table.add(item.name, item.description, kinds, item.recipe, memory, item.verified)
    show(table)

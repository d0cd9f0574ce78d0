"""``mobilevlm doctor``."""

from __future__ import annotations

import click

from mobilevlm.cli import show_json


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool) -> None:
    """Show what this machine can run: processor features, memory, providers, installed extras."""
    from mobilevlm.runtime.machine import describe_machine, installed_extras
    from mobilevlm.runtime.memory_limits import memory_limits

    machine, extras, limits = describe_machine(), installed_extras(), memory_limits()
    if as_json:
        found = [{"kind": item.kind, "bytes": item.size, "where": item.where} for item in limits]
        show_json({"machine": machine, "memory_limits": found, "extras": extras})
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in machine.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        table.add_row(key.replace("_", " "), shown or "none")
    for limit in limits:
        table.add_row("memory limit", f"{limit.size / 1e6:.0f} MB ({limit.kind}: {limit.where})")
    for extra, missing in extras.items():
        remedy = f"missing {', '.join(missing)}: pip install 'mobilevlm-edge[{extra}]'"
        table.add_row(f"extra {extra}", escape(remedy) if missing else "installed")
    Console().print(table)

"""``mobilevlm doctor``."""

from __future__ import annotations

from dataclasses import asdict

import click

from mobilevlm.cli import show_json


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool) -> None:
    """Show what this machine can run: processor features, memory, providers, installed extras."""
    from mobilevlm.control_groups import processor_limits
    from mobilevlm.runtime.machine import describe_machine, installed_extras
    from mobilevlm.runtime.memory.limits import memory_limits

    machine, extras, limits = describe_machine(), installed_extras(), memory_limits()
    if as_json:
        found = [{"kind": item.kind, "bytes": item.size, "where": item.where} for item in limits]
        show_json(
            {
                "machine": machine,
                "processor_limits": [asdict(item) for item in processor_limits()],
                "memory_limits": found,
                "extras": extras,
            }
        )
        return
    from mobilevlm.console.tables import Column, Styled, Table, show

    table = Table((Column("", whole=True), Column("")))
    for key, value in machine.items():
        if value is not None:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            table.add(Styled(key.replace("_", " "), "bold"), shown or "none")
    for quota in processor_limits():
        shown = f"{quota.processors:g} (threads: {quota.threads}; cgroup: {quota.where})"
        table.add(Styled("processor limit", "bold"), shown)
    for limit in limits:
        size = f"{limit.size / 1e6:.0f} MB ({limit.kind}: {limit.where})"
        table.add(Styled("memory limit", "bold"), size)
    for extra, missing in extras.items():
        remedy = f"missing {', '.join(missing)}: pip install 'mobilevlm-edge[{extra}]'"
        table.add(Styled(f"extra {extra}", "bold"), remedy if missing else "installed")
    show(table)

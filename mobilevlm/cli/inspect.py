"""``mobilevlm inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mobilevlm.cli import show_json

if TYPE_CHECKING:
    from rich.table import Table


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--vision-tower",
    type=click.Path(path_type=Path),
    help="Folder of the CLIP tower of a checkpoint.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(path: Path, vision_tower: Path | None, as_json: bool) -> None:
    """Show what is in PATH, a bundle (every file is checked) or a checkpoint."""
    from mobilevlm.bundle import is_bundle

    if (path / "config.json").is_file() and not is_bundle(path):
        _show_checkpoint(path, vision_tower, as_json)
    else:
        _show_bundle(path, as_json)


def _show_bundle(path: Path, as_json: bool) -> None:
    from rich.console import Console

    from mobilevlm.bundle import open_bundle
    from mobilevlm.spec import to_dict

    bundle = open_bundle(path)
    manifest = bundle.manifest
    if as_json:
        show_json(to_dict(manifest))
        return
    console = Console()
    console.print(_spec_table(to_dict(manifest.spec)))
    table = _table("stage", "artifact", "precision", "MB", "largest weight error")
    for artifact in manifest.artifacts:
        size = sum(manifest.files[file].size for file in artifact.files)
        worst = artifact.largest_weight_error
        error = f"{worst.relative_error:.2%} {worst.tensor}" if worst else ""
        table.add_row(artifact.stage, artifact.path, artifact.precision, f"{size / 1e6:.1f}", error)
    console.print(table)
    total = sum(entry.size for entry in manifest.files.values())
    console.print(f"recipe {manifest.recipe['name']}, {total / 1e6:.1f} MB in all")
    if not manifest.quality.measured:
        console.print(f"quality not measured: {manifest.quality.note}")
        return
    quality = _table("stage", "figure", "value")
    for name, measured in manifest.quality.stages.items():
        for figure, value in measured.figures.items():
            quality.add_row(name, figure, f"{value:.4g}")
    console.print(quality)


def _show_checkpoint(path: Path, vision_tower: Path | None, as_json: bool) -> None:
    from rich.console import Console

    from mobilevlm.families import OpenOptions, open_checkpoint
    from mobilevlm.spec import to_dict

    model = open_checkpoint(path, OpenOptions(vision_tower))
    sizes = {
        stage: sum(model.weights.size(name) for name in model.weights if name.startswith(stage))
        for stage in ("vision", "projector", "decoder")
    }
    if as_json:
        show_json({"spec": to_dict(model.spec), "parameters": sizes})
        return
    console = Console()
    console.print(_spec_table(to_dict(model.spec)))
    table = _table("part", "parameters")
    for part, size in {**sizes, "total": sum(sizes.values())}.items():
        table.add_row(part, f"{size / 1e6:.1f} M")
    console.print(table)


def _spec_table(spec: dict[str, Any]) -> Table:
    """Each part of the spec in a row; the chat template is left out."""
    table = _table("part", "settings")
    table.add_row("model", f"{spec['name']} (family {spec['family']})")
    for part in ("image", "vision", "projector", "decoder"):
        table.add_row(part, ", ".join(f"{key} {value}" for key, value in spec[part].items()))
    return table


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table

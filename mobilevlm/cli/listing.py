"""``mobilevlm list``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from mobilevlm.cli import show_json
from mobilevlm.errors import BundleError


@dataclass(frozen=True)
class Found:
    """A model on this machine."""

    name: str
    """As commands take it"""
    kind: str
    """``built-in``, ``cached checkpoint`` or ``bundle``"""
    detail: str
    """Family of a checkpoint, recipe of a bundle, or what is wrong with it"""
    megabytes: float


@click.command("list")
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path), metavar="[FOLDER]...")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(folders: tuple[Path, ...], as_json: bool) -> None:
    """List models on this machine: those that are built in, checkpoints in the local cache of the
    Hugging Face hub whose family is known, and bundles in each FOLDER (default: this one)."""
    found = [*_built_in(), *_cached(), *_bundles(folders or (Path(),))]
    if as_json:
        show_json({"models": [asdict(one) for one in found]})
        return
    from mobilevlm.console.tables import Column, Table, show

    table = Table(
        (
            Column("model", whole=True),
            Column("what it is"),
            Column("family or recipe"),
            Column("MB", whole=True, right=True),
        )
    )
    for one in found:
        table.add(one.name, one.kind, one.detail, f"{one.megabytes:.1f}")
    show(table)


def _built_in() -> Iterator[Found]:
    from mobilevlm.builtin import BUILT_IN, WEIGHTS
    from mobilevlm.families import family_name

    for name in BUILT_IN:
        folder = WEIGHTS / name
        yield Found(name, "built-in", family_name(folder) or "", _size(folder))


def _cached() -> Iterator[Found]:
    from mobilevlm.families import family_name
    from mobilevlm.hub_cache import cached_models

    for identity, folder in cached_models():
        family = family_name(folder)
        if family is not None:
            yield Found(identity, "cached checkpoint", family, _size(folder))


def _bundles(folders: tuple[Path, ...]) -> Iterator[Found]:
    from mobilevlm.bundle import is_bundle, read_manifest

    for folder in folders:
        inside = sorted(folder.iterdir()) if folder.is_dir() else []
        for place in (folder, *inside):
            if not (place.is_dir() and is_bundle(place)):
                continue
            try:
                manifest, _ = read_manifest(place)
            except BundleError as error:
                yield Found(str(place), "bundle", str(error), _size(place))
                continue
            size = sum(entry.size for entry in manifest.files.values()) / 1e6
            told = f"{manifest.spec.family}, {manifest.recipe.name}"
            yield Found(str(place), "bundle", told, size)


def _size(folder: Path) -> float:
    """Return megabytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6

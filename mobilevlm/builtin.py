"""Models that come with the package: a name stands for a checkpoint, or for its bundle."""

from __future__ import annotations

from pathlib import Path

BUILT_IN = ("nano", "nano-moe")
"""Names of the models; each is a checkpoint folder in ``nano/weights/``."""

WEIGHTS = Path(__file__).parent / "nano" / "weights"
BUNDLES = Path(__file__).parent / "nano" / "bundles"
"""Bundles that come with the package, made by ``python -m mobilevlm.nano.training.ship``."""
RECIPE = "int4"
"""Recipe that a built-in model is exported with when it is used by its name."""


def is_built_in(given: Path) -> bool:
    """Return whether a path is the name of a built-in model; a folder of that name comes first."""
    return str(given) in BUILT_IN and not given.exists()


def checkpoint_path(given: Path) -> Path:
    """Return the checkpoint that a built-in name or the id of a cached model stands for; any other
    path as it is."""
    if is_built_in(given):
        return WEIGHTS / given
    from mobilevlm.hub_cache import find_snapshot, is_hub_id

    return (find_snapshot(given.as_posix()) if is_hub_id(given) else None) or given


def is_shipped(bundle: Path) -> bool:
    """Return whether a bundle is one of those that come with the package."""
    return bundle.parent == BUNDLES

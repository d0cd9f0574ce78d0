"""Makes the bundle of nano that comes with the package: ``python -m mobilevlm.nano.training.ship``.

Its weights have 7 bits where they meet 8-bit activations, so that it is right on every processor.
It is calibrated on drawn scenes, since other processors would draw other answers of its own.
tests/e2e/test_builtin.py compares it with a fresh export; run this again when that fails.
"""

from __future__ import annotations

from pathlib import Path

from mobilevlm.builtin import BUNDLES, RECIPE, WEIGHTS
from mobilevlm.recipe import SCENES

SHIPPED = ("nano",)


def ship(name: str, folder: Path) -> None:
    """Export a built-in model as it comes with the package."""
    from mobilevlm.export.pipeline import export

    export(WEIGHTS / name, folder, recipe=RECIPE, calibration=SCENES, measure=False, weight_bits=7)


if __name__ == "__main__":
    for shipped in SHIPPED:
        ship(shipped, BUNDLES / shipped)

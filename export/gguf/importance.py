"""Importance of weights, from a ready file or from calibration data."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mobilevlm.console import progress
from mobilevlm.errors import MobileVLMError, require
from mobilevlm.export.calibration.data import find_samples
from mobilevlm.export.calibration.stages import calibration_key
from mobilevlm.export.gguf.imatrix import ImportanceMatrix, read_imatrix
from mobilevlm.export.gguf.tensors import WEIGHABLE
from mobilevlm.model import Model
from mobilevlm.recipe import DATA_NAMES, Recipe
from mobilevlm.whole_file import file_sha256


@dataclass(frozen=True)
class Importance:
    """An importance matrix to be."""

    key: tuple[str, ...]
    """All that it depends on, as far as it can be known before."""
    load: Callable[[], ImportanceMatrix]
    """Collects it when it is first called."""


def find_importance(model: Model, recipe: Recipe) -> Importance | None:
    """Return the importance that the recipe asks for, none if it asks for none. Mistakes that show
    before the model runs are found here.

    Raises:
        BundleError, MobileVLMError, ImageError: the file or the data are wrong, or of no use for
            the recipe's type.
    """
    file, data = recipe.gguf_imatrix, recipe.gguf_calibration
    if file is None and data is None:
        return None
    if file is not None and data is not None:
        raise MobileVLMError(
            f"importance matrix {file} and calibration data {data}: leave one of them out"
        )
    if recipe.gguf_type not in WEIGHABLE:
        raise MobileVLMError(
            f"GGUF type {recipe.gguf_type} does not use an importance matrix: choose --gguf-type "
            f"{', '.join(WEIGHABLE)}, or leave --imatrix and --calibration out"
        )
    if data is not None:
        return calibrated_importance(model, data)
    path = Path(str(file))
    matrix = read_imatrix(path, model.spec.decoder)
    return Importance((file_sha256(path),), lambda: matrix)


def calibrated_importance(model: Model, data: str) -> Importance:
    """``data``: ``own``, ``scenes`` or a JSONL file.

    Raises:
        MobileVLMError, ImageError: a sample is wrong.
        MissingExtraError: a package for exporting is not installed.
    """
    try:
        from mobilevlm.export.gguf.collect import collect
    except ImportError as error:
        purpose = "collecting an importance matrix"
        raise require(error.name or "onnxscript", "export", purpose) from None
    samples = find_samples(data, model)
    name = data if data in DATA_NAMES else Path(data).name
    key = (name, *map(str, calibration_key(model, samples)))

    @cache
    def load() -> ImportanceMatrix:
        start = time.perf_counter()
        with progress.track("calibration", len(samples)) as advance:
            matrix = collect(model, samples, name, advance)
        progress.say(f"calibration {name}  {time.perf_counter() - start:.1f} s")
        return matrix

    return Importance(key, load)

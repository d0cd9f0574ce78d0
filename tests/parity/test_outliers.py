"""Activation outliers, planted where the float function stays as it is: one scale for all 8-bit
activations fails, SmoothQuant mends it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
from conftest import Fixture, relative_error
from numpy.typing import NDArray

from mobilevlm.export.calibrated import calibrate
from mobilevlm.export.calibration import scene_samples
from mobilevlm.export.graph.author import author_vision
from mobilevlm.export.quantize.folding import find_folds, fold
from mobilevlm.export.recipes import RECIPES, LinearFormat
from mobilevlm.families import Model
from mobilevlm.image import open_image, preprocess

OUTLIER = 60
"""How much larger two channels are: trained towers have factors of 50 to 100."""


def with_outliers(model: Model) -> Model:
    folds = {}
    for place in find_folds(model.spec):
        factors = np.ones(place.in_size, np.float32)
        factors[[3, 17]] = 1 / OUTLIER
        folds[place] = factors
    return replace(model, weights=fold(model.weights, folds))


def features(model: Model, tower: LinearFormat, image: Path, folder: Path) -> NDArray[np.float32]:
    recipe = replace(RECIPES["fp32"], tower=tower)
    ready = calibrate(model, recipe, scene_samples(4), "vision")
    file = folder / "vision.onnx"
    author_vision(ready.weights, model.spec, recipe, file, hessian=ready.hessian)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    pixels = preprocess(open_image(image), model.spec.image)
    found: NDArray[np.float32] = session.run(["features"], {"pixels": pixels[None]})[0][0]
    return found


def test_smoothquant_mends_what_outliers_break(mobilevlm_v2: Fixture, tmp_path: Path) -> None:
    """Measured: 0.032 without outliers; with them 0.64, and 0.042 once smoothed."""
    exact = mobilevlm_v2.arrays["vision_features"][0]
    model = with_outliers(mobilevlm_v2.model)
    errors = [
        relative_error(features(model, tower, mobilevlm_v2.image, tmp_path), exact)
        for tower in (
            LinearFormat("fp32"),
            LinearFormat("int8"),
            LinearFormat("int8", scaling="smoothquant"),
        )
    ]
    assert errors[0] < 1e-4
    assert errors[1] > 0.1
    assert errors[2] < 0.06

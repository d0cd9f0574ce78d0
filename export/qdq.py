"""The vision stage in fixed point: standard operators between QuantizeLinear and DequantizeLinear,
whose scales calibration fixed (onnxruntime.quantization)."""

from __future__ import annotations

import io
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mobilevlm import progress
from mobilevlm.checkpoint import TensorRef, Weights
from mobilevlm.errors import MobileVLMError, require
from mobilevlm.export.artifact_weights import weight_error
from mobilevlm.export.calibration import Sample
from mobilevlm.export.graph.author import author_vision, data_path
from mobilevlm.export.graph.dialects import STANDARD
from mobilevlm.export.graph.reading import OnnxTensors
from mobilevlm.export.linear_groups import linear_groups
from mobilevlm.export.quantize.gptq import HessianOf, no_hessian
from mobilevlm.export.recipes import LinearFormat, Recipe
from mobilevlm.export.written import Written
from mobilevlm.image import ImageInput, open_image, preprocess
from mobilevlm.progress import Advance, ignore
from mobilevlm.spec import ImageSpec, ModelSpec

CALIBRATORS = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}
"""As onnxruntime names them."""
_FLOAT = LinearFormat("fp32")
_INLINE_BYTES = 1024
"""Smaller tensors are kept inside the .onnx file."""


def check_onnx() -> None:
    """Raises MissingExtraError: the package that onnxruntime's quantizer needs is not installed."""
    try:
        import onnx  # noqa: F401
    except ImportError:
        raise require("onnx", "export", "a fixed-point recipe") from None


def author_qdq(
    samples: Sequence[Sample],
    weights: Weights,
    spec: ModelSpec,
    recipe: Recipe,
    path: Path,
    advance: Advance = ignore,
    hessian: HessianOf = no_hessian,
) -> Written:
    """Writes the vision stage in the tower's format, calibrated on the samples' pictures: weights
    of products with a scale per output, everything else per tensor.

    Memory: the float32 weights a few times, and the activations of one picture.

    Raises:
        MobileVLMError: no sample has a picture.
        ImageError: a picture cannot be read.
    """
    import onnx

    pictures = [picture for sample in samples for picture in sample.images]
    if not pictures:
        raise MobileVLMError("calibration: no sample has a picture, the tower needs some")
    floats = replace(recipe, tower=_FLOAT, projector=_FLOAT)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        source, fixed = Path(folder) / "float.onnx", Path(folder) / "fixed.onnx"
        author_vision(weights, spec, floats, source, advance, hessian, dialect=STANDARD)
        with progress.track("calibration", len(pictures)) as seen:
            _quantize(source, fixed, recipe.tower, _Pictures(pictures, spec.image, seen))
        model = onnx.load(fixed)
    model.producer_name, model.producer_version = "mobilevlm", ""
    location = data_path(path).name
    onnx.save_model(
        model, path, save_as_external_data=True, location=location, size_threshold=_INLINE_BYTES
    )
    return Written(_weight_errors(weights, path, spec))


class _Pictures:
    """Hands pictures to onnxruntime's calibrators (its ``CalibrationDataReader``), one at a time:
    they forget the activations of one before the next."""

    def __init__(self, pictures: Sequence[ImageInput], image: ImageSpec, seen: Advance) -> None:
        self._pictures, self._image, self._seen = pictures, image, seen
        self.set_range(0, len(pictures))

    def __len__(self) -> int:
        return len(self._pictures)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._left = iter(self._pictures[start_index:end_index])

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        picture = next(self._left, None)
        if picture is None:
            return None
        self._seen(1)
        return {"pixels": preprocess(open_image(picture), self._image)[None]}


def _quantize(source: Path, fixed: Path, layers: LinearFormat, pictures: _Pictures) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize
    from onnxruntime.quantization.quantize import get_qdq_config

    config = get_qdq_config(
        source,
        pictures,
        calibrate_method=CalibrationMethod[CALIBRATORS[layers.calibrator]],
        activation_type=QuantType.QUInt8 if layers.precision == "qdq8" else QuantType.QUInt16,
        weight_type=QuantType.QInt8,
        weight_symmetric=True,
        per_channel=True,
        reduce_range=layers.int8_weight_bits == 7,
        extra_options={"CalibStridedMinMax": 1},  # pictures at once, of all calibrators
    )
    with _silent():
        quantize(source, fixed, config)


@contextmanager
def _silent() -> Iterator[None]:
    """Keeps onnxruntime's quantizer from printing to stdout, where answers go, and from warning
    that norms have one scale."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _weight_errors(exact: Weights, path: Path, spec: ModelSpec) -> dict[str, float]:
    tensors = OnnxTensors(path, spec, exact)
    stored = Weights({name: TensorRef(tensors, name) for name in tensors.names})
    return {
        ",".join(group.names): weight_error(exact, stored, group)
        for group in linear_groups(spec)
        if not group.name.startswith("decoder.")
    }

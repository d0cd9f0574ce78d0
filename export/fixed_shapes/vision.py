"""The vision stage in fixed point: standard operators between QuantizeLinear and DequantizeLinear,
whose scales calibration fixed (onnxruntime.quantization)."""

from __future__ import annotations

import io
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mobilevlm.bundle import data_path
from mobilevlm.checkpoint import TensorRef, Weights
from mobilevlm.console import progress
from mobilevlm.console.progress import Advance, ignore
from mobilevlm.errors import MobileVLMError, require
from mobilevlm.export.calibration.samples import Sample
from mobilevlm.export.formats import Written
from mobilevlm.export.graph.author import author_encoded
from mobilevlm.export.graph.dialects import CENTRED, STANDARD
from mobilevlm.export.graph.reading import OnnxTensors
from mobilevlm.export.graph.weight_file import INLINE_BYTES
from mobilevlm.export.quantize.errors import weight_error
from mobilevlm.export.quantize.gptq import HessianOf, no_hessian
from mobilevlm.image import ImageInput
from mobilevlm.input_spec import InputSpec
from mobilevlm.linear_groups import linear_groups
from mobilevlm.preparation import prepare
from mobilevlm.prompt import Sound
from mobilevlm.recipe import CalibratorName, LinearFormat, Recipe
from mobilevlm.spec import ModelSpec

Inputs: TypeAlias = dict[str, NDArray[Any]]
Overrides: TypeAlias = dict[str, list[dict[str, Any]]]
"""By the name of a tensor, see ``TensorQuantOverrides`` of onnxruntime's quantizer."""

CALIBRATORS: dict[CalibratorName, tuple[str, dict[str, Any]]] = {
    "minmax": ("MinMaxCalibrater", {}),
    "percentile": ("PercentileCalibrater", {"num_bins": 2048, "percentile": 99.999}),
    "entropy": ("EntropyCalibrater", {"num_bins": 256, "num_quantized_bins": 128}),
}
"""Classes of onnxruntime. Its own 128 bins of entropy leave nothing to choose from: the search
begins with as many as there are quantized ones; its time grows with their cube."""
_KEPT = {"Cast", "DequantizeLinear", "QuantizeLinear"}
"""Operators that are not quantized."""
FLOAT = LinearFormat("fp32")


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
    """Writes the vision stage in the tower's format, calibrated on the samples' images: weights
    of products with a scale per output, everything else per tensor.

    Memory: the float32 weights a few times, and the activations of one image.

    Raises:
        MobileVLMError: no sample has an image.
        ImageError: an image cannot be read.
    """
    import onnx

    if spec.image.connector.array_names:
        raise MobileVLMError(
            f"a fixed-point recipe: the vision stage of {spec.name} reads text beside the image, "
            f"which has no fixed shape: use int8 for tower and projector"
        )
    shown = (image for sample in samples for image in sample.images)
    images = [image for image in shown if not isinstance(image, Sound)]
    if not images:
        raise MobileVLMError("calibration: no sample has an image, the tower needs some")
    floats = replace(recipe, tower=FLOAT, projector=FLOAT)
    dialect = STANDARD if recipe.layer_norm == "fused" else CENTRED
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        source = Path(folder) / "float.onnx"
        author_encoded(weights, spec, floats, source, advance, hessian, dialect)
        with progress.track("calibration", len(images)) as seen, silent():
            inputs = _inputs(images, spec.image, seen)
            model = float_model(source)
            ranges = watch_ranges(source, recipe.tower.calibrator, model, inputs)
            model = quantize_model(model, recipe.tower, ranges, {})
    model.producer_name, model.producer_version = "mobilevlm", ""
    location = data_path(path).name
    onnx.save_model(
        model, path, save_as_external_data=True, location=location, size_threshold=INLINE_BYTES
    )
    return Written(_weight_errors(weights, path, spec))


class _Once:
    """One input for onnxruntime's calibrators (a ``CalibrationDataReader``), which keep the
    activations of all that a reader has."""

    def __init__(self, item: Inputs) -> None:
        self._left = [item]

    def get_next(self) -> Inputs | None:
        return self._left.pop() if self._left else None


def _inputs(images: Sequence[ImageInput], spec: InputSpec, seen: Advance) -> Iterator[Inputs]:
    for image in images:
        for arrays in prepare(image, spec).arrays:
            yield {name: array[None] for name, array in arrays.items()}
        seen(1)


def float_model(source: Path) -> Any:
    """The graph of a file as an ``onnx.ModelProto`` with the shapes of all tensors."""
    import onnx

    onnx.shape_inference.infer_shapes_path(source)  # in place
    return onnx.load(source)


def quantized_operators(model: Any) -> list[str]:
    """Kinds of operators that get fixed-point inputs and outputs."""
    return sorted({node.op_type for node in model.graph.node} - _KEPT)


def quantize_model(model: Any, layers: LinearFormat, ranges: Any, more: Overrides) -> Any:
    """A float graph in fixed point. ``more``: overrides of single tensors, as onnxruntime's
    quantizer takes them."""
    from onnxruntime.quantization import QDQQuantizer, QuantType

    quantizer = QDQQuantizer(
        model,
        per_channel=True,
        reduce_range=layers.int8_weight_bits == 7,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8 if layers.precision == "qdq8" else QuantType.QUInt16,
        tensors_range=ranges,
        nodes_to_quantize=[],
        nodes_to_exclude=[],
        op_types_to_quantize=quantized_operators(model),
        extra_options={
            "WeightSymmetric": True,
            "ForceQuantizeNoInputCheck": True,
            "TensorQuantOverrides": {**_empty_channels(model), **_overrides(model, layers), **more},
        },
    )
    quantizer.quantize_model()
    return quantizer.model.model


def _overrides(model: Any, layers: LinearFormat) -> Overrides:
    """Return the settings of NPU compilers that differ from onnxruntime's: factors of norms have
    one scale, and of a product of two activations the second has 8 bits (where it has 16,
    Qualcomm's HTP rounds it to 8 with a range of its own)."""
    from onnxruntime.quantization import QuantType

    wide = QuantType.QUInt16
    norms = (node for node in model.graph.node if node.op_type == "LayerNormalization")
    found: Overrides = {node.input[1]: [{"quant_type": wide}] for node in norms}
    if layers.precision == "qdq8":
        return found
    made = producers(model)
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in made:
            name, reader = source_of(made, node.input[1], node)
            narrow = {"quant_type": QuantType.QUInt8, "recv_nodes": {reader.name}}
            found[name] = [{"quant_type": wide, "convert": narrow}]
    return found


def _empty_channels(model: Any) -> Overrides:
    """Weights of products with outputs whose weights are all zero: these get the widest range of
    the others. onnxruntime would give them the scale 1, thousands of times the others', at which
    Hexagon v68 rounds the zero point of their output: 2% of its range away
    (docs/explanation/npu.md)."""
    from onnx import numpy_helper

    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    found: Overrides = {}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            weight = numpy_helper.to_array(weights[node.input[1]])
            reach = np.abs(weight).max(axis=0)
            if weight.ndim == 2 and reach.any() and not reach.all():
                reach[reach == 0] = reach.max()
                found[node.input[1]] = [{"axis": 1, "rmin": -to, "rmax": to} for to in reach]
    return found


def producers(model: Any) -> dict[str, Any]:
    """The node that makes each tensor of an ``onnx.ModelProto``."""
    return {name: node for node in model.graph.node for name in node.output}


def source_of(made: Mapping[str, Any], name: str, reader: Any) -> tuple[str, Any]:
    """The tensor whose values another one has in another order, and the node that reads it on the
    way there: ``reader`` where it is the same."""
    while name in made and made[name].op_type in ("Transpose", "Reshape"):
        reader, name = made[name], made[name].input[0]
    return name, reader


def watch_ranges(
    source: Path, calibrator: CalibratorName, model: Any, inputs: Iterable[Inputs]
) -> Any:
    """Return the range of each activation, as onnxruntime's ``TensorsData``."""
    from onnxruntime.quantization import calibrate

    kind, settings = CALIBRATORS[calibrator]
    calibrater = getattr(calibrate, kind)(
        source,
        quantized_operators(model),
        augmented_model_path=str(source.with_name("watched.onnx")),
        use_external_data_format=True,
        **settings,
    )
    calibrater.augment_graph()
    calibrater.create_inference_session()
    for item in inputs:
        calibrater.collect_data(_Once(item))
    return calibrater.compute_data()


@contextmanager
def silent() -> Iterator[None]:
    """Keeps onnxruntime's quantizer from printing to stdout, where answers go, and from warning
    that norms have one scale."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def stored_weights(exact: Weights, path: Path, spec: ModelSpec) -> Weights:
    """Return the weights that the integers of a graph stand for."""
    tensors = OnnxTensors(path, spec, exact)
    return Weights({name: TensorRef(tensors, name) for name in tensors.names})


def _weight_errors(exact: Weights, path: Path, spec: ModelSpec) -> dict[str, float]:
    stored = stored_weights(exact, path, spec)
    return {
        ",".join(group.names): weight_error(exact, stored, group)
        for group in linear_groups(spec)
        if not group.name.startswith("decoder.")
    }

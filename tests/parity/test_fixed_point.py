"""The vision stage in fixed point through plain ONNX Runtime sessions of the runtime, against the
reference with the graph's own weights: what is left is the rounding of activations."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import Fixture, relative_error
from numpy.typing import NDArray
from PIL import Image
from test_graphs import in_memory, vision_spec

from mobilevlm.checkpoint import TensorRef
from mobilevlm.errors import MobileVLMError
from mobilevlm.export.calibration.samples import Sample
from mobilevlm.export.fixed_shapes.vision import author_qdq
from mobilevlm.export.formats import Written
from mobilevlm.export.graph.reading import OnnxTensors
from mobilevlm.export.recipes.named import RECIPES
from mobilevlm.model import Model
from mobilevlm.preparation import prepare
from mobilevlm.recipe import CalibratorName, LinearFormat, Precision, Recipe
from mobilevlm.reference import load_reference
from mobilevlm.runtime.engines.onnx.engine import OnnxVision

Array = NDArray[np.float32]


def recipe(precision: Precision, calibrator: CalibratorName = "minmax") -> Recipe:
    layers = LinearFormat(precision, calibrator=calibrator)
    return replace(RECIPES["fp32"], tower=layers, projector=layers)


def author(model: Model, image: Path | Image.Image, settings: Recipe, path: Path) -> Written:
    samples = [Sample("", "", (image,))]
    return author_qdq(samples, model.weights, model.spec, settings, path)


def run(path: Path, pixels: NDArray[np.uint8]) -> tuple[Array, Array]:
    """Features and visual tokens."""
    engine = OnnxVision(path, threads=2)
    arrays = {"pixels": pixels}
    return engine.features(arrays), engine.encode(arrays).embeds


def with_stored_weights(model: Model, path: Path) -> Model:
    stored = OnnxTensors(path, model.spec, model.weights)
    refs = {name: TensorRef(stored, name) for name in stored.names}
    return replace(model, weights=model.weights.replaced(refs))


def reference(model: Model, pixels: NDArray[np.uint8]) -> tuple[Array, Array]:
    ready = load_reference(model)
    with torch.no_grad():
        return ready.features(pixels).numpy(), ready.visual_tokens(pixels).numpy()


# Measured on the five fixtures (largest): 0.0164 and 0.21; random weights pass on each layer's
# rounding in full. The patch embedding and the projector's convolutions are not read back, so their
# weights' 8 bits are in it.
@pytest.mark.parametrize(("precision", "limit"), [("qdq16", 0.02), ("qdq8", 0.26)])
def test_a_fixed_point_graph_equals_the_reference_with_its_weights(
    fixture: Fixture, precision: Precision, limit: float, tmp_path: Path
) -> None:
    model, path = fixture.model, tmp_path / "vision.onnx"
    author(model, fixture.image, recipe(precision), path)
    pixels = prepare(fixture.image, model.spec.image).arrays[0]["pixels"]
    expected = reference(with_stored_weights(model, path), pixels)
    for found, wanted in zip(run(path, pixels), expected, strict=True):
        assert relative_error(found, wanted) <= limit


@pytest.mark.parametrize("kind", ["ldpv2 bins overlap", "ldp odd grid", "exact gelu"])
def test_a_fixed_point_graph_of_an_unusual_grid_equals_the_reference_with_its_weights(
    kind: str, tmp_path: Path
) -> None:
    specs = {
        "ldpv2 bins overlap": vision_spec("ldpv2", 16, 12),
        "ldp odd grid": vision_spec("ldp", 15, 8),
        "exact gelu": vision_spec("mlp", 6, 6, border=5),
    }
    spec = specs[kind]
    model, path = in_memory(spec, tmp_path), tmp_path / "vision.onnx"
    edge = spec.image.square.size
    pixels = np.random.default_rng(1).integers(0, 256, (edge, edge, 3), np.uint8)
    author(model, Image.fromarray(pixels), recipe("qdq16"), path)
    expected = reference(with_stored_weights(model, path), pixels)
    for found, wanted in zip(run(path, pixels), expected, strict=True):
        assert relative_error(found, wanted) <= 0.01


@pytest.mark.parametrize("precision", ["qdq8", "qdq16"])
def test_weights_have_8_bits_and_a_scale_per_output_and_operators_are_standard(
    mobilevlm_v2: Fixture, precision: Precision, tmp_path: Path
) -> None:
    model, path = mobilevlm_v2.model, tmp_path / "vision.onnx"
    written = author(model, mobilevlm_v2.image, recipe(precision), path)
    graph = ir.load(path).graph
    assert {node.domain for node in graph} == {""}
    bits = 7 if precision == "qdq8" else 8  # what is right everywhere, as long as none are chosen
    products = [node for node in graph if node.op_type == "MatMul"]
    products = [node for node in products if node.inputs[1].producer().inputs[0].is_initializer()]
    assert (
        len(products)
        == 1 + 4 * model.spec.image.transformer.num_hidden_layers + model.spec.image.connector.depth
    )
    for node in products:
        numbers, scale = (value.const_value for value in node.inputs[1].producer().inputs[:2])
        assert numbers.dtype == ir.DataType.INT8 and scale.shape == numbers.shape[1:]
        assert np.abs(numbers.numpy().astype(int)).max() == 2 ** (bits - 1) - (bits == 8)
    assert all(0 < error < 0.05 for error in written.errors.values())
    assert "projector.mlp.0" in written.errors


def test_activations_have_the_bits_of_the_precision(mobilevlm_v2: Fixture, tmp_path: Path) -> None:
    """In products of two activations the second has 8 bits in both precisions."""
    types_of: dict[Precision, ir.DataType] = {
        "qdq8": ir.DataType.UINT8,
        "qdq16": ir.DataType.UINT16,
    }
    for precision, dtype in types_of.items():
        path = tmp_path / f"{precision}.onnx"
        author(mobilevlm_v2.model, mobilevlm_v2.image, recipe(precision), path)
        graph = ir.load(path).graph
        quantizers = [node for node in graph if node.op_type == "QuantizeLinear"]
        types = {node.outputs[0].name: node.inputs[2].const_value.dtype for node in quantizers}
        products = [node for node in graph if node.op_type == "MatMul"]
        factors = [[value.producer().inputs[0] for value in node.inputs] for node in products]
        seconds = [pair[1].name for pair in factors if not pair[1].is_initializer()]
        assert len(seconds) == 2 * mobilevlm_v2.model.spec.image.transformer.num_hidden_layers
        assert {types[name] for name in seconds} == {ir.DataType.UINT8}
        assert {types[pair[0].name] for pair in factors} == {dtype}


def test_calibrators_choose_ranges_of_their_own(tmp_path: Path) -> None:
    spec = vision_spec("mlp", 6, 6)
    model, edge = in_memory(spec, tmp_path), spec.image.square.size
    noise = np.random.default_rng(1).integers(0, 256, (edge, edge, 3), np.uint8)
    ranges = {}
    for calibrator in ("minmax", "percentile", "entropy"):
        path = tmp_path / f"{calibrator}.onnx"
        author(model, Image.fromarray(noise), recipe("qdq8", calibrator), path)
        nodes = [node for node in ir.load(path).graph if node.op_type == "QuantizeLinear"]
        ranges[calibrator] = np.array([node.inputs[1].const_value.numpy() for node in nodes])
    # None is wider than that of all values (1e-6: float32). Percentiles always clip something;
    # entropy need not where values have no tails, as with random weights.
    for calibrator in ("percentile", "entropy"):
        assert (ranges[calibrator] <= ranges["minmax"] * (1 + 1e-6)).all(), calibrator
    assert (ranges["percentile"] < ranges["minmax"] * (1 - 2e-4)).any()
    assert (ranges["percentile"] != ranges["entropy"]).any()


def test_ranges_cover_all_calibration_pictures(mobilevlm_v2: Fixture, tmp_path: Path) -> None:
    """A bright image after a black one widens the range of the pixels."""
    model, size = mobilevlm_v2.model, mobilevlm_v2.model.spec.image.square.size
    black, white = (Image.new("RGB", (size, size), (value,) * 3) for value in (0, 255))
    path = tmp_path / "vision.onnx"
    samples = [Sample("", "", (black,)), Sample("", "", (white, black))]
    author_qdq(samples, model.weights, model.spec, recipe("qdq8"), path)
    first = next(node for node in ir.load(path).graph if node.op_type == "QuantizeLinear")
    assert float(first.inputs[1].const_value.numpy()) == pytest.approx(1)  # 255 in 8 bits


def test_authoring_twice_gives_the_same_bytes_and_leaves_nothing_else(
    mobilevlm_v2: Fixture, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        folder.mkdir()
        settings = recipe("qdq16", "percentile")
        author(mobilevlm_v2.model, mobilevlm_v2.image, settings, folder / "vision.onnx")
        found.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert found[0] == found[1]
    assert sorted(found[0]) == ["vision.onnx", "vision.onnx_data"]
    assert capfd.readouterr() == ("", "")  # onnxruntime's quantizer prints
    assert logging.root.manager.disable == logging.NOTSET


def test_samples_without_pictures_are_refused(mobilevlm_v2: Fixture, tmp_path: Path) -> None:
    model = mobilevlm_v2.model
    with pytest.raises(MobileVLMError, match="no sample has an image"):
        author_qdq(
            [Sample("Hi", "", ())], model.weights, model.spec, recipe("qdq8"), tmp_path / "v.onnx"
        )
    assert not list(tmp_path.iterdir())

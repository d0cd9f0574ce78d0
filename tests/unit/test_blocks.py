"""Packed integers: every bit width, block and symmetry through packing and through ONNX Runtime."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from conftest import memory_weights
from numpy.typing import NDArray
from onnxscript import GraphBuilder

from mobilevlm.export.graph.author import IR_VERSION
from mobilevlm.export.graph.dialects import CPU
from mobilevlm.export.graph.layers import FLOAT, Linear
from mobilevlm.export.graph.weight_file import WeightFile
from mobilevlm.export.quantize import rtn
from mobilevlm.export.quantize.blocks import INT8, Quantized, dequantize, pack, packed_size, unpack
from mobilevlm.export.recipes.named import RECIPES
from mobilevlm.recipe import BLOCK_SIZES, LinearFormat, Precision, Scheme

Float32 = NDArray[np.float32]
SYMMETRIES = [pytest.param(True, id="symmetric"), pytest.param(False, id="asymmetric")]


@pytest.mark.parametrize("count", [1, 5, 8, 32, 100])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_unpacking_undoes_packing(bits: int, count: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 2, count), np.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, 2, packed_size(count, bits)) == (3, 2, -(-count * bits // 8))
    assert np.array_equal(unpack(packed, bits, count), codes)


def test_the_first_code_is_in_the_lowest_bits() -> None:
    assert pack(np.array([1, 2], np.uint8), 4).tolist() == [0x21]
    assert pack(np.array([0, 1, 2, 3], np.uint8), 2).tolist() == [0b11_10_01_00]
    # Three bits cross bytes: 7, 0, 1 is 001 000 111, whose last bit opens the second byte.
    assert pack(np.array([7, 0, 1], np.uint8), 3).tolist() == [0b01_000_111, 0]


@pytest.mark.parametrize("symmetric", SYMMETRIES)
@pytest.mark.parametrize("block_size", [*BLOCK_SIZES, None])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_is_packed_stands_for_weights_within_a_step(
    bits: int, block_size: int | None, symmetric: bool
) -> None:
    weight = np.random.default_rng(0).standard_normal((6, 200), np.float32)
    quantized = rtn.quantize(weight, Scheme(bits, block_size, symmetric))
    block = block_size or 200
    blocks = -(-200 // block)
    assert quantized.packed.shape == (6, blocks, block * bits // 8)
    assert (quantized.zero_points is None) == symmetric
    if quantized.zero_points is not None:
        assert quantized.zero_points.shape == (6, -(-blocks * bits // 8))
    error = np.abs(dequantize(quantized) - weight)
    step = np.abs(quantized.scales).repeat(block, axis=1)[:, :200]
    # Where the zero point is rounded the range shifts by half a step; float16 rounds the scale.
    assert (error <= 1.01 * step + 1e-6).all()
    found = np.linalg.norm(error) / np.linalg.norm(weight)
    assert quantized.relative_error == pytest.approx(float(found), rel=1e-4)


def test_an_asymmetric_block_by_hand() -> None:
    """-1 … 2 in 2 bits: step 1, zero point 1; 0.4 is nearest to 0."""
    weight = np.array([[-1, 0, 0.4, 2, 1, 0.6, -0.4, -1]], np.float32)
    quantized = rtn.quantize(weight, Scheme(2, 8, symmetric=False))
    assert quantized.scales.tolist() == [[1.0]]
    assert quantized.zero_points is not None
    assert unpack(quantized.zero_points, 2, 1).tolist() == [[1]]
    assert unpack(quantized.packed, 2, 8).tolist() == [[[0, 1, 1, 3, 2, 2, 1, 0]]]


def test_an_asymmetric_block_of_one_sign_reaches_down_to_zero() -> None:
    weight = np.linspace(5, 8, 32, dtype=np.float32)[None]
    quantized = rtn.quantize(weight, Scheme(4, 32, symmetric=False))
    assert quantized.zero_points is not None and quantized.zero_points.tolist() == [[0]]
    assert np.abs(dequantize(quantized) - weight).max() <= 8 / 15 / 2 + 0.01


def run_linear(layers: LinearFormat, folder: Path, x: Float32, out_size: int) -> Float32:
    """``x (rows, in_size)`` through one linear layer of random weights, with bias."""
    graph = ir.Graph([], [], nodes=[], opset_imports=dict(CPU.opset_imports), name="linear")
    recipe = replace(RECIPES["fp32"], decoder=layers)
    file = WeightFile(weights_of(x.shape[1], out_size, folder), folder / "linear.data", recipe)
    linear = Linear(file, "decoder.layer", x.shape[1], out_size)
    file.close()
    shape: list[Any] = ["rows", x.shape[1]]
    value = ir.Value(name="x", shape=ir.Shape(shape), type=ir.TensorType(FLOAT))
    graph.inputs.append(value)
    result = linear(GraphBuilder(graph).op, value)
    result.name, result.type = "y", ir.TensorType(FLOAT)
    graph.outputs.append(result)
    ir.save(ir.Model(graph, ir_version=IR_VERSION), folder / "linear.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        folder / "linear.onnx", options, providers=["CPUExecutionProvider"]
    )
    found: Float32 = session.run(None, {"x": x})[0]
    return found


def weights_of(in_size: int, out_size: int, folder: Path) -> Any:
    shapes: dict[str, tuple[int, ...]] = {
        "decoder.layer.weight": (out_size, in_size),
        "decoder.layer.bias": (out_size,),
    }
    return memory_weights(shapes, folder)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("symmetric", SYMMETRIES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("precision", ["q8", "q4", "q2"])
def test_onnxruntime_multiplies_by_the_weights_that_the_integers_stand_for(
    precision: Precision, block_size: int, symmetric: bool, rows: int, tmp_path: Path
) -> None:
    """The rest is rounding of activations to 8 bits per block: half a step of 1/127 of the
    largest of up to 256 Gaussians (3.5 deviations), 0.8%."""
    layers = LinearFormat(precision, block_size=block_size, symmetric=symmetric)
    x = np.random.default_rng(7).standard_normal((rows, 320), np.float32)  # 320: a block not full
    found = run_linear(layers, tmp_path, x, 24)
    weights = weights_of(320, 24, tmp_path)
    assert layers.scheme is not None
    quantized: Quantized = rtn.quantize(
        weights.read("decoder.layer.weight", (24, 320)), layers.scheme
    )
    product = x @ dequantize(quantized).T
    error = found - weights.read("decoder.layer.bias", (24,)) - product
    assert np.linalg.norm(error) <= 0.015 * np.linalg.norm(product)


def test_int8_takes_a_scale_per_output(tmp_path: Path) -> None:
    """Activations of the whole tensor share a scale: 1/255 of the range of 6400 Gaussians, 0.8%."""
    x = np.random.default_rng(7).standard_normal((20, 320), np.float32)
    found = run_linear(LinearFormat("int8"), tmp_path, x, 24)
    weights = weights_of(320, 24, tmp_path)
    weight = dequantize(rtn.quantize(weights.read("decoder.layer.weight", (24, 320)), INT8))
    error = found - weights.read("decoder.layer.bias", (24,)) - x @ weight.T
    assert np.linalg.norm(error) <= 0.015 * np.linalg.norm(x @ weight.T)

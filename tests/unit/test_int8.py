"""8-bit weights times 8-bit activations: a scale per token, and sums that saturate or do not."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from conftest import BundleOf, fixture_named, relative_error
from numpy.typing import NDArray
from onnxscript import GraphBuilder
from test_blocks import run_linear, weights_of

import mobilevlm
from mobilevlm.bundle import Bundle, open_bundle
from mobilevlm.errors import PrecisionWarning
from mobilevlm.export.graph.author import IR_VERSION
from mobilevlm.export.graph.dialects import CPU
from mobilevlm.export.quantize import gptq, hqq, mse, rtn
from mobilevlm.export.quantize.blocks import INT8, dequantize, signed_columns
from mobilevlm.plan import Plan
from mobilevlm.recipe import LinearFormat, Scheme
from mobilevlm.runtime import machine
from mobilevlm.runtime.engines.onnx.engine import EXACT_PRODUCTS, exact_products
from mobilevlm.runtime.engines.opening import open_engines

Float32 = NDArray[np.float32]
Int8 = NDArray[np.int8]
Uint8 = NDArray[np.uint8]


def row_errors(activations: Any, x: Float32, folder: Path) -> Float32:
    """Relative error of each row of a layer, its rounded weights taken as exact."""
    found = run_linear(LinearFormat("int8", activations=activations), folder, x, 24)
    weights = weights_of(x.shape[1], 24, folder)
    exact = x @ dequantize(rtn.quantize(weights.read("decoder.layer.weight", (24, 320)), INT8)).T
    error = found - weights.read("decoder.layer.bias", (24,)) - exact
    ratios: Float32 = np.linalg.norm(error, axis=1) / np.linalg.norm(exact, axis=1)
    return ratios


def test_a_token_keeps_its_precision_beside_much_larger_ones(tmp_path: Path) -> None:
    """Rows of 320 Gaussians reach about 3 deviations, a step is 2 · 3 / 255, rounding it / √12:
    0.7%, and rows of 24 outputs differ by as much again. With one scale for all, a row of a
    thousandth of the largest is lost."""
    x = np.random.default_rng(3).standard_normal((20, 320), np.float32)
    x *= np.logspace(0, -3, 20, dtype=np.float32)[:, None]
    assert row_errors("token", x, tmp_path).max() < 0.02
    assert row_errors("tensor", x, tmp_path).max() > 0.5


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_of_zeros_give_the_bias(rows: int, tmp_path: Path) -> None:
    x = np.zeros((rows, 320), np.float32)
    x[1:2] = 1
    found = run_linear(LinearFormat("int8"), tmp_path, x, 24)
    bias = weights_of(320, 24, tmp_path).read("decoder.layer.bias", (24,))
    assert np.isfinite(found).all()
    assert np.array_equal(found[0], bias)


def integer_product(
    a: Uint8, weight: Int8, entries: Mapping[str, str] = MappingProxyType({})
) -> NDArray[np.int32]:
    """``(a - 128) · weight`` as ONNX Runtime's u8 × s8 kernel of this machine computes it, or with
    further settings of the session."""
    graph = ir.Graph([], [], nodes=[], opset_imports=dict(CPU.opset_imports), name="product")
    value = ir.Value(name="a", shape=ir.Shape(a.shape), type=ir.TensorType(ir.DataType.UINT8))
    graph.inputs.append(value)
    op = GraphBuilder(graph).op
    result = op.MatMulInteger(
        value,
        op.Constant(value=ir.tensor(weight)),
        op.Constant(value=ir.tensor(np.uint8(128))),
    )
    result.name, result.type = "y", ir.TensorType(ir.DataType.INT32)
    graph.outputs.append(result)
    model = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION)).SerializeToString()
    options = onnxruntime.SessionOptions()
    for name, text in entries.items():
        options.add_session_config_entry(name, text)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    found: NDArray[np.int32] = session.run(None, {"a": a})[0]
    return found


def pair_sums(a: Uint8, weight: Int8, limits: tuple[int, int]) -> NDArray[np.int64]:
    """The same with each sum of two products clipped at the limits (``vpmaddubsw``)."""
    products = a.astype(np.int64)[:, :, None] * weight.astype(np.int64)
    pairs = products.reshape(len(a), -1, 2, weight.shape[1]).sum(axis=2).clip(*limits)
    sums: NDArray[np.int64] = pairs.sum(axis=1)
    offset: NDArray[np.int64] = 128 * weight.astype(np.int64).sum(axis=0)
    return sums - offset


SIXTEEN_BITS = (-(2**15), 2**15 - 1)
UNLIMITED = (-(2**62), 2**62)


@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_saturate_with_8_bits_where_the_machine_says_so_and_never_with_7(
    sign: int, rows: int
) -> None:
    """The worst case: all activations at 255, all weights at the end of their range. What is
    expected of 8 bits is worked out here for a processor of either kind."""
    a = np.full((rows, 64), 255, np.uint8)
    seven, eight = (np.full((64, 16), sign * top, np.int8) for top in (64, 127))
    assert np.array_equal(pair_sums(a, seven, SIXTEEN_BITS), pair_sums(a, seven, UNLIMITED))
    assert np.array_equal(integer_product(a, seven), pair_sums(a, seven, UNLIMITED))
    saturated, exact = pair_sums(a, eight, SIXTEEN_BITS), pair_sums(a, eight, UNLIMITED)
    assert (saturated != exact).all()
    found = integer_product(a, eight)
    if machine.int8_weight_bits() == 8:
        assert np.array_equal(found, exact)
    elif machine.int8_weight_bits() == 7:
        assert np.array_equal(found, saturated)
    else:  # a system that does not tell
        assert np.array_equal(found, exact) or np.array_equal(found, saturated)


@pytest.mark.parametrize("weight_bits", [7, 8])
@pytest.mark.parametrize("quantizer", ["rtn", "mse", "hqq", "gptq"])
def test_weights_stay_in_the_range_that_was_asked_for(quantizer: str, weight_bits: Any) -> None:
    layers = LinearFormat("int8", weight_bits=weight_bits)
    weight = np.random.default_rng(1).standard_normal((40, 64), np.float32)
    scheme = layers.scheme
    assert scheme is not None
    if quantizer == "gptq":
        codes = signed_columns(gptq.quantize(weight, scheme, np.eye(64, dtype=np.float32)))
    else:
        codes = signed_columns(
            {"rtn": rtn, "mse": mse, "hqq": hqq}[quantizer].quantize(weight, scheme)
        )
    reach = np.abs(codes.astype(int)).max()
    assert 64 < reach <= 128 if weight_bits == 8 else reach <= 64


def test_8_bits_halve_the_rounding_of_weights() -> None:
    weight = np.random.default_rng(1).standard_normal((64, 256), np.float32)
    coarse, fine = (
        rtn.quantize(weight, Scheme(8, None, half_range=half)) for half in (True, False)
    )
    assert fine.relative_error == pytest.approx(coarse.relative_error / 2, rel=0.05)


@pytest.mark.parametrize(
    ("architecture", "flags", "bits"),
    [
        ("x86_64", "avx2 fma", 7),
        ("x86_64", "avx2 avx512f avx512bw", 7),
        ("x86_64", "avx2 avx512f avx512_vnni", 8),
        ("AMD64", "avx2 avx_vnni", 8),
        ("AMD64", "", None),
        ("aarch64", "asimd", 8),
        ("arm64", "", 8),
    ],
)
def test_bits_follow_the_processor(
    architecture: str, flags: str, bits: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: architecture)
    monkeypatch.setattr(machine, "_cpu_info", lambda: {"flags": flags} if flags else {})
    assert machine.int8_weight_bits() == bits


def with_bits(bundle: Bundle, bits: int | None) -> Bundle:
    artifacts = tuple(replace(item, weight_bits=bits) for item in bundle.manifest.artifacts)
    return replace(bundle, manifest=replace(bundle.manifest, artifacts=artifacts))


@pytest.mark.parametrize(
    ("stored", "best", "message"),
    [
        (8, 7, ("8-bit weights take more time on this processor, whose fastest products saturate: "
                if exact_products()
                else "8-bit weights saturate on this processor, answers may be wrong: ")
               + "export it with --weight-bits 7"),
        (7, 8, "this processor takes 8-bit weights at the same speed, the bundle has 7-bit ones: "
               "export it with --weight-bits 8"),
        (7, 7, ""),
        (8, 8, ""),
        (None, 7, ""),
        (8, None, ""),
    ],
)  # fmt: skip
def test_loading_warns_where_other_bits_fit_the_machine(
    stored: int | None,
    best: int | None,
    message: str,
    bundle_of: BundleOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = open_bundle(bundle_of("tiny", "int8"))
    monkeypatch.setattr("mobilevlm.runtime.engines.opening.int8_weight_bits", lambda: best)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for engine in open_engines(with_bits(bundle, stored), Plan("onnx")):
            engine.close()
    ours = [str(item.message) for item in caught if item.category is PrecisionWarning]
    assert ours == ([f"{bundle.folder}: {message}"] if message else [])


exact = pytest.mark.skipif(not exact_products(), reason="an onnxruntime before 1.30")


@exact
@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("sign", [1, -1])
def test_exact_products_saturate_on_no_processor(sign: int, rows: int) -> None:
    """The worst case, see above."""
    a, eight = np.full((rows, 64), 255, np.uint8), np.full((64, 16), sign * 127, np.int8)
    found = integer_product(a, eight, EXACT_PRODUCTS)
    assert np.array_equal(found, pair_sums(a, eight, UNLIMITED))


@exact
@pytest.mark.parametrize("vision_weights", ["mapped", "packed"])
def test_8_bit_weights_are_exact_on_this_processor_too(
    vision_weights: Any, tmp_path: Path, bundle_of: BundleOf
) -> None:
    """Visual tokens are off by 0.018 with 8 bits, 0.029 with 7, and 0.092 where sums saturate."""
    fixture, folder = fixture_named("llava_v1"), tmp_path / "bundle"
    mobilevlm.export(
        fixture.checkpoint,
        folder,
        recipe="int8",
        weight_bits=8,
        vision_tower=fixture.tower,
        measure=False,
    )
    tokens = []
    for bundle in (folder, bundle_of("llava_v1", "fp32")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PrecisionWarning)
            plan = Plan("onnx", vision_weights=vision_weights)
            with mobilevlm.load(bundle, plan=plan) as vlm:
                tokens.append(vlm.encode_image(fixture.image))
    assert relative_error(*tokens) < 0.025


def test_a_bundle_says_how_many_bits_its_weights_have(
    tiny_checkpoint: Path, bundle_of: BundleOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settled by the machine, or asked for: the same choice gives the same artifacts. (Keys and
    values of the system prompt are stored only where the decoder can run, which is patched.)"""
    files = {}
    for bits in (7, 8):
        asked, settled = tmp_path / f"asked{bits}", tmp_path / f"settled{bits}"
        mobilevlm.export(tiny_checkpoint, asked, recipe="int8", weight_bits=bits, measure=False)
        with monkeypatch.context() as patch:
            patch.setattr("mobilevlm.export.settled.int8_weight_bits", lambda: bits)  # noqa: B023
            mobilevlm.export(tiny_checkpoint, settled, recipe="int8", measure=False)
        manifest = open_bundle(asked).manifest
        found = {item.stage: item.weight_bits for item in manifest.artifacts}
        assert found == {"vision": bits, "embeddings": None, "decoder": bits}
        assert open_bundle(settled).manifest.artifacts == manifest.artifacts
        names = [name for artifact in manifest.artifacts for name in artifact.files]
        for name in names:
            assert (asked / name).read_bytes() == (settled / name).read_bytes()
        files[bits] = [(asked / name).read_bytes() for name in names]
    assert files[7] != files[8]

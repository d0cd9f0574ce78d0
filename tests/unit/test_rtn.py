"""Round-to-nearest quantizers: error bounds, layout, llama.cpp's Q4_0, and extreme values."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from mobilevlm.export.quantize import blocks as quantize_module
from mobilevlm.export.quantize import rtn
from mobilevlm.export.quantize.blocks import INT8, Quantized, dequantize, signed_columns, unpack
from mobilevlm.recipe import Scheme

pytestmark = pytest.mark.pure

Float32 = NDArray[np.float32]


@pytest.fixture(autouse=True)
def warnings_are_errors() -> Iterator[None]:
    """numpy warns where a value overflows, divides by zero or is not a number."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def normal(rows: int, columns: int, seed: int = 0) -> Float32:
    return np.random.default_rng(seed).standard_normal((rows, columns), np.float32)


def codes_of(quantized: Quantized) -> NDArray[np.int64]:
    """Integers ``(out_size, blocks, block)``."""
    scheme = quantized.scheme
    codes = unpack(quantized.packed, scheme.bits, scheme.block(quantized.in_size))
    return codes.astype(np.int64)


def test_columns_are_off_by_at_most_half_a_step() -> None:
    weight = normal(48, 100)
    columns = rtn.quantize(weight, INT8)
    values = signed_columns(columns)
    assert values.shape == (100, 48) and values.dtype == np.int8
    assert columns.scales.shape == (48, 1)
    error = np.abs(values.T * columns.scales - weight)
    assert (error <= columns.scales * (0.5 + 1e-5)).all()


def test_columns_use_half_of_the_range_and_all_of_that() -> None:
    """7 bits: two products of u8 and s8 must not saturate 16 bits on AVX2 (2 · 255 · 64 < 2¹⁵)."""
    values = signed_columns(rtn.quantize(normal(48, 100), INT8))
    assert (np.abs(values).max(axis=0) == 64).all()
    assert 2 * 255 * 64 < 2**15


@pytest.mark.parametrize(("bits", "block_size"), [(4, 32), (4, 16), (4, 128), (8, 32), (8, 64)])
def test_blocks_are_off_by_at_most_one_step_at_the_end_and_half_elsewhere(
    bits: int, block_size: int
) -> None:
    weight = normal(24, 256)
    blocks = rtn.quantize(weight, Scheme(bits, block_size))
    assert blocks.packed.shape == (24, 256 // block_size, block_size * bits // 8)
    error = np.abs(dequantize(blocks) - weight).reshape(24, -1, block_size)
    step = np.abs(blocks.scales)[..., None]
    # The scale is rounded to float16 (2⁻¹¹), which 2^(bits - 1) steps add up.
    slack = 2 ** (bits - 1) * 2**-11
    assert (error <= step * (1 + slack)).all()
    inner = codes_of(blocks) < 2**bits - 1  # a weight as large as the largest, opposite sign
    assert (error[inner] <= np.broadcast_to(step, error.shape)[inner] * (0.5 + slack)).all()


@pytest.mark.parametrize(
    ("bits", "limit"),
    # Gaussian weights in blocks of 32: the largest is about 2.1 deviations, a step 2.1 / 8, and
    # rounding a step / √12: 0.08, and a little for the end of the range. 8 bits: a sixteenth.
    [(4, 0.095), (8, 0.0061)],
)
def test_error_on_gaussian_weights_is_that_of_rounding(bits: int, limit: float) -> None:
    weight = normal(256, 1024)
    blocks = rtn.quantize(weight, Scheme(bits, 32))
    found = np.linalg.norm(dequantize(blocks) - weight) / np.linalg.norm(weight)
    assert blocks.relative_error == pytest.approx(float(found), rel=1e-5)
    assert 0.5 * limit < blocks.relative_error < limit


def test_reported_error_of_columns_is_the_true_one() -> None:
    weight = normal(256, 1024)
    columns = rtn.quantize(weight, INT8)
    found = np.linalg.norm(dequantize(columns) - weight) / np.linalg.norm(weight)
    assert columns.relative_error == pytest.approx(float(found), rel=1e-5)


def q4_0(block: Float32) -> tuple[list[int], np.float16]:
    """``quantize_row_q4_0_ref`` of llama.cpp's ggml-quants.c, one float at a time."""
    amax = largest = np.float32(0)
    for value in block:
        if amax < abs(value):
            amax, largest = abs(value), value
    d = np.float32(largest / np.float32(-8))
    inverse = np.float32(1) / d if d else np.float32(0)
    return [min(15, int(value * inverse + np.float32(8.5))) for value in block], np.float16(d)


def test_four_bits_in_blocks_of_32_are_llama_cpps_q4_0() -> None:
    weight = normal(64, 128) * np.logspace(-3, 1, 64, dtype=np.float32)[:, None]
    weight[0, :32] = 0
    weight[1, :32] = np.tile([0.5, -0.5], 16)  # which of two equal magnitudes comes first decides
    weight[2, :32] = np.tile([-0.5, 0.5], 16)
    weight[3, :32] = np.arange(32)
    blocks = rtn.quantize(weight, Scheme(4, 32))
    codes = codes_of(blocks)
    for row in range(64):
        for block in range(4):
            expected, scale = q4_0(weight[row, 32 * block : 32 * block + 32])
            assert codes[row, block].tolist() == expected
            assert blocks.scales[row, block] == scale


@pytest.mark.parametrize(("bits", "block_size"), [(4, 32), (8, 32), (4, 128)])
def test_scales_are_float16_numbers(bits: int, block_size: int) -> None:
    scales = rtn.quantize(normal(8, 256), Scheme(bits, block_size)).scales
    assert np.array_equal(scales.astype(np.float16).astype(np.float32), scales)


@pytest.mark.parametrize("in_size", [1, 31, 33, 100])
@pytest.mark.parametrize("bits", [4, 8])
def test_an_input_that_does_not_fill_its_last_block_is_padded_with_zeros(
    bits: int, in_size: int
) -> None:
    weight = normal(5, in_size)
    blocks = rtn.quantize(weight, Scheme(bits, 32))
    assert blocks.packed.shape[1] == -(-in_size // 32)
    padding = codes_of(blocks).reshape(5, -1)[:, in_size:]
    assert (padding == 2 ** (bits - 1)).all()  # the code of zero
    wide = np.zeros((5, 32 * -(-in_size // 32)), np.float32)
    wide[:, :in_size] = weight
    assert np.array_equal(rtn.quantize(wide, Scheme(bits, 32)).packed, blocks.packed)


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_weights_stay_zero_without_error(bits: int) -> None:
    weight = normal(4, 64)
    weight[1], weight[2, 32:] = 0, 0
    blocks = rtn.quantize(weight, Scheme(bits, 32))
    assert not dequantize(blocks)[1].any() and blocks.scales[1].tolist() == [0, 0]
    zeros = rtn.quantize(np.zeros((4, 64), np.float32), Scheme(bits, 32))
    assert zeros.relative_error == 0 and (codes_of(zeros) == 2 ** (bits - 1)).all()
    columns = rtn.quantize(np.zeros((4, 64), np.float32), INT8)
    assert columns.relative_error == 0 and not signed_columns(columns).any()
    assert columns.scales.all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_scale_beyond_float16_is_the_largest_float16(bits: int, sign: int) -> None:
    weight = np.full((1, 32), sign * 1e9, np.float32)
    blocks = rtn.quantize(weight, Scheme(bits, 32))
    assert np.abs(blocks.scales).tolist() == [[65504.0]]
    values = dequantize(blocks)
    assert np.isfinite(values).all() and (np.sign(values) == sign).all()


@pytest.mark.parametrize("size", [1e-8, 1e-30, 1e-38, 1e-45])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_too_small_for_a_float16_scale_become_zero(bits: int, size: float) -> None:
    weight = normal(2, 64)
    weight[0] = np.float32(size)
    blocks = rtn.quantize(weight, Scheme(bits, 32))
    assert not dequantize(blocks)[0].any()
    assert blocks.scales[1].all()


@pytest.mark.parametrize("size", [1e-45, 1e-43, 1e-38, 1e15])
def test_columns_hold_tiny_and_huge_weights(size: float) -> None:
    weight = np.array([[size, -size, size / 2, 0], [1, 2, 3, 4]], np.float32)
    columns = rtn.quantize(weight, INT8)
    assert np.isfinite(columns.scales).all() and np.isfinite(columns.relative_error)
    # Down to denormal scales, the sign survives and 8 bits do not wrap.
    values = signed_columns(columns)
    assert values[0, 0] == -values[1, 0] >= 0
    assert values[3].tolist() == [0, 64]


def test_rows_quantized_in_several_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(50, 96)
    whole, columns = rtn.quantize(weight, Scheme(4, 32)), rtn.quantize(weight, INT8)
    monkeypatch.setattr(quantize_module, "CHUNK", 96 * 7)
    again, columns_again = rtn.quantize(weight, Scheme(4, 32)), rtn.quantize(weight, INT8)
    assert np.array_equal(whole.packed, again.packed)
    assert np.array_equal(whole.scales, again.scales)
    assert np.array_equal(columns.packed, columns_again.packed)
    assert again.relative_error == pytest.approx(whole.relative_error)

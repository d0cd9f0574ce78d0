"""MSE search, HQQ and GPTQ: small cases by hand, and what each must do better than RTN."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from mobilevlm.export.quantize import gptq, hqq, mse, rtn
from mobilevlm.export.quantize.blocks import INT8, Quantized, dequantize, quantize_fitted, unpack
from mobilevlm.recipe import Scheme

pytestmark = pytest.mark.pure

Float32 = NDArray[np.float32]

SCHEMES = [
    pytest.param(Scheme(bits, block, symmetric), id=f"{bits} bits, {block}, {symmetric=}")
    for bits in (4, 3, 2)
    for block in (16, 128)
    for symmetric in (True, False)
] + [pytest.param(INT8, id="int8"), pytest.param(Scheme(4, 256), id="4 bits, 256")]


@pytest.fixture(autouse=True)
def warnings_are_errors() -> Iterator[None]:
    """numpy warns where a value overflows, divides by zero or is not a number."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def heavy_tailed(rows: int, columns: int) -> Float32:
    """Student's t of 4 degrees of freedom: outliers as trained weights have them."""
    weight: Float32 = np.random.default_rng(3).standard_t(4, (rows, columns)).astype(np.float32)
    return weight * np.float32(0.02)


def correlated_inputs(tokens: int, in_size: int) -> Float32:
    """Activations that a few directions explain, some channels larger than others."""
    random = np.random.default_rng(4)
    mixing = random.standard_normal((in_size, in_size)) * np.geomspace(1, 0.02, in_size)
    inputs: Float32 = (random.standard_normal((tokens, in_size)) @ mixing.T).astype(np.float32)
    return inputs * np.exp(random.standard_normal(in_size).astype(np.float32))


def test_hqq_by_hand_gives_up_on_one_outlier() -> None:
    """Whole numbers up to 7 and one -8.2: the outlier sets round-to-nearest's step to 1.025 and
    every other weight is off, by up to 0.175; with a step of 1 only the outlier is, by 0.2."""
    weight = np.tile(np.arange(-7, 8, dtype=np.float32), 3)[None, :32].copy()
    weight[0, 31] = -8.2
    assert rtn.quantize(weight, Scheme(4, 32)).scales[0, 0] == pytest.approx(1.025, rel=1e-3)
    found = hqq.quantize(weight, Scheme(4, 32))
    assert found.scales[0, 0] == pytest.approx(1.0, rel=5e-3)
    error = np.abs(dequantize(found) - weight)[0]
    assert (error[:31] <= 0.035).all() and error[31] == pytest.approx(0.2, abs=0.04)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_hqq_has_a_smaller_lp_error_than_rtn_on_heavy_tails(scheme: Scheme) -> None:
    weight = heavy_tailed(64, 512)
    nearest, found = rtn.quantize(weight, scheme), hqq.quantize(weight, scheme)
    exact = hqq.lp_error(weight, dequantize(found))
    assert exact < hqq.lp_error(weight, dequantize(nearest))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_hqq_keeps_zeros_and_extremes_finite(scheme: Scheme) -> None:
    weight = heavy_tailed(4, 256)
    weight[0], weight[1, :32], weight[2], weight[3] = 0, 0, 1e9, 1e-30
    restored = dequantize(hqq.quantize(weight, scheme))
    assert np.isfinite(restored).all() and not restored[0].any()


def squared_error(weight: Float32, found: Quantized) -> float:
    return float(np.square(weight - dequantize(found), dtype=np.float64).sum())


def test_search_by_hand_keeps_an_outlier_that_costs_more_than_the_rest() -> None:
    """Whole numbers up to 7 and one -8.2: with a step of 1 only the outlier is off, by 0.2, and a
    slightly larger step, -8.2 · 8 + Σ n² over Σ n², shares that out."""
    weight = np.tile(np.arange(-7, 8, dtype=np.float32), 3)[None, :32].copy()
    weight[0, 31] = -8.2
    found = mse.quantize(weight, Scheme(4, 32))
    codes = np.rint(weight).clip(-8, 7)
    best = float((codes * weight).sum() / np.square(codes).sum())
    assert abs(found.scales[0, 0]) == pytest.approx(best, rel=1e-3)
    assert squared_error(weight, found) < 0.04


@pytest.mark.parametrize("scheme", SCHEMES)
def test_search_has_a_smaller_squared_error_than_rtn_and_hqq(scheme: Scheme) -> None:
    weight = heavy_tailed(64, 512)
    error = squared_error(weight, mse.quantize(weight, scheme))
    for other in (rtn, hqq):
        assert error < squared_error(weight, other.quantize(weight, scheme))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_search_lowers_the_error_of_important_inputs(scheme: Scheme) -> None:
    weight = heavy_tailed(64, 512)
    energy = np.exp(2 * np.random.default_rng(8).standard_normal(512)).astype(np.float32)
    block = scheme.block(512)
    importance = energy.reshape(-1, block)

    def error(found: Quantized) -> float:
        squares = np.square(weight - dequantize(found), dtype=np.float64)
        return float((squares * energy).sum())

    found = quantize_fitted(weight, scheme, lambda part, _: mse.fit(part, scheme, importance))
    assert error(found) < error(mse.quantize(weight, scheme))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_search_keeps_zeros_and_extremes_finite(scheme: Scheme) -> None:
    weight = heavy_tailed(4, 256)
    weight[0], weight[1, :32], weight[2], weight[3] = 0, 0, 1e9, 1e-30
    restored = dequantize(mse.quantize(weight, scheme))
    assert np.isfinite(restored).all() and not restored[0].any()


def test_gptq_by_hand_gives_the_error_of_a_weight_to_its_twin() -> None:
    """Two inputs that are always equal, of weight 0.4 each, at a step of 1 (the -8 sets it).
    Rounded alone both become 0 and the output loses 0.8; the second must make good the first and
    become 1."""
    weight = np.array([[0.4, 0.4, -8, 0, 0, 0, 0, 0]], np.float32)
    hessian = np.eye(8, dtype=np.float32)
    hessian[0, 1] = hessian[1, 0] = 1
    scheme = Scheme(4, 8)
    assert dequantize(rtn.quantize(weight, scheme)).tolist() == [[0, 0, -8, 0, 0, 0, 0, 0]]
    found = gptq.quantize(weight, scheme, hessian, turns=0)
    assert dequantize(found).tolist() == [[0, 1, -8, 0, 0, 0, 0, 0]]
    assert unpack(found.packed, 4, 8).tolist() == [[[8, 9, 0, 8, 8, 8, 8, 8]]]
    better = gptq.quantize(weight, scheme, hessian)
    assert np.array_equal(better.packed, found.packed)
    # The step that leaves least of -8 and of 0.8 - 1, which both count.
    assert abs(better.scales[0, 0]) == pytest.approx((64 + 0.8) / 65, rel=1e-3)


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme.values[0] != INT8])
def test_each_turn_of_gptq_lowers_the_output_error(scheme: Scheme) -> None:
    weight = np.random.default_rng(5).standard_normal((48, 320), np.float32)
    inputs = correlated_inputs(1000, 320)
    hessian = inputs.T @ inputs
    found = [gptq.quantize(weight, scheme, hessian, turns=turns) for turns in range(4)]
    errors = [gptq.weighted_error(weight, dequantize(item), hessian) for item in found]
    assert errors[1] < 0.99 * errors[0]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("in_size", [320, 200])  # 200: no whole number of blocks or panels
def test_gptq_has_a_smaller_output_error_than_rtn_on_correlated_inputs(
    scheme: Scheme, in_size: int
) -> None:
    weight = np.random.default_rng(5).standard_normal((48, in_size), np.float32)
    inputs = correlated_inputs(1000, in_size)
    hessian = inputs.T @ inputs
    nearest = dequantize(rtn.quantize(weight, scheme))
    found = dequantize(gptq.quantize(weight, scheme, hessian))
    exact = gptq.weighted_error(weight, found, hessian)
    assert exact < gptq.weighted_error(weight, nearest, hessian)
    # The Hessian's figure is the one of the outputs themselves.
    direct = np.square(inputs @ (weight - found).T, dtype=np.float64).sum()
    assert exact == pytest.approx(float(direct), rel=1e-3)


def test_gptq_without_correlation_rounds_to_nearest_at_the_scales_of_the_search() -> None:
    weight = np.random.default_rng(6).standard_normal((16, 96), np.float32)
    found = gptq.quantize(weight, INT8, np.eye(96, dtype=np.float32))
    assert np.array_equal(found.packed, mse.quantize(weight, INT8).packed)


def test_gptq_stands_inputs_that_never_fire() -> None:
    weight = np.random.default_rng(6).standard_normal((16, 96), np.float32)
    inputs = correlated_inputs(20, 96)  # fewer tokens than inputs: the Hessian is singular
    inputs[:, 10:20] = 0
    found = gptq.quantize(weight, Scheme(4, 32), inputs.T @ inputs)
    assert np.isfinite(dequantize(found)).all() and found.relative_error < 0.5
    nothing = gptq.quantize(weight, Scheme(4, 32), np.zeros((96, 96), np.float32))
    assert nothing.relative_error < 0.1


def test_gptq_in_several_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(5).standard_normal((50, 96), np.float32)
    inputs = correlated_inputs(200, 96)
    whole = gptq.quantize(weight, Scheme(4, 32), inputs.T @ inputs)
    monkeypatch.setattr(gptq, "_CHUNK", 96 * 7)
    again = gptq.quantize(weight, Scheme(4, 32), inputs.T @ inputs)
    assert np.array_equal(whole.packed, again.packed)
    assert np.array_equal(whole.scales, again.scales)

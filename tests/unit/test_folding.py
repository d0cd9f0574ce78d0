"""AWQ and SmoothQuant: factors by hand, and folds that leave the float function as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Fixture, fixture_named, memory_weights, relative_error
from numpy.typing import NDArray

from mobilevlm.export.quantize import awq, rtn, smoothquant
from mobilevlm.export.quantize.blocks import dequantize
from mobilevlm.export.quantize.folding import Fold, find_folds, fold
from mobilevlm.model import Model
from mobilevlm.preparation import prepare
from mobilevlm.recipe import Scheme
from mobilevlm.reference import ReferenceModel, load_reference

Float32 = NDArray[np.float32]


def test_smoothquant_by_hand_gives_each_input_the_root_of_the_ratio() -> None:
    """Activations up to 100 meet weights up to 1: both become 10."""
    weights = [np.array([[1, 2, 0, 5]], np.float32), np.array([[-0.5, -8, 0, 1]], np.float32)]
    found = smoothquant.factors(weights, np.array([100, 2, 3, 0], np.float32))
    assert found.tolist() == pytest.approx([10, 0.5, 1, 1])  # the last two: not read, never fires


def test_awq_leaves_inputs_of_one_size_alone() -> None:
    weight = np.random.default_rng(0).standard_normal((64, 64), np.float32)
    moments = 3 * np.eye(64, dtype=np.float32)
    found = awq.factors([weight], np.diag(moments), moments, Scheme(4, 32))
    assert found.tolist() == [1] * 64


def test_awq_enlarges_the_weights_of_large_inputs_and_makes_the_output_better() -> None:
    random = np.random.default_rng(1)
    weight = random.standard_normal((128, 128), np.float32)
    inputs = random.standard_normal((500, 128), np.float32)
    inputs[:, ::16] *= 30
    inputs[:, 5] = 0
    scheme = Scheme(4, 32)
    moments: Float32 = inputs.T @ inputs / np.float32(len(inputs))
    found = awq.factors([weight[:64], weight[64:]], np.diag(moments), moments, scheme)
    assert found[::16].min() > 1.5 * np.delete(found, slice(None, None, 16)).max()
    assert found[5] == 1

    def error(factors: Float32) -> float:
        restored = dequantize(rtn.quantize(weight * factors, scheme)) / factors
        return float(np.linalg.norm(inputs @ (restored - weight).T))

    assert error(found) < 0.7 * error(np.ones(128, np.float32))


def test_awq_judges_powers_by_the_output_of_inputs_that_go_together() -> None:
    """Inputs that are sums of a few others: errors of their weights add up or cancel, which sums of
    squares do not see. No power may do worse than none."""
    random = np.random.default_rng(3)
    scheme = Scheme(2, 32, symmetric=False)
    for _ in range(8):
        weight = random.standard_normal((32, 64), np.float32)
        inputs = random.standard_normal((200, 4), np.float32) @ random.standard_normal((4, 64))
        moments = (inputs.T @ inputs / len(inputs)).astype(np.float32)
        found = awq.factors([weight], np.diag(moments), moments, scheme)
        errors = []
        for factors in (found, np.ones(64, np.float32)):
            restored = dequantize(rtn.quantize(weight * factors, scheme)) / factors
            errors.append(float(np.linalg.norm(inputs @ (restored - weight).T)))
        assert errors[0] <= errors[1]


def random_factors(place: Fold, seed: int) -> Float32:
    values = np.exp(np.random.default_rng(seed).standard_normal(place.in_size)).astype(np.float32)
    return place.tie(values, np.max)


def folded(model: Model) -> Model:
    """With random factors at every fold."""
    folds = {
        place: random_factors(place, index) for index, place in enumerate(find_folds(model.spec))
    }
    return replace(model, weights=fold(model.weights, folds))


def test_factors_in_all_folds_leave_every_float_output_as_it_was(any_fixture: Fixture) -> None:
    model, arrays = any_fixture.model, any_fixture.arrays
    pixels = prepare(any_fixture.image, model.spec.image).arrays[0]["pixels"]
    embeds = torch.from_numpy(arrays["inputs_embeds"][0])
    with torch.no_grad():
        plain, changed = load_reference(model), load_reference(folded(model))
        outputs: list[Callable[[ReferenceModel], torch.Tensor]] = [
            lambda reference: reference.features(pixels),
            lambda reference: reference.visual_tokens(pixels, **any_fixture.further),
            lambda reference: reference.logits(embeds),
        ]
        for run in outputs:
            assert relative_error(run(changed).numpy(), run(plain).numpy()) <= 1e-5


def test_factors_are_shared_by_the_queries_of_a_key_head(tmp_path: Path) -> None:
    base = fixture_named("mobilevlm_v2").model
    decoder = replace(base.spec.decoder, num_attention_heads=8, num_key_value_heads=2,
                      hidden_size=128, head_dim=16)  # fmt: skip
    spec = replace(base.spec, decoder=decoder)
    with torch.device("meta"):
        parameters = dict(ReferenceModel(spec).named_parameters())
    shapes = {name: tuple(value.shape) for name, value in parameters.items()}
    model = replace(base, spec=spec, weights=memory_weights(shapes, tmp_path))
    place = next(place for place in find_folds(spec) if place.heads == (2, 4))
    factors = random_factors(place, 0).reshape(2, 4, 16)
    assert (factors == factors[:, :1]).all()
    embeds = torch.from_numpy(np.random.default_rng(2).standard_normal((20, 128), np.float32))
    with torch.no_grad():
        expected = load_reference(model).logits(embeds).numpy()
        assert relative_error(load_reference(folded(model)).logits(embeds).numpy(), expected) < 1e-5


def test_every_fold_names_tensors_that_exist_once(any_fixture: Fixture) -> None:
    model = any_fixture.model
    places = list(find_folds(model.spec))
    consumers = [name for place in places for name in place.consumers]
    assert len(consumers) == len(set(consumers))
    for place in places:
        for name, size in zip(place.consumers, place.out_sizes, strict=True):
            model.weights.read(f"{name}.weight", (size, place.in_size))
        assert f"{place.producer}.weight" in model.weights


def test_factors_on_factors_multiply(mobilevlm_v2: Fixture) -> None:
    weights = mobilevlm_v2.model.weights
    place = next(find_folds(mobilevlm_v2.model.spec))
    name, shape = f"{place.consumers[0]}.weight", (place.out_sizes[0], place.in_size)
    twice = fold(
        fold(weights, {place: random_factors(place, 0)}), {place: random_factors(place, 1)}
    )
    expected = weights.read(name, shape) * random_factors(place, 0) * random_factors(place, 1)
    assert np.array_equal(twice.read(name, shape), expected)
    assert np.array_equal(weights.changed({}).read(name, shape), weights.read(name, shape))

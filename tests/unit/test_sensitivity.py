"""Effects of changed weights, against whole passes of a reference with these weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Fixture
from numpy.typing import NDArray

from mobilevlm.export.calibration import statistics
from mobilevlm.export.calibration.samples import Sample, sample_pieces, scene_samples
from mobilevlm.export.quality import sensitivity
from mobilevlm.export.quality.metrics import compare_logits
from mobilevlm.export.quality.sensitivity import Change, Effect, Probe
from mobilevlm.linear_groups import LinearGroup, linear_groups
from mobilevlm.model import Model
from mobilevlm.preparation import prepare
from mobilevlm.reference import ReferenceModel, load_reference

SAMPLES = [*scene_samples(3), Sample("What is red?", "Blood is.", ()), Sample("Hello", "", ())]


def changed(model: Model, group: LinearGroup, seed: int = 0) -> NDArray[np.float32]:
    """The group's weights with some noise."""
    sizes = zip(group.names, group.out_sizes, strict=True)
    parts = [model.weights.read(f"{name}.weight", (size, group.in_size)) for name, size in sizes]
    weight = np.concatenate(parts)
    noise = np.random.default_rng(seed).standard_normal(weight.shape, np.float32)
    return weight + noise * np.float32(0.3 * weight.std())


def put(reference: ReferenceModel, group: LinearGroup, weight: NDArray[np.float32]) -> None:
    for name, part in zip(
        group.names, np.split(weight, np.cumsum(group.out_sizes)[:-1]), strict=True
    ):
        reference.get_submodule(name).weight.data = torch.from_numpy(part)


def answers(model: Model, reference: ReferenceModel) -> tuple[NDArray[np.float32], ...]:
    """Visual tokens, and logits from the end of each prompt on."""
    visual, logits = [], []
    with torch.no_grad():
        for sample in SAMPLES:
            pixels = [prepare(item, model.spec.image).arrays[0]["pixels"] for item in sample.images]
            tokens = [reference.visual_tokens(item) for item in pixels]
            visual += [item.numpy() for item in tokens]
            ids = sample_pieces(model, sample)
            prompt = sample_pieces(model, Sample(sample.prompt, "", sample.images))
            assert ids[: len(prompt)] == prompt
            found = reference.logits(reference.embed(ids, tokens)).numpy()
            logits.append(found[-(len(ids) - len(prompt) + 1) :])
    return np.concatenate(visual), np.concatenate(logits)


def expected_effect(model: Model, changes: dict[LinearGroup, NDArray[np.float32]]) -> Effect:
    reference = load_reference(model)
    visual, logits = answers(model, reference)
    for group, weight in changes.items():
        put(reference, group, weight)
    tokens, found = answers(model, reference)
    figures = compare_logits(found, logits)
    error = float(np.linalg.norm(tokens - visual) / np.linalg.norm(visual))
    return Effect(float(figures.kl.mean()), float(figures.top1.mean()), error)


def check(found: Effect, expected: Effect, through_vision: bool) -> None:
    """Batches sum in another order: float32 rounding is all that may differ."""
    assert found.kl == pytest.approx(expected.kl, rel=1e-3, abs=1e-9)
    assert found.top1_agreement == pytest.approx(expected.top1_agreement)
    if through_vision:
        assert found.visual_error == pytest.approx(expected.visual_error, rel=1e-3)
    else:
        assert found.visual_error is None


@pytest.fixture(scope="module")
def probe(mobilevlm_v2: Fixture) -> Probe:
    return Probe(mobilevlm_v2.model, SAMPLES)


def test_the_effect_of_each_group_alone_is_that_of_whole_passes(
    mobilevlm_v2: Fixture, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when only a state or two fit into memory at once."""
    model = mobilevlm_v2.model
    chosen = {
        "vision.layers.0.attn.q_proj",
        "vision.layers.1.mlp.fc2",
        "projector.mlp.1",
        "decoder.layers.0.mlp.gate_proj",
        "decoder.layers.1.attn.o_proj",
        "decoder.lm_head",
    }

    def changes(group: LinearGroup) -> Iterable[Change]:
        for seed in range(2 if group.name in chosen else 0):
            yield Change(str(seed), changed(model, group, seed))

    found = list(probe.effects(changes))
    assert {group.name for group, _, _ in found} == chosen and len(found) == 2 * len(chosen)
    monkeypatch.setattr(sensitivity, "STATE_BYTES", 1)
    assert list(probe.effects(changes)) == found
    for group, label, effect in found:
        expected = expected_effect(model, {group: changed(model, group, int(label))})
        check(effect, expected, not group.name.startswith("decoder"))
        assert effect.kl > 1e-6


def test_no_change_has_no_effect(mobilevlm_v2: Fixture, probe: Probe) -> None:
    effect = probe.joint_effect(lambda group: None)
    assert effect == Effect(0.0, 1.0, 0.0)


def test_the_joint_effect_is_that_of_whole_passes(mobilevlm_v2: Fixture, probe: Probe) -> None:
    model = mobilevlm_v2.model
    groups = list(linear_groups(model.spec))
    changes = {group: changed(model, group) for group in (*groups[::3], groups[-1])}
    check(probe.joint_effect(changes.get), expected_effect(model, changes), True)


def test_weights_of_at_most_two_parts_are_in_memory(
    mobilevlm_v2: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    references: list[ReferenceModel] = []

    def load(*given: Any, **named: Any) -> ReferenceModel:
        references.append(load_reference(*given, **named))
        return references[-1]

    monkeypatch.setattr(sensitivity, "load_reference", load)
    seen: set[int] = set()

    def changes(group: LinearGroup) -> Iterable[Change]:
        names = [name for name, value in references[0].named_parameters() if not value.is_meta]
        parts = {".".join(name.split(".")[: 1 if name.startswith("proj") else 3]) for name in names}
        seen.add(len(parts - {"vision.class_embedding"}))
        yield Change("", changed(mobilevlm_v2.model, group))

    assert len(list(Probe(mobilevlm_v2.model, SAMPLES[:1]).effects(changes))) > 10
    assert seen <= {1, 2}


def test_samples_beyond_the_limits_are_left_out(
    mobilevlm_v2: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = mobilevlm_v2.model.spec.decoder.vocab_size
    alone = [Probe(mobilevlm_v2.model, [sample]).num_positions for sample in SAMPLES[3:]]
    assert alone[1] == 1 < alone[0]  # without an answer: what comes after the prompt
    monkeypatch.setattr(sensitivity, "MAX_LOGITS", alone[0] * vocabulary)
    found = Probe(mobilevlm_v2.model, SAMPLES[3:])
    assert (found.num_samples, found.num_positions) == (1, alone[0])
    monkeypatch.setattr(sensitivity, "MAX_LOGITS", 1 << 26)
    monkeypatch.setattr(statistics, "MAX_POSITIONS", 1)
    assert Probe(mobilevlm_v2.model, SAMPLES[3:]).num_samples == 1

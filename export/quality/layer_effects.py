"""Which layer of an artifact hurts most: each one's weights put alone into the reference (needs
torch)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mobilevlm.checkpoint import Weights
from mobilevlm.console import progress
from mobilevlm.export.calibration.activations import embed_images
from mobilevlm.export.calibration.samples import Sample, sample_arrays
from mobilevlm.export.quality.artifact_weights import stacked, weight_error
from mobilevlm.export.quality.limits import StageKind
from mobilevlm.export.quality.measure import reference_embeds
from mobilevlm.export.quality.sensitivity import Change, Effect, Probe
from mobilevlm.linear_groups import LinearGroup, linear_groups
from mobilevlm.model import Model
from mobilevlm.reference import load_reference
from mobilevlm.reference.streaming import decoder_states, tower_states
from mobilevlm.spec import ModelSpec

ALL_WEIGHTS = 2e7
"""Of a model whose layers are all tried; of a larger one only those that were rounded most."""
TRIED = 8
"""Layers of each stage that are tried there."""


@dataclass(frozen=True)
class LayerEffect:
    """A layer of an artifact, or layers that are one product."""

    names: tuple[str, ...]
    weight_error: float
    """Relative, of the weights"""
    effect: Effect | None
    """Of these weights alone, all others being exact; none where that was not tried"""

    @property
    def label(self) -> str:
        """``decoder.layers.0.attn.q_proj+k_proj+v_proj``"""
        return "+".join((self.names[0], *(name.rpartition(".")[2] for name in self.names[1:])))

    @property
    def is_vision(self) -> bool:
        return not self.names[0].startswith("decoder.")


@dataclass(frozen=True)
class StateError:
    """Relative error of the states after a layer, with the artifact's weights up to there."""

    layer: str
    error: float


def weight_errors(exact: Weights, stored: Weights, spec: ModelSpec) -> dict[str, float]:
    """Relative error of each group of linear layers, by its name."""
    return {group.name: weight_error(exact, stored, group) for group in linear_groups(spec)}


def layer_effects(
    model: Model, stored: Weights, samples: Sequence[Sample], everything: bool = False
) -> list[LayerEffect]:
    """All layers in the order of use. ``stored``: the artifact's weights. ``everything``: try them
    all where the model is small (``ALL_WEIGHTS``), else those that were rounded most."""
    groups = list(linear_groups(model.spec))
    errors = weight_errors(model.weights, stored, model.spec)
    tried = {name for name, error in errors.items() if error > 0}
    if not everything or sum(group.size for group in groups) > ALL_WEIGHTS:
        tried = {
            name
            for prefixes in (("vision.", "projector."), "decoder.")
            for name in sorted(
                (name for name in tried if name.startswith(prefixes)),
                key=errors.__getitem__,
                reverse=True,
            )[:TRIED]
        }

    def changes(group: LinearGroup) -> list[Change]:
        if group.name not in tried:
            return []
        return [Change("artifact", stacked(stored, group))]

    probe = Probe(model, samples)
    effects = {}
    with progress.track("layers", len(tried)) as advance:
        for group, _, effect in probe.effects(changes):
            effects[group.name] = effect
            advance(1)
    return [
        LayerEffect(group.names, errors[group.name], effects.get(group.name)) for group in groups
    ]


def worst_layers(effects: Sequence[LayerEffect]) -> dict[StageKind, str]:
    """For each stage what to say of the layer that hurts most there."""
    tried = [item for item in effects if item.effect is not None]
    vision = [item for item in tried if item.is_vision]
    decoder = [item for item in tried if not item.is_vision]
    reasons: dict[StageKind, str] = {}
    if vision:
        worst = max(vision, key=_visual_error)
        reasons["vision"] = _reason(worst, f"visual tokens {_visual_error(worst):.2%} off")
    by_kl: tuple[tuple[StageKind, list[LayerEffect]], ...] = (
        ("decoder", decoder),
        ("end_to_end", tried),
    )
    for kind, among in by_kl:
        if among:
            worst = max(among, key=_kl)
            reasons[kind] = _reason(worst, f"kl {_kl(worst):.4g}")
    return reasons


def state_errors(model: Model, stored: Weights, samples: Sequence[Sample]) -> list[StateError]:
    """After each layer of the tower and of the decoder; the decoder is given the reference's visual
    tokens. ``stored``: the artifact's weights."""
    exact = load_reference(model, streamed=True)
    found = load_reference(dataclasses.replace(model, weights=stored), streamed=True)
    errors = []
    with torch.no_grad():
        arrays = list(sample_arrays(model, samples))
        if arrays:
            passes = (tower_states(one, embed_images(one, arrays)) for one in (exact, found))
            errors += list(_state_errors("vision", *passes))
        embeds = reference_embeds(model, exact, samples)
        passes = (decoder_states(one, embeds) for one in (exact, found))
        errors += list(_state_errors("decoder", *passes))
    return errors


def _state_errors(
    part: str, exact: Iterator[list[torch.Tensor]], found: Iterator[list[torch.Tensor]]
) -> Iterator[StateError]:
    for index, (ours, theirs) in enumerate(zip(exact, found, strict=True)):
        pairs = list(zip(ours, theirs, strict=True))
        error = sum(float((a - b).double().square().sum()) for a, b in pairs)
        norm = sum(float(a.double().square().sum()) for a, _ in pairs)
        yield StateError(f"{part}.layers.{index}", (error / norm) ** 0.5)


def _kl(item: LayerEffect) -> float:
    assert item.effect is not None
    return item.effect.kl


def _visual_error(item: LayerEffect) -> float:
    assert item.effect is not None and item.effect.visual_error is not None
    return item.effect.visual_error


def _reason(item: LayerEffect, effect: str) -> str:
    return f"{item.label} hurts most (alone {effect}, weights {item.weight_error:.1%} off): "

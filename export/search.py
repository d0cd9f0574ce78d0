"""Mixed precision by sensitivity: formats for the decoder's layers that meet a size or a
divergence (needs torch).

Each group of layers is stored alone in each candidate format, and what that does to the answers is
measured (export/sensitivity.py); bits then go where they save most (export/bit_allocation.py). That
the effects of layers add up is an assumption: the finished choice is measured as a whole, and made
finer where it misses a limit.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mobilevlm import progress
from mobilevlm.errors import MobileVLMError, QualityError, require
from mobilevlm.export.bit_allocation import Allocation, Option, front, within_kl, within_size
from mobilevlm.export.calibrated import hessians
from mobilevlm.export.calibration import Sample
from mobilevlm.export.layer_formats import restored, stored_bytes
from mobilevlm.export.linear_groups import LinearGroup, linear_groups
from mobilevlm.export.quantize.blocks import Float32
from mobilevlm.export.quantize.gptq import HessianOf, no_hessian
from mobilevlm.export.recipes import LinearFormat, QuantizerName
from mobilevlm.families import Model

try:
    from mobilevlm.export.sensitivity import Change, Effect, Probe
except ImportError:
    raise require("torch", "reference", "measuring sensitivity") from None

TRIES = 6
"""Allocations that are measured to meet a divergence."""


@dataclass(frozen=True)
class Goal:
    """What to reach: one of them.

    Raises:
        MobileVLMError: none, or both.
    """

    bits_per_weight: float | None = None
    """Mean over the weights of the decoder's linear layers and its head, with scales and zero
    points"""
    max_kl: float | None = None
    """Of all layers together, in nats"""

    def __post_init__(self) -> None:
        if (self.bits_per_weight is None) == (self.max_kl is None):
            raise MobileVLMError("a search needs one goal: --budget or --max-kl")

    def __str__(self) -> str:
        if self.max_kl is not None:
            return f"--max-kl {self.max_kl:g}"
        return f"--budget {self.bits_per_weight:g}bpw"


@dataclass(frozen=True)
class Data:
    """What a search runs the model on."""

    calibration: Sequence[Sample]
    """For GPTQ"""
    measuring: Sequence[Sample]


@dataclass(frozen=True)
class Found:
    """Formats for the groups, and what they do together."""

    groups: tuple[LinearGroup, ...]
    allocation: Allocation
    effect: Effect
    front: tuple[Allocation, ...]
    """The best allocations of all sizes, with predicted divergences"""
    num_samples: int
    num_positions: int

    @property
    def bits_per_weight(self) -> float:
        return self.bits_of(self.allocation)

    def bits_of(self, allocation: Allocation) -> float:
        """Mean bits of a weight, scales and zero points included."""
        return 8 * allocation.size / sum(group.size for group in self.groups)

    @property
    def layers(self) -> dict[str, LinearFormat]:
        """By the name of each group."""
        pairs = zip(self.groups, self.allocation.options, strict=True)
        return {group.name: option.layers for group, option in pairs}


def candidates(quantizer: QuantizerName) -> tuple[LinearFormat, ...]:
    """Formats that a search tries on each group, from 2.3 to 8.3 bits."""
    blocks = [
        LinearFormat(precision, quantizer, block_size=size, symmetric=False)
        for precision in ("q2", "q4")
        for size in (128, 64, 32)
    ]
    return (*blocks, LinearFormat("q8", block_size=128))


def search(model: Model, goal: Goal, formats: Sequence[LinearFormat], data: Data) -> Found:
    """The best formats of these for the decoder's layers.

    Raises:
        QualityError: no choice stays within the divergence.
        MobileVLMError: the budget is too small, or a sample is wrong.
    """
    groups = tuple(group for group in linear_groups(model.spec) if _is_searched(group))
    _check_budget(goal, groups, formats)
    probe = Probe(model, data.measuring)
    choices = _measure(model, groups, formats, data, probe)
    corners = tuple(front(choices))
    limit = goal.max_kl
    for _ in range(TRIES):
        if limit is None:
            assert goal.bits_per_weight is not None
            size = int(goal.bits_per_weight * sum(group.size for group in groups) / 8 + 0.5)
            allocation = within_size(choices, size)
        else:
            allocation = within_kl(choices, limit)
        if allocation is None:
            break
        effect = _joint_effect(model, groups, allocation, data, probe)
        progress.say(
            f"search      {allocation.size / 1e6:.1f} MB: KL {effect.kl:.4g} measured, "
            f"{allocation.kl:.4g} predicted"
        )
        if goal.max_kl is None or effect.kl <= goal.max_kl:
            break
        limit = allocation.kl * min(0.95, goal.max_kl / effect.kl)
    else:
        allocation = None
    if allocation is None:  # the predictions are of no use here
        allocation = corners[-1]
        effect = _joint_effect(model, groups, allocation, data, probe)
    if goal.max_kl is not None and effect.kl > goal.max_kl:
        raise QualityError(
            f"{goal}: not reached: with the finest candidates ({allocation.size / 1e6:.1f} MB) KL "
            f"is {effect.kl:.4g}: allow more than that"
        )
    return Found(groups, allocation, effect, corners, probe.num_samples, probe.num_positions)


def _is_searched(group: LinearGroup) -> bool:
    return group.name.startswith("decoder.")


def _check_budget(
    goal: Goal, groups: Sequence[LinearGroup], formats: Sequence[LinearFormat]
) -> None:
    """Refuses a size below the smallest formats before anything is measured."""
    weights = sum(group.size for group in groups)
    least, most = (
        8 * sum(choose(stored_bytes(layers, group) for layers in formats) for group in groups)
        / weights
        for choose in (min, max)
    )  # fmt: skip
    if goal.bits_per_weight is not None and goal.bits_per_weight < least:
        raise MobileVLMError(
            f"{goal}: too small: the candidates for this model take {least + 0.005:.2f} to "
            f"{most:.2f} bits per weight"
        )


def _measure(
    model: Model,
    groups: Sequence[LinearGroup],
    formats: Sequence[LinearFormat],
    data: Data,
    probe: Probe,
) -> list[list[Option]]:
    """The options of each group."""
    hessian = _hessians(model, formats, data)
    found: dict[str, list[Option]] = {group.name: [] for group in groups}
    start = time.perf_counter()

    def changes(group: LinearGroup) -> Iterable[Change]:
        if _is_searched(group):
            weight = _stacked(model, group)
            for index, layers in enumerate(formats):
                yield Change(str(index), restored(weight, layers, group.name, hessian))

    with progress.track("sensitivity", len(groups) * len(formats)) as advance:
        for group, label, effect in probe.effects(changes):
            layers = formats[int(label)]
            found[group.name].append(Option(layers, stored_bytes(layers, group), effect.kl))
            advance(1)
    progress.say(
        f"sensitivity {len(groups)} products, {len(formats)} formats, {probe.num_samples} samples "
        f"({probe.num_positions} positions), {time.perf_counter() - start:.1f} s"
    )
    return list(found.values())


def _joint_effect(
    model: Model,
    groups: Sequence[LinearGroup],
    allocation: Allocation,
    data: Data,
    probe: Probe,
) -> Effect:
    pairs = zip(groups, allocation.options, strict=True)
    chosen = {group.name: option.layers for group, option in pairs}
    hessian = _hessians(model, list(chosen.values()), data)

    def replacement(group: LinearGroup) -> Float32 | None:
        if group.name not in chosen:
            return None
        return restored(_stacked(model, group), chosen[group.name], group.name, hessian)

    return probe.joint_effect(replacement)


def _hessians(model: Model, formats: Sequence[LinearFormat], data: Data) -> HessianOf:
    if all(layers.quantizer != "gptq" for layers in formats):
        return no_hessian
    return hessians(model, data.calibration, "decoder", lambda name: True)


def _stacked(model: Model, group: LinearGroup) -> Float32:
    """Weights ``(out_size, in_size)``"""
    sizes = zip(group.names, group.out_sizes, strict=True)
    parts = [model.weights.read(f"{name}.weight", (size, group.in_size)) for name, size in sizes]
    return np.concatenate(parts)

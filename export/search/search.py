"""Mixed precision by sensitivity: formats for the decoder's layers that meet a size or a
divergence (needs torch).

Each group of layers is stored alone in each candidate format, and what that does to the answers is
measured (export/quality/sensitivity.py); bits then go where they save most
(export/search/bit_allocation.py). That the effects of layers add up is an assumption: the finished
choice is measured as a whole, and made finer where it misses a limit.

Sparse experts get formats of their own (``plain``), or one for all experts of a layer (``fused``),
as the operator for all of them takes it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from mobilevlm.console import progress
from mobilevlm.errors import MobileVLMError, QualityError, require
from mobilevlm.export.calibration.samples import Sample
from mobilevlm.export.calibration.stages import hessians
from mobilevlm.export.quantize.blocks import Float32
from mobilevlm.export.quantize.errors import stacked
from mobilevlm.export.quantize.gptq import HessianOf, no_hessian
from mobilevlm.export.recipes.layer_formats import restored, stored_bytes
from mobilevlm.export.search.bit_allocation import Allocation, Option, front, within_kl, within_size
from mobilevlm.export.search.expert_bits import by_usage, expert_uses
from mobilevlm.linear_groups import LinearGroup, linear_groups
from mobilevlm.model import Model
from mobilevlm.recipe import LinearFormat, QuantizerName
from mobilevlm.spec import ModelSpec

try:
    from mobilevlm.export.quality.sensitivity import Change, Effect, Probe
except ImportError:
    raise require("torch", "reference", "measuring sensitivity") from None

TRIES = 6
"""Allocations that are measured to meet a divergence."""


@dataclass(frozen=True)
class Goal:
    """Goal of a search: a size or a divergence.

    Raises:
        MobileVLMError: none, or both.
    """

    bits_per_weight: float | None = None
    """Mean over the weights of the decoder's linear layers and its head, with scales and zero
    points"""
    max_kl: float | None = None
    """Divergence of all layers together, in nats"""

    def __post_init__(self) -> None:
        if (self.bits_per_weight is None) == (self.max_kl is None):
            raise MobileVLMError("a search needs one goal: --budget or --max-kl")

    def __str__(self) -> str:
        if self.max_kl is not None:
            return f"--max-kl {self.max_kl:g}"
        return f"--budget {self.bits_per_weight:g}bpw"


@dataclass(frozen=True)
class Data:
    """Samples that a search runs the model on."""

    calibration: Sequence[Sample]
    """For GPTQ"""
    measuring: Sequence[Sample]


@dataclass(frozen=True)
class Unit:
    """Groups that get one format: one, or all experts of a layer."""

    groups: tuple[LinearGroup, ...]

    @property
    def name(self) -> str:
        """Its first group's."""
        return self.groups[0].name

    @property
    def size(self) -> int:
        """Weights."""
        return sum(group.size for group in self.groups)

    def stored_bytes(self, layers: LinearFormat) -> int:
        """In this format."""
        return sum(stored_bytes(layers, group) for group in self.groups)


@dataclass(frozen=True)
class Sensitivity:
    """Effects of formats on the parts of a decoder, each alone."""

    units: tuple[Unit, ...]
    choices: Sequence[Sequence[Option]]
    """Options of each unit"""
    probe: Probe
    usage: dict[str, float]
    """As in :class:`Found`"""


@dataclass(frozen=True)
class Found:
    """Formats for the units, and what they do together."""

    units: tuple[Unit, ...]
    allocation: Allocation
    effect: Effect
    front: tuple[Allocation, ...]
    """The best allocations of all sizes, with predicted divergences"""
    num_samples: int
    num_positions: int
    usage: dict[str, float]
    """Share of a layer's choices that goes to the expert of a unit, by its name; of experts that
    have formats of their own"""

    @property
    def bits_per_weight(self) -> float:
        return self.bits_of(self.allocation)

    def bits_of(self, allocation: Allocation) -> float:
        """Mean bits of a weight, scales and zero points included."""
        return 8 * allocation.size / sum(unit.size for unit in self.units)

    @property
    def layers(self) -> dict[str, LinearFormat]:
        """By the name of each group."""
        pairs = zip(self.units, self.allocation.options, strict=True)
        return {group.name: option.layers for unit, option in pairs for group in unit.groups}


def candidates(quantizer: QuantizerName) -> tuple[LinearFormat, ...]:
    """Formats that a search tries on each group, from 2.3 to 8.3 bits."""
    blocks = [
        LinearFormat(precision, quantizer, block_size=size, symmetric=False)
        for precision in ("q2", "q4")
        for size in (128, 64, 32)
    ]
    return (*blocks, LinearFormat("q8", block_size=128))


def search(
    model: Model,
    goal: Goal,
    formats: Sequence[LinearFormat],
    data: Data,
    experts: Literal["fused", "plain"] = "plain",
) -> Found:
    """The best formats of these for the decoder's layers. ``experts``: as in a recipe.

    Raises:
        QualityError: no choice stays within the divergence.
        MobileVLMError: the budget is too small, or a sample is wrong.
    """
    units = tuple(_units(model.spec, experts))
    _check_budget(goal, units, [_allowed(unit, formats) for unit in units])
    return choose(model, goal, measure(model, formats, data, experts), data)


def measure(
    model: Model,
    formats: Sequence[LinearFormat],
    data: Data,
    experts: Literal["fused", "plain"] = "plain",
) -> Sensitivity:
    """Measure the effect of each format on each part of the decoder; the result serves several
    goals.

    Raises:
        MobileVLMError: a sample is wrong.
    """
    units = tuple(_units(model.spec, experts))
    allowed = [_allowed(unit, formats) for unit in units]
    probe = Probe(model, data.measuring)
    choices = _measure(model, units, allowed, data, probe)
    usage: dict[str, float] = {}
    if model.spec.decoder.experts is not None and experts == "plain":
        uses = expert_uses(model, data.calibration, data.measuring)
        choices = by_usage([unit.name for unit in units], choices, uses)
        usage = {
            unit.name: uses[mlp].expected
            for unit in units
            if (mlp := unit.name.rpartition(".")[0]) in uses
        }
    return Sensitivity(units, choices, probe, usage)


def choose(model: Model, goal: Goal, measured: Sensitivity, data: Data) -> Found:
    """The options that meet the goal, tried together.

    Raises:
        QualityError: no choice stays within the divergence.
        MobileVLMError: the budget is too small.
    """
    units, choices, probe = measured.units, measured.choices, measured.probe
    _check_budget(goal, units, [[option.layers for option in found] for found in choices])
    corners = tuple(front(choices))
    limit = goal.max_kl
    for _ in range(TRIES):
        if limit is None:
            assert goal.bits_per_weight is not None
            size = int(goal.bits_per_weight * sum(unit.size for unit in units) / 8 + 0.5)
            allocation = within_size(choices, size)
        else:
            allocation = within_kl(choices, limit)
        if allocation is None:
            break
        effect = _joint_effect(model, units, allocation, data, probe)
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
        effect = _joint_effect(model, units, allocation, data, probe)
    if goal.max_kl is not None and effect.kl > goal.max_kl:
        raise QualityError(
            f"{goal}: not reached: with the finest candidates ({allocation.size / 1e6:.1f} MB) KL "
            f"is {effect.kl:.4g}: allow more than that"
        )
    return Found(
        units,
        allocation,
        effect,
        corners,
        probe.num_samples,
        probe.num_positions,
        measured.usage,
    )


def _units(spec: ModelSpec, experts: str) -> Iterator[Unit]:
    """Return the units of the decoder, in the order of use."""
    together: dict[str, list[LinearGroup]] = {}
    for group in linear_groups(spec):
        if group.name.startswith("decoder."):
            before, mark, _ = group.name.partition(".experts.")
            key = before if mark and experts == "fused" else group.name
            together.setdefault(key, []).append(group)
    return (Unit(tuple(groups)) for groups in together.values())


def _allowed(unit: Unit, formats: Sequence[LinearFormat]) -> list[LinearFormat]:
    """The formats that a unit can have: the operator for all experts takes whole blocks only.

    Raises:
        MobileVLMError: there is none.
    """
    if len(unit.groups) == 1:
        return list(formats)
    sizes = {group.in_size for group in unit.groups}
    found = [layers for layers in formats if not any(size % layers.block_size for size in sizes)]
    if not found:
        raise MobileVLMError(
            f"{unit.name}: the operator for all experts needs channels that are multiples of a "
            f"candidate's block: found {sorted(sizes)}: search with --experts plain"
        )
    return found


def _check_budget(
    goal: Goal, units: Sequence[Unit], allowed: Sequence[Sequence[LinearFormat]]
) -> None:
    """Refuses a size below the smallest formats before anything is measured."""
    weights = sum(unit.size for unit in units)
    least, most = (
        8 * sum(
            choose(unit.stored_bytes(layers) for layers in formats)
            for unit, formats in zip(units, allowed, strict=True)
        ) / weights
        for choose in (min, max)
    )  # fmt: skip
    if goal.bits_per_weight is not None and goal.bits_per_weight < least:
        raise MobileVLMError(
            f"{goal}: too small: the candidates for this model take {least + 0.005:.2f} to "
            f"{most:.2f} bits per weight"
        )


def _measure(
    model: Model,
    units: Sequence[Unit],
    allowed: Sequence[Sequence[LinearFormat]],
    data: Data,
    probe: Probe,
) -> list[list[Option]]:
    """The options of each unit."""
    pairs = {unit.name: (unit, formats) for unit, formats in zip(units, allowed, strict=True)}
    progress.step("calibration statistics of the inputs of each product")
    hessian = _hessians(model, [layers for formats in allowed for layers in formats], data)
    found: dict[str, list[Option]] = {name: [] for name in pairs}
    start, count = time.perf_counter(), sum(map(len, allowed))

    def changes(group: LinearGroup) -> Iterable[Change]:
        if group.name not in pairs:
            return
        unit, formats = pairs[group.name]
        weights = [stacked(model.weights, member) for member in unit.groups]
        for index, layers in enumerate(formats):
            first, *others = (
                restored(weight, layers, member.name, hessian)
                for member, weight in zip(unit.groups, weights, strict=True)
            )
            yield Change(str(index), first, tuple(zip(unit.groups[1:], others, strict=True)))

    progress.step(f"sensitivity {count} changes of {len(units)} products")
    with progress.track("sensitivity", count) as advance:
        for group, label, effect in probe.effects(changes):
            unit, formats = pairs[group.name]
            layers = formats[int(label)]
            found[unit.name].append(Option(layers, unit.stored_bytes(layers), effect.kl))
            advance(1)
    progress.say(
        f"sensitivity {len(units)} products, {count} changes, {probe.num_samples} samples "
        f"({probe.num_positions} positions), {time.perf_counter() - start:.1f} s"
    )
    return list(found.values())


def _joint_effect(
    model: Model,
    units: Sequence[Unit],
    allocation: Allocation,
    data: Data,
    probe: Probe,
) -> Effect:
    pairs = zip(units, allocation.options, strict=True)
    chosen = {group.name: option.layers for unit, option in pairs for group in unit.groups}
    hessian = _hessians(model, list(chosen.values()), data)

    progress.step(f"search      {len(chosen)} layers in their chosen formats, together")
    with progress.track("search", len(chosen)) as advance:

        def replacement(group: LinearGroup) -> Float32 | None:
            if group.name not in chosen:
                return None
            advance(1)
            return restored(stacked(model.weights, group), chosen[group.name], group.name, hessian)

        return probe.joint_effect(replacement)


def _hessians(model: Model, formats: Sequence[LinearFormat], data: Data) -> HessianOf:
    if all(layers.quantizer != "gptq" for layers in formats):
        return no_hessian
    return hessians(model, data.calibration, "decoder", lambda name: True)

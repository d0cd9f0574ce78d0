"""Cost of fewer bits in an expert, by how often the expert is used.

The effect of an expert's bits is measured on samples, few of which reach a rarely used one. What
is measured is therefore taken as an effect per choice, and multiplied by the expert's share of the
choices in calibration data too; where there are hardly any choices to measure, the effect per
choice of the layer's other experts fills in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mobilevlm.export.calibration.samples import Sample
from mobilevlm.export.experts.usage import checkpoint_usage
from mobilevlm.export.search.bit_allocation import Option
from mobilevlm.model import Model

PRIOR = 16
"""Choices of an average expert of the layer that are counted with an expert's own."""


@dataclass(frozen=True)
class ExpertUse:
    """Number of times that one expert is chosen."""

    measured: int
    """Choices in the samples that effects are measured on"""
    layer_measured: int
    """Choices of all experts of its layer"""
    expected: float
    """Its share of the layer's choices, in calibration data too"""


def expert_uses(
    model: Model, calibration: Sequence[Sample], measuring: Sequence[Sample]
) -> dict[str, ExpertUse]:
    """By the canonical name of each expert (needs torch).

    Raises:
        As ``checkpoint_usage`` (export/experts/usage.py).
    """
    uses = {}
    pairs = zip(
        checkpoint_usage(model, measuring), checkpoint_usage(model, calibration), strict=True
    )
    for measured, more in pairs:
        together = [a + b for a, b in zip(measured.total, more.total, strict=True)]
        for expert, count in enumerate(together):
            name = f"decoder.layers.{measured.layer}.mlp.experts.{expert}"
            of_layer = sum(measured.total)
            uses[name] = ExpertUse(measured.total[expert], of_layer, count / sum(together))
    return uses


def by_usage(
    names: Sequence[str], choices: Sequence[Sequence[Option]], uses: Mapping[str, ExpertUse]
) -> list[list[Option]]:
    """The options of products with these names, those of experts with the divergence that their
    usage lets expect. The options of all experts of a layer are the same."""
    found = [list(options) for options in choices]
    alike: dict[tuple[str, str], list[tuple[int, ExpertUse]]] = {}
    for index, name in enumerate(names):
        expert, _, linear = name.rpartition(".")
        if expert in uses:
            layer = expert.rpartition(".")[0]
            alike.setdefault((layer, linear), []).append((index, uses[expert]))
    for members in alike.values():
        choices_made = members[0][1].layer_measured
        for option in range(len(found[members[0][0]])):
            mean = sum(found[index][option].kl for index, _ in members) / choices_made
            for index, use in members:
                known = found[index][option]
                rate = (known.kl + PRIOR * mean) / (use.measured + PRIOR)  # per choice
                found[index][option] = replace(known, kl=rate * use.expected * choices_made)
    return found

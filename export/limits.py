"""What a recipe allows, against what was measured."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mobilevlm.bundle import StageQuality
from mobilevlm.errors import QualityError
from mobilevlm.export.recipes import Limits

StageKind = Literal["vision", "decoder", "prefill", "end_to_end"]

LIMITED: dict[str, tuple[StageKind, str, Literal["most", "least"]]] = {
    "vision_relative_error": ("vision", "relative_error", "most"),
    "vision_cosine": ("vision", "cosine", "least"),
    "decoder_kl": ("decoder", "kl", "most"),
    "top1_agreement": ("decoder", "top1_agreement", "least"),
    "perplexity_ratio": ("end_to_end", "perplexity_ratio", "most"),
    "greedy_match": ("end_to_end", "greedy_match", "least"),
    "accuracy_loss": ("end_to_end", "accuracy_loss", "most"),
    "prefill_kl": ("prefill", "kl", "most"),
}
"""For each field of Limits the stage and figure, and whether it is the most or least allowed."""

MTMD_ERROR = 2e-3
"""What llama.cpp's vision stage may be off at least: whatever the type, its activations are
tables in float16."""


@dataclass(frozen=True)
class Check:
    """A measured figure and its limit."""

    kind: StageKind
    stage: str
    """As the manifest names it."""
    figure: str
    value: float
    limit: float
    sense: Literal["most", "least"]

    @property
    def passed(self) -> bool:
        """False also where either is no number."""
        compare: Callable[[float, float], bool] = (
            operator.le if self.sense == "most" else operator.ge
        )
        return compare(self.value, self.limit)


def check_limits(
    stages: Mapping[str, StageQuality], limits: Limits, names: Mapping[str, str]
) -> tuple[Check, ...]:
    """All limits whose figures were measured. ``names``: what the stages are called there, see
    :func:`mobilevlm.plan.stage_names`."""
    checks = []
    for field, (kind, figure, sense) in LIMITED.items():
        limit: float | None = getattr(limits, field)
        stage = names.get(kind)
        if limit is None or stage is None or stage not in stages:
            continue
        if figure not in stages[stage].figures:
            continue
        if stage == "vision_gguf" and field == "vision_relative_error":
            limit = max(limit, MTMD_ERROR)
        value = stages[stage].figures[figure]
        checks.append(Check(kind, stage, figure, value, limit, sense))
    return tuple(checks)


def quality_error(
    recipe: str, failed: Sequence[Check], reasons: Mapping[StageKind, str]
) -> QualityError:
    """A line for each missed limit: stage, figure, limit, and the layer that hurts most there.

    ``reasons``: for a stage, which of its layers does what.
    """
    lines = [
        f"quality of recipe {recipe!r}: {check.stage} {check.figure} is {check.value:.4g}, the "
        f"limit is {check.limit:.4g}: {reasons.get(check.kind, '')}choose a finer recipe, or "
        f"change the limit in a recipe file"
        for check in failed
    ]
    return QualityError("\n".join(lines))

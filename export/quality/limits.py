"""Limits of a recipe, against the measured figures."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mobilevlm.bundle import StageQuality
from mobilevlm.errors import MobileVLMError, QualityError
from mobilevlm.recipe import Limits, Recipe

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

SUITE_LIMIT = "accuracy_loss"
"""The limit that a suite of questions measures, which no export runs."""
_MEASURED_BY = dict.fromkeys(LIMITED, "give samples with images and answers (--data)") | {
    SUITE_LIMIT: "add --suite scenes"
}
"""Remedy that makes a verification measure the figure of a limit."""

MTMD_ERROR = 2e-3
"""Least limit for the error of llama.cpp's vision stage: for every type, its activations are tables
in float16."""


def with_limits(recipe: Recipe, given: Mapping[str, float]) -> Recipe:
    """Return the recipe with these limits instead of its own.

    Raises:
        MobileVLMError: a name or a value that is no limit.
    """
    for name, value in given.items():
        if name not in LIMITED:
            raise MobileVLMError(f"limit {name!r:.80} is not known: expected {', '.join(LIMITED)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e9:
            raise MobileVLMError(f"limit {name} is {value!r:.80}, expected a number from 0 on")
    values = {name: float(value) for name, value in given.items()}
    return replace(recipe, limits=replace(recipe.limits, **values))


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
        stage = _stage_name(names, kind)
        if limit is None or stage is None or stage not in stages:
            continue
        if figure not in stages[stage].figures:
            continue
        if stage == "vision_gguf" and field == "vision_relative_error":
            limit = max(limit, MTMD_ERROR)
        value = stages[stage].figures[figure]
        checks.append(Check(kind, stage, figure, value, limit, sense))
    return tuple(checks)


def unchecked_limits(
    limits: Limits, checks: Sequence[Check], names: Mapping[str, str]
) -> list[str]:
    """Return the limits of stages that there are whose figures were not measured; ``names`` as of
    :func:`check_limits`."""
    found = {(check.kind, check.figure) for check in checks}
    return [
        field
        for field, (kind, figure, _) in LIMITED.items()
        if getattr(limits, field) is not None
        and _stage_name(names, kind) is not None
        and (kind, figure) not in found
    ]


def _stage_name(names: Mapping[str, str], kind: StageKind) -> str | None:
    """Name of a stage in the manifest; limits of the vision stage are those of an audio stage."""
    return names.get("audio" if kind == "vision" and "audio" in names else kind)


def unchecked_error(unchecked: Sequence[str]) -> QualityError:
    """Return what says, a line each, which limits were not checked."""
    lines = [
        f"limit {name} was not checked, and --require-measured asks for it: {_MEASURED_BY[name]}"
        for name in unchecked
    ]
    return QualityError("\n".join(lines))


def unmeasured_error(note: str, unchecked: Collection[str]) -> QualityError:
    """Return what says that an export left something unmeasured: ``note`` says what and why,
    ``unchecked`` are limits."""
    reasons = [note] if note else []
    if unchecked:
        reasons.append(f"limits not checked: {', '.join(unchecked)}")
    return QualityError(
        f"quality was not measured ({'; '.join(reasons)}), and --require-measured asks for it: "
        f"export where it can be, or leave --require-measured out"
    )


def require_checks(names: Iterable[str], checks: Sequence[Check], note: str) -> None:
    """Raise QualityError unless each of these limits, which a person gave, was checked. ``note``:
    why something was not measured."""
    found = {(check.kind, check.figure) for check in checks}
    for name in names:
        kind, figure, _ = LIMITED[name]
        if (kind, figure) not in found:
            why = note or "an export does not measure it: see 'mobilevlm verify' and 'eval'"
            raise QualityError(f"limit {name} was not checked ({why}): leave it out")


def quality_error(
    recipe: str, failed: Sequence[Check], reasons: Mapping[StageKind, str]
) -> QualityError:
    """A line for each missed limit: stage, figure, limit, and the layer that hurts most there.

    ``reasons``: for a stage, which of its layers does what.
    """
    lines = [
        f"quality of recipe {recipe!r}: {check.stage} {check.figure} is {check.value:.4g}, the "
        f"limit is {check.limit:.4g}: {reasons.get(check.kind, '')}choose a finer recipe, or "
        f"another limit (--limit, or a recipe file that extends this one)"
        for check in failed
    ]
    return QualityError("\n".join(lines))

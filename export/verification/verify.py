"""A bundle beside its checkpoint: figures, limits, layers, the worst answers (needs torch)."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from mobilevlm.bundle import Bundle, StageQuality, open_bundle
from mobilevlm.checkpoint import Weights
from mobilevlm.console import progress
from mobilevlm.errors import MobileVLMError, QualityError, require
from mobilevlm.export.calibration.samples import SCENES, held_out_samples
from mobilevlm.export.calibration.statistics import check_decoder_only
from mobilevlm.export.quality.artifact_weights import artifact_weights, exact_weights
from mobilevlm.export.quality.limits import (
    Check,
    check_limits,
    quality_error,
    unchecked_error,
    unchecked_limits,
)
from mobilevlm.export.quality.metrics import Float64
from mobilevlm.export.quality.passages import missing_text, text_samples
from mobilevlm.families import open_checkpoint
from mobilevlm.model import Model, OpenOptions, open_options
from mobilevlm.nano.evaluate import SuiteResult, evaluate_vlm
from mobilevlm.nano.suite import evaluation_set
from mobilevlm.plain_types import to_dict
from mobilevlm.plan import choose_engine, stage_names
from mobilevlm.recipe import Recipe
from mobilevlm.runtime.builtin_bundle import bundle_path

try:
    from mobilevlm.export.quality.layer_effects import (
        LayerEffect,
        StateError,
        layer_effects,
        state_errors,
        weight_errors,
        worst_layers,
    )
    from mobilevlm.export.quality.measure import (
        Measurement,
        SampleFigures,
        greedy_text,
        layer_samples,
        measure,
        reference_answers,
    )
except ImportError as error:
    raise require(error.name or "torch", "reference", "verifying") from None

LONGEST_ANSWER = 32
"""Tokens of a greedy answer."""
LAYER_SAMPLES = 8
"""Samples that single layers are measured on."""
WORST = 6
FOREIGN = 0.8
"""Weights further off than this, every layer of them, were not made from the checkpoint: two bits
are 0.6 off at most, and other weights of the same size 1.4."""


@dataclass(frozen=True)
class SuiteComparison:
    """Right answers of the bundle and of the reference to the same questions."""

    bundle: SuiteResult
    reference: SuiteResult


@dataclass(frozen=True)
class WorstSample:
    """A sample where the bundle is far from the reference."""

    figures: SampleFigures
    found: str
    """The bundle's greedy answer"""
    expected: str
    """The reference's"""
    kl: float
    """Mean where the model answers"""


@dataclass(frozen=True)
class Verification:
    """Result of a verification."""

    bundle: Bundle
    engine: str
    recipe: Recipe
    data: str
    stages: dict[str, StageQuality]
    checks: tuple[Check, ...]
    error: QualityError | None
    """Says which limits were missed or not checked, a line each"""
    kl: Float64
    """Divergence at each token of the answers, as a person meets it: with the bundle's own visual
    tokens"""
    num_samples: int
    layers: tuple[LayerEffect, ...] = ()
    states: tuple[StateError, ...] = ()
    worst: tuple[WorstSample, ...] = ()
    suite: SuiteComparison | None = None
    checkpoint: str = ""
    """Path or name as it was given"""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types. docs/explanation/quality.md specifies them."""
        return {
            "bundle": str(self.bundle.folder),
            "model": self.bundle.manifest.spec.name,
            "recipe": self.recipe.name,
            "engine": self.engine,
            "data": self.data,
            "samples": self.num_samples,
            "passed": self.error is None,
            "stages": {name: stage.figures for name, stage in self.stages.items()},
            "limits": [
                {
                    "stage": check.stage,
                    "figure": check.figure,
                    "value": check.value,
                    "limit": check.limit,
                    "sense": check.sense,
                    "passed": check.passed,
                }
                for check in self.checks
            ],
            "missed": str(self.error).splitlines() if self.error else [],
            "layers": [
                {
                    "layer": item.label,
                    "weight_error": item.weight_error,
                    "alone": to_dict(item.effect) if item.effect else None,
                }
                for item in self.layers
            ],
            "states": [to_dict(item) for item in self.states],
            "suite": {
                "bundle": self.suite.bundle.to_dict(),
                "reference": self.suite.reference.to_dict(),
            }
            if self.suite
            else None,
        }


def verify(
    bundle: str | PathLike[str],
    checkpoint: str | PathLike[str],
    *,
    data: str = SCENES,
    engine: str = "auto",
    questions: int = 0,
    threads: int | None = None,
    vision_tower: str | PathLike[str] | None = None,
    conversation: str | None = None,
    variant: str | None = None,
    base: str | PathLike[str] | None = None,
    layers: bool = False,
    require_measured: bool = False,
) -> Verification:
    """Compares a bundle with the float32 reference of the checkpoint that it was made from.

    ``data``: ``scenes``, or a JSONL file (export/calibration/samples.py). ``questions``: so many of
    the suite ``scenes`` are asked too; the reference is then a float32 export run by ONNX Runtime.
    ``base``: of an adapter, as the export had it. ``layers``: measure each layer alone, and the
    worst answers of the reference itself. A missed limit of the bundle's recipe is no exception:
    see ``error``. ``require_measured``: a limit whose figure was not measured is missed too.

    Raises:
        BundleError, CheckpointError: one of them cannot be read.
        MobileVLMError: the bundle is of another model, or a sample is wrong.
    """
    ready = open_bundle(bundle_path(Path(bundle), engine))
    engine = choose_engine(ready, engine)
    variant = variant or ready.manifest.spec.variant or None
    options = open_options(vision_tower, conversation, variant, base)
    model = open_checkpoint(Path(checkpoint), options)
    check_decoder_only(model.spec, "verify")
    _check_spec(ready, model)
    stored = artifact_weights(model, ready, engine)
    exact = dataclasses.replace(model, weights=exact_weights(model, ready, engine))
    _check_weights(ready, exact, stored)
    recipe = ready.manifest.recipe
    samples = held_out_samples(data, model.spec.inputs)
    texts = text_samples(model, LONGEST_ANSWER) if data == SCENES else []
    with progress.track("samples", len(samples) + len(texts)) as advance:
        measured = measure(model, ready, engine, samples, LONGEST_ANSWER, threads, advance, texts)
    for said in (missing_text(model, texts) if data == SCENES else "", measured.note):
        if said:
            progress.say(f"quality     {said}")
    suite = _run_suite(ready, model, Path(checkpoint), options, engine, questions, threads)
    names = stage_names(ready, engine)
    stages = _with_accuracy(measured.stages, suite, names["end_to_end"])
    checks = check_limits(stages, recipe.limits, names)
    failed = [check for check in checks if not check.passed]
    effects: list[LayerEffect] = []
    states: list[StateError] = []
    if failed or layers:
        progress.say("layers      each one's weights put alone into the reference")
        probed = layer_samples(model, measured, LAYER_SAMPLES)
        effects = layer_effects(exact, stored, probed, everything=layers)
        states = state_errors(exact, stored, probed) if layers else []
    errors = [quality_error(recipe.name, failed, worst_layers(effects))] if failed else []
    unchecked = unchecked_limits(recipe.limits, checks, names) if require_measured else []
    errors += [unchecked_error(unchecked)] if unchecked else []
    error = QualityError("\n".join(map(str, errors))) if errors else None
    return Verification(
        ready,
        engine,
        recipe,
        data if data == SCENES else Path(data).name,
        stages,
        checks,
        error,
        np.concatenate([(item.whole or item.decoder).kl for item in measured.samples]),
        len(measured.samples),
        tuple(effects),
        tuple(states),
        tuple(_worst(model, measured)) if layers else (),
        suite,
        str(checkpoint),
    )


def _check_spec(bundle: Bundle, model: Model) -> None:
    """Raises MobileVLMError: the model's shapes are not the bundle's."""
    for part in ("inputs", "decoder", "outputs", "conversation"):
        ours, theirs = (to_dict(spec)[part] for spec in (bundle.manifest.spec, model.spec))
        for field, found, expected in _differences(ours, theirs, part):
            raise MobileVLMError(
                f"{bundle.folder} is not a bundle of {model.folder}: {field} is "
                f"{str(found)[:60]!r} in the bundle, {str(expected)[:60]!r} in the checkpoint: "
                f"give the checkpoint that it was exported from, with the same options"
            )


def _differences(ours: Any, theirs: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield the place and both values of each difference between parts of two specs."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in {**ours, **theirs}:
            yield from _differences(ours.get(key), theirs.get(key), f"{where}.{key}")
    elif ours != theirs:
        yield where, ours, theirs


def _check_weights(bundle: Bundle, model: Model, stored: Weights) -> None:
    """Raises MobileVLMError: the weights are not the bundle's."""
    errors = weight_errors(model.weights, stored, model.spec)
    if min(errors.values()) > FOREIGN:
        raise MobileVLMError(
            f"{bundle.folder} is not a bundle of {model.folder}: the shapes agree, the weights of "
            f"no layer do: give the checkpoint that it was exported from"
        )


def _run_suite(
    bundle: Bundle,
    model: Model,
    checkpoint: Path,
    options: OpenOptions,
    engine: str,
    questions: int,
    threads: int | None,
) -> SuiteComparison | None:
    if not questions:
        return None
    from mobilevlm.export.pipeline import export
    from mobilevlm.runtime.open_model import open_model

    examples = evaluation_set(questions)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / model.spec.name
        export(
            checkpoint,
            path,
            recipe="fp32",
            measure=False,
            vision_tower=options.vision_tower,
            conversation=options.conversation,
            variant=options.variant,
            base=options.base,
        )
        results = []
        for ready, runs in ((bundle, engine), (open_bundle(path), "onnx")):
            with (
                open_model(ready, runs, threads) as vlm,
                progress.track_share("questions") as show,
            ):
                results.append(evaluate_vlm(vlm, examples, blind=False, progress=show)[0])
    return SuiteComparison(*results)


def _with_accuracy(
    stages: dict[str, StageQuality], suite: SuiteComparison | None, name: str
) -> dict[str, StageQuality]:
    if suite is None:
        return stages
    found, exact = suite.bundle.overall.accuracy, suite.reference.overall.accuracy
    figures = {
        "accuracy": round(found, 4),
        "reference_accuracy": round(exact, 4),
        "accuracy_loss": round(exact - found, 4),
    }
    return {**stages, name: StageQuality({**stages[name].figures, **figures})}


def _worst(model: Model, measured: Measurement) -> Sequence[WorstSample]:
    """Those that leave the reference's answer first; then those of the largest mean divergence."""

    def kl(item: SampleFigures) -> float:
        return float((item.whole or item.decoder).kl.mean())

    def order(item: SampleFigures) -> tuple[float, float]:
        return 0.0 if item.match is None else item.match, -kl(item)

    answered = [item for item in measured.samples if item.match is not None]
    chosen = sorted(answered, key=order)[:WORST]
    answers = reference_answers(model, chosen, LONGEST_ANSWER)
    return [
        WorstSample(item, greedy_text(model, item.greedy), greedy_text(model, tokens), kl(item))
        for item, tokens in zip(chosen, answers, strict=True)
    ]

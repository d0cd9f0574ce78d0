"""The gate of an export: what it made is measured against the float32 reference, and must stay
within the recipe's limits."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection

from mobilevlm.bundle import (
    TOKENIZER,
    Artifact,
    Bundle,
    FileEntry,
    Manifest,
    Quality,
    StageQuality,
)
from mobilevlm.console import progress
from mobilevlm.errors import MissingExtraError
from mobilevlm.export.quality.limits import (
    SUITE_LIMIT,
    Check,
    check_limits,
    quality_error,
    require_checks,
    unchecked_limits,
    unmeasured_error,
)
from mobilevlm.export.quality.passages import longest_text, missing_text, text_samples
from mobilevlm.export.workspace.workspace import Workspace
from mobilevlm.linear_groups import linear_groups
from mobilevlm.model import Model
from mobilevlm.plan import Plan, choose_engine, lighter_plans, stage_names
from mobilevlm.recipe import Recipe
from mobilevlm.runtime.machine import int8_weight_bits
from mobilevlm.runtime.memory.estimate import estimate

MEMORY_RATIO, MEMORY_BASE = 1.5, 1e9
"""An export may use this many times the checkpoint's bytes, and so many bytes more."""
MEMORY_LEAST = 2e9
"""Bytes that any export may use: libraries alone take half of them."""
MEMORY_LIBRARIES = 0.45e9
"""Memory of torch and the export's own libraries before they hold any weights."""
LAYER_SAMPLES = 3
"""Samples that single layers are tried on after a missed limit"""


def measure_quality(
    model: Model,
    recipe: Recipe,
    work: Workspace,
    draft: Manifest,
    wanted: bool,
    required: Collection[str],
    everything: bool,
) -> Quality:
    """Figures against the float32 reference, or the reason why there are none. ``required``: limits
    that a person gave. ``everything``: nothing that an export measures may be left out."""
    checked: list[Check] = []
    unchecked: list[str] = []
    left_out: list[str] = []
    stages: dict[str, StageQuality] = {}
    obstacles: dict[str, str] = {}
    for form in formats_of(draft.artifacts):
        artifacts = tuple(part for part in draft.artifacts if part.format == form)
        encoder = model.spec.encoder_stage
        if model.spec.encoded is not None and all(part.stage != encoder for part in artifacts):
            # llama.cpp cannot see: hybrid
            seeing = (part for part in draft.artifacts if part.stage == encoder)
            artifacts = (*artifacts, *seeing)
        part = dataclasses.replace(draft, artifacts=artifacts)
        obstacle = _obstacle(form) if wanted else "not wanted"
        plan, reason = (None, obstacle) if obstacle else run_plan(model, work, part)
        if plan is None:
            obstacles[form] = reason
            continue
        from mobilevlm.export.quality.artifact_weights import artifact_weights, exact_weights
        from mobilevlm.export.quality.layer_effects import layer_effects, worst_layers
        from mobilevlm.export.quality.measure import (
            GREEDY_TOKENS,
            layer_samples,
            measure,
            synthetic_samples,
        )

        start = time.perf_counter()
        bundle, engine = Bundle(work.folder, part, digest=""), plan.engine
        samples = synthetic_samples(model.spec)
        texts = text_samples(model, GREEDY_TOKENS)
        if not samples and not texts:
            obstacles[form] = missing_text(model, texts)
            continue
        with progress.track("quality", len(samples) + len(texts)) as advance:
            measured = measure(
                model, bundle, engine, samples, advance=advance, texts=texts, plan=plan
            )
        for said in (missing_text(model, texts), measured.note):
            if said:
                progress.say(f"quality     {said}")
                left_out.append(f"text: {said}")
        for name, stage in measured.stages.items():
            figures = ", ".join(f"{key} {value:.4g}" for key, value in stage.figures.items())
            progress.say(f"quality     {name}: {figures}")
        progress.say(f"quality     measured in {time.perf_counter() - start:.1f} s")
        names = stage_names(bundle, engine)
        checks = check_limits(measured.stages, recipe.limits, names)
        checked += checks
        unchecked += unchecked_limits(recipe.limits, checks, names)
        failed = [check for check in checks if not check.passed]
        if failed:
            if model.spec.decoder.encoder_layers:
                raise quality_error(recipe.name, failed, {})
            stored = artifact_weights(model, bundle, engine)
            exact = dataclasses.replace(model, weights=exact_weights(model, bundle, engine))
            samples = layer_samples(model, measured, LAYER_SAMPLES)
            effects = layer_effects(exact, stored, samples)
            raise quality_error(recipe.name, failed, worst_layers(effects))
        stages |= measured.stages
    obstacle = _note(obstacles, alike=not stages)
    note = "; ".join(dict.fromkeys([obstacle, *left_out] if obstacle else left_out))
    require_checks(required, checked, note)
    if obstacle:
        progress.say(f"quality     not measured ({obstacle})")
    measurable = [name for name in dict.fromkeys(unchecked) if name != SUITE_LIMIT]
    if everything and (note or measurable):
        raise unmeasured_error(note, measurable)
    return Quality(bool(stages), note, stages)


def _note(obstacles: dict[str, str], alike: bool) -> str:
    """Why formats were not measured. ``alike``: none was, so that one reason may stand for all."""
    reasons = list(dict.fromkeys(obstacles.values()))
    if alike and len(reasons) == 1:
        return reasons[0]
    return "; ".join(f"{form}: {reason}" for form, reason in obstacles.items())


def _obstacle(form: str) -> str:
    """Return which package is missing to measure artifacts of a format; empty if none."""
    try:
        import torch  # noqa: F401

        if form == "gguf":
            from mobilevlm.runtime.engines.llama.native import llama_library

            llama_library()
    except ImportError:
        return "torch is not installed: pip install 'mobilevlm-edge[reference]'"
    except MissingExtraError as error:
        return str(error)
    return ""


def run_plan(model: Model, work: Workspace, draft: Manifest) -> tuple[Plan | None, str]:
    """Return the plan by which these artifacts, all of one format, can be run during an export of
    this checkpoint, the fastest that the memory of an export has room for; or the reason why there
    is none."""
    from mobilevlm.runtime.engines.onnx.engine import EXACT_SINCE, exact_products

    eight = any((part.weight_bits, part.format) == (8, "onnx") for part in draft.artifacts)
    if eight and int8_weight_bits() == 7 and not exact_products():
        version = ".".join(map(str, EXACT_SINCE))
        return None, f"8-bit weights saturate on this processor before onnxruntime {version}"
    names = {TOKENIZER, *(name for part in draft.artifacts for name in part.files)}
    sizes = {name: FileEntry(work.path(name).stat().st_size, "") for name in names}
    sized = dataclasses.replace(draft, files=sizes)
    allowed = max(MEMORY_RATIO * model.weights.stored_bytes + MEMORY_BASE, MEMORY_LEAST)
    before = MEMORY_LIBRARIES + _reference_bytes(model)
    engine = choose_engine(Bundle(work.folder, draft, digest=""), "auto")
    needed = {plan: before + estimate(sized, plan).peak for plan in lighter_plans(Plan(engine))}
    for plan, size in needed.items():
        if size <= allowed:
            return plan, ""
    return None, (
        f"running it takes {min(needed.values()) / 1e9:.1f} GB, the export of this checkpoint may "
        f"use {allowed / 1e9:.1f} GB"
    )


def _reference_bytes(model: Model) -> float:
    """Return what the reference holds of its weights at a time, and the logits of an answer from
    both sides."""
    decoder = model.spec.decoder
    layer = max(group.size for group in linear_groups(model.spec))
    head = decoder.vocab_size * decoder.hidden_size
    return 4.0 * (max(head, 3 * layer) + 2 * longest_text(model) * decoder.vocab_size)


def formats_of(artifacts: tuple[Artifact, ...]) -> list[str]:
    """Their formats, each once."""
    return list(dict.fromkeys(artifact.format for artifact in artifacts))

"""The gate of an export: what it made is measured against the float32 reference, and must stay
within the recipe's limits."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Sequence

from mobilevlm.bundle import Artifact, Bundle, Manifest, Quality, StageQuality
from mobilevlm.console import progress
from mobilevlm.errors import MissingExtraError
from mobilevlm.export.quality.limits import Check, check_limits, quality_error, require_checks
from mobilevlm.export.workspace.workspace import Workspace
from mobilevlm.model import Model
from mobilevlm.plan import choose_engine, stage_names
from mobilevlm.recipe import Recipe
from mobilevlm.runtime.machine import int8_weight_bits

MEMORY_RATIO, MEMORY_BASE = 1.5, 1e9
"""An export may use this many times the checkpoint's bytes, and so many bytes more."""
MEMORY_LIBRARIES = 0.5e9
"""Memory of torch and onnxruntime before they hold any weights."""
RESIDENT = {"fp32": 2.0, "fp16": 4.0, "qdq8": 2.3, "qdq16": 2.3}
"""At most so many times a weight file is resident while it is measured; others 1.3 times."""
RESIDENT_GGUF = 2.0


def measure_quality(
    model: Model,
    recipe: Recipe,
    work: Workspace,
    draft: Manifest,
    wanted: bool,
    required: Collection[str],
) -> Quality:
    """Figures against the float32 reference, or the reason why there are none. ``required``: limits
    that a person gave."""
    checked: list[Check] = []
    stages: dict[str, StageQuality] = {}
    obstacles: dict[str, str] = {}
    for form in formats_of(draft.artifacts):
        artifacts = tuple(part for part in draft.artifacts if part.format == form)
        if all(part.stage != "vision" for part in artifacts):  # llama.cpp cannot see: hybrid
            seeing = (part for part in draft.artifacts if part.stage == "vision")
            artifacts = (*artifacts, *seeing)
        obstacle = _obstacle(model, work, artifacts) if wanted else "not wanted"
        if obstacle:
            obstacles[form] = obstacle
            continue
        from mobilevlm.export.quality.artifact_weights import artifact_weights, exact_weights
        from mobilevlm.export.quality.layer_effects import layer_effects, worst_layers
        from mobilevlm.export.quality.measure import measure, synthetic_samples, with_own_answers

        start = time.perf_counter()
        bundle = Bundle(work.folder, dataclasses.replace(draft, artifacts=artifacts), digest="")
        engine = choose_engine(bundle, "auto")
        samples = synthetic_samples(model.spec.image.square.size)
        with progress.track("quality", len(samples)) as advance:
            measured = measure(model, bundle, engine, samples, advance=advance)
        for name, stage in measured.stages.items():
            figures = ", ".join(f"{key} {value:.4g}" for key, value in stage.figures.items())
            progress.say(f"quality     {name}: {figures}")
        progress.say(f"quality     measured in {time.perf_counter() - start:.1f} s")
        checks = check_limits(measured.stages, recipe.limits, stage_names(bundle, engine))
        checked += checks
        failed = [check for check in checks if not check.passed]
        if failed:
            if model.spec.decoder.encoder_layers:
                raise quality_error(recipe.name, failed, {})
            stored = artifact_weights(model, bundle, engine)
            exact = dataclasses.replace(model, weights=exact_weights(model, bundle, engine))
            effects = layer_effects(exact, stored, with_own_answers(model, measured))
            raise quality_error(recipe.name, failed, worst_layers(effects))
        stages |= measured.stages
    note = _note(obstacles, alike=not stages)
    require_checks(required, checked, note)
    if note:
        progress.say(f"quality     not measured ({note})")
    return Quality(bool(stages), note, stages)


def _note(obstacles: dict[str, str], alike: bool) -> str:
    """Why formats were not measured. ``alike``: none was, so that one reason may stand for all."""
    reasons = list(dict.fromkeys(obstacles.values()))
    if alike and len(reasons) == 1:
        return reasons[0]
    return "; ".join(f"{form}: {reason}" for form, reason in obstacles.items())


def _obstacle(model: Model, work: Workspace, artifacts: Sequence[Artifact]) -> str:
    """Why the quality of these, all of one format, cannot be measured here; empty when it can."""
    try:
        import torch  # noqa: F401

        if artifacts[0].format == "gguf":
            from mobilevlm.runtime.engines.llama.native import llama_library

            llama_library()
    except ImportError:
        return "torch is not installed: pip install 'mobilevlm-edge[reference]'"
    except MissingExtraError as error:
        return str(error)
    return run_obstacle(model, work, artifacts)


def run_obstacle(model: Model, work: Workspace, artifacts: Sequence[Artifact]) -> str:
    """Return why these cannot be run during an export of this checkpoint; empty when they can."""
    from mobilevlm.runtime.engines.onnx.engine import EXACT_SINCE, exact_products

    eight = any((part.weight_bits, part.format) == (8, "onnx") for part in artifacts)
    if eight and int8_weight_bits() == 7 and not exact_products():
        version = ".".join(map(str, EXACT_SINCE))
        return f"8-bit weights saturate on this processor before onnxruntime {version}"
    needed = MEMORY_LIBRARIES + sum(
        (RESIDENT_GGUF if artifact.format == "gguf" else RESIDENT.get(artifact.precision, 1.3))
        * work.path(name).stat().st_size
        for artifact in artifacts
        for name in artifact.files
    )
    allowed = MEMORY_RATIO * model.weights.stored_bytes + MEMORY_BASE
    if needed > allowed:
        return (
            f"running it takes {needed / 1e9:.1f} GB, the export of this checkpoint may use "
            f"{allowed / 1e9:.1f} GB"
        )
    return ""


def formats_of(artifacts: tuple[Artifact, ...]) -> list[str]:
    """Their formats, each once."""
    return list(dict.fromkeys(artifact.format for artifact in artifacts))

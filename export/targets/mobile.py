"""Checks and additions of an export to a target with an accelerator behind ONNX Runtime (Core ML,
XNNPACK): how much of each graph it takes, .ort files, the list of operators for a reduced
build, and for Core ML a package of the vision stage."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata

from mobilevlm.bundle import Artifact, Coverage, Manifest, ReducedBuild
from mobilevlm.console import progress
from mobilevlm.errors import TargetError
from mobilevlm.export.targets import ProviderGoal, Target
from mobilevlm.export.targets.coverage import cover
from mobilevlm.export.targets.ort_format import CONFIG, check_size, convert
from mobilevlm.export.targets.providers import find_provider
from mobilevlm.export.workspace.workspace import Workspace
from mobilevlm.model import Model

FOLDER = "ort"


def for_accelerator(target: Target, work: Workspace, draft: Manifest, model: Model) -> Manifest:
    """Adds all of it to the manifest; as it was where the target has no accelerator.

    Raises:
        TargetError: the accelerator takes less than the target asks for, or a graph is too large
            for an .ort file.
    """
    if target.provider is None:
        return draft
    stages = [item for item in draft.artifacts if item.stage != "embeddings"]
    for artifact in stages:
        size = sum(work.path(name).stat().st_size for name in artifact.files)
        check_size(f"the {artifact.stage} stage", size, target.name)
    goal = target.provider
    coverage = [
        part for artifact in stages if artifact.stage in goal.least
        for part in _coverage(artifact, work, goal)
    ]  # fmt: skip
    _check_coverage(target, goal, coverage)
    draft = _with_ort_files(work, dataclasses.replace(draft, coverage=tuple(coverage)), stages)
    if target.package:
        from mobilevlm.export.targets.coreml_package import package_vision

        draft = package_vision(work, draft, model)
    return draft


def _coverage(artifact: Artifact, work: Workspace, goal: ProviderGoal) -> list[Coverage]:
    provider, found = find_provider(goal.name), []
    for name in _graphs(artifact):
        with progress.track("operators", 1) as advance:
            part = cover(work.path(name), provider)
            advance(1)
        found.append(
            Coverage(artifact.stage, name, goal.name, part.nodes, part.taken, part.parts, part.left,
                     part.multiplications, part.checked)
        )  # fmt: skip
        left = ", ".join(f"{count} {reason}" for reason, count in part.left.items()) or "nothing"
        seen = "" if part.checked is None else f" ({part.checked} by onnxruntime's checker)"
        progress.say(
            f"operators   {name}: {provider.title} takes {part.taken} of {part.nodes}{seen}, "
            f"{part.multiplications:.0%} of the multiplications, in {part.parts} "
            f"part{'' if part.parts == 1 else 's'}; left to the CPU: {left}"
        )
    return found


def _check_coverage(target: Target, goal: ProviderGoal, coverage: list[Coverage]) -> None:
    """Raises TargetError: a graph goes to the accelerator in less than the share wanted."""
    title = find_provider(goal.name).title
    for part in coverage:
        share, least = part.taken / part.nodes, goal.least[part.stage]
        if share < least:
            most = sorted(part.left, key=lambda reason: -part.left[reason])
            named = ", ".join(f"{reason} ({part.left[reason]})" for reason in most[:3])
            more = f" and {len(most) - 3} more" if len(most) > 3 else ""
            raise TargetError(
                f"target {target.name}: {title} takes {part.taken} of {part.nodes} operators of "
                f"{part.graph} ({share:.1%}), the target asks for {least:.0%}: it leaves "
                f"{named}{more}"
            )


def _with_ort_files(work: Workspace, draft: Manifest, stages: list[Artifact]) -> Manifest:
    graphs = {
        work.path(name): tuple(work.path(data) for data in artifact.files if data.endswith("_data"))
        for artifact in stages
        for name in _graphs(artifact)
    }
    with progress.track("ort", 1) as advance:
        needed = convert(graphs, work.path(FOLDER))
        advance(1)
    made, version = [], importlib.metadata.version("onnxruntime")
    for artifact in stages:
        path, *data = (f"{FOLDER}/{work.path(name).stem}.ort" for name in _graphs(artifact))
        key = hashlib.sha256(f"ort {version} {artifact.key}".encode()).hexdigest()
        ready = dataclasses.replace(artifact, format="ort", path=path, data=tuple(data), key=key)
        made.append(ready)
        size = sum(work.path(name).stat().st_size for name in (path, *data))
        progress.say(f"ort         {path}  {size / 1e6:.1f} MB")
    progress.say(
        f"ort         {FOLDER}/{CONFIG}  {needed.count} operators, a reduced build has about "
        f"{needed.estimated_mb:.1f} MB (estimated)"
    )
    build = ReducedBuild(f"{FOLDER}/{CONFIG}", needed.count, needed.estimated_mb)
    artifacts, tools = (*draft.artifacts, *made), {**draft.tools, "onnxruntime": version}
    return dataclasses.replace(draft, artifacts=artifacts, reduced_build=build, tools=tools)


def _graphs(artifact: Artifact) -> list[str]:
    return [name for name in artifact.files if name.endswith(".onnx")]

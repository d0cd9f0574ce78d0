"""Checks of an export against its target: memory, and for an NPU that its compiler takes all."""

from __future__ import annotations

import dataclasses

from mobilevlm.bundle import Compiled, Manifest
from mobilevlm.console import progress
from mobilevlm.errors import TargetError
from mobilevlm.export.targets import Target
from mobilevlm.export.targets.htp import check_compiler, compile_graphs
from mobilevlm.export.workspace.workspace import Workspace
from mobilevlm.plan import Plan, memory_settings
from mobilevlm.runtime.memory.estimate import estimate, estimate_web_mb

BINARY = "_qnn.bin"
"""Suffix that the compiler adds to the name of a graph."""


def check_tools(target: Target) -> None:
    """Raises MissingExtraError: the target's compiler is not installed. To be known before work."""
    if target.htp is not None:
        check_compiler(f"the target {target.name}")


def compiled_for(target: Target, work: Workspace, draft: Manifest) -> Manifest:
    """Adds the target, and what its compiler makes of the graphs.

    Raises:
        TargetError: the compiler does not take all of them.
    """
    draft = dataclasses.replace(draft, target=target.name)
    if target.htp is None:
        return draft
    folder = f"npu/{target.name.rpartition('-')[2]}"
    made = []
    if target.caveat:
        progress.say(f"caution     {target.name}: {target.caveat}")
    for artifact in draft.artifacts:
        if artifact.stage == "embeddings":
            continue
        graphs = [work.path(name) for name in artifact.files if name.endswith(".onnx")]
        with progress.track("compiling", 1) as advance:
            share = target.share_weights and len(graphs) > 1
            coverage = compile_graphs(graphs, work.path(folder), target.htp, share)
            advance(1)
        binaries = [f"{path.stem}{BINARY}" for path in graphs[: 1 if share else None]]
        files = tuple(f"{folder}/{name}" for name in (*(path.name for path in graphs), *binaries))
        size = sum(work.path(name).stat().st_size for name in files)
        nodes = sum(item.nodes for item in coverage)
        made.append(Compiled(artifact.stage, files, nodes))
        progress.say(
            f"compiled    {files[-1]}  {size / 1e6:.1f} MB, {nodes} operators, none on the CPU, "
            f"{sum(item.seconds for item in coverage):.1f} s"
        )
    return dataclasses.replace(draft, compiled=tuple(made))


def check_memory(target: Target, manifest: Manifest) -> None:
    """Raises TargetError: the model takes more memory than the target has for it, whatever the
    setting that ``load`` chooses under a limit."""
    engine = "npu" if "npu" in target.formats else "onnx"
    positions = target.positions or manifest.spec.decoder.context_length
    for mode in ("fast",) if target.browser else memory_settings(engine):
        if target.browser:
            needed = estimate_web_mb(manifest)
        else:
            needed = estimate(manifest, Plan(engine, memory=mode), positions).steady / 1e6
        if needed <= target.memory_mb:
            how = "" if mode == "fast" else f", with the setting {mode!r}"
            progress.say(f"memory      about {needed:.0f} MB of {target.memory_mb:.0f} MB{how}")
            return
    raise TargetError(
        f"target {target.name}: running the bundle takes {needed:.0f} MB, the target has "
        f"{target.memory_mb:.0f} MB: choose a smaller model"
    )

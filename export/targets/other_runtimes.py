"""Additions of an export so that another runtime runs the bundle: graphs with its inputs and
outputs, which share our files of weights, and its configuration files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from mobilevlm.bundle import Artifact, ForOtherRuntime, Manifest
from mobilevlm.console import progress
from mobilevlm.errors import TargetError
from mobilevlm.export.formats.npu import with_fewer_tiles
from mobilevlm.export.targets import Target, genai
from mobilevlm.export.targets import transformers_js as js
from mobilevlm.export.targets.obstacles import check_page
from mobilevlm.export.workspace.workspace import Workspace, note_finished
from mobilevlm.input_spec import AnyResolution
from mobilevlm.model import Model
from mobilevlm.spec import ModelSpec

OWN = "mobilevlm_"
"""Begins the names of our graphs where the other runtime's have the usual ones."""


def fit_runtime(target: Target | None, model: Model) -> Model:
    """Return a model as the target's runtime has it.

    Raises:
        TargetError: it does not have such a model.
    """
    if target is not None and target.browser:
        check_page(target, model.spec)
    if target is None or target.runtime is None:
        return model
    if target.runtime == genai.NAME:
        genai.check_model(model.spec)
        return model
    js.check_model(model.spec, model.tokenizer)
    if isinstance(model.spec.image.preparation, AnyResolution):
        return with_fewer_tiles(model, 1)
    return model


def for_other_runtime(target: Target, work: Workspace, draft: Manifest, model: Model) -> Manifest:
    """Add graphs and files to the bundle; as it was where the target has no other runtime."""
    if target.runtime is None:
        return draft
    if target.runtime == genai.NAME:
        return _for_genai(work, draft, model)
    return _for_transformers_js(work, draft, model)


def _for_transformers_js(work: Workspace, draft: Manifest, model: Model) -> Manifest:
    from mobilevlm.export.targets.interfaces import write_decoder, write_image_encoder

    written, artifacts = [], []
    writers: dict[str, Callable[[Path, Path, ModelSpec], None]] = {
        "vision": partial(write_image_encoder, pixels="normalised"),
        "decoder": partial(write_decoder, counted=True),
    }
    for artifact in draft.artifacts:
        if artifact.stage in js.STAGES and artifact.precision not in js.SUFFIXES:
            raise TargetError(
                f"target transformers-js: {artifact.path}: transformers.js has no name for the "
                f"precision {artifact.precision!r}: expected one of {', '.join(js.SUFFIXES)}"
            )
        if artifact.stage in writers:
            artifact, name = _moved_aside(work, artifact)
            writers[artifact.stage](work.path(artifact.path), work.path(name), draft.spec)
            written.append(name)
        artifacts.append(artifact)
    draft = dataclasses.replace(draft, artifacts=tuple(artifacts))
    written += write_json(work.folder, js.configuration(draft, model.tokenizer))
    return _with_files(draft, js.NAME, written)


def _for_genai(work: Workspace, draft: Manifest, model: Model) -> Manifest:
    graphs = write_genai_graphs(work.folder, work.folder, draft)
    files = genai.configuration(draft, model.tokenizer, graphs)
    return _with_files(draft, genai.NAME, [*graphs.values(), *write_json(work.folder, files)])


def write_genai_graphs(source: Path, target: Path, manifest: Manifest) -> dict[str, str]:
    """Write the graphs of onnxruntime-genai into a folder, from those in another of a bundle's
    layout; return the file of each stage."""
    from mobilevlm.export.targets.interfaces import (
        write_decoder,
        write_embeddings,
        write_image_encoder,
    )

    writers: dict[str, Callable[[Path, Path, ModelSpec], None]] = {
        "vision": partial(write_image_encoder, pixels="bytes"),
        "embeddings": partial(write_embeddings, image_id=genai.image_token_id(manifest.spec)),
        "decoder": partial(write_decoder, counted=False),
    }
    graphs: dict[str, str] = {}
    for artifact in manifest.artifacts:
        if artifact.format == "onnx" and artifact.stage in writers:
            place = PurePosixPath(artifact.path)
            name = place.with_name(genai.PREFIX + place.name).as_posix()
            writers[artifact.stage](source / artifact.path, target / name, manifest.spec)
            graphs[artifact.stage] = name
    return graphs


def _moved_aside(work: Workspace, artifact: Artifact) -> tuple[Artifact, str]:
    """Give our graph another name, and return the artifact so named and the name that it had. Its
    key becomes one that no other export asks for."""
    place = PurePosixPath(artifact.path)
    own = place.with_name(OWN + place.name).as_posix()
    work.path(artifact.path).replace(work.path(own))
    key = hashlib.sha256(f"{OWN} {artifact.key}".encode()).hexdigest()
    moved = dataclasses.replace(artifact, path=own, key=key)
    note_finished(work, moved)
    return moved, artifact.path


def write_json(folder: Path, files: Mapping[str, dict[str, Any]]) -> list[str]:
    """Write files by their names; return these."""
    for name, content in files.items():
        text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    return list(files)


def _with_files(draft: Manifest, runtime: str, files: list[str]) -> Manifest:
    progress.say(f"runtime     {runtime}: {', '.join(files)}")
    return dataclasses.replace(draft, other_runtime=ForOtherRuntime(runtime, tuple(files)))

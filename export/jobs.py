"""The artifacts that a recipe asks for: what each depends on, and how it is written."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

from mobilevlm._version import __version__
from mobilevlm.bundle import Artifact
from mobilevlm.errors import require
from mobilevlm.export.recipes import Recipe
from mobilevlm.families import Model
from mobilevlm.progress import Advance
from mobilevlm.spec import to_dict

SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_int8", "q8": "_q8", "q4": "_q4"}
"""Endings of ONNX files by precision, as the hub's ONNX community names them."""

StageName: TypeAlias = Literal["vision", "embeddings", "decoder"]
Author: TypeAlias = Callable[[Path, Advance], dict[str, float]]
"""Writes the file at the path; returns each quantized tensor's relative error."""


@dataclass(frozen=True)
class Job:
    """One artifact to make."""

    artifact: Artifact
    size: int
    """Weights to read, for the progress bar."""
    author: Author


def onnx_jobs(model: Model, recipe: Recipe) -> list[Job]:
    """All stages of a dense model as ONNX files."""
    try:
        from mobilevlm.export.graph import author
    except ImportError as error:
        raise require(error.name or "onnxscript", "export", "exporting") from None
    spec, weights = model.spec, model.weights

    def job(
        stage: StageName,
        name: str,
        precision: str,
        prefixes: tuple[str, ...],
        settings: list[Any],
        write: Callable[..., dict[str, float]],
    ) -> Job:
        path = f"onnx/{name}{SUFFIXES[precision]}.onnx"
        key = _key(model, prefixes, [path, precision, *settings])
        artifact = Artifact(stage, "onnx", precision, path, (f"{path}_data",), key)
        size = sum(weights.size(tensor) for tensor in weights if tensor.startswith(prefixes))
        return Job(
            artifact, size, lambda file, advance: write(weights, spec, recipe, file, advance)
        )

    return [
        job(
            "vision",
            "vision_encoder",
            recipe.vision,
            ("vision.", "projector."),
            [to_dict(spec.vision), to_dict(spec.projector), to_dict(spec.image)],
            author.author_vision,
        ),
        job(
            "embeddings",
            "embed_tokens",
            recipe.embeddings,
            ("decoder.embed_tokens.",),
            [to_dict(spec.decoder)],
            author.author_embeddings,
        ),
        job(
            "decoder",
            "decoder_model_merged",
            recipe.decoder,
            ("decoder.layers.", "decoder.norm.", "decoder.lm_head."),
            [to_dict(spec.decoder), recipe.lm_head, recipe.block_size],
            author.author_decoder,
        ),
    ]


@cache
def tool_versions() -> dict[str, str]:
    """Versions of what writes artifacts."""
    packages = ("onnx-ir", "onnxscript")
    versions = {package: importlib.metadata.version(package) for package in packages}
    return {"mobilevlm-edge": __version__, **versions}


def _key(model: Model, prefixes: tuple[str, ...], settings: list[Any]) -> str:
    """Digest of everything an artifact is made of: weights, settings, tools and our own code."""
    inputs = [model.weights.sha256(prefix) for prefix in prefixes]
    parts = [settings, inputs, tool_versions(), _code_digest()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@cache
def _code_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()

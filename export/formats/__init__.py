"""Formats of artifacts: a job for each artifact, what it depends on, and how it is written.

One file per format: onnx.py, gguf.py, npu.py.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import mobilevlm
from mobilevlm._version import __version__
from mobilevlm.bundle import Artifact, StageName
from mobilevlm.console.progress import Advance
from mobilevlm.errors import MobileVLMError
from mobilevlm.model import Model
from mobilevlm.plain_types import to_dict
from mobilevlm.spec import ModelSpec

QDQ_TOOLS = ("onnx", "onnxruntime")
"""Packages that make fixed-point graphs of float ones."""
TOOLS = {
    "onnx": ("onnx-ir", "onnxscript"),
    "gguf": ("gguf",),
    "npu": ("onnx-ir", "onnxscript", *QDQ_TOOLS),
}
"""Packages that write the artifacts of a format."""
ENCODED = ("vision.", "audio.", "projector.")
"""Prefixes of the tensors of an encoder's stage."""
EMBEDDINGS = ("decoder.embed_tokens.", "decoder.embed_layers.")
_SHARED_CODE = (
    "assembly.py", "audio.py", "checkpoint.py", "conversation.py", "gguf/names.py", "image.py",
    "instruction.py", "linear_groups.py", "media/*.py", "preparation.py", "prompt.py", "recipe.py",
    "reference/*.py", "rotary.py", "state_buffers.py",
)  # fmt: skip
_SHARED_RUNTIME = ("answer/sampling.py", "engines/*.py", "engines/onnx/*.py")
"""Modules outside export/ that decide the bytes of artifacts, as calibration runs them too."""


@dataclass(frozen=True)
class Written:
    """Figures of an artifact that has been written, for the manifest."""

    errors: dict[str, float]
    """Relative error that quantization made in each tensor"""
    bytes_per_token: int | None = None
    """Bytes of weights that one token needs: of sparse experts only those it uses"""


Author: TypeAlias = Callable[[Path, Advance], Written]
"""Writes the file at the path."""


@dataclass(frozen=True)
class Job:
    """One artifact to make."""

    artifact: Artifact
    size: int
    """Weights to read, for the progress bar."""
    author: Author
    prepare: Callable[[], object] | None = None
    """Work before the artifact is written, with progress of its own."""


def refuse(refusals: Iterable[tuple[bool, str]]) -> None:
    """Raise MobileVLMError with the message of the first condition that holds."""
    for holds, message in refusals:
        if holds:
            raise MobileVLMError(message)


def make_job(
    model: Model,
    form: str,
    stage: StageName,
    precision: str,
    files: tuple[str, ...],
    prefixes: tuple[str, ...],
    settings: Sequence[Any],
    author: Author,
    prepare: Callable[[], object] | None = None,
    **figures: Any,
) -> Job:
    """Return the job of an artifact. ``files``: the one that an engine opens, then the others;
    ``prefixes``: of the tensors that it is made of; ``settings``: what it depends on besides, in
    JSON types; ``figures``: fields of :class:`mobilevlm.bundle.Artifact`."""
    weights = model.weights
    inputs = [weights.sha256(prefix) for prefix in prefixes]
    parts = [[precision, files, *settings], inputs, tool_versions([form]), code_digest()]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    artifact = Artifact(stage, form, precision, files[0], files[1:], key, **figures)  # type: ignore[arg-type]
    size = sum(weights.size(tensor) for tensor in weights if tensor.startswith(prefixes))
    return Job(artifact, size, author, prepare)


def encoder_settings(spec: ModelSpec) -> list[Any]:
    """Return what the stage of an encoder depends on in the spec."""
    given = spec.encoded
    assert given is not None
    return [to_dict(part) for part in (given.encoder, given.connector, given.preparation)]


def tool_versions(formats: Sequence[str]) -> dict[str, str]:
    """Versions of what writes the artifacts of these formats."""
    packages = [package for form in formats for package in TOOLS[form]]
    versions = {package: importlib.metadata.version(package) for package in packages}
    return {"mobilevlm-edge": __version__, **versions}


def code_files() -> list[Path]:
    """Return the modules that decide the bytes of artifacts."""
    runtime = find_spec("mobilevlm.runtime")  # not imported: it would import this
    assert runtime is not None and runtime.origin is not None
    places = [(Path(mobilevlm.__file__).parent, name) for name in _SHARED_CODE]
    places += [(Path(runtime.origin).parent, name) for name in _SHARED_RUNTIME]
    shared = (path for folder, name in places for path in sorted(folder.glob(name)))
    return [*sorted(Path(__file__).parents[1].rglob("*.py")), *shared]


@cache
def code_digest() -> str:
    """Return the digest of the modules that decide the bytes of artifacts."""
    digest = hashlib.sha256()
    for path in code_files():
        digest.update(path.read_bytes())
    return digest.hexdigest()

"""A bundle: the folder a device needs, described by ``manifest.json``.

The manifest holds the spec, the artifacts of each stage, size and digest of every file, the recipe
and the measured quality. docs/reference/bundle.md specifies the format.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeAlias, TypeVar

from mobilevlm.bundle_checks import check_file, check_graph, check_manifest
from mobilevlm.bundle_identity import Identity, identity_of, replaced_error, steadily, unchanged
from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import BundleError, MobileVLMError
from mobilevlm.plain_types import from_dict, to_dict
from mobilevlm.recipe import Recipe
from mobilevlm.regular_file import read_regular
from mobilevlm.spec import ModelSpec
from mobilevlm.whole_file import file_sha256

PAGE = 4096
"""Large tensors of a file begin at multiples of so many bytes, so that they can be mapped alone."""
SCHEMA_VERSION = 2
"""1: one image input, whose parts were keys of the spec (schema_1.py)."""
MANIFEST = "manifest.json"
MOST_MANIFEST = 1 << 26
"""Bytes of it"""
TOKENIZER = "tokenizer.json"
INSTRUCTION_TOKENIZER = "qformer_tokenizer.json"
"""File of the tokenizer of a Q-Former that reads the prompt too."""

T = TypeVar("T")

StageName: TypeAlias = Literal[
    "vision",
    "audio",
    "embeddings",
    "encoder",
    "decoder",
    "prefill",
    "image_head",
    "code_embeddings",
    "image_decoder",
]
"""``vision``, ``audio``: encoder and connector of what is shown or heard; ``encoder``: of a
language model that has one; ``prefill``: the decoder once more, for prompts, in bundles whose
recipe asks for it. The last three are of a model that makes images: the decoder's states to logits
of codes, codes to the decoder's rows, and all codes of an image to its pixels."""


@dataclass(frozen=True)
class FileEntry:
    """Expected size and digest of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class WeightError:
    """The tensor that quantization changed most."""

    tensor: str
    relative_error: float
    """``‖stored − exact‖ / ‖exact‖``"""


@dataclass(frozen=True)
class Artifact:
    """One way to run a stage."""

    stage: StageName
    format: Literal["onnx", "gguf", "npu", "ort"]
    precision: str
    path: str
    """The file that an engine opens, relative to the bundle, with ``/``."""
    data: tuple[str, ...]
    """Further files that it needs."""
    key: str
    """Digest of everything it was made of."""
    largest_weight_error: WeightError | None = None
    bits_per_weight: float | None = None
    """Mean over the weights of its linear layers, with scales and zero points (ONNX)"""
    weight_bits: int | None = None
    """7 or 8, the most of a weight that meets 8-bit activations in ONNX; none where none does."""
    bytes_per_token: int | None = None
    """Bytes of decoder weights that one token needs; of sparse experts only those it uses count."""

    @property
    def files(self) -> tuple[str, ...]:
        """All its files."""
        return (self.path, *self.data)


@dataclass(frozen=True)
class EmbeddingTable:
    """Location of the embedding rows in a file, for mapping them into memory."""

    path: str
    offset: int
    dtype: Literal["float16", "float32"]
    rows: int
    columns: int


def layer_table(first: EmbeddingTable, spec: DecoderSpec) -> EmbeddingTable | None:
    """Return where the table of layers' own inputs lies, behind that of embeddings; none where
    layers have no such inputs."""
    if not spec.layer_input_size:
        return None
    size = first.rows * first.columns * (int(first.dtype[-2:]) // 8)
    return replace(first, offset=-(-size // PAGE) * PAGE, columns=spec.layer_input_width)


@dataclass(frozen=True)
class SystemPrompt:
    """Keys and values of what prompts begin with, as the ONNX decoder computes them: float32, or
    int8 where the recipe has such a ``kv_cache``, ``(2 · layers, num_key_value_heads, len(ids),
    head_dim)``, each layer's keys before its values; then, float32, the last inputs of short
    convolutions ``(layers, 1, kernel - 1, hidden_size)``."""

    path: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Compiled:
    """The graphs of a stage as the compiler for a target's chip made them."""

    stage: StageName
    files: tuple[str, ...]
    """ONNX files that refer to binaries, in the order of the artifact's graphs, then these"""
    nodes: int
    """Operators of the graphs; none of them is left to the processor."""


@dataclass(frozen=True)
class Coverage:
    """Share of a graph that an accelerator behind ONNX Runtime runs."""

    stage: StageName
    graph: str
    """ONNX file"""
    provider: str
    nodes: int
    """Operators of the graph"""
    taken: int
    parts: int
    """Pieces of the graph that go to it"""
    left: dict[str, int]
    """Operators that stay on the processor, with the reason, and how many"""
    multiplications: float = 0.0
    """Share of the multiplications of all products that are in the nodes that it takes"""
    checked: int | None = None
    """Operators that onnxruntime's own usability checker would give to it"""


@dataclass(frozen=True)
class ReducedBuild:
    """An ONNX Runtime that can run the .ort files of a bundle and nothing else."""

    config: str
    """File for its build option ``--include_ops_by_config``"""
    operators: int
    estimated_mb: float
    """Estimated size of its library, without providers for accelerators"""


@dataclass(frozen=True)
class Package:
    """A stage as a package of Core ML, for use without ONNX Runtime."""

    stage: StageName
    path: str
    """Folder that ends in .mlpackage"""
    files: tuple[str, ...]
    operators: dict[str, int]
    """Number of each operator in its program, without constants"""
    precision: str


@dataclass(frozen=True)
class ForOtherRuntime:
    """Files by which another runtime runs the bundle, beside files of weights that both use."""

    runtime: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class StageQuality:
    """Distance of an artifact from the float32 reference on the calibration images."""

    figures: dict[str, float]


@dataclass(frozen=True)
class Quality:
    """Losses that the export measured, or the reason why it did not."""

    measured: bool
    note: str = ""
    stages: dict[str, StageQuality] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``."""

    schema_version: int
    spec: ModelSpec
    recipe: Recipe
    artifacts: tuple[Artifact, ...]
    embeddings: EmbeddingTable | None
    """Table of the ONNX decoder; a GGUF decoder holds its own."""
    quality: Quality
    files: dict[str, FileEntry]
    tools: dict[str, str]
    system_prompt: SystemPrompt | None = None
    target: str | None = None
    """Target that it was exported for and checked against"""
    compiled: tuple[Compiled, ...] = ()
    coverage: tuple[Coverage, ...] = ()
    reduced_build: ReducedBuild | None = None
    layer_embeddings: EmbeddingTable | None = None
    """Table of the inputs that each layer has for itself; all layers of a token are one row"""
    packages: tuple[Package, ...] = ()
    other_runtime: ForOtherRuntime | None = None


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose manifest was read and checked."""

    folder: Path
    manifest: Manifest
    digest: str
    """Digest of the manifest, hence of the whole content."""
    identity: Identity = field(default_factory=dict, compare=False, repr=False)
    """Manifest and files as they were when they were checked"""

    def path(self, name: str) -> Path:
        """A file of the bundle."""
        return self.folder / name

    def artifact(self, stage: str, kind: str) -> Artifact:
        """The artifact of a stage in a format.

        Raises:
            BundleError: the bundle has none.
        """
        for artifact in self.manifest.artifacts:
            if (artifact.stage, artifact.format) == (stage, kind):
                return artifact
        raise BundleError(
            f"{self.folder}: no {kind.upper()} artifact of the {stage} stage: export it with "
            f"--format {kind}"
        )


def is_bundle(folder: Path) -> bool:
    """Return whether a folder holds a manifest, as a bundle does."""
    return (folder / MANIFEST).is_file()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes ``manifest.json``, deterministic, with a digest over itself."""
    data = to_dict(manifest)
    data["sha256"] = _digest(data)
    text = json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def signed_manifest(folder: Path) -> dict[str, Any]:
    """Return ``manifest.json`` as it stands, after checking its digest over itself. Who only asks
    what a bundle consists of needs no more, whatever the version that wrote it.

    Raises:
        BundleError: no manifest, damaged, or of a newer schema.
    """
    path = folder / MANIFEST
    if not path.is_file():
        reason = "no such folder" if not folder.exists() else f"{MANIFEST} is missing"
        raise BundleError(f"{folder}: not a bundle ({reason}): make one with 'mobilevlm export'")
    try:
        data: dict[str, Any] = json.loads(read_regular(path, MOST_MANIFEST).decode("utf-8"))
        version, stated, found = data["schema_version"], data["sha256"], _digest(data)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise BundleError(f"{path}: damaged manifest: export the bundle again") from None
    if not isinstance(version, int) or not 1 <= version <= SCHEMA_VERSION:
        raise BundleError(
            f"{path}: written by a newer version (schema {version}, this program reads up to "
            f"{SCHEMA_VERSION}): upgrade mobilevlm-edge"
        )
    if found != stated:
        raise BundleError(f"{path}: sha256 mismatch: the manifest was changed: export it again")
    return data


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """The manifest and its digest, checked.

    Raises:
        BundleError: no manifest, damaged, or of a newer schema.
    """
    data = signed_manifest(folder)
    try:
        current = data
        if data["schema_version"] == 1:
            from mobilevlm.schema_1 import upgraded  # few bundles are so old

            current = upgraded(data)
        manifest = from_dict(Manifest, current, str(folder / MANIFEST))
    except MobileVLMError as error:
        raise BundleError(f"{error}: export the bundle again") from None
    return manifest, data["sha256"]


def open_bundle(folder: Path) -> Bundle:
    """Opens a bundle and checks every file against the manifest.

    Hashing is skipped for files that an earlier check on this machine found right and that have not
    been touched since (same size, times and inode; the time of the last change of the inode cannot
    be set back).

    An export may replace the bundle meanwhile: then the new one is opened.

    Raises:
        BundleError: a file is missing, of another size, or of another content.
    """
    return steadily(folder, lambda: _open_once(folder))


def _open_once(folder: Path) -> Bundle:
    with unchanged(folder, identity_of(folder, [MANIFEST])):
        manifest, digest = read_manifest(folder)
        _check_files(folder, manifest, digest)
        identity = identity_of(folder, [MANIFEST, *manifest.files])
    return Bundle(folder, manifest, digest, identity)


def reopened(bundle: Bundle, open_part: Callable[[], T]) -> T:
    """Open a part of a bundle that was opened before. A bundle of the same content in its place
    will do.

    Raises:
        ReplacedError: there is another bundle now.
    """
    if identity_of(bundle.folder, bundle.identity) != bundle.identity:
        now = open_bundle(bundle.folder)
        if now.digest != bundle.digest:
            raise replaced_error(bundle.folder)
        bundle = now
    with unchanged(bundle.folder, bundle.identity):
        return open_part()


def _check_files(folder: Path, manifest: Manifest, digest: str) -> None:
    for name in named_files(manifest):
        if name not in manifest.files:
            raise BundleError(
                f"{folder}: the manifest has no size and digest for {name!r}: export the bundle "
                f"again"
            )
    known = _read_stamps(folder, digest)
    stamps: dict[str, list[int]] = {}
    for name, entry in manifest.files.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise BundleError(f"{folder}: the manifest names {name!r}, which leaves the bundle")
        path = folder / name
        status = check_file(folder, name)
        if status.st_size != entry.size:
            raise BundleError(
                f"{path}: {status.st_size} bytes, the manifest says {entry.size}: copy or export "
                f"the bundle again"
            )
        stamps[name] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        if stamps[name] != known.get(name):
            if file_sha256(path) != entry.sha256:
                raise BundleError(
                    f"{path}: sha256 mismatch: the file was changed: copy or export the bundle "
                    f"again"
                )
            if name.endswith(".onnx"):
                check_graph(folder, name, manifest.files)
    check_manifest(manifest, folder / MANIFEST)
    if stamps != known and not _is_own(folder):
        _write_stamps(folder, digest, stamps)


def _is_own(folder: Path) -> bool:
    """Return whether a bundle came with this package: it is hashed in milliseconds, and answers
    without a place to write to."""
    return folder.resolve().is_relative_to(Path(__file__).resolve().parent)


def data_path(path: Path) -> Path:
    """Return the path of the file with the weights of an ONNX file."""
    return path.with_name(f"{path.name}_data")


def named_files(manifest: Manifest) -> list[str]:
    """Files that something in the manifest refers to."""
    singles = [part.path for part in (manifest.embeddings, manifest.system_prompt) if part]
    parts = [name for artifact in manifest.artifacts for name in artifact.files]
    binaries = [name for part in manifest.compiled for name in part.files]
    binaries += [name for package in manifest.packages for name in package.files]
    if manifest.reduced_build is not None:
        binaries.append(manifest.reduced_build.config)
    if manifest.other_runtime is not None:
        binaries += manifest.other_runtime.files
    asked = [INSTRUCTION_TOKENIZER] if manifest.spec.reads_instructions else []
    return [TOKENIZER, *asked, *singles, *parts, *binaries]


def describe_files(folder: Path) -> dict[str, FileEntry]:
    """Size and digest of every file below ``folder``, in order of their names."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        path.relative_to(folder).as_posix(): FileEntry(path.stat().st_size, file_sha256(path))
        for path in files
        if path.name != MANIFEST
    }


def cache_folder() -> Path:
    """Return the folder for files that can be made again: ``$XDG_CACHE_HOME/mobilevlm``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mobilevlm"


def _digest(data: dict[str, Any]) -> str:
    content = {key: value for key, value in data.items() if key != "sha256"}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _stamp_path(folder: Path, digest: str) -> Path:
    # 2: graphs are checked too. Names of files need not be UTF-8.
    name = b"2 " + os.fsencode(folder.resolve())
    place = hashlib.sha256(name + f" {digest}".encode()).hexdigest()[:32]
    return cache_folder() / "verified" / f"{place}.json"


def _read_stamps(folder: Path, digest: str) -> dict[str, list[int]]:
    try:
        data = json.loads(_stamp_path(folder, digest).read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: this user has no home folder
        return {}
    return data if isinstance(data, dict) else {}


def _write_stamps(folder: Path, digest: str, stamps: dict[str, list[int]]) -> None:
    """Best effort: on a read-only device every load hashes again."""
    try:
        path = _stamp_path(folder, digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(stamps, file)
        Path(file.name).replace(path)
    except (OSError, RuntimeError):
        return

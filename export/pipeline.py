"""From checkpoint to bundle: stage by stage, resumable, atomic, deterministic.

The work happens in ``BUNDLE.partial`` beside the bundle, which takes the bundle's place in one
rename at the end. A stage that is finished there, or in the bundle that is replaced, is taken over
when everything it was made of is the same (its key).
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

from mobilevlm import progress
from mobilevlm._version import __version__
from mobilevlm.bundle import (
    MANIFEST,
    SCHEMA_VERSION,
    TOKENIZER,
    Artifact,
    Bundle,
    EmbeddingTable,
    FileEntry,
    Manifest,
    Quality,
    Stage,
    WeightError,
    describe_files,
    is_bundle,
    read_manifest,
    write_manifest,
)
from mobilevlm.checkpoint import file_sha256
from mobilevlm.errors import BundleError, MobileVLMError, require
from mobilevlm.export.recipes import Recipe, find_recipe
from mobilevlm.families import Model, OpenOptions, open_checkpoint
from mobilevlm.progress import Advance
from mobilevlm.spec import from_dict, to_dict

FORMATS = ("onnx",)
SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_int8", "q8": "_q8", "q4": "_q4"}
"""Endings of ONNX files by precision, as the hub's ONNX community names them."""
MEMORY_RATIO, MEMORY_BASE = 1.5, 1e9
"""An export may use this many times the checkpoint's bytes, and so many bytes more."""
MEMORY_LIBRARIES = 0.5e9
"""What torch and onnxruntime take before they hold any weights."""
RESIDENT = {"fp32": 2.0, "fp16": 4.0, "int8": 1.3, "q8": 1.3, "q4": 1.3}
"""Memory of a session as a multiple of its weight file: onnxruntime keeps float weights twice, in
float32, and a part of the quantized ones twice for a moment."""
RECORDS = "stages"
"""Folder in the work folder where finished stages are noted."""

Author: TypeAlias = Callable[[Path, Advance], dict[str, float]]


@dataclass(frozen=True)
class StageJob:
    """One stage to make: its files, what they depend on, and how they are authored."""

    name: str
    key: str
    artifact: Artifact
    size: int
    """Weights to read, for the progress bar."""
    author: Author


@dataclass(frozen=True)
class StageRecord:
    """A finished stage: noted beside the files, so that an interrupted export can go on."""

    stage: Stage
    sizes: dict[str, int]


def export(
    checkpoint: str | PathLike[str],
    bundle: str | PathLike[str],
    *,
    recipe: str = "int4",
    formats: Sequence[str] = ("onnx",),
    vision_tower: str | PathLike[str] | None = None,
    conversation: str | None = None,
    measure: bool = True,
) -> Manifest:
    """Exports a checkpoint folder to a bundle folder.

    ``recipe``: ``fp32``, ``fp16-weights``, ``int8``, ``int4`` or a TOML file. ``vision_tower``: the
    tower's folder, where it is not found beside the checkpoint. ``conversation``: ``v1`` or
    ``llava_v1``, where the family's default is wrong. ``measure``: compare the result with the
    float32 reference when torch is installed.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        BundleError: the target is in the way.
        QualityError: an artifact is further from the reference than the recipe allows.
    """
    for name in formats:
        if name not in FORMATS:
            raise MobileVLMError(f"format {name!r} is not known: expected {', '.join(FORMATS)}")
    chosen = find_recipe(recipe)
    target = Path(bundle)
    if target.is_symlink() or not target.name:  # what is renamed must be the folder itself
        target = target.resolve()
    _check_target(target)
    start = time.perf_counter()
    options = OpenOptions(Path(vision_tower) if vision_tower else None, conversation)
    model = open_checkpoint(Path(checkpoint), options)
    work = target.resolve().with_name(f"{target.resolve().name}.partial")
    (work / RECORDS).mkdir(parents=True, exist_ok=True)
    stages = {job.name: _finish_stage(job, work, target) for job in _stage_jobs(model, chosen)}
    model.tokenizer.save(str(work / TOKENIZER))
    quality = _measure(model, chosen, work, stages, measure)
    _keep_only(work, [name for stage in stages.values() for name in _stage_files(stage)])
    manifest = _manifest(model, chosen, work, stages, quality, describe_files(work))
    write_manifest(work, manifest)
    _replace(target, work)
    size = sum(entry.size for entry in manifest.files.values())
    progress.say(
        f"bundle      {target}  {size / 1e6:.1f} MB, recipe {chosen.name}, "
        f"{time.perf_counter() - start:.1f} s"
    )
    return manifest


def _stage_jobs(model: Model, recipe: Recipe) -> list[StageJob]:
    """The stages of a dense model as ONNX files."""
    try:
        from mobilevlm.export.graph import author
    except ImportError as error:
        raise require(error.name or "onnxscript", "export", "exporting") from None
    spec, weights = model.spec, model.weights
    return [
        _job(
            model,
            "vision",
            ("vision.", "projector."),
            f"vision_encoder{SUFFIXES[recipe.vision]}",
            recipe.vision,
            [to_dict(spec.vision), to_dict(spec.projector), to_dict(spec.image), recipe.vision],
            lambda path, advance: author.author_vision(weights, spec, recipe, path, advance),
        ),
        _job(
            model,
            "embeddings",
            ("decoder.embed_tokens.",),
            f"embed_tokens{SUFFIXES[recipe.embeddings]}",
            recipe.embeddings,
            [to_dict(spec.decoder), recipe.embeddings],
            lambda path, advance: author.author_embeddings(weights, spec, recipe, path, advance),
        ),
        _job(
            model,
            "decoder",
            ("decoder.layers.", "decoder.norm.", "decoder.lm_head."),
            f"decoder_model_merged{SUFFIXES[recipe.decoder]}",
            recipe.decoder,
            [to_dict(spec.decoder), recipe.decoder, recipe.lm_head, recipe.block_size],
            lambda path, advance: author.author_decoder(weights, spec, recipe, path, advance),
        ),
    ]


def _job(
    model: Model,
    name: str,
    prefixes: tuple[str, ...],
    stem: str,
    precision: str,
    settings: list[Any],
    author: Author,
) -> StageJob:
    inputs = [model.weights.sha256(prefix) for prefix in prefixes]
    key = hashlib.sha256(
        json.dumps([name, __version__, settings, inputs], sort_keys=True).encode()
    ).hexdigest()
    path = f"onnx/{stem}.onnx"
    size = sum(
        model.weights.size(tensor) for tensor in model.weights if tensor.startswith(prefixes)
    )
    return StageJob(name, key, Artifact("onnx", precision, path, (f"{path}_data",)), size, author)


def _finish_stage(job: StageJob, work: Path, target: Path) -> Stage:
    """Takes a finished stage over, or authors it."""
    ready = _from_record(job, work) or _from_bundle(job, work, target)
    if ready is not None:
        progress.say(f"{job.name:<12}unchanged, taken over")
        return ready
    start = time.perf_counter()
    path = work / job.artifact.path
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in (job.artifact.path, *job.artifact.data):
        (work / name).unlink(missing_ok=True)  # it may be a link into the bundle
    with progress.track(job.name, job.size) as advance:
        errors = job.author(path, advance)
    worst = max(errors, key=errors.__getitem__) if errors else None
    stage = Stage(
        job.key, (job.artifact,), WeightError(worst, round(errors[worst], 6)) if worst else None
    )
    sizes = {name: (work / name).stat().st_size for name in _stage_files(stage)}
    for name in sizes:
        _flush(work / name)  # after a power cut, what the record promises is there
    record = json.dumps(to_dict(StageRecord(stage, sizes)))
    _write_atomically(work / RECORDS / f"{job.name}.json", record)
    progress.say(
        f"{job.name:<12}{job.artifact.path}  {sum(sizes.values()) / 1e6:.1f} MB, "
        f"{time.perf_counter() - start:.1f} s"
    )
    return stage


def _from_record(job: StageJob, work: Path) -> Stage | None:
    """A stage that an interrupted export finished."""
    try:
        data = json.loads((work / RECORDS / f"{job.name}.json").read_text(encoding="utf-8"))
        record = from_dict(StageRecord, data, "record")
    except (OSError, ValueError, MobileVLMError):
        return None
    complete = all(
        (work / name).is_file() and (work / name).stat().st_size == size
        for name, size in record.sizes.items()
    )
    return record.stage if record.stage.key == job.key and complete else None


def _from_bundle(job: StageJob, work: Path, target: Path) -> Stage | None:
    """The same stage in the bundle that is about to be replaced, its files checked and linked."""
    try:
        manifest, _ = read_manifest(target)
    except BundleError:
        return None
    stage = manifest.stages.get(job.name)
    if stage is None or stage.key != job.key:
        return None
    for name in _stage_files(stage):
        source, entry = target / name, manifest.files.get(name)
        if entry is None or not source.is_file() or file_sha256(source) != entry.sha256:
            return None
    for name in _stage_files(stage):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).unlink(missing_ok=True)
        try:
            os.link(target / name, work / name)
        except OSError:  # a file system without links
            shutil.copyfile(target / name, work / name)
    return stage


def _stage_files(stage: Stage) -> list[str]:
    return [name for artifact in stage.artifacts for name in (artifact.path, *artifact.data)]


def _measure(
    model: Model, recipe: Recipe, work: Path, stages: dict[str, Stage], wanted: bool
) -> Quality:
    """Figures against the float32 reference, or the reason why there are none."""
    obstacle = _obstacle(model, work, stages) if wanted else "not asked for"
    if obstacle:
        progress.say(f"quality     not measured ({obstacle})")
        return Quality(False, obstacle)
    from mobilevlm.export.measure import check_limits, measure_quality

    draft = _manifest(model, recipe, work, stages, Quality(False), files={})
    start = time.perf_counter()
    quality = measure_quality(model, Bundle(work, draft, digest=""))
    for name, stage in quality.stages.items():
        figures = ", ".join(f"{key} {value:.4g}" for key, value in stage.figures.items())
        progress.say(f"quality     {name}: {figures}")
    progress.say(f"quality     measured in {time.perf_counter() - start:.1f} s")
    check_limits(quality, recipe)
    return quality


def _obstacle(model: Model, work: Path, stages: dict[str, Stage]) -> str:
    """Why the quality cannot be measured here; empty when it can."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not installed: pip install 'mobilevlm-edge[reference]'"
    artifacts = [artifact for stage in stages.values() for artifact in stage.artifacts]
    needed = MEMORY_LIBRARIES + sum(
        RESIDENT[artifact.precision] * (work / artifact.data[0]).stat().st_size
        for artifact in artifacts
    )
    allowed = MEMORY_RATIO * model.weights.stored_bytes + MEMORY_BASE
    if needed > allowed:
        return (
            f"running it takes {needed / 1e9:.1f} GB, the export of this checkpoint may use "
            f"{allowed / 1e9:.1f} GB"
        )
    return ""


def _manifest(
    model: Model,
    recipe: Recipe,
    work: Path,
    stages: dict[str, Stage],
    quality: Quality,
    files: dict[str, FileEntry],
) -> Manifest:
    return Manifest(
        schema_version=SCHEMA_VERSION,
        spec=model.spec,
        recipe=dataclasses.asdict(recipe),
        stages=stages,
        embeddings=_embedding_table(model, stages["embeddings"]),
        quality=quality,
        files=files,
        tools={
            "mobilevlm-edge": __version__,
            "onnx-ir": importlib.metadata.version("onnx-ir"),
            "onnxscript": importlib.metadata.version("onnxscript"),
        },
    )


def _embedding_table(model: Model, stage: Stage) -> EmbeddingTable:
    artifact, decoder = stage.artifacts[0], model.spec.decoder
    return EmbeddingTable(
        path=artifact.data[0],
        offset=0,
        dtype="float16" if artifact.precision == "fp16" else "float32",
        rows=decoder.vocab_size,
        columns=decoder.hidden_size,
    )


def _check_target(target: Path) -> None:
    """Never replaces anything but a bundle; puts back one that a crash left moved aside."""
    aside = _aside(target)
    if aside.exists() and not target.exists():
        aside.rename(target)
    if target.exists() and not target.is_dir():
        raise BundleError(f"{target}: a file is in the way: choose another name for the bundle")
    if target.is_dir() and not _is_replaceable(target) and any(target.iterdir()):
        raise BundleError(f"{target}: the folder is not empty and not a bundle: choose another one")


def _is_replaceable(folder: Path) -> bool:
    """Whether it is a bundle, whole or damaged. Other programs have a manifest.json too."""
    return is_bundle(folder) and b'"schema_version"' in (folder / MANIFEST).read_bytes()


def _keep_only(work: Path, names: list[str]) -> None:
    """Removes what an earlier attempt with another recipe left in the work folder."""
    keep = {*names, TOKENIZER}
    for path in sorted(work.rglob("*"), reverse=True):
        if path.is_file() and path.relative_to(work).as_posix() not in keep:
            path.unlink()
    for path in sorted(work.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _replace(target: Path, work: Path) -> None:
    """Puts the finished work folder in the bundle's place."""
    for path in work.rglob("*"):
        if path.is_file():
            _flush(path)
    aside = _aside(target)
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        target.rename(aside)
    work.rename(target)
    shutil.rmtree(aside, ignore_errors=True)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _aside(target: Path) -> Path:
    return target.resolve().with_name(f"{target.resolve().name}.partial.old")


def _write_atomically(path: Path, text: str) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)

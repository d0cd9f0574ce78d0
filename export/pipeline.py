"""From checkpoint to bundle: artifact by artifact, measured, atomic, deterministic."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

from mobilevlm.bundle import (
    INSTRUCTION_TOKENIZER,
    SCHEMA_VERSION,
    TOKENIZER,
    Artifact,
    Bundle,
    EmbeddingTable,
    FileEntry,
    Manifest,
    Quality,
    SystemPrompt,
    WeightError,
    describe_files,
    layer_table,
    named_files,
    write_manifest,
)
from mobilevlm.console import progress
from mobilevlm.conversation import system_ids
from mobilevlm.errors import MobileVLMError
from mobilevlm.export.finish.system_prompt import write_system_prompt
from mobilevlm.export.formats import Job, tool_versions
from mobilevlm.export.quality.gate import formats_of, measure_quality, run_plan
from mobilevlm.export.settled import Wishes, open_source, settle, settle_model
from mobilevlm.export.targets.checks import check_memory, compiled_for
from mobilevlm.export.targets.mobile import for_accelerator
from mobilevlm.export.targets.other_runtimes import for_other_runtime
from mobilevlm.export.workspace.workspace import (
    Workspace,
    begin_artifact,
    check_recorded,
    check_target,
    keep_only,
    note_finished,
    open_workspace,
    replace_target,
    take_over,
)
from mobilevlm.model import Model, open_options
from mobilevlm.recipe import Recipe, WeightBits
from mobilevlm.spec import GGUFType, KVCache
from mobilevlm.tokenizers.tokenizer import save_tokenizer


def export(
    checkpoint: str | PathLike[str],
    bundle: str | PathLike[str],
    *,
    recipe: str | None = None,
    formats: Sequence[str] | None = None,
    vision_tower: str | PathLike[str] | None = None,
    conversation: str | None = None,
    variant: str | None = None,
    base: str | PathLike[str] | None = None,
    measure: bool = True,
    gguf_type: GGUFType | None = None,
    imatrix: str | PathLike[str] | None = None,
    calibration: str | PathLike[str] | None = None,
    mmproj: str | PathLike[str] | None = None,
    weight_bits: WeightBits | None = None,
    kv_cache: KVCache | None = None,
    target: str | None = None,
    limits: Mapping[str, float] | None = None,
    require_measured: bool = False,
) -> Manifest:
    """Exports a checkpoint folder to a bundle folder, or a GGUF file with its ``mmproj``.

    ``recipe``: ``fp32``, ``fp16-weights``, ``int8``, ``int8-portable``, ``int8-calibrated``,
    ``int4`` (the default), ``int4-small``, ``fast``, for NPUs ``a16w8`` or ``a8w8``, or a TOML
    file. ``target``: a device (export/targets) which settles recipe, formats and bits, and which
    the result is checked against.
    ``vision_tower``: the tower's folder, where it is not found beside the checkpoint.
    ``conversation``: ``v1``, ``llava_v1``,
    ``phi`` …, where the family's default is wrong. ``variant``: which official behaviour, where
    there are several and the checkpoint tells the wrong one. ``base``: the whole model that an
    adapter is merged into, where the checkpoint is one. ``measure``: compare the result with
    the float32 reference when torch is installed. ``formats``: ``onnx``, ``gguf``, ``npu`` or
    several. ``gguf_type``: type of the GGUF decoder, not the recipe's. ``imatrix``: file of an
    importance matrix to round the GGUF decoder with, or ``calibration``: ``own``, ``scenes`` or a
    JSONL file (export/calibration/samples.py) to collect one from, and to calibrate the ONNX
    artifacts with where the recipe's methods need data. ``weight_bits``: of ``int8`` weights, for a
    device unlike this machine: 7 for x86 without VNNI, 8 for all others. ``kv_cache``: how the ONNX
    decoder stores keys and values, not the recipe's. ``limits``: by name, instead of the recipe's
    (``decoder_kl`` … as in a recipe file); the export fails where one of them cannot be checked.
    ``require_measured``: it fails too where the quality of an artifact cannot be measured, or not
    on text.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        BundleError: the target is in the way.
        QualityError: an artifact is further from the reference than the recipe allows, or was not
            measured though ``require_measured`` asks for it.
        TargetError: the result would not run on the target.
    """
    start = time.perf_counter()
    wishes = Wishes(
        recipe, formats, measure, gguf_type, imatrix, calibration, weight_bits, kv_cache, target,
        limits, require_measured,
    )  # fmt: skip
    said = settle(wishes)
    options = open_options(vision_tower, conversation, variant, base)
    place = check_target(Path(bundle))
    source = open_source(Path(checkpoint), options, Path(mmproj) if mmproj else None, said.formats)
    model, chosen, jobs = settle_model(said, source)
    goal = said.target
    with open_workspace(place) as work:
        for note in model.weights.notes:
            progress.say(note)
        artifacts = tuple(_make(job, work) for job in jobs)
        save_tokenizer(model.tokenizer, work.path(TOKENIZER))
        if model.instruction_tokenizer is not None:
            save_tokenizer(model.instruction_tokenizer, work.path(INSTRUCTION_TOKENIZER))
        draft = _manifest(model, chosen, artifacts)
        if chosen.kv_cache != "fp32" and "onnx" in said.formats:
            _quantize_cache(model, chosen, work, draft)
        draft = dataclasses.replace(draft, system_prompt=_system_prompt(model, work, draft))
        quality = measure_quality(
            model, chosen, work, draft, measure, limits or (), require_measured
        )
        if goal is not None:
            draft = compiled_for(goal, work, draft)
            draft = for_accelerator(goal, work, draft, model)
            draft = for_other_runtime(goal, work, draft, model)
        keep_only(work, named_files(draft))
        files = describe_files(work.folder)
        check_recorded(work, files)
        manifest = dataclasses.replace(draft, quality=quality, files=files)
        if goal is not None:
            check_memory(goal, manifest)
        write_manifest(work.folder, manifest)
        replace_target(work)
    progress.say(
        f"bundle      {bundle}  {_megabytes(files):.1f} MB, recipe {chosen.name}, "
        f"{time.perf_counter() - start:.1f} s"
    )
    return manifest


def _make(job: Job, work: Workspace) -> Artifact:
    """Reuse a finished artifact, or author it."""
    stage = job.artifact.stage
    ready = take_over(work, job.artifact)
    if ready is not None:
        progress.say(f"{stage:<12}{ready.path}  unchanged, reused")
        return ready
    start = time.perf_counter()
    path = work.path(job.artifact.path)
    begin_artifact(work, job.artifact)
    if job.prepare is not None:
        job.prepare()
    with progress.track(stage, job.size) as advance:
        written = job.author(path, advance)
    errors = written.errors
    worst = max(errors, key=errors.__getitem__) if errors else None
    artifact = dataclasses.replace(
        job.artifact,
        largest_weight_error=WeightError(worst, round(errors[worst], 6)) if worst else None,
        bytes_per_token=written.bytes_per_token if stage == "decoder" else None,
    )
    size = note_finished(work, artifact)
    progress.say(
        f"{stage:<12}{artifact.path}  {size / 1e6:.1f} MB, {time.perf_counter() - start:.1f} s"
    )
    return artifact


def _quantize_cache(model: Model, recipe: Recipe, work: Workspace, draft: Manifest) -> None:
    """Makes the finished ONNX decoder store keys and values in 8 bits."""
    from mobilevlm.export.finish.kv_cache import quantize_cache

    start = time.perf_counter()
    parts = tuple(part for part in draft.artifacts if part.format == "onnx")
    plan, obstacle = run_plan(model, work, dataclasses.replace(draft, artifacts=parts))
    if plan is None:
        raise MobileVLMError(f"kv_cache int8 is measured by running the decoder: {obstacle}")
    if quantize_cache(model, Bundle(work.folder, draft, digest=""), recipe.calibration):
        for part in parts:
            if part.stage in ("decoder", "prefill"):
                note_finished(work, part)
        progress.say(f"kv_cache    int8, measured in {time.perf_counter() - start:.1f} s")


def _system_prompt(model: Model, work: Workspace, draft: Manifest) -> SystemPrompt | None:
    """Stores the system prompt's keys and values, if there is one and an ONNX decoder."""
    ids = system_ids(model.tokenizer, model.spec.conversation, model.spec.encoded is not None)
    stages = "decoder", "prefill"
    parts = [part for part in draft.artifacts if part.format == "onnx" and part.stage in stages]
    if not ids or not parts:
        return None
    onnx = tuple(part for part in draft.artifacts if part.format == "onnx")
    plan, obstacle = run_plan(model, work, dataclasses.replace(draft, artifacts=onnx))
    if plan is None:
        progress.say(f"system      keys and values not stored ({obstacle})")
        return None
    return write_system_prompt(Bundle(work.folder, draft, digest=""), ids)


def _manifest(model: Model, recipe: Recipe, artifacts: tuple[Artifact, ...]) -> Manifest:
    """Without the quality, which is measured next, and the files, which are hashed last."""
    table = _embedding_table(model, artifacts)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        spec=model.spec,
        recipe=recipe.for_manifest(),
        artifacts=artifacts,
        embeddings=table,
        layer_embeddings=None if table is None else layer_table(table, model.spec.decoder),
        quality=Quality(False),
        files={},
        tools=tool_versions(formats_of(artifacts)),
    )


def _embedding_table(model: Model, artifacts: tuple[Artifact, ...]) -> EmbeddingTable | None:
    artifact = next((artifact for artifact in artifacts if artifact.stage == "embeddings"), None)
    if artifact is None:
        return None
    return EmbeddingTable(
        path=artifact.data[0],
        offset=0,
        dtype="float16" if artifact.precision == "fp16" else "float32",
        rows=model.spec.decoder.vocab_size,
        columns=model.spec.decoder.hidden_size,
    )


def _megabytes(files: dict[str, FileEntry]) -> float:
    return sum(entry.size for entry in files.values()) / 1e6

"""From checkpoint to bundle: artifact by artifact, measured, atomic, deterministic."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Mapping, Sequence
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
    StageQuality,
    SystemPrompt,
    WeightError,
    describe_files,
    named_files,
    write_manifest,
)
from mobilevlm.console import progress
from mobilevlm.conversation import system_ids
from mobilevlm.errors import MissingExtraError, MobileVLMError, require
from mobilevlm.export.finish.system_prompt import write_system_prompt
from mobilevlm.export.formats.jobs import JOBS, Job, fixed_context, tool_versions
from mobilevlm.export.quality.limits import (
    Check,
    check_limits,
    quality_error,
    require_checks,
    with_limits,
)
from mobilevlm.export.recipes.file import find_recipe
from mobilevlm.export.recipes.layer_formats import expand_layers
from mobilevlm.export.recipes.named import RECIPES
from mobilevlm.export.targets import find_target
from mobilevlm.export.targets.checks import check_memory, check_tools, compiled_for
from mobilevlm.export.targets.mobile import for_accelerator
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
from mobilevlm.families import open_checkpoint
from mobilevlm.gguf.architectures import gguf_architecture, is_own
from mobilevlm.model import Model, OpenOptions, open_options
from mobilevlm.plan import choose_engine, stage_names
from mobilevlm.recipe import LinearFormat, Recipe, WeightBits
from mobilevlm.runtime.machine import int8_weight_bits
from mobilevlm.spec import GGUFType, KVCache
from mobilevlm.tokenizers.tokenizer import save_tokenizer

FORMATS = tuple(JOBS)

MEMORY_RATIO, MEMORY_BASE = 1.5, 1e9
"""An export may use this many times the checkpoint's bytes, and so many bytes more."""
MEMORY_LIBRARIES = 0.5e9
"""What torch and onnxruntime take before they hold any weights."""
RESIDENT = {"fp32": 2.0, "fp16": 4.0, "qdq8": 2.3, "qdq16": 2.3}
"""At most so many times a weight file is resident while it is measured; others 1.3 times."""
RESIDENT_GGUF = 2.0


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
) -> Manifest:
    """Exports a checkpoint folder to a bundle folder, or a GGUF file with its ``mmproj``.

    ``recipe``: ``fp32``, ``fp16-weights``, ``int8``, ``int8-calibrated``, ``int4`` (the default),
    ``fast``, for NPUs ``a16w8`` or ``a8w8``, or a TOML file. ``target``: a device (export/targets)
    which settles recipe, formats and bits, and which the result is checked against.
    ``vision_tower``: the tower's folder, where it is not found beside the checkpoint.
    ``conversation``: ``v1``, ``llava_v1``,
    ``phi`` …, where the family's default is wrong. ``variant``: which official behaviour, where
    there are several and the checkpoint tells the wrong one. ``base``: the whole model that an
    adapter is merged into, where the checkpoint is one. ``measure``: compare the result with
    the float32 reference when torch is installed. ``formats``: ``onnx``, ``gguf``, ``npu`` or
    several. ``gguf_type``: type of the GGUF decoder, not the recipe's. ``imatrix``: file of an
    importance matrix to round the GGUF decoder with, or ``calibration``: ``scenes`` or a JSONL file
    (export/calibration/samples.py) to collect one from, and to calibrate the ONNX artifacts with
    where the recipe's methods need data. ``weight_bits``: of ``int8`` weights, for a device unlike
    this machine: 7 for x86 without VNNI, 8 for all others. ``kv_cache``: how the ONNX decoder
    stores keys and values, not the recipe's. ``limits``: by name, instead of the recipe's
    (``decoder_kl`` … as in a recipe file); the export fails where one of them cannot be checked.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        BundleError: the target is in the way.
        QualityError: an artifact is further from the reference than the recipe allows.
        TargetError: the result would not run on the target.
    """
    goal = None if target is None else find_target(target)
    if goal is not None:
        if recipe is not None or formats is not None or weight_bits is not None:
            raise MobileVLMError(
                f"target {goal.name} settles recipe, format and weight bits: leave them out"
            )
        formats, weight_bits = goal.formats, goal.weight_bits
        check_tools(goal)
    formats = formats or ("onnx",)
    for name in formats:
        if name not in FORMATS:
            raise MobileVLMError(f"format {name!r} is not known: expected {', '.join(FORMATS)}")
    start = time.perf_counter()
    chosen = goal.settled() if goal else find_recipe(recipe or "int4")
    if limits:
        if not measure:
            raise MobileVLMError("--limit is checked by measuring: leave --no-measure out")
        chosen = with_limits(chosen, limits)
    if gguf_type is not None:
        chosen = dataclasses.replace(chosen, gguf=gguf_type)
    if kv_cache is not None:
        chosen = _with_kv_cache(chosen, kv_cache, formats)
    if imatrix is not None or calibration is not None:
        chosen = _with_data(chosen, imatrix, calibration, formats)
    chosen = _with_weight_bits(chosen, weight_bits, formats)
    options = open_options(vision_tower, conversation, variant, base)
    place = check_target(Path(bundle))
    model = _open(Path(checkpoint), options, Path(mmproj) if mmproj else None, formats)
    if "npu" in formats:
        model = fixed_context(model, chosen)
    chosen = expand_layers(in_stored_blocks(chosen, model), model.spec)
    jobs = [job for form in formats for job in JOBS[form](model, chosen)]
    _check_vision(model, jobs)
    with open_workspace(place) as work:
        for note in model.weights.notes:
            progress.say(note)
        artifacts = tuple(_make(job, work) for job in jobs)
        save_tokenizer(model.tokenizer, work.path(TOKENIZER))
        if model.instruction_tokenizer is not None:
            save_tokenizer(model.instruction_tokenizer, work.path(INSTRUCTION_TOKENIZER))
        draft = _manifest(model, chosen, artifacts)
        if chosen.kv_cache != "fp32" and "onnx" in formats:
            _quantize_cache(model, chosen, work, draft)
        draft = dataclasses.replace(draft, system_prompt=_system_prompt(model, work, draft))
        quality = _measure(model, chosen, work, draft, measure, limits or ())
        if goal is not None:
            draft = compiled_for(goal, work, draft)
            draft = for_accelerator(goal, work, draft, model)
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


def export_imatrix(
    checkpoint: str | PathLike[str],
    path: str | PathLike[str],
    *,
    calibration: str | PathLike[str] = "scenes",
    vision_tower: str | PathLike[str] | None = None,
    conversation: str | None = None,
    variant: str | None = None,
    base: str | PathLike[str] | None = None,
) -> None:
    """Collects an importance matrix of a checkpoint folder and writes it in llama.cpp's format.

    ``calibration``: ``scenes`` or a JSONL file (export/calibration/samples.py).

    Raises:
        CheckpointError: the checkpoint cannot be read.
        BundleError: the target is in the way.
        MobileVLMError, ImageError, PromptError: a sample is wrong.
        MissingExtraError: torch is not installed.
    """
    try:
        from mobilevlm.export.gguf.imatrix import check_imatrix_target, write_imatrix
        from mobilevlm.export.gguf.importance import calibrated_importance
    except ImportError as error:
        purpose = "collecting an importance matrix"
        raise require(error.name or "gguf", "reference", purpose) from None
    start = time.perf_counter()
    target = Path(path)
    check_imatrix_target(target)
    options = open_options(vision_tower, conversation, variant, base)
    model = open_checkpoint(Path(checkpoint), options)
    architecture = gguf_architecture(model.spec.decoder)
    if is_own(architecture):
        raise MobileVLMError(
            f"{checkpoint}: importance matrices are for llama.cpp's architectures, this decoder's "
            f"is {architecture}"
        )
    matrix = calibrated_importance(model, str(calibration)).load()
    write_imatrix(matrix, target)
    progress.say(
        f"imatrix     {path}  {len(matrix.entries)} matrices, samples: {matrix.chunk_count}, "
        f"{time.perf_counter() - start:.1f} s"
    )


def _with_data(
    recipe: Recipe,
    imatrix: str | PathLike[str] | None,
    calibration: str | PathLike[str] | None,
    formats: Sequence[str],
) -> Recipe:
    """The recipe with these instead of its own."""
    if calibration is not None and set(formats) - {"gguf"} and recipe.is_calibrated:
        recipe = dataclasses.replace(recipe, calibration=str(calibration))
        if "gguf" not in formats and imatrix is None:
            return recipe
    if "gguf" not in formats:
        raise MobileVLMError(
            f"recipe {recipe.name!r} takes no calibration data for ONNX, and importance matrices "
            f"are for GGUF files: add --format gguf or all, or use gptq, awq or smoothquant"
        )
    return dataclasses.replace(
        recipe,
        gguf_imatrix=None if imatrix is None else str(Path(imatrix)),
        gguf_calibration=None if calibration is None else str(calibration),
    )


def _with_kv_cache(recipe: Recipe, kv_cache: KVCache, formats: Sequence[str]) -> Recipe:
    """The recipe with keys and values stored so."""
    if "onnx" not in formats:
        raise MobileVLMError(
            f"--kv-cache {kv_cache} is about the ONNX decoder, there is none: leave it out"
        )
    return dataclasses.replace(recipe, kv_cache=kv_cache)


def _with_weight_bits(recipe: Recipe, wanted: WeightBits | None, formats: Sequence[str]) -> Recipe:
    """The recipe with the bits of its ``int8`` weights settled."""
    if wanted is None:
        return recipe.with_weight_bits(int8_weight_bits() or 7, auto_only=True)
    if "onnx" not in formats or not recipe.has_int8:
        raise MobileVLMError(
            f"recipe {recipe.name!r} has no int8 weights in ONNX that --weight-bits {wanted} could "
            f"be about: leave it out"
        )
    return recipe.with_weight_bits(wanted, auto_only=False)


def in_stored_blocks(recipe: Recipe, model: Model) -> Recipe:
    """The recipe; of a model in llama.cpp's Q4_0 a built-in one with 4 bits takes over its blocks,
    so that nothing is rounded again."""
    decoder = model.spec.decoder
    last = f"{decoder.mlp_names(0)[0]}.{decoder.mlp_linears[1]}.weight"
    is_built_in = recipe.name in RECIPES and recipe.decoder == RECIPES["int4"].decoder
    if not is_built_in or model.weights.q4_0(last) is None:
        return recipe
    layers = LinearFormat("q4")
    return dataclasses.replace(recipe, decoder=layers, lm_head=layers)


def _open(
    checkpoint: Path, options: OpenOptions, mmproj: Path | None, formats: Sequence[str]
) -> Model:
    """A checkpoint folder, or a pair of GGUF files."""
    if checkpoint.suffix != ".gguf":
        if mmproj is not None:
            raise MobileVLMError(f"{checkpoint}: --mmproj goes with a GGUF file, this is none")
        return open_checkpoint(checkpoint, options)
    if mmproj is None:
        raise MobileVLMError(f"{checkpoint}: add the image encoder with --mmproj FILE")
    if options != OpenOptions() or "gguf" in formats:
        raise MobileVLMError(
            f"{checkpoint}: a GGUF file becomes ONNX only, and carries its tower and conversation: "
            f"leave --format, --vision-tower, --conversation, --variant and --base out"
        )
    try:
        from mobilevlm.export.gguf.source import open_gguf
    except ImportError as error:
        raise require(error.name or "gguf", "export", f"reading {checkpoint}") from None
    return open_gguf(checkpoint, mmproj)


def _check_vision(model: Model, jobs: Sequence[Job]) -> None:
    """Raises MobileVLMError: nothing would see the pictures, since llama.cpp cannot."""
    forms = {(job.artifact.stage, job.artifact.format) for job in jobs}
    if ("decoder", "gguf") not in forms or ("vision", "gguf") in forms:
        return
    from mobilevlm.export.gguf.mmproj import check_support, obstacle

    if ("vision", "onnx") not in forms:
        check_support(model.spec)
    progress.say(f"vision      no GGUF file ({obstacle(model.spec)}): engine hybrid uses ONNX")


def _make(job: Job, work: Workspace) -> Artifact:
    """Takes a finished artifact over, or authors it."""
    stage = job.artifact.stage
    ready = take_over(work, job.artifact)
    if ready is not None:
        progress.say(f"{stage:<12}{ready.path}  unchanged, taken over")
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
    parts = [part for part in draft.artifacts if part.format == "onnx"]
    obstacle = _run_obstacle(model, work, parts)
    if obstacle:
        raise MobileVLMError(f"kv_cache int8 is measured by running the decoder: {obstacle}")
    if quantize_cache(model, Bundle(work.folder, draft, digest=""), recipe.calibration):
        for part in parts:
            if part.stage in ("decoder", "prefill"):
                note_finished(work, part)
        progress.say(f"kv_cache    int8, measured in {time.perf_counter() - start:.1f} s")


def _system_prompt(model: Model, work: Workspace, draft: Manifest) -> SystemPrompt | None:
    """Stores the system prompt's keys and values, if there is one and an ONNX decoder."""
    ids = system_ids(model.tokenizer, model.spec.conversation)
    stages = "decoder", "prefill"
    parts = [part for part in draft.artifacts if part.format == "onnx" and part.stage in stages]
    if not ids or not parts:
        return None
    obstacle = _run_obstacle(model, work, parts)
    if obstacle:
        progress.say(f"system      keys and values not stored ({obstacle})")
        return None
    return write_system_prompt(Bundle(work.folder, draft, digest=""), ids)


def _measure(
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
    for form in _formats_of(draft.artifacts):
        artifacts = tuple(part for part in draft.artifacts if part.format == form)
        if all(part.stage != "vision" for part in artifacts):  # llama.cpp cannot see: hybrid
            seeing = (part for part in draft.artifacts if part.stage == "vision")
            artifacts = (*artifacts, *seeing)
        obstacle = _obstacle(model, work, artifacts) if wanted else "not wanted"
        if obstacle:
            obstacles[form] = obstacle
            continue
        from mobilevlm.export.quality.artifact_weights import artifact_weights
        from mobilevlm.export.quality.layer_effects import layer_effects, worst_layers
        from mobilevlm.export.quality.measure import measure, synthetic_samples, with_own_answers

        start = time.perf_counter()
        bundle = Bundle(work.folder, dataclasses.replace(draft, artifacts=artifacts), digest="")
        engine = choose_engine(bundle, "auto")
        samples = synthetic_samples(model.spec.image.preparation.size)
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
            effects = layer_effects(model, stored, with_own_answers(model, measured))
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
    return _run_obstacle(model, work, artifacts)


def _run_obstacle(model: Model, work: Workspace, artifacts: Sequence[Artifact]) -> str:
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


def _formats_of(artifacts: tuple[Artifact, ...]) -> list[str]:
    """Their formats, each once."""
    return list(dict.fromkeys(artifact.format for artifact in artifacts))


def _manifest(model: Model, recipe: Recipe, artifacts: tuple[Artifact, ...]) -> Manifest:
    """Without the quality, which is measured next, and the files, which are hashed last."""
    return Manifest(
        schema_version=SCHEMA_VERSION,
        spec=model.spec,
        recipe=recipe.for_manifest(),
        artifacts=artifacts,
        embeddings=_embedding_table(model, artifacts),
        quality=Quality(False),
        files={},
        tools=tool_versions(_formats_of(artifacts)),
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

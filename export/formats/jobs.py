"""The artifacts that a recipe asks for: what each depends on, and how it is written."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import mobilevlm
from mobilevlm._version import __version__
from mobilevlm.bundle import Artifact, StageName
from mobilevlm.console.progress import Advance
from mobilevlm.errors import MobileVLMError, require
from mobilevlm.export.calibration.samples import Sample, find_samples, samples_digest
from mobilevlm.export.calibration.stages import calibrate, calibration_key, check_torch
from mobilevlm.export.formats.written import Written
from mobilevlm.export.recipes.layer_formats import bits_per_weight
from mobilevlm.gguf.architectures import gguf_architecture, is_own
from mobilevlm.gguf.file import read_gguf
from mobilevlm.gguf.spec import bytes_per_token
from mobilevlm.linear_groups import linear_groups
from mobilevlm.model import Model
from mobilevlm.recipe import QDQ, Recipe
from mobilevlm.spec import GGUFType, ModelSpec, to_dict

QDQ_TOOLS = ("onnx", "onnxruntime")
"""Packages that make fixed-point graphs of float ones."""
TOOLS = {
    "onnx": ("onnx-ir", "onnxscript"),
    "gguf": ("gguf",),
    "npu": ("onnx-ir", "onnxscript", *QDQ_TOOLS),
}
"""Packages that write the artifacts of a format."""

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
    """What comes before, with progress of its own."""


def onnx_jobs(model: Model, recipe: Recipe) -> list[Job]:
    """All stages of a model as ONNX files."""
    try:
        from mobilevlm.export.finish.kv_cache import check_cache
        from mobilevlm.export.fixed_shapes.vision import author_qdq, check_onnx
        from mobilevlm.export.graph import author
    except ImportError as error:
        raise require(error.name or "onnxscript", "export", "exporting") from None
    spec = model.spec
    samples: list[Sample] = []
    if recipe.decoder.precision in QDQ:
        raise MobileVLMError(
            f"recipe {recipe.name!r}: a decoder in fixed point is for NPUs: add --format npu"
        )
    if recipe.elementary and {recipe.tower.precision, recipe.projector.precision} != {"fp32"}:
        raise MobileVLMError(
            f"recipe {recipe.name!r}: elementary operators are for a vision stage in float: give "
            f"tower and projector fp32"
        )
    if recipe.needs_reference:
        check_torch("a calibrated recipe")
    if spec.decoder.encoder_layers and any(
        layers.needs_reference for layers in (recipe.decoder, recipe.lm_head)
    ):
        raise MobileVLMError(
            f"recipe {recipe.name!r}: the decoder of {spec.name} has an encoder, which calibration "
            f"does not run: use rtn or hqq for it, without scaling"
        )
    if spec.decoder.encoder_layers and recipe.prefill is not None:
        raise MobileVLMError(
            f"recipe {recipe.name!r}: the decoder of {spec.name} has an encoder that reads "
            f"prompts: choose a recipe without 'prefill'"
        )
    if recipe.is_calibrated:
        samples = find_samples(recipe.calibration)
    if recipe.kv_cache != "fp32":
        check_cache(model)
    if recipe.tower.precision in QDQ:
        check_onnx()

    def job(
        stage: StageName,
        name: str,
        precision: str,
        prefixes: tuple[str, ...],
        settings: list[Any],
        write: Callable[..., Written],
        recipe: Recipe = recipe,
    ) -> Job:
        # As the hub's ONNX community names files.
        path = f"onnx/{name}{'' if precision == 'fp32' else f'_{precision}'}.onnx"
        groups = [group for group in linear_groups(spec) if f"{group.name}.".startswith(prefixes)]
        formats = [recipe.format_of(group.name) for group in groups]
        settings = [path, precision, *map(to_dict, formats), *settings]
        form = recipe if stage == "vision" else replace(recipe, operators="runtime")
        if form.elementary:
            settings += [form.operators, form.layer_norm]
        referred = any(layers.needs_reference for layers in formats)
        if referred:
            settings.append(calibration_key(model, samples))
        if precision in QDQ:
            settings += [recipe.layer_norm, samples_digest(samples)]
            settings += map(importlib.metadata.version, QDQ_TOOLS)

        def author(file: Path, advance: Advance) -> Written:
            if not referred or stage == "embeddings" or stage == "encoder":
                return write(model.weights, spec, form, file, advance)
            ready = calibrate(model, recipe, samples, "vision" if stage == "vision" else "decoder")
            return write(ready.weights, spec, form, file, advance, ready.hessian)

        key = _key(model, "onnx", prefixes, settings)
        artifact = Artifact(
            stage,
            "onnx",
            precision,
            path,
            (f"{path}_data",),
            key,
            bits_per_weight=round(bits_per_weight(recipe, groups), 4) if groups else None,
            weight_bits=max((layers.int8_weight_bits for layers in formats), default=0) or None,
        )
        return Job(artifact, _size(model, prefixes), author)

    encoder = []
    if spec.decoder.encoder_layers:
        encoder.append(
            job(
                "encoder",
                "encoder_model",
                recipe.decoder.precision,
                ("decoder.encoder.",),
                [to_dict(spec.decoder)],
                author.author_encoder,
            )
        )
    decoder = ("decoder.layers.", "decoder.norm.", "decoder.lm_head.")
    cache = [] if recipe.kv_cache == "fp32" else [recipe.kv_cache, samples_digest(samples)]
    jobs = [
        job(
            "vision",
            "vision_encoder",
            recipe.tower.precision,
            ("vision.", "projector."),
            [
                to_dict(spec.image.encoder),
                to_dict(spec.image.connector),
                to_dict(spec.image.preparation),
            ],
            partial(author_qdq, samples) if recipe.tower.precision in QDQ else author.author_vision,
        ),
        job(
            "embeddings",
            "embed_tokens",
            recipe.embeddings,
            ("decoder.embed_tokens.",),
            [to_dict(spec.decoder)],
            author.author_embeddings,
        ),
        *encoder,
        job(
            "decoder",
            "decoder_model_merged",
            recipe.decoder.precision,
            decoder,
            [to_dict(spec.decoder), recipe.experts, *cache],
            author.author_decoder,
        ),
    ]
    if recipe.prefill is not None:
        precision, settings = recipe.prefill.precision, [to_dict(spec.decoder), *cache]
        prompts = recipe.for_prefill()
        write = author.author_decoder
        jobs.append(job("prefill", "decoder_prefill", precision, decoder, settings, write, prompts))
    return jobs


def gguf_jobs(model: Model, recipe: Recipe) -> list[Job]:
    """Both stages of a model as GGUF files, named by the convention of the format; only the decoder
    where llama.cpp has no graph for the other."""
    try:
        from mobilevlm.export.gguf.decoder import write_decoder
        from mobilevlm.export.gguf.importance import find_importance
        from mobilevlm.export.gguf.llama_quantizer import quantizer_version
        from mobilevlm.export.gguf.mmproj import obstacle, write_mmproj
        from mobilevlm.export.gguf.tensors import TYPES
    except ImportError as error:
        raise require(error.name or "gguf", "export", "exporting to GGUF") from None
    spec = model.spec
    architecture = gguf_architecture(spec.decoder)
    name = re.sub(r"[^\w.-]+", "-", spec.name)

    def job(
        stage: StageName,
        prefix: str,
        kind: GGUFType,
        prefixes: tuple[str, ...],
        settings: list[Any],
        write: Callable[[Model, GGUFType, Path, Advance], Written],
    ) -> Job:
        path = f"gguf/{prefix}{name}-{kind.upper()}.gguf"
        key = _key(model, "gguf", prefixes, [path, kind, *settings])
        artifact = Artifact(stage, "gguf", kind, path, (), key)
        return Job(
            artifact,
            _size(model, prefixes),
            lambda file, advance: write(model, kind, file, advance),
        )

    kind = recipe.gguf_type
    weighted = recipe.gguf_imatrix is not None or recipe.gguf_calibration is not None
    if is_own(architecture) and weighted:
        raise MobileVLMError(
            f"GGUF type {kind} by importance: importance matrices are for llama.cpp's "
            f"architectures, this decoder's is {architecture}: leave --imatrix and --calibration "
            f"out"
        )
    importance = find_importance(model, recipe)
    if kind not in TYPES:
        quantizer = quantizer_version(f"the type {kind}")
    else:
        quantizer = quantizer_version("an importance matrix") if importance else ""

    def picture(model: Model, kind: GGUFType, path: Path, advance: Advance) -> Written:
        return Written(write_mmproj(model, kind, path, advance))

    def decoder(model: Model, kind: GGUFType, path: Path, advance: Advance) -> Written:
        matrix = None if importance is None else importance.load()
        errors = write_decoder(model, kind, path, advance, matrix)
        return Written(errors, bytes_per_token(read_gguf(path), spec.decoder))

    tokenizer = hashlib.sha256(model.tokenizer.to_str().encode()).hexdigest()
    jobs = [
        job(
            "vision",
            "mmproj-",
            recipe.mmproj_type,
            ("vision.", "projector."),
            [
                to_dict(spec.image.encoder),
                to_dict(spec.image.connector),
                to_dict(spec.image.preparation),
            ],
            picture,
        ),
        job(
            "decoder",
            "",
            kind,
            ("decoder.",),
            [
                to_dict(spec.decoder),
                to_dict(spec.conversation),
                tokenizer,
                quantizer,
                importance.key if importance else "",
            ],
            decoder,
        ),
    ]
    if obstacle(spec):
        jobs = jobs[-1:]
    if importance is not None:
        jobs[-1] = replace(jobs[-1], prepare=importance.load)
    return jobs


def _check_npu_family(spec: ModelSpec) -> None:
    """Raises MobileVLMError: a part that has no graph of fixed shapes."""
    parts = {
        "a decoder with an encoder": spec.decoder.encoder_layers > 0,
        "a decoder with learned positions": spec.decoder.learned_positions,
        "a Q-Former": spec.image.connector.qformer is not None,
        **{f"a decoder with {part}": True for part in spec.decoder.only_onnx},
    }
    if found := [name for name, there in parts.items() if there]:
        raise MobileVLMError(f"no graphs for NPUs of {found[0]} yet: use --format onnx")


def npu_jobs(model: Model, recipe: Recipe) -> list[Job]:
    """All stages of a model as graphs for NPUs: fixed shapes and standard operators, in fixed point
    or, of elementary operators, in float. The decoder is two graphs with one file of weights."""
    try:
        from mobilevlm.export.fixed_shapes.decoder import author_qdq_decoder
        from mobilevlm.export.fixed_shapes.float_decoder import author_float_decoder
        from mobilevlm.export.fixed_shapes.vision import author_qdq, check_onnx
        from mobilevlm.export.graph import author
    except ImportError as error:
        raise require(error.name or "onnxscript", "export", "exporting for NPUs") from None
    check_onnx()
    _check_npu_family(model.spec)
    if not (recipe.is_for_npu or recipe.is_float) or recipe.needs_reference:
        raise MobileVLMError(
            f"recipe {recipe.name!r}: graphs for NPUs are in fixed point as a whole, rounded to "
            f"nearest, or in float: choose --recipe a16w8, a8w8 or fp32, or {' or '.join(QDQ)} for "
            f"all parts"
        )
    if recipe.is_float:
        recipe = replace(recipe, operators="elementary")
    elif recipe.elementary:
        raise MobileVLMError(
            f"recipe {recipe.name!r}: elementary operators are for graphs in float: leave "
            f"'operators' out"
        )
    recipe = recipe.with_weight_bits(8, auto_only=True)
    spec, samples = model.spec, [] if recipe.is_float else find_samples(recipe.calibration)
    digest, precision = samples_digest(samples), recipe.decoder.precision
    window = spec.decoder.context_length
    chunk = min(recipe.chunk_length, window)
    shapes = [author.ChunkShape(length, window) for length in (chunk, 1)]
    table = "" if recipe.embeddings == "fp32" else f"_{recipe.embeddings}"
    suffix = "" if recipe.is_float else f"_{precision}"
    vision = f"npu/vision_encoder{'' if recipe.is_float else f'_{recipe.tower.precision}'}.onnx"
    prefill, token = (f"npu/decoder_{part}{suffix}.onnx" for part in ("prefill", "token"))
    shared = f"npu/decoder{suffix}.onnx_data"

    def job(
        stage: StageName,
        kind: str,
        files: tuple[str, ...],
        prefixes: tuple[str, ...],
        settings: list[Any],
        write: Author,
    ) -> Job:
        groups = [group for group in linear_groups(spec) if f"{group.name}.".startswith(prefixes)]
        bits = round(bits_per_weight(recipe, groups), 4) if groups else None
        key = _key(model, "npu", prefixes, [kind, files, *settings])
        artifact = Artifact(stage, "npu", kind, files[0], files[1:], key, bits_per_weight=bits)
        return Job(artifact, _size(model, prefixes), write)

    def write_vision(path: Path, advance: Advance) -> Written:
        if recipe.is_float:
            return author.author_vision(model.weights, spec, recipe, path, advance)
        return author_qdq(samples, model.weights, spec, recipe, path, advance)

    def write_table(path: Path, advance: Advance) -> Written:
        return author.author_embeddings(model.weights, spec, recipe, path, advance)

    def write_decoder(path: Path, advance: Advance) -> Written:
        paths = [path, path.parent / Path(token).name]
        data = path.parent / Path(shared).name
        if recipe.is_float:
            return author_float_decoder(model, recipe, paths, shapes, data, advance)
        return author_qdq_decoder(model, samples, recipe, paths, shapes, data, advance)

    towers = [
        to_dict(part) for part in (spec.image.encoder, spec.image.connector, spec.image.preparation)
    ]
    sizes, form = [to_dict(shape) for shape in shapes], [recipe.layer_norm, recipe.operators]
    return [
        job(
            "vision",
            recipe.tower.precision,
            (vision, f"{vision}_data"),
            ("vision.", "projector."),
            [*towers, to_dict(recipe.tower), form, digest],
            write_vision,
        ),
        job(
            "embeddings",
            recipe.embeddings,
            (f"npu/embed_tokens{table}.onnx", f"npu/embed_tokens{table}.onnx_data"),
            ("decoder.embed_tokens.",),
            [to_dict(spec.decoder)],
            write_table,
        ),
        job(
            "decoder",
            precision,
            (prefill, token, shared),
            ("decoder.", "vision.", "projector."),  # of pictures it is calibrated with all
            [*towers, to_dict(spec.decoder), to_dict(recipe.decoder), form, sizes, digest],
            write_decoder,
        ),
    ]


def fixed_context(model: Model, recipe: Recipe) -> Model:
    """The model with no more context than graphs of fixed shapes have room for."""
    context = min(model.spec.decoder.context_length, recipe.context_length)
    decoder = replace(model.spec.decoder, context_length=context)
    return replace(model, spec=replace(model.spec, decoder=decoder))


JOBS: dict[str, Callable[[Model, Recipe], list[Job]]] = {
    "onnx": onnx_jobs,
    "gguf": gguf_jobs,
    "npu": npu_jobs,
}
"""What makes the artifacts of each format."""


def tool_versions(formats: Sequence[str]) -> dict[str, str]:
    """Versions of what writes the artifacts of these formats."""
    packages = [package for form in formats for package in TOOLS[form]]
    versions = {package: importlib.metadata.version(package) for package in packages}
    return {"mobilevlm-edge": __version__, **versions}


def _size(model: Model, prefixes: tuple[str, ...]) -> int:
    weights = model.weights
    return sum(weights.size(tensor) for tensor in weights if tensor.startswith(prefixes))


def _key(model: Model, form: str, prefixes: tuple[str, ...], settings: list[Any]) -> str:
    """Digest of everything an artifact is made of: weights, settings, tools and our own code."""
    inputs = [model.weights.sha256(prefix) for prefix in prefixes]
    parts = [settings, inputs, tool_versions([form]), _code_digest()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@cache
def _code_digest() -> str:
    digest = hashlib.sha256()
    export, package = Path(__file__).parents[1], Path(mobilevlm.__file__).parent
    shared = (package / name for name in ("linear_groups.py", "recipe.py"))
    for path in [*sorted(export.rglob("*.py")), *shared]:
        digest.update(path.read_bytes())
    return digest.hexdigest()

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

from mobilevlm._version import __version__
from mobilevlm.bundle import Artifact, StageName
from mobilevlm.errors import MobileVLMError, require
from mobilevlm.export.calibrated import calibrate, calibration_key, check_torch
from mobilevlm.export.calibration import Sample, find_samples, samples_digest
from mobilevlm.export.layer_formats import bits_per_weight
from mobilevlm.export.linear_groups import linear_groups
from mobilevlm.export.recipes import QDQ, Recipe
from mobilevlm.export.written import Written
from mobilevlm.families import Model
from mobilevlm.gguf_file import read_gguf
from mobilevlm.gguf_names import gguf_architecture, is_own
from mobilevlm.gguf_spec import bytes_per_token
from mobilevlm.progress import Advance
from mobilevlm.spec import GGUFType, to_dict

TOOLS = {"onnx": ("onnx-ir", "onnxscript"), "gguf": ("gguf",)}
"""Packages that write the artifacts of a format."""
QDQ_TOOLS = ("onnx", "onnxruntime")
"""Those that make fixed-point graphs of float ones."""

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
        from mobilevlm.export.graph import author
        from mobilevlm.export.qdq import author_qdq, check_onnx
    except ImportError as error:
        raise require(error.name or "onnxscript", "export", "exporting") from None
    spec = model.spec
    samples: list[Sample] = []
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
        referred = any(layers.needs_reference for layers in formats)
        if referred:
            settings.append(calibration_key(model, samples))
        if precision in QDQ:
            settings += [samples_digest(samples), *map(importlib.metadata.version, QDQ_TOOLS)]

        def author(file: Path, advance: Advance) -> Written:
            if not referred or stage == "embeddings" or stage == "encoder":
                return write(model.weights, spec, recipe, file, advance)
            ready = calibrate(model, recipe, samples, "vision" if stage == "vision" else "decoder")
            return write(ready.weights, spec, recipe, file, advance, ready.hessian)

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
    jobs = [
        job(
            "vision",
            "vision_encoder",
            recipe.tower.precision,
            ("vision.", "projector."),
            [to_dict(spec.vision), to_dict(spec.projector), to_dict(spec.image)],
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
            [to_dict(spec.decoder), recipe.experts],
            author.author_decoder,
        ),
    ]
    if recipe.prefill is not None:
        precision, settings = recipe.prefill.precision, [to_dict(spec.decoder)]
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
            [to_dict(spec.vision), to_dict(spec.projector), to_dict(spec.image)],
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


JOBS: dict[str, Callable[[Model, Recipe], list[Job]]] = {"onnx": onnx_jobs, "gguf": gguf_jobs}
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
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()

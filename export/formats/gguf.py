"""GGUF artifacts: language model and image encoder, named by the convention of the format."""

from __future__ import annotations

import re
from pathlib import Path

from mobilevlm.console.progress import Advance
from mobilevlm.errors import require
from mobilevlm.export.calibration.samples import tokenizer_digests
from mobilevlm.export.formats import ENCODED, Job, Written, encoder_settings, make_job, refuse
from mobilevlm.gguf.architectures import gguf_architecture, is_own
from mobilevlm.gguf.file import read_gguf
from mobilevlm.gguf.spec import bytes_per_token
from mobilevlm.model import Model
from mobilevlm.plain_types import to_dict
from mobilevlm.recipe import Recipe


def gguf_jobs(model: Model, recipe: Recipe) -> list[Job]:
    """Both stages of a model as GGUF files; only the decoder where llama.cpp has no graph for the
    other."""
    try:
        from mobilevlm.export.gguf.decoder import write_decoder
        from mobilevlm.export.gguf.importance import find_importance
        from mobilevlm.export.gguf.llama_quantizer import quantizer_version
        from mobilevlm.export.gguf.mmproj import write_mmproj
        from mobilevlm.export.gguf.support import obstacle, warn_of_differences
        from mobilevlm.export.gguf.tensors import TYPES
    except ImportError as error:
        raise require(error.name or "gguf", "export", "exporting to GGUF") from None
    spec, kind, image_kind = model.spec, recipe.gguf_type, recipe.mmproj_type
    architecture = gguf_architecture(spec.decoder)
    weighted = recipe.gguf_imatrix is not None or recipe.gguf_calibration is not None
    why = (
        f"GGUF type {kind} by importance: importance matrices are for llama.cpp's architectures, "
        f"this decoder's is {architecture}: leave --imatrix and --calibration out"
    )
    refuse([(is_own(architecture) and weighted, why)])
    importance = find_importance(model, recipe)
    quantizer = ""
    if kind not in TYPES:
        quantizer = quantizer_version(f"the type {kind}")
    elif importance:
        quantizer = quantizer_version("an importance matrix")
    name = re.sub(r"[^\w.-]+", "-", spec.name)

    def write_image(path: Path, advance: Advance) -> Written:
        return Written(write_mmproj(model, image_kind, path, advance))

    def write_language(path: Path, advance: Advance) -> Written:
        matrix = None if importance is None else importance.load()
        errors = write_decoder(model, kind, path, advance, matrix)
        return Written(errors, bytes_per_token(read_gguf(path), spec.decoder))

    jobs = []
    if spec.has_images and not obstacle(spec):
        warn_of_differences(spec)
        files = (f"gguf/mmproj-{name}-{image_kind.upper()}.gguf",)
        settings = encoder_settings(spec)
        jobs += [
            make_job(model, "gguf", "vision", image_kind, files, ENCODED, settings, write_image)
        ]
    settings = [
        to_dict(spec.decoder),
        to_dict(spec.conversation),
        tokenizer_digests(model),
        quantizer,
        importance.key if importance else "",
    ]
    language = make_job(
        model,
        "gguf",
        "decoder",
        kind,
        (f"gguf/{name}-{kind.upper()}.gguf",),
        ("decoder.",),
        settings,
        write_language,
        None if importance is None else importance.load,
    )
    return [*jobs, language]

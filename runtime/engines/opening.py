"""A bundle's artifacts to engines. Packages are imported where they are used."""

from __future__ import annotations

import warnings
from pathlib import Path

from mobilevlm.bundle import Bundle
from mobilevlm.errors import BundleError, PrecisionWarning
from mobilevlm.plan import ENGINES
from mobilevlm.runtime.engines import DecoderEngine, VisionEngine
from mobilevlm.runtime.machine import int8_weight_bits


def open_engines(bundle: Bundle, engine: str, threads: int) -> tuple[VisionEngine, DecoderEngine]:
    """Opens both stages. ``engine``: a key of ENGINES.

    Raises:
        BundleError: an artifact cannot be loaded.
        MissingExtraError: llama-cpp-python is needed and not installed.
    """
    spec = bundle.manifest.spec
    _check_weight_bits(bundle, engine)
    vision, decoder = (
        bundle.path(bundle.artifact(stage, ENGINES[engine][stage]).path)
        for stage in ("vision", "decoder")
    )
    if engine == "onnx":
        return _onnx_vision(vision, threads), _onnx_decoder(bundle, decoder, threads)
    from mobilevlm.runtime.engines.llama_cpp import LlamaDecoder

    language = LlamaDecoder(decoder, spec.decoder, threads)
    if engine == "hybrid":
        return _onnx_vision(vision, threads), language
    from mobilevlm.runtime.engines.mtmd import MtmdVision

    return MtmdVision(vision, spec, language.model, threads), language


def _check_weight_bits(bundle: Bundle, engine: str) -> None:
    """Warns where other int8 weights than those of the artifacts in use fit this machine."""
    best = int8_weight_bits()
    used = (bundle.artifact(stage, kind) for stage, kind in ENGINES[engine].items())
    found = max((artifact.weight_bits or 0 for artifact in used), default=0)
    if best is None or found in (0, best):
        return
    what = (
        "8-bit weights saturate on this processor, answers may be wrong"
        if found > best
        else "this processor takes 8-bit weights at the same speed, the bundle has 7-bit ones"
    )
    remedy = f"export it with --weight-bits {best}"
    warnings.warn(f"{bundle.folder}: {what}: {remedy}", PrecisionWarning, stacklevel=2)


def _onnx_vision(path: Path, threads: int) -> VisionEngine:
    from mobilevlm.runtime.engines.onnx import OnnxVision

    return OnnxVision(path, threads)


def _onnx_decoder(bundle: Bundle, path: Path, threads: int) -> DecoderEngine:
    from mobilevlm.runtime.engines.onnx import OnnxDecoder

    spec, table = bundle.manifest.spec, bundle.manifest.embeddings
    if table is None:
        raise BundleError(f"{bundle.folder}: no embedding table: export the bundle again")
    return OnnxDecoder(path, bundle.path(table.path), table, spec.decoder, threads)

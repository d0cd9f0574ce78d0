"""A bundle's artifacts to engines. Packages are imported where they are used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mobilevlm.bundle import Bundle
from mobilevlm.errors import BundleError
from mobilevlm.plan import stage_formats
from mobilevlm.runtime.engines import DecoderEngine, VisionEngine
from mobilevlm.spec import ModelSpec

if TYPE_CHECKING:
    from mobilevlm.runtime.engines.llama_native import NativeModel


def open_engines(bundle: Bundle, engine: str, threads: int) -> tuple[VisionEngine, DecoderEngine]:
    """Opens both stages. ``engine``: one that the bundle has artifacts for.

    Raises:
        BundleError: an artifact cannot be loaded.
        MissingExtraError: llama-cpp-python is needed and not installed.
    """
    spec, formats = bundle.manifest.spec, stage_formats(bundle, engine)
    vision, decoder = (
        bundle.path(bundle.artifact(stage, formats[stage]).path) for stage in ("vision", "decoder")
    )
    if engine == "onnx":
        return _onnx_vision(vision, threads), _onnx_decoder(bundle, decoder, threads)
    if engine == "ggml":
        from mobilevlm.runtime.engines.ggml import GgmlDecoder

        own = GgmlDecoder(decoder, spec.decoder, threads)
        if formats["vision"] == "onnx":
            return _onnx_vision(vision, threads), own
        from mobilevlm.runtime.engines.stand_in import stand_in

        return _mtmd_vision(vision, spec, stand_in(spec.decoder.hidden_size), threads), own
    from mobilevlm.runtime.engines.llama_cpp import LlamaDecoder

    language = LlamaDecoder(decoder, spec.decoder, threads)
    if engine == "hybrid":
        return _onnx_vision(vision, threads), language
    return _mtmd_vision(vision, spec, language.model, threads), language


def _mtmd_vision(path: Path, spec: ModelSpec, model: NativeModel, threads: int) -> VisionEngine:
    from mobilevlm.runtime.engines.mtmd import MtmdVision

    return MtmdVision(path, spec, model, threads)


def _onnx_vision(path: Path, threads: int) -> VisionEngine:
    from mobilevlm.runtime.engines.onnx import OnnxVision

    return OnnxVision(path, threads)


def _onnx_decoder(bundle: Bundle, path: Path, threads: int) -> DecoderEngine:
    from mobilevlm.runtime.engines.onnx import OnnxDecoder

    spec, table = bundle.manifest.spec, bundle.manifest.embeddings
    if table is None:
        raise BundleError(f"{bundle.folder}: no embedding table: export the bundle again")
    return OnnxDecoder(path, bundle.path(table.path), table, spec.decoder, threads)

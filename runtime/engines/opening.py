"""A bundle's artifacts to engines. Packages are imported where they are used."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from mobilevlm.bundle import Bundle
from mobilevlm.errors import BundleError
from mobilevlm.plan import ENGINES
from mobilevlm.runtime.engines import DecoderEngine, VisionEngine

if TYPE_CHECKING:
    from mobilevlm.runtime.engines.llama_cpp import LlamaDecoder


def open_engines(bundle: Bundle, engine: str, threads: int) -> tuple[VisionEngine, DecoderEngine]:
    """Opens both stages. ``engine``: a key of ENGINES. An ONNX vision stage is opened beside the
    decoder: onnxruntime reorders weights on one thread per session, and that is most of a load.

    Raises:
        BundleError: an artifact cannot be loaded.
        MissingExtraError: llama-cpp-python is needed and not installed.
    """
    spec = bundle.manifest.spec
    vision, decoder = (
        bundle.path(bundle.artifact(stage, ENGINES[engine][stage]).path)
        for stage in ("vision", "decoder")
    )
    if engine == "gguf":
        from mobilevlm.runtime.engines.mtmd import MtmdVision

        language = _llama_decoder(bundle, decoder, threads)
        return MtmdVision(vision, spec, language.model, threads), language
    open_decoder = _onnx_decoder if engine == "onnx" else _llama_decoder
    with ThreadPoolExecutor(1) as beside:
        opened = beside.submit(_onnx_vision, vision, threads)
        language_stage: DecoderEngine = open_decoder(bundle, decoder, threads)
        return opened.result(), language_stage


def _onnx_vision(path: Path, threads: int) -> VisionEngine:
    from mobilevlm.runtime.engines.onnx import OnnxVision

    return OnnxVision(path, threads)


def _llama_decoder(bundle: Bundle, path: Path, threads: int) -> LlamaDecoder:
    from mobilevlm.runtime.engines.llama_cpp import LlamaDecoder

    return LlamaDecoder(path, bundle.manifest.spec.decoder, threads)


def _onnx_decoder(bundle: Bundle, path: Path, threads: int) -> DecoderEngine:
    from mobilevlm.runtime.engines.onnx import OnnxDecoder

    spec, table = bundle.manifest.spec, bundle.manifest.embeddings
    if table is None:
        raise BundleError(f"{bundle.folder}: no embedding table: export the bundle again")
    return OnnxDecoder(path, bundle.path(table.path), table, spec.decoder, threads)

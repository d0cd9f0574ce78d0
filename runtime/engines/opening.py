"""A bundle's artifacts to engines. Packages are imported where they are used."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mobilevlm.builtin import is_shipped
from mobilevlm.bundle import Artifact, Bundle, EmbeddingTable, reopened
from mobilevlm.errors import BundleError, PrecisionWarning
from mobilevlm.input_spec import LibraryImage
from mobilevlm.plan import DRAWING, Plan, stage_formats
from mobilevlm.runtime.engines import CacheType, DecoderEngine, EncoderEngine, NoImages, Segment
from mobilevlm.runtime.machine import int8_weight_bits
from mobilevlm.spec import ModelSpec

if TYPE_CHECKING:
    from mobilevlm.runtime.engines.llama.engine import LlamaDecoder
    from mobilevlm.runtime.engines.llama.native import NativeModel
    from mobilevlm.runtime.engines.onnx.drawing import OnnxDrawing
    from mobilevlm.runtime.engines.onnx.engine import OnnxDecoder, OnnxVision
    from mobilevlm.runtime.engines.onnx.stages import Turns


def open_engines(bundle: Bundle, plan: Plan) -> tuple[EncoderEngine, DecoderEngine]:
    """Opens both stages for the plan's engine, which the bundle has artifacts for. An ONNX vision
    stage is opened beside the decoder.

    Raises:
        BundleError: an artifact cannot be loaded.
        MissingExtraError: llama-cpp-python is needed and not installed.
    """
    spec, engine = bundle.manifest.spec, plan.engine
    if is_pair(spec):
        return _open_pair(bundle, plan)
    formats = stage_formats(bundle, engine)
    _check_weight_bits(bundle, engine)
    decoder = bundle.path(bundle.artifact("decoder", formats["decoder"]).path)
    threads = plan.threads_of("vision")
    stage = spec.encoder_stage
    if spec.encoded is None and engine in _OPENERS:
        return NoImages(), _OPENERS[engine](bundle, decoder, plan)
    vision = bundle.path(bundle.artifact(stage, formats[stage]).path)
    if engine == "npu" or (engine == "ort" and bundle.artifact("decoder", "ort").data):
        return _npu_vision(vision, threads, spec), _npu_decoder(bundle, plan, engine)
    if engine == "gguf":
        language = _llama_decoder(bundle, decoder, plan)
        return _mtmd_vision(vision, spec, language.model, threads), language
    if formats[stage] == "gguf":
        from mobilevlm.runtime.engines.llama.stand_in import stand_in

        own = _ggml_decoder(bundle, decoder, plan)
        return _mtmd_vision(vision, spec, stand_in(spec.decoder.hidden_size), threads), own
    turns = _turns(bundle) if engine == "onnx" and plan.memory == "in turn" else None
    opener = partial(onnx_decoder, turns=turns) if engine == "onnx" else _OPENERS[engine]
    with ThreadPoolExecutor(1) as beside:
        opened = beside.submit(onnx_vision, bundle, vision, plan, turns)
        language_stage = opener(bundle, decoder, plan)
        return opened.result(), language_stage


def open_drawing(bundle: Bundle, plan: Plan) -> OnnxDrawing:
    """Open the stages of a model that makes images.

    Raises:
        BundleError: the bundle has none, or the engine runs none.
        MobileVLMError: the model makes no images.
    """
    spec, folder = bundle.manifest.spec, bundle.folder
    _ = spec.drawing  # refused where there is none
    if plan.engine != "onnx":
        raise BundleError(
            f"{folder}: engine {plan.engine} answers but does not draw: use --engine onnx"
        )
    from mobilevlm.runtime.engines.onnx.drawing import OnnxDrawing

    artifacts = {stage: bundle.artifact(stage, "onnx") for stage in DRAWING}
    files = {stage: bundle.path(artifact.path) for stage, artifact in artifacts.items()}
    return OnnxDrawing(files, spec, plan, _products(*artifacts.values()))


def is_pair(spec: ModelSpec) -> bool:
    """Return whether llama.cpp alone knows a model."""
    image = spec.inputs.get("image")
    return image is not None and isinstance(image.preparation, LibraryImage)


def _open_pair(bundle: Bundle, plan: Plan) -> tuple[EncoderEngine, DecoderEngine]:
    from mobilevlm.gguf.file import read_gguf
    from mobilevlm.runtime.engines.llama.pair_probe import open_pair

    mmproj, model = (read_gguf(bundle.path(part.path)) for part in bundle.manifest.artifacts)
    threads = plan.threads_of("decoder"), plan.threads_of("vision")
    return open_pair(model, mmproj, bundle.manifest.spec.decoder, *threads)


def _check_weight_bits(bundle: Bundle, engine: str) -> None:
    """Warns where other int8 weights than those of the artifacts in use fit this machine, unless
    they are being exported for another one."""
    from mobilevlm.runtime.engines.onnx.engine import exact_products

    best = int8_weight_bits() if bundle.digest else None
    used = (bundle.artifact(*part) for part in stage_formats(bundle, engine).items())
    found = max((artifact.weight_bits or 0 for artifact in used), default=0)
    if best is None or found in (0, best) or (found < best and is_shipped(bundle.folder)):
        return
    if found < best:
        what = "this processor takes 8-bit weights at the same speed, the bundle has 7-bit ones"
    elif engine == "ort" or not exact_products():
        what = "8-bit weights saturate on this processor, answers may be wrong"
    else:
        what = "8-bit weights take more time on this processor, whose fastest products saturate"
    target = bundle.manifest.target
    where = f"without --target {target}, " if target else ""
    remedy = f"export it {where}with --weight-bits {best}"
    warnings.warn(f"{bundle.folder}: {what}: {remedy}", PrecisionWarning, stacklevel=2)


def _npu_vision(path: Path, threads: int, spec: ModelSpec) -> EncoderEngine:
    from mobilevlm.runtime.engines.onnx.engine import OnnxVision
    from mobilevlm.runtime.engines.onnx.npu import FIXED_POINT

    return OnnxVision(path, threads, entries=FIXED_POINT, spec=spec)


def _npu_decoder(bundle: Bundle, plan: Plan, form: str) -> DecoderEngine:
    from mobilevlm.runtime.engines.onnx.npu import NpuDecoder

    spec, table = bundle.manifest.spec, bundle.manifest.embeddings
    artifact = bundle.artifact("decoder", form)
    if table is None or not artifact.data:
        raise BundleError(f"{bundle.folder}: no embedding table or graph: export the bundle again")
    chunks, tokens = bundle.path(artifact.path), bundle.path(artifact.data[0])
    threads = plan.threads_of("decoder")
    return NpuDecoder(chunks, tokens, bundle.path(table.path), table, spec.decoder, threads)


def _mtmd_vision(path: Path, spec: ModelSpec, model: NativeModel, threads: int) -> EncoderEngine:
    from mobilevlm.runtime.engines.llama.mtmd import MtmdVision

    return MtmdVision(path, spec, model, threads)


def _turns(bundle: Bundle) -> Turns:
    from mobilevlm.runtime.engines.onnx.stages import Turns

    return Turns(partial(reopened, bundle))


def onnx_vision(bundle: Bundle, path: Path, plan: Plan, turns: Turns | None = None) -> OnnxVision:
    """Opens the vision stage from an ONNX or .ort file of the bundle; with ``turns``, when it is
    asked for."""
    from mobilevlm.runtime.engines.onnx.engine import OnnxVision

    # Kernels of weights in blocks take them in their own order only.
    mappable = _artifact_at(bundle, path).precision == "int8"
    packed = plan.vision_weights == "packed" or not mappable
    threads, compact = plan.threads_of("vision"), plan.memory != "fast"
    spec, entries = bundle.manifest.spec, _products(_artifact_at(bundle, path))
    return OnnxVision(path, threads, plan.spinning, packed, entries, compact, spec, turns)


def _products(*artifacts: Artifact) -> Mapping[str, str]:
    """Return the settings of sessions for artifacts whose int8 products would saturate here. Those
    of .ort files are settled when they are made."""
    from mobilevlm.runtime.engines.onnx.engine import exact_products

    eight = any((part.weight_bits, part.format) == (8, "onnx") for part in artifacts)
    return exact_products() if eight and int8_weight_bits() == 7 else {}


def _artifact_at(bundle: Bundle, path: Path) -> Artifact:
    """The artifact that begins with a file of the bundle."""
    [found] = [part for part in bundle.manifest.artifacts if bundle.path(part.path) == path]
    return found


def _llama_decoder(bundle: Bundle, path: Path, plan: Plan) -> LlamaDecoder:
    from mobilevlm.runtime.engines.llama.engine import LlamaDecoder

    return LlamaDecoder(path, bundle.manifest.spec.decoder, plan.threads_of("decoder"))


def _ggml_decoder(bundle: Bundle, path: Path, plan: Plan) -> DecoderEngine:
    from mobilevlm.runtime.engines.ggml.engine import GgmlDecoder

    limit = None if plan.max_resident_mb is None else int(plan.max_resident_mb * 1e6)
    threads = plan.threads_of("decoder")
    return GgmlDecoder(path, bundle.manifest.spec.decoder, threads, limit)


def _embedding_table(bundle: Bundle) -> EmbeddingTable:
    table = bundle.manifest.embeddings
    if table is None:
        raise BundleError(f"{bundle.folder}: no embedding table: export the bundle again")
    return table


def onnx_decoder(
    bundle: Bundle,
    path: Path,
    plan: Plan,
    cache: CacheType | None = None,
    turns: Turns | None = None,
) -> OnnxDecoder:
    """Open the decoder stage from an ONNX or .ort file of the bundle, and the prefill graph in the
    same format if there is one. ``cache``: type of stored keys and values, if not the bundle's;
    ``turns`` as of :func:`onnx_vision`."""
    from mobilevlm.runtime.engines.onnx.engine import OnnxDecoder

    spec, table = bundle.manifest.spec, _embedding_table(bundle)
    parts = [_artifact_at(bundle, path)]
    encoder = None
    if spec.decoder.encoder_layers:
        parts.append(bundle.artifact("encoder", "onnx"))
        encoder = bundle.path(parts[-1].path)
    prompts = None
    form = parts[0].format  # engines are named as what they open
    if "prefill" in stage_formats(bundle, form):
        parts.append(bundle.artifact("prefill", form))
        prompts = bundle.path(parts[-1].path)
    rows, stored, entries = bundle.path(table.path), cache or cache_type(bundle), _products(*parts)
    return OnnxDecoder(
        path, rows, table, spec.decoder, plan, prompts, encoder, stored, entries, turns,
        bundle.manifest.layer_embeddings,
    )  # fmt: skip


_OPENERS: Mapping[str, Callable[[Bundle, Path, Plan], DecoderEngine]] = {
    "onnx": onnx_decoder,
    "ort": onnx_decoder,
    "hybrid": _llama_decoder,
    "gguf": _llama_decoder,
    "ggml": _ggml_decoder,
}
"""Decoders by engine"""


def cache_type(bundle: Bundle) -> CacheType:
    """Return the type that the bundle's ONNX decoder stores keys and values in."""
    return np.int8 if bundle.manifest.recipe.kv_cache == "int8" else np.float32


def stored_system_prompt(bundle: Bundle) -> Segment | None:
    """State of the system prompt for the ONNX decoder, mapped.

    Raises:
        BundleError: the file has not the size that the spec asks for.
    """
    system, spec = bundle.manifest.system_prompt, bundle.manifest.spec.decoder
    if system is None:
        return None
    from mobilevlm.runtime.engines.onnx.stored_segment import map_segment

    return map_segment(bundle.path(system.path), spec, len(system.ids), cache_type(bundle))

"""How much memory a bundle takes, told from its manifest."""

from __future__ import annotations

from mobilevlm.bundle import Manifest
from mobilevlm.plan import ENGINES
from mobilevlm.spec import DecoderSpec

LIBRARIES_MB = 93.0
"""Python, numpy, onnxruntime and tokenizers before they hold any weights."""
RESIDENT = {"fp32": 2.0, "fp16": 4.0, "int8": 1.3, "q8": 1.3, "q4": 1.3, "q2": 1.3}
RESIDENT |= {"qdq8": 2.3, "qdq16": 2.3}
"""Memory of a session as a multiple of its weight file: onnxruntime keeps float weights twice, in
float32, and a part of the quantized ones twice for a moment; those of fixed point it packs anew
while it holds the file's."""
RESIDENT_GGUF = 2.0
"""The same for GGUF files: llama.cpp maps them, and holds some types once more in another order."""


def estimate_mb(manifest: Manifest, engine: str) -> float:
    """Resident megabytes of a process that runs a bundle and has answered with a full context. Of a
    bundle compiled for an NPU: on the device, where binaries are mapped once."""
    stages = ENGINES[engine]
    weights = 0.0
    for artifact in manifest.artifacts:
        if artifact.format not in stages.get(artifact.stage, ()):
            continue
        if artifact.stage == "embeddings":  # mapped, a row at a time
            continue
        size = sum(manifest.files[name].size for name in artifact.files)
        compiled = [part for part in manifest.compiled if part.stage == artifact.stage]
        if compiled:
            weights += sum(manifest.files[name].size for name in compiled[0].files)
        else:
            weights += size * RESIDENT.get(artifact.precision, RESIDENT_GGUF)
    return LIBRARIES_MB + (weights + state_bytes(manifest.spec.decoder, engine)) / 1e6


def state_bytes(spec: DecoderSpec, engine: str) -> int:
    """Keys and values of one full context."""
    values = 2 * spec.num_hidden_layers * spec.num_key_value_heads * spec.head_dim
    return values * spec.context_length * {"npu": 1, "onnx": 4}.get(engine, 2)


PAGE_MB = 350.0
"""A browser's process with a page, onnxruntime-web and a model of next to no weights (Chromium)."""
RESIDENT_WEB = 1.8
"""Its memory as a multiple of the weight files: onnxruntime's copy, and what it packs anew."""
STATE_COPIES = 4
"""Keys and values before and after a step, in the page and in onnxruntime."""


def estimate_web_mb(manifest: Manifest) -> float:
    """Resident megabytes of a browser's process in which the page of examples/web runs a bundle and
    has answered with a full context. The embedding table is held as it is."""
    files = {artifact.stage: artifact.files for artifact in manifest.artifacts}
    weights = {stage: sum(manifest.files[name].size for name in files[stage]) for stage in files}
    states = STATE_COPIES * state_bytes(manifest.spec.decoder, "onnx")
    model = RESIDENT_WEB * (weights["vision"] + weights["decoder"]) + weights["embeddings"]
    return PAGE_MB + (model + states) / 1e6

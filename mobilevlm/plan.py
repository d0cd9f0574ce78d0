"""Which engine runs a bundle: the engines there are, and what each needs of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mobilevlm.errors import BundleError, MobileVLMError

if TYPE_CHECKING:
    from mobilevlm.bundle import Bundle

ENGINES: dict[str, dict[str, tuple[str, ...]]] = {
    "onnx": {"vision": ("onnx",), "embeddings": ("onnx",), "decoder": ("onnx",)},
    "gguf": {"vision": ("gguf",), "decoder": ("gguf",)},
    "hybrid": {"vision": ("onnx",), "decoder": ("gguf",)},
    "ggml": {"vision": ("onnx", "gguf"), "decoder": ("gguf",)},
    "npu": {"vision": ("npu",), "embeddings": ("npu",), "decoder": ("npu",)},
}
"""For each engine the formats of the artifact that it runs, by stage; of several the first that is
there. onnx: ONNX Runtime; gguf: llama.cpp; hybrid: ONNX Runtime feeds llama.cpp; ggml: our own
graph of the decoder on the kernels of llama.cpp; npu: graphs of fixed shapes in fixed point."""

_LLAMA_CPP = ("gguf", "hybrid")
"""Engines whose decoder is llama.cpp's own."""

DRAFTING_ENGINES = ("gguf", "hybrid")
"""Where drafts are tried without being asked for: llama.cpp's quantized kernels give a position the
same bits alone and among others. ONNX Runtime's attention and 4-bit kernels do not."""

ENGINE_CHOICES = ("auto", *ENGINES)
"""``auto`` is the first of them that finds its artifacts."""


def check_engine(engine: str) -> None:
    """Refuses a name that is none."""
    if engine not in ENGINE_CHOICES:
        raise MobileVLMError(
            f"engine {engine!r} is not known: expected {', '.join(ENGINE_CHOICES)}"
        )


def choose_engine(bundle: Bundle, engine: str) -> str:
    """The engine that will run the bundle: ``engine`` itself, or what ``auto`` means for it.

    Raises:
        BundleError: the bundle has not the artifacts.
    """
    check_engine(engine)
    candidates = list(ENGINES) if engine == "auto" else [engine]
    if bundle.manifest.spec.decoder.experts is not None:
        if engine in _LLAMA_CPP:
            raise BundleError(
                f"engine {engine}: llama.cpp has no architecture for this decoder with experts: "
                f"use --engine ggml"
            )
        candidates = [name for name in candidates if name not in _LLAMA_CPP]
    lacks = {name: _lacks(bundle, name) for name in candidates}
    for name, missing in lacks.items():
        if not missing:
            return name
    if bundle.manifest.spec.family == "gguf":  # files made elsewhere
        raise BundleError(
            f"engine {engine} needs ONNX artifacts, this is a GGUF file: use --engine gguf"
        )
    what = "; ".join(f"engine {name} lacks {missing[0]}" for name, missing in lacks.items())
    remedy = f"run 'mobilevlm export CHECKPOINT -o {bundle.folder} --format all'"
    raise BundleError(f"{bundle.folder}: {what}: {remedy}")


def stage_formats(bundle: Bundle, engine: str) -> dict[str, str]:
    """The format of each stage's artifact that an engine runs; a stage without one is left out."""
    present = {(artifact.stage, artifact.format) for artifact in bundle.manifest.artifacts}
    return {
        stage: kind
        for stage, kinds in ENGINES[engine].items()
        for kind in [kind for kind in kinds if (stage, kind) in present][:1]
    }


def stage_names(bundle: Bundle, engine: str) -> dict[str, str]:
    """The stages in an engine as the manifest's quality names them: ``vision`` for the ONNX
    artifact, ``vision_gguf``, ``end_to_end_hybrid`` …"""
    forms = {**stage_formats(bundle, engine), "end_to_end": engine}
    return {stage: stage if form == "onnx" else f"{stage}_{form}" for stage, form in forms.items()}


def engine_files(bundle: Bundle, engine: str) -> list[str]:
    """The model files that an engine reads, relative to the bundle."""
    used = stage_formats(bundle, engine).items()
    return [
        name
        for artifact in bundle.manifest.artifacts
        if (artifact.stage, artifact.format) in used
        for name in artifact.files
    ]


def _lacks(bundle: Bundle, engine: str) -> list[str]:
    """What a bundle has not and an engine needs."""
    found = stage_formats(bundle, engine)
    return [
        f"the {' or '.join(kind.upper() for kind in kinds)} artifact of the {stage} stage"
        for stage, kinds in ENGINES[engine].items()
        if stage not in found
    ]

"""Which engine runs a bundle: the engines there are, and what each needs of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mobilevlm.errors import BundleError, MobileVLMError

if TYPE_CHECKING:
    from mobilevlm.bundle import Bundle

ENGINES = {
    "onnx": {"vision": "onnx", "embeddings": "onnx", "decoder": "onnx"},
    "gguf": {"vision": "gguf", "decoder": "gguf"},
    "hybrid": {"vision": "onnx", "decoder": "gguf"},
}
"""For each engine the format of the artifact that it runs, by stage. onnx: ONNX Runtime; gguf:
llama.cpp; hybrid: ONNX Runtime feeds llama.cpp."""

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
    present = {(artifact.stage, artifact.format) for artifact in bundle.manifest.artifacts}
    lacks = {
        name: [f"the {kind.upper()} artifact of the {stage} stage"
               for stage, kind in ENGINES[name].items() if (stage, kind) not in present]
        for name in (ENGINES if engine == "auto" else [engine])
    }  # fmt: skip
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


def stage_name(stage: str, engine: str) -> str:
    """A stage in an engine as the manifest's quality names it: ``vision`` for the ONNX artifact,
    ``vision_gguf``, ``end_to_end_hybrid`` …"""
    form = ENGINES[engine].get(stage, engine)
    return stage if form == "onnx" else f"{stage}_{form}"


def engine_files(bundle: Bundle, engine: str) -> list[str]:
    """The model files that an engine reads, relative to the bundle."""
    used = ENGINES[engine].items()
    return [
        name
        for artifact in bundle.manifest.artifacts
        if (artifact.stage, artifact.format) in used
        for name in artifact.files
    ]

"""How a bundle is run: which engines there are, what each needs of it, and the settings of one."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

from mobilevlm.control_groups import processor_limits
from mobilevlm.errors import BundleError, MobileVLMError
from mobilevlm.gguf.architectures import needs_own_engine

if TYPE_CHECKING:
    from mobilevlm.bundle import Bundle
    from mobilevlm.spec import ModelSpec

ENGINES: dict[str, dict[str, tuple[str, ...]]] = {
    "onnx": {"vision": ("onnx",), "embeddings": ("onnx",), "decoder": ("onnx",)},
    "gguf": {"vision": ("gguf",), "decoder": ("gguf",)},
    "hybrid": {"vision": ("onnx",), "decoder": ("gguf",)},
    "ggml": {"vision": ("onnx", "gguf"), "decoder": ("gguf",)},
    "npu": {"vision": ("npu",), "embeddings": ("npu",), "decoder": ("npu",)},
    "ort": {"vision": ("ort",), "embeddings": ("onnx", "npu"), "decoder": ("ort",)},
}
"""For each engine the formats of the artifact that it runs, by stage; of several the first that is
there. onnx: ONNX Runtime; gguf: llama.cpp; hybrid: ONNX Runtime feeds llama.cpp; ggml: our own
graph of the decoder on the kernels of llama.cpp; npu: graphs of fixed shapes; ort: files in ONNX
Runtime's own format."""

OPTIONAL: dict[str, dict[str, str]] = {"onnx": {"prefill": "onnx"}, "ort": {"prefill": "ort"}}
"""Artifacts, by stage, that an engine runs where the bundle has them. prefill: the decoder's second
graph, for prompts."""

DRAWING = ("image_head", "code_embeddings", "image_decoder")
"""Stages of models that make images, which the engine onnx opens when it is asked to draw."""

_MADE_BY = {"npu": "--format npu --recipe a16w8", "ort": "--target android-xnnpack"}
"""Options of 'mobilevlm export' that make what an engine needs; of the others --format all."""

_LLAMA_CPP = ("gguf", "hybrid")
"""Engines whose decoder is llama.cpp's own."""
LLAMA_ENGINES = (*_LLAMA_CPP, "ggml")
"""Engines that take llama.cpp's library, for its kernels at least."""

DRAFTING_ENGINES = ("gguf", "hybrid")
"""Engines that try drafts without being asked: llama.cpp's quantized kernels give a position the
same bits alone and among others. ONNX Runtime's attention and 4-bit kernels do not."""

PREFILL_CHUNK = 512
"""Positions per run: bounds the attention scores, which grow with length × total length, and
llama.cpp's buffers."""
COMPACT_CHUNK = 64
"""The same where memory is scarce: buffers of a run take an eighth."""
PREFILL_FROM = 24
"""Least length of a piece of a prompt that goes to the prefill graph, if there is one. For fewer
positions, reading twice as many bytes of weights costs more than products of integers save."""

ENGINE_CHOICES = ("auto", *ENGINES)
"""``auto`` is the first of them that finds its artifacts."""


MemorySetting: TypeAlias = Literal["fast", "compact", "in turn"]


@dataclass(frozen=True)
class Plan:
    """Settings of an engine. Answers of one plan are the same whatever was kept of earlier ones;
    another plan may change their last digits, and with a prefill graph as much as its other
    weights do."""

    engine: str = "auto"
    vision_threads: int = 0
    """0: as many as this process may use."""
    decoder_threads: int = 0
    spinning: bool = True
    """Threads of ONNX Runtime wait for work awake, if no other program wants the processors when
    the model is loaded."""
    vision_weights: Literal["mapped", "packed"] = "mapped"
    """Placement of the weights of an ``int8`` image encoder in ONNX Runtime. ``mapped``: used in
    place in the file, whose pages the system can take back and share, and loading reads none of
    them; ``packed``: copied in the kernels' order, so that an image takes less time and loading
    more."""
    tiles_at_once: int = 1
    """Tiles of an image that ONNX Runtime encodes at the same time, each with the buffers of a run;
    no more than the stage has threads."""
    prefill_chunk: int = PREFILL_CHUNK
    """Positions per run of a long prompt (ONNX Runtime)."""
    prefill_from: int = PREFILL_FROM
    """Least positions of a piece of a prompt that the prefill graph computes."""
    prefill_weights: Literal["mapped", "released", "packed"] = "mapped"
    """Placement of the prefill graph's weights. ``mapped``: used in place in the file, whose pages
    the system can take back and share; ``released``: those pages are given back after each piece of
    a prompt, which costs the next one some time; ``packed``: copied in the kernels' order, which is
    faster and takes memory."""
    draft_tokens: int | None = None
    """Tokens to guess and check at a time; none: what the engine does by itself."""
    memory: MemorySetting = "fast"
    """Memory that ONNX Runtime spends. ``compact``: prompts in short chunks, buffers are given back
    after a run, the prefill graph has released weights. ``in turn``: besides, the weights of only
    one stage are in memory; for each new image both are loaded once more. ``load`` chooses the
    first that a limit allows (runtime/memory/fitting.py)."""
    max_resident_mb: float | None = None
    """Megabytes of sparse experts in memory at a time (ggml). Never tuned: a person sets it."""

    @property
    def chunk_length(self) -> int:
        """Positions per run of a long prompt (ONNX Runtime), memory considered."""
        scarce = self.memory != "fast"
        return min(self.prefill_chunk, COMPACT_CHUNK) if scarce else self.prefill_chunk

    @property
    def parallel_tiles(self) -> int:
        """Tiles of an image that are encoded at the same time, memory and threads considered."""
        if self.memory != "fast":
            return 1
        return max(min(self.tiles_at_once, self.threads_of("vision")), 1)

    @property
    def released_prompt_weights(self) -> bool:
        """True if pages of the prefill graph are given back after each piece of a prompt."""
        return self.memory != "fast" or self.prefill_weights == "released"

    def threads_of(self, stage: Literal["vision", "decoder"]) -> int:
        """Threads of a stage, settled."""
        threads = self.vision_threads if stage == "vision" else self.decoder_threads
        return threads or default_threads()

    def describe(self) -> str:
        """One line: what differs from the defaults."""
        defaults = Plan(self.engine)
        changed = [
            f"{item.name.replace('_', ' ')} {getattr(self, item.name)}"
            for item in fields(self)
            if getattr(self, item.name) != getattr(defaults, item.name)
        ]
        return f"plan {self.engine}: {', '.join(changed) or 'the defaults'}"

    def computes_prompt_like(self, other: Plan, length: int) -> bool:
        """Return whether a piece of a prompt of ``length`` positions has the same bits in both
        plans, for a decoder with a prefill graph."""
        graphs = {length >= plan.prefill_from for plan in (self, other)}
        chunks = {min(plan.chunk_length, length) for plan in (self, other)}
        return len(graphs) == len(chunks) == 1


def memory_settings(engine: str, first: MemorySetting = "fast") -> tuple[MemorySetting, ...]:
    """Those that an engine knows, from ``first`` on; each takes less memory than the one before."""
    known: tuple[MemorySetting, ...] = ("fast",)
    if engine == "onnx":
        known = ("fast", "compact", "in turn")
    elif engine == "hybrid":
        known = ("fast", "compact")
    return known[known.index(first) :] if first in known else known[-1:]


def lighter_plans(plan: Plan) -> list[Plan]:
    """The plan, and what takes less and less memory: the same with one tile of an image at a time,
    with all weights that may stay in their files there, then with each further setting that its
    engine knows."""
    settings = memory_settings(plan.engine, plan.memory)
    first = replace(plan, memory=settings[0])
    single, *others = (replace(plan, memory=setting, tiles_at_once=1) for setting in settings)
    prompts = "mapped" if plan.prefill_weights == "packed" else plan.prefill_weights
    mapped = [
        replace(item, vision_weights="mapped", prefill_weights=prompts)
        for item in (single, *others)
    ]
    return list(dict.fromkeys([first, single, *mapped]))


def default_threads() -> int:
    """Processors that this process may use: by its affinity, and by the quotas of its control
    groups."""
    limits = [limit.threads for limit in processor_limits()]
    return min([available_processors(), *limits])


def available_processors() -> int:
    """Return how many processors this process may run on, without regard to quotas."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_engine(engine: str) -> None:
    """Refuses a name that is none."""
    if engine not in ENGINE_CHOICES:
        raise MobileVLMError(
            f"engine {engine!r:.60} is not known: expected {', '.join(ENGINE_CHOICES)}"
        )


def engine_for_limit(engine: str, max_resident_mb: float | None) -> str:
    """The engine that a limit on resident experts asks for: ``ggml`` where any would do.

    Raises:
        MobileVLMError: another one, which copies all weights.
    """
    if max_resident_mb is None or engine == "ggml":
        return engine
    if engine != "auto":
        raise MobileVLMError(
            f"engine {engine} copies all weights into memory of its own: --max-resident needs "
            f"--engine ggml"
        )
    return "ggml"


def choose_engine(bundle: Bundle, engine: str) -> str:
    """The engine that will run the bundle: ``engine`` itself, or what ``auto`` means for it.

    Raises:
        BundleError: the bundle has not the artifacts.
    """
    check_engine(engine)
    candidates = list(ENGINES) if engine == "auto" else [engine]
    if needs_own_engine(bundle.manifest.spec.decoder):
        if engine in _LLAMA_CPP:
            raise BundleError(
                f"engine {engine}: llama.cpp has no architecture for this decoder: use --engine "
                f"ggml"
            )
        candidates = [name for name in candidates if name not in _LLAMA_CPP]
    for part in bundle.manifest.spec.decoder.rare_parts:
        if engine == "ggml":
            raise BundleError(
                f"engine ggml runs no decoder with {part}: use another one with --engine"
            )
        candidates = [name for name in candidates if name != "ggml"]
    lacks = {name: _lacks(bundle, name) for name in candidates}
    for name, missing in lacks.items():
        if not missing:
            return name
    if bundle.manifest.spec.family == "gguf":  # files made elsewhere
        raise BundleError(
            f"engine {engine} needs ONNX artifacts, this is a GGUF file: use --engine gguf"
        )
    what = "; ".join(f"engine {name} lacks {missing[0]}" for name, missing in lacks.items())
    options = _MADE_BY.get(engine, "--format all")
    remedy = f"run 'mobilevlm export CHECKPOINT -o {bundle.folder} {options}'"
    raise BundleError(f"{bundle.folder}: {what}: {remedy}")


def _stages(bundle: Bundle, engine: str) -> dict[str, tuple[str, ...]]:
    """Formats by stage, of the stages that the bundle's model has."""
    stages = engine_stages(engine, bundle.manifest.spec)
    if bundle.manifest.spec.decoder.encoder_layers:
        return {**stages, "encoder": ("onnx",)}
    return stages


def engine_stages(engine: str, spec: ModelSpec) -> dict[str, tuple[str, ...]]:
    """Return the formats that an engine runs, by the stages that a model has: ``audio`` in the
    place of ``vision`` where it hears."""
    return {
        spec.encoder_stage if stage == "vision" else stage: forms
        for stage, forms in ENGINES[engine].items()
        if stage != "vision" or spec.encoded is not None
    }


def stage_formats(bundle: Bundle, engine: str) -> dict[str, str]:
    """The format of each stage's artifact that an engine runs; a stage without one is left out."""
    present = {(artifact.stage, artifact.format) for artifact in bundle.manifest.artifacts}
    optional = {stage: (kind,) for stage, kind in OPTIONAL.get(engine, {}).items()}
    return {
        stage: kind
        for stage, kinds in {**_stages(bundle, engine), **optional}.items()
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
    """Name the artifacts that an engine needs and the bundle lacks."""
    found = stage_formats(bundle, engine)
    return [
        f"the {' or '.join(kind.upper() for kind in kinds)} artifact of the {stage} stage"
        for stage, kinds in _stages(bundle, engine).items()
        if stage not in found
    ]

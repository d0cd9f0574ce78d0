"""Who takes part: which files each candidate runs in which worker, and who cannot, and why."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comparison.artifacts import Artifacts
from comparison.process import one_line
from mobilevlm.bundle import Bundle
from mobilevlm.errors import MobileVLMError
from mobilevlm.gguf.file import read_gguf
from mobilevlm.linear_groups import tower_groups
from mobilevlm.plan import engine_files
from mobilevlm.spec import GGUFType

OURS, LLAMA = "mobilevlm", "llama.cpp"
"""Groups whose figures are set against each other. This runtime's ``gguf`` engine is llama.cpp's
kernels behind our interface, so it counts as llama.cpp: what we are compared with is its best."""


@dataclass(frozen=True)
class PeerPackage:
    """Worker and packages of a peer."""

    module: str
    """Worker module in comparison/peers."""
    package: str
    """Module that must be importable."""
    install: str
    """Distributions of the registry."""


PACKAGES = {
    "llama.cpp": PeerPackage("llama_cpp", "llama_cpp", "llama-cpp-python"),
    "onnxruntime-genai": PeerPackage("genai", "onnxruntime_genai", "onnxruntime-genai"),
    "transformers": PeerPackage("transformers", "transformers", "transformers torch"),
    "openvino": PeerPackage("openvino", "openvino", "openvino"),
    "mnn": PeerPackage("mnn", "MNN", "MNN"),
}


@dataclass(frozen=True)
class Candidate:
    """One column of the comparison."""

    name: str
    group: str
    module: str
    options: dict[str, Any]
    files: tuple[Path, ...]
    """Files that it reads; their size is the artifact size."""
    vision_bytes: int = 0
    """Weights read for one image."""
    decoder_bytes: int = 0
    """Weights read for one token."""
    kv_bytes: int = 4
    """Bytes of a stored key or value element."""
    python: str | None = None
    weights: str = ""
    """Recipe or GGUF type of the decoder, by which its quality is found"""
    memory: float = 0.0
    """Bytes that it is expected to need, to refuse it in time."""

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self.files)


@dataclass(frozen=True)
class Absent:
    """A candidate that does not take part."""

    name: str
    reason: str


@dataclass
class LineUp:
    """The candidates of a run."""

    present: list[Candidate] = field(default_factory=list)
    absent: list[Absent] = field(default_factory=list)
    packages: dict[str, str] = field(default_factory=dict)
    """Versions of what the peers run on."""


def line_up(
    artifacts: Artifacts,
    recipes: Sequence[str],
    tuned: Sequence[str],
    threads: int,
    pythons: dict[str, str],
    wanted: Callable[[str], bool],
    matches: Callable[[str], bool],
    memory_limit: float,
) -> LineUp:
    """Makes the files of every candidate that is wanted and can run. ``tuned``: recipes whose
    bundle takes part with the plan of ``mobilevlm tune``; ``matches``: names that take part."""
    result = LineUp()
    makers: dict[str, Callable[[str], Iterator[Candidate]]] = {
        "llama.cpp": lambda python: _llama(artifacts, python, matches),
        "onnxruntime-genai": lambda python: _genai(artifacts, threads, python),
        "transformers": lambda python: _transformers(artifacts, python),
        "openvino": lambda python: _openvino(artifacts, python),
        "mnn": lambda python: _mnn(artifacts, python),
    }

    def add(candidates: Iterable[Candidate]) -> None:
        for candidate in candidates:
            if not matches(candidate.name):
                continue
            if candidate.memory > memory_limit:
                need, limit = candidate.memory / 1e9, memory_limit / 1e9
                reason = f"needs about {need:.1f} GB, the limit is {limit:.1f} (--memory)"
                result.absent.append(Absent(candidate.name, reason))
            else:
                result.present.append(candidate)

    def add_if_possible(name: str, candidates: Iterable[Candidate]) -> None:
        try:
            add(candidates)
        except (MobileVLMError, ImportError) as error:
            result.absent.append(Absent(name, f"cannot be made: {one_line(error)}"))

    if wanted(OURS):
        add(
            _engine(f"onnx {Path(recipe).stem}", OURS, artifacts.onnx(recipe), "onnx", recipe)
            for recipe in recipes
            if matches(f"mobilevlm onnx {Path(recipe).stem}")
        )
        add(
            _engine(
                f"onnx {Path(recipe).stem} tuned", OURS, artifacts.tuned(recipe), "onnx", recipe
            )
            for recipe in tuned
            if matches(f"mobilevlm onnx {Path(recipe).stem} tuned")
        )
        of_gguf = ("mobilevlm hybrid q4_0", "mobilevlm gguf q4_0")
        if any(map(matches, of_gguf)) and versions(sys.executable, PACKAGES[LLAMA]):
            add_if_possible("mobilevlm hybrid and gguf", _ours_of_gguf(artifacts))
    for name, make in makers.items():
        if not wanted(name):
            continue
        python = pythons.get(name, sys.executable)
        if found := versions(python, PACKAGES[name]):
            result.packages[name] = found
            add_if_possible(name, make(python))
        else:
            hint = f"pip install {PACKAGES[name].install}"
            result.absent.append(Absent(name, f"not installed: {hint}, or --python {name}=PYTHON"))
    return result


def versions(python: str, peer: PeerPackage) -> str:
    """``transformers 5.24.0, torch 2.13.0``; empty where an interpreter has no such package."""
    script = """import importlib.metadata, importlib.util, sys
if importlib.util.find_spec(sys.argv[1]) is None:
    sys.exit(1)
found = importlib.metadata.distributions()
installed = {d.name.lower().replace("_", "-"): d.version for d in found}
print(", ".join(f"{n} {installed.get(n.lower(), '(version unknown)')}" for n in sys.argv[2:]))"""
    command = [python, "-c", script, peer.package, *peer.install.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def _ours_of_gguf(artifacts: Artifacts) -> Iterator[Candidate]:
    bundle = artifacts.both("q4_0")
    yield _engine("hybrid q4_0", OURS, bundle, "hybrid", "q4_0")
    yield _engine("gguf q4_0", LLAMA, bundle, "gguf", "q4_0")


def _engine(name: str, group: str, bundle: Bundle, engine: str, weights: str) -> Candidate:
    onnx_kv_bytes = 1 if bundle.manifest.recipe.kv_cache == "int8" else 4
    files = tuple(bundle.path(file) for file in engine_files(bundle, engine))
    return Candidate(
        name=f"mobilevlm {name}",
        group=group,
        module="ours",
        options={"bundle": str(bundle.folder), "engine": engine},
        files=files,
        vision_bytes=stage_bytes(bundle, "vision", "gguf" if engine == "gguf" else "onnx"),
        decoder_bytes=stage_bytes(bundle, "decoder", "onnx" if engine == "onnx" else "gguf"),
        kv_bytes=onnx_kv_bytes if engine == "onnx" else 2,
        weights=weights,
        memory=2.2 * sum(file.stat().st_size for file in files),
    )


def _llama(
    artifacts: Artifacts, python: str, matches: Callable[[str], bool]
) -> Iterator[Candidate]:
    kinds: tuple[tuple[GGUFType, GGUFType], ...] = (
        ("q4_0", "q8_0"),
        ("q4_k_m", "q8_0"),
        ("q4_k_m", "f16"),
    )
    for decoder, encoder in kinds:
        if not matches(f"llama.cpp {decoder} + {encoder}"):
            continue
        bundle = artifacts.gguf(decoder)
        model = bundle.path(bundle.artifact("decoder", "gguf").path)
        mmproj = (
            bundle.path(bundle.artifact("vision", "gguf").path)
            if encoder == "f16"
            else artifacts.mmproj("q8_0")
        )
        yield Candidate(
            name=f"llama.cpp {decoder} + {encoder}",
            group=LLAMA,
            module=PACKAGES[LLAMA].module,
            options={"model": str(model), "mmproj": str(mmproj)},
            files=(model, mmproj),
            vision_bytes=mmproj.stat().st_size,
            decoder_bytes=stage_bytes(bundle, "decoder", "gguf"),
            kv_bytes=2,
            weights=decoder,
            python=python,
            memory=2.2 * (model.stat().st_size + mmproj.stat().st_size),
        )


def _genai(artifacts: Artifacts, threads: int, python: str) -> Iterator[Candidate]:
    folder, bundle = artifacts.genai(threads), artifacts.onnx("int4")
    files = tuple(path for path in folder.iterdir() if path.is_file())
    yield Candidate(
        name="onnxruntime-genai int4",
        group="onnxruntime-genai",
        module=PACKAGES["onnxruntime-genai"].module,
        options={"folder": str(folder)},
        files=files,
        decoder_bytes=stage_bytes(bundle, "decoder", "onnx"),
        weights="int4",
        python=python,
        memory=2.2 * sum(file.stat().st_size for file in files),
    )


def _transformers(artifacts: Artifacts, python: str) -> Iterator[Candidate]:
    files = tuple(artifacts.checkpoint.glob("**/*.safetensors"))
    stored = sum(file.stat().st_size for file in files)
    spec = artifacts.spec
    embeddings = 2 * spec.decoder.vocab_size * spec.decoder.hidden_size
    tower = 2 * sum(group.size for group in tower_groups(spec.image.encoder))
    for dtype, size in (("bfloat16", 1), ("float32", 2)):  # the checkpoint is float16
        yield Candidate(
            name=f"transformers {dtype}",
            group="transformers",
            module=PACKAGES["transformers"].module,
            options={"checkpoint": str(artifacts.checkpoint), "dtype": dtype},
            files=files,
            vision_bytes=size * tower,
            decoder_bytes=size * (stored - tower - embeddings),
            kv_bytes=2 * size,
            python=python,
            memory=size * stored * 1.15 + 0.7e9,
        )


def _openvino(artifacts: Artifacts, python: str) -> Iterator[Candidate]:
    bundle = artifacts.onnx("int4")
    table = bundle.manifest.embeddings
    assert table is not None
    files = tuple(bundle.path(file) for file in engine_files(bundle, "onnx"))
    yield Candidate(
        name="openvino int4",
        group="openvino",
        module=PACKAGES["openvino"].module,
        options={
            "vision": str(bundle.path(bundle.artifact("vision", "onnx").path)),
            "decoder": str(bundle.path(bundle.artifact("decoder", "onnx").path)),
            "embeddings": str(bundle.path(table.path)),
        },
        files=files,
        vision_bytes=stage_bytes(bundle, "vision", "onnx"),
        decoder_bytes=stage_bytes(bundle, "decoder", "onnx"),
        weights="int4",
        python=python,
        memory=3.0 * sum(file.stat().st_size for file in files),
    )


def _mnn(artifacts: Artifacts, python: str) -> Iterator[Candidate]:
    image = artifacts.spec.image.square
    for bits, settings in ((None, {}), (8, {"memory": "low", "precision": "low"})):
        path = artifacts.mnn(python, bits)
        yield Candidate(
            name=f"mnn int{bits}" if bits else "mnn float32",
            group="mnn",
            module=PACKAGES["mnn"].module,
            options={
                "vision": str(path),
                "settings": settings,
                "mean": image.mean,
                "std": image.std,
            },
            files=(path,),
            vision_bytes=path.stat().st_size,
            python=python,
            memory=3.0 * path.stat().st_size,
        )


def stage_bytes(bundle: Bundle, stage: str, kind: str) -> int:
    """Bytes of a stage's weights, embedding rows left out: only one row of them is read."""
    artifact = bundle.artifact(stage, kind)
    if kind == "onnx":
        return sum(bundle.path(name).stat().st_size for name in artifact.data)
    tensors = read_gguf(bundle.path(artifact.path)).tensors
    tied = "output.weight" not in tensors  # then the table is the output matrix too, and is read
    unread = 0 if tied or stage != "decoder" else tensors["token_embd.weight"].size
    return sum(tensor.size for tensor in tensors.values()) - unread

"""Files in onnxruntime's own format (.ort): what its minimal builds for phones read, and what the
provider for Core ML needs, which leaves alone nodes whose weights lie outside the file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm.errors import MobileVLMError, TargetError
from mobilevlm.export.targets import ort_worker
from mobilevlm.plan import default_threads
from mobilevlm.runtime.engines.onnx.engine import open_session

LARGEST = 2**31 - 1
"""Bytes of a flatbuffer"""
CONFIG = "required_operators_and_types.config"
MOST_DISTANCE = 1e-5
"""Between results of a graph and of its .ort file, relative: the graph's operators may be fused."""
_SIZES = {"capacity": 8}
_MADE = ".with_runtime_opt"
"""Part that the converter adds to names."""

MINIMAL_BUILD = 1_186_880
"""Bytes of libonnxruntime.so for arm64 Android without any operator, ``--minimal_build``, as
measured in onnxruntime's CI in September 2024 (its pull request 21989)."""
PER_OPERATOR = (2_658_304 - 1_306_224) / 110
"""Bytes that an operator adds: from onnxruntime's limits for a minimal build with the 110 operators
of its mobile package and for one with none (its pull request 13208)."""


@dataclass(frozen=True)
class RequiredOperators:
    """Operators that a reduced build needs, and its size."""

    count: int
    estimated_mb: float
    """Size of such a library without providers for accelerators: an estimate from published sizes
    of other builds, see above. None was built here."""


def check_size(name: str, size: int, target: str) -> None:
    """Raises TargetError: a graph with so many bytes of weights does not fit into an .ort file."""
    if size > LARGEST:
        raise TargetError(
            f"target {target}: {name} has {size / 1e9:.1f} GB of weights, an .ort file holds at "
            f"most 2 GB: choose a smaller model, or a target with 4-bit weights (cpu-arm64)"
        )


def convert(graphs: Mapping[Path, tuple[Path, ...]], folder: Path) -> RequiredOperators:
    """Writes ``NAME.ort`` into ``folder`` for each ONNX file (with the data files that it needs),
    and the list of operators and types that all of them need: ``CONFIG``.

    Raises:
        MobileVLMError: onnxruntime does not convert one.
        TargetError: a file gives other results than its graph, here on the processor.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Not beside the bundle: the length of its path would move things in the converter's memory.
    with tempfile.TemporaryDirectory(prefix="ort.") as work:
        source, output = Path(work) / "graphs", Path(work) / "made"
        source.mkdir()
        # In the same order each time, since that is how the converter finds them.
        for path in sorted({name for graph, data in graphs.items() for name in (graph, *data)}):
            _link(path, source / path.name)
        done = subprocess.run(
            [sys.executable, *ort_worker.ISOLATED, ort_worker.__file__],
            cwd=work,
            env=_environment(),
            capture_output=True,
            text=True,
            errors="replace",
        )
        made = {graph: output / f"{graph.stem}{_MADE}.ort" for graph in graphs}
        if done.returncode or not all(path.is_file() for path in made.values()):
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise MobileVLMError(f"onnxruntime's converter to .ort: {last:.200}")
        for graph, path in made.items():
            shutil.move(path, folder / f"{graph.stem}.ort")
        listed = (output / f"required_operators_and_types{_MADE}.config").read_text("utf-8")
    lines = [line for line in listed.splitlines() if line and not line.startswith("#")]
    names = ", ".join(f"{graph.stem}.ort" for graph in graphs)
    (folder / CONFIG).write_text("\n".join([f"# Generated from {names}", *lines, ""]), "utf-8")
    for graph in graphs:
        _check_alike(graph, folder / f"{graph.stem}.ort")
    count = sum(len(_operators(line)) for line in lines)
    return RequiredOperators(count, round((MINIMAL_BUILD + count * PER_OPERATOR) / 1e6, 2))


def _environment() -> dict[str, str]:
    """Return the variables that find programs and libraries; more would move things in the
    converter's memory."""
    kept = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "SYSTEMROOT", "ORT_DISABLE_TELEMETRY")
    found = {name: os.environ[name] for name in kept if name in os.environ}
    return {**found, "PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1"}


def _check_alike(graph: Path, converted: Path) -> None:
    """Both run on the same random inputs."""
    found = []
    for path in (graph, converted):
        session = open_session(path, default_threads())
        random = np.random.default_rng(0)
        inputs = {value.name: _example(value, random) for value in session.get_inputs()}
        found.append(session.run(None, inputs))
        del session
    for first, second in zip(*found, strict=True):
        distance = float(np.linalg.norm(second - first)), float(np.linalg.norm(first))
        if not distance[0] <= MOST_DISTANCE * distance[1]:
            raise TargetError(
                f"{converted.name}: on this machine's processor its results are not those of "
                f"{graph.name}: report it with the versions of 'mobilevlm doctor'"
            )


def _example(value: Any, random: np.random.Generator) -> NDArray[Any]:
    """For an input of a graph; of sizes that vary one, or room for a few positions."""
    shape = [size if isinstance(size, int) else _SIZES.get(size, 1) for size in value.shape]
    if value.type == "tensor(float)":
        return random.normal(0, 0.1, shape).astype(np.float32)
    if value.type == "tensor(uint8)":
        return random.integers(0, 256, shape, np.uint8)
    if value.name == "total_length":  # positions in the buffers after the run
        return np.ones(shape, np.int32)
    return np.zeros(shape, np.int32 if value.type == "tensor(int32)" else np.int64)


def _operators(line: str) -> list[str]:
    """Return the operators of a line ``domain;opset;Add,Cast{…},…``, whose braces hold types as
    JSON."""
    names, depth, name = [], 0, ""
    for sign in line.split(";", 2)[2]:
        depth += {"{": 1, "}": -1}.get(sign, 0)
        if sign == "," and not depth:
            names.append(name)
            name = ""
        elif not depth and sign != "}":
            name += sign
    return [*names, name]


def _link(source: Path, place: Path) -> None:
    try:
        os.link(source, place)
    except OSError:  # a file system without links
        shutil.copyfile(source, place)

"""Qualcomm's HTP: graphs compiled ahead of time for one chip, and run in the emulator (extra
``[npu]``: onnxruntime-qnn, whose library for x86 has both).

The vendor's library writes to stdout and may end the process, so it works in one of its own
(export/targets/htp_worker.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm.errors import MobileVLMError, TargetError, require
from mobilevlm.plain_types import from_dict

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Chip:
    """Properties of a chip that the compiler needs."""

    soc_model: int
    """Qualcomm's number of it (QnnTypes.h)"""
    arch: int
    """Version of its Hexagon processor"""


@dataclass(frozen=True)
class Coverage:
    """Result of compiling a graph."""

    nodes: int
    """Operators of the graph, QuantizeLinear and DequantizeLinear included"""
    left: tuple[str, ...]
    """``operator name`` of each that it did not take; with any there is no binary"""
    seconds: float
    message: str = ""
    """The compiler's, where it took all operators and failed nevertheless"""


def check_compiler(purpose: str) -> None:
    """Raises MissingExtraError: onnxruntime-qnn is not installed."""
    try:
        import onnxruntime_qnn  # noqa: F401
    except ImportError:
        raise require("onnxruntime-qnn", "npu", purpose) from None


def compile_graphs(
    graphs: Sequence[Path], folder: Path, chip: Chip, share: bool = False
) -> list[Coverage]:
    """Writes context binaries: for each graph an ONNX file of its name into ``folder``, which
    refers to a ``_qnn.bin`` there; with ``share`` all to that of the first, which holds their
    weights once (and which the emulator cannot load). No operator may stay on the CPU.

    Raises:
        TargetError: the compiler does not take all operators, or fails.
        MissingExtraError: onnxruntime-qnn is not installed.
    """
    check_compiler("compiling for Qualcomm's HTP")
    folder.mkdir(parents=True, exist_ok=True)
    job = {"graphs": [str(path.resolve()) for path in graphs], "folder": str(folder.resolve())}
    answer = _in_process({"task": "compile", "chip": asdict(chip), "share": share, **job})
    made = [from_dict(Coverage, item, "coverage") for item in answer["coverage"]]
    for path, coverage in zip(graphs, made, strict=False):
        if coverage.left:
            more = f" and {len(coverage.left) - 3} more" if len(coverage.left) > 3 else ""
            raise TargetError(
                f"{path.name}: Hexagon v{chip.arch} does not take {', '.join(coverage.left[:3])}"
                f"{more}: the graph would fall back to the CPU"
            )
        if coverage.message:
            raise TargetError(
                f"{path.name}: compiling for Hexagon v{chip.arch}: {coverage.message:.200}"
            )
    return made


def emulate(graph: Path, chip: Chip, inputs: Arrays, outputs: Sequence[str]) -> list[Any]:
    """Runs a compiled graph, or one that is compiled for that, in the emulator. Slow: a thousandth
    of the chip's speed.

    Raises:
        MobileVLMError: it cannot be run.
    """
    check_compiler("the emulator of Qualcomm's HTP")
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "inputs.npz", Path(folder) / "outputs.npz"
        np.savez(given, **inputs)  # type: ignore[arg-type]
        job = {"graph": str(graph.resolve()), "inputs": str(given), "outputs": str(found)}
        _in_process({"task": "run", "chip": asdict(chip), "names": list(outputs), **job})
        with np.load(found) as arrays:
            return [arrays[name] for name in outputs]


def _in_process(job: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job))
        command = [sys.executable, "-m", "mobilevlm.export.targets.htp_worker", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        answer = path.with_suffix(".answer")
        if not answer.is_file():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise MobileVLMError(
                f"the library for Qualcomm's HTP ended with {done.returncode}: {last:.200}"
            )
        found: dict[str, Any] = json.loads(answer.read_text())
        if "error" in found:
            raise MobileVLMError(f"the library for Qualcomm's HTP: {found['error']:.200}")
        return found

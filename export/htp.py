"""Qualcomm's HTP: graphs compiled ahead of time for one chip, and run in the emulator (extra
``[npu]``: onnxruntime-qnn, whose library for x86 has both).

The vendor's library writes to stdout and may end the process, so it works in one of its own:
``python -m mobilevlm.export.htp JOB.json``, which writes its answer beside the job.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm.errors import MobileVLMError, TargetError, require
from mobilevlm.spec import from_dict

_BETWEEN = ("QuantizeLinear ", "DequantizeLinear ")
"""They stay where their operator does."""

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Chip:
    """What the compiler must know of a chip."""

    soc_model: int
    """Qualcomm's number of it (QnnTypes.h)"""
    arch: int
    """Version of its Hexagon processor"""


@dataclass(frozen=True)
class Coverage:
    """What the compiler made of a graph."""

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


def compile_together(graphs: Sequence[Path], folder: Path, chip: Chip) -> list[Coverage]:
    """Writes context binaries of graphs that share their weights: for each an ONNX file of its name
    into ``folder``, which refers to one ``_qnn.bin`` there. No operator may stay on the CPU.

    Raises:
        TargetError: the compiler does not take all operators, or fails.
        MissingExtraError: onnxruntime-qnn is not installed.
    """
    check_compiler("compiling for Qualcomm's HTP")
    folder.mkdir(parents=True, exist_ok=True)
    job = {"graphs": [str(path.resolve()) for path in graphs], "folder": str(folder.resolve())}
    answer = _in_process({"task": "compile", "chip": asdict(chip), **job})
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
        command = [sys.executable, "-m", "mobilevlm.export.htp", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        answer = path.with_suffix(".answer")
        if not answer.is_file():
            last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
            raise MobileVLMError(f"the compiler for Qualcomm's HTP: {last:.200}")
        found: dict[str, Any] = json.loads(answer.read_text())
        return found


def _work(path: Path) -> None:
    """The other process."""
    job = json.loads(path.read_text())
    chip = Chip(**job["chip"])
    answer: dict[str, Any] = {}
    if job["task"] == "run":
        with np.load(job["inputs"]) as arrays:
            inputs = {name: arrays[name] for name in arrays}
        session = _session(job["graph"], chip, {})
        found = session.run(job["names"], inputs)
        np.savez(job["outputs"], **dict(zip(job["names"], found, strict=True)))
    else:
        answer["coverage"] = [asdict(item) for item in _compile(job, chip)]
    path.with_suffix(".answer").write_text(json.dumps(answer))


def _compile(job: dict[str, Any], chip: Chip) -> list[Coverage]:
    made = []
    for index, graph in enumerate(job["graphs"]):
        entries = {
            "ep.context_enable": "1",
            "ep.context_file_path": str(Path(job["folder"]) / Path(graph).name),
            "ep.context_embed_mode": "0",
            "session.disable_cpu_ep_fallback": "1",
        }
        shared = len(job["graphs"]) > 1
        if shared:
            entries["ep.share_ep_contexts"] = "1"
            if index == len(job["graphs"]) - 1:
                entries["ep.stop_share_ep_contexts"] = "1"
        start = time.perf_counter()
        try:
            session = _session(graph, chip, entries, shared)
        except Exception as error:  # onnxruntime raises many kinds, none of them public
            message = " ".join(str(error).split())
            made.append(_failure(graph, chip, message, time.perf_counter() - start))
            break
        nodes = sum(map(len, _assigned(session).values()))
        made.append(Coverage(nodes, (), round(time.perf_counter() - start, 2)))
    return made


def _failure(graph: str, chip: Chip, message: str, seconds: float) -> Coverage:
    """Which operators stay on the CPU where they may."""
    try:
        assigned = _assigned(_session(graph, chip, {}))
    except Exception:
        return Coverage(0, (), seconds, message)
    names = (name for kind, names in assigned.items() if kind != "QNN" for name in names)
    left = sorted(name for name in names if not name.startswith(_BETWEEN))
    return Coverage(sum(map(len, assigned.values())), tuple(left), seconds, message)


def _assigned(session: Any) -> dict[str, list[str]]:
    """``operator name`` of each node, by the execution provider that runs it."""
    found: dict[str, list[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        nodes = [f"{node.op_type} {node.name}" for node in part.get_nodes()]
        found.setdefault(part.ep_name, []).extend(nodes)
    return found


def _session(graph: str, chip: Chip, entries: Mapping[str, str], shared: bool = False) -> Any:
    import onnxruntime as ort
    import onnxruntime_qnn

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    settings = {
        "backend_path": onnxruntime_qnn.get_qnn_htp_path(),
        "soc_model": str(chip.soc_model),
        "htp_arch": str(chip.arch),
    }
    if shared:
        settings["enable_htp_weight_sharing"] = "1"
    options.add_provider_for_devices(_devices(ort, onnxruntime_qnn)[:1], settings)
    return ort.InferenceSession(graph, options)


def _devices(ort: Any, qnn: Any) -> list[Any]:
    found = [device for device in ort.get_ep_devices() if device.ep_name == "QNN"]
    if not found:
        ort.register_execution_provider_library("QNN", qnn.get_library_path())
        found = [device for device in ort.get_ep_devices() if device.ep_name == "QNN"]
    return found


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # the library may not end in order

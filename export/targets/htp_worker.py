"""The process that Qualcomm's library works in: ``python -m mobilevlm.export.targets.htp_worker
JOB.json`` compiles or runs graphs, and writes its answer beside the job."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mobilevlm.export.targets.htp import Chip, Coverage

_BETWEEN = ("QuantizeLinear ", "DequantizeLinear ")
"""They stay where their operator does."""


def _work(path: Path) -> None:
    job = json.loads(path.read_text())
    try:
        answer = _answer(job, Chip(**job["chip"]))
    except Exception as error:  # onnxruntime raises many kinds, none of them public
        answer = {"error": " ".join(str(error).split())}
    path.with_suffix(".answer").write_text(json.dumps(answer))


def _answer(job: dict[str, Any], chip: Chip) -> dict[str, Any]:
    if job["task"] == "run":
        with np.load(job["inputs"]) as arrays:
            inputs = {name: arrays[name] for name in arrays}
        session = _session(job["graph"], chip, {})
        found = session.run(job["names"], inputs)
        np.savez(job["outputs"], **dict(zip(job["names"], found, strict=True)))
        return {}
    return {"coverage": [asdict(item) for item in _compile(job, chip)]}


def _compile(job: dict[str, Any], chip: Chip) -> list[Coverage]:
    made = []
    for index, graph in enumerate(job["graphs"]):
        entries = {
            "ep.context_enable": "1",
            "ep.context_file_path": str(Path(job["folder"]) / Path(graph).name),
            "ep.context_embed_mode": "0",
            "session.disable_cpu_ep_fallback": "1",
        }
        if job["share"]:
            entries["ep.share_ep_contexts"] = "1"
            if index == len(job["graphs"]) - 1:
                entries["ep.stop_share_ep_contexts"] = "1"
        start = time.perf_counter()
        try:
            session = _session(graph, chip, entries, job["share"])
        except Exception as error:
            message = " ".join(str(error).split())
            made.append(_failure(graph, chip, message, time.perf_counter() - start))
            break
        nodes = sum(map(len, _assigned(session).values()))
        made.append(Coverage(nodes, (), round(time.perf_counter() - start, 2)))
    return made


def _failure(graph: str, chip: Chip, message: str, seconds: float) -> Coverage:
    """Return the result of a graph that failed: the operators that stay on the CPU, if allowed."""
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

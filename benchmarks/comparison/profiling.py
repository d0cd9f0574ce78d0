"""Time of our ONNX stages by operator: onnxruntime's own profile, summed.

Run in a process of its own (``python -m comparison.profiling BUNDLE THREADS``), since a profile
covers a session's whole life. Prints JSON: stage → rows, each an operator's share.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from comparison.process import ROOT
from mobilevlm.errors import MobileVLMError
from mobilevlm.plan import Plan
from mobilevlm.prompt import Rows

RUNS = 3
DECODE_STEPS = 16


@dataclass(frozen=True)
class OperatorTime:
    """An operator of a stage. ``what``: its name, and for products the shape of the weights."""

    what: str
    count: int
    """Calls in one run of the stage."""
    milliseconds: float
    """Time of one run."""
    share: float


def profile(bundle: Path, threads: int) -> dict[str, tuple[OperatorTime, ...]]:
    """The table of a bundle's ONNX stages, from a subprocess."""
    done = subprocess.run(
        [sys.executable, "-m", "comparison.profiling", str(bundle), str(threads)],
        capture_output=True,
        text=True,
        cwd=ROOT / "benchmarks",
    )
    if done.returncode:
        raise MobileVLMError(f"{bundle}: profiling failed: {done.stderr.strip()[-200:]}")
    return {
        stage: tuple(OperatorTime(**row) for row in rows)
        for stage, rows in json.loads(done.stdout).items()
    }


def profile_here(folder: Path, threads: int) -> dict[str, list[OperatorTime]]:
    """Runs vision, prefill and decode in sessions that keep a profile."""
    import onnxruntime as ort

    from comparison.work import PROMPT_TOKENS, photo
    from mobilevlm.bundle import open_bundle
    from mobilevlm.runtime.engines.onnx import engine
    from mobilevlm.runtime.engines.onnx.onnx_state import OnnxState
    from mobilevlm.runtime.engines.opening import onnx_decoder, onnx_vision

    bundle = open_bundle(folder)
    spec, plan = bundle.manifest.spec, Plan(vision_threads=threads, decoder_threads=threads)
    sessions: list[ort.InferenceSession] = []

    with tempfile.TemporaryDirectory() as logs:

        def open_profiled(
            path: Path, threads: int, spinning: bool = True, packed: bool = True, *_: Any, **__: Any
        ) -> ort.InferenceSession:
            options = ort.SessionOptions()
            options.intra_op_num_threads = threads
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(logs) / path.stem)
            options.add_session_config_entry("session.disable_prepacking", str(int(not packed)))
            sessions.append(ort.InferenceSession(str(path), options))
            return sessions[-1]

        engine.open_session = open_profiled  # this process does nothing else

        def stage(session: int, run: Callable[[], Any], runs: int) -> list[OperatorTime]:
            """Profile of a session by its place; the first run is left out."""
            for _ in range(runs + 1):
                run()
            events = json.loads(Path(sessions[session].end_profiling()).read_text(encoding="utf-8"))
            return operator_times(events, runs)

        def decoder_stage(
            run: Callable[[engine.OnnxDecoder, OnnxState], Any], runs: int, place: int
        ) -> list[OperatorTime]:
            """``place`` of the session among those of the decoder: the prefill graph, where
            there is one, is opened after the other."""
            first = len(sessions)
            model = onnx_decoder(bundle, path, plan)
            assert isinstance(model, engine.OnnxDecoder)
            state = model.new_state()
            opened = range(first, len(sessions))
            rows = stage(opened[place], lambda: run(model, state), runs)
            model.close()
            return rows

        def prefill(model: engine.OnnxDecoder, state: OnnxState) -> None:
            state.rewind(0)
            model.prefill(state, prompt)

        def step(model: engine.OnnxDecoder, state: OnnxState) -> None:
            state.resume(PROMPT_TOKENS)  # what stands there does not change the time
            model.step(state, 5)

        random = np.random.default_rng(0)
        shape = PROMPT_TOKENS, spec.decoder.hidden_size
        prompt = Rows(random.standard_normal(shape, np.float32) * 0.1)
        path = bundle.path(bundle.artifact("vision", "onnx").path)
        vision = onnx_vision(bundle, path, plan)
        pixels = photo((spec.image.square.size,) * 2, 0)
        found = {"image encode": stage(-1, lambda: vision.encode({"pixels": pixels}), RUNS)}
        vision.close()
        path = bundle.path(bundle.artifact("decoder", "onnx").path)
        found["prefill"] = decoder_stage(prefill, RUNS, -1)
        found["decode, one token"] = decoder_stage(step, DECODE_STEPS, 0)
        return found


def operator_times(events: Iterable[dict[str, Any]], runs: int) -> list[OperatorTime]:
    """Kernel times of the last ``runs`` runs in onnxruntime's trace, summed, largest first."""
    kernels: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            kernels[event["name"]].append((_what(event["args"]), event["dur"] / 1e3))
    counts: dict[str, int] = defaultdict(int)
    times: dict[str, float] = defaultdict(float)
    for calls in kernels.values():  # one list per node, in the order of the runs
        for what, milliseconds in calls[-runs:]:
            counts[what] += 1
            times[what] += milliseconds
    total = sum(times.values())
    rows = [
        OperatorTime(what, round(counts[what] / runs), times[what] / runs, times[what] / total)
        for what in times
    ]
    return sorted(rows, key=lambda row: -row.milliseconds)


def _what(arguments: dict[str, Any]) -> str:
    """``MatMulNBits → 5632``: products differ by how many outputs they have."""
    name = str(arguments["op_name"])
    if "MatMul" not in name and name != "Gemm":
        return name
    shapes = arguments.get("output_type_shape") or []
    widths = [shape[-1] for output in shapes for shape in output.values() if shape]
    return f"{name} → {widths[0]}" if widths else name


if __name__ == "__main__":
    tables = profile_here(Path(sys.argv[1]), int(sys.argv[2]))
    print(json.dumps({k: [dataclasses.asdict(row) for row in v] for k, v in tables.items()}))

"""Ways to multiply with 8-bit activations in ONNX Runtime, side by side, as a Markdown table.

    python benchmarks/int8_matmul.py --rounds 25

Processor time of one thread, each way in turn, as the median ratio to one scale for the whole
tensor: other work on the machine changes it little. Needs the [export] extra.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import GraphBuilder

import mobilevlm  # noqa: F401 (before onnxruntime, whose telemetry it switches off)

SHAPES = ((577, 1024, 4096), (577, 4096, 1024), (200, 2048, 5632), (1, 2048, 5632))
"""Rows, inputs, outputs: tower, prefill and decode of MobileVLM V2 1.7B."""
MS = {"_domain": "com.microsoft"}


def tensor(op: Any, x: Any, weight: Any, scale: Any, bias: Any) -> Any:
    """One scale for all rows."""
    return op.DynamicQuantizeMatMul(x, weight, scale, None, bias, **MS)


def divided(op: Any, x: Any, weight: Any, scale: Any, bias: Any) -> Any:
    """Rows divided by their largest magnitude before, multiplied by it after."""
    largest = row_maxima(op, x)
    product = op.DynamicQuantizeMatMul(op.Div(x, largest), weight, scale, **MS)
    return op.Add(op.Mul(product, largest), bias)


def integer(op: Any, x: Any, weight: Any, scale: Any, bias: Any) -> Any:
    """Standard operators: rounding and MatMulInteger with zero point 128."""
    step = op.Mul(row_maxima(op, x), 1 / 127)
    codes = op.Cast(op.Add(op.Round(op.Div(x, step)), 128.0), to=ir.DataType.UINT8)
    zero = op.Constant(value=ir.tensor(np.uint8(128)))
    product = op.Cast(op.MatMulInteger(codes, weight, zero), to=ir.DataType.FLOAT)
    # One after the other: onnxruntime 1.32 fuses a product of both scales as if it were one number.
    return op.Add(op.Mul(op.Mul(product, step), scale), bias)


def to_float(op: Any, x: Any, weight: Any, scale: Any, bias: Any) -> Any:
    """QuantizeLinear and MatMulIntegerToFloat, whose scale of activations must be one number."""
    step = op.Mul(row_maxima(op, x), 1 / 127)
    zero = op.Constant(value=ir.tensor(np.uint8(128)))
    codes = op.QuantizeLinear(op.Div(x, step), 1.0, zero)
    product = op.MatMulIntegerToFloat(codes, weight, 1.0, scale, zero, **MS)
    return op.Add(op.Mul(product, step), bias)


def row_maxima(op: Any, x: Any) -> Any:
    """Largest magnitude of each row ``(rows, 1)``."""
    return op.Max(op.ReduceMax(op.Abs(x), [-1], keepdims=1), 1e-30)


WAYS = (tensor, divided, integer, to_float)


def session(way: Any, constants: list[Any], in_size: int) -> Any:
    """One product on one thread."""
    import onnxruntime

    domains = {"": 20, "com.microsoft": 1}
    graph = ir.Graph([], [], nodes=[], opset_imports=domains, name=way.__name__)
    shape, kind = ir.Shape(["rows", in_size]), ir.TensorType(ir.DataType.FLOAT)
    graph.inputs.append(ir.Value(name="x", shape=shape, type=kind))
    op = GraphBuilder(graph).op
    values = [op.Constant(value=ir.tensor(constant)) for constant in constants]
    found = way(op, graph.inputs[0], *values)
    found.name, found.type = "y", kind
    graph.outputs.append(found)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    data = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def main() -> None:
    """Prints a line per shape and way."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=25)
    rounds = parser.parse_args().rounds
    print("| rows × inputs × outputs | way | ms | ratio | relative error |\n|---|---|---|---|---|")
    for rows, in_size, out_size in SHAPES:
        random = np.random.default_rng(0)
        exact = random.standard_normal((in_size, out_size), np.float32)
        scale = np.abs(exact).max(axis=0) / np.float32(64)
        weight = np.rint(exact / scale).astype(np.int8)
        bias = random.standard_normal(out_size, np.float32)
        x = random.standard_normal((rows, in_size), np.float32)
        sessions = [session(way, [weight, scale, bias], in_size) for way in WAYS]
        times = np.zeros((rounds, len(WAYS)))
        repeats = 1 if rows > 1 else 20
        for row in times:
            for index, item in enumerate(sessions):
                start = time.process_time()
                for _ in range(repeats):
                    found = item.run(None, {"x": x})
                row[index] = (time.process_time() - start) / repeats
        expected = x @ (weight * scale) + bias
        for index, way in enumerate(WAYS):
            found = sessions[index].run(None, {"x": x})[0]
            error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
            ratio = np.median(times[:, index] / times[:, 0])
            cells = (
                f"{rows} × {in_size} × {out_size}",
                way.__name__,
                f"{np.median(times[:, index]) * 1e3:.2f}",
                f"{ratio:.2f}",
                f"{error:.2%}",
            )
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

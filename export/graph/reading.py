"""Linear layers and norms out of an ONNX file, under their canonical names: what
:class:`mobilevlm.export.graph.layers.Linear` wrote, as float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mobilevlm.checkpoint import file_sha256
from mobilevlm.errors import BundleError
from mobilevlm.export.linear_groups import LinearGroup, linear_groups
from mobilevlm.export.quantize.blocks import Float32, Quantized, Scheme, dequantize
from mobilevlm.spec import ModelSpec

_STACKS = {"q_proj": "qkv", "gate_proj": "gate_up"}
"""What a stack of layers is called, by its first."""


class OnnxTensors:
    """The linear layers' weights in a stage's file, dequantized one stack at a time. See
    :class:`mobilevlm.checkpoint.TensorSource`.

    Raises:
        BundleError: the file cannot be read, or lacks a layer of the spec.
    """

    def __init__(self, path: Path, spec: ModelSpec) -> None:
        self.folder, self.files = path, [path]
        try:
            graph = ir.load(path).graph
        except Exception as error:  # protobuf and onnx-ir raise many kinds
            raise BundleError(f"{path}: damaged ONNX file: {error}") from None
        self._stored = graph.initializers
        self._bits = {
            str(node.inputs[1].name): int(node.attributes["bits"].value)
            for node in graph
            if node.op_type == "MatMulNBits" and node.inputs[1] is not None
        }
        stage = graph.name == "decoder_model_merged"
        self._places: dict[str, tuple[LinearGroup, int]] = {}
        for group in linear_groups(spec):
            if group.name.startswith("decoder.") == stage:
                if f"{stored_name(group.name)}.weight" not in self._stored:
                    raise BundleError(f"{path}: {group.name!r} is not in it: export it again")
                starts = np.cumsum((0, *group.out_sizes))
                for name, start in zip(group.names, starts, strict=False):
                    self._places[f"{name}.weight"] = group, int(start)
        self._last: tuple[str, Float32] | None = None

    def __contains__(self, name: object) -> bool:
        return name in self._places

    @property
    def names(self) -> list[str]:
        """Of all weights, in the order of use."""
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        group, _ = self._places[name]
        return group.out_sizes[group.names.index(name.removesuffix(".weight"))], group.in_size

    def dtype(self, name: str) -> str:
        return "f32"

    def read(self, name: str) -> Float32:
        """The weight ``(out_size, in_size)`` that the file's numbers stand for."""
        group, start = self._places[name]
        if self._last is None or self._last[0] != group.name:
            self._last = group.name, self._dequantized(group)
        return self._last[1][start : start + self.shape(name)[0]]

    def read_norm(self, name: str) -> Float32:
        """A norm's weight ``(size,)``; ``name``: its canonical one, without ``.weight``."""
        return self._array(f"{stored_name(name)}.weight").astype(np.float32)

    def q4_0(self, name: str) -> NDArray[np.uint8] | None:
        """None: nothing here is in llama.cpp's form."""
        return None

    @property
    def sha256(self) -> str:
        return file_sha256(self.files[0])

    def _array(self, name: str) -> NDArray[Any]:
        value = self._stored[name].const_value
        assert value is not None
        return np.asarray(value.numpy())

    def _dequantized(self, group: LinearGroup) -> Float32:
        """``(out_size, in_size)``"""
        name = stored_name(group.name)
        weight = self._array(f"{name}.weight")
        if weight.dtype.kind == "f":
            return np.ascontiguousarray(weight.T, np.float32)
        scales = self._array(f"{name}.scale")
        if weight.dtype == np.int8:
            return weight.T.astype(np.float32) * scales[:, None]
        bits = self._bits[f"{name}.weight"]
        block_size = weight.shape[2] * 8 // bits
        zero_points = f"{name}.zero_points"
        zeros = self._array(zero_points) if zero_points in self._stored else None
        scheme = Scheme(bits, block_size, symmetric=zeros is None)
        return dequantize(Quantized(scheme, group.in_size, weight, scales, zeros, 0.0))


def stored_name(name: str) -> str:
    """A layer's name in the graph; ``name``: canonical, of a stack its first's."""
    part, _, rest = name.partition(".")
    if part == "vision":
        part = "vision.tower"
    elif part == "projector":
        part = "vision.projector"
    rest, _, leaf = rest.rpartition(".")
    if part == "decoder" and leaf == "input_norm" and rest != "layers.0":
        # The layer before adds the residual and normalises in one.
        rest, leaf = f"layers.{int(rest.rpartition('.')[2]) - 1}", "next_norm"
    elif part == "decoder" and leaf == "input_norm":
        rest = ""
    if part != "vision.projector":
        rest = rest.removesuffix(".attn").removesuffix(".mlp")
    return ".".join(filter(None, (part, rest, _STACKS.get(leaf, leaf))))

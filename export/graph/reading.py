"""Weights out of an ONNX file as float32, under their canonical names: what the stages of this
folder wrote."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mobilevlm.audio_encoder import ConformerEncoder
from mobilevlm.errors import BundleError
from mobilevlm.export.quantize.blocks import Float32, Quantized, dequantize
from mobilevlm.linear_groups import LinearGroup, linear_groups
from mobilevlm.recipe import Scheme
from mobilevlm.spec import ModelSpec
from mobilevlm.whole_file import file_sha256

_VISION = ("vision.", "audio.", "projector.")
_FIXED = "_quantized"
"""Suffix that onnxruntime's quantizer adds to a tensor's name."""
_STACKS = {
    "q_proj": "qkv",
    "q_down": "lora_down",
    "gate_proj": "gate_up",
    "key_proj": "key_value",
    "qkv_proj": "qkv_gate",
}
"""Name of a stack of layers, by its first layer."""
_JOINED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv",
           "gate_proj": "gate_up", "up_proj": "gate_up",
           "qkv_proj": "qkv_gate", "z_proj": "qkv_gate"}  # fmt: skip
"""Stack of each layer that is a product of its own where formats or bounds differ."""
_EXPERT = re.compile(r"(decoder\.layers\.\d+\.mlp\.experts)\.(\d+)\.(\w+)")
_FIRST = ("gate_proj", "fc1")
"""Layers that read an expert's input."""
_ROUTERS = (".router.weight", ".coefficient.weight")
"""Stored ``(in_size, out_size)`` and float in every recipe."""

_BITS = {
    "MatMulNBits": ((1, "bits"),),
    "QMoE": ((2, "expert_weight_bits"), (5, "expert_weight_bits")),
}
"""Inputs of operators that are weights in blocks, and the attribute that tells their bits."""


class OnnxTensors:
    """Linear layers and norms in the file of a stage, dequantized one stack at a time. See
    :class:`mobilevlm.checkpoint.TensorSource`.

    ``names``: of a model's tensors; those that the graph holds in another form (the patch
    embedding, convolutions with folded factors) are not here.

    Raises:
        BundleError: the file cannot be read, or lacks a linear layer.
    """

    def __init__(self, path: Path, spec: ModelSpec, names: Iterable[str]) -> None:
        self.folder, self.files = path, [path]
        try:
            graph = ir.load(path).graph
        except Exception as error:  # protobuf and onnx-ir raise many kinds
            raise BundleError(f"{path}: damaged ONNX file: {error}: export it again") from None
        self._stored = graph.initializers
        self._bits = {
            str(node.inputs[place].name): int(node.attributes[attribute].value)
            for node in graph
            for place, attribute in _BITS.get(node.op_type, ())
            if node.inputs[place] is not None
        }
        self._fixed = {
            str(node.inputs[0].name).removesuffix(_FIXED): node
            for node in graph
            if node.op_type == "DequantizeLinear"
            and node.inputs[0] is not None
            and node.inputs[0].name in self._stored
        }
        self._layers, stage = spec.decoder.num_hidden_layers, spec.encoder_stage
        self._parts = {stage: f"{stage}.tower", "projector": f"{stage}.projector"}
        self._parts["decoder"] = "decoder"
        encoded = spec.encoded
        self._flat = encoded is None or not isinstance(encoded.encoder, ConformerEncoder)
        self._groups: dict[str, LinearGroup] = {}
        stored = (part for group in linear_groups(spec) for part in self._as_stored(group))
        self._groups = {name: group for group in list(stored) for name in group.names}
        self._last: tuple[str, Float32] | None = None
        is_decoder = self._holds("decoder.lm_head.weight")
        prefixes = ("decoder.",) if is_decoder else _VISION
        wanted = [name for name in names if name.startswith(prefixes)]
        self.names = [name for name in wanted if self._holds(self._stored_name(name))]
        for name in wanted:
            if name.removesuffix(".weight") in self._groups and name not in self.names:
                raise BundleError(f"{path}: {name!r} is not in it: export it again")

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def shape(self, name: str) -> tuple[int, ...]:
        layer, _, leaf = name.rpartition(".")
        group = self._groups.get(layer)
        if group is None:
            stored = self._stored_name(name)
            shape = self._stored[f"{stored}{_FIXED}" if stored in self._fixed else stored].shape
            assert shape is not None
            sizes = tuple(int(size) for size in shape)
            return sizes[::-1] if name.endswith(_ROUTERS) else sizes
        out_size = group.out_sizes[group.names.index(layer)]
        return (out_size, group.in_size) if leaf == "weight" else (out_size,)

    def dtype(self, name: str) -> str:
        return "f32"

    def read(self, name: str) -> Float32:
        """The values that the file's numbers stand for; linear weights ``(out_size, in_size)``."""
        layer, _, leaf = name.rpartition(".")
        group = self._groups.get(layer)
        if group is None:
            whole: Float32 = self._array(self._stored_name(name)).astype(np.float32)
            return np.ascontiguousarray(whole.T) if name.endswith(_ROUTERS) else whole
        index = group.names.index(layer)
        start = sum(group.out_sizes[:index])
        here = slice(start, start + group.out_sizes[index])
        if leaf == "bias":
            bias: Float32 = self._array(self._stored_name(name))[here].astype(np.float32)
            return bias
        if self._last is None or self._last[0] != group.name:
            self._last = group.name, self._dequantized(group)
        return self._last[1][here]

    def q4_0(self, name: str) -> NDArray[np.uint8] | None:
        """None: nothing here is in llama.cpp's form."""
        return None

    @property
    def sha256(self) -> str:
        return file_sha256(self.files[0])

    def _as_stored(self, group: LinearGroup) -> list[LinearGroup]:
        """The group, or the runs of its layers that the graph has a product for each."""
        if len(group.names) == 1 or _EXPERT.fullmatch(group.name) is not None:
            return [group]
        first, *others = group.layers
        found = [first]
        for layer in others:
            if self._holds(self._stored_name(f"{layer.name}.weight")):
                found.append(layer)
            else:
                last = found[-1]
                names, sizes = (*last.names, *layer.names), (*last.out_sizes, *layer.out_sizes)
                found[-1] = replace(last, names=names, out_sizes=sizes)
        return found

    def _holds(self, name: str) -> bool:
        return name in self._stored or name in self._fixed

    def _array(self, name: str) -> NDArray[Any]:
        """The tensor as it is stored; of a fixed-point graph what its numbers stand for."""
        if name not in self._fixed:
            return self._read(name)
        node = self._fixed[name]
        numbers, scale, zero_point = (self._read(str(value.name)) for value in node.inputs)
        if scale.size > 1:
            shape = [1] * numbers.ndim
            shape[node.attributes["axis"].value] = -1
            scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
        values: Float32 = (numbers.astype(np.int64) - zero_point).astype(np.float32) * scale
        return values

    def _read(self, name: str) -> NDArray[Any]:
        value = self._stored[name].const_value
        assert value is not None
        if not isinstance(value, ir.ExternalTensor):
            return np.asarray(value.numpy())
        # Not through onnx-ir: it refuses files with two names, and an export that takes an artifact
        # over from the bundle before links it.
        data = self.folder.parent / Path(value.location).name
        shape = tuple(int(size) for size in value.shape)
        try:
            return np.memmap(data, value.dtype.numpy(), "r", value.offset or 0, shape)
        except (OSError, ValueError) as error:
            raise BundleError(f"{data}: cannot be read: {error}: export it again") from None

    def _dequantized(self, group: LinearGroup) -> Float32:
        """``(out_size, in_size)``"""
        expert = _EXPERT.fullmatch(group.name)
        stored = self._stored_name(f"{group.name}.weight")
        if expert is not None and stored.endswith(".table"):
            return self._expert(group, stored.removesuffix(".table"), int(expert[2]))
        name = stored.removesuffix(".weight")
        weight = self._array(f"{name}.weight")
        if weight.dtype.kind == "f":
            return np.ascontiguousarray(weight.T, np.float32)
        scales = np.asarray(self._array(f"{name}.scale"), np.float32)
        if weight.dtype == np.int8:
            values: Float32 = weight.T.astype(np.float32) * scales[:, None]
            return values
        zero_points = f"{name}.zero_points"
        zeros = self._array(zero_points) if zero_points in self._stored else None
        return _from_blocks(weight, scales, zeros, self._bits[f"{name}.weight"], group.in_size)

    def _expert(self, group: LinearGroup, name: str, index: int) -> Float32:
        """``(out_size, in_size)`` of an expert among those of one operator, where rows of gate and
        up take turns."""
        table = self._array(f"{name}.table")[index]
        if table.dtype.kind == "f":
            rows: Float32 = table.astype(np.float32)
        else:
            scales = np.asarray(self._array(f"{name}.scales")[index], np.float32)
            zero_points = f"{name}.zero_points"
            zeros = self._array(zero_points)[index] if zero_points in self._stored else None
            blocked = table.reshape(*scales.shape, -1)
            bits = self._bits[f"{name}.table"]
            rows = _from_blocks(blocked, scales, zeros, bits, group.in_size)
        count = len(group.names)
        return np.concatenate([rows[start::count] for start in range(count)])

    def _stored_name(self, name: str) -> str:
        """A tensor's name in the graph: modules are flatter there, and stacks have one name."""
        if name.endswith(_ROUTERS):
            return name.removesuffix(".weight")
        layer, _, kind = name.rpartition(".")
        if layer.endswith(".mlp.coefficient"):
            return f"{layer.removesuffix('.coefficient')}.{kind}"
        if layer in self._groups:
            layer = self._groups[layer].name
        expert = _EXPERT.fullmatch(layer)
        if expert is not None:
            return self._expert_name(expert[1], expert[2], expert[3], kind)
        part, _, path = layer.partition(".")
        if part == "decoder":
            path = self._decoder_path(path)
        path, _, leaf = path.rpartition(".")
        if part == "decoder" or (part != "projector" and self._flat):
            path = path.removesuffix(".attn")
        if part in ("vision", "audio"):
            path = path.removesuffix(".mlp")
        joined = f"{_JOINED[leaf]}.{leaf}" if leaf in _JOINED else leaf
        *single, stacked = (
            ".".join(filter(None, (self._parts[part], path, last, kind)))
            for last in (leaf, joined, _STACKS.get(leaf, leaf))
        )
        return next(filter(self._holds, single), stacked)

    def _expert_name(self, experts: str, index: str, leaf: str, kind: str) -> str:
        """Return the table of all experts in one operator, else the expert's own tensor. (Biases of
        the former, which lose nothing, are not read.)"""
        table = f"{experts}.{'first' if leaf in _FIRST else 'second'}.table"
        if kind == "weight" and table in self._stored:
            return table
        return f"{experts}.experts.{index}.{_STACKS.get(leaf, leaf)}.{kind}"

    def _decoder_path(self, path: str) -> str:
        """The operator that adds the residual normalises too, so a norm belongs to the layer before
        it; what makes the output of what stands in its place stands where attention's does."""
        path = re.sub(r"\.(short_conv|delta)\.out_proj", ".o_proj", path)
        if path == "norm":
            return f"layers.{self._layers - 1}.next_norm"
        before, _, leaf = path.rpartition(".")
        if leaf != "input_norm":
            return path
        index = int(before.rpartition(".")[2])
        return f"layers.{index - 1}.next_norm" if index else leaf


def _from_blocks(
    packed: NDArray[np.uint8],
    scales: Float32,
    zeros: NDArray[np.uint8] | None,
    bits: int,
    in_size: int,
) -> Float32:
    """``(out_size, in_size)`` of blocks ``(out_size, blocks, bytes)``."""
    scheme = Scheme(bits, packed.shape[2] * 8 // bits, symmetric=zeros is None)
    return dequantize(Quantized(scheme, in_size, packed, scales, zeros, 0.0))

"""Sparse experts of a decoder layer in three forms.

``fused``: one operator, ONNX Runtime's MoE for float weights and QMoE for integers in blocks.
``plain``: standard operators around each expert's own layers, for targets that lack the first; an
expert that no token chose multiplies nothing, so its weights are not read. ``dense``: every expert
on all tokens, those that were not chosen with weight 0, for targets whose shapes are fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
from onnxscript import nn

from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import MobileVLMError
from mobilevlm.export.graph.dialects import CONTRIB
from mobilevlm.export.graph.layers import FLOAT
from mobilevlm.export.graph.mlp import build_mlp, linear_names
from mobilevlm.export.graph.weight_file import WeightFile
from mobilevlm.export.quantize.blocks import Float32, Quantized, half_scales
from mobilevlm.export.quantize.errors import relative_error
from mobilevlm.export.recipes.layer_formats import quantize, to_half
from mobilevlm.recipe import BLOCK_BITS, BLOCK_SIZES, LinearFormat

_ACTIVATIONS = {
    ("gated", "silu"): "swiglu",
    ("plain", "silu"): "silu",
    ("plain", "gelu_new"): "gelu",
}
"""Names of activations in the fused operators; their GELU is the tanh approximation."""
_TINY = 2.0**-24
"""Divisor of probabilities that are all less: such experts add nothing either way."""


class SparseMLP(nn.Module):  # type: ignore[misc]
    """Router, experts and, where there is one, the dense MLP beside them: ``(1, length,
    hidden_size)`` to the same."""

    def __init__(self, weights: WeightFile, name: str, spec: DecoderSpec, layer: int) -> None:
        super().__init__()
        assert spec.experts is not None
        count, hidden = spec.num_experts(layer), spec.hidden_size
        router = weights.read(f"{name}.router.weight", count, hidden)
        self.router = weights.parameter(router.T)  # float32 in every recipe: it decides
        self.dialect = weights.dialect
        form = _FORMS[weights.recipe.experts]
        share = 1 if form is DenseExperts else spec.experts.top_k / count
        with weights.read_in_part(share):
            self.experts = form(weights, f"{name}.experts", spec, count)
        self.residual = None
        if spec.experts.use_residual:
            self.residual = build_mlp(weights, f"{name}.residual", spec)
            coefficient = weights.read(f"{name}.coefficient.weight", 2, hidden)
            self.coefficient = weights.parameter(coefficient.T)
            self.bias = weights.parameter(weights.read(f"{name}.coefficient.bias", 2))
        self.names = (f"{name}.router", f"{name}.coefficient")

    @property
    def products(self) -> list[tuple[Any, tuple[str, ...]]]:
        """Constants that this module itself multiplies by, with their canonical names."""
        weights = [self.router] if self.residual is None else [self.router, self.coefficient]
        return [(weight, (name,)) for weight, name in zip(weights, self.names, strict=False)]

    def forward(self, op: Any, x: Any) -> tuple[Any, Any]:
        """The result, and the router's logits ``(1, length, experts)``."""
        product = self.dialect.product
        logits = product(op, x, self.router)
        out = self.experts(op, x, logits)
        if self.residual is None:
            return out, logits
        shares = op.Softmax(op.Add(product(op, x, self.coefficient), self.bias), axis=-1)
        sparse, dense = op.Split(shares, axis=-1, num_outputs=2, _outputs=2)
        return op.Add(op.Mul(out, sparse), op.Mul(self.residual(op, x), dense)), logits


class FusedExperts(nn.Module):  # type: ignore[misc]
    """All experts of a layer in one operator, which routes too."""

    def __init__(self, weights: WeightFile, name: str, spec: DecoderSpec, count: int) -> None:
        super().__init__()
        assert spec.experts is not None
        self.routing = {
            "k": spec.experts.top_k,
            "normalize_routing_weights": int(spec.experts.renormalize),
        }
        self.num_experts = count
        self.format = _common_format(weights, name, spec, count)
        pairs = [linear_names(f"{name}.{index}", spec) for index in range(count)]
        hidden, wide = spec.hidden_size, spec.intermediate_size
        stack = _Stack(weights, self.format, spec.mlp_bias)
        self.first = Stacked(stack, [first for first, _ in pairs], hidden, wide)
        self.second = Stacked(stack, [[second] for _, second in pairs], wide, hidden)
        self.activation: dict[str, Any] = {
            "activation_type": _ACTIVATIONS[spec.mlp, spec.hidden_act]
        }
        if spec.mlp == "gated":  # rows of gate and up take turns; silu(g) · u
            self.activation |= {
                "swiglu_fusion": 1,
                "activation_alpha": 1.0,
                "activation_beta": 0.0,
            }

    def forward(self, op: Any, x: Any, logits: Any) -> Any:
        logits = op.Reshape(logits, [-1, self.num_experts])
        table, scales, zeros, bias = self.first(op)
        table2, scales2, zeros2, bias2 = self.second(op)
        settings = {**self.routing, **self.activation, "_domain": CONTRIB}
        if self.format.scheme is None:
            return op.MoE(x, logits, table, bias, table2, bias2, **settings)
        inputs = (x, logits, table, scales, bias, table2, scales2, bias2, None, None, None)
        return op.QMoE(
            *(*inputs, zeros, zeros2),
            **settings,
            expert_weight_bits=BLOCK_BITS[self.format.precision],
            block_size=self.format.block_size,
            accuracy_level=4,
            weights_prepacked=0,
        )


class PlainExperts(nn.Module):  # type: ignore[misc]
    """Each expert on the tokens that chose it."""

    def __init__(self, weights: WeightFile, name: str, spec: DecoderSpec, count: int) -> None:
        super().__init__()
        assert spec.experts is not None
        self.spec, self.hidden_size = spec.experts, spec.hidden_size
        self.dialect = weights.dialect
        self.experts = nn.ModuleList(
            [build_mlp(weights, f"{name}.{index}", spec) for index in range(count)]
        )

    def forward(self, op: Any, x: Any, logits: Any) -> Any:
        tokens = op.Reshape(x, [-1, self.hidden_size])
        probabilities = op.Softmax(op.Reshape(logits, [-1, len(self.experts)]), axis=-1)
        weights, chosen = op.TopK(probabilities, [self.spec.top_k], axis=-1, _outputs=2)
        if self.spec.renormalize:
            weights = op.Div(weights, op.ReduceSum(weights, [-1], keepdims=1))
        out = op.Sub(tokens, tokens)
        for index, expert in enumerate(self.experts):
            places = op.Transpose(op.NonZero(op.Equal(chosen, index)), perm=[1, 0])  # token, rank
            token = op.Slice(places, [0], [1], [1])
            gain = op.Unsqueeze(op.GatherND(weights, places), [1])
            made = op.Mul(expert(op, op.GatherND(tokens, token)), gain)
            out = op.ScatterND(out, token, made, reduction="add")
        return op.Reshape(out, op.Shape(x))


class DenseExperts(PlainExperts):
    """Each expert on all tokens. The least probability that is chosen is found by taking away the
    largest one, as often as experts are used but one."""

    def forward(self, op: Any, x: Any, logits: Any) -> Any:
        probabilities = op.Softmax(logits, axis=-1)
        chosen = self._chosen_by_arithmetic if self.dialect.floats_only else self._chosen
        count = len(self.experts)
        gains = op.Split(chosen(op, probabilities), axis=-1, num_outputs=count, _outputs=count)
        made = [
            op.Mul(expert(op, x), gain) for expert, gain in zip(self.experts, gains, strict=True)
        ]
        out = made[0]
        for part in made[1:]:
            out = op.Add(out, part)
        return out

    def _chosen(self, op: Any, probabilities: Any) -> Any:
        """Weights of the experts ``(1, length, experts)``, 0 of those that are not chosen."""
        rest = probabilities
        for _ in range(self.spec.top_k - 1):
            largest = op.ReduceMax(rest, [-1], keepdims=1)
            rest = op.Where(op.GreaterOrEqual(rest, largest), 0.0, rest)
        least = op.ReduceMax(rest, [-1], keepdims=1)
        weights = op.Where(op.GreaterOrEqual(probabilities, least), probabilities, 0.0)
        if self.spec.renormalize:
            weights = op.Div(weights, op.ReduceSum(weights, [-1], keepdims=1))
        return weights

    def _chosen_by_arithmetic(self, op: Any, probabilities: Any) -> Any:
        """The same without comparisons, which accelerators lack."""
        rest = probabilities
        for _ in range(self.spec.top_k - 1):
            rest = op.Mul(rest, _is_less(op, rest, self._joined(op, rest, op.Max)))
        least = self._joined(op, rest, op.Max)
        bound = op.Max(probabilities, least)  # the probability itself where it is not less
        weights = op.Mul(probabilities, op.Sub(1.0, _is_less(op, probabilities, bound)))
        if self.spec.renormalize:
            weights = op.Div(weights, self._joined(op, weights, op.Add))
        return weights

    def _joined(self, op: Any, values: Any, join: Callable[[Any, Any], Any]) -> Any:
        """The largest of ``(1, length, experts)``, or the sum ``(1, length, 1)``."""
        count = len(self.experts)
        return reduce(join, op.Split(values, axis=-1, num_outputs=count, _outputs=count))


def _is_less(op: Any, values: Any, bounds: Any) -> Any:
    """1 where a value is less than its bound, 0 where they are equal; none is more. Two floats of
    24 bits that differ have a ratio of at most ``1 - 2**-24``, which is made 1 in two steps that
    floats of 11 bits can do too."""
    away = op.Sub(1.0, op.Div(values, op.Max(bounds, _TINY)))
    for _ in range(2):
        away = op.Clip(op.Mul(away, 4096.0), -1.0, 1.0)
    return away


_FORMS: dict[str, type[FusedExperts] | type[PlainExperts]] = {
    "fused": FusedExperts,
    "plain": PlainExperts,
    "dense": DenseExperts,
}


@dataclass(frozen=True)
class _Stack:
    """How the weights of a layer's experts are stored."""

    weights: WeightFile
    format: LinearFormat
    biased: bool


class Stacked(nn.Module):  # type: ignore[misc]
    """One linear layer of all experts: ``table (experts, rows, …)`` and what belongs to it. Where
    an expert has two, ``names`` are gate and up, and their rows take turns."""

    def __init__(self, stack: _Stack, names: list[list[str]], in_size: int, out_size: int) -> None:
        super().__init__()
        weights = stack.weights
        self.bias = self.scales = self.zero_points = None
        tables = _tables(stack, names, in_size, out_size)
        if stack.format.scheme is None:
            self.table = weights.stacked(tables, len(names))
        else:
            parts = [
                quantize(table, stack.format, group[0], weights.hessian)
                for group, table in zip(names, tables, strict=True)
            ]
            for group, part in zip(names, parts, strict=True):
                weights.errors[",".join(group)] = part.relative_error
            self.table = weights.parameter(np.stack([_rows(part) for part in parts]))
            self.scales = weights.parameter(np.stack([half_scales(part) for part in parts]))
            zeros = [part.zero_points for part in parts if part.zero_points is not None]
            self.zero_points = weights.parameter(np.stack(zeros)) if zeros else None
        if stack.biased:
            vectors = [
                _interleaved([weights.read(f"{name}.bias", out_size) for name in group])
                for group in names
            ]
            self.bias = weights.parameter(np.stack(vectors))
        self.half = stack.format.precision == "fp16"

    def forward(self, op: Any) -> tuple[Any, Any, Any, Any]:
        table = op.Cast(self.table, to=FLOAT) if self.half else self.table
        scales = None if self.scales is None else op.Cast(self.scales, to=FLOAT)
        return table, scales, self.zero_points, self.bias


def _tables(
    stack: _Stack, names: list[list[str]], in_size: int, out_size: int
) -> Iterator[np.ndarray[Any, Any]]:
    """Expert by expert, in the type that is stored or, for integers, in float32."""
    for group in names:
        read = [stack.weights.read(f"{name}.weight", out_size, in_size) for name in group]
        table = _interleaved(read)
        del read
        if stack.format.precision == "fp16":
            half = to_half(table)
            stack.weights.errors[",".join(group)] = relative_error(half, table)
            yield half
        else:
            yield table


def _interleaved(parts: list[Float32]) -> Float32:
    """Rows of several arrays in turns."""
    if len(parts) == 1:
        return parts[0]
    return np.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])


def _rows(part: Quantized) -> np.ndarray[Any, Any]:
    return part.packed.reshape(len(part.packed), -1)


def _common_format(weights: WeightFile, name: str, spec: DecoderSpec, count: int) -> LinearFormat:
    """Return the one format that the operator takes for all experts. With quantized activations
    (``int8``) the operator has 8-bit weights in blocks. It needs channels that are a multiple of a
    block, so blocks are halved until they are.

    Raises:
        MobileVLMError: the recipe has several, or sizes or activation do not fit the operator.
    """
    remedy = 'set experts = "plain" in the recipe'
    linears = [linear_names(f"{name}.{index}", spec) for index in range(count)]
    formats = {
        weights.recipe.format_of(linear) for first, second in linears for linear in (*first, second)
    }
    if len(formats) > 1:
        raise MobileVLMError(
            f"{name}: these experts have several formats, and the operator for all of them takes "
            f"one: give them the same, or {remedy}"
        )
    if (spec.mlp, spec.hidden_act) not in _ACTIVATIONS:
        raise MobileVLMError(
            f"{name}: the operator for all experts has no {spec.mlp} MLP with {spec.hidden_act}: "
            f"{remedy}"
        )
    common = formats.pop()
    if common.precision == "int8":
        common = replace(common, precision="q8")
    fitting = math.gcd(common.block_size, spec.hidden_size, spec.intermediate_size)
    if common.scheme is not None and fitting < min(BLOCK_SIZES):
        raise MobileVLMError(
            f"{name}: the operator for all experts needs channels that are multiples of a block of "
            f"{min(BLOCK_SIZES)} or more: found {spec.hidden_size} and {spec.intermediate_size}: "
            f"{remedy}"
        )
    return replace(common, block_size=fitting)

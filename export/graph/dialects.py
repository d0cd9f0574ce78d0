"""Dialects: the operators that a graph is written in.

ONNX Runtime's processors have operators for whole parts of a model. Compilers for fixed-point
processors, and quantizers that look into a graph, know the standard's only, and accelerators of
phones a few of these. No other module knows which operator a target has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from math import pi, sqrt
from typing import Any, TypeAlias

CONTRIB = "com.microsoft"

Attention: TypeAlias = Callable[[Any, Any, Any, Any, int, int], Any]
"""Attention of all queries to all keys: of queries, keys and values ``(1, length, heads *
head_dim)``, the number of heads, and ``head_dim``."""
Activation: TypeAlias = Callable[[Any, Any], Any]
Gelu: TypeAlias = Callable[..., Any]
"""GELU of ``x``, exact or with ``approximate="tanh"``."""
LayerNorm: TypeAlias = Callable[[Any, Any, Any, Any, float], Any]
"""Layer norm over the last axis: of ``x``, weight, bias and epsilon."""
RMSNorm: TypeAlias = Callable[[Any, Any, Any, float], Any]
"""``x / sqrt(mean(x²) + epsilon) · weight`` over the last axis."""


@dataclass(frozen=True)
class Dialect:
    """One way to write what a model is made of."""

    opset_imports: Mapping[str, int]
    attention: Attention
    quick_gelu: Activation
    """``x · sigmoid(1.702 x)``"""
    gelu: Gelu
    hard_swish: Activation
    """``x · min(max(x / 6 + 1/2, 0), 1)``"""
    layer_norm: LayerNorm
    rms_norm: RMSNorm
    rows_only: bool = False
    """A constant multiplies two dimensions only, and from the right"""
    floats_only: bool = False
    """Positions are chosen by a product and experts by arithmetic, without indices and
    comparisons"""
    pixel_offset: int = 0
    """Subtracted from pixels before the first product, and exact there: what they have in common
    would multiply the rounding of its weights."""
    joined_queries: bool = True
    """True if queries, keys and values of the tower are one product, whose result has one range"""

    def product(self, op: Any, x: Any, weight: Any, bias: Any | None = None) -> Any:
        """Multiply ``x (1, length, in_size)`` by the constant ``weight (in_size, out_size)``, and
        add a bias."""
        if not self.rows_only:
            made = op.MatMul(x, weight)
            return made if bias is None else op.Add(made, bias)
        in_size, out_size = weight.shape
        rows = op.Reshape(x, [-1, int(in_size)])
        made = op.MatMul(rows, weight) if bias is None else op.Gemm(rows, weight, bias)
        return op.Reshape(made, [1, -1, int(out_size)])


@dataclass(frozen=True)
class WatchingDialect(Dialect):
    """A dialect that notes what constants are multiplied by."""

    products: list[tuple[Any, Any]] = field(default_factory=list)
    """Constant and input of each product"""

    @classmethod
    def of(cls, dialect: Dialect) -> WatchingDialect:
        """Return the same dialect, watching."""
        return cls(**{item.name: getattr(dialect, item.name) for item in fields(dialect)})

    def product(self, op: Any, x: Any, weight: Any, bias: Any | None = None) -> Any:
        """See :meth:`Dialect.product`."""
        self.products.append((weight, x))
        return super().product(op, x, weight, bias)


def fused_attention(op: Any, query: Any, key: Any, value: Any, heads: int, head_dim: int) -> Any:
    """One operator of ONNX Runtime."""
    return op.MultiHeadAttention(query, key, value, num_heads=heads, _domain=CONTRIB)


def standard_attention(op: Any, query: Any, key: Any, value: Any, heads: int, head_dim: int) -> Any:
    """Softmax between two products."""
    split = [1, -1, heads, head_dim]
    query = op.Transpose(op.Reshape(op.Mul(query, head_dim**-0.5), split), perm=[0, 2, 1, 3])
    key = op.Transpose(op.Reshape(key, split), perm=[0, 2, 3, 1])
    value = op.Transpose(op.Reshape(value, split), perm=[0, 2, 1, 3])
    mixed = op.MatMul(op.Softmax(op.MatMul(query, key), axis=-1), value)
    return op.Reshape(op.Transpose(mixed, perm=[0, 2, 1, 3]), [1, -1, heads * head_dim])


def fused_quick_gelu(op: Any, x: Any) -> Any:
    """One operator of ONNX Runtime."""
    return op.QuickGelu(x, alpha=1.702, _domain=CONTRIB)


def standard_quick_gelu(op: Any, x: Any) -> Any:
    """As it is defined."""
    return op.Mul(x, op.Sigmoid(op.Mul(x, 1.702)))


def standard_gelu(op: Any, x: Any, **approximate: str) -> Any:
    """One operator, since opset 20."""
    return op.Gelu(x, **approximate)


def elementary_gelu(op: Any, x: Any, approximate: str = "none") -> Any:
    """As it is defined."""
    if approximate == "tanh":
        inner = op.Mul(op.Add(x, op.Mul(op.Mul(x, op.Mul(x, x)), 0.044715)), sqrt(2 / pi))
        share = op.Tanh(inner)
    else:
        share = op.Erf(op.Mul(x, sqrt(0.5)))
    return op.Mul(op.Mul(x, 0.5), op.Add(share, 1.0))


def standard_hard_swish(op: Any, x: Any) -> Any:
    """One operator."""
    return op.HardSwish(x)


def elementary_hard_swish(op: Any, x: Any) -> Any:
    """As it is defined."""
    return op.Mul(x, hard_sigmoid(op, x))


def hard_sigmoid(op: Any, x: Any) -> Any:
    """``min(max(x / 6 + 1/2, 0), 1)``, one operator in every dialect."""
    return op.HardSigmoid(x, alpha=1 / 6, beta=0.5)


def standard_layer_norm(op: Any, x: Any, weight: Any, bias: Any, epsilon: float) -> Any:
    """One operator."""
    return op.LayerNormalization(x, weight, bias, axis=-1, epsilon=epsilon)


def centred_layer_norm(op: Any, x: Any, weight: Any, bias: Any, epsilon: float) -> Any:
    """A root-mean-square norm of what is left when the mean is taken away."""
    rest = op.Sub(x, op.ReduceMean(x, [-1], keepdims=1))
    return op.Add(standard_rms_norm(op, rest, weight, epsilon), bias)


def fused_rms_norm(op: Any, x: Any, weight: Any, epsilon: float) -> Any:
    """One operator of ONNX Runtime."""
    return op.SimplifiedLayerNormalization(x, weight, axis=-1, epsilon=epsilon)


def standard_rms_norm(op: Any, x: Any, weight: Any, epsilon: float) -> Any:
    """One operator, since opset 23."""
    return op.RMSNormalization(x, weight, axis=-1, epsilon=epsilon)


def elementary_rms_norm(op: Any, x: Any, weight: Any, epsilon: float) -> Any:
    """As it is defined."""
    mean = op.ReduceMean(op.Mul(x, x), [-1], keepdims=1)
    return op.Mul(op.Div(x, op.Sqrt(op.Add(mean, epsilon))), weight)


CPU = Dialect(
    opset_imports={"": 20, CONTRIB: 1},
    attention=fused_attention,
    quick_gelu=fused_quick_gelu,
    gelu=standard_gelu,
    hard_swish=standard_hard_swish,
    layer_norm=standard_layer_norm,
    rms_norm=fused_rms_norm,
)
STANDARD = replace(
    CPU,
    opset_imports={"": 21},
    attention=standard_attention,
    quick_gelu=standard_quick_gelu,
    rms_norm=elementary_rms_norm,
    pixel_offset=114,
)
"""For vision stages in fixed point. Opset 21 is the first whose QuantizeLinear has 16 bits."""
STATIC = replace(STANDARD, opset_imports={"": 23}, rms_norm=standard_rms_norm)
"""For decoders in fixed point. Opset 23 is the first with RMSNormalization."""
CENTRED = replace(STATIC, layer_norm=centred_layer_norm, joined_queries=False)
"""For vision stages on Hexagon v68, which has no layer norm of 16 bits, and whose 16-bit products
are off by up to 4e-4 of their range."""
ELEMENTARY = replace(
    STANDARD,
    opset_imports={"": 18},
    gelu=elementary_gelu,
    hard_swish=elementary_hard_swish,
    rows_only=True,
    floats_only=True,
)
"""For accelerators of phones (docs/how-to/mobile.md): XNNPACK multiplies two dimensions by a
constant, and Core ML has neither Gather nor comparisons. An old opset: their runtimes refuse
versions of operators that are newer than they are."""

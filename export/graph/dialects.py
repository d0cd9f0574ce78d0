"""Which operators a graph may have: those of ONNX Runtime's processors, or only the standard's.

Compilers for fixed-point processors, and quantizers that look into a graph, know no fused ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

CONTRIB = "com.microsoft"

Attention: TypeAlias = Callable[[Any, Any, Any, Any, int, int], Any]
"""All queries with all keys: of queries, keys and values ``(1, length, heads * head_dim)``, the
number of heads, and ``head_dim``."""
Activation: TypeAlias = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Dialect:
    """One way to write what has no single operator in the standard."""

    opset_imports: Mapping[str, int]
    attention: Attention
    quick_gelu: Activation
    """``x · sigmoid(1.702 x)``"""
    pixel_offset: int = 0
    """Subtracted from pixels before the first product, and exact there: what they have in common
    would multiply the rounding of its weights."""
    joined_queries: bool = True
    """Whether queries, keys and values of the tower are one product, whose result has one range"""


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


CPU = Dialect({"": 20, CONTRIB: 1}, fused_attention, fused_quick_gelu)
STANDARD = Dialect({"": 21}, standard_attention, standard_quick_gelu, pixel_offset=114)
"""Opset 21 is the first whose QuantizeLinear has 16 bits."""
STATIC = replace(STANDARD, opset_imports={"": 23}, joined_queries=False)
"""Opset 23 is the first with RMSNormalization. For Hexagon v68, whose 16-bit products are off by up
to 4e-4 of their range."""
ELEMENTARY = replace(STANDARD, opset_imports={"": 18})
"""For recipes with elementary operators. An old opset: accelerators' runtimes refuse versions of
operators that are newer than they are."""

"""Attention of the rows of images, which see each other in both directions (Gemma 3).

GroupQueryAttention sees the past only. It computes all rows and fills the buffers; what comes out
for the rows of images is then replaced by their attention to the buffers. A run without such rows
gives these operators nothing to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from mobilevlm.decoder_spec import DecoderSpec


@dataclass(frozen=True)
class Blocks:
    """Rows of images in a run, and what they see in layers of one kind."""

    rows: Any
    """Places in the run ``(rows,)``"""
    places: Any
    """The same as indices of ScatterND ``(1, rows, 2)``"""
    slots: Any
    """Number of slots that are read ``(1,)``: all, or none where there are no such rows"""
    bias: Any
    """Added to scores ``(rows, slots)``: 0 where a slot is seen, else less than all scores"""


def read_blocks(
    op: Any, rows: Any, ends: Any, length: Any, lengths: tuple[Any, Any], window: int
) -> Blocks:
    """Return what rows see in layers of one kind. ``ends``: slot behind the last of each row's
    image ``(rows,)``; ``length``: rows of the run ``(1,)``; ``lengths``: slots after the run, of
    the whole sequence and in the buffers of these layers; ``window``: of these layers, or 0."""
    whole, filled = (op.Cast(count, to=ir.DataType.INT64) for count in lengths)
    before = op.Sub(whole, filled)  # slots that are no longer in the buffers
    slots = op.Mul(filled, op.Min(op.Shape(rows), op.Constant(value_ints=[1])))
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    each = op.Range(zero, op.Squeeze(slots, [0]), one)
    seen = op.Less(each, op.Unsqueeze(op.Sub(ends, before), [1]))
    if window:
        own = op.Add(rows, op.Sub(filled, length))
        seen = op.And(seen, op.Greater(each, op.Unsqueeze(op.Sub(own, window), [1])))
    bias = op.Where(seen, op.Constant(value_float=0.0), op.Constant(value_float=float("-inf")))
    column = op.Unsqueeze(rows, [1])
    places = op.Unsqueeze(op.Concat(op.Sub(column, column), column, axis=1), [0])
    return Blocks(rows, places, slots, bias)


def attend_blocks(
    op: Any,
    blocks: Blocks,
    query: Any,
    buffers: tuple[Any, Any],
    mixed: Any,
    spec: DecoderSpec,
    soft_cap: Any,
) -> Any:
    """Return mixed values ``(1, length, heads · cache_head_dim)`` with those of images replaced.
    ``query``: rotated, of the same shape; ``soft_cap``: of scores."""
    heads, kv_heads, dim = spec.num_attention_heads, spec.num_key_value_heads, spec.cache_head_dim
    chosen = op.Mul(op.Gather(query, blocks.rows, axis=1), spec.score_scale)
    chosen = op.Transpose(op.Reshape(chosen, [0, 0, heads, dim]), perm=[0, 2, 1, 3])
    chosen = op.Reshape(chosen, [kv_heads, heads // kv_heads, 0, dim])
    zero, axis = op.Constant(value_ints=[0]), op.Constant(value_ints=[2])
    key, value = (op.Slice(buffer, zero, blocks.slots, axis) for buffer in buffers)
    scores = op.MatMul(chosen, op.Transpose(key, perm=[1, 0, 3, 2]))
    shares = op.Softmax(op.Add(soft_cap(op, scores), blocks.bias), axis=-1)
    found = op.MatMul(shares, op.Transpose(value, perm=[1, 0, 2, 3]))
    found = op.Transpose(op.Reshape(found, [1, heads, 0, dim]), perm=[0, 2, 1, 3])
    return op.ScatterND(mixed, blocks.places, op.Reshape(found, [0, 0, heads * dim]))

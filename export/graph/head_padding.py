"""Heads padded with zeros to a size that GroupQueryAttention takes.

Zeros in queries and keys add nothing to a score, and those in values come out as zeros, so
attention stays exact as long as its scale is that of the true size.
"""

from __future__ import annotations

from typing import Any

from mobilevlm.decoder_spec import DecoderSpec


def pad_heads(op: Any, states: Any, heads: int, spec: DecoderSpec) -> Any:
    """``(sequences, length, heads * head_dim)`` to ``(…, heads * cache_head_dim)``."""
    added = spec.cache_head_dim - spec.head_dim
    if not added:
        return states
    split = op.Reshape(states, [0, -1, heads, spec.head_dim])
    padded = op.Pad(split, [0, 0, 0, 0, 0, 0, 0, added])
    return op.Reshape(padded, [0, -1, heads * spec.cache_head_dim])


def cut_heads(op: Any, states: Any, heads: int, spec: DecoderSpec) -> Any:
    """Undo :func:`pad_heads`."""
    if spec.cache_head_dim == spec.head_dim:
        return states
    split = op.Reshape(states, [0, -1, heads, spec.cache_head_dim])
    return op.Reshape(op.Slice(split, [0], [spec.head_dim], [3]), [0, -1, heads * spec.head_dim])

"""Decoder attention over packed rows, without the scores that the mask would throw away.

Every question of a row sees the prefix and itself. On a processor the prefix is therefore one plain
attention, and a question's own tokens are found within two chunks of the row; both results are
merged by their softmax sums, and the backward pass of each part is given the merged ones (as ring
attention does: Liu et al. 2023). Elsewhere a mask says the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mobilevlm.reference.decoder import Attention, rotate

CHUNK = 80
"""Places; no question with its answer is longer."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Packing:
    """Who sees whom in rows whose first ``prefix`` places all questions see."""

    prefix: int
    mask: Tensor
    """float (rows * chunks, 1, CHUNK, 2 * CHUNK): 0 where a place sees one of its own chunk or the
    one before, -inf elsewhere."""


def packing(blocks: Tensor, prefix: int) -> Packing:
    """The packing of (rows, length) block numbers (see packing.py); ``length - prefix`` is a
    multiple of CHUNK."""
    own = torch.unflatten(blocks[:, prefix:], 1, (-1, CHUNK))
    before = torch.cat((torch.full_like(own[:, :1], -2), own[:, :-1]), dim=1)
    keys = torch.cat((before, own), dim=2)
    same = (own[..., :, None] == keys[..., None, :]) & (own[..., :, None] > 0)
    place = torch.arange(CHUNK, device=blocks.device)
    key_place = torch.arange(-CHUNK, CHUNK, device=blocks.device)
    itself = place[:, None] == key_place[None, :]
    seen = (same & (key_place[None, :] <= place[:, None])) | itself
    mask = torch.zeros(seen.shape, device=blocks.device).masked_fill_(~seen, -torch.inf)
    return Packing(prefix, mask.flatten(0, 1)[:, None])


def attention_mask(blocks: Tensor) -> Tensor:
    """(rows, length) block numbers to (rows, 1, length, length): who (third axis) sees whom."""
    length = blocks.shape[1]
    seen, sees = blocks[:, None, :], blocks[:, :, None]
    causal = torch.ones(length, length, dtype=torch.bool, device=blocks.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=blocks.device)
    return (((seen == 0) | (seen == sees)) & causal & (sees >= 0) | itself)[:, None]


def packed_mask(blocks: Tensor, prefix: int) -> Tensor | Packing:
    """Return the mask that layers take for packed rows: a ``Packing`` on a CPU, else a matrix."""
    return packing(blocks, prefix) if blocks.device.type == "cpu" else attention_mask(blocks)


class PackedAttention(Attention):
    """The reference's attention, which also takes a ``Packing`` for a mask."""

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | Packing | None,
        heard: bool = False,
        shared: list[Tensor] | None = None,
    ) -> Tensor:
        if not isinstance(mask, Packing):
            return super().forward(hidden, rotary, mask, heard, shared)
        query, key, value = (
            proj(hidden).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        sizes = [mask.prefix, hidden.shape[1] - mask.prefix]
        queries, keys, values = (part.split(sizes, dim=2) for part in (query, key, value))
        first = F.scaled_dot_product_attention(queries[0], keys[0], values[0], is_causal=True)
        rest: Tensor = _Questions.apply(
            queries[1], keys[0], values[0], keys[1], values[1], mask.mask
        )  # type: ignore[no-untyped-call]
        out: Tensor = self.o_proj(torch.cat((first, rest), dim=2).transpose(1, 2).flatten(2))
        return out


class _Questions(torch.autograd.Function):
    """Attention of ``query`` (rows, heads, places, size) to the prefix and to its own chunks."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, own_key: Tensor, own_value: Tensor,
        mask: Tensor,
    ) -> Tensor:  # fmt: skip
        chunks = _chunked(query), _windows(own_key), _windows(own_value)
        prefix, prefix_sum = _flash(query, key, value)
        own, own_sum = _flash(*chunks, attn_mask=mask)
        rows = len(query)
        own, own_sum = _joined(own, rows), _joined(own_sum[..., None], rows)[..., 0]
        total = torch.logaddexp(prefix_sum, own_sum)
        out: Tensor = prefix * (prefix_sum - total).exp()[..., None]
        out = out.addcmul_(own, (own_sum - total).exp()[..., None])
        ctx.save_for_backward(query, key, value, *chunks, mask, out, total)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, chunk, own_key, own_value, mask, out, total = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        prefix = _flash_backward(gradient, query, key, value, out, total, 0.0, False)
        own = _flash_backward(
            _chunked(gradient), chunk, own_key, own_value, _chunked(out),
            _chunked(total[..., None])[..., 0].contiguous(), 0.0, False, attn_mask=mask,
        )  # fmt: skip
        rows = len(query)
        return (
            prefix[0] + _joined(own[0], rows),
            prefix[1],
            prefix[2],
            _unwindowed(own[1], rows),
            _unwindowed(own[2], rows),
            None,
        )


def _chunked(states: Tensor) -> Tensor:
    """(rows, heads, places, size) to (rows * chunks, heads, CHUNK, size)."""
    chunks = torch.unflatten(states, 2, (-1, CHUNK))
    return chunks.transpose(1, 2).flatten(0, 1).contiguous()


def _joined(chunks: Tensor, rows: int) -> Tensor:
    """The reverse of ``_chunked``."""
    return torch.unflatten(chunks, 0, (rows, -1)).transpose(1, 2).flatten(2, 3)


def _windows(states: Tensor) -> Tensor:
    """(rows, heads, places, size) to (rows * chunks, heads, 2 * CHUNK, size): each chunk behind
    the one before it."""
    chunks = torch.unflatten(states, 2, (-1, CHUNK)).transpose(1, 2)
    before = torch.cat((torch.zeros_like(chunks[:, :1]), chunks[:, :-1]), dim=1)
    return torch.cat((before, chunks), dim=3).flatten(0, 1)


def _unwindowed(windows: Tensor, rows: int) -> Tensor:
    """Sums the gradients of both copies that ``_windows`` made."""
    both = torch.unflatten(windows, 0, (rows, -1))
    before, own = both[:, :, :, :CHUNK], both[:, :, :, CHUNK:]
    total = own.clone()
    total[:, :-1] += before[:, 1:]
    return total.transpose(1, 2).flatten(2, 3)

"""Linear attention by the gated delta rule (Yang et al. 2024), as Qwen3.5 has it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.reference.norms import RMSNorm

_EPSILON = 1e-6
"""Added to squared lengths of queries and keys."""


class HeadNumbers(nn.Module):
    """One number for each head."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads))


class GatedDelta(nn.Module):
    """``(1, length, hidden_size)`` to the same."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        assert spec.delta is not None
        self.spec = delta = spec.delta
        size, mixed, kernel = spec.hidden_size, delta.mixed_size, delta.kernel
        self.qkv_proj = nn.Linear(size, mixed, bias=False)
        self.z_proj = nn.Linear(size, delta.value_size, bias=False)
        self.b_proj = nn.Linear(size, delta.value_heads, bias=False)
        self.a_proj = nn.Linear(size, delta.value_heads, bias=False)
        self.conv = nn.Conv1d(mixed, mixed, kernel, groups=mixed, padding=kernel - 1, bias=False)
        self.decay_log, self.time_bias = (HeadNumbers(delta.value_heads) for _ in range(2))
        self.norm = RMSNorm(delta.value_dim, spec.norm_eps)
        self.out_proj = nn.Linear(delta.value_size, size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        delta, length = self.spec, hidden.shape[1]
        mixed = F.silu(self.conv(self.qkv_proj(hidden).transpose(1, 2))[..., :length])
        sizes = [delta.key_size, delta.key_size, delta.value_size]
        query, key, value = (
            part.transpose(1, 2).reshape(length, heads, -1)
            for part, heads in zip(
                torch.split(mixed, sizes, dim=1),
                (delta.key_heads, delta.key_heads, delta.value_heads),
                strict=True,
            )
        )
        query, key = _unit(query) * delta.key_dim**-0.5, _unit(key)
        shared = delta.value_heads // delta.key_heads
        query, key = (part.repeat_interleave(shared, dim=1) for part in (query, key))
        rate = self.b_proj(hidden)[0].sigmoid()
        step = F.softplus(self.a_proj(hidden)[0] + self.time_bias.weight)
        kept = (-self.decay_log.weight.exp() * step).exp()
        out, _ = delta_rule(query, key, value, rate, kept)
        gate = F.silu(self.z_proj(hidden)).view(1, length, delta.value_heads, -1)
        return self.out_proj((self.norm(out[None]) * gate).flatten(2))  # type: ignore[no-any-return]


def delta_rule(
    query: Tensor, key: Tensor, value: Tensor, rate: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what queries find ``(length, heads, value_dim)`` and the states after the last
    position ``(heads, key_dim, value_dim)``. Queries and keys ``(length, heads, key_dim)``;
    ``rate``: share of a value that replaces what its key gave; ``kept``: that of the state, both
    ``(length, heads)``."""
    state = query.new_zeros(key.shape[1], key.shape[2], value.shape[2])
    found = []
    for place in range(len(query)):
        state = state * kept[place, :, None, None]
        known = torch.einsum("hkv,hk->hv", state, key[place])
        change = (value[place] - known) * rate[place, :, None]
        state = state + key[place, :, :, None] * change[:, None]
        found.append(torch.einsum("hkv,hk->hv", state, query[place]))
    return torch.stack(found), state


def _unit(states: Tensor) -> Tensor:
    """Vectors divided by their lengths."""
    return states * (states.square().sum(-1, keepdim=True) + _EPSILON).rsqrt()

"""Sparse experts of MoE-LLaVA (Lin et al. 2024, section 3.2): a router sends each token to the best
``top_k`` of several MLPs.

The official gate (DeepSpeed's ``top2gating``) also adds noise to the second choice and drops tokens
over an expert's capacity. Neither happens on a device; dropping can be had here, to measure what it
changes (docs/explanation/moe.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.reference.mlp import build_mlp


@dataclass(frozen=True)
class Capacity:
    """How many tokens of one pass an expert takes at most, as the official gate counts."""

    factor: float
    """``eval_capacity_factor``: 1 is an even share of all choices."""
    minimum: int
    """``min_capacity``"""

    def slots(self, tokens: int, experts: int, top_k: int) -> int:
        """Places in each expert for a pass of so many tokens."""
        return max(math.ceil(tokens / experts * top_k * self.factor), self.minimum)


class SparseMLP(nn.Module):
    """Experts in place of a layer's MLP, ``(…, hidden_size)`` to the same.

    A pass leaves what the router decided: ``probabilities`` ``(tokens, experts)``, and ``chosen``
    and ``weights`` ``(tokens, top_k)``, best first. ``capacity``: none, so that nothing is dropped.
    """

    def __init__(self, spec: DecoderSpec, layer: int) -> None:
        super().__init__()
        assert spec.experts is not None
        self.spec = spec.experts
        self.router = nn.Linear(spec.hidden_size, spec.num_experts(layer), bias=False)
        self.experts = nn.ModuleList(build_mlp(spec) for _ in range(spec.num_experts(layer)))
        if spec.experts.use_residual:
            self.residual = build_mlp(spec)
            self.coefficient = nn.Linear(spec.hidden_size, 2)
        self.capacity: Capacity | None = None
        self.probabilities = torch.zeros(0, len(self.experts))
        self.chosen = torch.zeros(0, self.spec.top_k, dtype=torch.long)
        self.weights = torch.zeros(0, self.spec.top_k)

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.flatten(0, -2)
        self._route(flat)
        out = torch.zeros_like(flat, dtype=torch.float32)
        for index, expert in enumerate(self.experts):
            token, rank = ((self.chosen == index) & (self.weights > 0)).nonzero(as_tuple=True)
            gain = self.weights[token, rank, None]
            out = out.index_add(0, token, gain * expert(flat[token]).float())
        if self.spec.use_residual:
            share = self.coefficient(flat).softmax(dim=-1)
            out = out * share[:, :1] + self.residual(flat) * share[:, 1:]
        return out.view(hidden.shape)

    def _route(self, flat: Tensor) -> None:
        with torch.autocast(flat.device.type, enabled=False):
            self.probabilities = self.router(flat.float()).softmax(dim=-1)
        weights, chosen = self.probabilities.topk(self.spec.top_k, dim=-1)
        if self.capacity is not None:
            slots = self.capacity.slots(len(flat), len(self.experts), self.spec.top_k)
            weights = weights * _has_place(chosen, len(self.experts), slots)
        if self.spec.renormalize:
            smallest = torch.finfo(weights.dtype).eps
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=smallest)
        self.weights, self.chosen = weights, chosen.detach()


def _has_place(chosen: Tensor, experts: int, slots: int) -> Tensor:
    """Return the mask ``(tokens, top_k)`` of the choices that find a place: all first ones queue in
    the order of tokens, then all second ones behind them."""
    queue = chosen.T.flatten()
    number = F.one_hot(queue, experts).cumsum(dim=0).gather(1, queue[:, None])[:, 0]
    return (number <= slots).view(chosen.T.shape).T

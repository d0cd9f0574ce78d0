"""Where factors for a layer's inputs can go without another operator in the graph: into the norm or
the linear layer before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mobilevlm.checkpoint import Rescaling, Weights
from mobilevlm.export.quantize.blocks import Float32
from mobilevlm.spec import DecoderSpec, ModelSpec


@dataclass(frozen=True)
class Fold:
    """Linear layers that share an input, and what makes that input channel by channel."""

    consumers: tuple[str, ...]
    """Without ``.weight``, with their output sizes in ``out_sizes``."""
    producer: str
    """A norm or a linear layer, without ``.weight``."""
    in_size: int
    out_sizes: tuple[int, ...]
    heads: tuple[int, int] = (1, 1)
    """Where keys and values are shared: how many heads of them, and how many query heads read each.
    All of these must get the same factors."""

    def tie(self, values: Float32, choose: Callable[..., Any]) -> Float32:
        """Values ``(in_size,)``, made equal where they must be; ``choose``: np.max or np.mean."""
        kv_heads, readers = self.heads
        if readers == 1:
            return values
        grouped = values.reshape(kv_heads, readers, -1)
        chosen = choose(grouped, axis=1, keepdims=True)
        return np.broadcast_to(chosen, grouped.shape).reshape(-1).astype(np.float32)

    def at_producer(self, factors: Float32) -> Float32:
        """Tied factors ``(in_size,)``, one for each channel that the producer has."""
        kv_heads, readers = self.heads
        return factors.reshape(kv_heads, readers, -1)[:, 0].reshape(-1)


def find_folds(spec: ModelSpec) -> Iterator[Fold]:
    """All folds of a model, in the order of use. Not here: what reads an activation function or the
    tower's features, which nothing linear makes."""
    vision, decoder = spec.vision, spec.decoder
    size, wide = vision.hidden_size, vision.intermediate_size
    for index in range(vision.num_hidden_layers):
        name = f"vision.layers.{index}"
        yield Fold(_qkv(name), f"{name}.norm1", size, (size,) * 3)
        yield Fold((f"{name}.attn.out_proj",), f"{name}.attn.v_proj", size, (size,))
        yield Fold((f"{name}.mlp.fc1",), f"{name}.norm2", size, (wide,))
    size, wide = decoder.hidden_size, decoder.intermediate_size
    heads, kv_heads = decoder.num_attention_heads, decoder.num_key_value_heads
    queries, keys = heads * decoder.head_dim, kv_heads * decoder.head_dim
    shared = (kv_heads, heads // kv_heads)
    for index in range(decoder.num_hidden_layers):
        name = f"decoder.layers.{index}"
        qkv, sizes = _qkv(name), (queries, keys, keys)
        readers, reader_sizes = _mlp_readers(decoder, index)
        if decoder.parallel_residual:
            yield Fold((*qkv, *readers), f"{name}.input_norm", size, (*sizes, *reader_sizes))
        else:
            yield Fold(qkv, f"{name}.input_norm", size, sizes)
        yield Fold((f"{name}.attn.o_proj",), f"{name}.attn.v_proj", queries, (size,), shared)
        if not decoder.parallel_residual:
            yield Fold(readers, f"{name}.post_attention_norm", size, reader_sizes)
        if decoder.mlp == "gated":
            for mlp in decoder.mlp_names(index):
                yield Fold((f"{mlp}.down_proj",), f"{mlp}.up_proj", wide, (size,))
    yield Fold(("decoder.lm_head",), "decoder.norm", size, (decoder.vocab_size,))


def fold(weights: Weights, folds: Mapping[Fold, Float32]) -> Weights:
    """Weights with inputs multiplied by factors ``(in_size,)``, and what makes them divided: the
    same function in floats."""
    rows: dict[str, Float32] = {}
    columns: dict[str, Float32] = {}
    for place, factors in folds.items():
        for name in place.consumers:
            columns[f"{name}.weight"] = factors
        for name in (f"{place.producer}.weight", f"{place.producer}.bias"):
            if name in weights:
                rows[name] = np.float32(1) / place.at_producer(factors)
    return weights.rescaled(
        {name: Rescaling(rows.get(name), columns.get(name)) for name in {**rows, **columns}}
    )


def _mlp_readers(decoder: DecoderSpec, index: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """What reads the input of a layer's MLP or experts, and output sizes. The router comes first:
    unlike an expert it sees every token."""
    names, sizes = [], []
    if count := decoder.num_experts(index):
        names.append(f"decoder.layers.{index}.mlp.router")
        sizes.append(count)
        if decoder.experts is not None and decoder.experts.use_residual:
            names.append(f"decoder.layers.{index}.mlp.coefficient")
            sizes.append(2)
    readers, _ = decoder.mlp_linears
    linears = [f"{mlp}.{reader}" for mlp in decoder.mlp_names(index) for reader in readers]
    sizes += [decoder.intermediate_size] * len(linears)
    return (*names, *linears), tuple(sizes)


def _qkv(name: str) -> tuple[str, ...]:
    return tuple(f"{name}.attn.{part}_proj" for part in "qkv")

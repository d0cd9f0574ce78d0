"""Places for factors of a layer's inputs without another operator in the graph: into the norm,
the linear layer or the convolution of single channels before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mobilevlm.audio_encoder import WhisperEncoder
from mobilevlm.checkpoint import Rescaling, Weights
from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.export.quantize.blocks import Float32
from mobilevlm.image_encoder import ConvEncoder, NativeEncoder, TransformerEncoder
from mobilevlm.linear_groups import LinearGroup, delta_gates, linear_groups, mixer_groups
from mobilevlm.spec import ModelSpec


@dataclass(frozen=True)
class Fold:
    """Linear layers that share an input, and what makes that input channel by channel."""

    consumers: tuple[str, ...]
    """Without ``.weight``, with their output sizes in ``out_sizes``."""
    producer: str
    """A norm, a linear layer or a convolution of single channels, without ``.weight``."""
    in_size: int
    out_sizes: tuple[int, ...]
    heads: tuple[int, int] = (1, 1)
    """Number of heads of keys and values, and of query heads that read each of them. All of these
    must get the same factors."""

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
    """All folds of a model, in the order of use. Not here: what reads an activation function, a
    gated convolution or the tower's features, which nothing linear makes. Norms of queries and keys
    and of what a layer adds to the residual stream have no linear layer behind them."""
    encoded, decoder = spec.encoded, spec.decoder
    vision = None if encoded is None else encoded.encoder
    groups = {group.name: group for group in (*linear_groups(spec), *_routers(decoder))}

    def place(producer: str, *readers: str, heads: tuple[int, int] = (1, 1)) -> Fold:
        found = [groups[name] for name in readers]
        names = tuple(name for group in found for name in group.names)
        sizes = tuple(size for group in found for size in group.out_sizes)
        return Fold(names, producer, found[0].in_size, sizes, heads)

    if isinstance(vision, ConvEncoder):
        for stage, depth in enumerate(vision.depths):
            for name in (f"vision.stages.{stage}.blocks.{index}" for index in range(depth)):
                if stage in vision.attention_stages:
                    yield place(f"{name}.norm", f"{name}.attn.q_proj")
                    yield place(f"{name}.attn.v_proj", f"{name}.attn.out_proj")
                yield place(f"{name}.mlp.conv", f"{name}.mlp.fc1")
    layers = 0
    if isinstance(vision, (TransformerEncoder, NativeEncoder, WhisperEncoder)):
        layers = vision.num_hidden_layers
    is_gated = isinstance(vision, NativeEncoder) and vision.mlp == "gated"
    for name in (f"{spec.encoder_stage}.layers.{index}" for index in range(layers)):
        yield place(f"{name}.norm1", f"{name}.attn.q_proj")
        yield place(f"{name}.attn.v_proj", f"{name}.attn.out_proj")
        yield place(f"{name}.norm2", f"{name}.mlp.{'gate_proj' if is_gated else 'fc1'}")
        if is_gated:
            yield place(f"{name}.mlp.up_proj", f"{name}.mlp.down_proj")
    kv_heads = decoder.num_key_value_heads
    shared = (kv_heads, decoder.num_attention_heads // kv_heads)
    first, last = decoder.mlp_linears[0][0], decoder.mlp_linears[1]
    for index in range(decoder.num_hidden_layers):
        name = f"decoder.layers.{index}"
        # The router comes first: unlike an expert it sees every token.
        readers = _router_names(decoder, index)
        readers += [f"{mlp}.{first}" for mlp in decoder.mlp_names(index)]
        mixer = decoder.mixer(index)
        mixing = [next(mixer_groups(decoder, index, name)).name]
        if mixer == "delta":
            mixing.append(f"{name}.delta.b_proj")
        if decoder.sound_rank:
            mixing.append(f"{name}.attn.q_down")
        if decoder.parallel_residual:
            yield place(f"{name}.input_norm", *mixing, *readers)
        else:
            yield place(f"{name}.input_norm", *mixing)
        if mixer == "attn" and not decoder.sound_rank:  # values are made by two layers there
            yield place(f"{name}.attn.v_proj", f"{name}.attn.o_proj", heads=shared)
        if not decoder.parallel_residual:
            yield place(f"{name}.post_attention_norm", *readers)
        if decoder.mlp == "gated":
            for mlp in decoder.mlp_names(index):
                yield place(f"{mlp}.up_proj", f"{mlp}.{last}")
    yield place("decoder.norm", "decoder.lm_head")


def free_folds(spec: ModelSpec, *, rotated: bool) -> Iterator[Fold]:
    """All folds, or of a decoder whose stream is rotated those that the rotation leaves free: what
    it rotates has no channels of its own."""
    for place in find_folds(spec):
        if spec.draws and place.producer == "decoder.norm":
            continue  # the head for codes reads it too, in another file
        taken = place.producer.endswith(("norm", ".attn.v_proj"))
        if not (rotated and taken and place.producer.startswith("decoder.")):
            yield place


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
    return weights.changed(
        {name: Rescaling(rows.get(name), columns.get(name)) for name in {**rows, **columns}}
    )


def _routers(decoder: DecoderSpec) -> Iterator[LinearGroup]:
    """Yield the layers that read the input of a layer's experts and choose among them, or that of a
    gated delta layer and weigh its past. They stay float."""
    for index in range(decoder.num_hidden_layers):
        if decoder.mixer(index) == "delta":
            yield delta_gates(decoder, f"decoder.layers.{index}.delta")
        sizes = (decoder.num_experts(index), 2)
        for name, size in zip(_router_names(decoder, index), sizes, strict=False):
            yield LinearGroup((name,), decoder.hidden_size, (size,))


def _router_names(decoder: DecoderSpec, index: int) -> list[str]:
    """The router of a layer, and what weighs its experts against the dense MLP beside them."""
    mlp = f"decoder.layers.{index}.mlp"
    if decoder.experts is None or not decoder.num_experts(index):
        return []
    return [f"{mlp}.router", *([f"{mlp}.coefficient"] if decoder.experts.use_residual else [])]

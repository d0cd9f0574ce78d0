"""The linear layers of a model as its graphs hold them: those that read the same input are one
product, with one format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from mobilevlm.spec import DecoderSpec, ModelSpec, QFormerSpec


@dataclass(frozen=True)
class LinearGroup:
    """Layers that are stacked along the output."""

    names: tuple[str, ...]
    """Canonical names without ``.weight``"""
    in_size: int
    out_sizes: tuple[int, ...]

    @property
    def name(self) -> str:
        """Its first layer's, which stands for all."""
        return self.names[0]

    @property
    def out_size(self) -> int:
        return sum(self.out_sizes)

    @property
    def size(self) -> int:
        """Weights."""
        return self.in_size * self.out_size


def linear_groups(spec: ModelSpec) -> Iterator[LinearGroup]:
    """All linear layers that a recipe has a format for, in the order of use."""
    vision, projector, decoder = spec.image.encoder, spec.image.connector, spec.decoder
    size, wide = vision.hidden_size, vision.intermediate_size
    for index in range(vision.num_hidden_layers):
        attn, mlp = f"vision.layers.{index}.attn", f"vision.layers.{index}.mlp"
        yield LinearGroup(_qkv(attn), size, (size,) * 3)
        yield LinearGroup((f"{attn}.out_proj",), size, (size,))
        yield LinearGroup((f"{mlp}.fc1",), size, (wide,))
        yield LinearGroup((f"{mlp}.fc2",), wide, (size,))
    if projector.qformer is not None:
        yield from _qformer_groups(projector.qformer, vision.hidden_size)
    for index, (in_size, out_size) in enumerate(pairwise(projector.mlp_sizes)):
        yield LinearGroup((f"projector.mlp.{index}",), in_size, (out_size,))
    size, wide = decoder.hidden_size, decoder.intermediate_size
    queries = decoder.num_attention_heads * decoder.head_dim
    keys = decoder.num_key_value_heads * decoder.head_dim
    readers, maker = decoder.mlp_linears
    if decoder.encoder_layers:
        yield from _encoder_groups(decoder)
    for index in range(decoder.num_hidden_layers):
        attn, cross = f"decoder.layers.{index}.attn", f"decoder.layers.{index}.cross"
        yield LinearGroup(_qkv(attn), size, (queries, keys, keys))
        yield LinearGroup((f"{attn}.o_proj",), queries, (size,))
        if decoder.encoder_layers:
            yield LinearGroup((f"{cross}.query_proj",), size, (queries,))
            yield LinearGroup((f"{cross}.o_proj",), queries, (size,))
        for mlp in decoder.mlp_names(index):
            names = tuple(f"{mlp}.{reader}" for reader in readers)
            yield LinearGroup(names, size, (wide,) * len(names))
            yield LinearGroup((f"{mlp}.{maker}",), wide, (size,))
    yield LinearGroup(("decoder.lm_head",), size, (decoder.vocab_size,))


def _encoder_groups(spec: DecoderSpec) -> Iterator[LinearGroup]:
    """The encoder, and what makes keys and values of its output for each layer of the decoder."""
    size, wide, width = spec.hidden_size, spec.intermediate_size, spec.num_attention_heads
    width *= spec.head_dim
    readers, maker = spec.mlp_linears
    for index in range(spec.encoder_layers):
        name = f"decoder.encoder.layers.{index}"
        yield LinearGroup(_qkv(f"{name}.attn"), size, (width,) * 3)
        yield LinearGroup((f"{name}.attn.o_proj",), width, (size,))
        names = tuple(f"{name}.mlp.{reader}" for reader in readers)
        yield LinearGroup(names, size, (wide,) * len(names))
        yield LinearGroup((f"{name}.mlp.{maker}",), wide, (size,))
    for index in range(spec.num_hidden_layers):
        name = f"decoder.encoder.cross.{index}"
        yield LinearGroup((f"{name}.key_proj", f"{name}.value_proj"), size, (width,) * 2)


def _qformer_groups(spec: QFormerSpec, source_size: int) -> Iterator[LinearGroup]:
    size, wide = spec.hidden_size, spec.intermediate_size
    for index in range(spec.num_hidden_layers):
        name = f"projector.layers.{index}"
        yield LinearGroup(_qkv(f"{name}.attn"), size, (size,) * 3)
        yield LinearGroup((f"{name}.attn.out_proj",), size, (size,))
        if spec.has_text(index):
            yield LinearGroup((f"{name}.text_mlp.fc1",), size, (wide,))
            yield LinearGroup((f"{name}.text_mlp.fc2",), wide, (size,))
        if spec.has_cross_attention(index):
            pair = (f"{name}.cross.key_proj", f"{name}.cross.value_proj")
            yield LinearGroup(pair, source_size, (size,) * 2)
            yield LinearGroup((f"{name}.cross.query_proj",), size, (size,))
            yield LinearGroup((f"{name}.cross.out_proj",), size, (size,))
        yield LinearGroup((f"{name}.mlp.fc1",), size, (wide,))
        yield LinearGroup((f"{name}.mlp.fc2",), wide, (size,))


def _qkv(attn: str) -> tuple[str, ...]:
    return tuple(f"{attn}.{part}_proj" for part in "qkv")

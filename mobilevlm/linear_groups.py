"""Linear layers of a model: their names, shapes and biases, written here and nowhere else.

Layers that read the same input are one group: graphs hold them as one product, with one format.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.input_spec import (
    ConnectorSpec,
    ConvEncoder,
    Encoder,
    QFormerSpec,
    TransformerEncoder,
)
from mobilevlm.spec import ModelSpec


@dataclass(frozen=True)
class LinearGroup:
    """Layers that are stacked along the output."""

    names: tuple[str, ...]
    """Canonical names without ``.weight``"""
    in_size: int
    out_sizes: tuple[int, ...]
    biased: bool = False

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

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shape ``(out_size, in_size)`` of each layer's weight, by canonical name."""
        sizes = zip(self.names, self.out_sizes, strict=True)
        return {name: (out_size, self.in_size) for name, out_size in sizes}


def linear_groups(spec: ModelSpec) -> Iterator[LinearGroup]:
    """All linear layers that a recipe has a format for, in the order of use."""
    yield from tower_groups(spec.image.encoder)
    yield from projector_groups(spec.image.connector)
    yield from decoder_groups(spec.decoder)


def tower_groups(spec: Encoder) -> Iterator[LinearGroup]:
    """Yield the layers of an image encoder."""
    if isinstance(spec, ConvEncoder):
        yield _square("vision.stem.pointwise", spec.widths[0])
        for stage in range(len(spec.widths)):
            yield from stage_groups(spec, stage)
        yield from expansion_groups(spec)
        return
    for index in range(spec.num_hidden_layers):
        yield from tower_layer(spec, index)


def tower_layer(spec: TransformerEncoder, index: int) -> Iterator[LinearGroup]:
    """Yield the layers of one layer of an image encoder, attention first."""
    size, name = spec.hidden_size, f"vision.layers.{index}"
    yield LinearGroup(_qkv(f"{name}.attn"), size, (size,) * 3, True)
    yield LinearGroup((f"{name}.attn.out_proj",), size, (size,), True)
    yield from _plain_mlp(f"{name}.mlp", size, spec.intermediate_size)


def stage_groups(spec: ConvEncoder, stage: int) -> Iterator[LinearGroup]:
    """Yield the layers of one stage of a convolutional encoder, each used at all its positions."""
    size, name = spec.widths[stage], f"vision.stages.{stage}"
    if stage:
        yield _square(f"{name}.downsample.pointwise", size)
    for index in range(spec.depths[stage]):
        block = f"{name}.blocks.{index}"
        if stage in spec.attention_stages:
            yield LinearGroup(_qkv(f"{block}.attn"), size, (size,) * 3)
            yield _square(f"{block}.attn.out_proj", size)
        yield from _plain_mlp(f"{block}.mlp", size, spec.mlp_size(stage))


def expansion_groups(spec: ConvEncoder) -> Iterator[LinearGroup]:
    """Yield the layers of a convolutional encoder that see all positions as one."""
    wide, squeezed = spec.hidden_size, spec.squeeze_size
    yield LinearGroup(("vision.expansion.squeeze",), wide, (squeezed,), True)
    yield LinearGroup(("vision.expansion.excite",), squeezed, (wide,), True)


def projector_groups(spec: ConnectorSpec) -> Iterator[LinearGroup]:
    """Yield the layers of a projector: those of its Q-Former, then its MLP."""
    if spec.qformer is not None:
        yield from _qformer_groups(spec.qformer, spec.in_size)
    for index, (in_size, out_size) in enumerate(pairwise(spec.mlp_sizes)):
        yield LinearGroup((f"projector.mlp.{index}",), in_size, (out_size,), spec.bias)


def decoder_groups(spec: DecoderSpec) -> Iterator[LinearGroup]:
    """Yield the layers of a language model, the head last."""
    if spec.encoder_layers:
        yield from _encoder_groups(spec)
    size, queries = spec.hidden_size, spec.num_attention_heads * spec.head_dim
    for index in range(spec.num_hidden_layers):
        name = f"decoder.layers.{index}"
        if index in spec.conv_layers:
            yield from convolution_groups(spec, f"{name}.short_conv")
        else:
            yield from attention_groups(spec, f"{name}.attn")
        if spec.encoder_layers:
            yield LinearGroup((f"{name}.cross.query_proj",), size, (queries,), spec.qkv_bias)
            yield LinearGroup((f"{name}.cross.o_proj",), queries, (size,), spec.o_bias)
        for mlp in spec.mlp_names(index):
            yield from mlp_groups(spec, mlp)
    yield head_group(spec)


def attention_groups(spec: DecoderSpec, attn: str) -> Iterator[LinearGroup]:
    """Yield the layers of one self-attention of a decoder. ``attn``: its canonical name."""
    queries = spec.num_attention_heads * spec.head_dim
    keys = spec.num_key_value_heads * spec.head_dim
    yield LinearGroup(_qkv(attn), spec.hidden_size, (queries, keys, keys), spec.qkv_bias)
    yield LinearGroup((f"{attn}.o_proj",), queries, (spec.hidden_size,), spec.o_bias)


def convolution_groups(spec: DecoderSpec, name: str) -> Iterator[LinearGroup]:
    """Yield the layers around one short convolution of a decoder. ``name``: its canonical name."""
    size = spec.hidden_size
    yield LinearGroup((f"{name}.in_proj",), size, (3 * size,), spec.conv_bias)
    yield LinearGroup((f"{name}.out_proj",), size, (size,), spec.conv_bias)


def mlp_groups(spec: DecoderSpec, mlp: str) -> Iterator[LinearGroup]:
    """Yield the layers of one MLP of a decoder. ``mlp``: its canonical name."""
    size, wide = spec.hidden_size, spec.intermediate_size
    readers, maker = spec.mlp_linears
    names = tuple(f"{mlp}.{reader}" for reader in readers)
    yield LinearGroup(names, size, (wide,) * len(names), spec.mlp_bias)
    yield LinearGroup((f"{mlp}.{maker}",), wide, (size,), spec.mlp_bias)


def head_group(spec: DecoderSpec) -> LinearGroup:
    """Return the layer that makes logits, which may share its weight with the embeddings."""
    sizes = spec.hidden_size, (spec.vocab_size,)
    return LinearGroup(("decoder.lm_head",), *sizes, spec.lm_head_bias)


def _encoder_groups(spec: DecoderSpec) -> Iterator[LinearGroup]:
    """The encoder, and what makes keys and values of its output for each layer of the decoder."""
    for index in range(spec.encoder_layers):
        name = f"decoder.encoder.layers.{index}"
        yield from attention_groups(spec, f"{name}.attn")
        yield from mlp_groups(spec, f"{name}.mlp")
    width = spec.num_attention_heads * spec.head_dim
    for index in range(spec.num_hidden_layers):
        name = f"decoder.encoder.cross.{index}"
        names = f"{name}.key_proj", f"{name}.value_proj"
        yield LinearGroup(names, spec.hidden_size, (width,) * 2, spec.qkv_bias)


def _qformer_groups(spec: QFormerSpec, source_size: int) -> Iterator[LinearGroup]:
    size, wide = spec.hidden_size, spec.intermediate_size
    for index in range(spec.num_hidden_layers):
        name = f"projector.layers.{index}"
        yield LinearGroup(_qkv(f"{name}.attn"), size, (size,) * 3, True)
        yield LinearGroup((f"{name}.attn.out_proj",), size, (size,), True)
        if spec.has_text(index):
            yield from _plain_mlp(f"{name}.text_mlp", size, wide)
        if spec.has_cross_attention(index):
            pair = (f"{name}.cross.key_proj", f"{name}.cross.value_proj")
            yield LinearGroup(pair, source_size, (size,) * 2, True)
            yield LinearGroup((f"{name}.cross.query_proj",), size, (size,), True)
            yield LinearGroup((f"{name}.cross.out_proj",), size, (size,), True)
        yield from _plain_mlp(f"{name}.mlp", size, wide)


def _square(name: str, size: int) -> LinearGroup:
    return LinearGroup((name,), size, (size,), True)


def _plain_mlp(mlp: str, size: int, wide: int) -> Iterator[LinearGroup]:
    yield LinearGroup((f"{mlp}.fc1",), size, (wide,), True)
    yield LinearGroup((f"{mlp}.fc2",), wide, (size,), True)


def _qkv(attn: str) -> tuple[str, ...]:
    return tuple(f"{attn}.{part}_proj" for part in "qkv")

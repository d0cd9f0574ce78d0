"""Linear layers of a model: their names, shapes and biases, written here and nowhere else.

Layers that read the same input are one group: graphs hold them as one product, with one format.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from mobilevlm.audio_encoder import ConformerEncoder, WhisperEncoder
from mobilevlm.connector_spec import ConnectorSpec, QFormerSpec
from mobilevlm.decoder_spec import MLP_LINEARS, DecoderSpec
from mobilevlm.image_encoder import ConvEncoder, NativeEncoder, TransformerEncoder
from mobilevlm.input_spec import Encoder
from mobilevlm.output_spec import ImageOutput
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
    def layers(self) -> list[LinearGroup]:
        """Each layer by itself."""
        sizes = zip(self.names, self.out_sizes, strict=True)
        return [replace(self, names=(name,), out_sizes=(size,)) for name, size in sizes]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shape ``(out_size, in_size)`` of each layer's weight, by canonical name."""
        sizes = zip(self.names, self.out_sizes, strict=True)
        return {name: (out_size, self.in_size) for name, out_size in sizes}


def linear_groups(spec: ModelSpec) -> Iterator[LinearGroup]:
    """All linear layers that a recipe has a format for, in the order of use."""
    if spec.encoded is not None:
        yield from tower_groups(spec.encoded.encoder)
        yield from projector_groups(spec.encoded.connector)
    yield from decoder_groups(spec.decoder)


def tower_groups(spec: Encoder) -> Iterator[LinearGroup]:
    """Yield the layers of an encoder of images or sound."""
    if isinstance(spec, ConformerEncoder):
        yield from _conformer_groups(spec)
        return
    if isinstance(spec, ConvEncoder):
        yield _square("vision.stem.pointwise", spec.widths[0])
        for stage in range(len(spec.widths)):
            yield from stage_groups(spec, stage)
        yield from expansion_groups(spec)
        return
    for index in range(spec.num_hidden_layers):
        yield from tower_layer(spec, index)


def tower_layer(
    spec: TransformerEncoder | NativeEncoder | WhisperEncoder, index: int
) -> Iterator[LinearGroup]:
    """Yield the layers of one layer of an encoder, attention first."""
    part = "audio" if isinstance(spec, WhisperEncoder) else "vision"
    size, name, wide = spec.hidden_size, f"{part}.layers.{index}", spec.intermediate_size
    clipped = isinstance(spec, NativeEncoder) and spec.clipped
    linears = spec.mlp_linears if isinstance(spec, NativeEncoder) else MLP_LINEARS["plain"]
    biased = spec.bias if isinstance(spec, NativeEncoder) else True
    groups = [
        LinearGroup(_qkv(f"{name}.attn"), size, (size,) * 3, biased),
        LinearGroup((f"{name}.attn.out_proj",), size, (size,), biased),
        *_mlp(f"{name}.mlp", linears, size, wide, biased),
    ]
    for group in groups:  # layers with bounds of their own have inputs of their own
        yield from group.layers if clipped else [group]


def _conformer_groups(spec: ConformerEncoder) -> Iterator[LinearGroup]:
    size, wide = spec.hidden_size, spec.num_attention_heads * spec.head_dim
    yield LinearGroup(("audio.input",), spec.bins, (size,), True)
    for index in range(spec.num_hidden_layers):
        name = f"audio.layers.{index}"
        yield from _plain_mlp(f"{name}.ff1", size, spec.intermediate_size)
        yield LinearGroup(_qkv(f"{name}.attn"), size, (wide,) * 3)
        yield LinearGroup((f"{name}.attn.out_proj",), wide, (size,), True)
        yield LinearGroup((f"{name}.conv.up",), size, (2 * spec.conv_size,), True)
        yield LinearGroup((f"{name}.conv.down",), spec.conv_size, (size,), True)
        yield from _plain_mlp(f"{name}.ff2", size, spec.intermediate_size)
        if index == spec.guess_layer:
            yield LinearGroup(("audio.guess.head",), size, (spec.guesses,), True)
            yield LinearGroup(("audio.guess.back",), spec.guesses, (size,), True)


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
    """Yield the layers of a projector: those of its Q-Former, its further mergers, its MLP."""
    if spec.qformer is not None:
        yield from _qformer_groups(spec.qformer, spec.in_size)
    for name in (*(f"projector.deep.{index}" for index in range(spec.deep)), "projector"):
        for index, (in_size, out_size) in enumerate(pairwise(spec.mlp_sizes)):
            yield LinearGroup((f"{name}.mlp.{index}",), in_size, (out_size,), spec.bias)


def decoder_groups(spec: DecoderSpec) -> Iterator[LinearGroup]:
    """Yield the layers of a language model, the head last."""
    if spec.encoder_layers:
        yield from _encoder_groups(spec)
    size, queries = spec.hidden_size, spec.num_attention_heads * spec.head_dim
    if spec.layer_input_size:
        yield layer_inputs_group(spec)
    for index in range(spec.num_hidden_layers):
        name = f"decoder.layers.{index}"
        yield from mixer_groups(spec, index, name)
        if spec.sound_rank:
            yield from sound_groups(spec, f"{name}.attn")
        if spec.encoder_layers:
            yield LinearGroup((f"{name}.cross.query_proj",), size, (queries,), spec.qkv_bias)
            yield LinearGroup((f"{name}.cross.o_proj",), queries, (size,), spec.o_bias)
        for mlp in spec.mlp_names(index):
            yield from mlp_groups(spec.at(index), mlp)
        if spec.layer_input_size:
            yield from layer_input_groups(spec, f"{name}.layer_input")
    yield head_group(spec)


def mixer_groups(spec: DecoderSpec, index: int, layer: str) -> Iterator[LinearGroup]:
    """Yield the layers of what mixes positions in a decoder layer. ``layer``: its name."""
    mixer = spec.mixer(index)
    if mixer == "attn":
        reads = spec.kv_layer(index) != index
        yield from attention_groups(spec.at(index), f"{layer}.attn", reads)
        return
    groups = {"short_conv": convolution_groups, "delta": delta_groups}
    yield from groups[mixer](spec, f"{layer}.{mixer}")


def attention_groups(spec: DecoderSpec, attn: str, reads: bool = False) -> Iterator[LinearGroup]:
    """Yield the layers of one self-attention of a decoder. ``attn``: its canonical name;
    ``reads``: its keys and values are those of another layer."""
    queries = spec.num_attention_heads * spec.head_dim
    keys = spec.num_key_value_heads * spec.head_dim
    asked = queries * (1 + spec.attention_gate)
    whole = LinearGroup(_qkv(attn), spec.hidden_size, (asked, keys, keys), spec.qkv_bias)
    yield whole.layers[0] if reads else whole
    yield LinearGroup((f"{attn}.o_proj",), queries, (spec.hidden_size,), spec.o_bias)


def sound_groups(spec: DecoderSpec, attn: str) -> Iterator[LinearGroup]:
    """Yield the layers of one self-attention of a decoder that act where a prompt has sound."""
    rank, heads = spec.sound_rank, (spec.num_attention_heads, spec.num_key_value_heads)
    yield LinearGroup((f"{attn}.q_down", f"{attn}.v_down"), spec.hidden_size, (rank, rank))
    for part, count in zip("qv", heads, strict=True):
        yield LinearGroup((f"{attn}.{part}_up",), rank, (count * spec.head_dim,))


def convolution_groups(spec: DecoderSpec, name: str) -> Iterator[LinearGroup]:
    """Yield the layers around one short convolution of a decoder. ``name``: its canonical name."""
    size = spec.hidden_size
    yield LinearGroup((f"{name}.in_proj",), size, (3 * size,), spec.conv_bias)
    yield LinearGroup((f"{name}.out_proj",), size, (size,), spec.conv_bias)


def delta_groups(spec: DecoderSpec, name: str) -> Iterator[LinearGroup]:
    """Yield the layers of a gated delta layer that a recipe has a format for. ``name``: its
    canonical name."""
    delta = spec.delta
    assert delta is not None
    sizes = (delta.mixed_size, delta.value_size)
    yield LinearGroup((f"{name}.qkv_proj", f"{name}.z_proj"), spec.hidden_size, sizes)
    yield LinearGroup((f"{name}.out_proj",), delta.value_size, (spec.hidden_size,))


def delta_gates(spec: DecoderSpec, name: str) -> LinearGroup:
    """Return the layers that tell how much a gated delta layer takes in and how much it keeps,
    which stay float in every recipe."""
    assert spec.delta is not None
    heads = (spec.delta.value_heads,) * 2
    return LinearGroup((f"{name}.b_proj", f"{name}.a_proj"), spec.hidden_size, heads)


def mlp_groups(spec: DecoderSpec, mlp: str) -> Iterator[LinearGroup]:
    """Yield the layers of one MLP of a decoder. ``mlp``: its canonical name."""
    sizes = spec.hidden_size, spec.intermediate_size
    yield from _mlp(mlp, spec.mlp_linears, *sizes, spec.mlp_bias)


def layer_inputs_group(spec: DecoderSpec) -> LinearGroup:
    """Return the layer that makes a part of all layers' own inputs of the embeddings."""
    return LinearGroup(("decoder.layer_inputs.proj",), spec.hidden_size, (spec.layer_input_width,))


def layer_input_groups(spec: DecoderSpec, name: str) -> Iterator[LinearGroup]:
    """Yield the layers around the own input of a decoder layer. ``name``: their module's."""
    size, inner = spec.hidden_size, spec.layer_input_size
    yield LinearGroup((f"{name}.gate",), size, (inner,))
    yield LinearGroup((f"{name}.proj",), inner, (size,))


def head_group(spec: DecoderSpec) -> LinearGroup:
    """Return the layer that makes logits, which may share its weight with the embeddings."""
    sizes = spec.hidden_size, (spec.vocab_size,)
    return LinearGroup(("decoder.lm_head",), *sizes, spec.lm_head_bias)


def output_groups(spec: ImageOutput, hidden_size: int) -> Iterator[LinearGroup]:
    """Yield the layers of the head for codes and of their embedding, which follow the format of the
    projector, without calibration. Not among :func:`linear_groups`, whose layers samples pass."""
    head = [hidden_size, spec.head_size, spec.num_codes]
    embedding = [spec.code_size, *[hidden_size] * spec.embed_depth]
    for name, sizes in (("image_head", head), ("codes", embedding)):
        for index, (in_size, out_size) in enumerate(pairwise(sizes)):
            yield LinearGroup((f"{name}.mlp.{index}",), in_size, (out_size,), True)


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
    yield from _mlp(mlp, MLP_LINEARS["plain"], size, wide, True)


def _mlp(
    mlp: str, linears: tuple[tuple[str, ...], str], size: int, wide: int, biased: bool
) -> Iterator[LinearGroup]:
    """Yield the layers that read an MLP's input as one group, and the one that makes its output."""
    readers, maker = linears
    names = tuple(f"{mlp}.{reader}" for reader in readers)
    yield LinearGroup(names, size, (wide,) * len(names), biased)
    yield LinearGroup((f"{mlp}.{maker}",), wide, (size,), biased)


def _qkv(attn: str) -> tuple[str, ...]:
    return tuple(f"{attn}.{part}_proj" for part in "qkv")

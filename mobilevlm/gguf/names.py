"""Our tensors and llama.cpp's: names, shapes and order, in both directions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.gguf.architectures import gguf_architecture, has_neighbouring_pairs
from mobilevlm.input_spec import ConnectorSpec, TransformerEncoder
from mobilevlm.linear_groups import (
    LinearGroup,
    attention_groups,
    head_group,
    mlp_groups,
    projector_groups,
    tower_layer,
)


@dataclass(frozen=True)
class Entry:
    """One tensor in both worlds."""

    theirs: str
    ours: str
    shape: tuple[int, ...]
    """Ours."""
    stored: tuple[int, ...]
    """Theirs, rows first."""
    store: Literal["matrix", "convolution", "depthwise", "float"]
    """``matrix``: in the type of the file; ``convolution``: float16, or float32 in such a file;
    ``depthwise``: float16 always, since llama.cpp has no other kernel; ``float``: float32."""
    heads: int = 0
    """Heads whose rotary pairs llama.cpp wants side by side; 0: rows stay where they are."""
    stack: int = 0
    """Ours are so many, numbered where ``{}`` stands; theirs is all of them; 0: one and one."""
    first_last: bool = False
    """Our first row is their last one."""

    @property
    def parts(self) -> list[str]:
        """Our names of what theirs holds."""
        return [self.ours.format(index) for index in range(self.stack)] or [self.ours]

    def fits(self, found: tuple[int, ...]) -> bool:
        """Whether a file's shape is the stored one; it may write or omit dimensions of one."""
        return [size for size in found if size > 1] == [size for size in self.stored if size > 1]


_LINEARS = {
    **{f"{part}_proj": f"attn_{part}" for part in "qkv"},
    "out_proj": "attn_out",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "fc1": "ffn_up",
    "fc2": "ffn_down",
}
"""llama.cpp's names of linear layers, by the last part of ours."""


def decoder_entries(spec: DecoderSpec) -> Iterator[Entry]:
    """All tensors of a decoder in the order of the file."""
    turned = {}
    if has_neighbouring_pairs(gguf_architecture(spec)):
        turned = {"q_proj": spec.num_attention_heads, "k_proj": spec.num_key_value_heads}
    yield _entry("token_embd", "decoder.embed_tokens", spec.vocab_size, spec.hidden_size)
    for index in range(spec.num_hidden_layers):
        ours, theirs = f"decoder.layers.{index}", f"blk.{index}"
        yield from _norm(spec, f"{theirs}.attn_norm", f"{ours}.input_norm")
        for group in attention_groups(spec, f"{ours}.attn"):
            yield from _linears(group, theirs, turned=turned)
        for part in "qk" if spec.qk_norm else "":
            yield _entry(f"{theirs}.attn_{part}_norm", f"{ours}.attn.{part}_norm", spec.head_dim)
        if spec.post_norms:
            yield from _norm(spec, f"{theirs}.post_attention_norm", f"{ours}.attn_output_norm")
        if not spec.parallel_residual:
            yield from _norm(spec, f"{theirs}.ffn_norm", f"{ours}.post_attention_norm")
        yield from _mlp_entries(spec, index)
        if spec.post_norms:
            yield from _norm(spec, f"{theirs}.post_ffw_norm", f"{ours}.mlp_output_norm")
    yield from _norm(spec, "output_norm", "decoder.norm")
    if not spec.tie_word_embeddings:  # llama.cpp takes the embeddings where there is no output
        head = head_group(spec)
        yield from _linear("output", head.name, *head.shapes[head.name], head.biased)


def _mlp_entries(spec: DecoderSpec, index: int) -> Iterator[Entry]:
    """A layer's MLP, or its router and experts, which lie one behind the other in one tensor, and
    the dense MLP beside them, which is named as llama.cpp names experts that all tokens share."""
    ours, block, count = f"decoder.layers.{index}.mlp", f"blk.{index}", spec.num_experts(index)
    if not count:
        for group in mlp_groups(spec, ours):
            yield from _linears(group, block)
        return
    shape = (count, spec.hidden_size)
    yield Entry(f"{block}.ffn_gate_inp.weight", f"{ours}.router.weight", shape, shape, "float")
    for group in mlp_groups(spec, f"{ours}.experts.{{}}"):
        yield from _linears(group, block, "_exps", count)
    if spec.experts is not None and spec.experts.use_residual:
        name, shape = f"{ours}.coefficient", (2, spec.hidden_size)
        weight, bias = (f"{block}.ffn_gate_inp_shexp.{part}" for part in ("weight", "bias"))
        yield Entry(weight, f"{name}.weight", shape, shape, "float")
        yield Entry(bias, f"{name}.bias", (2,), (2,), "float")
        for group in mlp_groups(spec, f"{ours}.residual"):
            yield from _linears(group, block, "_shexp")


def _linears(
    group: LinearGroup,
    block: str,
    ending: str = "",
    stack: int = 0,
    turned: Mapping[str, int] = {},
    names: Mapping[str, str] = _LINEARS,
) -> Iterator[Entry]:
    """The layers of a group one by one. ``turned``: heads whose rotary pairs llama.cpp wants side
    by side, by the last part of the layer's name."""
    for ours, shape in group.shapes.items():
        part = ours.rpartition(".")[2]
        theirs = f"{block}.{names[part]}{ending}"
        yield from _linear(theirs, ours, *shape, group.biased, turned.get(part, 0), stack)


NEWLINE = "v.image_newline"
"""Tensor of the row behind the visual tokens of a tile."""


def projector_name(spec: ConnectorSpec) -> str:
    """Return llama.cpp's name of a projector."""
    if spec.kind == "mlp_downsample":
        return "internvl" if spec.norm else "idefics3"
    return spec.kind


def tower_entries(
    spec: TransformerEncoder, swapped: bool = False, class_last: bool = False
) -> Iterator[Entry]:
    """All tensors of the tower. ``swapped``: the two layers of an MLP are named the other way
    round, as llama.cpp's first converter did; ``class_last``: the class token's position is the
    last, as llama.cpp's graph of InternViT, which puts that token last, adds them."""
    mlp_names = {"fc1": "ffn_down", "fc2": "ffn_up"} if swapped else _LINEARS
    hidden, patch = spec.hidden_size, spec.patch_size
    token, kernel, places = (hidden,), (hidden, 3, patch, patch), (spec.num_positions, hidden)
    if spec.class_token:
        yield Entry("v.class_embd", "vision.class_embedding", token, token, "float")
    patches = "v.patch_embd", "vision.patch_embedding"
    yield Entry(f"{patches[0]}.weight", f"{patches[1]}.weight", kernel, kernel, "convolution")
    if spec.patch_bias:
        yield Entry(f"{patches[0]}.bias", f"{patches[1]}.bias", token, token, "float")
    positions = "v.position_embd.weight", "vision.position_embedding.weight"
    yield Entry(*positions, places, places, "float", first_last=class_last)
    if spec.pre_norm:
        yield from _pair("v.pre_ln", "vision.pre_norm", hidden)
    for index in range(spec.num_hidden_layers):
        ours, theirs = f"vision.layers.{index}", f"v.blk.{index}"
        yield from _pair(f"{theirs}.ln1", f"{ours}.norm1", hidden)
        query, output, *mlp = tower_layer(spec, index)
        for group in (query, output):
            yield from _linears(group, theirs)
        yield from _pair(f"{theirs}.ln2", f"{ours}.norm2", hidden)
        for group in mlp:
            yield from _linears(group, theirs, names=mlp_names)
    if spec.post_norm:
        yield from _pair("v.post_ln", "vision.post_norm", hidden)


def scale_entries(spec: TransformerEncoder) -> Iterator[Entry]:
    """Factors of what attention and MLP add to the residual stream (InternViT's layer scale), for
    each channel. Our weights have them in the linear layer before them, which ours is named by."""
    shape = (spec.hidden_size,)
    for index in range(spec.num_hidden_layers):
        for number, part in enumerate(("attn.out_proj", "mlp.fc2"), 1):
            theirs, ours = f"v.blk.{index}.ls{number}.weight", f"vision.layers.{index}.{part}.scale"
            yield Entry(theirs, ours, shape, shape, "float")


def projector_entries(spec: ConnectorSpec) -> Iterator[Entry]:
    """All tensors of a projector that begins with an MLP of two layers, or is one Linear after a
    pixel shuffle."""
    size = spec.out_size
    if projector_name(spec) == "idefics3":
        for group in projector_groups(spec):
            yield from _linear("mm.model.fc", group.name, *group.shapes[group.name], group.biased)
        return
    names = {
        "mlp": ("mm.0", "mm.2"),
        "ldp": ("mm.model.mlp.1", "mm.model.mlp.3"),
        "ldpv2": ("mm.model.mlp.0", "mm.model.mlp.2"),
        "mlp_downsample": ("mm.model.mlp.1", "mm.model.mlp.3"),
    }[spec.kind]
    if spec.kind == "mlp_downsample" and spec.norm:
        yield from _pair("mm.model.mlp.0", "projector.norm", spec.mlp_sizes[0])
    for group, theirs in zip(projector_groups(spec), names, strict=True):
        yield from _linear(theirs, group.name, *group.shapes[group.name], group.biased)
    if spec.newline:
        yield Entry(NEWLINE, "projector.newline", (size,), (size,), "float")
    if spec.kind == "ldp":
        for block in (0, 1):
            yield from _inverted_residual(spec, block)
    if spec.kind == "ldpv2":
        yield _depthwise("mm.model.peg.0.weight", "projector.peg.weight", size)
        yield Entry("mm.model.peg.0.bias", "projector.peg.bias", (size,), (size,), "float")


def _inverted_residual(spec: ConnectorSpec, block: int) -> Iterator[Entry]:
    size, squeezed = spec.out_size, spec.squeeze_size
    ours, theirs = f"projector.blocks.{block}", f"mm.model.mb_block.{block + 1}.block"
    yield _depthwise(f"{theirs}.0.0.weight", f"{ours}.depthwise.weight", size)
    yield from _pair(f"{theirs}.0.1", f"{ours}.norm1", size)
    for their, our, out_size, in_size in (
        ("1.fc1", "squeeze", squeezed, size),
        ("1.fc2", "excite", size, squeezed),
    ):
        yield _pointwise(f"{theirs}.{their}.weight", f"{ours}.{our}.weight", out_size, in_size)
        bias = (out_size,)
        yield Entry(f"{theirs}.{their}.bias", f"{ours}.{our}.bias", bias, bias, "float")
    yield _pointwise(f"{theirs}.2.0.weight", f"{ours}.pointwise.weight", size, size)
    yield from _pair(f"{theirs}.2.1", f"{ours}.norm2", size)


def _entry(theirs: str, ours: str, *shape: int) -> Entry:
    store: Literal["matrix", "float"] = "matrix" if len(shape) == 2 else "float"
    return Entry(f"{theirs}.weight", f"{ours}.weight", shape, shape, store)


def _norm(spec: DecoderSpec, theirs: str, ours: str) -> Iterator[Entry]:
    if spec.norm == "layer":
        yield from _pair(theirs, ours, spec.hidden_size)
    else:
        yield _entry(theirs, ours, spec.hidden_size)


def _linear(
    theirs: str,
    ours: str,
    out_size: int,
    in_size: int,
    biased: bool,
    heads: int = 0,
    stack: int = 0,
) -> Iterator[Entry]:
    """A linear layer of a decoder, or a stack of them."""
    shape, outer = (out_size, in_size), (stack,) if stack else ()
    weight = f"{ours}.weight"
    yield Entry(f"{theirs}.weight", weight, shape, outer + shape, "matrix", heads, stack)
    if biased:
        bias = shape[:1]
        yield Entry(f"{theirs}.bias", f"{ours}.bias", bias, outer + bias, "float", stack=stack)


def _pair(theirs: str, ours: str, *shape: int) -> Iterator[Entry]:
    """Weight and bias of a linear layer or a norm."""
    yield _entry(theirs, ours, *shape)
    yield Entry(f"{theirs}.bias", f"{ours}.bias", shape[:1], shape[:1], "float")


def _pointwise(theirs: str, ours: str, out_size: int, in_size: int) -> Entry:
    return Entry(theirs, ours, (out_size, in_size, 1, 1), (out_size, in_size), "convolution")


def _depthwise(theirs: str, ours: str, size: int) -> Entry:
    return Entry(theirs, ours, (size, 1, 3, 3), (size, 3, 3), "depthwise")

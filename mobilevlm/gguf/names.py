"""Our tensors and llama.cpp's: names, shapes and order, in both directions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from mobilevlm.connector_spec import ConnectorSpec
from mobilevlm.decoder_spec import DecoderSpec, DeltaSpec
from mobilevlm.gguf.architectures import gguf_architecture, has_neighbouring_pairs
from mobilevlm.image_encoder import NativeEncoder, TransformerEncoder
from mobilevlm.linear_groups import (
    LinearGroup,
    attention_groups,
    convolution_groups,
    head_group,
    mlp_groups,
    projector_groups,
    tower_layer,
)


class Groups(NamedTuple):
    """Heads in groups, one group behind the other in ours; in theirs the first of each group come
    first, then the second ones."""

    axis: int
    begin: int
    """Row or column of the first"""
    groups: int
    members: int


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
    labels: tuple[str, ...] = ()
    """Words in the place of the numbers of a stack, whose rows theirs holds one behind the
    other."""
    transposed: bool = False
    """Their rows are our columns."""
    groups: Groups | None = None
    """Heads of ours that theirs has in another order."""
    negative_exponent: bool = False
    """Theirs is ``-exp(ours)``."""
    frame: int | None = None
    """Theirs is one frame of ours ``(hidden_size, 3, frames, patch, patch)``."""

    @property
    def parts(self) -> list[str]:
        """Our names of what theirs holds."""
        return [self.ours.format(part) for part in self.labels or range(self.stack)] or [self.ours]

    def fits(self, found: tuple[int, ...]) -> bool:
        """Return whether a file's shape is the stored one; dimensions of 1 may be written or
        omitted."""
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
        has_attention = spec.mixer(index) == "attn"
        if spec.mixer(index) == "short_conv":
            yield from _convolution(spec, f"{theirs}.shortconv", f"{ours}.short_conv")
        if spec.mixer(index) == "delta" and spec.delta is not None:
            yield from _delta(spec, spec.delta, theirs, f"{ours}.delta")
        for group in attention_groups(spec, f"{ours}.attn") if has_attention else ():
            yield from _linears(group, theirs, turned=turned)
        for part in "qk" if spec.qk_norm and has_attention else "":
            yield _entry(f"{theirs}.attn_{part}_norm", f"{ours}.attn.{part}_norm", spec.head_dim)
        if spec.post_norms:
            yield from _norm(spec, f"{theirs}.post_attention_norm", f"{ours}.attn_output_norm")
        if not spec.parallel_residual:
            norm = "ffn_norm" if spec.delta is None else "post_attention_norm"
            yield from _norm(spec, f"{theirs}.{norm}", f"{ours}.post_attention_norm")
        yield from _mlp_entries(spec, index)
        if spec.post_norms:
            yield from _norm(spec, f"{theirs}.post_ffw_norm", f"{ours}.mlp_output_norm")
    last = "token_embd_norm" if spec.conv_layers else "output_norm"  # as LFM2's is called
    yield from _norm(spec, last, "decoder.norm")
    if not spec.tie_word_embeddings:  # llama.cpp takes the embeddings where there is no output
        head = head_group(spec)
        yield from _linear("output", head.name, *head.shapes[head.name], head.biased)


def _convolution(spec: DecoderSpec, theirs: str, ours: str) -> Iterator[Entry]:
    """A short convolution and the products around it."""
    for group in convolution_groups(spec, ours):
        for name, shape in group.shapes.items():
            yield _entry(f"{theirs}.{name.rpartition('.')[2]}", name, *shape)
    size, kernel = spec.hidden_size, spec.conv_kernel
    conv = f"{ours}.conv.weight"
    yield Entry(f"{theirs}.conv.weight", conv, (size, 1, kernel), (size, kernel), "float")


def _delta(spec: DecoderSpec, delta: DeltaSpec, theirs: str, ours: str) -> Iterator[Entry]:
    """A gated delta layer."""
    size, heads, kernel = spec.hidden_size, delta.value_heads, delta.kernel
    members = heads // delta.key_heads
    counts = (delta.key_heads, members)
    rows, values, columns = (
        Groups(*start, *counts) for start in ((0, 0), (0, 2 * delta.key_size), (1, 0))
    )
    shapes = {
        "attn_qkv.weight": ("qkv_proj", (delta.mixed_size, size), values),
        "attn_gate.weight": ("z_proj", (delta.value_size, size), rows),
        "ssm_conv1d.weight": ("conv", (delta.mixed_size, 1, kernel), values),
        "ssm_dt.bias": ("time_bias", (heads,), rows),
        "ssm_a": ("decay_log", (heads,), rows),
        "ssm_beta.weight": ("b_proj", (heads, size), rows),
        "ssm_alpha.weight": ("a_proj", (heads, size), rows),
        "ssm_norm.weight": ("norm", (delta.value_dim,), None),
        "ssm_out.weight": ("out_proj", (size, delta.value_size), columns),
    }
    for their, (our, shape, groups) in shapes.items():
        store: Literal["matrix", "float"] = "matrix" if len(shape) == 2 else "float"
        stored = (shape[0], kernel) if our == "conv" else shape
        yield Entry(
            f"{theirs}.{their}", f"{ours}.{our}.weight", shape, stored, store,
            groups=groups if members > 1 else None, negative_exponent=our == "decay_log",
        )  # fmt: skip


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


_QKV = ("q", "k", "v")
NEWLINE = "v.image_newline"
"""Tensor of the row behind the visual tokens of a tile."""


def projector_name(spec: ConnectorSpec) -> str:
    """Return llama.cpp's name of a projector."""
    if spec.kind == "mlp_downsample":
        if spec.inner_size:
            return "lfm2"
        return "internvl" if spec.norm else "idefics3"
    return "gemma3" if spec.pool_norm_eps is not None else spec.kind


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
    pixel shuffle or an averaging."""
    size, kind = spec.out_size, projector_name(spec)
    if kind == "gemma3":
        yield _entry("mm.soft_emb_norm", "projector.norm", spec.in_size)
        theirs, shape = "mm.input_projection.weight", (size, spec.in_size)
        ours = "projector.mlp.0.weight"
        yield Entry(theirs, ours, shape, shape[::-1], "convolution", transposed=True)
        return
    if kind == "lfm2":
        if spec.norm:
            yield from _pair("mm.input_norm", "projector.norm", spec.mlp_sizes[0])
        for group, theirs in zip(projector_groups(spec), ("mm.1", "mm.2"), strict=True):
            yield from _linear(theirs, group.name, *group.shapes[group.name], group.biased)
        return
    if kind == "idefics3":
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


def native_entries(spec: NativeEncoder, connector: ConnectorSpec) -> Iterator[Entry]:
    """All tensors of a tower on images of any size, and of its mergers (Qwen2-VL, 2.5-VL, 3-VL)."""
    hidden, patch, ours = spec.hidden_size, spec.patch_size, "vision.patch_embedding"
    kernel, frame = (hidden, 3, spec.frames, patch, patch), (hidden, 3, patch, patch)
    for index in range(spec.frames):
        theirs = "v.patch_embd.weight" + f".{index}" * (index > 0)
        yield Entry(theirs, f"{ours}.weight", kernel, frame, "convolution", frame=index)
    if spec.patch_bias:
        yield Entry("v.patch_embd.bias", f"{ours}.bias", (hidden,), (hidden,), "float")
    if spec.position_grid:
        names = "v.position_embd.weight", "vision.position_embedding.weight"
        table = spec.position_grid**2, hidden
        yield Entry(*names, table, table, "float")
    for index in range(spec.num_hidden_layers):
        name, theirs = f"vision.layers.{index}", f"v.blk.{index}"
        yield from _native_norm(spec.norm, f"{theirs}.ln1", f"{name}.norm1", hidden)
        query, *others = tower_layer(spec, index)
        if spec.position_grid:  # Qwen3-VL's graph has them in one
            joined, parts = f"{theirs}.attn_qkv", f"{name}.attn.{{}}_proj"
            one, all_three = (hidden, hidden), (3 * hidden, hidden)
            weight, bias = ((f"{joined}.{part}", f"{parts}.{part}") for part in ("weight", "bias"))
            yield Entry(*weight, one, all_three, "matrix", stack=3, labels=_QKV)
            yield Entry(*bias, one[:1], all_three[:1], "float", stack=3, labels=_QKV)
        else:
            yield from _linears(query, theirs)
        yield from _native_norm(spec.norm, f"{theirs}.ln2", f"{name}.norm2", hidden)
        for group in others:
            yield from _linears(group, theirs)
    yield from _native_norm(spec.norm, "v.post_ln", "projector.norm", hidden)
    deep = {f"projector.deep.{index}": layer for index, layer in enumerate(spec.deep_layers)}
    for name, layer in deep.items():
        yield from _pair(f"v.deepstack.{layer}.norm", f"{name}.norm", hidden * spec.square)
    for group in projector_groups(connector):
        merger, _, number = group.name.partition(".mlp.")
        theirs = f"mm.{2 * int(number)}"
        if merger in deep:
            theirs = f"v.deepstack.{deep[merger]}.fc{int(number) + 1}"
        yield from _linear(theirs, group.name, *group.shapes[group.name], group.biased)


def _native_norm(kind: str, theirs: str, ours: str, size: int) -> Iterator[Entry]:
    if kind == "layer":
        yield from _pair(theirs, ours, size)
    else:
        yield _entry(theirs, ours, size)


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

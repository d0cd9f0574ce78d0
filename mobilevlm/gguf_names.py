"""Our tensors and llama.cpp's: names, shapes and order, in both directions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mobilevlm.errors import MobileVLMError
from mobilevlm.spec import DecoderSpec, ProjectorSpec, VisionSpec


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

    def fits(self, found: tuple[int, ...]) -> bool:
        """Whether a file's shape is the stored one; it may write or omit dimensions of one."""
        return [size for size in found if size > 1] == [size for size in self.stored if size > 1]


def check_decoder(spec: DecoderSpec) -> None:
    """Refuses decoders that are no plain Llama: no other architecture is written yet.

    Raises:
        MobileVLMError: says which property.
    """
    obstacles = {
        "sparse experts": spec.experts is not None,
        "layer norms": spec.norm != "rms",
        "partial rotary embeddings": spec.rotary_channels != spec.head_dim,
        "a parallel residual": spec.parallel_residual,
        "an MLP without gate": spec.mlp != "gated" or spec.hidden_act != "silu",
        "biases": spec.qkv_bias or spec.o_bias or spec.mlp_bias or spec.lm_head_bias,
    }
    found = [name for name, is_there in obstacles.items() if is_there]
    if found:
        raise MobileVLMError(
            f"this decoder has {' and '.join(found)}, which the GGUF writer does not know: use "
            f"--format onnx"
        )


def decoder_entries(spec: DecoderSpec) -> Iterator[Entry]:
    """All tensors of a decoder in the order of the file."""
    hidden, wide = spec.hidden_size, spec.intermediate_size
    heads, shared = spec.num_attention_heads, spec.num_key_value_heads
    query, key = heads * spec.head_dim, shared * spec.head_dim
    yield _entry("token_embd", "decoder.embed_tokens", spec.vocab_size, hidden)
    for index in range(spec.num_hidden_layers):
        ours, theirs = f"decoder.layers.{index}", f"blk.{index}"
        yield _entry(f"{theirs}.attn_norm", f"{ours}.input_norm", hidden)
        yield _entry(f"{theirs}.attn_q", f"{ours}.attn.q_proj", query, hidden, heads=heads)
        yield _entry(f"{theirs}.attn_k", f"{ours}.attn.k_proj", key, hidden, heads=shared)
        yield _entry(f"{theirs}.attn_v", f"{ours}.attn.v_proj", key, hidden)
        yield _entry(f"{theirs}.attn_output", f"{ours}.attn.o_proj", hidden, query)
        yield _entry(f"{theirs}.ffn_norm", f"{ours}.post_attention_norm", hidden)
        yield _entry(f"{theirs}.ffn_gate", f"{ours}.mlp.gate_proj", wide, hidden)
        yield _entry(f"{theirs}.ffn_up", f"{ours}.mlp.up_proj", wide, hidden)
        yield _entry(f"{theirs}.ffn_down", f"{ours}.mlp.down_proj", hidden, wide)
    yield _entry("output_norm", "decoder.norm", hidden)
    if not spec.tie_word_embeddings:  # llama.cpp takes the embeddings where there is no output
        yield _entry("output", "decoder.lm_head", spec.vocab_size, hidden)


def tower_entries(spec: VisionSpec) -> Iterator[Entry]:
    """All tensors of the tower."""
    hidden, wide, patch = spec.hidden_size, spec.intermediate_size, spec.patch_size
    token, kernel, places = (hidden,), (hidden, 3, patch, patch), (spec.num_patches + 1, hidden)
    yield Entry("v.class_embd", "vision.class_embedding", token, token, "float")
    yield Entry(
        "v.patch_embd.weight", "vision.patch_embedding.weight", kernel, kernel, "convolution"
    )
    yield Entry(
        "v.position_embd.weight", "vision.position_embedding.weight", places, places, "float"
    )
    yield from _pair("v.pre_ln", "vision.pre_norm", hidden)
    for index in range(spec.num_hidden_layers):
        ours, theirs = f"vision.layers.{index}", f"v.blk.{index}"
        yield from _pair(f"{theirs}.ln1", f"{ours}.norm1", hidden)
        for part in ("q", "k", "v", "out"):
            yield from _pair(f"{theirs}.attn_{part}", f"{ours}.attn.{part}_proj", hidden, hidden)
        yield from _pair(f"{theirs}.ln2", f"{ours}.norm2", hidden)
        yield from _pair(f"{theirs}.ffn_up", f"{ours}.mlp.fc1", wide, hidden)
        yield from _pair(f"{theirs}.ffn_down", f"{ours}.mlp.fc2", hidden, wide)


def projector_entries(spec: ProjectorSpec) -> Iterator[Entry]:
    """All tensors of a projector that begins with an MLP of two layers."""
    size = spec.out_size
    first, second = {
        "mlp": ("mm.0", "mm.2"),
        "ldp": ("mm.model.mlp.1", "mm.model.mlp.3"),
        "ldpv2": ("mm.model.mlp.0", "mm.model.mlp.2"),
    }[spec.kind]
    yield from _pair(first, "projector.mlp.0", size, spec.in_size)
    yield from _pair(second, "projector.mlp.1", size, size)
    if spec.kind == "ldp":
        for block in (0, 1):
            yield from _inverted_residual(spec, block)
    if spec.kind == "ldpv2":
        yield _depthwise("mm.model.peg.0.weight", "projector.peg.weight", size)
        yield Entry("mm.model.peg.0.bias", "projector.peg.bias", (size,), (size,), "float")


def _inverted_residual(spec: ProjectorSpec, block: int) -> Iterator[Entry]:
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


def _entry(theirs: str, ours: str, *shape: int, heads: int = 0) -> Entry:
    store: Literal["matrix", "float"] = "matrix" if len(shape) == 2 else "float"
    return Entry(f"{theirs}.weight", f"{ours}.weight", shape, shape, store, heads)


def _pair(theirs: str, ours: str, *shape: int) -> Iterator[Entry]:
    """Weight and bias of a linear layer or a norm."""
    yield _entry(theirs, ours, *shape)
    yield Entry(f"{theirs}.bias", f"{ours}.bias", shape[:1], shape[:1], "float")


def _pointwise(theirs: str, ours: str, out_size: int, in_size: int) -> Entry:
    return Entry(theirs, ours, (out_size, in_size, 1, 1), (out_size, in_size), "convolution")


def _depthwise(theirs: str, ours: str, size: int) -> Entry:
    return Entry(theirs, ours, (size, 1, 3, 3), (size, 3, 3), "depthwise")

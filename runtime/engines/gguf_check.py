"""What must be in the GGUF files of a model.

llama.cpp aborts the process on absurd sizes, and mtmd takes a missing tensor for a null pointer and
crashes on the first picture. So headers are compared with the spec before a library opens the file.
"""

from __future__ import annotations

from collections.abc import Iterator

from mobilevlm.errors import BundleError
from mobilevlm.gguf_file import GgufFile
from mobilevlm.spec import DecoderSpec, ModelSpec, ProjectorSpec, VisionSpec

Shape = tuple[int, ...]


def check_decoder(header: GgufFile, spec: DecoderSpec) -> None:
    """Refuses a file that is not the language model of the spec. (Missing tensors llama.cpp finds
    itself.)

    Raises:
        BundleError: names the first key or tensor that is different.
    """
    if header.architecture == "clip":
        raise BundleError(f"{header.path}: an image encoder (mmproj), expected a language model")
    prefix = header.architecture
    for key, expected in {
        f"{prefix}.block_count": spec.num_hidden_layers,
        f"{prefix}.embedding_length": spec.hidden_size,
        f"{prefix}.feed_forward_length": spec.intermediate_size,
        f"{prefix}.attention.head_count": spec.num_attention_heads,
    }.items():
        _same(header, key, header.metadata.get(key), expected)
    key = f"{prefix}.attention.head_count_kv"
    heads = header.metadata.get(key, spec.num_attention_heads)
    _same(header, key, heads, spec.num_key_value_heads)
    table = header.tensors.get("token_embd.weight")
    shape = table.shape if table else None
    _same(header, "shape of token_embd.weight", shape, (spec.vocab_size, spec.hidden_size))


def check_mmproj(header: GgufFile, spec: ModelSpec) -> None:
    """Refuses a file that is not the image encoder and projector of the spec.

    Raises:
        BundleError: names the first key or tensor that is missing or different.
    """
    if header.architecture != "clip":
        raise BundleError(f"{header.path}: not an image encoder (mmproj)")
    kind = header.metadata.get("clip.projector_type", "mlp")  # old files do not say
    _same(header, "clip.projector_type", kind, spec.projector.kind)
    for key, expected in _vision_metadata(spec.vision).items():
        _same(header, key, header.metadata.get(key), expected)
    for name, shape in (*_tower(spec.vision), *_projector(spec.projector)):
        tensor = header.tensors.get(name)
        if tensor is None:
            raise _other(header, f"tensor {name!r} is missing")
        if shape is not None:
            _same(header, f"shape of {name}", tensor.shape, shape)


def _same(header: GgufFile, what: str, found: object, expected: object) -> None:
    if found != expected:
        raise _other(header, f"{what} is {found!r:.60}, expected {expected!r}")


def _other(header: GgufFile, what: str) -> BundleError:
    return BundleError(
        f"{header.path}: damaged or of another model: {what}: copy or export it again"
    )


def _vision_metadata(spec: VisionSpec) -> dict[str, int]:
    return {
        "clip.vision.image_size": spec.image_size,
        "clip.vision.patch_size": spec.patch_size,
        "clip.vision.embedding_length": spec.hidden_size,
        "clip.vision.feed_forward_length": spec.intermediate_size,
        "clip.vision.block_count": spec.num_hidden_layers,
        "clip.vision.attention.head_count": spec.num_attention_heads,
    }


def _tower(spec: VisionSpec) -> Iterator[tuple[str, Shape]]:
    hidden, wide, patch = spec.hidden_size, spec.intermediate_size, spec.patch_size
    yield "v.class_embd", (hidden,)
    yield "v.patch_embd.weight", (hidden, 3, patch, patch)
    yield "v.position_embd.weight", (spec.num_patches + 1, hidden)
    yield from _pair("v.pre_ln", (hidden,))
    for index in range(spec.num_hidden_layers):
        layer = f"v.blk.{index}"
        for norm in ("ln1", "ln2"):
            yield from _pair(f"{layer}.{norm}", (hidden,))
        for part in ("attn_q", "attn_k", "attn_v", "attn_out"):
            yield from _pair(f"{layer}.{part}", (hidden, hidden))
        yield from _pair(f"{layer}.ffn_up", (wide, hidden))
        yield from _pair(f"{layer}.ffn_down", (hidden, wide))


def _pair(name: str, shape: Shape) -> Iterator[tuple[str, Shape]]:
    """Weight and bias."""
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _projector(spec: ProjectorSpec) -> Iterator[tuple[str, Shape | None]]:
    """Shapes where there is one way to store them."""
    size = spec.out_size
    if spec.kind == "mlp":
        for name in ("mm.0.weight", "mm.0.bias", "mm.2.weight"):
            yield name, None  # a single Linear is written as two
        yield "mm.2.bias", (size,)
        return
    first, second = (0, 2) if spec.kind == "ldpv2" else (1, 3)
    yield from _pair(f"mm.model.mlp.{first}", (size, spec.in_size))
    yield from _pair(f"mm.model.mlp.{second}", (size, size))
    if spec.kind == "ldpv2":
        yield "mm.model.peg.0.weight", None
        yield "mm.model.peg.0.bias", (size,)
        return
    for block in ("mm.model.mb_block.1.block", "mm.model.mb_block.2.block"):
        for part in ("0.0", "1.fc1", "1.fc2", "2.0"):
            yield f"{block}.{part}.weight", None
        yield f"{block}.1.fc1.bias", (spec.squeeze_size,)
        yield f"{block}.1.fc2.bias", (size,)
        for norm in ("0.1", "2.1"):
            yield from _pair(f"{block}.{norm}", (size,))

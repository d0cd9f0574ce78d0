"""The part of Janus-Pro that draws: settings and tensor names of its head, of the embedding of
codes, and of the decoder of codes (``JanusVQVAE`` of transformers)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

from mobilevlm.checkpoint import TensorRef, read_json
from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import CheckpointError
from mobilevlm.families.config import check_only, config_value
from mobilevlm.families.hub import HubCheckpoint
from mobilevlm.output_spec import CodeDecoder, ImageOutput

_VQ: dict[str, Any] = {
    "embed_dim": 8, "num_embeddings": 16384, "latent_channels": 256, "num_patches": 32,
    "base_channels": 128, "channel_multiplier": [1, 1, 2, 2, 4], "num_res_blocks": 2,
    "projection_dim": 2048, "num_hidden_layers": 2, "image_token_embed_dim": 2048}  # fmt: skip
"""Defaults of ``JanusVQVAEConfig``."""
_ONLY = {"in_channels": 3, "out_channels": 3, "double_latent": False, "hidden_act": "gelu"}
_GROUPS = 32
_MOST_LEVELS = 16
_ROOTS = ("model.", "")
_PARTS = ("weight", "bias")


def read_drawing(
    hub: HubCheckpoint, decoder: DecoderSpec, chat_template: str, begin: int
) -> ImageOutput:
    """Return the output for images. ``begin``: id of the token that begins one.

    Raises:
        CheckpointError: a value is missing or wrong, or does not fit the others.
    """
    path = hub.path
    given = config_value(path, hub.source.config, "vq_config", dict)
    check_only(path, given, _ONLY)
    config = {**_VQ, **{key: item for key, item in given.items() if item is not None}}
    grid = config_value(path, config, "num_patches", int)
    tokens = config_value(path, hub.vision, "num_image_tokens", int, 576)
    if grid * grid != tokens:
        raise CheckpointError(
            f"{path}: 'num_patches' in 'vq_config' is {grid}, but 'num_image_tokens' is {tokens}, "
            f"expected its square"
        )
    for key in ("image_token_embed_dim", "projection_dim"):
        width = config_value(path, config, key, int)
        if width != decoder.hidden_size:
            raise CheckpointError(
                f"{path}: {key!r} in 'vq_config' is {width}, expected the decoder's hidden_size "
                f"{decoder.hidden_size}"
            )
    settings = _generation(hub)
    where = hub.source.folder / "generation_config.json"
    empty = config_value(where, settings, "pad_token_id", int, hub.text.get("pad_token_id"))
    first = config_value(where, settings, "bos_token_id", int, hub.text.get("bos_token_id"))
    for name, index in (("pad_token_id", empty), ("bos_token_id", first)):
        if index >= decoder.vocab_size:
            raise CheckpointError(
                f"{where}: {name!r} is {index}, beyond the vocabulary of {decoder.vocab_size}"
            )
    return ImageOutput(
        num_codes=config_value(path, config, "num_embeddings", int),
        code_size=config_value(path, config, "embed_dim", int),
        grid=grid,
        head_size=config_value(path, config, "projection_dim", int),
        decoder=_code_decoder(hub, config),
        chat_template=chat_template,
        begin_ids=(begin,),
        empty_id=empty,
        kept_ids=(first, begin),
        guidance=config_value(where, settings, "guidance_scale", float, 5.0),
        embed_depth=config_value(path, config, "num_hidden_layers", int),
    )


def _generation(hub: HubCheckpoint) -> dict[str, Any]:
    path = hub.source.folder_with("generation_config.json") / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def _code_decoder(hub: HubCheckpoint, config: dict[str, Any]) -> CodeDecoder:
    """Return the decoder of codes, whose levels the configuration lists from the highest
    resolution down."""
    path = hub.path
    base = config_value(path, config, "base_channels", int)
    factors = config_value(path, config, "channel_multiplier", list)
    whole = all(type(factor) is int and 0 < factor <= 1 << 10 for factor in factors)
    if not (whole and 0 < len(factors) <= _MOST_LEVELS) or base % _GROUPS:
        raise CheckpointError(
            f"{path}: 'base_channels' and 'channel_multiplier' are {base} and {factors!r:.60}, "
            f"expected a multiple of {_GROUPS} and up to {_MOST_LEVELS} whole numbers"
        )
    return CodeDecoder(
        latent_size=config_value(path, config, "latent_channels", int),
        widths=tuple(base * factor for factor in reversed(factors)),
        blocks=config_value(path, config, "num_res_blocks", int) + 1,
        groups=_GROUPS,
    )


def drawing_refs(hub: HubCheckpoint, spec: ImageOutput, hidden_size: int) -> dict[str, TensorRef]:
    """Return where the tensors of the output are, by canonical name."""
    place = hub.prefix(_ROOTS, "generation_head.proj_out.weight")
    names = {
        "codes.embed.weight": "generation_embeddings.weight",
        "image_decoder.codebook.weight": "vqmodel.quantize.embedding.weight",
    }
    for ours, theirs, _ in drawing_modules(spec, hidden_size):
        names |= {f"{ours}.{part}": f"{theirs}.{part}" for part in _PARTS}
    return {ours: TensorRef(hub.files, place + theirs) for ours, theirs in names.items()}


def unread_names() -> list[str]:
    """Return regular expressions of tensors that nobody reads: what makes codes of an image."""
    return [r"(model\.)?vqmodel\.(encoder|quant_conv)\."]


Module: TypeAlias = tuple[str, str, tuple[int, ...]]
"""Our name, theirs, and the shape of the weight; each has a bias too"""


def drawing_modules(spec: ImageOutput, hidden_size: int) -> Iterator[Module]:
    """Yield the modules of the output, but for the tables of codes."""
    head = spec.head_size
    yield "image_head.mlp.0", "generation_head.proj_out", (head, hidden_size)
    yield "image_head.mlp.1", "generation_head.vision_head", (spec.num_codes, head)
    for index in range(spec.embed_depth):
        theirs, size = f"hidden_layers.{index - 1}", hidden_size
        if index == 0:
            theirs, size = "fc1", spec.code_size
        yield f"codes.mlp.{index}", f"generation_aligner.{theirs}", (hidden_size, size)
    ours, theirs, decoder = "image_decoder", "vqmodel.decoder", spec.decoder
    latent, first, last = decoder.latent_size, decoder.widths[0], decoder.widths[-1]
    yield f"{ours}.post_quant", "vqmodel.post_quant_conv", (latent, spec.code_size, 1, 1)
    yield f"{ours}.conv_in", f"{theirs}.conv_in", (first, latent, 3, 3)
    yield f"{ours}.norm_out", f"{theirs}.norm_out", (last,)
    yield f"{ours}.conv_out", f"{theirs}.conv_out", (3, last, 3, 3)
    yield from _block(f"{ours}.mid.before", f"{theirs}.mid.block_1", first, first)
    yield from _attention(f"{ours}.mid.attn", f"{theirs}.mid.attn_1", first)
    yield from _block(f"{ours}.mid.after", f"{theirs}.mid.block_2", first, first)
    for level, widths in enumerate(decoder.block_widths):
        here, there, size = f"{ours}.levels.{level}", f"{theirs}.up.{level}", decoder.widths[level]
        for index, pair in enumerate(widths):
            yield from _block(f"{here}.blocks.{index}", f"{there}.block.{index}", *pair)
            if level in decoder.attention_levels:
                yield from _attention(f"{here}.attns.{index}", f"{there}.attn.{index}", size)
        if level < len(decoder.widths) - 1:
            yield f"{here}.upsample", f"{there}.upsample.conv", (size, size, 3, 3)


def _block(ours: str, theirs: str, before: int, after: int) -> Iterator[Module]:
    yield f"{ours}.norm1", f"{theirs}.norm1", (before,)
    yield f"{ours}.conv1", f"{theirs}.conv1", (after, before, 3, 3)
    yield f"{ours}.norm2", f"{theirs}.norm2", (after,)
    yield f"{ours}.conv2", f"{theirs}.conv2", (after, after, 3, 3)
    if before != after:
        yield f"{ours}.shortcut", f"{theirs}.nin_shortcut", (after, before, 1, 1)


def _attention(ours: str, theirs: str, width: int) -> Iterator[Module]:
    yield f"{ours}.norm", f"{theirs}.norm", (width,)
    for name, stored in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "proj_out")):
        yield f"{ours}.{name}_proj", f"{theirs}.{stored}", (width, width, 1, 1)

"""The language model LFM2: short convolutions and attention in turn. Its keys in config.json and
its tensor names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import CheckpointError
from mobilevlm.families.backbones import Backbone, common_values
from mobilevlm.families.config import check_only, config_value

_ATTENTION, _CONVOLUTION = "full_attention", "conv"
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 65536,
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128_000,
    "norm_eps": 1e-5,
    "rope_theta": 1e6,
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_auto_adjust_ff_dim": True,
    "block_ffn_dim_multiplier": 1.0,
    "block_multiple_of": 256,
    "tie_word_embeddings": True,
}
"""Defaults of ``Lfm2Config``."""
_OTHER_NAMES = {
    "block_ff_dim": "intermediate_size",
    "theta": "rope_theta",
    "tie_embedding": "tie_word_embeddings",
}
"""Keys of the first files, which go before ours."""
_EXPECTED = {"block_use_swiglu": True, "use_pos_enc": True}


def _read_lfm2(path: Path, config: dict[str, Any]) -> DecoderSpec:
    """``Lfm2Config``."""
    given = {key: value for key, value in config.items() if value is not None}
    check_only(path, given, {"theta": given.get("rope_theta", given.get("theta"))})
    given |= {ours: given[theirs] for theirs, ours in _OTHER_NAMES.items() if theirs in given}
    given = {**_DEFAULTS, **given}
    if isinstance(given.get("rope_parameters"), dict) and "rope_theta" not in config:
        given.pop("rope_theta")  # transformers 5 keeps it there
    check_only(path, given, _EXPECTED)
    for key in ("block_dim", "conv_dim", "conv_dim_out"):
        check_only(path, given, {key: given["hidden_size"]})
    check_only(path, given, {"num_heads": given["num_attention_heads"]})
    common = common_values(path, given, "silu")
    count = common["num_hidden_layers"]
    layers = _convolutions(path, given, count)
    return DecoderSpec(
        **{**common, "intermediate_size": _mlp_size(path, given)},
        norm_eps=config_value(path, given, "norm_eps", float),
        qk_norm=True,
        conv_layers=layers,
        conv_kernel=config_value(path, given, "conv_L_cache", int) if layers else 0,
        conv_bias=bool(layers) and config_value(path, given, "conv_bias", bool),
    )


def _mlp_size(path: Path, config: dict[str, Any]) -> int:
    """Return the inner size of an MLP: two thirds of what is named, rounded up to a multiple."""
    size = config_value(path, config, "intermediate_size", int)
    if not config_value(path, config, "block_auto_adjust_ff_dim", bool):
        return size
    share = config_value(path, config, "block_ffn_dim_multiplier", float)
    multiple = config_value(path, config, "block_multiple_of", int)
    return -(-int(share * int(2 * size / 3)) // multiple) * multiple


def _convolutions(path: Path, config: dict[str, Any], count: int) -> tuple[int, ...]:
    """Return the layers with a short convolution, by ``layer_types`` or ``full_attn_idxs``.

    Raises:
        CheckpointError: neither says it for each layer, or no layer has attention.
    """
    types, attending = config.get("layer_types"), config.get("full_attn_idxs")
    if types is None and isinstance(attending, list):
        types = [_ATTENTION if index in attending else _CONVOLUTION for index in range(count)]
    known = {_ATTENTION, _CONVOLUTION}
    if not isinstance(types, list) or len(types) != count or not known.issuperset(map(str, types)):
        raise CheckpointError(
            f"{path}: 'layer_types' is {types!r:.60}, expected {_ATTENTION!r} or {_CONVOLUTION!r} "
            f"for each of {count} layers"
        )
    if _ATTENTION not in types:
        raise CheckpointError(f"{path}: 'layer_types' has no {_ATTENTION!r}, expected some")
    return tuple(index for index, name in enumerate(types) if name == _CONVOLUTION)


LFM2 = Backbone(
    _read_lfm2,
    norm="embedding_norm",
    parts={
        "input_norm": "operator_norm",
        "post_attention_norm": "ffn_norm",
        **{f"attn.{part}_proj": f"self_attn.{part}_proj" for part in "qkv"},
        "attn.o_proj": "self_attn.out_proj",
        **{f"attn.{part}_norm": f"self_attn.{part}_layernorm" for part in "qk"},
        **{f"short_conv.{part}": f"conv.{part}" for part in ("in_proj", "conv", "out_proj")},
    },
    mlp_root="feed_forward",
    mlp={"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
)

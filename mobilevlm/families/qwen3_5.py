"""The language model Qwen3.5: gated delta layers and gated attention. Its keys in config.json and
its tensor names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mobilevlm.decoder_spec import DecoderSpec, DeltaSpec
from mobilevlm.errors import CheckpointError
from mobilevlm.families.backbones import (
    PARTIAL,
    common_values,
    rotary_dim,
    with_rope_parameters,
)
from mobilevlm.families.config import check_only, config_value
from mobilevlm.families.qwen_gemma import QWEN3, rope_sections

_ATTENTION, _DELTA = "full_attention", "linear_attention"
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 248320,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
"""Defaults of ``Qwen3_5TextConfig``."""
_AXES = {"mrope_interleaved": True, "mrope_section": [11, 11, 10]}
_EXPECTED = {"attention_bias": False, "attn_output_gate": True, "mlp_only_layers": []}


def _read_qwen3_5(path: Path, config: dict[str, Any]) -> DecoderSpec:
    """``Qwen3_5TextConfig``."""
    given = {**_DEFAULTS, **{key: value for key, value in config.items() if value is not None}}
    check_only(path, given, _EXPECTED)
    joined = {PARTIAL: 0.25, **with_rope_parameters(path, given)}
    channels = rotary_dim(path, joined, PARTIAL, config_value(path, given, "head_dim", int))
    rotary = {**_AXES, **joined["rope_scaling"]}
    check_only(path, rotary, {"mrope_interleaved": True})
    sections, given = rope_sections(path, {**given, "rope_parameters": rotary}, channels)
    common = common_values(path, given, "silu")
    return DecoderSpec(
        **common,
        **sections,
        norm_eps=config_value(path, given, "rms_norm_eps", float),
        rotary_dim=channels,
        qk_norm=True,
        attention_gate=True,
        delta=_delta(path, given, common["num_hidden_layers"]),
    )


def _delta(path: Path, config: dict[str, Any], count: int) -> DeltaSpec:
    """Return the gated delta layers.

    Raises:
        CheckpointError: a value is missing or wrong, does not fit the others, or layers are of
            another kind or all of one.
    """
    interval = config_value(path, config, "full_attention_interval", int)
    usual = [_DELTA if (index + 1) % interval else _ATTENTION for index in range(count)]
    types = config.get("layer_types", usual)
    if (
        not isinstance(types, list)
        or len(types) != count
        or set(map(str, types)) != {_ATTENTION, _DELTA}
    ):
        raise CheckpointError(
            f"{path}: 'layer_types' is {types!r:.60}, expected {_ATTENTION!r} or {_DELTA!r} for "
            f"each of {count} layers, and both kinds"
        )
    sizes = {
        ours: config_value(path, config, f"linear_{theirs}", int)
        for ours, theirs in (
            ("key_heads", "num_key_heads"), ("value_heads", "num_value_heads"),
            ("key_dim", "key_head_dim"), ("value_dim", "value_head_dim"),
            ("kernel", "conv_kernel_dim"),
        )
    }  # fmt: skip
    if sizes["value_heads"] % sizes["key_heads"] or sizes["kernel"] < 2:
        raise CheckpointError(
            f"{path}: 'linear_num_value_heads' must be a multiple of 'linear_num_key_heads', and "
            f"'linear_conv_kernel_dim' 2 or more: found {sizes['value_heads']}, "
            f"{sizes['key_heads']} and {sizes['kernel']}"
        )
    layers = tuple(index for index, name in enumerate(types) if name == _DELTA)
    return DeltaSpec(layers, **sizes)


_DELTA_PARTS = {
    "qkv_proj": "in_proj_qkv",
    "z_proj": "in_proj_z",
    "b_proj": "in_proj_b",
    "a_proj": "in_proj_a",
    "conv": "conv1d",
    "norm": "norm",
    "decay_log": "A_log",
    "time_bias": "dt_bias",
    "out_proj": "out_proj",
}
QWEN3_5 = replace(
    QWEN3,
    read=_read_qwen3_5,
    parts={
        **(QWEN3.parts or {}),
        **{f"delta.{ours}": f"linear_attn.{theirs}" for ours, theirs in _DELTA_PARTS.items()},
    },
    norm_offset=1.0,
    unused=(r"(model\.)?mtp\.",),  # of further tokens at once
)

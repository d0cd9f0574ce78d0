"""The language model Gemma 4 of its small sizes: inputs of its own for each layer, keys and values
that layers share, heads of two sizes. Its keys in config.json and its tensor names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import CheckpointError
from mobilevlm.families.backbones import PARTIAL, common_values
from mobilevlm.families.config import check_only, config_value
from mobilevlm.families.qwen_gemma import FULL, GEMMA3, SLIDING, sliding_layers

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "sliding_window": 512,
    "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262144,
    "pad_token_id": 0,
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
        FULL: {"rope_type": "proportional", PARTIAL: 0.25, "rope_theta": 1e6},
    },
}
"""Defaults of ``Gemma4TextConfig``."""
_PATTERN = 6
"""Every so many layers sees the whole past, where ``layer_types`` says nothing."""
_EXPECTED = {"attention_bias": False, "attention_k_eq_v": False, "enable_moe_block": False}


def _read_gemma4(path: Path, config: dict[str, Any]) -> DecoderSpec:
    """``Gemma4TextConfig`` of E2B and E4B.

    Raises:
        CheckpointError: besides, for the larger models, which have other blocks.
    """
    given = {key: value for key, value in config.items() if value is not None}
    given = {**_DEFAULTS, **given}
    check_only(path, given, {**_EXPECTED, "vocab_size_per_layer_input": given["vocab_size"]})
    if given.get("use_bidirectional_attention") is not None:
        raise CheckpointError(
            f"{path}: 'use_bidirectional_attention' is {given['use_bidirectional_attention']!r:.40}"
            f", expected none, as in the models E2B and E4B"
        )
    full, sliding = _rope(path, given)
    theta = {"rope_parameters": None, "rope_theta": full["rope_theta"]}
    common = common_values(path, {**given, **theta}, "gelu_pytorch_tanh", "hidden_activation")
    count, inner = common["num_hidden_layers"], common["intermediate_size"]
    usual = (index for index in range(count - 1) if (index + 1) % _PATTERN)
    near = tuple(layer for layer in sliding_layers(path, given, usual) if layer < count - 1)
    shared = _shared_layers(path, given, count, near)
    head_dim = config_value(path, given, "global_head_dim", int)
    width = given["hidden_size_per_layer_input"]
    if type(width) is not int or not 0 <= width < 1 << 31:
        raise CheckpointError(
            f"{path}: 'hidden_size_per_layer_input' is {width!r:.60}, expected a number of channels"
        )
    pad = given["pad_token_id"]
    if type(pad) is not int or not 0 <= pad < common["vocab_size"]:
        raise CheckpointError(f"{path}: 'pad_token_id' is {pad!r:.60}, expected a token id")
    cap = "final_logit_softcapping"
    return DecoderSpec(
        **common,
        norm_eps=config_value(path, given, "rms_norm_eps", float),
        attention_scale=1.0,
        qk_norm=True,
        value_norm=True,
        post_norms=True,
        embed_scale=common["hidden_size"] ** 0.5,
        sliding_window=config_value(path, given, "sliding_window", int) if near else 0,
        sliding_layers=near,
        sliding_rope_theta=sliding["rope_theta"] if near else None,
        logit_softcap=config_value(path, given, cap, float) if cap in given else None,
        global_head_dim=head_dim if near and head_dim != common["head_dim"] else 0,
        turned_pairs=int(full[PARTIAL] * head_dim // 2),
        shared_kv_layers=shared,
        shared_intermediate_size=2 * inner if shared and _is_wide(path, given) else 0,
        layer_input_size=width,
        layer_input_id=pad,
        layer_scale=True,
    )


def _is_wide(path: Path, config: dict[str, Any]) -> bool:
    return config_value(path, config, "use_double_wide_mlp", bool, False)


def _rope(path: Path, config: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the rotary base of the layers that see the whole past, with the share of a head that
    turns, and that of sliding layers.

    Raises:
        CheckpointError: a value is missing or wrong, or positions are scaled.
    """
    parameters = config_value(path, config, "rope_parameters", dict)
    found = []
    for kind, name in ((FULL, "proportional"), (SLIDING, "default")):
        given = config_value(path, parameters, kind, dict)
        check_only(path, given, {"rope_type": name, "factor": 1.0})
        values = {"rope_theta": config_value(path, given, "rope_theta", float)}
        if kind == FULL:
            values[PARTIAL] = config_value(path, given, PARTIAL, float, 1.0)
            if values[PARTIAL] > 1:
                raise CheckpointError(f"{path}: {PARTIAL!r} is {values[PARTIAL]}, expected up to 1")
        found.append(values)
    return found[0], found[1]


def _shared_layers(path: Path, config: dict[str, Any], count: int, near: tuple[int, ...]) -> int:
    """Return the number of layers that read keys and values of earlier ones.

    Raises:
        CheckpointError: there is no earlier layer of their kind.
    """
    shared = config.get("num_kv_shared_layers", 0)
    is_right = type(shared) is int and 0 <= shared < count
    if is_right and shared:
        kinds = [index in near for index in range(count)]
        is_right = set(kinds[count - shared :]) <= set(kinds[: count - shared])
    if not is_right:
        raise CheckpointError(
            f"{path}: 'num_kv_shared_layers' is {shared!r:.60}, expected a number that leaves "
            f"layers of each kind before them"
        )
    return int(shared)


_OWN = {"gate": "per_layer_input_gate", "proj": "per_layer_projection",
        "norm": "post_per_layer_input_norm"}  # fmt: skip
GEMMA4 = replace(
    GEMMA3,
    read=_read_gemma4,
    parts={
        **(GEMMA3.parts or {}),
        **{f"layer_input.{ours}": theirs for ours, theirs in _OWN.items()},
        "scale": "layer_scalar",
    },
    norm_offset=0.0,
)


def unused_names(spec: DecoderSpec, root: str) -> list[str]:
    """Return regular expressions of keys and values that layers have and do not use, since they
    read those of others. ``root``: beginning of names."""
    first = spec.num_hidden_layers - spec.shared_kv_layers
    layers = "|".join(map(str, range(first, spec.num_hidden_layers)))
    return [rf"{root}\.layers\.({layers})\.self_attn\.(k_proj|v_proj|k_norm)\."] if layers else []

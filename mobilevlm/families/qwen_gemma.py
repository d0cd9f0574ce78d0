"""Dense language models of Qwen2, Qwen3, Mistral and Gemma 3: their keys in config.json and their
tensor names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import CheckpointError
from mobilevlm.families.backbones import LLAMA_PARTS, Backbone, common_values, read_llama
from mobilevlm.families.config import check_only, config_value, rope_scaling

FULL, SLIDING = "full_attention", "sliding_attention"
_GEMMA3: dict[str, Any] = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
    "rope_local_base_freq": 10000.0,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "use_bidirectional_attention": False,
}
"""Defaults of ``Gemma3TextConfig``."""
_SOFT_CAPS = {
    "attention_softcap": "attn_logit_softcapping",
    "logit_softcap": "final_logit_softcapping",
}


def _read_qwen2(path: Path, config: dict[str, Any]) -> DecoderSpec:
    """``Qwen2Config``."""
    spec = read_llama(path, _within_context(config))
    return replace(spec, qkv_bias=True, o_bias=False, **_windows(path, config))


def _read_qwen3(path: Path, config: dict[str, Any]) -> DecoderSpec:
    """``Qwen3Config``."""
    spec = read_llama(path, {"head_dim": 128, **_within_context(config)})
    return replace(spec, qk_norm=True, **_windows(path, config))


def _read_qwen2_vl(path: Path, config: dict[str, Any]) -> DecoderSpec:
    """``Qwen2VLTextConfig`` and ``Qwen2_5_VLTextConfig``."""
    sections, config = rope_sections(path, config)
    return replace(_read_qwen2(path, config), **sections)


def _read_qwen3_vl(path: Path, config: dict[str, Any]) -> DecoderSpec:
    """``Qwen3VLTextConfig``."""
    sections, config = rope_sections(path, config)
    return replace(_read_qwen3(path, config), **sections)


def rope_sections(
    path: Path, config: dict[str, Any], rotary_dim: int | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return how axes of positions share the pairs of channels, as fields of DecoderSpec, and the
    configuration without it. ``rotary_dim``: rotated channels of a head, all when not given.

    Raises:
        CheckpointError: it is missing, or the shares are not half of these channels.
    """
    found: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        given = config.get(key)
        if not isinstance(given, dict):
            continue
        rest = {name: given[name] for name in given if not name.startswith("mrope_")}
        for name in ("type", "rope_type"):
            if rest.get(name) == "mrope":
                rest[name] = "default"
        config = {**config, key: rest}
        found = {name: given[name] for name in given if name.startswith("mrope_")} or found
    interleaved = config_value(path, found, "mrope_interleaved", bool, False)
    sections: Any = found.get("mrope_section")
    shares = sections if isinstance(sections, list) else []
    heads = config_value(path, config, "num_attention_heads", int)
    usual = config_value(path, config, "hidden_size", int) // heads
    pairs = (rotary_dim or config_value(path, config, "head_dim", int, usual)) // 2
    is_right = len(shares) == 3 and all(type(share) is int and share >= 0 for share in shares)
    if not is_right or sum(shares) != pairs or (interleaved and max(shares[1:]) * 3 > pairs + 2):
        raise CheckpointError(
            f"{path}: 'mrope_section' is {sections!r:.60}, expected three numbers whose sum is "
            f"{pairs}, half of {'the rotated channels' if rotary_dim else 'a head'}: positions of "
            f"images have three axes"
        )
    return {"rope_sections": tuple(shares), "rope_interleaved": interleaved}, config


def _read_mistral(path: Path, config: dict[str, Any]) -> DecoderSpec:
    """``MistralConfig``: a Llama all of whose layers slide; by ``null`` none do."""
    spec = read_llama(path, config)
    window = config_value(path, {"sliding_window": 4096, **config}, "sliding_window", int, 0)
    if not 0 < window < spec.context_length:
        return spec
    return replace(spec, sliding_window=window, sliding_layers=tuple(range(spec.num_hidden_layers)))


def _within_context(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration without dynamic scaling of positions, which changes nothing up to
    ``max_position_embeddings``: the context ends there."""
    for key in ("rope_scaling", "rope_parameters"):  # the latter is transformers 5's
        given = config.get(key)
        if isinstance(given, dict) and given.get("rope_type", given.get("type")) == "dynamic":
            base = {"rope_theta": given["rope_theta"]} if "rope_theta" in given else None
            config = {**config, key: base}
    return config


def _windows(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the sliding layers of Qwen: those from ``max_window_layers`` on, or as
    ``layer_types`` says."""
    if not config_value(path, config, "use_sliding_window", bool, False):
        return {}
    count = config_value(path, config, "num_hidden_layers", int)
    first = config.get("max_window_layers", 28)
    if type(first) is not int or first < 0:
        raise CheckpointError(
            f"{path}: 'max_window_layers' is {first!r:.60}, expected a number of layers"
        )
    window = config_value(path, config, "sliding_window", int)
    layers = sliding_layers(path, config, range(first, count))
    return {"sliding_window": window, "sliding_layers": layers} if layers else {}


def sliding_layers(path: Path, config: dict[str, Any], default: Iterable[int]) -> tuple[int, ...]:
    """Return the layers that ``layer_types`` calls sliding."""
    types = config.get("layer_types")
    if types is None:
        return tuple(default)
    count = config_value(path, config, "num_hidden_layers", int)
    if not isinstance(types, list) or len(types) != count or set(types) - {FULL, SLIDING}:
        raise CheckpointError(
            f"{path}: 'layer_types' is {types!r:.60}, expected {FULL!r} or {SLIDING!r} for each "
            f"of {count} layers"
        )
    return tuple(index for index, name in enumerate(types) if name == SLIDING)


def _read_gemma3(path: Path, config: dict[str, Any]) -> DecoderSpec:
    """``Gemma3TextConfig``; published files leave defaults out."""
    given = {key: value for key, value in config.items() if value is not None}
    given = {**_GEMMA3, **given}
    joined = given.get("rope_parameters")
    if isinstance(joined, dict) and FULL in joined:  # transformers 5: for each kind of layer
        full, sliding = (config_value(path, joined, kind, dict) for kind in (FULL, SLIDING))
        given["rope_theta"] = full.get("rope_theta", _GEMMA3["rope_theta"])
        given |= {"rope_parameters": None, "rope_scaling": full}
        given["rope_local_base_freq"] = sliding.get("rope_theta", _GEMMA3["rope_local_base_freq"])
        if rope_scaling(path, {"rope_scaling": {**sliding, "rope_theta": None}}) != 1:
            raise CheckpointError(f"{path}: positions of sliding layers are scaled: expected none")
    check_only(path, given, {"attention_bias": False})
    if given["use_bidirectional_attention"]:
        raise CheckpointError(
            f"{path}: 'use_bidirectional_attention' is set: expected a decoder that sees the past"
        )
    common = common_values(path, given, "gelu_pytorch_tanh", "hidden_activation")
    pattern = config_value(path, given, "sliding_window_pattern", int)
    count = common["num_hidden_layers"]
    default = (index for index in range(count) if (index + 1) % pattern)
    near = sliding_layers(path, given, default)
    caps = {
        ours: config_value(path, given, theirs, float)
        for ours, theirs in _SOFT_CAPS.items()
        if theirs in given
    }
    longest = config_value(path, given, "max_position_embeddings", int)
    return DecoderSpec(
        **{**common, **caps, "context_length": longest},
        norm_eps=config_value(path, given, "rms_norm_eps", float),
        attention_scale=config_value(path, given, "query_pre_attn_scalar", float) ** -0.5,
        qk_norm=True,
        post_norms=True,
        embed_scale=common["hidden_size"] ** 0.5,
        sliding_window=config_value(path, given, "sliding_window", int) if near else 0,
        sliding_layers=near,
        sliding_rope_theta=config_value(path, given, "rope_local_base_freq", float),
    )


MISTRAL = Backbone(_read_mistral, parts=LLAMA_PARTS)
QWEN2 = Backbone(_read_qwen2, parts=LLAMA_PARTS)
_QK_NORMS = {f"attn.{part}_norm": f"self_attn.{part}_norm" for part in "qk"}
QWEN3 = Backbone(_read_qwen3, parts={**LLAMA_PARTS, **_QK_NORMS})
QWEN2_VL = replace(QWEN2, read=_read_qwen2_vl)
QWEN3_VL = replace(QWEN3, read=_read_qwen3_vl)
GEMMA3 = Backbone(
    _read_gemma3,
    parts={
        **LLAMA_PARTS,
        **_QK_NORMS,
        "attn_output_norm": "post_attention_layernorm",
        "post_attention_norm": "pre_feedforward_layernorm",
        "mlp_output_norm": "post_feedforward_layernorm",
    },
    norm_offset=1.0,
)

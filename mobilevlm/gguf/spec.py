"""The decoder of a GGUF file as a DecoderSpec."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypeVar

from mobilevlm.decoder_spec import DecoderSpec, DeltaSpec
from mobilevlm.errors import BundleError, MobileVLMError
from mobilevlm.gguf.architectures import (
    OWN,
    OWN_PREFIX,
    PATTERNS,
    SOFTCAPS,
    STOCK,
    attention_scale,
    embed_scale,
    gguf_architecture,
    is_own,
)
from mobilevlm.gguf.checks import MAX_LAYERS
from mobilevlm.gguf.file import GgufFile
from mobilevlm.gguf.keys import Role, check_keys
from mobilevlm.gguf.names import decoder_entries
from mobilevlm.plain_types import from_dict, to_dict

T = TypeVar("T", bool, int, float, str)

EXPERT_COUNTS = "expert_counts"
"""Experts of each layer, 0 where it is dense. This and the next are keys of our own architectures,
each behind the architecture's name."""

OWN_FLAGS = {
    "attention.qkv_bias": "qkv_bias",
    "attention.output_bias": "o_bias",
    "feed_forward.bias": "mlp_bias",
    "output_bias": "lm_head_bias",
    "use_parallel_residual": "parallel_residual",
}
OWN_KINDS = {"feed_forward.kind": "mlp", "hidden_activation": "hidden_act"}
"""The field of the spec that each is."""
EMBED_SCALE, ATTENTION_SCALE = "embedding_scale", "attention.scale"
WINDOW, PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
SLIDING_BASE = "rope.freq_base_swa"
KEY_VALUE_HEADS, CONVOLUTION_KERNEL = "attention.head_count_kv", "shortconv.l_cache"
ATTENTION_SOFTCAP, LOGIT_SOFTCAP = "attn_logit_softcapping", "final_logit_softcapping"
INTERVAL = "full_attention_interval"
SECTIONS, DEEP_LAYERS = "rope.dimension_sections", "n_deepstack_layers"
_ROLES: dict[str, Role] = {
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "lfm2": "lfm2",
    "qwen2vl": "qwen2vl",
    "qwen3vl": "qwen3vl",
    "qwen35": "qwen35",
}
_LIMIT = 1 << 31
"""No number of a model is as large."""


def decoder_spec(file: GgufFile) -> DecoderSpec:
    """Return the spec of a dense decoder that llama.cpp runs, or of one of our own architectures.

    Raises:
        BundleError: another architecture, or a key is missing or of the wrong kind.
    """
    architecture = file.architecture
    if not is_own(architecture) and architecture not in STOCK:
        known = ", ".join(map(repr, STOCK))
        raise BundleError(
            f"{file.path}: architecture {architecture!r:.60}, expected {known}, {OWN!r} or one "
            f"that begins with {OWN_PREFIX!r}"
        )
    if is_own(architecture):
        check_keys(file, "own decoder")
        spec = _own(file, _shared(file))
    elif file.metadata.get(f"{architecture}.expert_count"):
        raise BundleError(f"{file.path}: a decoder with experts, expected a dense one")
    else:
        check_keys(file, _ROLES.get(architecture, "decoder"))
        spec = _stock(file, _shared(file))
        if _value(file, "rope.dimension_count", int, spec.head_dim) != spec.rotary_channels:
            raise BundleError(f"{file.path}: rope.dimension_count is not the size of a head")
    try:
        expected = gguf_architecture(spec)
    except MobileVLMError as error:
        raise BundleError(f"{file.path}: damaged or of a later version: {error}") from None
    if expected != architecture:
        raise BundleError(
            f"{file.path}: architecture {architecture!r:.60} does not fit what the file says of "
            f"its decoder"
        )
    return spec


def _shared(file: GgufFile) -> DecoderSpec:
    """Return the fields that all architectures name alike."""
    embeddings = file.tensors.get("token_embd.weight")
    if embeddings is None:
        raise BundleError(f"{file.path}: tensor 'token_embd.weight' is missing")
    hidden = _value(file, "embedding_length", int)
    heads = _value(file, "attention.head_count", int)
    if hidden % heads and f"{file.architecture}.attention.key_length" not in file.metadata:
        raise BundleError(
            f"{file.path}: embedding_length must be a multiple of attention.head_count: found "
            f"{hidden} and {heads}"
        )
    shared = _key_value_heads(file, heads)
    if heads % shared:
        raise BundleError(
            f"{file.path}: attention.head_count must be a multiple of head_count_kv: found "
            f"{heads} and {shared}"
        )
    head_dim = _value(file, "attention.key_length", int, hidden // heads)
    if head_dim % 2:
        raise BundleError(f"{file.path}: heads of {head_dim} channels, expected an even number")
    norm: Literal["rms", "layer"] = "rms"
    eps = "attention.layer_norm_rms_epsilon"
    if f"{file.architecture}.{eps}" not in file.metadata and is_own(file.architecture):
        eps, norm = "attention.layer_norm_epsilon", "layer"
    return DecoderSpec(
        vocab_size=embeddings.shape[0],
        hidden_size=hidden,
        intermediate_size=_value(file, "feed_forward_length", int),
        num_hidden_layers=_value(file, "block_count", int),
        num_attention_heads=heads,
        num_key_value_heads=shared,
        head_dim=head_dim,
        norm_eps=_value(file, eps, float),
        norm=norm,
        rope_theta=_value(file, "rope.freq_base", float, 10000.0),
        rope_scaling=_rope_scaling(file),
        context_length=_value(file, "context_length", int),
        tie_word_embeddings="output.weight" not in file.tensors,
    )


def _key_value_heads(file: GgufFile, heads: int) -> int:
    """Return the heads of keys and values, of LFM2 those of layers that have some."""
    counts = file.metadata.get(f"{file.architecture}.{KEY_VALUE_HEADS}")
    if file.architecture != "lfm2" or type(counts) is int:
        return _value(file, KEY_VALUE_HEADS, int, heads)
    listed = counts if isinstance(counts, list) else []
    known = all(type(count) is int and 0 <= count < _LIMIT for count in listed)
    found = set(listed) - {0} if known else set()
    if len(found) != 1:
        raise BundleError(
            f"{file.path}: 'lfm2.{KEY_VALUE_HEADS}' is {counts!r:.60}, expected 0 for layers with "
            f"a convolution and one number for the others"
        )
    return int(found.pop())


def _convolutions(file: GgufFile, sizes: DecoderSpec) -> dict[str, Any]:
    """Return layers and kernel of short convolutions as fields of the spec."""
    counts = file.metadata.get(f"{file.architecture}.{KEY_VALUE_HEADS}")
    if not isinstance(counts, list) or len(counts) != sizes.num_hidden_layers or 0 not in counts:
        raise BundleError(
            f"{file.path}: 'lfm2.{KEY_VALUE_HEADS}' is {counts!r:.60}, expected a number for each "
            f"of {sizes.num_hidden_layers} layers, 0 for those with a convolution"
        )
    layers = tuple(layer for layer, count in enumerate(counts) if not count)
    kernel = _value(file, CONVOLUTION_KERNEL, int)
    if kernel < 2:
        raise BundleError(f"{file.path}: 'lfm2.{CONVOLUTION_KERNEL}' is 1, expected 2 or more")
    return {"conv_layers": layers, "conv_kernel": kernel}


def _axes(file: GgufFile, sizes: DecoderSpec) -> dict[str, Any]:
    """Return positions of several axes, and layers after which rows are added, as fields of the
    spec."""
    key = f"{file.architecture}.{SECTIONS}"
    shares, pairs = file.metadata.get(key), sizes.rotary_channels // 2
    listed = shares if isinstance(shares, list) else []
    is_right = len(listed) == 4 and all(type(share) is int and share >= 0 for share in listed)
    if not is_right or listed[3] or sum(listed) != pairs:
        raise BundleError(
            f"{file.path}: {key!r} is {shares!r:.60}, expected three numbers whose sum is {pairs}, "
            f"half of the rotated channels, and 0"
        )
    fields: dict[str, Any] = {"rope_sections": tuple(listed[:3])}
    if file.architecture == "qwen2vl":
        return fields
    if file.architecture == "qwen35":
        return {**fields, "rope_interleaved": True}
    count = file.metadata.get(f"{file.architecture}.{DEEP_LAYERS}", 0)
    if type(count) is not int or not 0 <= count <= sizes.num_hidden_layers:
        raise BundleError(
            f"{file.path}: '{file.architecture}.{DEEP_LAYERS}' is {count!r:.60}, expected a number "
            f"up to {sizes.num_hidden_layers}, the decoder's layers"
        )
    return {**fields, "rope_interleaved": True, "deep_layers": tuple(range(count))}


def _delta(file: GgufFile, sizes: DecoderSpec) -> DecoderSpec:
    """Return the spec with gated delta layers and gated attention."""
    rotated = _value(file, "rope.dimension_count", int, sizes.head_dim)
    if rotated % 2 or rotated > sizes.head_dim:
        raise BundleError(
            f"{file.path}: rope.dimension_count is {rotated}, expected an even number up to "
            f"{sizes.head_dim}"
        )
    sizes = dataclasses.replace(sizes, rotary_dim=rotated)
    heads, groups, channels, kernel = (
        _value(file, f"ssm.{key}", int)
        for key in ("time_step_rank", "group_count", "state_size", "conv_kernel")
    )
    inner, every = _value(file, "ssm.inner_size", int), _value(file, INTERVAL, int, 4)
    layers = range(min(sizes.num_hidden_layers, MAX_LAYERS))
    found = tuple(layer for layer in layers if (layer + 1) % every)
    if (
        inner != heads * channels
        or heads % groups
        or kernel < 2
        or not found
        or every > len(layers)
    ):
        raise BundleError(
            f"{file.path}: gated delta layers of {heads} heads in {groups} groups, {channels} "
            f"channels, {inner} together, a kernel of {kernel} and attention every {every} of "
            f"{len(layers)} layers: damaged or of another kind"
        )
    delta = DeltaSpec(found, groups, heads, channels, channels, kernel)
    spec = dataclasses.replace(sizes, qk_norm=True, attention_gate=True, delta=delta)
    return dataclasses.replace(spec, **_axes(file, spec))


def _rope_scaling(file: GgufFile) -> float:
    """Return the factor of linear scaling as llama.cpp takes it: of the type ``none`` there is
    none, zero means one, and the older key counts where the newer one is missing."""
    scaling = file.metadata.get(f"{file.architecture}.rope.scaling.type", "linear")
    if scaling not in ("none", "linear"):
        raise BundleError(f"{file.path}: rope scaling {scaling!r:.60}, expected 'linear'")
    for key in ("rope.scaling.factor", "rope.scale_linear"):
        value = file.metadata.get(f"{file.architecture}.{key}")
        if value is not None:
            factor = 1.0 if value == 0.0 else _value(file, key, float)
            return 1.0 if scaling == "none" else factor
    return 1.0


def _stock(file: GgufFile, sizes: DecoderSpec) -> DecoderSpec:
    """Return the spec with the parts that an architecture of llama.cpp has without being told."""
    architecture = file.architecture
    axes = _axes(file, sizes) if architecture in ("qwen2vl", "qwen3vl") else {}
    if architecture in ("qwen2", "qwen2vl"):
        has_bias = "output.bias" in file.tensors
        return dataclasses.replace(sizes, qkv_bias=True, lm_head_bias=has_bias, **axes)
    if architecture in ("qwen3", "qwen3vl"):
        return dataclasses.replace(sizes, qk_norm=True, **axes)
    if architecture == "qwen35":
        return _delta(file, sizes)
    if architecture == "lfm2":
        return dataclasses.replace(sizes, qk_norm=True, **_convolutions(file, sizes))
    if architecture not in PATTERNS:
        return sizes
    return dataclasses.replace(
        sizes,
        hidden_act="gelu_new",
        qk_norm=architecture == "gemma3",
        post_norms=True,
        embed_scale=embed_scale(architecture, sizes.hidden_size),
        attention_scale=attention_scale(architecture, sizes),
        **_softcaps(file),
        **_sliding(file, sizes),
    )


def _softcaps(file: GgufFile) -> dict[str, Any]:
    """Return the soft caps as fields of the spec; a cap of zero is none."""
    found: dict[str, float | None] = {}
    fields = {"attention_softcap": ATTENTION_SOFTCAP, "logit_softcap": LOGIT_SOFTCAP}
    for (field, key), default in zip(
        fields.items(), SOFTCAPS.get(file.architecture, (None, None)), strict=True
    ):
        value = file.metadata.get(f"{file.architecture}.{key}", default)
        found[field] = _value(file, key, float, default) if value else None
    return found


def _sliding(file: GgufFile, sizes: DecoderSpec) -> dict[str, Any]:
    """Return window, layers and rotary base of sliding layers as fields of the spec."""
    architecture, count = file.architecture, min(sizes.num_hidden_layers, MAX_LAYERS)
    default = {"gemma2": 4096}.get(architecture, 0)
    if not file.metadata.get(f"{architecture}.{WINDOW}", default):
        return {}
    window = _value(file, WINDOW, int, default)
    pattern = file.metadata.get(f"{architecture}.{PATTERN}", PATTERNS.get(architecture, 0))
    if isinstance(pattern, list):
        is_right = len(pattern) == count and all(type(slides) is bool for slides in pattern)
        layers = [layer for layer, slides in enumerate(pattern) if slides]
    else:
        is_right = type(pattern) is int and pattern >= 0
        every = pattern if is_right else 0
        layers = [layer for layer in range(count) if not every or (layer + 1) % every]
    if not is_right:
        raise BundleError(
            f"{file.path}: '{architecture}.{PATTERN}' is {pattern!r:.60}, expected a number, or "
            f"true or false for each of {count} layers"
        )
    if not layers:
        return {}
    base: float | None = None
    if architecture == "gemma3" or f"{architecture}.{SLIDING_BASE}" in file.metadata:
        base = _value(file, SLIDING_BASE, float, 10000.0)
    return {
        "sliding_window": window,
        "sliding_layers": tuple(layers),
        "sliding_rope_theta": base,
    }


def _own(file: GgufFile, sizes: DecoderSpec) -> DecoderSpec:
    """Return the spec with what a file of our own says of its parts."""
    channels = _value(file, "rope.dimension_count", int)
    data = to_dict(sizes) | {
        "rotary_dim": None if channels == sizes.head_dim else channels,
        "qk_norm": "blk.0.attn_q_norm.weight" in file.tensors,
        "post_norms": "blk.0.post_attention_norm.weight" in file.tensors,
        "embed_scale": _value(file, EMBED_SCALE, float, 1.0),
        "experts": _experts(file, sizes.num_hidden_layers),
        **{field: _value(file, key, bool) for key, field in OWN_FLAGS.items()},
        **{field: _value(file, key, str) for key, field in OWN_KINDS.items()},
        **_softcaps(file),
        **_sliding(file, sizes),
    }
    if f"{file.architecture}.{ATTENTION_SCALE}" in file.metadata:
        data["attention_scale"] = _value(file, ATTENTION_SCALE, float)
    try:
        found = from_dict(DecoderSpec, data, str(file.path))
    except MobileVLMError as error:
        raise BundleError(f"{file.path}: damaged or of a later version: {error}") from None
    if channels > sizes.head_dim or channels % 2:
        raise BundleError(
            f"{file.path}: rope.dimension_count is {channels}, expected an even number up to "
            f"{sizes.head_dim}"
        )
    return found


def _experts(file: GgufFile, layers: int) -> dict[str, Any] | None:
    """Return the experts of a file of our own; only dense decoders of ``OWN`` say nothing."""
    counts = file.metadata.get(f"{file.architecture}.{EXPERT_COUNTS}")
    if file.architecture == OWN and counts is None:
        return None
    top_k = _value(file, "expert_used_count", int)
    if (
        not isinstance(counts, list)
        or len(counts) != layers
        or not all(type(count) is int and (count == 0 or count >= top_k) for count in counts)
        or not any(counts)
    ):
        raise BundleError(
            f"{file.path}: '{file.architecture}.{EXPERT_COUNTS}' is {counts!r:.60}, expected the "
            f"number of experts of each layer"
        )
    return {
        "layers": [layer for layer, count in enumerate(counts) if count],
        "num_experts": [count for count in counts if count],
        "top_k": top_k,
        "renormalize": _value(file, "expert_weights_norm", bool),
        "use_residual": bool(file.metadata.get(f"{file.architecture}.expert_shared_count")),
    }


def bytes_per_token(file: GgufFile, spec: DecoderSpec) -> int:
    """Bytes of weights that a decoding step reads: of sparse experts those that a token uses; of an
    embedding table a row, unless it is the head too."""
    total = 0
    for entry in decoder_entries(spec):
        tensor = file.tensors.get(entry.theirs)
        if tensor is None:
            continue
        if entry.stack and spec.experts is not None:
            total += tensor.size * spec.experts.top_k // entry.stack
        elif entry.ours == "decoder.embed_tokens.weight" and not spec.tie_word_embeddings:
            total += tensor.row_size
        else:
            total += tensor.size
    return total


def _value(file: GgufFile, key: str, kind: type[T], default: T | None = None) -> T:
    """A value of the metadata; numbers are positive."""
    key = f"{file.architecture}.{key}"
    value: Any = file.metadata.get(key, default)
    is_number = kind in (int, float)
    if type(value) is not kind or (is_number and not 0 < float(value) < _LIMIT):
        expected = f"a positive {kind.__name__}" if is_number else kind.__name__
        raise BundleError(f"{file.path}: {key!r} is {value!r:.60}, expected {expected}")
    found: T = value
    return found

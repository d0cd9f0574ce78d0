"""Language models that checkpoints are built on: their keys in config.json and their tensor names.

Sparse experts may take the place of an MLP in any of them (MoE-LLaVA's ``moe`` block, DeepSpeed's
names).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mobilevlm.checkpoint import RowRange, TensorRef, TensorSource, check_presence
from mobilevlm.decoder_spec import DecoderSpec, ExpertsSpec
from mobilevlm.errors import CheckpointError
from mobilevlm.families.config import config_value, rope_scaling
from mobilevlm.linear_groups import (
    delta_gates,
    head_group,
    layer_input_groups,
    mixer_groups,
    mlp_groups,
)

_MANY = 1000
"""Missing tensors after which no further ones are looked for."""

LLAMA_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
"""Defaults of ``LlamaConfig``: published files leave them out."""

LAYER_INPUTS = {
    "embed_layers": "embed_tokens_per_layer",
    "layer_inputs.proj": "per_layer_model_projection",
    "layer_inputs.norm": "per_layer_projection_norm",
}
"""Modules that make the own inputs of layers, with the names in checkpoints of Gemma."""

ReadDecoder = Callable[[Path, dict[str, Any]], DecoderSpec]

_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_new"}
"""Names of one function."""
DELTA_HEADS = ("decay_log", "time_bias")
"""Numbers of a gated delta layer, one for each head, which are no modules in checkpoints."""
LAYER_SCALE = ".scale"
"""A number of a layer, which is no module in checkpoints either."""
PARTIAL = "partial_rotary_factor"
"""Key of the share of a head that rotates."""
_MOE_LAYERS: dict[str, Callable[[int], range]] = {
    "sparse": lambda layers: range(0, layers, 2),
    "dense": range,
    "first_half": lambda layers: range(layers // 2),
    "second_half": lambda layers: range(layers // 2, layers),
}
"""Layers that ``moe_mode`` stands for, where they are not listed."""


@dataclass(frozen=True)
class Backbone:
    """One language model. Names are without ``.weight`` and ``.bias``; what is not listed in
    ``parts`` and ``mlp`` is called as we call it."""

    read: ReadDecoder
    root: str = "model"
    """Module above embeddings and layers, and above ``mm_projector``."""
    lm_head: str = "lm_head"
    embed_tokens: str = "embed_tokens"
    layers: str = "layers"
    norm: str = "norm"
    parts: Mapping[str, str] | None = None
    """Names of a layer's modules, without those of its MLP."""
    mlp: Mapping[str, str] | None = None
    mlp_root: str = "mlp"
    """Module above the matrices of an MLP; empty: the layer itself."""
    position_embedding: str = "embed_positions"
    position_offset: int = 0
    """Rows of that table before the first position's."""
    fused_qkv: str | None = None
    """Query, key and value are the rows of one tensor."""
    norm_offset: float = 0.0
    """Added to the weights of norms when they are read. In float32, as the official code adds
    it."""
    unused: tuple[str, ...] = ()
    """Regular expressions of further tensors that nothing reads."""


def skipped_names(spec: DecoderSpec, backbone: Backbone) -> list[str]:
    """Return regular expressions of tensors that a language model's files may hold and that have no
    effect: tables that are computed, and the copy of embeddings that are the head too."""
    root = re.escape(backbone.root)
    names = [
        *backbone.unused,
        rf"{root}\.(.*\.)?(rotary_emb\.inv_freq|attn\.masked_bias|position_ids)$",
    ]
    if spec.tie_word_embeddings:
        names.append(rf"{re.escape(backbone.lm_head)}\.weight$")
    return names


def inside(backbone: Backbone, model: str) -> Backbone:
    """The same where the language model is a module ``model`` of a larger one."""
    return replace(backbone, root=f"{model}.{backbone.root}", lm_head=f"{model}.{backbone.lm_head}")


def decoder_refs(
    files: TensorSource, spec: DecoderSpec, backbone: Backbone
) -> dict[str, TensorRef]:
    """Return the locations of a decoder's tensors by canonical name."""
    refs: dict[str, TensorRef] = {}
    absent = 0
    for module, biased in modules(spec):
        name, rows = stored_name(module, spec, backbone)
        offset = backbone.norm_offset if module.endswith("norm") else 0.0
        if module.endswith("delta.norm"):
            offset = 0.0  # whose weights are whole
        for part in ("weight", "bias") if biased else ("weight",):
            added = offset if part == "weight" else 0.0
            theirs = stored_tensor(module, name, part)
            refs[f"decoder.{module}.{part}"] = TensorRef(files, theirs, rows, added=added)
            absent += theirs not in files
        if absent > _MANY:
            check_presence(refs)
    if spec.tie_word_embeddings:
        refs["decoder.lm_head.weight"] = refs["decoder.embed_tokens.weight"]
    return refs


def modules(spec: DecoderSpec) -> Iterator[tuple[str, bool]]:
    """Canonical names below ``decoder.``, each with whether it has a bias."""
    normed = spec.norm == "layer"
    yield "embed_tokens", False
    if spec.learned_positions:
        yield "position_embedding", False
    if spec.layer_input_size:
        yield from ((name, False) for name in LAYER_INPUTS)
    yield "norm", normed
    yield "lm_head", head_group(spec).biased
    for index in range(spec.num_hidden_layers):
        layer = f"layers.{index}"
        yield f"{layer}.input_norm", normed
        if not spec.parallel_residual:
            yield f"{layer}.post_attention_norm", normed
        if spec.post_norms:
            yield f"{layer}.attn_output_norm", normed
            yield f"{layer}.mlp_output_norm", normed
        mixer, mixing = spec.mixer(index), list(mixer_groups(spec, index, layer))
        if mixer == "short_conv":
            yield f"{layer}.short_conv.conv", spec.conv_bias
        if mixer == "delta":
            yield from ((f"{layer}.delta.{part}", False) for part in ("conv", "norm", *DELTA_HEADS))
            mixing.append(delta_gates(spec, f"{layer}.delta"))
        if spec.qk_norm and mixer == "attn":
            yield f"{layer}.attn.q_norm", False
            if spec.kv_layer(index) == index:
                yield f"{layer}.attn.k_norm", False
        for group in mixing:
            yield from ((name, group.biased) for name in group.names)
        if spec.num_experts(index):
            yield f"{layer}.mlp.router", False
        if spec.num_experts(index) and spec.experts is not None and spec.experts.use_residual:
            yield f"{layer}.mlp.coefficient", True
        for mlp in spec.mlp_names(index):
            for group in mlp_groups(spec, mlp.removeprefix("decoder.")):
                yield from ((name, group.biased) for name in group.names)
        if spec.layer_input_size:
            own = f"{layer}.layer_input"
            yield f"{own}.norm", normed
            yield from ((group.name, False) for group in layer_input_groups(spec, own))
        if spec.layer_scale:
            yield f"{layer}{LAYER_SCALE}", False


def stored_tensor(module: str, name: str, part: str) -> str:
    """Return the checkpoint's name of a module's weight or bias. ``name``: that of the module."""
    plain = module.endswith((*DELTA_HEADS, LAYER_SCALE))
    return name if plain else f"{name}.{part}"


def stored_name(module: str, spec: DecoderSpec, backbone: Backbone) -> tuple[str, RowRange | None]:
    """The checkpoint's name of a module, and the rows that it is, where it is a part."""
    if module == "lm_head":
        return backbone.lm_head, None
    if module == "position_embedding":
        first = backbone.position_offset
        stop = first + spec.context_length
        return f"{backbone.root}.{backbone.position_embedding}", RowRange(first, stop, stop)
    if module in LAYER_INPUTS:
        return f"{backbone.root}.{LAYER_INPUTS[module]}", None
    if not module.startswith("layers."):
        return f"{backbone.root}.{getattr(backbone, module)}", None
    _, index, part = module.split(".", 2)
    layer = f"{backbone.root}.{backbone.layers}.{index}"
    if backbone.fused_qkv is not None and part in _QKV:
        return f"{layer}.{backbone.fused_qkv}", _qkv_rows(spec, _QKV.index(part))
    if not part.startswith("mlp."):
        return f"{layer}.{(backbone.parts or {}).get(part, part)}", None
    place, _, linear = part.removeprefix("mlp.").rpartition(".")
    if linear == "router":
        return f"{layer}.mlp.deepspeed_moe.gate.wg", None
    outer = [backbone.mlp_root] if backbone.mlp_root else []
    if place.startswith("experts."):
        outer.append(f"deepspeed_moe.experts.deepspeed_experts.{place.removeprefix('experts.')}")
    elif place == "residual":
        outer.append("mlp")
    return ".".join([layer, *outer, (backbone.mlp or {}).get(linear, linear)]), None


_QKV = ("attn.q_proj", "attn.k_proj", "attn.v_proj")


def _qkv_rows(spec: DecoderSpec, part: int) -> RowRange:
    heads = (spec.num_attention_heads, spec.num_key_value_heads, spec.num_key_value_heads)
    sizes = [count * spec.head_dim for count in heads]
    return RowRange(sum(sizes[:part]), sum(sizes[: part + 1]), sum(sizes))


def _experts(path: Path, config: dict[str, Any], layers: int) -> ExpertsSpec | None:
    """The ``moe`` block of MoE-LLaVA's config.json; capacities and noise are not read: they are
    for training (docs/explanation/moe.md)."""
    moe = config.get("moe")
    if moe is None:
        return None
    if not isinstance(moe, dict):
        raise CheckpointError(f"{path}: 'moe' is {moe!r:.60}, expected an object")
    if moe.get("moe_enable") is False:
        return None
    places: Any = moe.get("moe_layers_idx")
    counts: Any = moe.get("num_experts")
    if places is None:
        mode = moe.get("moe_mode")
        if not isinstance(mode, str) or mode not in _MOE_LAYERS:
            known = ", ".join(_MOE_LAYERS)
            raise CheckpointError(
                f"{path}: 'moe.moe_mode' is {mode!r:.60}, expected one of {known}"
            )
        places = list(_MOE_LAYERS[mode](layers))
    if not _are_numbers(places, 0, layers - 1) or len(set(places)) < len(places):
        raise CheckpointError(
            f"{path}: 'moe.moe_layers_idx' is {places!r:.60}, expected layers from 0 to "
            f"{layers - 1}"
        )
    top_k = config_value(path, moe, "top_k_experts", int, 2)
    if isinstance(counts, list) and len(counts) == 1:
        counts = counts * len(places)
    if not _are_numbers(counts, top_k, 1 << 10) or len(counts) != len(places):
        raise CheckpointError(
            f"{path}: 'moe.num_experts' is {counts!r:.60}, expected a number for each of "
            f"{len(places)} layers, none below {top_k} ('top_k_experts')"
        )
    ordered = sorted(zip(places, counts, strict=True))
    return ExpertsSpec(
        layers=tuple(place for place, _ in ordered),
        num_experts=tuple(count for _, count in ordered),
        top_k=top_k,
        renormalize=top_k > 1,  # DeepSpeed's top-1 gate leaves the probability as it is
        use_residual=bool(moe.get("use_residual", False)),
    )


def _are_numbers(value: Any, lowest: int, highest: int) -> bool:
    """Return whether a value is a list, not empty, of integers in a range."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(type(item) is int and lowest <= item <= highest for item in value)
    )


def _attention_sizes(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """``hidden_size`` and heads, checked to divide."""
    hidden = config_value(path, config, "hidden_size", int)
    heads = config_value(path, config, "num_attention_heads", int)
    key_value_heads = config_value(path, config, "num_key_value_heads", int, heads)
    head_dim = config_value(path, config, "head_dim", int, max(hidden // heads, 1))
    if (hidden % heads and config.get("head_dim") is None) or heads % key_value_heads:
        raise CheckpointError(
            f"{path}: 'hidden_size' must be a multiple of 'num_attention_heads', and that of "
            f"'num_key_value_heads': found {hidden}, {heads} and {key_value_heads}"
        )
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": head_dim,
    }


def common_values(
    path: Path, config: dict[str, Any], activation: str, key: str = "hidden_act"
) -> dict[str, Any]:
    """Return the fields that every backbone's configuration names alike. ``key``: that of the
    activation."""
    config = with_rope_parameters(path, config)
    found = config_value(path, config, key, str, activation)
    if found != activation:
        raise CheckpointError(f"{path}: {key!r} is {found!r}, expected {activation!r}")
    layers = config_value(path, config, "num_hidden_layers", int)
    scaling = rope_scaling(path, config)
    trained = config_value(path, config, "max_position_embeddings", int)
    longest = {"max_position_embeddings": int(trained * scaling)}
    return {
        **_attention_sizes(path, config),
        "vocab_size": config_value(path, config, "vocab_size", int),
        "intermediate_size": config_value(path, config, "intermediate_size", int),
        "num_hidden_layers": layers,
        "rope_theta": config_value(path, config, "rope_theta", float, 10000.0),
        "rope_scaling": scaling,
        "context_length": config_value(path, longest, "max_position_embeddings", int),
        "tie_word_embeddings": config_value(path, config, "tie_word_embeddings", bool, False),
        "hidden_act": _ACTIVATIONS.get(activation, activation),
        "experts": _experts(path, config, layers),
    }


def with_rope_parameters(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with the keys that transformers 5 has joined in ``rope_parameters``
    (or leaves in ``rope_scaling``) as they were before.

    Raises:
        CheckpointError: two places say different things.
    """
    scaling = config_value(path, config, "rope_scaling", dict, {})
    joined = config_value(path, config, "rope_parameters", dict, scaling)
    inside = {key: joined[key] for key in ("rope_theta", PARTIAL) if joined.get(key) is not None}
    outside: dict[str, Any] = {"rope_scaling": joined, **inside}
    for key, value in outside.items():
        if config.get(key) not in (None, {}, value):
            raise CheckpointError(
                f"{path}: {key!r} is {config[key]!r:.60}, but {value!r:.60} where transformers 5 "
                f"keeps it ('rope_parameters'): remove the one that is wrong"
            )
    return {**config, **outside}


def rotary_dim(path: Path, config: dict[str, Any], key: str, head_dim: int) -> int:
    """Rotated channels of a head: an even number of them."""
    share = config_value(path, config, key, float)
    channels = int(head_dim * min(share, 2.0))
    if channels % 2 or channels > head_dim:
        raise CheckpointError(
            f"{path}: {key!r} {share} of {head_dim} channels are {channels}, expected an even "
            f"number up to {head_dim}"
        )
    return channels


def read_llama(path: Path, config: dict[str, Any]) -> DecoderSpec:
    """Read ``LlamaConfig``."""
    biased = config_value(path, config, "attention_bias", bool, False)
    common = common_values(path, config, "silu")
    if common["head_dim"] % 2:
        raise CheckpointError(
            f"{path}: heads have {common['head_dim']} channels, expected an even number: rotary "
            f"positions turn pairs"
        )
    return DecoderSpec(
        **common,
        norm_eps=config_value(path, config, "rms_norm_eps", float, 1e-6),
        qkv_bias=biased,
        o_bias=biased,
        mlp_bias=config_value(path, config, "mlp_bias", bool, False),
    )


def _read_stablelm(path: Path, config: dict[str, Any]) -> DecoderSpec:
    """``StableLMEpochConfig``."""
    common = common_values(path, config, "silu")
    return DecoderSpec(
        **common,
        norm_eps=config_value(path, config, "norm_eps", float, 1e-5),
        norm="layer",
        rotary_dim=rotary_dim(path, config, "rope_pct", common["head_dim"]),
        qkv_bias=config_value(path, config, "use_qkv_bias", bool, True),
    )


def _read_phi(path: Path, config: dict[str, Any]) -> DecoderSpec:
    """``PhiConfig`` as of Phi-2; MoE-LLaVA's class leaves the bias of ``lm_head`` out."""
    if config.get("qk_layernorm"):
        raise CheckpointError(
            f"{path}: norms of queries and keys ('qk_layernorm') are not supported"
        )
    common = common_values(path, config, "gelu_new")
    joined = with_rope_parameters(path, config)
    return DecoderSpec(
        **common,
        norm_eps=config_value(path, config, "layer_norm_eps", float, 1e-5),
        norm="layer",
        rotary_dim=rotary_dim(path, joined, PARTIAL, common["head_dim"]),
        qkv_bias=True,
        o_bias=True,
        mlp="plain",
        mlp_bias=True,
        parallel_residual=True,
    )


def _read_qwen(path: Path, config: dict[str, Any]) -> DecoderSpec:
    """``QWenConfig`` of the first generation. Beyond ``seq_length`` its rotary base and scores
    change (dynamic NTK, log-n), so the context ends there."""
    common = common_values(path, config, "silu")
    head_dim = config_value(path, config, "kv_channels", int, common["head_dim"])
    stretched = config.get("use_dynamic_ntk") or config.get("use_logn_attn")
    trained = config_value(path, config, "seq_length", int, common["context_length"])
    biased = config_value(path, config, "no_bias", bool, True) is False
    return DecoderSpec(
        **common
        | {
            "head_dim": head_dim,
            "intermediate_size": common["intermediate_size"] // 2,
            "rope_theta": config_value(path, config, "rotary_emb_base", float, 10000.0),
            "context_length": min(trained, common["context_length"])
            if stretched
            else common["context_length"],
        },
        norm_eps=config_value(path, config, "layer_norm_epsilon", float, 1e-6),
        rotary_dim=rotary_dim(path, {"rotary_pct": 1.0, **config}, "rotary_pct", head_dim),
        qkv_bias=True,
        o_bias=biased,
        mlp_bias=biased,
    )


def _read_opt(path: Path, config: dict[str, Any]) -> DecoderSpec:
    """``OPTConfig`` of all sizes but 350M, whose norms stand elsewhere."""
    hidden = config_value(path, config, "hidden_size", int)
    expected: dict[str, Any] = {
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "word_embed_proj_dim": hidden,
    }
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise CheckpointError(f"{path}: {key!r} is {config[key]!r:.60}, expected {value!r}")
    return DecoderSpec(
        **_attention_sizes(path, config),
        vocab_size=config_value(path, config, "vocab_size", int),
        intermediate_size=config_value(path, config, "ffn_dim", int),
        num_hidden_layers=config_value(path, config, "num_hidden_layers", int),
        norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=1.0,
        context_length=config_value(path, config, "max_position_embeddings", int),
        tie_word_embeddings=config_value(path, config, "tie_word_embeddings", bool, True),
        norm="layer",
        rotary_dim=0,
        learned_positions=True,
        qkv_bias=True,
        o_bias=True,
        mlp="plain",
        hidden_act="relu",
        mlp_bias=True,
    )


LLAMA_PARTS = {
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    **{f"attn.{part}_proj": f"self_attn.{part}_proj" for part in "qkvo"},
}
LLAMA = Backbone(read_llama, parts=LLAMA_PARTS)
STABLELM = Backbone(_read_stablelm, parts=LLAMA_PARTS)
PHI = Backbone(
    _read_phi, norm="final_layernorm", parts={**LLAMA_PARTS, "attn.o_proj": "self_attn.dense"}
)
OPT = Backbone(
    _read_opt,
    root="model.decoder",
    norm="final_layer_norm",
    parts={
        "input_norm": "self_attn_layer_norm",
        "post_attention_norm": "final_layer_norm",
        **{f"attn.{part}_proj": f"self_attn.{part}_proj" for part in "qkv"},
        "attn.o_proj": "self_attn.out_proj",
    },
    mlp_root="",
    position_offset=2,
)
QWEN = Backbone(
    _read_qwen,
    root="transformer",
    embed_tokens="wte",
    layers="h",
    norm="ln_f",
    parts={"input_norm": "ln_1", "post_attention_norm": "ln_2", "attn.o_proj": "attn.c_proj"},
    mlp={"gate_proj": "w2", "up_proj": "w1", "down_proj": "c_proj"},
    fused_qkv="attn.c_attn",
)

"""Rules for the metadata keys of a GGUF file: each is read, has no effect here, or is refused.

The rules cover the architectures and projectors that are run; ``{arch}`` stands for the file's
architecture and ``*`` for anything. Source: ggml-org/llama.cpp, src/llama-model.cpp (load_hparams),
src/llama-vocab.cpp (load) and tools/mtmd/clip.cpp (load_hparams); names as in gguf-py's constants.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, Literal

from mobilevlm.errors import BundleError
from mobilevlm.gguf.file import GgufFile

Use = Literal["read", "no effect", "refused"]


@dataclass(frozen=True)
class Rule:
    """Use of the keys of a pattern."""

    pattern: str
    use: Use
    kind: str = ""
    """Type that the value must have, as :class:`mobilevlm.gguf.file.GgufFile` names it; libraries
    end the process at another one. Empty: any."""
    neutral: tuple[Any, ...] = ()
    """Values of a refused key that change nothing."""
    why: str = ""
    """Meaning of a refused key, for the message."""


DESCRIPTIVE = "general.*"
"""Keys by which a file describes itself; libraries read those that other rules name."""


def _rules(use: Use, kind: str, *patterns: str, why: str = "") -> tuple[Rule, ...]:
    return tuple(Rule(pattern, use, kind, why=why) for pattern in patterns)


def _unless(
    neutral: tuple[Any, ...], *patterns: str, why: str = "", kind: str = ""
) -> tuple[Rule, ...]:
    return tuple(Rule(pattern, "refused", kind, neutral, why) for pattern in patterns)


_GENERAL = (
    *_rules("read", "string", "general.architecture", "general.name"),
    *_rules("read", "u32", "general.alignment"),
    *_rules("no effect", "u32", "general.file_type", "general.quantization_version"),
    *_rules("no effect", "string", "general.description"),
    Rule("general.type", "refused", "string", ("model", "mmproj", "clip-vision"), "another file"),
    *_rules(
        "no effect", "", "general.author", "general.version", "general.organization",
        "general.finetune", "general.basename", "general.quantized_by", "general.size_label",
        "general.license*", "general.url", "general.doi", "general.uuid", "general.repo_url",
        "general.source.*", "general.base_model.*", "general.dataset.*", "general.tags",
        "general.languages", "general.datasets", "general.sampling.*", "quantize.imatrix.*",
    ),
    *_unless((), "general.tensor_extra.*", why="settings of single tensors"),
    Rule(DESCRIPTIVE, "no effect"),
    *_rules("read", "", "split.no", "split.count", "split.tensors.count"),
    *_unless((), "adapter.*", why="an adapter, not a model: merge it into its model first"),
    *_unless((), "imatrix.*", why="an importance matrix, not a model"),
    *_unless((), "diffusion.*", "xielu.*", why="another kind of model"),
)  # fmt: skip

_DECODER = (
    *_rules(
        "read", "u32", "{arch}.context_length", "{arch}.embedding_length", "{arch}.block_count",
        "{arch}.feed_forward_length", "{arch}.attention.head_count",
        "{arch}.attention.head_count_kv", "{arch}.attention.key_length",
        "{arch}.attention.value_length", "{arch}.rope.dimension_count", "{arch}.vocab_size",
    ),
    *_rules(
        "read", "f32", "{arch}.attention.layer_norm_rms_epsilon", "{arch}.rope.freq_base",
        "{arch}.rope.scaling.factor", "{arch}.rope.scale_linear",
    ),
    *_rules("read", "string", "{arch}.rope.scaling.type"),
    *_rules("no effect", "f32", "{arch}.attention.layer_norm_epsilon"),
    *_rules("no effect", "bool", "{arch}.rope.scaling.finetuned"),
    *_rules("no effect", "u32", "{arch}.rope.scaling.original_context_length"),
    *_rules("no effect", "", "{arch}.tensor_data_layout", "{arch}.rope.scaling.yarn_*"),
    *_unless(
        (0, 1.0), "{arch}.rope.scaling.attn_factor", "{arch}.rope.scaling.alpha",
        why="rotary scaling other than linear",
    ),
    *_unless((True,), "{arch}.attention.causal", why="attention that is not causal"),
    *_unless(
        (0,), "{arch}.expert_count", "{arch}.expert_used_count", "{arch}.expert_shared_count",
        "{arch}.expert_group_count", "{arch}.expert_group_used_count",
        "{arch}.expert_feed_forward_length", "{arch}.expert_shared_feed_forward_length",
        "{arch}.expert_chunk_feed_forward_length", "{arch}.expert_weights_norm",
        "{arch}.expert_gating_func", "{arch}.expert_group_scale", "{arch}.experts_per_group",
        "{arch}.moe_*", "{arch}.interleave_moe_layer_step", "{arch}.leading_dense_block_count",
        why="experts of this kind",
    ),
    *_unless((0, 1.0), "{arch}.expert_weights_scale", why="scaled experts"),
    *_unless(
        (0, 1.0), "{arch}.logit_scale", "{arch}.residual_scale", "{arch}.embedding_scale",
        "{arch}.attention.scale", "{arch}.attention.output_scale",
        "{arch}.attention.temperature_scale", why="scaled states",
    ),
    *_unless(
        (0,), "{arch}.attn_logit_softcapping", "{arch}.final_logit_softcapping",
        "{arch}.router_logit_softcapping", "{arch}.attention.max_alibi_bias",
        "{arch}.attention.clamp_kqv", "{arch}.attention.temperature_length",
        "{arch}.swiglu_clamp_*", why="clamped or biased states",
    ),
    *_unless(
        (0,), "{arch}.attention.sliding_window", "{arch}.attention.sliding_window_pattern",
        "{arch}.attention.shared_kv_layers", why="attention over a window",
    ),
    *_unless(
        (0,), "{arch}.pooling_type", "{arch}.classifier*", "{arch}.nextn_predict_layers",
        "{arch}.n_deepstack_layers", "{arch}.use_parallel_residual",
        why="a model of another kind",
    ),
    *_unless(
        (), "{arch}.embedding_length_out", "{arch}.features_length",
        "{arch}.decoder_start_token_id", "{arch}.decoder_block_count", "{arch}.swin_norm",
        "{arch}.rescale_every_n_layers", "{arch}.time_*", "{arch}.token_shift_count",
        "{arch}.full_attention_interval", "{arch}.activation_sparsity_scale", "{arch}.altup.*",
        "{arch}.embedding_length_per_layer_input", "{arch}.{dense}_feat_*",
        "{arch}.attention.group_norm_*", "{arch}.attention.*_lora_rank",
        "{arch}.attention.relative_buckets_count", "{arch}.attention.*_mla",
        "{arch}.attention.*_swa", "{arch}.attention.indexer.*", "{arch}.rope.*_swa",
        "{arch}.rope.dimension_sections", "{arch}.ssm.*", "{arch}.kda.*", "{arch}.wkv.*",
        "{arch}.posnet.*", "{arch}.convnext.*", "{arch}.shortconv.*",
        why="a model of another kind",
    ),
)  # fmt: skip

_SLIDING = (
    *_rules("read", "u32", "{arch}.attention.sliding_window"),
    *_rules("read", "", "{arch}.attention.sliding_window_pattern"),
    *_rules("read", "f32", "{arch}.rope.freq_base_swa", "{arch}.final_logit_softcapping"),
)
"""These and the next four go before those of all decoders."""

_CAPPED = (*_SLIDING, *_rules("read", "f32", "{arch}.attn_logit_softcapping"))

_LFM2 = (
    *_rules("read", "u32", "{arch}.shortconv.l_cache"),
    *_rules("read", "", "{arch}.attention.head_count_kv"),
)

_DELTA = _rules(
    "read", "u32", "{arch}.ssm.conv_kernel", "{arch}.ssm.state_size", "{arch}.ssm.group_count",
    "{arch}.ssm.time_step_rank", "{arch}.ssm.inner_size", "{arch}.full_attention_interval",
)  # fmt: skip
_AXES = _rules("read", "array of i32", "{arch}.rope.dimension_sections")
_DEEP = _rules("read", "u32", "{arch}.n_deepstack_layers")

_OWN_DECODER = (
    *_CAPPED,
    *_rules("read", "f32", "{arch}.embedding_scale", "{arch}.attention.scale"),
    *_rules(
        "read", "u32", "{arch}.expert_count", "{arch}.expert_used_count",
        "{arch}.expert_shared_count",
    ),
    *_rules("read", "f32", "{arch}.attention.layer_norm_epsilon"),
    *_rules("read", "array of i32", "{arch}.expert_counts"),
    *_rules(
        "read", "bool", "{arch}.expert_weights_norm", "{arch}.attention.qkv_bias",
        "{arch}.attention.output_bias", "{arch}.feed_forward.bias", "{arch}.output_bias",
        "{arch}.use_parallel_residual",
    ),
    *_rules("read", "string", "{arch}.feed_forward.kind", "{arch}.hidden_activation"),
)  # fmt: skip

_TOKENIZER = (
    *_rules(
        "read", "string", "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template",
        "tokenizer.huggingface.json",
    ),
    *_rules("read", "array of string", "tokenizer.ggml.tokens", "tokenizer.ggml.merges"),
    *_rules("read", "array of f32", "tokenizer.ggml.scores"),
    *_rules("read", "array of i32", "tokenizer.ggml.token_type"),
    *_rules("read", "bool", "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix"),
    *_rules(
        "read", "u32", "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id",
        "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id",
    ),
    *_rules(
        "no effect", "u32", "tokenizer.ggml.unknown_token_id", "tokenizer.ggml.seperator_token_id",
        "tokenizer.ggml.padding_token_id", "tokenizer.ggml.mask_token_id",
        "tokenizer.ggml.cls_token_id", "tokenizer.ggml.fim_???_token_id",
        "tokenizer.ggml.prefix_token_id", "tokenizer.ggml.suffix_token_id",
        "tokenizer.ggml.middle_token_id", "tokenizer.ggml.token_type_count",
    ),
    *_rules("no effect", "", "tokenizer.chat_template.*", "tokenizer.chat_templates"),
    *_unless(
        (False,), "tokenizer.ggml.add_eos_token", "tokenizer.ggml.add_sep_token",
        why="a token after each text",
    ),
    *_unless(
        (False, []), "tokenizer.ggml.remove_extra_whitespaces",
        "tokenizer.ggml.precompiled_charsmap", "tokenizer.ggml.normalizer.*",
        why="a tokenizer that changes the text",
    ),
    *_unless(([],), "tokenizer.ggml.suppress_tokens", why="tokens that must not be chosen"),
    *_unless(("",), "tokenizer.rwkv.world", why="RWKV's tokenizer"),
)  # fmt: skip

_ENCODER = (
    *_rules(
        "read", "u32", "clip.vision.image_size", "clip.vision.patch_size",
        "clip.vision.embedding_length", "clip.vision.feed_forward_length",
        "clip.vision.block_count", "clip.vision.attention.head_count",
    ),
    *_rules("read", "f32", "clip.vision.attention.layer_norm_epsilon"),
    *_rules("read", "array of f32", "clip.vision.image_mean", "clip.vision.image_std"),
    *_rules("read", "array of i32", "clip.vision.feature_layer"),
    *_rules("read", "string", "clip.projector_type"),
    *_unless((), "clip.vision.projector_type", why="more than one encoder"),
    *_rules("read", "bool", "clip.use_gelu", "clip.has_vision_encoder"),
    *_rules("no effect", "u32", "clip.vision.projection_dim", "clip.vision.image_crop_resolution"),
    *_rules("no effect", "bool", "clip.has_llava_projector"),
    *_rules("no effect", "", "clip.text.*"),
    *_rules("read", "string", "clip.vision.image_aspect_ratio"),
    *_unless((False,), "clip.use_silu", why="SiLU in the image encoder", kind="bool"),
    *_unless((False,), "clip.has_text_encoder", why="a text encoder", kind="bool"),
    *_unless(
        (False,), "clip.has_audio_encoder", "clip.has_gen_audio_encoder", why="an audio encoder",
        kind="bool",
    ),
    *_unless(
        ([],), "clip.vision.image_grid_pinpoints", why="images cut into tiles (LLaVA-1.6)",
        kind="array of i32",
    ),
    *_unless(
        ("flat",), "clip.vision.mm_patch_merge_type", why="images cut into tiles (LLaVA-1.6)",
        kind="string",
    ),
    *_unless((0,), "clip.minicpmv_version", why="another projector", kind="i32"),
    *_unless((0,), "clip.minicpmv_query_num", why="another projector", kind="u32"),
    *_unless(
        (), "clip.vision.attention.head_count_kv", "clip.vision.attention.head_dim",
        "clip.vision.image_min_pixels", "clip.vision.image_max_pixels", "clip.vision.preproc_*",
        "clip.vision.spatial_merge_size", "clip.vision.n_wa_pattern",
        "clip.vision.wa_layer_indexes", "clip.vision.wa_pattern_mode",
        "clip.vision.is_deepstack_layers", "clip.vision.window_size",
        "clip.vision.expert_used_count", "clip.vision.swiglu_clamp", "clip.vision.projector.*",
        "clip.vision.sam.*", "clip.audio.*", "clip.gen.*", why="another image encoder or projector",
    ),
)  # fmt: skip

_SCALED = (
    *_rules("read", "u32", "clip.vision.projector.scale_factor"),
    *_unless((), "clip.vision.image_aspect_ratio", why="another preparation of images"),
)
"""This and the next two go before those of all encoders."""
_IDEFICS3 = (*_rules("read", "u32", "clip.vision.preproc_image_size"), *_SCALED)
_INTERNVL = (
    *_rules("read", "u32", "clip.vision.preproc_min_tiles", "clip.vision.preproc_max_tiles"),
    *_SCALED,
)

Role = Literal[
    "decoder",
    "gemma2",
    "gemma3",
    "lfm2",
    "qwen2vl",
    "qwen3vl",
    "qwen35",
    "own decoder",
    "encoder",
    "idefics3",
    "internvl",
]
RULES: dict[Role, tuple[Rule, ...]] = {
    "decoder": (*_GENERAL, *_DECODER, *_TOKENIZER),
    "gemma2": (*_GENERAL, *_CAPPED, *_DECODER, *_TOKENIZER),
    "gemma3": (*_GENERAL, *_SLIDING, *_DECODER, *_TOKENIZER),
    "lfm2": (*_GENERAL, *_LFM2, *_DECODER, *_TOKENIZER),
    "qwen2vl": (*_GENERAL, *_AXES, *_DECODER, *_TOKENIZER),
    "qwen3vl": (*_GENERAL, *_AXES, *_DEEP, *_DECODER, *_TOKENIZER),
    "qwen35": (*_GENERAL, *_AXES, *_DELTA, *_DECODER, *_TOKENIZER),
    "own decoder": (*_GENERAL, *_OWN_DECODER, *_DECODER, *_TOKENIZER),
    "encoder": (*_GENERAL, *_ENCODER),
    "idefics3": (*_GENERAL, *_IDEFICS3, *_ENCODER),
    "internvl": (*_GENERAL, *_INTERNVL, *_ENCODER),
}
_OF_DECODERS = ("{arch}.", "tokenizer.", "general.", "split.", "adapter.", "imatrix.")
_OF_ENCODERS = ("clip.", "general.", "split.", "adapter.", "imatrix.")
NAMESPACES: dict[Role, tuple[str, ...]] = {
    "decoder": _OF_DECODERS,
    "gemma2": _OF_DECODERS,
    "gemma3": _OF_DECODERS,
    "lfm2": _OF_DECODERS,
    "qwen2vl": _OF_DECODERS,
    "qwen3vl": _OF_DECODERS,
    "qwen35": _OF_DECODERS,
    "own decoder": _OF_DECODERS,
    "encoder": _OF_ENCODERS,
    "idefics3": _OF_ENCODERS,
    "internvl": _OF_ENCODERS,
}
"""Beginnings of the keys that a library reads of such a file; all others are without effect."""


@lru_cache(maxsize=4096)
def rule_of(name: str, role: Role) -> Rule | None:
    """Return the first rule that a key falls under. ``name``: with ``{arch}``."""
    return next((rule for rule in RULES[role] if fnmatchcase(name, rule.pattern)), None)


def rule_name(key: str, architecture: str) -> str:
    """Return a key as rules name it."""
    own = f"{architecture}."
    return "{arch}." + key.removeprefix(own) if architecture and key.startswith(own) else key


def check_keys(file: GgufFile, role: Role) -> None:
    """Refuse a file with a key that would have an effect and has none here, that is not known, or
    whose value is of another type than libraries take.

    Raises:
        BundleError: names the first such key.
    """
    for key, value in file.metadata.items():
        name = rule_name(key, "" if file.architecture == "clip" else file.architecture)
        if not name.startswith(NAMESPACES[role]):
            continue
        rule, kind = rule_of(name, role), file.kinds[key]
        if rule is None:
            raise BundleError(
                f"{file.path}: key {key[:80]!r} is not known to this version: its effect "
                f"would be missing: take the file without it, or update mobilevlm"
            )
        if rule.use == "refused" and value not in rule.neutral:
            raise BundleError(
                f"{file.path}: {key[:80]!r} is {value!r:.60}: {rule.why}, which is not supported"
            )
        if rule.kind and rule.kind != kind:
            raise BundleError(
                f"{file.path}: {key[:80]!r} is {value!r:.60} of type {kind}, expected {rule.kind}: "
                f"convert the model again"
            )

"""BLIP-2 and InstructBLIP: a ViT of EVA's shape, a Q-Former, and a frozen language model (OPT,
Llama or Vicuna, Flan-T5), in the layout of transformers.

Official code: transformers (models/blip_2, models/instructblip), of LAVIS (Li et al. 2023, Dai et
al. 2023). Its configurations leave out what is the default, so the defaults are here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobilevlm.checkpoint import (
    RowRange,
    TensorRef,
    TensorSource,
    Weights,
    check_presence,
    read_json,
)
from mobilevlm.connector_spec import ConnectorSpec, QFormerSpec
from mobilevlm.conversation import turns_template
from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import CheckpointError
from mobilevlm.families.backbones import (
    LLAMA,
    LLAMA_DEFAULTS,
    OPT,
    Backbone,
    ReadDecoder,
    decoder_refs,
    inside,
    skipped_names,
)
from mobilevlm.families.config import config_value, end_ids, refuse_quantized
from mobilevlm.families.registry import Source, register
from mobilevlm.families.t5 import DEFAULTS as T5_DEFAULTS
from mobilevlm.families.t5 import read_t5, skipped_t5_names, t5_refs
from mobilevlm.families.towers import Tower, image_spec, transformer_spec
from mobilevlm.image_encoder import TransformerEncoder
from mobilevlm.input_spec import InputSpec, LayoutSpec
from mobilevlm.spec import IMAGE_PLACEHOLDER, ConversationSpec, ModelSpec

_VISION: dict[str, Any] = {
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
}
_QFORMER: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
    "cross_attention_frequency": 2,
}
_QUERIES = 32


@dataclass(frozen=True)
class _Language:
    read: ReadDecoder
    refs: Callable[[TensorSource, DecoderSpec], dict[str, TensorRef]]
    skipped: Callable[[DecoderSpec], list[str]]
    """Regular expressions of tensors without effect."""
    defaults: dict[str, Any]


def _decoder_only(backbone: Backbone, defaults: dict[str, Any]) -> _Language:
    placed = inside(backbone, _LANGUAGE_MODEL)
    return _Language(
        backbone.read,
        lambda files, spec: decoder_refs(files, spec, placed),
        lambda spec: skipped_names(spec, placed),
        defaults,
    )


_LANGUAGE_MODEL = "language_model"
_LANGUAGES = {
    "t5": _Language(
        read_t5,
        lambda files, spec: t5_refs(files, spec, _LANGUAGE_MODEL),
        lambda spec: skipped_t5_names(spec, _LANGUAGE_MODEL),
        T5_DEFAULTS,
    ),
    "opt": _decoder_only(
        OPT,
        {
            "vocab_size": 50272,
            "hidden_size": 768,
            "ffn_dim": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 2048,
            "eos_token_id": 2,
        },
    ),
    "llama": _decoder_only(
        LLAMA,
        {**LLAMA_DEFAULTS, "eos_token_id": 2},
    ),
}
"""By ``model_type`` of the language model."""
CONVERSATIONS = {
    "plain": turns_template(),
    "vqa": turns_template("Question: ", " Answer:"),
}
"""``plain``: what the user says is the prompt, as the official processors have it; ``vqa``: between
the words that the papers ask questions with."""


@register(
    "blip", {"blip-2", "instructblip"}, keys={"qformer_config", "text_config"}, ready_tokenizer=True
)
def read_blip(source: Source) -> tuple[ModelSpec, Weights]:
    """Reads a BLIP-2 or InstructBLIP checkpoint. Only the latter's Q-Former reads the prompt."""
    path, config = source.folder / "config.json", source.config
    files = source.weight_files()
    vision = _vision_spec(path, _section(path, config, "vision_config", _VISION))
    language, text = _language(path, config)
    decoder = language.read(path, text)
    qformer = _qformer_spec(path, config, vision)
    projector = ConnectorSpec(
        "qformer", vision.hidden_size, decoder.hidden_size, 1, vision.grid, 0, qformer=qformer
    )
    preparation = image_spec(_tower(path), vision, "resize")
    spec = ModelSpec(
        family="instructblip" if projector.reads_text else "blip2",
        name=source.name,
        inputs={"image": InputSpec(preparation, vision, projector, _layout(source, qformer))},
        decoder=decoder,
        conversation=_conversation(source, text),
    )
    refs = language.refs(files, decoder)
    refs |= _tower_refs(files, vision) | qformer_refs(files, qformer)
    for part in ("weight", "bias"):
        refs[f"projector.mlp.0.{part}"] = TensorRef(files, f"language_projection.{part}")
    check_presence(refs)
    last = qformer.num_hidden_layers - 1
    unused = rf"qformer\.encoder\.layer\.{last}\.(intermediate|output)\."  # of the text's states
    positions = r"(qformer|vision_model)\.embeddings\.position_ids$"
    source.check_unread(
        refs, files, [*language.skipped(decoder), positions, *[unused] * projector.reads_text]
    )
    return spec, Weights(refs)


def _section(
    path: Path, config: dict[str, Any], key: str, defaults: dict[str, Any]
) -> dict[str, Any]:
    return {**defaults, **config_value(path, config, key, dict)}


def _vision_spec(path: Path, config: dict[str, Any]) -> TransformerEncoder:
    if config["qkv_bias"] is not True:
        raise CheckpointError(f"{path}: 'qkv_bias' of the vision model is not true, as expected")
    layers = config_value(path, config, "num_hidden_layers", int)
    return transformer_spec(
        path,
        config,
        layers,
        "gelu",
        patch_bias=True,
        pre_norm=False,
        post_norm=True,
        class_feature=True,
    )


def _language(path: Path, config: dict[str, Any]) -> tuple[_Language, dict[str, Any]]:
    text = config_value(path, config, "text_config", dict)
    kind = text.get("model_type")
    refuse_quantized(path, text)
    if not isinstance(kind, str) or kind not in _LANGUAGES:
        raise CheckpointError(
            f"{path}: the language model is {kind!r:.60}, expected {' or '.join(_LANGUAGES)}"
        )
    return _LANGUAGES[kind], {**_LANGUAGES[kind].defaults, **text}


def _qformer_spec(path: Path, config: dict[str, Any], vision: TransformerEncoder) -> QFormerSpec:
    settings = _section(path, config, "qformer_config", _QFORMER)
    sizes = {
        key: config_value(path, settings, key, int)
        for key in (
            *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
            "cross_attention_frequency",
        )
    }
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise CheckpointError(
            f"{path}: 'hidden_size' {sizes['hidden_size']} of the Q-Former is not a multiple of "
            f"'num_attention_heads' {sizes['num_attention_heads']}"
        )
    for key, expected in {"hidden_act": "gelu", "encoder_hidden_size": vision.hidden_size}.items():
        if settings.get(key, expected) != expected:
            raise CheckpointError(
                f"{path}: {key!r} of the Q-Former is {settings[key]!r:.60}, expected {expected!r}"
            )
    reads_text = config["model_type"] == "instructblip"
    if settings.get("use_qformer_text_input") and not reads_text:
        raise CheckpointError(
            f"{path}: BLIP-2 for retrieval ('use_qformer_text_input') is not supported"
        )
    return QFormerSpec(
        **sizes,
        num_queries=config_value(path, config, "num_query_tokens", int, _QUERIES),
        layer_norm_eps=config_value(path, settings, "layer_norm_eps", float),
        vocab_size=config_value(path, settings, "vocab_size", int) if reads_text else 0,
        max_positions=config_value(path, settings, "max_position_embeddings", int)
        if reads_text
        else 0,
    )


def _tower(path: Path) -> Tower:
    """The image processor's settings, which newer releases keep inside the processor's."""
    folder = path.parent
    preprocessor, processor = folder / "preprocessor_config.json", folder / "processor_config.json"
    settings: dict[str, Any] = {}
    if preprocessor.is_file():
        settings = read_json(preprocessor)
    elif processor.is_file():
        settings = config_value(processor, read_json(processor), "image_processor", dict, {})
    return Tower(str(path), {}, settings, folder)


def _conversation(source: Source, text: dict[str, Any]) -> ConversationSpec:
    name = source.options.conversation or "plain"
    if name not in CONVERSATIONS:
        raise CheckpointError(
            f"conversation {name!r} is not known: expected {' or '.join(CONVERSATIONS)}"
        )
    return ConversationSpec(
        CONVERSATIONS[name],
        end_ids(source.folder_with("generation_config.json"), text),
        (),
        "images_first",
    )


def _layout(source: Source, qformer: QFormerSpec) -> LayoutSpec:
    mark = source.tokenizer.token_to_id(IMAGE_PLACEHOLDER)
    if mark is None:  # checkpoints from before the processor expanded images itself
        mark = source.tokenizer.get_vocab_size()
    return LayoutSpec(placeholder_ids=(mark,) * qformer.num_queries)


def _tower_refs(files: TensorSource, spec: TransformerEncoder) -> dict[str, TensorRef]:
    embeddings = "vision_model.embeddings"
    refs = {
        "vision.class_embedding": TensorRef(files, f"{embeddings}.class_embedding", outer=2),
        "vision.position_embedding.weight": TensorRef(
            files, f"{embeddings}.position_embedding", outer=1
        ),
    }
    size = spec.hidden_size
    for part in ("weight", "bias"):
        stored = f"{embeddings}.patch_embedding.{part}"
        refs[f"vision.patch_embedding.{part}"] = TensorRef(files, stored)
        stored = f"vision_model.post_layernorm.{part}"
        refs[f"vision.post_norm.{part}"] = TensorRef(files, stored)
        for index in range(spec.num_hidden_layers):
            ours, theirs = f"vision.layers.{index}", f"vision_model.encoder.layers.{index}"
            for name, other in _TOWER_PARTS.items():
                refs[f"{ours}.{name}.{part}"] = TensorRef(files, f"{theirs}.{other}.{part}")
            for place, name in enumerate("qkv"):
                rows = RowRange(place * size, (place + 1) * size, 3 * size)
                stored = f"{theirs}.self_attn.qkv.{part}"
                refs[f"{ours}.attn.{name}_proj.{part}"] = TensorRef(files, stored, rows)
    return refs


def qformer_refs(
    files: TensorSource, spec: QFormerSpec, root: str = "qformer", queries: str = "query_tokens"
) -> dict[str, TensorRef]:
    """Return the tensors of a Q-Former. ``root``: what they are under; ``queries``: name of the
    learned queries."""
    names = {"norm": "embeddings.layernorm" if spec.vocab_size else "layernorm"}
    for index in range(spec.num_hidden_layers):
        parts = dict(_QFORMER_PARTS)
        if spec.has_cross_attention(index):
            parts |= _CROSS_PARTS
        if spec.has_text(index):
            parts |= _TEXT_PARTS
        for ours, theirs in parts.items():
            names[f"layers.{index}.{ours}"] = f"encoder.layer.{index}.{theirs}"
    refs = {"projector.query_tokens": TensorRef(files, queries, outer=1)}
    for ours, theirs in names.items():
        for part in ("weight", "bias"):
            refs[f"projector.{ours}.{part}"] = TensorRef(files, f"{root}.{theirs}.{part}")
    if spec.vocab_size:
        for kind in ("word", "position"):
            stored = f"qformer.embeddings.{kind}_embeddings.weight"
            refs[f"projector.{kind}_embedding.weight"] = TensorRef(files, stored)
    return refs


_TOWER_PARTS = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.out_proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_QFORMER_PARTS = {
    "attn.q_proj": "attention.attention.query",
    "attn.k_proj": "attention.attention.key",
    "attn.v_proj": "attention.attention.value",
    "attn.out_proj": "attention.output.dense",
    "attn_norm": "attention.output.LayerNorm",
    "mlp.fc1": "intermediate_query.dense",
    "mlp.fc2": "output_query.dense",
    "mlp_norm": "output_query.LayerNorm",
}
_CROSS_PARTS = {
    "cross.query_proj": "crossattention.attention.query",
    "cross.key_proj": "crossattention.attention.key",
    "cross.value_proj": "crossattention.attention.value",
    "cross.out_proj": "crossattention.output.dense",
    "cross_norm": "crossattention.output.LayerNorm",
}
_TEXT_PARTS = {
    "text_mlp.fc1": "intermediate.dense",
    "text_mlp.fc2": "output.dense",
    "text_mlp_norm": "output.LayerNorm",
}

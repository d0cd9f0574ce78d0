"""VILA: a SigLIP or CLIP tower, a downsampling MLP, and a Llama; images anywhere in the text.

Official code: github.com/NVlabs/VILA (llava/model/llava_arch.py and
multimodal_projector/base_projector.py), its main branch and its release branch vila1.5.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken

from mobilevlm.checkpoint import (
    TensorFiles,
    TensorRef,
    Weights,
    check_presence,
    read_json,
)
from mobilevlm.connector_spec import ConnectorSpec
from mobilevlm.conversation import CONVERSATIONS, two_separator_template
from mobilevlm.errors import CheckpointError
from mobilevlm.families.backbones import LLAMA, decoder_refs, skipped_names
from mobilevlm.families.config import config_value, end_ids, read_config
from mobilevlm.families.registry import Source, register
from mobilevlm.families.towers import (
    SIGLIP,
    Tower,
    image_spec,
    skipped_tower_names,
    tower_names,
    vision_spec,
)
from mobilevlm.image_encoder import TransformerEncoder
from mobilevlm.input_spec import InputSpec, LayoutSpec
from mobilevlm.spec import IMAGE_PLACEHOLDER, ConversationSpec, ModelSpec


@dataclass(frozen=True)
class _Variant:
    """Differences between the two branches of the official code."""

    order: Literal["rows", "columns"]
    """Order of the visual tokens in the grid."""
    tokenization: Literal["apart", "joined"]
    image_end: str
    """Text whose ids follow each image, those that begin a text included."""
    line_break: bool
    """After images that the prompt does not place."""


_VARIANTS = {
    "vila1.5": _Variant("columns", "apart", "", True),
    "current": _Variant("rows", "joined", "\n", False),
}
_FIRST_CURRENT = (4, 46)
"""Version of transformers that the main branch has asked for since it replaced vila1.5."""
_MEDIA_TOKENS = ("<vila/sentinel>", IMAGE_PLACEHOLDER, "<vila/video>")
"""Tokens that the main branch adds to the tokenizer, in its order."""
_FOLDERS = ("llm", "vision_tower", "mm_projector")
_TRAITS: dict[Any, dict[str, bool]] = {
    "siglip_vision_model": SIGLIP,
    "clip_vision_model": {},
}
"""In what a tower is unlike CLIP, by its ``model_type``."""


@register(
    "vila",
    {"llava_llama"},
    keys={"llm_cfg", "vision_tower_cfg", "mm_projector_cfg"},
    language_model="llm",
    legacy=False,
    variants=tuple(_VARIANTS),
)
def read_vila(source: Source) -> tuple[ModelSpec, Weights]:
    """Reads a VILA checkpoint: config.json and three folders, each a model of its own. Without
    ``--variant`` it behaves as the code that it was saved with."""
    path, config = source.folder / "config.json", source.config
    if source.adapter is not None:
        raise CheckpointError(
            f"{source.adapter.folder}: adapters of VILA are not merged here: merge it with VILA's "
            f"own code and give the result"
        )
    name = source.options.variant or _saved_with(path, config)
    variant = _VARIANTS[name]
    language, own_tower, between = (source.folder / folder for folder in _FOLDERS)
    tower = _tower(source.options.vision_tower or own_tower)
    kind = tower.config.get("model_type")
    if not isinstance(kind, str) or kind not in _TRAITS:
        raise CheckpointError(
            f"{tower.where}: model_type is {kind!r:.60}, expected {' or '.join(_TRAITS)}"
        )
    vision = vision_spec(path, config, tower, "vision_tower_cfg", **_TRAITS[kind])
    _check_features(path, config, vision)
    projector = _projector(between / "config.json", config, vision, variant)
    decoder = LLAMA.read(language / "config.json", _language_config(path, language, config))
    conversation = _conversation(source, language, variant)
    preparation, layout = image_spec(tower, vision, _aspect(path, config)), _layout(source, variant)
    spec = ModelSpec(
        family="vila",
        name=source.name,
        inputs={"image": InputSpec(preparation, vision, projector, layout)},
        decoder=decoder,
        conversation=conversation,
        variant=name,
    )
    if decoder.hidden_size != projector.out_size:
        raise CheckpointError(
            f"{path}: 'hidden_size' is {projector.out_size}, but the language model in {language} "
            f"has {decoder.hidden_size}"
        )
    assert tower.folder is not None
    words = TensorFiles(language)
    refs = decoder_refs(words, decoder, LLAMA)
    images, links = TensorFiles(tower.folder), TensorFiles(between)
    refs |= {ours: TensorRef(images, theirs) for ours, theirs in tower_names(vision).items()}
    for ours, place in {"norm": 1, "mlp.0": 2, "mlp.1": 4}.items():
        for part in ("weight", "bias"):
            refs[f"projector.{ours}.{part}"] = TensorRef(links, f"layers.{place}.{part}")
    check_presence(refs)
    source.check_unread(refs, words, skipped_names(decoder, LLAMA))
    source.check_unread(refs, images, skipped_tower_names(vision, tower.config))
    source.check_unread(refs, links, ())
    return spec, Weights(refs, notes=(f"tower       weights in {tower.folder}",))


def _saved_with(path: Path, config: dict[str, Any]) -> str:
    """The branch whose code saved a checkpoint, by its version of transformers."""
    version = config_value(path, config, "transformers_version", str, "")
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        raise CheckpointError(
            f"{path}: 'transformers_version' is {version!r:.40}, which does not tell the version "
            f"of VILA: pass --variant {' or '.join(_VARIANTS)}"
        )
    return "current" if (int(match[1]), int(match[2])) >= _FIRST_CURRENT else "vila1.5"


def _tower(folder: Path) -> Tower:
    where = folder / "config.json"
    tower = read_config(where, "the vision tower of a VILA checkpoint")
    preprocessor = folder / "preprocessor_config.json"
    settings = read_json(preprocessor) if preprocessor.is_file() else {}
    return Tower(str(where), tower, settings, folder)


def _check_features(path: Path, config: dict[str, Any], vision: TransformerEncoder) -> None:
    """Refuses tiled images, and a class token among the features."""
    if config.get("s2") or config.get("dynamic_s2"):
        raise CheckpointError(f"{path}: images in several scales ('s2') are not supported")
    feature = config_value(path, config, "mm_vision_select_feature", str, "patch")
    expected = ("patch",) if vision.class_token else ("patch", "cls_patch")
    if feature not in expected:
        raise CheckpointError(
            f"{path}: 'mm_vision_select_feature' is {feature!r}, expected {' or '.join(expected)}"
        )


def _aspect(path: Path, config: dict[str, Any]) -> Literal["pad", "resize"]:
    aspect = config_value(path, config, "image_aspect_ratio", str, "resize")
    if aspect not in ("pad", "resize"):
        raise CheckpointError(
            f"{path}: 'image_aspect_ratio' is {aspect!r}, expected 'resize' or 'pad' (not tiles)"
        )
    return "pad" if aspect == "pad" else "resize"


def _projector(
    where: Path, config: dict[str, Any], vision: TransformerEncoder, variant: _Variant
) -> ConnectorSpec:
    kind = read_json(where, required_for="the projector of a VILA checkpoint").get(
        "mm_projector_type"
    )
    if kind != "mlp_downsample":
        raise CheckpointError(
            f"{where}: mm_projector_type is {kind!r:.60}, expected 'mlp_downsample'"
        )
    hidden = config_value(where.parent.parent / "config.json", config, "hidden_size", int)
    grid, out_grid = vision.grid, -(-vision.grid // 2)
    return ConnectorSpec(
        "mlp_downsample", vision.hidden_size, hidden, 2, grid, out_grid, variant.order
    )


def _language_config(path: Path, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the config of the language model. If the whole model was trained on longer texts,
    positions are interpolated as the official loader does."""
    where = folder / "config.json"
    language = read_config(where, "the language model of a VILA checkpoint")
    if language.get("model_type") != "llama":
        raise CheckpointError(
            f"{where}: model_type is {language.get('model_type')!r:.60}, expected 'llama'"
        )
    context = config_value(where, language, "max_position_embeddings", int)
    longest = config_value(path, config, "model_max_length", int, context)
    if longest <= context:
        return language
    return {**language, "rope_scaling": {"type": "linear", "factor": -(-longest // context)}}


def _conversation(source: Source, language: Path, variant: _Variant) -> ConversationSpec:
    name = source.options.conversation or "v1"
    if name not in CONVERSATIONS:
        raise CheckpointError(
            f"conversation {name!r} is not known: expected {', '.join(CONVERSATIONS)}"
        )
    style, tokenizer = CONVERSATIONS[name], source.tokenizer
    if tokenizer.token_to_id(style.end) is None:
        raise CheckpointError(
            f"{language}: the tokenizer has no {style.end!r}, which ends an answer in conversation "
            f"{name!r}: the conversation of this language model (Llama 3?) is not supported"
        )
    if variant.tokenization == "joined":
        tokens = [AddedToken(text, normalized=False, special=True) for text in _MEDIA_TOKENS]
        tokenizer.add_special_tokens(tokens)
    return ConversationSpec(
        two_separator_template(style, line_break=variant.line_break),
        end_ids(language, read_json(language / "config.json")),
        (style.end,),
        variant.tokenization,
    )


def _layout(source: Source, variant: _Variant) -> LayoutSpec:
    """The ids after an image, and its mark: a token of the tokenizer where it is one."""
    tokenizer = source.tokenizer
    after = tuple(tokenizer.encode(variant.image_end).ids) if variant.image_end else ()
    mark = tokenizer.token_to_id(IMAGE_PLACEHOLDER) if variant.tokenization == "joined" else None
    return LayoutSpec(after) if mark is None else LayoutSpec(after, (mark,))

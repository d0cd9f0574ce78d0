"""The on-disk layout that LLaVA and its descendants share.

config.json of a Llama model with ``mm_*`` keys, Llama weights, ``model.mm_projector.*``, and a CLIP
tower in a folder of its own or inside the checkpoint (``model.vision_tower.vision_tower.*``).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mobilevlm.checkpoint import TensorFiles, TensorRef, Weights, read_json
from mobilevlm.conversation import SYSTEM_PROMPTS, two_separator_template
from mobilevlm.errors import CheckpointError
from mobilevlm.families import OpenOptions
from mobilevlm.spec import (
    IMAGE_PLACEHOLDER,
    ConversationSpec,
    DecoderSpec,
    ImageSpec,
    ModelSpec,
    ProjectorSpec,
    VisionSpec,
)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3
DEFAULT_EOS = 2
"""``</s>`` of Llama's tokenizer."""
EMBEDDED_TOWER = "model.vision_tower.vision_tower."

_CLIP_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
KNOWN_TOWERS = {
    "openai/clip-vit-large-patch14": {**_CLIP_LARGE, "image_size": 224},
    "openai/clip-vit-large-patch14-336": {**_CLIP_LARGE, "image_size": 336},
}
"""Configurations of published towers, for checkpoints that carry the tower's weights themselves."""


@dataclass(frozen=True)
class ProjectorLayout:
    """A projector and the names of its tensors: ours under ``projector.``, theirs under
    ``model.mm_projector.``."""

    spec: ProjectorSpec
    names: dict[str, str]


@dataclass(frozen=True)
class _Tower:
    """A vision tower: its configuration, and its folder where there is one."""

    where: str
    config: dict[str, Any]
    preprocessor: dict[str, Any]
    folder: Path | None


def read_layout(
    folder: Path,
    config: dict[str, Any],
    options: OpenOptions,
    *,
    family: str,
    conversation: str,
    projector: Callable[[dict[str, Any], VisionSpec], ProjectorLayout],
    prefer_checkpoint_tower: bool,
) -> tuple[ModelSpec, Weights]:
    """Spec and weights of a checkpoint in this layout."""
    path = folder / "config.json"
    files = TensorFiles(folder)
    embedded = f"{EMBEDDED_TOWER}vision_model.embeddings.class_embedding" in files
    tower = _find_tower(path, config, options.vision_tower, embedded)
    vision = _vision_spec(path, config, tower)
    decoder = _decoder_spec(path, config)
    layout = projector(config, vision)
    spec = ModelSpec(
        family=family,
        name=folder.resolve().name,
        image=_image_spec(path, config, tower, vision),
        vision=vision,
        projector=layout.spec,
        decoder=decoder,
        conversation=_conversation_spec(folder, config, options.conversation or conversation),
    )
    names = _decoder_names(spec.decoder)
    names |= {
        f"projector.{ours}": f"model.mm_projector.{name}" for ours, name in layout.names.items()
    }
    refs = {ours: TensorRef(files, name) for ours, name in names.items()}
    from_checkpoint = embedded and (prefer_checkpoint_tower or tower.folder is None)
    prefix, tower_files = EMBEDDED_TOWER, files
    if not from_checkpoint:
        assert tower.folder is not None
        prefix, tower_files = "", TensorFiles(tower.folder)
    for ours, name in _tower_names(vision).items():
        refs[ours] = TensorRef(tower_files, prefix + name)
    _check_presence(refs)
    return spec, Weights(refs)


def mlp_projector(config: dict[str, Any], vision: VisionSpec) -> ProjectorLayout:
    """``linear`` (one Linear) or ``mlpNx_gelu`` (N Linears with GELU between)."""
    kind = config.get("mm_projector_type") or "linear"
    match = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    depth = int(match[1]) if match else 1
    spec = ProjectorSpec(
        "mlp", vision.hidden_size, config["hidden_size"], depth, vision.grid, vision.grid
    )
    names = {}
    for index in range(depth):
        theirs = f"{2 * index}." if match else ""
        for part in ("weight", "bias"):
            names[f"mlp.{index}.{part}"] = theirs + part
    return ProjectorLayout(spec, names)


T = TypeVar("T")


def _value(
    path: Path, config: dict[str, Any], key: str, kind: type[T], default: T | None = None
) -> T:
    """A checked configuration value; ``null`` counts as absent."""
    value = config.get(key)
    if value is None:
        if default is None:
            raise CheckpointError(f"{path}: key {key!r} is missing, expected {kind.__name__}")
        return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
        raise CheckpointError(f"{path}: {key!r} is {value!r:.60}, expected {kind.__name__}")
    if isinstance(value, (int, float)) and kind is not bool and value <= 0:
        raise CheckpointError(f"{path}: {key!r} is {value!r}, expected a positive number")
    return value


def _find_tower(path: Path, config: dict[str, Any], given: Path | None, embedded: bool) -> _Tower:
    name = _value(path, config, "mm_vision_tower", str) if given is None else str(given)
    checkpoint = path.parent
    base = Path(name).name
    candidates = [given] if given is not None else [
        Path(name), checkpoint / name, checkpoint / base, checkpoint / "vision_tower",
        checkpoint.resolve().parent / base,
    ]  # fmt: skip
    for folder in candidates:
        if folder.is_dir() and (folder / "config.json").is_file():
            tower = read_json(folder / "config.json")
            tower = _value(folder / "config.json", tower, "vision_config", dict, tower)
            preprocessor = folder / "preprocessor_config.json"
            return _Tower(
                str(folder / "config.json"),
                tower,
                read_json(preprocessor) if preprocessor.is_file() else {},
                folder,
            )
    if given is not None:
        raise CheckpointError(f"{given}: no vision tower there: expected a folder with config.json")
    if embedded and name in KNOWN_TOWERS:
        return _Tower(name, KNOWN_TOWERS[name], {}, None)
    raise CheckpointError(
        f"{path}: vision tower {name!r} is not on this machine: put its folder beside the "
        f"checkpoint as {base!r}, or pass --vision-tower DIR"
    )


def _vision_spec(path: Path, config: dict[str, Any], tower: _Tower) -> VisionSpec:
    where = Path(tower.where)
    layers = _value(where, tower.config, "num_hidden_layers", int)
    select = config.get("mm_vision_select_layer", -2)
    if not isinstance(select, int) or not -layers - 1 <= select <= layers:
        raise CheckpointError(
            f"{path}: 'mm_vision_select_layer' is {select!r}, but the tower {tower.where} "
            f"has {layers} layers"
        )
    feature = _value(path, config, "mm_vision_select_feature", str, "patch")
    if feature != "patch":
        raise CheckpointError(
            f"{path}: 'mm_vision_select_feature' is {feature!r}, expected 'patch'"
        )
    activation = _value(where, tower.config, "hidden_act", str, "quick_gelu")
    if activation not in ("quick_gelu", "gelu"):
        raise CheckpointError(
            f"{where}: 'hidden_act' is {activation!r}, expected quick_gelu or gelu"
        )
    vision = VisionSpec(
        hidden_size=_value(where, tower.config, "hidden_size", int),
        intermediate_size=_value(where, tower.config, "intermediate_size", int),
        num_hidden_layers=select if select >= 0 else layers + 1 + select,
        num_attention_heads=_value(where, tower.config, "num_attention_heads", int),
        image_size=_value(where, tower.config, "image_size", int),
        patch_size=_value(where, tower.config, "patch_size", int),
        hidden_act="quick_gelu" if activation == "quick_gelu" else "gelu",
        layer_norm_eps=_value(where, tower.config, "layer_norm_eps", float, 1e-5),
    )
    expected = _value(path, config, "mm_hidden_size", int, vision.hidden_size)
    if vision.hidden_size != expected:
        raise CheckpointError(
            f"{tower.where}: the vision tower has hidden_size {vision.hidden_size}, but the "
            f"checkpoint was trained with {expected} (mm_hidden_size in {path}): pass the folder "
            f"of {config.get('mm_vision_tower')!r} with --vision-tower"
        )
    if vision.grid == 0:
        raise CheckpointError(
            f"{where}: 'patch_size' {vision.patch_size} is larger than 'image_size' "
            f"{vision.image_size}"
        )
    if vision.hidden_size % vision.num_attention_heads:
        raise CheckpointError(
            f"{where}: 'hidden_size' {vision.hidden_size} is not a multiple of "
            f"'num_attention_heads' {vision.num_attention_heads}"
        )
    return vision


def _image_spec(path: Path, config: dict[str, Any], tower: _Tower, vision: VisionSpec) -> ImageSpec:
    where = f"{tower.where} (preprocessor_config.json)"
    aspect = config.get("image_aspect_ratio")
    if isinstance(aspect, str) and aspect.startswith("anyres"):
        raise CheckpointError(
            f"{path}: 'image_aspect_ratio' is {aspect!r} (LLaVA-NeXT tiles): expected 'pad' or "
            f"'square'"
        )
    settings = tower.preprocessor
    size = _edge(settings.get("size"), vision.image_size, where, "size")
    crop = _edge(settings.get("crop_size"), vision.image_size, where, "crop_size")
    if crop != vision.image_size:
        raise CheckpointError(
            f"{where}: 'crop_size' is {crop}, but the tower takes {vision.image_size} pixels"
        )
    if settings.get("resample", BICUBIC) != BICUBIC:
        raise CheckpointError(
            f"{where}: 'resample' is {settings['resample']!r}, expected 3 (bicubic)"
        )
    return ImageSpec(
        size=crop,
        shortest_edge=size,
        aspect="pad" if aspect == "pad" else "crop",
        mean=_channels(settings.get("image_mean"), CLIP_MEAN, where, "image_mean"),
        std=_channels(settings.get("image_std"), CLIP_STD, where, "image_std"),
    )


def _edge(value: Any, default: int, where: str, key: str) -> int:
    """An edge in pixels: an integer, or an object with ``shortest_edge`` or ``height``."""
    if isinstance(value, dict):
        value = value.get("shortest_edge", value.get("height"))
    if value is None:
        return default
    if type(value) is not int or value <= 0:
        raise CheckpointError(f"{where}: {key!r} is {value!r:.60}, expected a number of pixels")
    return value


def _channels(
    value: Any, default: tuple[float, float, float], where: str, key: str
) -> tuple[float, float, float]:
    if value is None:
        return default
    numbers = isinstance(value, list) and all(type(item) in (int, float) for item in value)
    if not numbers or len(value) != 3 or (key == "image_std" and min(value) <= 0):
        raise CheckpointError(f"{where}: {key!r} is {value!r:.60}, expected three numbers")
    red, green, blue = (float(channel) for channel in value)
    return red, green, blue


def _decoder_spec(path: Path, config: dict[str, Any]) -> DecoderSpec:
    activation = _value(path, config, "hidden_act", str, "silu")
    if activation != "silu":
        raise CheckpointError(f"{path}: 'hidden_act' is {activation!r}, expected 'silu'")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise CheckpointError(
            f"{path}: biases in the decoder ('attention_bias') are not known here"
        )
    hidden = _value(path, config, "hidden_size", int)
    heads = _value(path, config, "num_attention_heads", int)
    key_value_heads = _value(path, config, "num_key_value_heads", int, heads)
    if hidden % heads or heads % key_value_heads:
        raise CheckpointError(
            f"{path}: 'hidden_size' {hidden}, 'num_attention_heads' {heads} and "
            f"'num_key_value_heads' {key_value_heads} do not divide"
        )
    scaling = _rope_scaling(path, config)
    context = int(_value(path, config, "max_position_embeddings", int) * scaling)
    return DecoderSpec(
        vocab_size=_value(path, config, "vocab_size", int),
        hidden_size=hidden,
        intermediate_size=_value(path, config, "intermediate_size", int),
        num_hidden_layers=_value(path, config, "num_hidden_layers", int),
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=hidden // heads,
        rms_norm_eps=_value(path, config, "rms_norm_eps", float, 1e-6),
        rope_theta=_value(path, config, "rope_theta", float, 10000.0),
        rope_scaling=scaling,
        context_length=context,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


def _rope_scaling(path: Path, config: dict[str, Any]) -> float:
    scaling = config.get("rope_scaling")
    if scaling is None:
        return 1.0
    kind = scaling.get("type", scaling.get("rope_type")) if isinstance(scaling, dict) else scaling
    if kind != "linear":
        raise CheckpointError(f"{path}: 'rope_scaling' is {scaling!r:.60}, expected type 'linear'")
    factor = scaling.get("factor") if isinstance(scaling, dict) else None
    if not isinstance(factor, (int, float)) or isinstance(factor, bool) or factor <= 0:
        raise CheckpointError(f"{path}: 'rope_scaling' is {scaling!r:.60}, expected a 'factor'")
    return float(factor)


def _conversation_spec(folder: Path, config: dict[str, Any], name: str) -> ConversationSpec:
    if name not in SYSTEM_PROMPTS:
        raise CheckpointError(
            f"conversation {name!r} is not known: expected {', '.join(SYSTEM_PROMPTS)}"
        )
    mark = IMAGE_PLACEHOLDER
    if config.get("mm_use_im_start_end"):
        mark = f"<im_start>{IMAGE_PLACEHOLDER}<im_end>"
    return ConversationSpec(
        chat_template=two_separator_template(SYSTEM_PROMPTS[name], mark),
        eos_token_ids=_end_ids(folder, config),
        stop_strings=("</s>",),
    )


def _end_ids(folder: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """``eos_token_id`` of generation_config.json, else of config.json: a number or several."""
    where = folder / "generation_config.json"
    settings = read_json(where) if where.is_file() else {}
    if settings.get("eos_token_id") is None:
        where, settings = folder / "config.json", config
    value = settings.get("eos_token_id")
    if value is None:
        return (DEFAULT_EOS,)
    ids = value if isinstance(value, list) else [value]
    if not ids or any(type(index) is not int or index < 0 for index in ids):
        raise CheckpointError(f"{where}: 'eos_token_id' is {value!r:.60}, expected a token id")
    return tuple(ids)


def _decoder_names(spec: DecoderSpec) -> dict[str, str]:
    names = {
        "decoder.embed_tokens.weight": "model.embed_tokens.weight",
        "decoder.norm.weight": "model.norm.weight",
        "decoder.lm_head.weight": (
            "model.embed_tokens.weight" if spec.tie_word_embeddings else "lm_head.weight"
        ),
    }
    for index in range(spec.num_hidden_layers):
        ours, theirs = f"decoder.layers.{index}", f"model.layers.{index}"
        names[f"{ours}.input_norm.weight"] = f"{theirs}.input_layernorm.weight"
        names[f"{ours}.post_attention_norm.weight"] = f"{theirs}.post_attention_layernorm.weight"
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            names[f"{ours}.attn.{part}.weight"] = f"{theirs}.self_attn.{part}.weight"
        for part in ("gate_proj", "up_proj", "down_proj"):
            names[f"{ours}.mlp.{part}.weight"] = f"{theirs}.mlp.{part}.weight"
    return names


def _tower_names(spec: VisionSpec) -> dict[str, str]:
    """Names of a CLIPVisionModel (``pre_layrnorm`` is spelled so in every release)."""
    names = {
        "vision.class_embedding": "vision_model.embeddings.class_embedding",
        "vision.patch_embedding.weight": "vision_model.embeddings.patch_embedding.weight",
        "vision.position_embedding.weight": "vision_model.embeddings.position_embedding.weight",
        "vision.pre_norm.weight": "vision_model.pre_layrnorm.weight",
        "vision.pre_norm.bias": "vision_model.pre_layrnorm.bias",
    }
    layers = {
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "attn.q_proj": "self_attn.q_proj",
        "attn.k_proj": "self_attn.k_proj",
        "attn.v_proj": "self_attn.v_proj",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    for index in range(spec.num_hidden_layers):
        for ours, theirs in layers.items():
            for part in ("weight", "bias"):
                names[f"vision.layers.{index}.{ours}.{part}"] = (
                    f"vision_model.encoder.layers.{index}.{theirs}.{part}"
                )
    return names


def _check_presence(refs: dict[str, TensorRef]) -> None:
    """Names every missing tensor before any work begins."""
    missing = [ref for ref in refs.values() if ref.name not in ref.files]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{missing[0].files.folder}: tensor {missing[0].name!r} is missing{more}: the weights "
            f"do not fit config.json"
        )

"""The on-disk layout that LLaVA and its descendants share.

config.json and weights of a language model (``backbones.py``) with ``mm_*`` keys and
``mm_projector.*``, and a CLIP tower in a folder of its own or inside the checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobilevlm.checkpoint import TensorFiles, TensorRef, Weights, read_json
from mobilevlm.conversation import CONVERSATIONS, two_separator_template
from mobilevlm.errors import CheckpointError
from mobilevlm.families import Source
from mobilevlm.families.backbones import LLAMA, Backbone, decoder_refs
from mobilevlm.families.config import config_value, end_ids
from mobilevlm.spec import (
    IMAGE_PLACEHOLDER,
    ConversationSpec,
    ImageSpec,
    ModelSpec,
    ProjectorSpec,
    VisionSpec,
)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3

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
    ``mm_projector.``."""

    spec: ProjectorSpec
    names: dict[str, str]


@dataclass(frozen=True)
class Naming:
    """What descendants call differently."""

    tower: str = "vision_tower"
    """The tower: its key is this after ``mm_``, and its copy in the checkpoint has it twice."""
    projector: str = "mm_projector"

    @property
    def tower_key(self) -> str:
        return f"mm_{self.tower}"


@dataclass(frozen=True)
class _Tower:
    """A vision tower: its configuration, and its folder where there is one."""

    where: str
    config: dict[str, Any]
    preprocessor: dict[str, Any]
    folder: Path | None


def read_layout(
    source: Source,
    *,
    family: str,
    conversation: str,
    projector: Callable[[dict[str, Any], VisionSpec], ProjectorLayout],
    prefer_checkpoint_tower: bool,
    backbone: Backbone = LLAMA,
    naming: Naming = Naming(),
) -> tuple[ModelSpec, Weights]:
    """Spec and weights of a checkpoint in this layout."""
    folder, config = source.folder, source.config
    path = folder / "config.json"
    files = TensorFiles(folder)
    copy = f"{backbone.root}.{naming.tower}.{naming.tower}."
    embedded = f"{copy}vision_model.embeddings.class_embedding" in files
    tower = _find_tower(path, config, naming.tower_key, source.options.vision_tower, embedded)
    vision = _vision_spec(path, config, naming.tower_key, tower)
    decoder = backbone.read(path, config)
    layout = projector(config, vision)
    spec = ModelSpec(
        family=family,
        name=folder.resolve().name,
        image=_image_spec(path, config, tower, vision),
        vision=vision,
        projector=layout.spec,
        decoder=decoder,
        conversation=_conversation_spec(source, source.options.conversation or conversation),
    )
    refs = decoder_refs(files, decoder, backbone)
    for ours, name in layout.names.items():
        stored = f"{backbone.root}.{naming.projector}.{name}"
        refs[f"projector.{ours}"] = TensorRef(files, stored)
    from_checkpoint = embedded and (prefer_checkpoint_tower or tower.folder is None)
    prefix, tower_files = copy, files
    if not from_checkpoint:
        assert tower.folder is not None
        prefix, tower_files = "", TensorFiles(tower.folder)
    for ours, name in _tower_names(vision).items():
        refs[ours] = TensorRef(tower_files, prefix + name)
    _check_presence(refs)
    return spec, Weights(refs)


def mlp_projector(config: dict[str, Any], vision: VisionSpec) -> ProjectorLayout:
    """``linear`` (one Linear) or ``mlpNx_gelu`` (N Linears with GELU between)."""
    match = re.fullmatch(r"mlp(\d+)x_gelu", config.get("mm_projector_type") or "linear")
    return mlp_layout(config, vision, int(match[1]), "{}.") if match else mlp_layout(config, vision)


def mlp_layout(
    config: dict[str, Any],
    vision: VisionSpec,
    depth: int = 1,
    place: str = "",
    out_grid: int | None = None,
) -> ProjectorLayout:
    """An MLP of ``depth`` Linears. ``place``: where each is, by its number in a Sequential with
    activations; ``out_grid``: visual tokens per edge, where it pools first."""
    spec = ProjectorSpec(
        "mlp",
        vision.hidden_size,
        config["hidden_size"],
        depth,
        vision.grid,
        out_grid or vision.grid,
    )
    names = {
        f"mlp.{index}.{part}": place.format(2 * index) + part
        for index in range(depth)
        for part in ("weight", "bias")
    }
    return ProjectorLayout(spec, names)


def _find_tower(
    path: Path, config: dict[str, Any], key: str, given: Path | None, embedded: bool
) -> _Tower:
    name = config_value(path, config, key, str) if given is None else str(given)
    checkpoint = path.parent
    base = Path(name).name
    candidates = [given] if given is not None else [
        Path(name), checkpoint / name, checkpoint / base, checkpoint / "vision_tower",
        checkpoint.resolve().parent / base,
    ]  # fmt: skip
    for folder in candidates:
        if folder.is_dir() and (folder / "config.json").is_file():
            tower = read_json(folder / "config.json")
            tower = config_value(folder / "config.json", tower, "vision_config", dict, tower)
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


def _vision_spec(path: Path, config: dict[str, Any], key: str, tower: _Tower) -> VisionSpec:
    where = Path(tower.where)
    layers = config_value(where, tower.config, "num_hidden_layers", int)
    select = config.get("mm_vision_select_layer", -2)
    if not isinstance(select, int) or not -layers - 1 <= select <= layers:
        raise CheckpointError(
            f"{path}: 'mm_vision_select_layer' is {select!r}, but the tower {tower.where} "
            f"has {layers} layers"
        )
    feature = config_value(path, config, "mm_vision_select_feature", str, "patch")
    if feature != "patch":
        raise CheckpointError(
            f"{path}: 'mm_vision_select_feature' is {feature!r}, expected 'patch'"
        )
    activation = config_value(where, tower.config, "hidden_act", str, "quick_gelu")
    if activation not in ("quick_gelu", "gelu"):
        raise CheckpointError(
            f"{where}: 'hidden_act' is {activation!r}, expected quick_gelu or gelu"
        )
    vision = VisionSpec(
        hidden_size=config_value(where, tower.config, "hidden_size", int),
        intermediate_size=config_value(where, tower.config, "intermediate_size", int),
        num_hidden_layers=select if select >= 0 else layers + 1 + select,
        num_attention_heads=config_value(where, tower.config, "num_attention_heads", int),
        image_size=config_value(where, tower.config, "image_size", int),
        patch_size=config_value(where, tower.config, "patch_size", int),
        hidden_act="quick_gelu" if activation == "quick_gelu" else "gelu",
        layer_norm_eps=config_value(where, tower.config, "layer_norm_eps", float, 1e-5),
    )
    expected = config_value(path, config, "mm_hidden_size", int, vision.hidden_size)
    if vision.hidden_size != expected:
        raise CheckpointError(
            f"{tower.where}: the vision tower has hidden_size {vision.hidden_size}, but the "
            f"checkpoint was trained with {expected} (mm_hidden_size in {path}): pass the folder "
            f"of {config.get(key)!r} with --vision-tower"
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


def _conversation_spec(source: Source, name: str) -> ConversationSpec:
    """An answer ends at the ids that the configuration names and at the conversation's mark."""
    if name not in CONVERSATIONS:
        raise CheckpointError(
            f"conversation {name!r} is not known: expected {', '.join(CONVERSATIONS)}"
        )
    style = CONVERSATIONS[name]
    mark = IMAGE_PLACEHOLDER
    if source.config.get("mm_use_im_start_end"):
        mark = f"<im_start>{IMAGE_PLACEHOLDER}<im_end>"
    ids = end_ids(source.folder, source.config)
    end = source.tokenizer.token_to_id(style.end)
    if end is not None and end not in ids:
        ids = (*ids, end)
    return ConversationSpec(two_separator_template(style, mark), ids, (style.end,))


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

"""Vision towers that checkpoints come with, in a folder of their own or as a part of config.json:
shape, image preprocessing, tensor names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mobilevlm.errors import CheckpointError
from mobilevlm.families.config import RANGES, config_value
from mobilevlm.image_encoder import SquareEncoder, TransformerEncoder
from mobilevlm.input_spec import MOST_TILES_PER_EDGE, FixedImage, Resampling, Tiles

SIGLIP = {"class_token": False, "patch_bias": True, "pre_norm": False}
"""Differences of SigLIP's tower from CLIP's, as fields of TransformerEncoder."""
SIGLIP_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}
"""Defaults of ``SiglipVisionConfig``."""
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)
_RESAMPLE: dict[Resampling, int] = {"bilinear": 2, "bicubic": 3, "lanczos": 1}
"""Pillow's numbers, which image processors name them by."""
_STEPS = ("do_resize", "do_rescale", "do_normalize")
"""Settings of an image processor that are true in all published files."""
_FAR = 1000.0
"""Beyond any mean and deviation of channels from 0 to 1, or to 255."""

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
_ACTIVATIONS: dict[str, Literal["quick_gelu", "gelu", "gelu_tanh"]] = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""By their names in config.json."""


@dataclass(frozen=True)
class Tower:
    """A vision tower: its configuration, and its folder where there is one."""

    where: str
    """For messages: the file of the configuration, or the tower's name."""
    config: dict[str, Any]
    preprocessor: dict[str, Any]
    folder: Path | None


def vision_spec(
    path: Path,
    config: dict[str, Any],
    tower: Tower,
    key: str,
    **traits: Any,
) -> TransformerEncoder:
    """The tower as far as the layer that ``mm_vision_select_layer`` names in the checkpoint's
    config.json (``path``, ``config``).

    ``key``: of the tower's name there; ``traits``: fields of TransformerEncoder in which it is
    unlike CLIP.

    Raises:
        CheckpointError: a value is missing or wrong, or does not fit the others.
    """
    layers = config_value(Path(tower.where), tower.config, "num_hidden_layers", int)
    kept = kept_layers(path, config, "mm_vision_select_layer", -2, layers, f" {tower.where}")
    vision = transformer_spec(Path(tower.where), tower.config, kept, "quick_gelu", **traits)
    expected = config_value(path, config, "mm_hidden_size", int, vision.hidden_size)
    if vision.hidden_size != expected:
        raise CheckpointError(
            f"{tower.where}: the vision tower has hidden_size {vision.hidden_size}, but the "
            f"checkpoint was trained with {expected} (mm_hidden_size in {path}): pass the folder "
            f"of {config.get(key)!r} with --vision-tower"
        )
    return vision


def kept_layers(
    path: Path, config: dict[str, Any], key: str, default: int, layers: int, name: str = ""
) -> int:
    """Return how many of a tower's layers run up to the one whose features are used, which ``key``
    of a configuration names, a negative number from the end. ``name``: of the tower, for messages.

    Raises:
        CheckpointError: it is no layer of the tower.
    """
    select = config.get(key, default)
    if type(select) is not int or not -layers - 1 <= select <= layers:
        raise CheckpointError(
            f"{path}: {key!r} is {select!r:.60}, but the tower{name} has {layers} layers"
        )
    return select if select >= 0 else layers + 1 + select


def transformer_spec(
    where: Path, config: dict[str, Any], layers: int, activation: str, **traits: Any
) -> TransformerEncoder:
    """A tower's own configuration, cut after so many layers.

    Raises:
        CheckpointError: a value is missing or wrong, or does not fit the others.
    """
    name = config_value(where, config, "hidden_act", str, activation)
    if name not in _ACTIVATIONS:
        *most, last = _ACTIVATIONS
        raise CheckpointError(
            f"{where}: 'hidden_act' is {name!r}, expected {', '.join(most)} or {last}"
        )
    vision = TransformerEncoder(
        hidden_size=config_value(where, config, "hidden_size", int),
        intermediate_size=config_value(where, config, "intermediate_size", int),
        num_hidden_layers=layers,
        num_attention_heads=config_value(where, config, "num_attention_heads", int),
        image_size=config_value(where, config, "image_size", int),
        patch_size=config_value(where, config, "patch_size", int),
        hidden_act=_ACTIVATIONS[name],
        layer_norm_eps=config_value(where, config, "layer_norm_eps", float, 1e-5),
        **traits,
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


def skipped_tower_names(
    vision: TransformerEncoder, config: dict[str, Any], prefix: str = ""
) -> list[str]:
    """Return regular expressions of tensors that a tower's files may hold and that nobody reads:
    what comes after the layer whose features are used, the text model of a whole CLIP, and tables
    of positions. ``prefix``: of the tower's names, as a regular expression."""
    layers = config.get("num_hidden_layers")
    dropped = range(vision.num_hidden_layers, layers if isinstance(layers, int) else 0)
    numbers = "|".join(map(str, dropped)) or "(?!)"
    return [
        rf"{prefix}vision_model\.encoder\.layers\.({numbers})\.",
        rf"{prefix}vision_model\.(post_layernorm|head)\.",
        rf"{prefix}vision_model\.embeddings\.position_ids$",
        rf"{prefix}(text_model|text_projection|visual_projection|logit_scale|logit_bias)\b",
    ]


def image_spec(
    tower: Tower,
    vision: SquareEncoder,
    aspect: Literal["pad", "crop", "resize", "fit"],
    resample: Resampling = "bicubic",
) -> FixedImage:
    """Preprocessing as preprocessor_config.json has it; CLIP's where it says nothing.

    Raises:
        CheckpointError: a value is wrong, or asks for what is not supported.
    """
    where = f"{tower.where} (preprocessor_config.json)"
    settings = tower.preprocessor
    size = pixel_edge(settings.get("size"), vision.image_size, where, "size")
    cut = "size" if aspect in ("resize", "fit") else "crop_size"
    crop = pixel_edge(settings.get(cut), vision.image_size, where, cut)
    if crop != vision.image_size:
        raise CheckpointError(
            f"{where}: {cut!r} is {crop}, but the tower takes {vision.image_size} pixels"
        )
    check_steps(Path(where), settings)
    _check_resample(where, settings, resample)
    return FixedImage(
        size=crop,
        shortest_edge=size,
        aspect=aspect,
        mean=channels(settings.get("image_mean"), CLIP_MEAN, where, "image_mean"),
        std=channels(settings.get("image_std"), CLIP_STD, where, "image_std"),
        resample=resample,
    )


def tiles_spec(tower: Tower, vision: TransformerEncoder) -> Tiles:
    """Preprocessing into tiles as the settings of an Idefics3ImageProcessor have it, its own
    defaults where they say nothing.

    Raises:
        CheckpointError: a value is wrong, or asks for what is not supported.
    """
    where, settings = tower.where, tower.preprocessor
    _check_resample(where, settings, "lanczos")
    tile = _longest_edge(settings, "max_image_size", 364, where)
    longest = _longest_edge(settings, "size", 4 * 364, where)
    if tile != vision.image_size:
        raise CheckpointError(
            f"{where}: 'max_image_size' is {tile}, but the tower takes {vision.image_size} pixels"
        )
    if longest > MOST_TILES_PER_EDGE * tile:
        raise CheckpointError(
            f"{where}: 'size' is {longest}, which is more than {MOST_TILES_PER_EDGE} tiles of "
            f"{tile} pixels along an edge: expected at most {MOST_TILES_PER_EDGE * tile}"
        )
    splits = config_value(Path(where), settings, "do_image_splitting", bool, True)
    return Tiles(
        size=tile,
        longest_edge=longest,
        mean=channels(settings.get("image_mean"), SIGLIP_MEAN, where, "image_mean"),
        std=channels(settings.get("image_std"), SIGLIP_STD, where, "image_std"),
        max_tiles=0 if splits else 1,
    )


def _longest_edge(settings: dict[str, Any], key: str, default: int, where: str) -> int:
    value = settings.get(key)
    if value is None:
        return default
    edge = value.get("longest_edge") if isinstance(value, dict) else value
    if type(edge) is not int or not 0 < edge <= RANGES["image_size"][1]:
        raise CheckpointError(
            f"{where}: {key!r} is {value!r:.60}, expected 'longest_edge' with a number of pixels"
        )
    return edge


def check_steps(path: Path, settings: dict[str, Any]) -> None:
    """Refuse an image processor that leaves out a step which is always done here, or scales pixels
    otherwise.

    Raises:
        CheckpointError: names the setting.
    """
    for key in _STEPS:
        if not config_value(path, settings, key, bool, True):
            raise CheckpointError(
                f"{path}: {key!r} is false, expected true: images are resized, rescaled and "
                f"normalized here"
            )
    factor = config_value(path, settings, "rescale_factor", float, 1 / 255)
    if abs(factor * 255 - 1) > 1e-6:
        raise CheckpointError(f"{path}: 'rescale_factor' is {factor}, expected 1 / 255")


def _check_resample(where: str, settings: dict[str, Any], expected: Resampling) -> None:
    found = settings.get("resample")
    if found not in (None, _RESAMPLE[expected]):
        raise CheckpointError(
            f"{where}: 'resample' is {found!r:.60}, expected {_RESAMPLE[expected]} ({expected})"
        )


def tower_names(spec: TransformerEncoder) -> dict[str, str]:
    """Our names and those of a CLIPVisionModel or SiglipVisionModel (``pre_layrnorm`` is spelled so
    in every release)."""
    embeddings = "vision_model.embeddings"
    names = {
        "vision.patch_embedding.weight": f"{embeddings}.patch_embedding.weight",
        "vision.position_embedding.weight": f"{embeddings}.position_embedding.weight",
    }
    if spec.class_token:
        names["vision.class_embedding"] = f"{embeddings}.class_embedding"
    if spec.patch_bias:
        names["vision.patch_embedding.bias"] = f"{embeddings}.patch_embedding.bias"
    for part in ("weight", "bias"):
        if spec.pre_norm:
            names[f"vision.pre_norm.{part}"] = f"vision_model.pre_layrnorm.{part}"
        if spec.post_norm:
            names[f"vision.post_norm.{part}"] = f"vision_model.post_layernorm.{part}"
        for index in range(spec.num_hidden_layers):
            for ours, theirs in _LAYER_PARTS.items():
                names[f"vision.layers.{index}.{ours}.{part}"] = (
                    f"vision_model.encoder.layers.{index}.{theirs}.{part}"
                )
    return names


_LAYER_PARTS = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def pixel_edge(value: Any, default: int, where: str, key: str) -> int:
    """An edge in pixels: an integer, or an object with ``shortest_edge`` or ``height``."""
    if isinstance(value, dict):
        edge = value.get("shortest_edge", value.get("height"))
        if "shortest_edge" not in value and value.get("width", edge) != edge:
            raise CheckpointError(f"{where}: {key!r} is {value!r:.60}, expected a square")
        value = edge
    if value is None:
        return default
    if type(value) is not int or not 0 < value <= RANGES["image_size"][1]:
        raise CheckpointError(f"{where}: {key!r} is {value!r:.60}, expected a number of pixels")
    return value


def channels(
    value: Any, default: tuple[float, float, float], where: str, key: str
) -> tuple[float, float, float]:
    """Return a mean or deviation for each channel."""
    if value is None:
        return default
    numbers = isinstance(value, list) and all(
        type(item) in (int, float) and abs(item) <= _FAR for item in value
    )
    if not numbers or len(value) != 3 or (key == "image_std" and min(value) <= 0):
        raise CheckpointError(f"{where}: {key!r} is {value!r:.60}, expected three numbers")
    red, green, blue = (float(channel) for channel in value)
    return red, green, blue

"""The on-disk layout that LLaVA and its descendants share.

config.json and weights of a language model (``backbones.py``) with ``mm_*`` keys and
``mm_projector.*``, and a CLIP tower in a folder of its own or inside the checkpoint.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mobilevlm.checkpoint import (
    SAFETENSORS,
    TensorFiles,
    TensorRef,
    Weights,
    check_presence,
    read_json,
)
from mobilevlm.connector_spec import ConnectorSpec
from mobilevlm.conversation import (
    CONVERSATIONS,
    INSTRUCTIONS,
    instructions_template,
    two_separator_template,
)
from mobilevlm.errors import CheckpointError, FileWarning
from mobilevlm.families.backbones import LLAMA, Backbone, decoder_refs, skipped_names
from mobilevlm.families.config import config_value, end_ids, read_config
from mobilevlm.families.pinpoints import any_resolution
from mobilevlm.families.registry import Source
from mobilevlm.families.towers import (
    KNOWN_TOWERS,
    Tower,
    image_spec,
    skipped_tower_names,
    tower_names,
    vision_spec,
)
from mobilevlm.hub_cache import absent, find_snapshot, is_hub_id
from mobilevlm.image_encoder import TransformerEncoder
from mobilevlm.input_spec import AnyResolution, FixedImage, InputSpec
from mobilevlm.spec import IMAGE_PLACEHOLDER, ConversationSpec, ModelSpec

_DEEPEST = 999
_NEWLINE = "image_newline"
_OPENCLIP = ("open_clip_config.json", "open_clip_pytorch_model.bin", "open_clip_model.safetensors")
"""Files of a tower in the layout of OpenCLIP."""


@dataclass(frozen=True)
class ProjectorLayout:
    """A projector and the names of its tensors: ours under ``projector.``, theirs under
    ``mm_projector.``."""

    spec: ConnectorSpec
    names: dict[str, str]


@dataclass(frozen=True)
class Naming:
    """Names that differ between descendants of LLaVA."""

    tower: str = "vision_tower"
    """The tower: its key is this after ``mm_``, and its copy in the checkpoint has it twice."""
    projector: str = "mm_projector"

    @property
    def tower_key(self) -> str:
        return f"mm_{self.tower}"


def read_layout(
    source: Source,
    *,
    family: str,
    conversation: str,
    projector: Callable[[dict[str, Any], TransformerEncoder], ProjectorLayout],
    prefer_checkpoint_tower: bool,
    backbone: Backbone = LLAMA,
    naming: Naming = Naming(),
) -> tuple[ModelSpec, Weights]:
    """Spec and weights of a checkpoint in this layout."""
    path, config = source.folder / "config.json", source.config
    files = source.weight_files()
    copy = f"{backbone.root}.{naming.tower}.{naming.tower}."
    embedded = f"{copy}vision_model.embeddings.class_embedding" in files
    tower = _find_tower(source, naming.tower_key, embedded)
    _check_features(path, config)
    vision = vision_spec(path, config, tower, naming.tower_key)
    decoder = backbone.read(path, config)
    check_depth(path, config, "mm_projector_type")
    layout = projector(config, vision)
    preparation = _preparation(path, config, tower, vision)
    newline = isinstance(preparation, AnyResolution)
    if newline and layout.spec.kind != "mlp":
        raise CheckpointError(
            f"{path}: 'image_aspect_ratio' is 'anyres', which goes with an MLP as projector, not "
            f"with {layout.spec.kind!r}"
        )
    connector = replace(layout.spec, newline=newline) if newline else layout.spec
    spec = ModelSpec(
        family=family,
        name=source.name,
        inputs={"image": InputSpec(preparation, vision, connector)},
        decoder=decoder,
        conversation=_conversation_spec(source, source.options.conversation or conversation),
    )
    refs = decoder_refs(files, decoder, backbone)
    for ours, name in layout.names.items():
        stored = f"{backbone.root}.{naming.projector}.{name}"
        refs[f"projector.{ours}"] = TensorRef(files, stored)
    if newline:
        refs["projector.newline"] = TensorRef(files, f"{backbone.root}.{_NEWLINE}")
    trained = _training_of_tower(path, config)
    own = embedded and (prefer_checkpoint_tower or trained is not None or tower.folder is None)
    prefix, tower_files = copy, files
    if not own:
        assert tower.folder is not None
        prefix, tower_files = "", TensorFiles(tower.folder)
    for ours, name in tower_names(vision).items():
        refs[ours] = TensorRef(tower_files, prefix + name)
    check_presence(refs)
    skipped = skipped_names(decoder, backbone)
    merge = config_value(path, config, "mm_patch_merge_type", str, "flat")
    if not newline and "unpad" in merge:  # the official code makes it, and reads it for tiles only
        skipped.append(rf"{re.escape(backbone.root)}\.{_NEWLINE}$")
    if own:
        source.check_unread(
            refs, files, skipped + skipped_tower_names(vision, tower.config, re.escape(copy))
        )
    else:
        source.check_unread(refs, files, [*skipped, re.escape(copy)])
        source.check_unread(refs, tower_files, skipped_tower_names(vision, tower.config))
    return spec, Weights(refs, notes=(_which_tower(path, tower, own, embedded, trained),))


def _training_of_tower(path: Path, config: dict[str, Any]) -> str | None:
    """Return the setting of config.json by which the tower was trained with the rest, so that the
    checkpoint's own counts."""
    for key in ("unfreeze_mm_vision_tower", "tune_vision_tower"):
        if config_value(path, config, key, bool, False):
            return f"{key!r}"
    parts = config_value(path, config, "mm_tunable_parts", str, "-")
    return "'mm_tunable_parts'" if "mm_vision_tower" in parts.split(",") else None


def _which_tower(path: Path, tower: Tower, own: bool, embedded: bool, trained: str | None) -> str:
    """Return the line that says where the tower's weights are read, and why there."""
    if own:
        reason = f" (trained with it, says {trained})" if trained else ""
        return f"tower       weights in {path.parent}{reason}"
    copy = " (the copy in the checkpoint is not read, as in the official code)"
    if trained and not embedded:
        warnings.warn(
            f"{path}: {trained} says that the vision tower was trained, but the checkpoint holds "
            f"none: {tower.folder} must be the trained one",
            FileWarning,
            stacklevel=2,
        )
    return f"tower       weights in {tower.folder}{copy * embedded}"


def mlp_projector(config: dict[str, Any], vision: TransformerEncoder) -> ProjectorLayout:
    """``linear`` (one Linear) or ``mlpNx_gelu`` (N Linears with GELU between)."""
    match = re.fullmatch(r"mlp(\d+)x_gelu", config.get("mm_projector_type") or "linear")
    return mlp_layout(config, vision, int(match[1]), "{}.") if match else mlp_layout(config, vision)


def check_depth(path: Path, config: dict[str, Any], key: str) -> None:
    """Raise CheckpointError where a projector's name has more Linears than any model has."""
    match = re.search(r"mlp(\d+)x_gelu", str(config.get(key)))
    if match and (len(match[1]) > len(str(_DEEPEST)) or int(match[1]) > _DEEPEST):
        raise CheckpointError(
            f"{path}: {key!r} is {config[key]!r:.40}, expected a depth of at most {_DEEPEST}"
        )


def mlp_layout(
    config: dict[str, Any],
    vision: TransformerEncoder,
    depth: int = 1,
    place: str = "",
    out_grid: int | None = None,
) -> ProjectorLayout:
    """An MLP of ``depth`` Linears. ``place``: where each is, by its number in a Sequential with
    activations; ``out_grid``: visual tokens per edge, where it pools first."""
    spec = ConnectorSpec(
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


def _find_tower(source: Source, key: str, embedded: bool) -> Tower:
    path, given = source.folder / "config.json", source.options.vision_tower
    name = config_value(path, source.config, key, str) if given is None else str(given)
    base = Path(name).name
    candidates = [Path(name)] if given is None else [given]
    for checkpoint in source.folders if given is None else ():
        candidates += [
            checkpoint / name, checkpoint / base, checkpoint / "vision_tower",
            checkpoint.resolve().parent / base,
        ]  # fmt: skip
    if given is None and is_hub_id(Path(name)) and (cached := find_snapshot(name)):
        candidates.append(cached)
    for folder in candidates:
        where = folder / "config.json"
        if _is_file(where):
            tower = read_config(where, "every vision tower has one")
            tower = config_value(where, tower, "vision_config", dict, tower)
            _check_kind(where, tower)
            preprocessor = folder / "preprocessor_config.json"
            return Tower(
                str(where),
                tower,
                read_json(preprocessor) if preprocessor.is_file() else {},
                folder,
            )
        if any(_is_file(folder / file) for file in _OPENCLIP):
            raise CheckpointError(
                f"{folder}: a tower in the layout of OpenCLIP, which is not supported: expected "
                f"CLIP as transformers saves it (config.json and {SAFETENSORS})"
            )
    if given is not None:
        raise CheckpointError(
            f"{given}: no vision tower there: expected a folder with config.json{absent(given)}"
        )
    for part, known in _OTHER_TOWERS.items():
        if part in name.lower():
            raise CheckpointError(
                f"{path}: the vision tower {name!r:.80} is {known}, not supported in this layout: "
                f"expected CLIP (SigLIP is supported in VILA)"
            )
    if embedded and name in KNOWN_TOWERS:
        return Tower(name, KNOWN_TOWERS[name], {}, None)
    fetched = f"fetch it with 'hf download {name}', " if is_hub_id(Path(name)) else ""
    raise CheckpointError(
        f"{path}: vision tower {name!r:.120} is not on this machine: {fetched}put its folder "
        f"beside the checkpoint as {base!r:.80}, or pass --vision-tower DIR"
    )


_OTHER_TOWERS = {
    "siglip": "SigLIP",
    "open_clip": "OpenCLIP",
    "open-clip": "OpenCLIP",
    "hf-hub:": "OpenCLIP",
    "laion": "OpenCLIP",
    "eva": "EVA-CLIP",
    "convnext": "ConvNeXt",
    "dinov": "DINO",
    "intern": "InternViT",
}
"""Parts of names of towers that LLaVA's descendants use and that are not CLIP of OpenAI's shape."""


def _check_kind(where: Path, tower: dict[str, Any]) -> None:
    """Refuse a tower of another kind by its name, before its keys and tensors look wrong."""
    kind = tower.get("model_type", "clip_vision_model")
    if kind not in ("clip_vision_model", "clip", None):
        raise CheckpointError(
            f"{where}: model_type is {kind!r:.60}, which is not supported in this layout: expected "
            f"clip_vision_model (siglip_vision_model is supported in VILA)"
        )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # no name that a file can have
        return False


def _check_features(path: Path, config: dict[str, Any]) -> None:
    feature = config_value(path, config, "mm_vision_select_feature", str, "patch")
    if feature != "patch":
        raise CheckpointError(
            f"{path}: 'mm_vision_select_feature' is {feature!r:.60}, expected 'patch'"
        )


def image_aspect(path: Path, config: dict[str, Any]) -> Literal["pad", "crop"]:
    """Return how an image becomes a square.

    Raises:
        CheckpointError: as several tiles.
    """
    aspect = config.get("image_aspect_ratio")
    if isinstance(aspect, str) and aspect.startswith("anyres"):
        raise CheckpointError(
            f"{path}: 'image_aspect_ratio' is {aspect!r:.60} (LLaVA-NeXT tiles): expected 'pad' or "
            f"'square'"
        )
    return "pad" if aspect == "pad" else "crop"


def _preparation(
    path: Path, config: dict[str, Any], tower: Tower, vision: TransformerEncoder
) -> FixedImage | AnyResolution:
    """Return how images become one square, or tiles (LLaVA 1.6)."""
    tiles = any_resolution(path, config, image_spec(tower, vision, "crop"))
    return tiles or image_spec(tower, vision, image_aspect(path, config))


def _conversation_spec(source: Source, name: str) -> ConversationSpec:
    """An answer ends at the ids that the configuration names and at the conversation's mark."""
    if name not in (*CONVERSATIONS, INSTRUCTIONS):
        raise CheckpointError(
            f"conversation {name!r} is not known: expected {', '.join(CONVERSATIONS)} or "
            f"{INSTRUCTIONS}"
        )
    style = CONVERSATIONS.get(name)
    mark = IMAGE_PLACEHOLDER
    if source.config.get("mm_use_im_start_end"):
        for token in ("<im_start>", "<im_end>"):
            if source.tokenizer.token_to_id(token) is None:
                raise CheckpointError(
                    f"{source.folder / 'config.json'}: 'mm_use_im_start_end' is true, but the "
                    f"vocabulary has no {token}: give the checkpoint's added_tokens.json too"
                )
        mark = f"<im_start>{IMAGE_PLACEHOLDER}<im_end>"
    ids = end_ids(source.folder_with("generation_config.json"), source.config)
    text = "</s>" if style is None else style.end
    end = source.tokenizer.token_to_id(text)
    if end is not None and end not in ids:
        ids = (*ids, end)
    template = instructions_template(mark) if style is None else two_separator_template(style, mark)
    return ConversationSpec(template, ids, (text,))

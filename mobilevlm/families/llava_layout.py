"""The on-disk layout that LLaVA and its descendants share.

config.json and weights of a language model (``backbones.py``) with ``mm_*`` keys and
``mm_projector.*``, and a CLIP tower in a folder of its own or inside the checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mobilevlm.checkpoint import TensorFiles, TensorRef, Weights, check_presence, read_json
from mobilevlm.conversation import CONVERSATIONS, two_separator_template
from mobilevlm.errors import CheckpointError
from mobilevlm.families import Source
from mobilevlm.families.backbones import LLAMA, Backbone, decoder_refs
from mobilevlm.families.config import config_value, end_ids
from mobilevlm.families.towers import KNOWN_TOWERS, Tower, image_spec, tower_names, vision_spec
from mobilevlm.spec import (
    IMAGE_PLACEHOLDER,
    ConversationSpec,
    ModelSpec,
    ProjectorSpec,
    VisionSpec,
)


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
    path, config = source.folder / "config.json", source.config
    files = source.weight_files()
    copy = f"{backbone.root}.{naming.tower}.{naming.tower}."
    embedded = f"{copy}vision_model.embeddings.class_embedding" in files
    tower = _find_tower(source, naming.tower_key, embedded)
    _check_features(path, config)
    vision = vision_spec(path, config, tower, naming.tower_key)
    decoder = backbone.read(path, config)
    layout = projector(config, vision)
    spec = ModelSpec(
        family=family,
        name=source.name,
        image=image_spec(tower, vision, _aspect(path, config)),
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
    for ours, name in tower_names(vision).items():
        refs[ours] = TensorRef(tower_files, prefix + name)
    check_presence(refs)
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
    for folder in candidates:
        if folder.is_dir() and (folder / "config.json").is_file():
            tower = read_json(folder / "config.json")
            tower = config_value(folder / "config.json", tower, "vision_config", dict, tower)
            preprocessor = folder / "preprocessor_config.json"
            return Tower(
                str(folder / "config.json"),
                tower,
                read_json(preprocessor) if preprocessor.is_file() else {},
                folder,
            )
    if given is not None:
        raise CheckpointError(f"{given}: no vision tower there: expected a folder with config.json")
    if embedded and name in KNOWN_TOWERS:
        return Tower(name, KNOWN_TOWERS[name], {}, None)
    raise CheckpointError(
        f"{path}: vision tower {name!r} is not on this machine: put its folder beside the "
        f"checkpoint as {base!r}, or pass --vision-tower DIR"
    )


def _check_features(path: Path, config: dict[str, Any]) -> None:
    feature = config_value(path, config, "mm_vision_select_feature", str, "patch")
    if feature != "patch":
        raise CheckpointError(
            f"{path}: 'mm_vision_select_feature' is {feature!r}, expected 'patch'"
        )


def _aspect(path: Path, config: dict[str, Any]) -> Literal["pad", "crop"]:
    aspect = config.get("image_aspect_ratio")
    if isinstance(aspect, str) and aspect.startswith("anyres"):
        raise CheckpointError(
            f"{path}: 'image_aspect_ratio' is {aspect!r} (LLaVA-NeXT tiles): expected 'pad' or "
            f"'square'"
        )
    return "pad" if aspect == "pad" else "crop"


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
    ids = end_ids(source.folder_with("generation_config.json"), source.config)
    end = source.tokenizer.token_to_id(style.end)
    if end is not None and end not in ids:
        ids = (*ids, end)
    return ConversationSpec(two_separator_template(style, mark), ids, (style.end,))

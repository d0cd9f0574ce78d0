"""Families: what turns a checkpoint folder into a ModelSpec and canonically named weights.

One file per family. A family registers itself under the names that its official checkpoints carry
in config.json (``model_type`` and ``mm_projector_type``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

from tokenizers import Tokenizer

from mobilevlm.adapters.adapter import Adapter, open_adapter
from mobilevlm.adapters.merging import MergedFiles
from mobilevlm.builtin import checkpoint_path
from mobilevlm.checkpoint import (
    ListedTensors,
    TensorFiles,
    TensorRef,
    Weights,
    check_unread,
)
from mobilevlm.errors import CheckpointError
from mobilevlm.families.config import read_config
from mobilevlm.spec import ModelSpec
from mobilevlm.tokenizers.tokenizer import has_tokenizer, read_tokenizer

_INSTRUCTION_TOKENIZER = "qformer_tokenizer"
"""Folder of the tokenizer of a Q-Former that reads text."""


@dataclass(frozen=True)
class OpenOptions:
    """What a person may say beside the checkpoint folder."""

    vision_tower: Path | None = None
    """Folder of the vision tower, where config.json only has its name on a hub."""
    conversation: str | None = None
    """Name of the conversation, where the family's default is not what the model was trained on."""
    variant: str | None = None
    """Which of several official behaviours, where the checkpoint does not tell the right one."""
    base: Path | None = None
    """Folder of the whole model that an adapter is merged into, where the checkpoint is one."""


def open_options(
    vision_tower: str | PathLike[str] | None,
    conversation: str | None,
    variant: str | None,
    base: str | PathLike[str] | None,
) -> OpenOptions:
    """Return the options, folders given as text included."""
    return OpenOptions(
        Path(vision_tower) if vision_tower else None,
        conversation,
        variant,
        Path(base) if base else None,
    )


@dataclass(frozen=True)
class Model:
    """An opened checkpoint: nothing of its weights is read yet."""

    folder: Path
    spec: ModelSpec
    weights: Weights
    tokenizer: Tokenizer
    tokenizer_folder: Path | None = None
    """Folder of the tokenizer's files, where there are any."""
    instruction_tokenizer: Tokenizer | None = None
    """Of a Q-Former that reads text."""


@dataclass(frozen=True)
class Source:
    """What a family reads a model from."""

    folder: Path
    """Folder of config.json."""
    config: dict[str, Any]
    """Content of config.json."""
    options: OpenOptions
    tokenizer: Tokenizer
    """Its own: a family may add tokens to it."""
    folders: tuple[Path, ...]
    """Folders of the checkpoint: its own, then that of an adapter's base."""
    adapter: Adapter | None = None

    @property
    def name(self) -> str:
        return self.folders[0].resolve().name

    def weight_files(self) -> TensorFiles | MergedFiles:
        """Open the weights in the checkpoint's own folder, an adapter merged into its base."""
        return TensorFiles(self.folder) if self.adapter is None else self.adapter.files

    def check_unread(
        self, refs: Mapping[str, TensorRef], files: ListedTensors, may_skip: Iterable[str]
    ) -> None:
        """See :func:`mobilevlm.checkpoint.check_unread`. What is an adapter's is named as it is
        there."""
        if self.adapter is not None and files is self.adapter.files:
            self.adapter.check_used(Weights(dict(refs)))
        check_unread(refs, files, may_skip)

    def folder_with(self, name: str) -> Path:
        """Return the first folder of the checkpoint that has a file or folder of this name."""
        return _folder_with(self.folders, name)


Read: TypeAlias = Callable[[Source], tuple[ModelSpec, Weights]]


@dataclass(frozen=True)
class Family:
    """How to recognise a family's checkpoints and how to read one."""

    name: str
    model_types: frozenset[str]
    projector_types: re.Pattern[str]
    keys: frozenset[str]
    """Of config.json, which tell its layout from that of other families."""
    language_model: str
    """Folder of the language model and its tokenizer, inside the checkpoint; empty: itself."""
    legacy: bool | None
    """What its loader tells a sentencepiece tokenizer, see :func:`read_tokenizer`."""
    ready_tokenizer: bool
    """tokenizer.json, where there is one, goes before the files that it was made of."""
    variants: tuple[str, ...]
    """Official behaviours that it knows, where there are several."""
    read: Read

    def claims(self, config: dict[str, Any]) -> bool:
        model_type = config.get("model_type")
        projector = config.get("mm_projector_type") or "linear"
        return (
            isinstance(model_type, str)
            and isinstance(projector, str)
            and model_type in self.model_types
            and self.keys <= config.keys()
            and self.projector_types.fullmatch(projector) is not None
        )


FAMILIES: dict[str, Family] = {}


def register(
    name: str,
    model_types: set[str],
    projector_types: str = ".*",
    *,
    keys: set[str] | None = None,
    language_model: str = "",
    legacy: bool | None = None,
    ready_tokenizer: bool = False,
    variants: tuple[str, ...] = (),
) -> Callable[[Read], Read]:
    """Registers the decorated reader as a family. ``projector_types`` is a regular expression; the
    others are fields of :class:`Family`."""

    def add(read: Read) -> Read:
        FAMILIES[name] = Family(
            name,
            frozenset(model_types),
            re.compile(projector_types),
            frozenset(keys or ()),
            language_model,
            legacy,
            ready_tokenizer,
            variants,
            read,
        )
        return read

    return add


def open_checkpoint(folder: Path, options: OpenOptions | None = None) -> Model:
    """Reads the configuration, tokenizer and tensor names of a checkpoint folder or built-in model.

    Raises:
        CheckpointError: the checkpoint is of no known family, or incomplete or inconsistent.
    """
    folder = checkpoint_path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    options = options or OpenOptions()
    adapter = open_adapter(folder, options.base)
    folders = (folder,) if adapter is None else (folder, adapter.base)
    home = _folder_with(folders, "config.json")
    config = read_config(home / "config.json", "every checkpoint has one")
    family = _find_family(home, config)
    if options.variant is not None and options.variant not in family.variants:
        known = f"expected {' or '.join(family.variants)}" if family.variants else "leave it out"
        raise CheckpointError(
            f"{folder}: variant {options.variant!r} is not known for {family.name}: {known}"
        )
    words = [each / family.language_model for each in folders]
    place = next((each for each in words if has_tokenizer(each)), words[-1])
    tokenizer = read_tokenizer(place, family.legacy, family.ready_tokenizer)
    spec, weights = family.read(Source(home, config, options, tokenizer, folders, adapter))
    pieces = tokenizer.get_vocab_size(with_added_tokens=False)
    if pieces > spec.decoder.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {pieces} pieces, but 'vocab_size' in config.json is "
            f"{spec.decoder.vocab_size}: these files are of different models"
        )
    sizes = (spec.decoder.vocab_size, spec.decoder.hidden_size)
    weights.check("decoder.embed_tokens.weight", sizes)
    asked = None
    if spec.image.connector.reads_text:
        own = _folder_with(folders, _INSTRUCTION_TOKENIZER)
        asked = read_tokenizer(own / _INSTRUCTION_TOKENIZER, ready=True)
    return Model(folder, spec, weights, tokenizer, place, asked)


def _folder_with(folders: tuple[Path, ...], name: str) -> Path:
    return next((folder for folder in folders if (folder / name).exists()), folders[0])


def _find_family(folder: Path, config: dict[str, Any]) -> Family:
    path, model_type = folder / "config.json", config.get("model_type")
    for family in FAMILIES.values():
        if family.keys and family.claims(config):
            return family
    if "text_config" in config and "vision_config" in config:
        raise CheckpointError(
            f"{path}: the transformers re-packaging of a model ('text_config'): give the original "
            f"checkpoint (for example liuhaotian/llava-v1.5-7b, not llava-hf/…)"
        )
    for family in FAMILIES.values():
        if not family.keys and family.claims(config):
            return family
    known = sorted({kind for family in FAMILIES.values() for kind in family.model_types})
    if model_type not in known:
        raise CheckpointError(
            f"{path}: model_type is {model_type!r:.60}, expected one of {', '.join(known)}"
        )
    raise CheckpointError(
        f"{path}: mm_projector_type {config.get('mm_projector_type')!r:.60} is not known for "
        f"model_type {model_type!r:.60}: expected linear, mlp2x_gelu (any depth), ldpnet or "
        f"ldpnetv2"
    )


from mobilevlm.families import (  # noqa: E402  (they register themselves)
    blip,  # noqa: F401
    llava,  # noqa: F401
    mobilevlm,  # noqa: F401
    moe_llava,  # noqa: F401
    vila,  # noqa: F401
)

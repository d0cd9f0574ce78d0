"""Registry of families: how a family's checkpoints are recognised, and what it reads them from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from tokenizers import Tokenizer

from mobilevlm.adapters.adapter import Adapter
from mobilevlm.adapters.merging import MergedFiles
from mobilevlm.checkpoint import ListedTensors, TensorFiles, TensorRef, Weights, check_unread
from mobilevlm.families.fused import FusedTensors
from mobilevlm.hub_cache import repository_name
from mobilevlm.model import OpenOptions
from mobilevlm.spec import ModelSpec


@dataclass(frozen=True)
class Source:
    """Files and settings that a family reads a model from."""

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
        return repository_name(self.folders[0])

    def weight_files(self) -> TensorFiles | MergedFiles:
        """Open the weights in the checkpoint's own folder, an adapter merged into its base."""
        return TensorFiles(self.folder) if self.adapter is None else self.adapter.files

    def check_unread(
        self, refs: Mapping[str, TensorRef], files: ListedTensors, may_skip: Iterable[str]
    ) -> None:
        """See :func:`mobilevlm.checkpoint.check_unread`. What is an adapter's is named as it is
        there."""
        stored, read = files, {ref.name for ref in refs.values() if ref.files is files}
        if isinstance(files, FusedTensors):
            stored, read = files.stored, files.stored_names(read)
        if self.adapter is not None and stored is self.adapter.files:
            self.adapter.check_used(read)
        check_unread(refs, files, may_skip)

    def folder_with(self, name: str) -> Path:
        """Return the first folder of the checkpoint that has a file or folder of this name."""
        return folder_with(self.folders, name)


Read: TypeAlias = Callable[[Source], tuple[ModelSpec, Weights]]


@dataclass(frozen=True)
class Family:
    """How to recognise a family's checkpoints and how to read one."""

    name: str
    model_types: frozenset[str]
    projector_types: re.Pattern[str]
    keys: frozenset[str]
    """Keys of config.json that tell its layout from that of other families."""
    language_model: str
    """Folder of the language model and its tokenizer, inside the checkpoint; empty: itself."""
    legacy: bool | None
    """Setting of its sentencepiece tokenizer, see :func:`read_tokenizer`."""
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


def folder_with(folders: tuple[Path, ...], name: str) -> Path:
    """Return the first of the folders that has a file or folder of this name; else the first."""
    return next((folder for folder in folders if (folder / name).exists()), folders[0])

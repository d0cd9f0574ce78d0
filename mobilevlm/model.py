"""An opened checkpoint, and what a person may say when it is opened."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from tokenizers import Tokenizer

from mobilevlm.checkpoint import Weights
from mobilevlm.spec import ModelSpec


@dataclass(frozen=True)
class OpenOptions:
    """Options of opening a checkpoint."""

    vision_tower: Path | None = None
    """Folder of the vision tower, where config.json only has its name on a hub."""
    conversation: str | None = None
    """Name of the conversation, where the family's default is not what the model was trained on."""
    variant: str | None = None
    """One of several official behaviours, where the checkpoint does not tell the right one."""
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
    """Tokenizer of a Q-Former that reads text."""

"""Models of the Hugging Face hub by their ids (``org/name``), in the local cache of its tools.

Layout of the cache: ``models--org--name/snapshots/REVISION/`` with links to blobs, and the revision
of a branch in ``refs/main``. Nothing is downloaded unless :func:`fetch` is called.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mobilevlm.console.line_editing import expanded
from mobilevlm.errors import CheckpointError, require

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_REVISION = re.compile(r"[0-9a-f]{7,64}")
_TEXTS = ("*.json", "*.jinja", "*.txt", "*.model")
"""Configurations and tokenizers of a checkpoint"""


def hub_cache() -> Path:
    """Return the folder of the cache, by the variables that the hub's tools read."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if place := os.environ.get(name):
            return expanded(place)
    if place := os.environ.get("HF_HOME"):
        return expanded(place) / "hub"
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface" / "hub"


def is_hub_id(given: Path) -> bool:
    """Return whether a path is a model's id; a file or folder of that name comes first."""
    return _ID.fullmatch(str(given)) is not None and not given.exists()


def find_snapshot(identity: str) -> Path | None:
    """Return the folder of a model in the cache; none if it is not there."""
    folder = hub_cache() / f"models--{identity.replace('/', '--')}"
    try:
        revision = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        revision = ""
    if _REVISION.fullmatch(revision):
        found = folder / "snapshots" / revision
        return found if found.is_dir() else None
    known = [each for each in _folders(folder / "snapshots") if _REVISION.fullmatch(each.name)]
    return known[0] if len(known) == 1 else None


def cached_models() -> Iterator[tuple[str, Path]]:
    """Yield the models in the cache, by id."""
    for folder in _folders(hub_cache()):
        kind, _, name = folder.name.partition("--")
        identity = name.replace("--", "/", 1)
        if kind == "models" and _ID.fullmatch(identity):
            snapshot = find_snapshot(identity)
            if snapshot is not None:
                yield identity, snapshot


def repository_name(folder: Path) -> str:
    """Return the name of a checkpoint: its folder's, or that of the model whose snapshot it is."""
    place = folder.resolve()
    home = place.parents[1] if len(place.parents) > 1 else place
    if place.parent.name == "snapshots" and home.name.startswith("models--"):
        return home.name.rpartition("--")[2]
    return place.name


def absent(given: Path) -> str:
    """Return the end of a message that a folder is not there: how to get the model, if it may be
    the id of one."""
    if not is_hub_id(given):
        return ""
    return (
        f", and no such model in {hub_cache()}: fetch it with 'hf download {given}' "
        f"('huggingface-cli download {given}'), or say --download"
    )


def fetch(identity: str) -> Path:
    """Download what a checkpoint needs into the cache, and return its folder.

    Raises:
        CheckpointError: the hub has no such model, or cannot be reached.
        MissingExtraError: the hub's package is not installed.
    """
    try:
        hub: Any = importlib.import_module("huggingface_hub")
    except ModuleNotFoundError as error:
        if error.name != "huggingface_hub":
            raise
        raise require("huggingface_hub", "hub", "--download") from None
    from mobilevlm.tokenizers.json_file import foreign

    with foreign(f"{identity}: cannot be downloaded", CheckpointError):
        files = hub.HfApi().list_repo_files(identity)
        kind = "*.safetensors" if any(map(_is_weights, files)) else "*.bin"
        return Path(hub.snapshot_download(identity, allow_patterns=[*_TEXTS, kind]))


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors") and not name.startswith("adapter")


def _folders(place: Path) -> list[Path]:
    try:
        return sorted(each for each in place.iterdir() if each.is_dir())
    except OSError:
        return []

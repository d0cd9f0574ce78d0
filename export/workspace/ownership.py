"""Ownership of what lies where a bundle is to be: what an export may remove, and what it may not.

A file is the bundle's if the manifest beside it lists it by its digest. The manifest itself is, if
its own digest is right, and so is ``plan.json`` if it has the form that ``tune`` writes. Anything
else belongs to a person: folders without such a file in them, links, and files that were changed.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mobilevlm.bundle import MANIFEST, signed_manifest
from mobilevlm.errors import BundleError
from mobilevlm.runtime.tuning.plan_file import PLAN, SCHEMA_VERSION
from mobilevlm.whole_file import file_sha256

_NAMED = 3
"""At most so many files are named in an error."""
_LONGEST = 80
"""Characters of a name in an error"""
_LARGEST_PLAN = 1 << 24

Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class Owned:
    """The files of a bundle that were found to be its own, each with inode, size and time."""

    files: dict[str, Stamp]
    digest: str
    """Digest of the manifest; empty where there is no bundle, but an empty folder."""


def check_owned(folder: Path, known: Owned | None = None, hashed: bool = True) -> Owned:
    """Return the files of a bundle after checking that nothing else is in its folder. ``known``:
    what an earlier check found; what has not changed since is not hashed again. ``hashed``: digests
    are compared, not only names and sizes.

    Raises:
        BundleError: something there is not the bundle's, or cannot be removed. It is named.
    """
    if not stat.S_ISDIR(folder.lstat().st_mode):
        raise BundleError(f"{folder}: no folder, but in the way: choose another name")
    entries = dict(_entries(folder))
    below = [folder / name for name, status in entries.items() if stat.S_ISDIR(status.st_mode)]
    if closed := [path for path in (folder, *below) if not os.access(path, os.W_OK | os.X_OK)]:
        raise BundleError(
            f"{closed[0]}: the folder cannot be written to, so the bundle cannot be replaced: "
            f"change its permissions, or choose another output"
        )
    if not entries:
        return Owned({}, "")
    if MANIFEST not in entries:
        raise BundleError(
            f"{folder}: the folder is not empty and not a bundle (it holds {_names([*entries])}): "
            f"choose another one"
        )
    data = _signed(folder, entries)
    listed: dict[str, Any] = data["files"]
    parents = {str(parent) for name in listed for parent in PurePosixPath(name).parents}
    foreign, changed, files = [], [], {}
    for name, status in entries.items():
        if stat.S_ISDIR(status.st_mode):
            if name not in parents:
                foreign.append(name)
        elif not stat.S_ISREG(status.st_mode):
            foreign.append(name)
        elif name == MANIFEST or (name == PLAN and _is_plan(folder / name, status.st_size)):
            files[name] = _stamp(status)
        elif name not in listed:
            foreign.append(name)
        elif (known and known.files.get(name) == _stamp(status)) or _is_listed(
            folder / name, status.st_size, listed[name], hashed
        ):
            files[name] = _stamp(status)
        else:
            changed.append(name)
    if foreign:
        raise BundleError(
            f"{folder}: the bundle would be replaced, and {_names(foreign)} "
            f"{'is' if len(foreign) == 1 else 'are'} not part of it: move it away, or choose "
            f"another output"
        )
    if changed:
        raise BundleError(
            f"{folder}: the bundle would be replaced, and {_names(changed)} "
            f"{'is' if len(changed) == 1 else 'are'} not as its manifest says, so it may be "
            f"someone's own work: delete it, or choose another output"
        )
    return Owned(files, str(data["sha256"]))


def remove_owned(folder: Path, owned: Owned) -> None:
    """Remove a bundle's own files, its manifest last, and the folders that are empty then. (Who is
    killed halfway leaves a folder whose manifest still says what belongs to it.)"""
    for name in sorted(owned.files.keys() - {MANIFEST}):
        (folder / name).unlink()
    for above, below, _ in os.walk(folder, topdown=False):
        for name in below:
            (Path(above) / name).rmdir()
    (folder / MANIFEST).unlink(missing_ok=True)
    folder.rmdir()


def _signed(folder: Path, entries: dict[str, os.stat_result]) -> dict[str, Any]:
    """The manifest as JSON. It need not be one that this version reads."""
    path = folder / MANIFEST
    data = None
    if stat.S_ISREG(entries[MANIFEST].st_mode):
        try:
            data = signed_manifest(folder)
        except BundleError:
            data = None
    if data is None or not _lists_files(data):
        raise BundleError(
            f"{folder}: the folder is not empty and not a bundle ({path.name} is damaged or of "
            f"another program, so nothing says whose the files are): delete the folder, or choose "
            f"another one"
        )
    return data


def _lists_files(data: dict[str, Any]) -> bool:
    files = data.get("files")
    return (
        isinstance(files, dict)
        and {"spec", "artifacts"} <= data.keys()
        and all(isinstance(entry, dict) for entry in files.values())
    )


def _entries(folder: Path, above: str = "") -> Iterator[tuple[str, os.stat_result]]:
    """Everything below a folder by its name with ``/``; links are not followed."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        status = entry.stat(follow_symlinks=False)
        yield f"{above}{entry.name}", status
        if stat.S_ISDIR(status.st_mode):
            yield from _entries(folder / entry.name, f"{above}{entry.name}/")


def _is_listed(path: Path, size: int, entry: dict[str, Any], hashed: bool) -> bool:
    if size != entry.get("size"):
        return False
    return not hashed or file_sha256(path) == entry.get("sha256")


def _is_plan(path: Path, size: int) -> bool:
    """Return whether a file has the form of the plans that ``tune`` writes."""
    if size > _LARGEST_PLAN:
        return False
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    return (
        isinstance(data, dict)
        and data.keys() == {"schema_version", "processors"}
        and data["schema_version"] == SCHEMA_VERSION
        and isinstance(data["processors"], dict)
    )


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _names(names: list[str]) -> str:
    """For an error: some of them, cut."""
    shown = [repr(name if len(name) <= _LONGEST else f"{name[:_LONGEST]}…") for name in names]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(shown[:_NAMED])}{more}"

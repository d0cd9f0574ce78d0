"""The work folder of an export: resumable, then put in the bundle's place in one rename.

It lies beside the bundle as ``BUNDLE.partial``. What is finished there, or in the bundle
that is replaced, is taken over when everything it was made of is the same (its key).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mobilevlm.bundle import MANIFEST, Artifact, is_bundle, read_manifest
from mobilevlm.checkpoint import file_sha256
from mobilevlm.errors import BundleError, MobileVLMError
from mobilevlm.spec import from_dict, to_dict

RECORDS = "finished"
"""Folder in the work folder where finished artifacts are noted."""


@dataclass(frozen=True)
class Record:
    """A finished artifact: noted beside its files, so that an interrupted export can go on."""

    artifact: Artifact
    sizes: dict[str, int]


@dataclass(frozen=True)
class Workspace:
    """Where an export works, and what it will replace."""

    folder: Path
    target: Path

    def path(self, name: str) -> Path:
        """A file of the bundle to be."""
        return self.folder / name


def check_target(target: Path) -> Path:
    """The folder that the bundle will be. Never replaces anything but a bundle; puts back one that
    a crash left moved aside.

    Raises:
        BundleError: something that is not a bundle is in the way.
    """
    if target.is_symlink() or not target.name:  # what is renamed must be the folder itself
        target = target.resolve()
    aside = _beside(target, "partial.old")
    if aside.exists() and not target.exists():
        aside.rename(target)
    if target.exists() and not target.is_dir():
        raise BundleError(f"{target}: a file is in the way: choose another name for the bundle")
    if target.is_dir() and not _is_replaceable(target) and any(target.iterdir()):
        raise BundleError(f"{target}: the folder is not empty and not a bundle: choose another one")
    return target


@contextmanager
def open_workspace(target: Path) -> Iterator[Workspace]:
    """Makes the work folder for a checked target, for one export at a time.

    Raises:
        BundleError: another export is at work there.
    """
    work = Workspace(_beside(target, "partial"), target)
    (work.folder / RECORDS).mkdir(parents=True, exist_ok=True)
    with _locked(work.folder):
        yield work


def take_over(work: Workspace, artifact: Artifact) -> Artifact | None:
    """The same artifact from an interrupted export or from the bundle that is replaced."""
    return _from_record(work, artifact) or _from_bundle(work, artifact)


def note_finished(work: Workspace, artifact: Artifact) -> int:
    """Makes a finished artifact safe against a crash. Returns the bytes of its files."""
    sizes = {name: work.path(name).stat().st_size for name in artifact.files}
    for name in sizes:
        _flush(work.path(name))  # after a power cut, what the record promises is there
    path = _record_path(work, artifact)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(to_dict(Record(artifact, sizes))), encoding="utf-8")
    draft.replace(path)
    return sum(sizes.values())


def keep_only(work: Workspace, names: Sequence[str]) -> None:
    """Removes what an earlier attempt with another recipe left in the work folder."""
    for path in sorted(work.folder.rglob("*"), reverse=True):
        if path.is_file() and path.relative_to(work.folder).as_posix() not in names:
            path.unlink()
    for path in sorted(work.folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def replace_target(work: Workspace) -> None:
    """Puts the finished work folder in the bundle's place."""
    for path in work.folder.rglob("*"):
        if path.is_file():
            _flush(path)
    aside = _beside(work.target, "partial.old")
    shutil.rmtree(aside, ignore_errors=True)
    if work.target.exists():
        work.target.rename(aside)
    work.folder.rename(work.target)
    shutil.rmtree(aside, ignore_errors=True)


def _is_replaceable(folder: Path) -> bool:
    """Whether it is a bundle, whole or damaged. Other programs have a manifest.json too."""
    return is_bundle(folder) and b'"schema_version"' in (folder / MANIFEST).read_bytes()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a lock on the folder, which a process that dies lets go."""
    try:
        import fcntl
    except ImportError:  # not on this system: exports to the same target are the person's care
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise BundleError(
            f"{folder}: another export is working here: wait for it, or choose another output"
        ) from None
    finally:
        os.close(handle)


def _from_record(work: Workspace, artifact: Artifact) -> Artifact | None:
    try:
        data = json.loads(_record_path(work, artifact).read_text(encoding="utf-8"))
        record = from_dict(Record, data, "record")
    except (OSError, ValueError, MobileVLMError):
        return None
    complete = all(
        work.path(name).is_file() and work.path(name).stat().st_size == size
        for name, size in record.sizes.items()
    )
    return record.artifact if record.artifact.key == artifact.key and complete else None


def _from_bundle(work: Workspace, artifact: Artifact) -> Artifact | None:
    """Its files are checked, then linked."""
    try:
        manifest, _ = read_manifest(work.target)
    except BundleError:
        return None
    same = [old for old in manifest.artifacts if old.key == artifact.key]
    if not same:
        return None
    for name in same[0].files:
        source, entry = work.target / name, manifest.files.get(name)
        if entry is None or not source.is_file() or file_sha256(source) != entry.sha256:
            return None
    for name in same[0].files:
        work.path(name).parent.mkdir(parents=True, exist_ok=True)
        work.path(name).unlink(missing_ok=True)
        try:
            os.link(work.target / name, work.path(name))
        except OSError:  # a file system without links
            shutil.copyfile(work.target / name, work.path(name))
    return same[0]


def _record_path(work: Workspace, artifact: Artifact) -> Path:
    return work.folder / RECORDS / f"{artifact.format}-{artifact.stage}.json"


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _beside(target: Path, ending: str) -> Path:
    return target.resolve().with_name(f"{target.resolve().name}.{ending}")

"""The work folder of an export: resumable, then in the bundle's place in one step.

It lies beside the bundle under a name of its own and holds a token (which folder this is, and which
target it works for), records of finished artifacts, and the files of the bundle to be. Names decide
nothing: a folder without the right token is never touched. What is finished there, or in the bundle
that is replaced, is reused when it was made of the same (its key) and has the digest that it
had.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mobilevlm.bundle import MANIFEST, Artifact, FileEntry, read_manifest
from mobilevlm.bundle_identity import without_readers
from mobilevlm.console import progress
from mobilevlm.errors import BundleError, MobileVLMError
from mobilevlm.export.workspace.exchange import exchange
from mobilevlm.export.workspace.ownership import Owned, check_owned, remove_owned
from mobilevlm.export.workspace.work_folder import (
    CONTENT,
    WorkFolder,
    claim,
    discard,
    restore_target,
    settle,
)
from mobilevlm.plain_types import from_dict, to_dict
from mobilevlm.runtime.tuning.plan_file import PLAN
from mobilevlm.whole_file import file_sha256

RECORDS = "finished"
"""Folder in the work folder with the records of finished artifacts."""


@dataclass(frozen=True)
class Record:
    """A finished artifact, and each of its files when it was finished. Its key is the digest of the
    inputs and of the part of the recipe that it was made with."""

    artifact: Artifact
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class Workspace:
    """An export at work."""

    home: WorkFolder
    target: Path
    replaced: Owned
    """Files of the bundle that will be replaced"""

    @property
    def folder(self) -> Path:
        """The folder that becomes the bundle."""
        return self.home.path / CONTENT

    def path(self, name: str) -> Path:
        """A file of the bundle to be."""
        return self.folder / name


def check_target(target: Path) -> Path:
    """Return the folder that the bundle will be, links resolved, after checking that nothing in it
    would be lost. A bundle that a crash left moved aside is put back first.

    Raises:
        BundleError: something that is not a bundle's is in the way.
    """
    if target.is_symlink() and target.lstat().st_uid not in (0, os.geteuid()):
        raise BundleError(f"{target}: a link of another user: name the folder itself")
    target = target.resolve()
    if not target.name:
        raise BundleError(f"{target}: the root folder cannot become a bundle: name another folder")
    if not target.exists():
        restore_target(target)
    if not target.exists():
        return target
    if not target.is_dir():
        raise BundleError(f"{target}: a file is in the way: choose another name for the bundle")
    if target.stat().st_dev != target.parent.stat().st_dev:
        raise BundleError(
            f"{target}: another file system is mounted there, a folder cannot be put in its place: "
            f"name a folder in it"
        )
    check_owned(target, hashed=False)
    return target


@contextmanager
def open_workspace(target: Path) -> Iterator[Workspace]:
    """Make the work folder for a checked target, or reuse the one that a killed export left, for
    one export at a time.

    Raises:
        BundleError: another export is at work there, or something is in the way.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with claim(target) as home:
        settle(home, target)
        records = home.path / RECORDS
        try:
            owned = check_owned(target) if target.exists() else Owned({}, "")
            work = Workspace(home, target, owned)
            for folder in (work.folder, records):
                folder.mkdir(exist_ok=True)
            yield work
        except BaseException:
            if not records.is_dir() or not any(records.iterdir()):  # nothing to go on with
                discard(home)
            raise


def take_over(work: Workspace, artifact: Artifact) -> Artifact | None:
    """Return the same artifact from an interrupted export or from the bundle that is replaced."""
    return _from_record(work, artifact) or _from_bundle(work, artifact)


def begin_artifact(work: Workspace, artifact: Artifact) -> None:
    """Make room for an artifact: no record says anything about its files from now on."""
    for path in (work.home.path / RECORDS).iterdir():
        record = _read_record(path)
        if record is None or not record.files.keys().isdisjoint(artifact.files):
            path.unlink()
    for name in artifact.files:
        work.path(name).parent.mkdir(parents=True, exist_ok=True)
        work.path(name).unlink(missing_ok=True)  # it may be a link into the bundle


def note_finished(work: Workspace, artifact: Artifact) -> int:
    """Make a finished artifact safe against a crash. Returns the bytes of its files."""
    for name in artifact.files:
        _flush(work.path(name))  # after a power cut, what the record promises is there
    files = {name: _described(work.path(name)) for name in artifact.files}
    path = work.home.path / RECORDS / f"{artifact.format}-{artifact.stage}.json"
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(to_dict(Record(artifact, files))), encoding="utf-8")
    _flush(draft)
    draft.replace(path)
    return sum(entry.size for entry in files.values())


def check_recorded(work: Workspace, files: Mapping[str, FileEntry]) -> None:
    """Check that the files which the manifest will vouch for are those that were written.

    Raises:
        BundleError: one was changed since its record.
    """
    for path in (work.home.path / RECORDS).iterdir():
        record = _read_record(path)
        for name, entry in record.files.items() if record else ():
            if name in files and files[name] != entry:
                raise BundleError(
                    f"{work.path(name)}: the file was changed during the export: run the same "
                    f"command again"
                )


def keep_only(work: Workspace, names: Sequence[str]) -> None:
    """Remove what an earlier attempt with another recipe left in the work folder."""
    for above, folders, files in os.walk(work.folder, topdown=False):
        for file in files:
            path = Path(above) / file
            if path.relative_to(work.folder).as_posix() not in names:
                path.unlink()
        for folder in folders:
            path = Path(above) / folder
            if path.is_symlink():
                path.unlink()
            elif not any(path.iterdir()):
                path.rmdir()


def replace_target(work: Workspace) -> None:
    """Put the finished work folder in the bundle's place, and remove what was there.

    Raises:
        BundleError: meanwhile something that is not the bundle's came to be there. Nothing was
            changed.
    """
    for above, _, files in os.walk(work.folder):
        for name in files:
            _flush(Path(above) / name)
        _flush(Path(above))
    home, target, owned = work.home, work.target, work.replaced
    if os.path.lexists(target):
        owned = check_owned(target, owned)
        _carry_plan(work, owned)
        with without_readers(target):
            _swap(work, owned)
    else:
        work.folder.rename(target)
    _flush(target.parent)
    discard(home)


def _swap(work: Workspace, owned: Owned) -> None:
    """Exchange the folders. Where the system cannot, the older one is moved aside first, and
    whoever loads waits for the moment in between (mobilevlm/bundle_identity.py)."""
    home, target = work.home, work.target
    home.note_content(work.folder)
    if exchange(work.folder, target):
        older = work.folder
    else:
        older = home.aside
        target.rename(older)
        work.folder.rename(target)
    _flush(target.parent)
    try:
        owned = check_owned(older, owned)
    except BundleError:  # someone put a file there at the last moment: all goes back
        if not exchange(older, target):
            target.rename(work.folder)
            older.rename(target)
        home.forget_content()
        raise
    remove_owned(older, owned)


def _carry_plan(work: Workspace, owned: Owned) -> None:
    """Keep what ``tune`` measured, where the bundle will be the same as before."""
    if PLAN not in owned.files:
        return
    data = json.loads(work.path(MANIFEST).read_text(encoding="utf-8"))
    if data["sha256"] == owned.digest:
        shutil.copy2(work.target / PLAN, work.path(PLAN))
        _flush(work.path(PLAN))
    else:
        progress.say(f"plan        {PLAN} was measured on the older bundle: dropped, tune again")


def _from_record(work: Workspace, artifact: Artifact) -> Artifact | None:
    path = work.home.path / RECORDS / f"{artifact.format}-{artifact.stage}.json"
    record = _read_record(path)
    if record is None or record.artifact.key != artifact.key:
        return None
    same = all(_is_as_noted(work.path(name), entry) for name, entry in record.files.items())
    return record.artifact if same else None


def _read_record(path: Path) -> Record | None:
    try:
        return from_dict(Record, json.loads(path.read_text(encoding="utf-8")), "record")
    except (OSError, ValueError, MobileVLMError):
        return None


def _from_bundle(work: Workspace, artifact: Artifact) -> Artifact | None:
    """Its files are linked, then checked."""
    try:
        manifest, _ = read_manifest(work.target)
    except BundleError:
        return None
    same = [old for old in manifest.artifacts if old.key == artifact.key]
    if not same or not {*same[0].files} <= manifest.files.keys():
        return None
    begin_artifact(work, same[0])
    for name in same[0].files:
        source = work.target / name
        try:
            os.link(source, work.path(name), follow_symlinks=False)
        except FileNotFoundError:
            return None
        except OSError:  # a file system without links
            shutil.copyfile(source, work.path(name), follow_symlinks=False)
        if not _is_as_noted(work.path(name), manifest.files[name]):
            return None
    return same[0]


def _is_as_noted(path: Path, entry: FileEntry) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    regular = stat.S_ISREG(status.st_mode) and status.st_size == entry.size
    return regular and file_sha256(path) == entry.sha256


def _described(path: Path) -> FileEntry:
    return FileEntry(path.stat().st_size, file_sha256(path))


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Bundles of built-in models.

``nano`` comes as a bundle too, so that it runs without the packages for exporting, without a cache
folder and without a home. Other bundles of built-in models are exported once, into the cache
folder; processes that need one at the same time wait for the first.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from mobilevlm._version import __version__
from mobilevlm.builtin import BUNDLES, RECIPE, WEIGHTS, is_built_in
from mobilevlm.bundle import cache_folder, is_bundle, open_bundle
from mobilevlm.console import progress
from mobilevlm.errors import BundleError, require
from mobilevlm.whole_file import file_sha256

PATIENCE = 180.0
"""Seconds to wait for the export of another process"""


def bundle_path(given: Path, engine: str = "auto", writable: bool = False) -> Path:
    """Return the bundle that a built-in name stands for; any other path as it is. ``writable``: one
    in the cache folder, which may be tuned.

    The first use of one that does not come with the package exports it into the cache folder, about
    two seconds of work. Where that folder cannot be written, it is exported into a temporary one
    for as long as the process lives.

    Raises:
        MissingExtraError: it is to be exported, and the packages for that are not installed.
        BundleError: neither the cache folder nor a temporary one can be written.
    """
    if not is_built_in(given):
        return given
    formats = ("onnx",) if engine in ("auto", "onnx") else ("onnx", "gguf")
    shipped = BUNDLES / given
    comes_with = formats == ("onnx",) and is_bundle(shipped)
    folder = _cached(str(given), formats)
    if folder is not None and _is_whole(folder):
        return folder
    if comes_with and not writable:
        return shipped
    if folder is not None and (reason := _obstacle(folder.parent)) is None:
        with _locked(folder) as alone:
            if alone:
                if not _is_whole(folder):
                    _clear(folder)
                    _make(str(given), formats, folder)
                return folder
            reason = f"another process has been exporting there for {PATIENCE:.0f} s"
    elif folder is None:
        reason = "there is no home folder"
    if writable:
        raise BundleError(
            f"{given}: the cache folder cannot be used ({reason}): set XDG_CACHE_HOME to a folder "
            f"that can be written"
        )
    return _temporary(str(given), formats, str(reason))


def _cached(name: str, formats: tuple[str, ...]) -> Path | None:
    """The bundle's place in the cache folder; none where there is no home."""
    digest = file_sha256(WEIGHTS / name / "model.safetensors")
    version = f"{__version__}-{digest[:12]}"
    try:
        return cache_folder() / "models" / f"{name}-{RECIPE}-{'-'.join(formats)}-{version}"
    except RuntimeError:
        return None


def _is_whole(folder: Path) -> bool:
    """Return whether a bundle is there whose files are as its manifest says."""
    try:
        return is_bundle(folder) and bool(open_bundle(folder))
    except (BundleError, OSError):
        return False


def _obstacle(folder: Path) -> str | None:
    """Why bundles cannot be put into the cache folder; none where they can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"{folder}: {error.strerror or error}"


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Holds the lock of a bundle's place. False: another process did not let go of it in time."""
    try:
        import fcntl
    except ImportError:  # not on this system
        yield True
        return
    end = time.monotonic() + PATIENCE
    with folder.with_name(f"{folder.name}.lock").open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    yield False
                    return
                time.sleep(0.1)
            except OSError:  # a file system without locks
                break
        yield True


def _clear(folder: Path) -> None:
    """Removes what is in a bundle's place in the cache and is no whole bundle. It is moved aside
    first, so that nobody opens half of it."""
    if folder.is_symlink():
        folder.unlink()
    for older in folder.parent.glob(f"{folder.name}.damaged-*"):
        shutil.rmtree(older, ignore_errors=True)
    if folder.exists():
        aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.damaged-", dir=folder.parent))
        folder.rename(aside / "bundle")
        shutil.rmtree(aside, ignore_errors=True)


def _make(name: str, formats: tuple[str, ...], folder: Path) -> None:
    shipped = BUNDLES / name
    if formats == ("onnx",) and shipped.is_dir():
        draft = Path(tempfile.mkdtemp(prefix=f"{folder.name}.damaged-", dir=folder.parent))
        shutil.copytree(shipped, draft / "bundle")
        (draft / "bundle").rename(folder)
        draft.rmdir()
        return
    try:
        from mobilevlm.export.pipeline import export
    except ImportError as error:
        raise require(error.name or "onnxscript", "export", f"exporting {name}") from None
    progress.say(f"{name:<12}is exported once, to {folder}")
    export(WEIGHTS / name, folder, recipe=RECIPE, formats=formats, measure=False)


@cache
def _temporary(name: str, formats: tuple[str, ...], reason: str) -> Path:
    """A bundle for as long as this process lives."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="mobilevlm-"))
    except OSError as error:
        raise BundleError(
            f"{name}: no folder to export it into ({reason}; temporary: {error.strerror}): set "
            f"XDG_CACHE_HOME to a folder that can be written"
        ) from None
    process = os.getpid()

    def remove() -> None:
        if os.getpid() == process:  # not in a child that was forked
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    progress.say(f"{name:<12}not kept ({reason}): XDG_CACHE_HOME may name another folder")
    _make(name, formats, folder / "bundle")
    return folder / "bundle"

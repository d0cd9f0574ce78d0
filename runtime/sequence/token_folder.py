"""Visual tokens in files, so that an app that is started again does not encode an image again.

One file for each image, in the format of safetensors: ``embeds`` and ``deep.0``, ``deep.1`` … as
float32, and in its metadata a digest of shapes and data. Its name is the digest of all that its
content depends on. Nothing in a file is believed before its digest was computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
import warnings
from collections.abc import Iterable
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mobilevlm._version import __version__
from mobilevlm.bundle import Bundle
from mobilevlm.errors import CacheWarning, MobileVLMError
from mobilevlm.plan import LLAMA_ENGINES, Plan, stage_formats
from mobilevlm.prompt import Rows
from mobilevlm.regular_file import read_regular
from mobilevlm.runtime.machine import processor_key
from mobilevlm.whole_file import file_sha256, written_whole

DEFAULT_FOLDER_MB = 1000
"""About 800 images of MobileVLM V2 1.7B"""
_FORMAT = 1
"""Is another one when files of this version would be read wrongly"""
_MOST_HEADER = 1 << 16
"""Bytes"""
_OURS = re.compile(r"\.?[0-9a-f]{64}\.safetensors(\..*)?")
"""Names of files, and of drafts of them"""
_DRAFT_SECONDS = 3600
"""Age of a draft whose process must have ended"""


class TokenFolder:
    """Visual tokens of one encoder in a folder, which processes and encoders may share. All files
    of the folder together take at most ``limit`` bytes; those not used for longest go first.

    Nothing that is wrong with a file or the folder ends an answer: a warning says so, and the image
    is encoded.
    """

    def __init__(self, folder: Path, limit: int, encoder: str) -> None:
        self._folder, self._limit, self._encoder = folder, limit, encoder.encode()
        self._has_failed = False
        """A file could not be written, which was said"""

    def get(self, digest: bytes) -> Rows | None:
        """Return the rows of an image by its digest, which count as used now; none where they are
        not there or damaged."""
        path = self._path(digest)
        try:
            rows = _unpacked(read_regular(path, self._limit))
            os.utime(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            _warn(f"{path}: {error.strerror or error}: the image is encoded again")
            return None
        if rows is None:
            _warn(f"{path}: damaged: the image is encoded again")
        return rows

    def put(self, digest: bytes, rows: Rows) -> None:
        """Write the rows of an image, if they fit at all."""
        parts = _packed(rows)
        size = sum(len(part) for part in parts)
        if size > self._limit:
            return
        try:
            self._make_room(size)
            with (
                written_whole(self._path(digest), mode=0o600, synced=False) as draft,
                draft.open("wb") as file,
            ):
                file.writelines(parts)
        except OSError as error:
            if not self._has_failed:
                _warn(
                    f"{self._folder}: visual tokens cannot be kept there "
                    f"({error.strerror or error}): images are encoded again"
                )
            self._has_failed = True

    def _path(self, digest: bytes) -> Path:
        name = hashlib.blake2b(self._encoder + digest, digest_size=32).hexdigest()
        return self._folder / f"{name}.safetensors"

    def _make_room(self, nbytes: int) -> None:
        """Remove what was not used for longest, until so many bytes fit, and drafts of processes
        that were killed."""
        found = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if not _OURS.fullmatch(entry.name):
                    continue
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:  # another process removed it
                    continue
                if entry.name[0] == "." and time.time() - status.st_mtime > _DRAFT_SECONDS:
                    Path(entry.path).unlink(missing_ok=True)
                else:
                    found.append((status.st_mtime_ns, status.st_size, entry.path))
        total = nbytes + sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self._limit:
                return
            if Path(path).name[0] != ".":
                Path(path).unlink(missing_ok=True)
                total -= size


def open_token_folder(
    folder: str | PathLike[str], megabytes: float | None, bundle: Bundle, plan: Plan
) -> TokenFolder:
    """Return the folder for visual tokens of a bundle's encoder, as this plan runs it here. It is
    made where it is missing, readable for its owner alone.

    Raises:
        MobileVLMError: it cannot be made, or not written to.
    """
    place = Path(folder).absolute()
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise MobileVLMError(
            f"cache_dir {place}: visual tokens cannot be kept there ({error.strerror or error}): "
            f"give a folder that can be written to, or leave it out"
        ) from None
    limit = DEFAULT_FOLDER_MB if megabytes is None else megabytes
    return TokenFolder(place, int(limit * 1e6), _encoder_key(bundle, plan))


def _encoder_key(bundle: Bundle, plan: Plan) -> str:
    """Return all that the rows of an image depend on beside the prepared image itself: the
    encoder's files, the program, its libraries, the processor, and settings that may change the
    order of sums."""
    settings = (plan.engine, plan.threads_of("vision"), plan.vision_weights, plan.memory)
    libraries = _llama_version() if plan.engine in LLAMA_ENGINES else ""
    source = bundle.digest or " ".join(_file_digests(bundle, plan))
    return repr((_FORMAT, __version__, source, settings, libraries, processor_key()))


def _file_digests(bundle: Bundle, plan: Plan) -> list[str]:
    """Return the digests of the encoder's files, of a bundle that was never written (GGUF files
    made elsewhere)."""
    stage = bundle.manifest.spec.encoder_stage
    form = stage_formats(bundle, plan.engine)[stage]
    names = bundle.artifact(stage, form).files
    return [file_sha256(bundle.path(name)) for name in names]


def _llama_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("llama-cpp-python")
    except PackageNotFoundError:
        return ""


def _packed(rows: Rows) -> list[bytes]:
    """Return the parts of a file."""
    assert rows.positions is None and not rows.blocks, "rows of a prompt"
    arrays = [np.ascontiguousarray(part, "<f4") for part in (rows.embeds, *rows.deep)]
    data = [array.tobytes() for array in arrays]
    return [_header([array.shape for array in arrays], data), *data]


def _unpacked(content: bytes) -> Rows | None:
    """Return the rows in a file; none if it is not exactly as :func:`_packed` makes it."""
    length = int.from_bytes(content[:8], "little")
    if not 0 < length <= min(_MOST_HEADER, len(content) - 8):
        return None
    try:
        entries = json.loads(content[8 : 8 + length])
        shapes = [tuple(entries[name]["shape"]) for name in _names(len(entries) - 1)]
        sizes = [rows * channels * 4 for rows, channels in shapes]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    start, data = 8 + length, []
    if not all(isinstance(size, int) and size >= 0 for size in sizes):
        return None
    for size in sizes:
        data.append(content[start : start + size])
        start += size
    if start != len(content) or content[: 8 + length] != _header(shapes, data):
        return None
    embeds, *deep = (_array(part, shape) for part, shape in zip(data, shapes, strict=True))
    return Rows(embeds, tuple(deep))


def _array(data: bytes, shape: tuple[int, ...]) -> NDArray[np.float32]:
    return np.frombuffer(data, "<f4").reshape(shape).astype(np.float32)


def _names(count: int) -> list[str]:
    return ["embeds", *(f"deep.{index}" for index in range(count - 1))]


def _header(shapes: Iterable[tuple[int, ...]], data: list[bytes]) -> bytes:
    """Return the beginning of a file, its length in front: tensors by their names, and the digest
    of their shapes and data."""
    hasher, entries, start = hashlib.blake2b(digest_size=32), {}, 0
    for name, shape, part in zip(_names(len(data)), shapes, data, strict=True):
        span = [start, start + len(part)]
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": span}
        hasher.update(f"{name} {shape}".encode() + part)
        start += len(part)
    described = {"__metadata__": {"blake2b": hasher.hexdigest()}, **entries}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _warn(message: str) -> None:
    warnings.warn(message, CacheWarning, stacklevel=3)

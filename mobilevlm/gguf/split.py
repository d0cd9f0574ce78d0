"""GGUF files in parts (``NAME-00001-of-00003.gguf``), as llama.cpp's llama-gguf-split writes them:
metadata in the first part, tensors in all."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mobilevlm.errors import BundleError

if TYPE_CHECKING:
    from mobilevlm.gguf.file import GgufFile

MAX_PARTS = 1 << 12
"""Most parts of one file."""
COUNT, NUMBER = "split.count", "split.no"
_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def with_parts(first: GgufFile, read: Callable[[Path], GgufFile]) -> GgufFile:
    """Return a file with the tensors of its other parts, if there are any.

    Raises:
        BundleError: it is not the first part, is named otherwise than its kind, or a part is
            missing or of another file.
    """
    count, number = (first.metadata.get(key, 0) for key in (COUNT, NUMBER))
    if type(count) is not int or type(number) is not int or not 0 <= number < MAX_PARTS:
        raise BundleError(
            f"{first.path}: {COUNT} is {count!r:.60} and {NUMBER} {number!r:.60}: damaged: copy it "
            f"again"
        )
    if number > 0 and count > 1:
        raise BundleError(
            f"{first.path}: part {number + 1} of {count} of a split file: give part 1, "
            f"{_part_path(first.path, 1, count, named=False)}"
        )
    if not 1 < count <= MAX_PARTS:
        return first
    tensors, parts = dict(first.tensors), [first.path]
    for part in range(2, count + 1):
        path = _part_path(first.path, part, count)
        if not path.is_file():
            raise BundleError(
                f"{first.path}: part 1 of {count} of a split file: part {part} is missing: put "
                f"{path.name} beside it"
            )
        other = read(path)
        if other.metadata.get(NUMBER) != part - 1 or other.metadata.get(COUNT, count) != count:
            raise BundleError(f"{path}: not part {part} of {count}: copy the parts again")
        twice = next((name for name in other.tensors if name in tensors), None)
        if twice is not None:
            raise BundleError(f"{path}: tensor {twice[:60]!r} is in another part too: copy again")
        tensors |= other.tensors
        parts.append(path)
    return dataclasses.replace(first, tensors=tensors, parts=tuple(parts))


def refuse_split(file: GgufFile, what: str) -> None:
    """Refuse a split file where all must be one.

    Raises:
        BundleError: names the tool that joins the parts.
    """
    if len(file.parts) > 1:
        raise BundleError(
            f"{file.path}: a split file of {len(file.parts)} parts, {what} needs one: join them "
            f"with llama.cpp's 'llama-gguf-split --merge {file.path.name} WHOLE.gguf'"
        )


def _part_path(path: Path, part: int, count: int, named: bool = True) -> Path:
    """Return where a part lies. ``named``: refuse another pattern of names than llama.cpp's."""
    found = _NAME.fullmatch(path.name)
    if found is None or int(found[3]) != count:
        if not named:
            return Path("NAME-00001-of-" + f"{count:05d}.gguf")
        raise BundleError(
            f"{path}: part 1 of {count} of a split file must be named NAME-00001-of-{count:05d}"
            f".gguf, so that the others are found: give it back its name"
        )
    return path.with_name(f"{found[1]}-{part:05d}-of-{count:05d}.gguf")

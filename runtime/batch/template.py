"""Prompts with columns of a row: ``What is in {image}? Answer in {language}``."""

from __future__ import annotations

import json
import string
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobilevlm.console.terminal import shown
from mobilevlm.errors import ImageError, MobileVLMError, PromptError
from mobilevlm.media.image_source import ImageFile, ImageInput, is_uri
from mobilevlm.spec import IMAGE_PLACEHOLDER


@dataclass(frozen=True)
class Template:
    """A prompt in pieces."""

    pieces: tuple[tuple[str, str | None], ...]
    """Texts, each with the column that follows it, if any"""
    image_columns: tuple[str, ...]
    """Columns that hold images; a piece of such a one is an image's place."""

    @property
    def columns(self) -> frozenset[str]:
        """All columns that a prompt takes of its row."""
        return frozenset(self.image_columns) | {name for _, name in self.pieces if name}

    @property
    def places_images(self) -> bool:
        """Return whether it says where images go; else the model's template places them."""
        return any(name in self.image_columns for _, name in self.pieces)


def read_template(
    text: str, columns: Collection[str], image_columns: Sequence[str] | None = None
) -> Template:
    """Return the template of ``--prompt``. ``columns``: those of the input; ``image_columns``:
    those with images, by default ``image`` where there is such a column.

    Raises:
        MobileVLMError: no such column, or it is no template.
    """
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise MobileVLMError(f"--prompt: {shown(error)}: {_BRACES}") from None
    pieces: list[tuple[str, str | None]] = []
    for literal, name, form, conversion in parsed:
        if name is not None and (form or conversion or not name):
            raise MobileVLMError(f"--prompt: {{{shown(name, 80)}…}} is no column: {_BRACES}")
        pieces.append((literal, name))
    if image_columns is None:
        image_columns = ("image",) if "image" in columns else ()
    for option, names in (("--prompt", [name for _, name in pieces]),
                          ("--image-column", image_columns)):  # fmt: skip
        for name in names:
            if name is not None:
                check_column(option, name, columns)
    template = Template(tuple(pieces), tuple(image_columns))
    named = {name for _, name in pieces}
    if template.places_images and (left := [name for name in image_columns if name not in named]):
        raise MobileVLMError(
            f"--prompt: it places images, but not those of column {shown(left[0], 80)!r}: name all "
            f"image columns in it, or none"
        )
    return template


_BRACES = "write {column}, and {{ or }} for a brace"


def check_column(option: str, name: str, columns: Collection[str]) -> None:
    """Refuse a column that the input does not have.

    Raises:
        MobileVLMError: it has no such column.
    """
    if name not in columns:
        raise MobileVLMError(
            f"{option}: the input has no column {shown(name, 80)!r}: it has "
            f"{shown(', '.join(columns), 300)}"
        )


def filled(
    template: Template, row: Mapping[str, Any], folder: Path
) -> tuple[str, list[ImageInput]]:
    """Return the prompt of a row, ``<image>`` where it places images, and its images. ``folder``:
    where their paths begin.

    Raises:
        PromptError: the row has nothing in a column of the template.
        ImageError: what is in an image column is no image.
    """
    texts: list[str] = []
    images: list[ImageInput] = []
    for literal, name in template.pieces:
        texts.append(literal)
        if name is None:
            continue
        if row.get(name) is None:
            raise PromptError(f"column {shown(name, 80)!r} has nothing in this row")
        if name in template.image_columns:
            found = _sources(name, row[name], folder)
            texts.append(IMAGE_PLACEHOLDER * len(found))
            images += found
        else:
            texts.append(_text(row[name]))
    if not template.places_images:
        for name in template.image_columns:
            images += _sources(name, row.get(name), folder)
    return "".join(texts), images


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _sources(name: str, value: Any, folder: Path) -> list[ImageInput]:
    """Return the images of a value: a path, a URI, bytes, the hub's ``{"bytes", "path"}``, or a
    list of such; none of a null."""
    if value is None:
        return []
    if isinstance(value, (list, tuple)):
        return [source for item in value for source in _sources(name, item, folder)]
    if isinstance(value, Mapping) and value.keys() <= {"bytes", "path"}:
        content = value.get("bytes")
        return _sources(name, value.get("path") if content is None else content, folder)
    if isinstance(value, (bytes, ImageFile)):
        return [value]
    if isinstance(value, str):
        return [value if is_uri(value) else folder / value]
    raise ImageError(
        f"column {shown(name, 80)!r}: expected a path, a data: URI, bytes or a struct of bytes and "
        f"path, found {type(value).__name__}"
    )

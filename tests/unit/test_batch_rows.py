"""Rows of a batch, and what a template makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mobilevlm.errors import ImageError, PromptError
from mobilevlm.runtime.batch.rows import open_input
from mobilevlm.runtime.batch.template import filled, read_template

pytestmark = pytest.mark.pure

HOME = Path("/data")


def fill(text: str, row: dict[str, Any], *images: str) -> tuple[str, list[Any]]:
    return filled(read_template(text, tuple(row), images or None), row, HOME)


def test_columns_are_written_as_they_are_and_braces_twice() -> None:
    row = {"a": "x", "n": 3, "yes": True, "all": ["é", 1], "odd name": "{a}"}
    assert fill("{a}{n} {yes} {all} {odd name} {{a}}", row) == ('x3 true ["é", 1] {a} {a}', [])


def test_images_go_where_their_columns_stand_and_else_before_the_text() -> None:
    row = {"image": "a.png", "other": ["/b.png", b"c"], "q": "Which?"}
    assert fill("{q}", row) == ("Which?", [HOME / "a.png"])
    both = ("image", "other")
    text, images = fill("{other} or {image}? {q}", row, *both)
    assert text == "<image><image> or <image>? Which?"
    assert images == [Path("/b.png"), b"c", HOME / "a.png"]


def test_the_hubs_structs_uris_and_nulls_are_images_or_none() -> None:
    row = {
        "image": {"bytes": b"png", "path": "a.png"},
        "second": {"bytes": None, "path": "b.png"},
        "third": None,
        "fourth": "data:;base64,AA==",
    }
    _, images = fill("What?", row, *row)
    assert images == [b"png", HOME / "b.png", "data:;base64,AA=="]
    with pytest.raises(PromptError, match="column 'third' has nothing"):
        fill("{third}", row, "third")
    with pytest.raises(ImageError, match="found dict"):
        fill("a", {"image": {"height": 3}})


def test_rows_of_json_lines_are_skipped_unread_and_broken_ones_say_so(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbfno\n\n{"a": 1}\n{"a": "\xff"}\n' + b"[" * 100_000 + b"\n{}")
    found = open_input(path)
    assert found.columns == ("a",) and found.count == 5
    rows = list(found.read(found.columns, lambda index: index == 1))
    assert [row.index for row in rows] == [0, 2, 3, 4]
    assert [row.error is None for row in rows] == [False, False, False, True]

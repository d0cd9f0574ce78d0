"""The check of the writing (.ci/prose) finds what it is for, and nothing else."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

pytestmark = pytest.mark.pure

CHECK = Path(__file__).resolve().parents[2] / ".ci" / "prose"


Check: TypeAlias = Callable[[str, str], tuple[int, list[str]]]


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """Return a function from a name and a text to exit code and findings without the path."""
    main = runpy.run_path(str(CHECK))["main"]

    def run(name: str, text: str) -> tuple[int, list[str]]:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        code = main([str(path)])
        return code, [
            line.removeprefix(f"{path}:") for line in capsys.readouterr().out.splitlines()
        ]

    return run


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a = 1  # a picture of it\n", "1: comment: 'picture'"),
        ('"""Reads files.\n\nThe rest is cut\noff.\n"""\n', "3: docstring: 'cut off'"),
        ('raise ValueError("it is taken over")\n', "1: string: 'taken over'"),
        ('raise ValueError(f"{1}: a graph for " "prompts")\n', "1: string: 'graph for prompts'"),
    ],
)
def test_private_words_are_named_with_their_line(check: Check, text: str, line: str) -> None:
    code, [found] = check("a.py", text)
    assert (code, found.split(", say ")[0]) == (1, line)


def test_private_words_of_a_document_are_named(check: Check) -> None:
    code, found = check("a.md", "# Images\n\nA plan gives\nway to another.\n")
    assert code == 1 and [line.split(":")[0] for line in found] == ["3"]


def test_questions_that_models_were_trained_on_are_left_alone(check: Check) -> None:
    assert check("a.py", 'asked = "What is in the picture?"\n') == (0, [])


def test_ten_docstrings_that_begin_with_a_relative_clause_fail(check: Check) -> None:
    openings = ('"""What one is."""', '"""Of a layer."""', '"""Whether."""', '"""Whatever."""')
    attributes = [f"a{index} = 0\n{openings[index % 3]}\n" for index in range(10)]
    assert check("a.py", "".join(attributes[:9]))[0] == 0
    code, found = check("a.py", "".join(attributes))
    assert (code, len(found)) == (1, 10)
    assert check("a.py", f"a = 0\n{openings[3]}\n") == (0, [])

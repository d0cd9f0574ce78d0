"""Scorers of benchmarks against published packages."""

from __future__ import annotations

import importlib
import random
import sys
from pathlib import Path

import pytest
from conftest import install_or_skip

from mobilevlm.runtime.suites.documents import anls


def test_anls_agrees_with_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare on texts with single spaces: the script of the challenge divides by lengths as they
    are, the package by those without further spaces."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    install_or_skip("anls", [*command, str(tmp_path), "anls == 0.0.2"], tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    official = importlib.import_module("anls").anls_score
    rng = random.Random(0)
    for _ in range(3000):
        said, *truths = (
            " ".join("".join(rng.choices("abC d", k=rng.randrange(10))).split())
            for _ in range(rng.randint(2, 4))
        )
        expected = official(prediction=said, gold_labels=truths)
        found = anls(said, truths)
        if found == 0.5:  # counts in the script, not in the paper and the package
            expected = expected or 0.5
        assert found == pytest.approx(expected, abs=1e-12), (said, truths)

"""The guard of tests that are marked pure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnxruntime
import pure
import pytest
from conftest import Fixture

import mobilevlm


def test_torch_cannot_be_imported() -> None:
    with pure.guard(), pytest.raises(ImportError):
        __import__("torch")


def test_no_graph_is_opened() -> None:
    with pure.guard(), pytest.raises(pytest.fail.Exception, match="opens an ONNX graph"):
        onnxruntime.InferenceSession("model.onnx")


def test_no_program_is_started() -> None:
    with pure.guard(), pytest.raises(pytest.fail.Exception, match="starts a program"):
        subprocess.run([sys.executable, "--version"], check=True)


def test_nothing_is_exported(tmp_path: Path, llava_v1: Fixture) -> None:
    with pure.guard(), pytest.raises(pytest.fail.Exception, match="exports a bundle"):
        mobilevlm.export(
            llava_v1.checkpoint,
            tmp_path / "bundle",
            vision_tower=llava_v1.options.vision_tower,
            recipe="fp32",
            measure=False,
        )
    assert not (tmp_path / "bundle").exists()


@pytest.mark.pure
def test_a_marked_test_runs_under_the_guard() -> None:
    with pytest.raises(ImportError):
        __import__("torch")

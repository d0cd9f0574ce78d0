"""The guard of tests marked ``pure``: they need neither torch nor llama.cpp, run no ONNX graph,
export no bundle and start no program, so that ``make quick`` takes seconds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy.testing  # noqa: F401  (older ones start lscpu when they are imported)
import onnxruntime
import pytest

from mobilevlm.export import pipeline

LIBRARIES = ("torch", "transformers", "llama_cpp")
"""Slow to import, or not there where only the base package is installed."""


@contextmanager
def guard() -> Iterator[None]:
    """Fails what runs inside as soon as it does what a pure test must not."""
    with pytest.MonkeyPatch.context() as patch:
        for name in LIBRARIES:
            patch.setitem(sys.modules, name, None)
        patch.setattr(onnxruntime.InferenceSession, "__init__", _failing("opens an ONNX graph"))
        patch.setattr(subprocess.Popen, "__init__", _failing("starts a program"))
        patch.setattr(pipeline, "open_workspace", _failing("exports a bundle"))
        yield


def imported_libraries() -> list[str]:
    """Return what modules of tests have imported while they were collected."""
    return [name for name in LIBRARIES if sys.modules.get(name) is not None]


def _failing(deed: str) -> Callable[..., NoReturn]:
    def fail(*_: Any, **__: Any) -> NoReturn:
        pytest.fail(f"a test marked pure {deed}: take the mark away, or the need")

    return fail

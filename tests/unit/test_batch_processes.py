"""How many processes a batch takes, and whether they share one copy of the weights."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from mobilevlm.errors import MemoryLimitError
from mobilevlm.media.image_file import Room
from mobilevlm.runtime.batch import processes

MEMORY = SimpleNamespace(own=600e6, weights=500e6)
"""Another process takes 100 MB beside its cache if it shares the weights, else 600 MB."""


def decided(
    monkeypatch: pytest.MonkeyPatch, cores: int, room_mb: float, engine: str = "onnx", **said: Any
) -> tuple[int, int, bool]:
    """Processes, threads of each, and whether they share the weights."""
    manifest = SimpleNamespace(manifest=None)
    vlm = SimpleNamespace(engine=engine, plan=None, bundle=manifest)
    room = Room(1e6 * room_mb, "a test")
    monkeypatch.setattr(processes, "default_threads", lambda: cores)
    monkeypatch.setattr(processes, "room_left", lambda limits: room)
    monkeypatch.setattr(processes, "load", lambda **loading: nullcontext(vlm))
    monkeypatch.setattr(processes, "check_answers", lambda vlm, options: None)
    monkeypatch.setattr(processes, "estimate", lambda manifest, plan: MEMORY)
    loading = {"threads": said.get("threads"), "max_memory_mb": said.get("max_memory_mb")}
    rows = said.get("rows", 1000)
    with processes.opened_processes(loading, {}, said.get("processes"), rows) as opened:
        return opened.count, opened.threads, opened.shared


@pytest.mark.parametrize(
    ("cores", "room_mb", "said", "expected"),
    [
        (8, 9000, {}, (8, 1, True)),
        (8, 9000, {"rows": 3}, (3, 1, True)),
        (8, 9000, {"processes": 2}, (2, 4, False)),
        (8, 9000, {"threads": 4}, (2, 4, False)),
        (8, 9000, {"threads": 1, "processes": 3}, (3, 1, True)),
        (2, 9000, {"processes": 5}, (5, 1, True)),
        (8, 1000, {}, (7, 1, True)),  # 164 MB each
        (8, 400, {}, (1, 8, False)),  # three would leave five cores idle
        (8, 1400, {"engine": "gguf"}, (3, 2, False)),  # 664 MB each
        (1, 0, {}, (1, 1, True)),
    ],
)
def test_processes_are_as_many_as_cores_memory_and_rows_allow(
    cores: int,
    room_mb: float,
    said: dict[str, Any],
    expected: tuple[int, int, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert decided(monkeypatch, cores, room_mb, **said) == expected


def test_more_processes_than_fit_into_a_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decided(monkeypatch, 8, 400, processes=8) == (8, 1, True)  # as a person says
    with pytest.raises(MemoryLimitError, match="--processes 8: 3 fit into --max-memory"):
        decided(monkeypatch, 8, 400, processes=8, max_memory_mb=1000)

"""Threads that wait asleep where others want the processors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnxruntime
import pytest
from conftest import DATA

import mobilevlm
from mobilevlm.runtime.engines.onnx import engine as onnx
from mobilevlm.waiting import SPINS, processors_wanted, wait_asleep, waiting_asleep

PROCESSORS = os.cpu_count() or 1


def proc(root: Path, running: int, ours: int = 1) -> Path:
    """Return a fake /proc with this many running threads, some of this process."""
    (root / "loadavg").write_text(f"0.20 0.18 0.12 {running}/600 11206\n")
    for number in range(3):
        task = root / "self" / "task" / str(number)
        task.mkdir(parents=True, exist_ok=True)
        (task / "stat").write_text(f"{number} (a) R) {'R' if number < ours else 'S'} 1 1\n")
    return root


def test_processors_are_wanted_where_others_run_on_what_the_threads_would_use(
    tmp_path: Path,
) -> None:
    assert not processors_wanted(PROCESSORS, proc(tmp_path, running=1))
    assert not processors_wanted(PROCESSORS, proc(tmp_path, running=3, ours=3))
    assert processors_wanted(PROCESSORS, proc(tmp_path, running=2))
    assert not processors_wanted(PROCESSORS, tmp_path / "missing")
    if PROCESSORS > 1:
        assert not processors_wanted(1, proc(tmp_path, running=2))
    assert processors_wanted(1, proc(tmp_path, running=1 + PROCESSORS))


@pytest.mark.parametrize("wanted", [True, False])
def test_onnx_runtime_waits_asleep_beside_other_programs(
    wanted: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    entries: dict[str, str] = {}

    class Options:
        def add_session_config_entry(self, name: str, value: str) -> None:
            entries[name] = value

    monkeypatch.setattr(onnx, "processors_wanted", lambda threads: wanted)
    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    for spinning in (True, False):
        with pytest.raises(mobilevlm.MobileVLMError):
            onnx.open_session(tmp_path / "none.onnx", 2, spinning)
        awake = spinning and not wanted
        assert entries["session.intra_op.allow_spinning"] == str(int(awake))


@contextmanager
def environment(**given: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
            patch.delenv(name, raising=False)
        for name, value in given.items():
            patch.setenv(name, value)
        yield


def test_a_library_is_loaded_with_short_waits_and_the_environment_is_as_before() -> None:
    with environment():
        with waiting_asleep():
            assert os.environ["GOMP_SPINCOUNT"] == SPINS
        assert "GOMP_SPINCOUNT" not in os.environ
        wait_asleep()
        assert os.environ["GOMP_SPINCOUNT"] == SPINS


@pytest.mark.parametrize("said", [{"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}])
def test_what_a_person_says_about_waiting_stays(said: dict[str, str]) -> None:
    with environment(**said):
        with waiting_asleep():
            assert os.environ.get("GOMP_SPINCOUNT") == said.get("GOMP_SPINCOUNT")
        wait_asleep()
        assert os.environ.get("GOMP_SPINCOUNT") == said.get("GOMP_SPINCOUNT")


LOADED = """
import json, os, sys
seen = []
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "llama_cpp":
            seen.append(os.environ.get("GOMP_SPINCOUNT"))
sys.meta_path.insert(0, Finder())
from mobilevlm.runtime.engines.llama.native import llama_library
try:
    llama_library()
except Exception:
    pass
print(json.dumps([seen, os.environ.get("GOMP_SPINCOUNT")]))
"""


def test_llama_cpp_is_loaded_with_short_waits() -> None:
    variables = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    done = subprocess.run(
        [sys.executable, "-c", LOADED], capture_output=True, text=True, env=variables, cwd=DATA
    )
    assert json.loads(done.stdout) == [[SPINS], None], done.stderr

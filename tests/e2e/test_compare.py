"""benchmarks/compare.py on the built-in model, as a person would run it: our engine only."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARGUMENTS = ("--quick", "--only", "mobilevlm", "--threads", "1", "--quiet")


COMPARE = (sys.executable, str(ROOT / "benchmarks" / "compare.py"))


def run_compare(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*COMPARE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    done = run_compare("nano", *ARGUMENTS, "-o", folder / "results", "--cache", folder / "cache")
    assert done.returncode == 0, done.stderr
    return folder / "results"


def test_every_measure_has_samples(results: Path) -> None:
    data = json.loads((results / "compare.json").read_text())
    entry = next(entry for entry in data["entries"] if entry["name"] == "mobilevlm onnx int4")
    assert entry["notes"] == []
    for row in ("encode", "prefill", "first", "second", "decode", "warm_load", "peak", "size"):
        assert len(entry["rows"][row]) == 1 and entry["rows"][row][0] > 0, row
    assert sorted(entry["prefill"], key=int) == sorted(entry["decode"], key=int) == ["64", "256"]
    assert min(data["peaks"].values()) > 0


def test_the_profile_names_the_stages_operators(results: Path) -> None:
    profiles = json.loads((results / "compare.json").read_text())["profiles"]
    operators = {stage: {row["what"].split()[0] for row in profiles[stage]} for stage in profiles}
    assert "MultiHeadAttention" in operators["image encode"]
    for stage in ("prefill", "decode, one token"):
        assert {"MatMulNBits", "GroupQueryAttention"} <= operators[stage]
    for rows in profiles.values():
        assert sum(row["share"] for row in rows) == pytest.approx(1.0)


def test_an_earlier_run_is_shown_again(results: Path) -> None:
    before = (results / "compare.md").read_text()
    (results / "compare.md").unlink()
    done = run_compare("--plots", results / "compare.json", "--quiet")
    assert done.returncode == 0, done.stderr
    assert (results / "compare.md").read_text() == before == done.stdout


def test_an_interrupted_run_is_shown_and_goes_on(results: Path, tmp_path: Path) -> None:
    """Ctrl-C goes to the workers too."""
    command = [
        *COMPARE, "nano", *ARGUMENTS[:-1], "--match", "onnx int4", "--load-rounds", "2",
        "-o", str(tmp_path), "--cache", str(results.parent / "cache"),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    data = tmp_path / "compare.json"
    deadline = time.monotonic() + 120
    while not data.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)  # the first round of loads
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "goes on from here" in err and "Traceback" not in err
    found = json.loads(data.read_text())
    assert not found["finished"] and found["done"]["loads"] >= 1
    assert "rounds of loads" in out and out == (tmp_path / "compare.md").read_text()

    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "going on    after" in done.stderr
    again = json.loads(data.read_text())
    assert again["finished"] and again["done"] == {"loads": 2, "stages": 1, "curves": 1}
    before, after = (data["entries"][0]["rows"]["warm_load"] for data in (found, again))
    assert len(after) == 2 and after[: len(before)] == before  # not measured again


def test_who_cannot_take_part_is_told(tmp_path: Path) -> None:
    done = run_compare("nano", "--only", "mnn", "--cache", tmp_path, "-o", tmp_path, "--quiet",
                       "--python", f"mnn={sys.executable}")  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert "pip install MNN" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "which checkpoint"),
        (("nano", "--python", "llama=x"), "expected PEER=PYTHON"),
        (("nano", "--rounds", "0"), "1 or more"),
        (("nowhere",), "nowhere"),
    ],
)
def test_wrong_usage_is_one_line(
    arguments: tuple[str, ...], complaint: str, tmp_path: Path
) -> None:
    done = run_compare(*arguments, "-o", tmp_path, "--cache", tmp_path, "--quiet")
    assert done.returncode == 2
    assert complaint in done.stderr and len(done.stderr.splitlines()) == 1

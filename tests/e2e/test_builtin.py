"""The built-in model: its name is enough, it sees, and the demo shows it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import refusal, run_program
from PIL import Image

import mobilevlm
from mobilevlm.builtin import BUILT_IN, WEIGHTS, bundle_path, checkpoint_path
from mobilevlm.nano.evaluate import evaluate
from mobilevlm.nano.suite import evaluation_set

INT4_BYTES, CHECKPOINT_BYTES = 6e6, 40e6


@pytest.fixture(scope="module")
def nano() -> Iterator[mobilevlm.runtime.VLM]:
    with mobilevlm.load("nano") as vlm:
        yield vlm


def test_nano_sees(nano: mobilevlm.runtime.VLM) -> None:
    """Enough questions that chance, about a quarter right, is far away."""

    def answer(prompt: str, pictures: list[Image.Image]) -> str:
        return nano.generate(prompt, pictures, max_new_tokens=24).text

    result = evaluate(answer, evaluation_set(240), blind=True)
    assert result.blind_overall is not None
    assert result.overall.accuracy >= 0.85
    assert result.blind_overall.accuracy < 0.5


def test_nano_moe_sees() -> None:
    """93% of 360 questions with int4; four standard deviations of 48 below that are 78%."""
    with mobilevlm.load("nano-moe") as vlm:
        answer = evaluate(
            lambda prompt, pictures: vlm.generate(prompt, pictures, max_new_tokens=24).text,
            evaluation_set(48),
            blind=False,
        )
    assert answer.overall.accuracy >= 0.78


def test_the_files_are_small() -> None:
    shipped = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert {path.relative_to(WEIGHTS).parts[0] for path in shipped} == set(BUILT_IN)
    assert sum(path.stat().st_size for path in shipped) <= CHECKPOINT_BYTES
    bundle = bundle_path(Path("nano"))
    assert sum(file.stat().st_size for file in bundle.rglob("*")) <= INT4_BYTES


def test_a_name_is_exported_once(nano: mobilevlm.runtime.VLM) -> None:
    manifest = nano.bundle.folder / "manifest.json"
    before = manifest.stat().st_mtime_ns
    assert bundle_path(Path("nano")) == nano.bundle.folder
    done = run_program("run", "nano", "--prompt", "What is 2 plus 3?", "--max-new-tokens", "8")
    assert done.returncode == 0 and "5" in done.stdout, done.stderr
    assert manifest.stat().st_mtime_ns == before


def test_a_name_is_a_checkpoint_too(tmp_path: Path) -> None:
    done = run_program("export", "nano", "-o", tmp_path / "bundle", "--recipe", "int8", "--quiet")
    assert done.returncode == 0, done.stderr
    done = run_program("inspect", "nano")
    assert done.returncode == 0 and "ldpv2" in done.stdout


def test_a_folder_of_that_name_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nano").mkdir()
    assert checkpoint_path(Path("nano")) == bundle_path(Path("nano")) == Path("nano")
    assert "nano: not a bundle" in refusal(capsys, "run", "nano", "--prompt", "Who?")


def test_the_demo_shows_answers_beside_the_truth(tmp_path: Path) -> None:
    picture = tmp_path / "scene.png"
    done = run_program("demo", "--seed", "11", "-o", picture)
    assert done.returncode == 0, done.stderr
    assert np.asarray(Image.open(picture)).shape == (192, 192, 3)
    assert str(picture) in done.stdout
    lines = [line.split()[0] for line in done.stdout.splitlines() if line]
    assert lines[1:10] == ["question", "answer", "truth"] * 3
    assert done.stdout.count("(right)") >= 2
    assert done.stderr.count("first token after") == 3
    again = run_program("demo", "--seed", "11", "-o", tmp_path / "again.png")
    assert again.stdout.replace("again.png", "scene.png") == done.stdout


def test_the_demo_draws_a_new_scene_each_time(tmp_path: Path) -> None:
    pictures = []
    for name in ("one.png", "two.png"):
        assert run_program("demo", "-o", tmp_path / name).returncode == 0
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0] != pictures[1]


def test_a_weight_file_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(WEIGHTS / "nano", tmp_path / "nano")
    (tmp_path / "nano" / "model.safetensors").unlink()
    monkeypatch.setattr("mobilevlm.builtin.WEIGHTS", tmp_path)
    assert "model.safetensors" in refusal(capsys, "run", "nano", "--prompt", "Who?")

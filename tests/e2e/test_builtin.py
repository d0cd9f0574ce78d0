"""The built-in model: its name is enough, it sees, and the demo shows it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import refusal, run_program
from PIL import Image

import mobilevlm
from mobilevlm.builtin import BUILT_IN, BUNDLES, WEIGHTS, checkpoint_path, is_shipped
from mobilevlm.bundle import open_bundle
from mobilevlm.nano.evaluate import evaluate
from mobilevlm.nano.suite import evaluation_set
from mobilevlm.nano.training.ship import SHIPPED, ship
from mobilevlm.runtime.builtin_bundle import _temporary, bundle_path

needs_llama = pytest.mark.skipif(
    os.environ.get("MOBILEVLM_WITHOUT_LLAMA") == "1", reason="asked to go without llama.cpp"
)
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


@pytest.mark.parametrize("engine", ["onnx", pytest.param("ggml", marks=needs_llama)])
def test_nano_moe_sees(engine: str) -> None:
    """93% of 360 questions with int4; four standard deviations of 48 below that are 78%."""
    with mobilevlm.load("nano-moe", engine) as vlm:
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


def test_nano_runs_from_the_bundle_that_comes_with_the_package(
    nano: mobilevlm.runtime.VLM,
) -> None:
    assert is_shipped(nano.bundle.folder)
    assert bundle_path(Path("nano")) == nano.bundle.folder
    done = run_program("run", "nano", "--prompt", "What is 2 plus 3?", "--max-new-tokens", "8")
    assert done.returncode == 0 and "5" in done.stdout, done.stderr


def test_the_bundle_that_comes_with_the_package_is_what_an_export_gives(tmp_path: Path) -> None:
    """Run ``python -m mobilevlm.nano.training.ship`` where this fails. The digests of code and
    tools in the manifest may be older; keys and values of the system prompt are sums of this
    processor, and so are the statistics by which some weight may be rounded the other way."""
    for name in SHIPPED:
        ship(name, tmp_path / name)
        fresh, shipped = open_bundle(tmp_path / name), open_bundle(BUNDLES / name)
        system = fresh.manifest.system_prompt
        assert system is not None and system == shipped.manifest.system_prompt
        assert fresh.manifest.files.keys() == shipped.manifest.files.keys()
        calibrated = [
            path for kind in ("vision", "decoder") for path in fresh.artifact(kind, "onnx").data
        ]
        for file, entry in fresh.manifest.files.items():
            if file not in (system.path, *calibrated):
                assert shipped.manifest.files[file] == entry, file
        for path in calibrated:
            codes = [np.fromfile(bundle.path(path), np.uint8) for bundle in (fresh, shipped)]
            assert len(codes[0]) == len(codes[1]) and (codes[0] != codes[1]).mean() < 0.02
        values = [np.fromfile(bundle.path(system.path), "<f4") for bundle in (fresh, shipped)]
        assert np.abs(values[0] - values[1]).max() <= 1e-3 * np.abs(values[0]).max()
        assert fresh.manifest.spec == shipped.manifest.spec
        assert fresh.manifest.recipe == shipped.manifest.recipe
        assert fresh.manifest.embeddings == shipped.manifest.embeddings
        for ours, theirs in zip(fresh.manifest.artifacts, shipped.manifest.artifacts, strict=True):
            assert replace(ours, key="", largest_weight_error=None) == replace(
                theirs, key="", largest_weight_error=None
            )


def test_a_name_is_exported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = bundle_path(Path("nano-moe")) / "manifest.json"
    before = manifest.stat().st_mtime_ns
    monkeypatch.setattr("mobilevlm.runtime.builtin_bundle._make", None)
    assert bundle_path(Path("nano-moe")) == manifest.parent
    assert manifest.stat().st_mtime_ns == before


def test_a_damaged_bundle_in_the_cache_heals_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = bundle_path(Path("nano"), writable=True)
    assert folder.is_relative_to(tmp_path)
    for damage in ("onnx/embed_tokens_fp16.onnx_data", "manifest.json"):
        content = bytearray((folder / damage).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / damage).write_bytes(content)
        assert bundle_path(Path("nano"), writable=True) == folder
        open_bundle(folder)
    assert sorted(path.name for path in folder.parent.iterdir()) == [
        folder.name,
        f"{folder.name}.lock",
    ]


def test_tuning_leaves_the_package_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = bundle_path(Path("nano"), writable=True)
    assert not is_shipped(folder)
    assert bundle_path(Path("nano")) == folder  # with its plan, from now on


@pytest.mark.parametrize("obstacle", ["no home", "a file in the way"])
def test_without_a_cache_folder_the_models_run_all_the_same(
    obstacle: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if obstacle == "no home":
        for place in ("bundle", "runtime.builtin_bundle"):
            monkeypatch.setattr(f"mobilevlm.{place}.cache_folder", homeless)
    else:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with mobilevlm.load("nano") as vlm:
        assert is_shipped(vlm.bundle.folder)
    assert [path.name for path in tmp_path.iterdir() if path.name != "file"] == []
    folder = bundle_path(Path("nano-moe"))
    assert folder.is_relative_to(tmp_path)
    open_bundle(folder)
    assert folder == bundle_path(Path("nano-moe"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    monkeypatch.setattr("mobilevlm.runtime.builtin_bundle.RECIPE", "int8")
    _temporary.cache_clear()
    assert "XDG_CACHE_HOME" in refusal(capsys, "run", "nano-moe", "--prompt", "Who?")


def test_nano_needs_neither_the_packages_for_exporting_nor_a_home(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "for name in ('onnx', 'onnx_ir', 'onnxscript', 'safetensors', 'mobilevlm.export'):\n"
        "    sys.modules[name] = None\n"
        "import mobilevlm\n"
        "print(mobilevlm.load('nano').generate('What is 2 plus 3?', max_new_tokens=8).text)\n"
    )
    environment = {**os.environ, "HOME": str(tmp_path / "none" / "home")}
    del environment["XDG_CACHE_HOME"]
    (tmp_path / "none").write_text("")
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "5" in done.stdout, done.stderr


def homeless() -> Path:
    raise RuntimeError("Could not determine home directory.")


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
    shutil.copytree(WEIGHTS / "nano-moe", tmp_path / "nano-moe")
    (tmp_path / "nano-moe" / "model.safetensors").unlink()
    monkeypatch.setattr("mobilevlm.runtime.builtin_bundle.WEIGHTS", tmp_path)
    assert "model.safetensors" in refusal(capsys, "run", "nano-moe", "--prompt", "Who?")

"""Exports to accelerators behind ONNX Runtime, as a person would make them: coverage, .ort files
that run here, and the package for Core ML."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from conftest import drawn_image, refusal
from PIL import Image

import mobilevlm
from mobilevlm.bundle import Bundle, open_bundle, write_manifest
from mobilevlm.cli import main
from mobilevlm.export import settled
from mobilevlm.export.calibration.samples import scene_samples
from mobilevlm.export.targets import find_target, ort_format, ort_worker
from mobilevlm.export.targets.ort_format import _example
from mobilevlm.plan import Plan
from mobilevlm.runtime.engines.onnx.npu import NpuState
from mobilevlm.runtime.engines.onnx.onnx_state import OnnxState
from mobilevlm.runtime.engines.opening import open_engines
from mobilevlm.runtime.memory.estimate import estimate
from mobilevlm.runtime.open_model import open_model

Capture = pytest.CaptureFixture[str]
TARGETS = ("ios-coreml", "android-xnnpack")
OWN_ENGINE = {"ios-coreml": "npu", "android-xnnpack": "onnx"}


def exported(folder: Path, target: str, model: str = "nano") -> Bundle:
    main(["export", model, "-o", str(folder), "--target", target, "--no-measure", "--quiet"])
    return open_bundle(folder)


@pytest.fixture(scope="module", params=TARGETS)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return exported(tmp_path_factory.mktemp("mobile") / "bundle", request.param)


def test_the_manifest_has_coverage_and_a_reduced_build(bundle: Bundle) -> None:
    manifest = bundle.manifest
    goal = find_target(str(manifest.target)).provider
    assert goal is not None
    assert {part.stage for part in manifest.coverage} == set(goal.least)
    for part in manifest.coverage:
        assert part.provider == goal.name and part.nodes == part.taken + sum(part.left.values())
        assert part.taken / part.nodes >= goal.least[part.stage]
    build = manifest.reduced_build
    assert build is not None and 1.19 < build.estimated_mb < 2 and build.operators > 10
    config = bundle.path(build.config).read_text()
    assert "Softmax" in config and str(bundle.folder) not in config and "/tmp" not in config


def test_accelerators_take_all_but_what_is_known_to_be_left(bundle: Bundle) -> None:
    """Bytes become floats on the processor."""
    vision, *decoder = bundle.manifest.coverage
    if (
        bundle.manifest.target == "android-xnnpack"
    ):  # of the processor itself: products by constants, and Softmax
        assert not decoder and 0.5 < vision.multiplications < 0.6
        assert vision.left["MatMul: more than two dimensions"] == 10  # attention of five layers
        return
    assert vision.left == {"Cast: input uint8": 1} and vision.multiplications == 1
    assert [(part.left, part.parts) for part in decoder] == [({}, 1), ({}, 1)]


def results(path: Path) -> list[Any]:
    """Return results on random inputs of a graph that is simplified as .ort files are."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(7)
    inputs = {value.name: _example(value, random) for value in session.get_inputs()}
    found: list[Any] = session.run(None, inputs)
    return found


def test_ort_files_give_the_same_bits_as_their_graphs(bundle: Bundle) -> None:
    own = OWN_ENGINE[str(bundle.manifest.target)]
    for stage in ("vision", "decoder"):
        graphs = [name for name in bundle.artifact(stage, own).files if name.endswith(".onnx")]
        for graph, ready in zip(graphs, bundle.artifact(stage, "ort").files, strict=True):
            assert ready.endswith(".ort")
            pairs = zip(results(bundle.path(graph)), results(bundle.path(ready)), strict=True)
            assert all(np.array_equal(first, second) for first, second in pairs)


def test_the_estimate_counts_the_bytes_of_keys_and_values_that_a_position_takes(
    bundle: Bundle,
) -> None:
    for engine in (OWN_ENGINE[str(bundle.manifest.target)], "ort"):
        vision, decoder = open_engines(bundle, Plan(engine))
        state = decoder.new_state()
        assert isinstance(state, NpuState | OnnxState)
        buffers = state.buffers.values()
        taken = sum(buffer[:, :, :100].nbytes for buffer in buffers)
        assert estimate(bundle.manifest, Plan(engine), positions=100).states == taken
        vision.close()
        decoder.close()


def test_the_engine_ort_gives_the_same_answer(
    bundle: Bundle, tmp_path: Path, capsys: Capture
) -> None:
    picture = tmp_path / "scene.png"
    drawn_image(scene_samples(1)[0]).save(picture)
    answers = []
    for engine in (OWN_ENGINE[str(bundle.manifest.target)], "ort"):
        main(["run", str(bundle.folder), "--engine", engine, "--image", str(picture), "--prompt",
              "Describe the picture.", "--max-new-tokens", "12", "--json"])  # fmt: skip
        answers.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert answers[0] == answers[1] and len(answers[0]) == 12


def test_the_engine_ort_opens_nothing_but_ort_files_and_embeddings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = replace(find_target("android-xnnpack"), recipe="fast")  # with a prefill graph
    monkeypatch.setattr(settled, "find_target", lambda _: target)
    bundle = exported(tmp_path / "bundle", "android-xnnpack")
    prompt, answers = "What is in the picture? " * 3, []
    with mobilevlm.load(bundle.folder, "onnx") as vlm:
        answers.append(vlm.generate(prompt, max_new_tokens=8, ignore_eos=True).token_ids)
    parts = bundle.manifest.artifacts
    kept = tuple(part for part in parts if "ort" in part.format or part.stage == "embeddings")
    assert {part.stage for part in kept} == {"vision", "embeddings", "decoder", "prefill"}
    for name in {name for part in parts if part not in kept for name in part.files}:
        bundle.path(name).unlink()
    files = {name: bundle.manifest.files[name] for name in bundle.manifest.files
             if bundle.path(name).exists()}  # fmt: skip
    write_manifest(bundle.folder, replace(bundle.manifest, artifacts=kept, files=files))
    with open_model(open_bundle(bundle.folder)) as vlm:
        assert vlm.engine == "ort"
        answers.append(vlm.generate(prompt, max_new_tokens=8, ignore_eos=True).token_ids)
        assert vlm.encode_image(Image.new("RGB", (8, 8))).any()
    assert answers[0] == answers[1]


def test_sparse_experts_go_to_accelerators_as_a_whole(tmp_path: Path) -> None:
    bundle = exported(tmp_path / "bundle", "ios-coreml", "nano-moe")
    decoder = [part for part in bundle.manifest.coverage if part.stage == "decoder"]
    assert [part.left for part in decoder] == [{}, {}]


def test_the_same_export_has_the_same_bytes(bundle: Bundle, tmp_path: Path) -> None:
    again = exported(tmp_path / "again", str(bundle.manifest.target))
    assert again.manifest.files == bundle.manifest.files


def test_sessions_of_the_converter_have_no_second_thread() -> None:
    """It would allocate whenever the scheduler lets it, and memory decides the order of a file."""
    script = """\
import sys, onnxruntime
from onnxruntime.tools import convert_onnx_models_to_ort as tool
from mobilevlm.export.targets import ort_worker
def converted(*_, **__):
    print(onnxruntime.SessionOptions().intra_op_num_threads)
tool.convert_onnx_models_to_ort = converted
sys.argv.append("again")
ort_worker.main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert done.stdout.split() == [b"1"]


def test_an_accelerator_that_takes_too_little_fails_and_the_operator_is_named(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = find_target("ios-coreml")
    assert target.provider is not None
    wrong = replace(target, provider=replace(target.provider, least={"vision": 1.0}))
    monkeypatch.setattr(settled, "find_target", lambda _: wrong)
    place = ("export", "nano", "-o", tmp_path / "bundle", "--quiet", "--no-measure")
    found = refusal(capsys, *place, "--target", "ios-coreml", code=1)
    assert "Core ML, ML Program takes 186 of 187 operators of npu/vision_encoder.onnx" in found
    assert "it leaves Cast: input uint8 (1)" in found
    assert not (tmp_path / "bundle").exists()


def test_weights_that_do_not_fit_into_an_ort_file_are_refused(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_format, "LARGEST", 10_000_000)
    place = ("export", "nano", "-o", tmp_path / "bundle", "--quiet", "--no-measure")
    found = refusal(capsys, *place, "--target", "ios-coreml", code=1)
    assert "the decoder stage has 0.0 GB of weights, an .ort file holds at most 2 GB" in found
    assert not (tmp_path / "bundle").exists()


def test_elementary_operators_need_a_vision_stage_in_float(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = replace(find_target("android-xnnpack"), vision=None)
    monkeypatch.setattr(settled, "find_target", lambda _: wrong)
    place = ("export", "nano", "-o", tmp_path / "bundle", "--quiet", "--no-measure")
    found = refusal(capsys, *place, "--target", "android-xnnpack")
    assert "elementary operators are for a vision stage in float" in found


def test_without_the_extra_an_export_says_that_there_is_no_package(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mobilevlm.export.targets import coreml_package

    monkeypatch.setattr(coreml_package, "find_spec", lambda _: None)
    place = str(tmp_path / "bundle")
    main(["export", "nano", "-o", place, "--target", "ios-coreml", "--no-measure"])
    assert "no package: coremltools is not installed" in capsys.readouterr().err
    assert open_bundle(Path(place)).manifest.packages == ()


@pytest.mark.skipif(
    os.environ.get("MOBILEVLM_WITHOUT_COREML") == "1", reason="asked to go without coremltools"
)
def test_a_core_ml_package_is_an_ml_program_with_the_weights_of_the_model(bundle: Bundle) -> None:
    if bundle.manifest.target != "ios-coreml":
        assert bundle.manifest.packages == ()
        return
    pytest.importorskip("coremltools", reason="Apple's converter: pip install '.[coreml]'")
    from mobilevlm.export.targets.coreml_package import read_package

    (package,) = bundle.manifest.packages
    assert all(name in bundle.manifest.files for name in package.files) and len(package.files) == 3
    operators, constants = read_package(bundle.path(package.path))
    assert operators == package.operators
    assert (operators["linear"], operators["layer_norm"], operators["softmax"]) == (32, 11, 5)
    assert sum(array.size for array in constants.values()) > 1_000_000  # the stage's parameters


def test_the_converter_imports_neither_torch_nor_mobilevlm(tmp_path: Path) -> None:
    """They draw random numbers when they are imported, and memory decides the order of a file."""
    program = [sys.executable, "-X", "importtime", *ort_worker.ISOLATED, ort_worker.__file__]
    done = subprocess.run([*program, "again"], cwd=tmp_path, capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "onnxruntime.tools.convert_onnx_models_to_ort" in imported
    assert not {"torch", "tokenizers", "mobilevlm"} & imported

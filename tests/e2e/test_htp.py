"""Qualcomm's HTP: graphs compiled for real chips, run in the emulator (extra ``[npu]``)."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import refusal, relative_error

import mobilevlm
from mobilevlm.builtin import WEIGHTS
from mobilevlm.bundle import Artifact, Bundle, open_bundle
from mobilevlm.errors import TargetError
from mobilevlm.export.calibration.samples import held_out_samples
from mobilevlm.export.targets import find_target
from mobilevlm.export.targets.htp import Chip, compile_graphs, emulate
from mobilevlm.preparation import prepare
from mobilevlm.runtime.engines.onnx.engine import open_session
from mobilevlm.runtime.engines.onnx.npu import FIXED_POINT, causal_mask

if os.environ.get("MOBILEVLM_WITHOUT_NPU") == "1":
    pytest.skip("asked to go without onnxruntime-qnn", allow_module_level=True)
pytest.importorskip("onnxruntime_qnn", reason="Qualcomm's compiler: pip install '.[npu]'")

CHIPS = ("sm8550", "sm8650", "sm8750")
V75 = Chip(57, 75)


@pytest.fixture(scope="module", params=["nano", "nano-moe"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """For Snapdragon 8 Gen 3."""
    folder = tmp_path_factory.mktemp("htp") / "bundle"
    target = "android-qnn-sm8650"
    mobilevlm.export(WEIGHTS / request.param, folder, target=target, measure=False)
    return open_bundle(folder)


def graphs(bundle: Bundle, artifact: Artifact) -> list[Path]:
    return [bundle.path(name) for name in artifact.files if name.endswith(".onnx")]


def test_the_binaries_are_in_the_bundle(bundle: Bundle) -> None:
    assert bundle.manifest.target == "android-qnn-sm8650"
    assert [part.stage for part in bundle.manifest.compiled] == ["vision", "decoder"]
    for part, count in zip(bundle.manifest.compiled, (1, 2), strict=True):
        binaries = [name for name in part.files if name.endswith("_qnn.bin")]
        assert len(binaries) == count and part.nodes > 100
        assert all(bundle.manifest.files[name].size > 100_000 for name in binaries)


@pytest.mark.parametrize("chip", CHIPS)
def test_all_operators_are_taken_for_each_chip(bundle: Bundle, chip: str, tmp_path: Path) -> None:
    target = find_target(f"android-qnn-{chip}")
    assert target.htp is not None
    for artifact in bundle.manifest.artifacts:
        if artifact.stage != "embeddings":
            for made in compile_graphs(graphs(bundle, artifact), tmp_path, target.htp):
                assert made.nodes > 100 and made.left == ()


# Measured: nano 0.007, 0.0012 and 0.0004 (picture, chunk, token).
def test_the_emulator_is_near_onnx_runtime_on_the_same_graphs(bundle: Bundle) -> None:
    spec = bundle.manifest.spec
    random = np.random.default_rng(1)
    edge = spec.image.square.size
    square = np.full((1, edge, edge, 3), 255, np.uint8)
    square[:, 40:120, 60:150] = (200, 30, 30)
    visual, decoder = bundle.manifest.compiled
    source = open_session(
        bundle.path(bundle.artifact("vision", "npu").path), 2, entries=FIXED_POINT
    )
    (expected,) = source.run(["visual_tokens"], {"pixels": square})
    ready = bundle.path(visual.files[0])
    (found,) = emulate(ready, V75, {"pixels": square}, ["visual_tokens"])
    assert relative_error(found, expected) < 0.03
    for graph, name in zip(
        graphs(bundle, bundle.artifact("decoder", "npu")), decoder.files, strict=False
    ):
        session = open_session(graph, 2, entries=FIXED_POINT)
        inputs = {
            value.name: random.integers(96, 160, value.shape).astype(np.uint8)
            for value in session.get_inputs()
            if value.type == "tensor(uint8)"
        }
        window = spec.decoder.context_length
        length = {value.name: value.shape for value in session.get_inputs()}["inputs_embeds"][1]
        angles = random.uniform(0, 6, (1, length, 1, spec.decoder.rotary_channels))
        inputs |= {
            "inputs_embeds": np.resize(expected, (1, length, spec.decoder.hidden_size)),
            "attention_mask": causal_mask(length, window, 100),
            "rotary_cos": np.cos(angles).astype(np.float32),
            "rotary_sin": np.sin(angles).astype(np.float32),
            "logits_position": np.array([length - 1], np.int32),
        }
        (logits,) = session.run(["logits"], inputs)
        (near,) = emulate(bundle.path(name), V75, inputs, ["logits"])
        assert relative_error(near, logits) < 0.05


def test_an_operator_that_the_chip_lacks_is_named(bundle: Bundle, tmp_path: Path) -> None:
    """Hexagon v68 has no layer norm of 16 bits; its target has centred ones."""
    vision = graphs(bundle, bundle.artifact("vision", "npu"))
    with pytest.raises(TargetError, match=r"v68 does not take LayerNormalization .* CPU"):
        compile_graphs(vision, tmp_path, Chip(35, 68))


def test_an_export_whose_graphs_the_chip_does_not_take_leaves_no_bundle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mobilevlm.export import settled

    wrong = replace(find_target("android-qnn-qcs6490"), layer_norm="fused")
    monkeypatch.setattr(settled, "find_target", lambda _: wrong)
    place = ("export", "nano", "-o", tmp_path / "bundle", "--quiet", "--no-measure")
    found = refusal(capsys, *place, "--target", "android-qnn-qcs6490", code=1)
    assert "does not take LayerNormalization" in found
    assert not (tmp_path / "bundle").exists()


# Measured: 0.0105, the graph's own distance from float32 being 0.018.
def test_norms_without_their_mean_go_to_the_chip_that_lacks_layer_norms(tmp_path: Path) -> None:
    """nano has outputs without weights, whose scale made this 0.26: docs/explanation/npu.md."""
    folder = tmp_path / "bundle"
    mobilevlm.export(WEIGHTS / "nano", folder, target="android-qnn-qcs6490", measure=False)
    bundle = open_bundle(folder)
    assert len(bundle.manifest.compiled) == 2
    chip = find_target("android-qnn-qcs6490").htp
    assert chip is not None
    image = held_out_samples("scenes")[0].images[0]
    pixels = {"pixels": prepare(image, bundle.manifest.spec.image).arrays[0]["pixels"][None]}
    graph = bundle.path(bundle.artifact("vision", "npu").path)
    (expected,) = open_session(graph, 2, entries=FIXED_POINT).run(["visual_tokens"], pixels)
    ready = bundle.path(bundle.manifest.compiled[0].files[0])
    (found,) = emulate(ready, chip, pixels, ["visual_tokens"])
    assert relative_error(found, expected) < 0.03

"""``qdq8`` and ``qdq16``: exported, measured, run and verified as a person would."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir
import pytest
from conftest import Fixture, drawn_image, refusal

from mobilevlm.bundle import open_bundle
from mobilevlm.cli import main
from mobilevlm.export.calibration.samples import scene_samples

RECIPE = """\
tower = {{ precision = "{precision}", calibrator = "percentile"{more} }}
projector = {{ precision = "{precision}", calibrator = "percentile" }}
decoder = "q8"
lm_head = "q8"
embeddings = "fp16"
[limits]
vision_relative_error = {limit}
decoder_kl = 1
"""

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two drawn scenes: enough to fix ranges in a second."""
    lines = []
    for index, sample in enumerate(scene_samples(2)):
        drawn_image(sample).save(tmp_path / f"{index}.png")
        lines.append(json.dumps({"image": f"{index}.png", "prompt": "What?", "answer": "This."}))
    path = tmp_path / "samples.jsonl"
    path.write_text("\n".join(lines))
    return path


def recipe(folder: Path, precision: str, limit: float, more: str = "") -> Path:
    path = folder / "fixed.toml"
    path.write_text(RECIPE.format(precision=precision, limit=limit, more=more))
    return path


# Measured: 0.02 on nano (32 scenes: 0.015), 0.03 with MobileVLM V2's random weights.
@pytest.mark.parametrize("checkpoint", ["nano", "mobilevlm_v2"])
def test_a_qdq16_bundle_passes_its_gate_runs_and_is_verified(
    checkpoint: str, mobilevlm_v2: Fixture, data: Path, tmp_path: Path, capsys: Capture
) -> None:
    model, options = "nano", tuple[str, ...]()
    if checkpoint != "nano":
        model, options = str(mobilevlm_v2.checkpoint), ("--vision-tower", str(mobilevlm_v2.tower))
    bundle = str(tmp_path / "bundle")
    made = ("--recipe", str(recipe(tmp_path, "qdq16", 0.05)), "--calibration", str(data))
    main(["export", model, "-o", bundle, *options, *made])
    assert capsys.readouterr().out == ""
    artifact = open_bundle(Path(bundle)).artifact("vision", "onnx")
    assert artifact.path == "onnx/vision_encoder_qdq16.onnx" and artifact.weight_bits is None
    assert artifact.largest_weight_error is not None
    assert 0 < artifact.largest_weight_error.relative_error < 0.02  # half a step of 1/127
    main(["inspect", bundle, "--json"])
    assert "qdq16" in capsys.readouterr().out
    main(["run", bundle, "--image", str(tmp_path / "0.png"), "--prompt", "What?", "--json",
          "--max-new-tokens", "4"])  # fmt: skip
    assert json.loads(capsys.readouterr().out)["token_ids"]
    main(["verify", bundle, model, *options, "--data", str(data), "--json", "--layers"])
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] and found["stages"]["vision"]["relative_error"] <= 0.05
    layers = {item["layer"]: item["weight_error"] for item in found["layers"]}
    assert any("projector.mlp.0" in layer and 0 < layers[layer] < 0.02 for layer in layers)


def test_smoothquant_is_folded_into_the_graph_and_unfolded_when_weights_are_read(
    mobilevlm_v2: Fixture, data: Path, tmp_path: Path, capsys: Capture
) -> None:
    bundle = tmp_path / "bundle"
    path = recipe(tmp_path, "qdq8", 9, ', scaling = "smoothquant"')
    options = ("--vision-tower", str(mobilevlm_v2.tower))
    made = ("--recipe", str(path), "--calibration", str(data))
    main(["export", str(mobilevlm_v2.checkpoint), "-o", str(bundle), *options, *made])
    artifact = open_bundle(bundle).artifact("vision", "onnx")
    assert artifact.weight_bits in (7, 8) and {node.domain for node in _graph(bundle)} == {""}
    given = ("--data", str(data), "--json", "--layers")
    main(["verify", str(bundle), str(mobilevlm_v2.checkpoint), *options, *given])
    layers = json.loads(capsys.readouterr().out)["layers"]
    # 7 bits are 1.3 % off; factors that stayed in the weights would be far more.
    assert all(item["weight_error"] < 0.03 for item in layers)


def _graph(bundle: Path) -> ir.Graph:
    return ir.load(bundle / "onnx" / "vision_encoder_qdq8.onnx").graph


def test_ranges_too_coarse_fail_the_gate_with_1(
    mobilevlm_v2: Fixture, data: Path, tmp_path: Path, capsys: Capture
) -> None:
    place = ("export", mobilevlm_v2.checkpoint, "-o", tmp_path / "bundle")
    options = ("--vision-tower", mobilevlm_v2.tower, "--calibration", data, "--quiet")
    path = recipe(tmp_path, "qdq8", 1e-3)
    found = refusal(capsys, *place, *options, "--recipe", path, code=1)
    assert "vision relative_error is" in found
    assert not (tmp_path / "bundle").exists()


def test_calibration_data_without_images_leave_the_tower_to_drawn_ones(
    mobilevlm_v2: Fixture, tmp_path: Path, capsys: Capture
) -> None:
    data = tmp_path / "text.jsonl"
    data.write_text('{"prompt": "What is red?", "answer": "A ruby."}')
    place = ("export", mobilevlm_v2.checkpoint, "-o", tmp_path / "bundle")
    options = ("--vision-tower", mobilevlm_v2.tower, "--calibration", data, "--no-measure")
    main([*map(str, place), *map(str, options), "--recipe", str(recipe(tmp_path, "qdq8", 1))])
    assert "on made samples: " in capsys.readouterr().err
    assert (tmp_path / "bundle" / "manifest.json").exists()

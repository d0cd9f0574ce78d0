"""``mobilevlm verify`` on GGUF files, run by llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import llama  # noqa: F401  (skips where llama.cpp is not wanted)
import numpy as np
import pytest
from conftest import drawn_image

import mobilevlm
from mobilevlm.builtin import checkpoint_path
from mobilevlm.bundle import open_bundle
from mobilevlm.cli import main
from mobilevlm.export.calibration.samples import held_out_samples
from mobilevlm.export.quality.artifact_weights import artifact_weights
from mobilevlm.families import open_checkpoint

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nano") / "bundle"
    mobilevlm.export(
        "nano", folder, recipe="int8", formats=("onnx", "gguf"), gguf_type="q4_k_m", measure=False
    )
    return folder


@pytest.mark.parametrize(
    ("engine", "stages"),
    [
        ("gguf", {"vision_gguf", "decoder_gguf", "end_to_end_gguf"}),
        ("hybrid", {"vision", "decoder_gguf", "end_to_end_hybrid"}),
        ("ggml", {"vision", "decoder_gguf", "end_to_end_ggml"}),
    ],
)
def test_each_engine_is_measured_by_the_artifacts_that_it_runs(
    engine: str, stages: set[str], bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    (sample,) = held_out_samples("scenes")[:1]
    drawn_image(sample).save(tmp_path / "scene.png")
    line = {"image": "scene.png", "prompt": sample.prompt, "answer": sample.answer}
    (tmp_path / "data.jsonl").write_text(json.dumps(line))
    data = str(tmp_path / "data.jsonl")
    options = ("--engine", engine, "--data", data, "--layers", "--json", "--quiet")
    main(["verify", str(bundle), "nano", *options])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert set(found["stages"]) == stages and found["passed"]
    # Q4_K_M rounds more than 8-bit weights do, and does not break a trained model.
    assert 1e-6 < found["stages"]["decoder_gguf"]["kl"] < 0.1
    errors = {item["layer"]: item["weight_error"] for item in found["layers"]}
    assert 0.01 < errors["decoder.layers.0.mlp.down_proj"] < 0.15


def test_weights_of_gguf_files_come_back_with_rotary_rows_in_our_order(bundle: Path) -> None:
    model = open_checkpoint(checkpoint_path(Path("nano")))
    stored = artifact_weights(model, open_bundle(bundle), "gguf")
    size = model.spec.decoder.hidden_size
    for part in "qkv":
        name = f"decoder.layers.0.attn.{part}_proj.weight"
        found, exact = (weights.read(name, (size, size)) for weights in (stored, model.weights))
        # 4 bits are 8 % off; rows in another order would be 140 % off.
        assert np.linalg.norm(found - exact) < 0.15 * np.linalg.norm(exact)

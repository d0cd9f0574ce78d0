"""``mobilevlm targets`` and ``export --target``, as a person would use them; without a vendor's
compiler."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from conftest import Fixture, drawn_image, refusal

from mobilevlm.bundle import open_bundle
from mobilevlm.cli import main
from mobilevlm.export import settled
from mobilevlm.export.calibration.samples import scene_samples
from mobilevlm.export.recipes.named import RECIPES
from mobilevlm.export.targets import FOLDER, find_target, target_names

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


def test_each_target_is_a_file_that_can_be_read_and_is_listed(capsys: Capture) -> None:
    assert target_names() == sorted(path.stem for path in FOLDER.glob("*.toml"))
    main(["targets", "--json"])
    listed = json.loads(capsys.readouterr().out)["targets"]
    for name in target_names():
        target = find_target(name)
        assert target.name == name and target.settled().chunk_length == target.chunk_length
        assert listed[name]["verified"] == target.verified and "memory" in target.verified
    main(["targets"])
    assert "Hexagon v75" in " ".join(capsys.readouterr().out.split())


def stored(name: str) -> dict[str, Any]:
    return tomllib.loads((FOLDER / f"{name}.toml").read_text("utf-8"))


def test_the_list_has_every_line_of_each_target_and_what_is_verified(capsys: Capture) -> None:
    main(["targets", "--json"])
    listed = json.loads(capsys.readouterr().out)["targets"]
    assert listed.keys() == {path.stem for path in FOLDER.glob("*.toml")}
    for name, found in listed.items():
        for key, value in stored(name).items():
            parts = value.items() if isinstance(value, dict) else ()
            assert all(found[key][part] == each for part, each in parts), (name, key)
            assert isinstance(value, dict) or found[key] == value, (name, key)
        verified = found["verified"]
        assert ("no operator left to the CPU" in verified) == ("htp" in stored(name))
        assert ("by table; .ort files run" in verified) == ("provider" in stored(name))
        assert all(stored(name).get(key, "") in verified for key in ("tested", "caveat"))


@pytest.mark.parametrize("name", target_names())
def test_the_recipe_of_a_target_has_its_settings(name: str) -> None:
    given, recipe = stored(name), find_target(name).settled()
    for key in ("operators", "chunk_length", "context_length", "layer_norm", "experts"):
        assert getattr(recipe, key) == given.get(key, getattr(RECIPES["fp32"], key)), key
    if "vision" in given:
        assert recipe.tower.precision == recipe.projector.precision == given["vision"]


def test_a_bundle_for_a_target_says_so_and_has_its_weight_bits(
    tmp_path: Path, capsys: Capture
) -> None:
    bundle = tmp_path / "bundle"
    main(["export", "nano", "-o", str(bundle), "--target", "cpu-arm64", "--no-measure", "--quiet"])
    manifest = open_bundle(bundle).manifest
    assert manifest.target == "cpu-arm64" and manifest.compiled == ()
    bits = {part.weight_bits for part in manifest.artifacts if part.weight_bits is not None}
    assert bits == {8}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--target", "abacus"),
            "target 'abacus' is not known: expected one of android-qnn-qcs6490",
        ),
        (("--target", "android-nnapi"), "android-qnn-sm8750, android-xnnpack, cpu-arm64"),
        (("--target", "rpi5", "--recipe", "int8"), "target rpi5 settles recipe"),
        (("--target", "rpi5", "--format", "gguf"), "target rpi5 settles recipe"),
        (("--format", "npu"), "choose --recipe a16w8, a8w8 or fp32"),
        (("--recipe", "a16w8"), "add --format npu"),
    ],
)
def test_what_does_not_go_together_is_refused(
    options: tuple[str, ...], message: str, tmp_path: Path, capsys: Capture
) -> None:
    place = ("export", "nano", "-o", tmp_path / "bundle", "--quiet")
    assert message in refusal(capsys, *place, *options)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(("name", "room"), [("iot-512mb", 50), ("web-wasm", 350)])
def test_a_model_that_takes_more_memory_than_the_target_has_is_no_bundle(
    name: str, room: int, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(find_target(name), memory_mb=room)
    monkeypatch.setattr(settled, "find_target", lambda _: small)
    place = ("export", "nano", "-o", tmp_path / "bundle", "--quiet", "--no-measure")
    found = refusal(capsys, *place, "--target", name, code=1)
    assert f"the target has {room} MB" in found
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("recipe", ["a16w8", "a8w8"])
def test_a_bundle_for_npus_is_measured_runs_and_is_verified(
    recipe: str, mobilevlm_v2: Fixture, data: Path, tmp_path: Path, capsys: Capture
) -> None:
    bundle = str(tmp_path / "bundle")
    made = ("--recipe", recipe, "--format", "npu", "--calibration", str(data))
    main(["export", "nano", "-o", bundle, *made])
    manifest = open_bundle(Path(bundle)).manifest
    assert manifest.quality.measured and "decoder_npu" in manifest.quality.stages
    assert manifest.spec.decoder.context_length == 1024
    capsys.readouterr()
    main(["run", bundle, "--image", str(tmp_path / "0.png"), "--prompt", "What?", "--json",
          "--max-new-tokens", "4"])  # fmt: skip
    assert json.loads(capsys.readouterr().out)["token_ids"]
    main(["verify", bundle, "nano", "--data", str(data), "--json", "--layers"])
    found = json.loads(capsys.readouterr().out)
    errors = [layer["weight_error"] for layer in found["layers"]]
    assert found["passed"] and len(errors) > 30 and all(0 < error < 0.02 for error in errors)
    graph = ir.load(tmp_path / "bundle" / manifest.artifacts[0].path).graph
    zeros = 0
    for name, value in graph.initializers.items():
        if name.startswith("vision.tower.layers") and name.endswith(".weight_quantized"):
            empty = (value.const_value.numpy() == 0).all(axis=0)
            scales = graph.initializers[name.replace("_quantized", "_scale")].const_value.numpy()
            if scales.ndim and empty.any():  # nano has outputs without weights
                zeros += 1
                assert scales[empty] == pytest.approx(scales[~empty].max())
    assert zeros == 15

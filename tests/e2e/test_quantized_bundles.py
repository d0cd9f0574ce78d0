"""Bundles exported with each quantizer, scaling and bit width run, and lose what they should."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Fixture, refusal
from PIL import Image

import mobilevlm
from mobilevlm.bundle import Manifest

RECIPE = """\
tower = {tower}
projector = {projector}
decoder = {decoder}
lm_head = {lm_head}
embeddings = "fp16"
[limits]
vision_relative_error = 9
decoder_kl = 99
"""

FLOATS = {"tower": '"fp32"', "projector": '"fp32"', "decoder": '"fp32"', "lm_head": '"fp32"'}


def recipe_file(folder: Path, **parts: str) -> str:
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(**{**FLOATS, **parts}))
    return str(path)


def exported(fixture: Fixture, folder: Path, **parts: str) -> Manifest:
    return mobilevlm.export(
        fixture.checkpoint,
        folder / "bundle",
        recipe=recipe_file(folder, **parts),
        vision_tower=fixture.tower,
    )


DECODERS = [
    f'{{ precision = "{precision}", quantizer = "{quantizer}"{more} }}'
    for quantizer in ("rtn", "hqq", "gptq")
    for precision, more in (
        ("q8", ""),
        ("q4", ', block_size = 16, symmetric = false, scaling = "awq"'),
        ("q2", ", symmetric = false"),
        ("int8", ', scaling = "smoothquant"'),
    )
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all decoders, so that the vision stage is reused."""
    return tmp_path_factory.mktemp("decoders")


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_decoder_of_each_kind_runs_and_its_loss_is_finite(
    mobilevlm_v2: Fixture, decoder: str, folder: Path
) -> None:
    manifest = exported(mobilevlm_v2, folder, decoder=decoder, lm_head=decoder)
    kl = manifest.quality.stages["decoder"].figures["kl"]
    # Gaussian weights, the worst there are: measured at most 0.007, 0.15 and 2.0.
    assert 0 <= kl < (0.02 if "8" in decoder else 0.4 if "q4" in decoder else 5)
    with mobilevlm.load(folder / "bundle") as vlm:
        assert len(vlm.generate("Hello", max_new_tokens=3, ignore_eos=True).token_ids) == 3


@pytest.mark.parametrize(
    "tower",
    [
        '{ precision = "int8", scaling = "smoothquant" }',
        '{ precision = "int8", quantizer = "gptq" }',
        '{ precision = "int8", quantizer = "gptq", scaling = "smoothquant" }',
        '{ precision = "q4", quantizer = "gptq", scaling = "awq", symmetric = false }',
    ],
)
def test_a_tower_of_each_kind_runs_and_its_loss_is_finite(
    mobilevlm_v2: Fixture, tower: str, tmp_path: Path
) -> None:
    projector = '{ precision = "q4", quantizer = "gptq" }'
    manifest = exported(mobilevlm_v2, tmp_path, tower=tower, projector=projector)
    assert 0 <= manifest.quality.stages["vision"].figures["relative_error"] < 0.3


def test_a_calibrated_export_is_taken_over_until_its_data_change(
    mobilevlm_v2: Fixture, tmp_path: Path
) -> None:
    decoder = '{ precision = "q4", quantizer = "gptq" }'
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(tmp_path / "grey.png")
    data = tmp_path / "samples.jsonl"
    data.write_text(json.dumps({"image": "grey.png", "prompt": "What?", "answer": "Grey."}))

    def export() -> tuple[str, ...]:
        manifest = mobilevlm.export(
            mobilevlm_v2.checkpoint,
            tmp_path / "bundle",
            recipe=recipe_file(tmp_path, decoder=decoder),
            vision_tower=mobilevlm_v2.tower,
            calibration=str(data),
            measure=False,
        )
        assert manifest.recipe.calibration == "samples.jsonl"
        return tuple(artifact.key for artifact in manifest.artifacts)

    first = export()
    assert export() == first
    Image.fromarray(np.full((64, 64, 3), 200, np.uint8)).save(tmp_path / "grey.png")
    vision, embeddings, decoder_key = export()
    assert (vision, embeddings) == first[:2] and decoder_key != first[2]


def test_a_wrong_line_of_calibration_data_ends_with_2(
    mobilevlm_v2: Fixture, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_file(tmp_path, decoder='{ precision = "q4", scaling = "awq" }')
    data = tmp_path / "samples.jsonl"
    data.write_text('{"prompt": "a"}\n{"image": "a.png"}')
    place = ("export", mobilevlm_v2.checkpoint, "-o", tmp_path / "bundle")
    options = ("--vision-tower", mobilevlm_v2.tower, "--recipe", recipe, "--calibration", data)
    assert "samples.jsonl, line 2: key 'prompt' is missing" in refusal(capsys, *place, *options)
    assert not (tmp_path / "bundle").exists()


def test_calibration_data_that_nothing_uses_end_with_2(
    mobilevlm_v2: Fixture, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ("export", mobilevlm_v2.checkpoint, "-o", tmp_path / "bundle")
    found = refusal(capsys, *place, "--recipe", "fp32", "--calibration", "scenes")
    assert "recipe 'fp32' takes no calibration data for ONNX" in found

"""The base install on an emulated Raspberry Pi 5, from the wheels that an Arm board gets: the same
tokens as here (docs/how-to/arm64.md)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from arm64 import answers_on, fair_target, installed_package, relative_error
from emulation.answers import answers
from emulation.processors import PROCESSORS, Machine, machine
from emulation.root import make_root, missing_tools, root_folder

import mobilevlm
from mobilevlm.builtin import WEIGHTS
from mobilevlm.nano.suite import evaluation_set, images_of

ROOT = root_folder()
"""In the person's own cache: asked for before the tests have one of theirs."""
RPI5 = PROCESSORS["cortex-a76"]

missing = missing_tools()
if missing:
    pytest.skip(f"no emulation of arm64 here: {missing}", allow_module_level=True)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arm64") / "bundle"
    mobilevlm.export(WEIGHTS / "nano", folder, target=fair_target(), measure=False)
    return folder


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed_package(tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="module")
def board(package: Path) -> Iterator[Machine]:
    with machine(make_root(ROOT), RPI5, package) as emulated:
        yield emulated


def test_doctor_tells_what_the_board_is(board: Machine) -> None:
    about = json.loads(board.python("-m", "mobilevlm", "doctor", "--json"))["machine"]
    assert about["processor"] == "Cortex-A76" and about["system"].endswith("aarch64")
    assert about["features"] == ["asimd", "asimddp"]  # of those that kernels care about
    assert "CPUExecutionProvider" in about["providers"]


def test_run_streams_the_same_tokens_as_here(board: Machine, bundle: Path, tmp_path: Path) -> None:
    about_one = [item for item in evaluation_set(24) if len(item.seeds) == 1]
    example = max(about_one, key=lambda item: len(item.question.answer))
    image = tmp_path / "scene.png"
    images_of(example)[0].save(image)
    arguments = ("--image", image, "--prompt", example.question.text, "--json")
    found = json.loads(board.python("-m", "mobilevlm", "run", bundle, *arguments))
    with mobilevlm.load(bundle) as vlm:
        expected = vlm.generate(example.question.text, [image])
    assert found["token_ids"] == expected.token_ids and len(expected.token_ids) > 2
    assert found["text"] == expected.text


# Measured: visual tokens 0.0023, logits 0.031: float32 is added up in another order, and what is
# rounded to 8 bits between products may fall to the other side (docs/how-to/arm64.md).
def test_answers_and_arrays_are_those_of_this_machine(package: Path, bundle: Path) -> None:
    here = answers(bundle, 1)
    there = answers_on(RPI5, make_root(ROOT), package, bundle, 1)
    np.testing.assert_array_equal(there["ids.0"], here["ids.0"])
    assert relative_error(there["visual"], here["visual"]) < 0.01
    assert relative_error(there["logits"], here["logits"]) < 0.1

"""Bundles that are replaced, or made shorter, while programs load or use them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BundleOf

import mobilevlm
from mobilevlm import bundle as bundles
from mobilevlm.bundle import open_bundle
from mobilevlm.errors import BundleError, ReplacedError
from mobilevlm.plan import Plan
from mobilevlm.runtime import open_model as opening
from mobilevlm.runtime.engines.opening import open_engines

IN_TURN = Plan("onnx", memory="in turn")


def image(value: int) -> np.ndarray:
    return np.full((24, 24, 3), value, np.uint8)


@pytest.fixture
def folder(bundle_of: BundleOf, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_of("tiny", "int4"), tmp_path / "bundle"))


@pytest.fixture
def other(bundle_of: BundleOf, tmp_path: Path) -> Path:
    """Bundle that takes its place."""
    return Path(shutil.copytree(bundle_of("tiny", "int8"), tmp_path / "other"))


def replace(folder: Path, other: Path) -> None:
    """As an export does that cannot exchange folders."""
    folder.rename(folder.with_name("aside"))
    other.rename(folder)
    shutil.rmtree(folder.with_name("aside"))


@pytest.mark.parametrize("moment", ["before the engines", "after the engines"])
def test_loading_begins_anew_when_the_bundle_is_replaced_meanwhile(
    moment: str, folder: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = open_bundle(other).digest

    def disturbed(*arguments: Any) -> Any:
        if other.exists() and moment == "before the engines":
            replace(folder, other)
        engines = open_engines(*arguments)
        if other.exists():
            replace(folder, other)
        return engines

    monkeypatch.setattr(opening, "open_engines", disturbed)
    with mobilevlm.load(folder) as vlm:
        assert vlm.bundle.digest == expected
        assert vlm.generate("Who?", max_new_tokens=2).token_ids


def test_opening_a_bundle_begins_anew_too(
    folder: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, read_manifest = open_bundle(other).digest, bundles.read_manifest

    def disturbed(place: Path) -> Any:
        found = read_manifest(place)
        if other.exists():
            replace(folder, other)
        return found

    monkeypatch.setattr(bundles, "read_manifest", disturbed)
    assert open_bundle(folder).digest == expected


def test_a_bundle_that_never_holds_still_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_manifest = bundles.read_manifest

    def disturbed(place: Path) -> Any:
        found = read_manifest(place)
        os.utime(place / "manifest.json")
        return found

    monkeypatch.setattr(bundles, "read_manifest", disturbed)
    with pytest.raises(ReplacedError, match="another bundle was put in its place"):
        open_bundle(folder)


def test_in_turn_does_not_mix_two_bundles(folder: Path, other: Path) -> None:
    with mobilevlm.load(folder, plan=IN_TURN) as vlm:
        assert vlm.generate("Who?", [image(9)], max_new_tokens=2).token_ids
        replace(folder, other)
        with pytest.raises(ReplacedError, match="load it again"):
            vlm.generate("Who?", [image(99)], max_new_tokens=2)
    with mobilevlm.load(folder, plan=IN_TURN) as vlm:
        assert vlm.generate("Who?", [image(99)], max_new_tokens=2).token_ids


def test_in_turn_goes_on_with_a_bundle_of_the_same_content(folder: Path, tmp_path: Path) -> None:
    same = Path(shutil.copytree(folder, tmp_path / "same"))
    with mobilevlm.load(folder, plan=IN_TURN) as vlm:
        expected = vlm.generate("Who?", [image(9)], max_new_tokens=3).token_ids
        replace(folder, same)
        vlm.clear_caches()
        assert vlm.generate("Who?", [image(9)], max_new_tokens=3).token_ids == expected


def test_in_turn_names_what_is_missing(folder: Path) -> None:
    with mobilevlm.load(folder, plan=IN_TURN) as vlm:
        assert vlm.generate("Who?", [image(9)], max_new_tokens=2).token_ids
        shutil.rmtree(folder)
        with pytest.raises(BundleError, match="not a bundle"):
            vlm.generate("Who?", [image(99)], max_new_tokens=2)


SHORTER = """\
import os, sys
from pathlib import Path
import numpy as np
import mobilevlm
from mobilevlm.errors import BundleError
from mobilevlm.plan import Plan
folder, engine, setting = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
plan = Plan(engine, vision_weights=setting)
vlm = mobilevlm.load(folder, plan=plan)
image = np.full((24, 24, 3), 9, np.uint8)
vlm.generate("Who?", [image], max_new_tokens=2)
for path in folder.rglob(sys.argv[4]):
    os.truncate(path, 0)
vlm.clear_caches()
try:
    vlm.generate("Who are you?", [image + 1], max_new_tokens=2)
except BundleError as error:
    print(error)
"""


@pytest.mark.parametrize("setting", ["packed", "mapped"])
@pytest.mark.parametrize("name", ["vision*_data", "embed*_data", "decoder*_data"])
def test_weights_that_become_shorter_in_place_are_an_error_not_a_signal(
    name: str, setting: str, folder: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHORTER, folder, "onnx", setting, name],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert "_data: the file became shorter while it was in use" in done.stdout

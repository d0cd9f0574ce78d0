"""The manifest there and back, and files that are hashed no more often than needed."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import BundleOf

from mobilevlm import bundle
from mobilevlm.bundle import open_bundle, read_manifest, write_manifest
from mobilevlm.errors import BundleError
from mobilevlm.whole_file import file_sha256


@pytest.fixture
def copy(bundle_of: BundleOf, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_of("tiny", "int4"), tmp_path / "bundle"))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are hashed from now on."""
    names: list[str] = []

    def note(path: Path) -> str:
        names.append(path.name)
        return file_sha256(path)

    monkeypatch.setattr(bundle, "file_sha256", note)
    return names


def test_a_manifest_comes_back_unchanged_and_with_the_same_bytes(
    copy: Path, tmp_path: Path
) -> None:
    manifest, digest = read_manifest(copy)
    (tmp_path / "again").mkdir()
    write_manifest(tmp_path / "again", manifest)
    assert read_manifest(tmp_path / "again") == (manifest, digest)
    assert (tmp_path / "again" / "manifest.json").read_bytes() == (
        (copy / "manifest.json").read_bytes()
    )


def test_the_digest_covers_every_value(copy: Path) -> None:
    path = copy / "manifest.json"
    data = json.loads(path.read_text())
    del data["sha256"]
    for key in data:
        changed = {**data, "sha256": read_manifest(copy)[1], key: [data[key]]}
        path.with_name("other").mkdir(exist_ok=True)
        (copy / "other" / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(BundleError):
            read_manifest(copy / "other")


def test_layout_of_the_json_does_not_matter(copy: Path) -> None:
    path, expected = copy / "manifest.json", read_manifest(copy)
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7))
    assert read_manifest(copy) == expected


def test_what_a_later_version_of_the_same_schema_adds_is_ignored(copy: Path) -> None:
    path, (manifest, _) = copy / "manifest.json", read_manifest(copy)
    data = json.loads(path.read_text())
    del data["sha256"]
    data["later"], data["spec"]["later"], data["recipe"]["later"] = 1, [2], "three"
    data["sha256"] = bundle._digest(data)
    path.write_text(json.dumps(data))
    assert replace(read_manifest(copy)[0], recipe=manifest.recipe) == manifest
    open_bundle(copy)


def test_every_file_is_listed_with_its_size(copy: Path) -> None:
    manifest, _ = read_manifest(copy)
    found = {p.relative_to(copy).as_posix() for p in copy.rglob("*") if p.is_file()}
    assert set(manifest.files) == found - {"manifest.json"}
    assert all((copy / n).stat().st_size == e.size for n, e in manifest.files.items())


def test_the_second_opening_hashes_nothing(copy: Path, hashed: list[str]) -> None:
    first = open_bundle(copy)
    assert len(hashed) == len(first.manifest.files) >= 7
    hashed.clear()
    assert open_bundle(copy) == first
    assert hashed == []


def test_a_file_that_was_touched_but_is_equal_is_hashed_once_more_and_passes(
    copy: Path, hashed: list[str]
) -> None:
    open_bundle(copy)
    hashed.clear()
    os.utime(copy / "tokenizer.json", (0, 0))
    open_bundle(copy)
    assert hashed == ["tokenizer.json"]
    open_bundle(copy)
    assert hashed == ["tokenizer.json"]


def test_a_copy_of_a_known_bundle_is_hashed(copy: Path, hashed: list[str]) -> None:
    open_bundle(copy)
    hashed.clear()
    count = len(open_bundle(Path(shutil.copytree(copy, copy.with_name("copy")))).manifest.files)
    assert len(hashed) == count


@pytest.mark.parametrize("content", ["", "[]", "{", "null", '{"tokenizer.json": 3}'])
def test_damaged_notes_about_earlier_checks_only_cost_time(
    content: str, copy: Path, hashed: list[str], cache_home: Path
) -> None:
    open_bundle(copy)
    note = max((cache_home / "mobilevlm" / "verified").iterdir(), key=lambda p: p.stat().st_mtime)
    note.write_text(content)
    hashed.clear()
    assert len(open_bundle(copy).manifest.files) == len(hashed)


def test_a_cache_folder_that_cannot_be_written_only_costs_time(
    copy: Path, hashed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    for _ in range(2):
        hashed.clear()
        assert len(open_bundle(copy).manifest.files) == len(hashed)


def test_a_user_without_a_home_folder_can_open_a_bundle(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    open_bundle(copy)

"""Damaged bundles: each kind of damage gets one line that names the file, and exit code 2."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import BundleOf, fixture_named, refusal

from mobilevlm import bundle as bundles
from mobilevlm.bundle import open_bundle
from mobilevlm.whole_file import file_sha256

FILES = [
    "tokenizer.json",
    "onnx/vision_encoder_int8.onnx",
    "onnx/vision_encoder_int8.onnx_data",
    "onnx/embed_tokens_fp16.onnx",
    "onnx/embed_tokens_fp16.onnx_data",
    "onnx/decoder_model_merged_q4.onnx",
    "onnx/decoder_model_merged_q4.onnx_data",
    "onnx/system_prompt.bin",
]
"""Everything in an int4 bundle but the manifest."""

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def bundle(bundle_of: BundleOf, tmp_path: Path) -> Path:
    """A copy of an int4 bundle that this machine has checked before."""
    copy = Path(shutil.copytree(bundle_of("tiny", "int4"), tmp_path / "bundle"))
    assert set(open_bundle(copy).manifest.files) == set(FILES)
    return copy


def run(capsys: Capture, bundle: Path) -> str:
    """Return the message of ``run``; ``inspect`` must say the same."""
    message = refusal(capsys, "run", bundle, "--prompt", "Who?")
    assert refusal(capsys, "inspect", bundle) == message
    return message


def change_byte(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    with path.open("r+b") as file:  # the same inode
        file.write(content)


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest and signs it anew, as a program that writes bundles could."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    del data["sha256"]
    change(data)
    path.write_text(json.dumps({**data, "sha256": bundles._digest(data)}))


def test_the_undamaged_copy_runs(bundle: Path, capsys: Capture) -> None:
    from mobilevlm.cli import main

    main(["run", str(bundle), "--prompt", "Who?", "--max-new-tokens", "2"])
    assert capsys.readouterr().out


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0], ids=["first", "middle", "last"])
def test_one_changed_byte(name: str, place: float, bundle: Path, capsys: Capture) -> None:
    change_byte(bundle / name, place)
    assert f"{bundle / name}: sha256 mismatch" in run(capsys, bundle)


@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_with_the_time_set_back(name: str, bundle: Path, capsys: Capture) -> None:
    path = bundle / name
    before = path.stat()
    change_byte(path, 0.5)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert f"{path}: sha256 mismatch" in run(capsys, bundle)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file(name: str, bundle: Path, capsys: Capture) -> None:
    path = bundle / name
    size = path.stat().st_size
    os.truncate(path, size - 1)
    assert f"{path}: {size - 1} bytes, the manifest says {size}" in run(capsys, bundle)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(name: str, bundle: Path, capsys: Capture) -> None:
    (bundle / name).unlink()
    assert f"{bundle / name}: the file is missing from the bundle" in run(capsys, bundle)


def test_a_folder_in_place_of_a_file(bundle: Path, capsys: Capture) -> None:
    (bundle / "tokenizer.json").unlink()
    (bundle / "tokenizer.json").mkdir()
    assert "tokenizer.json: not a regular file" in run(capsys, bundle)


# The manifest


@pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
def test_one_changed_byte_in_the_manifest(place: float, bundle: Path, capsys: Capture) -> None:
    change_byte(bundle / "manifest.json", place)
    message = run(capsys, bundle)
    assert "manifest.json: sha256 mismatch" in message or "damaged manifest" in message


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"7", b"\xff\xfe", b"{}", b'{"schema_version": 1}',
     b'{"sha256": "", "schema_version": 1, "a": "\\ud800"}', b"[" * 100_000, b'{"a":' * 100_000],
    ids=lambda content: repr(content[:16]),
)  # fmt: skip
def test_a_manifest_that_is_none(content: bytes, bundle: Path, capsys: Capture) -> None:
    (bundle / "manifest.json").write_bytes(content)
    assert "manifest.json: damaged manifest: export the bundle again" in run(capsys, bundle)


def test_a_changed_value_in_the_manifest(bundle: Path, capsys: Capture) -> None:
    path = bundle / "manifest.json"
    path.write_text(path.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 10001.0'))
    assert "manifest.json: sha256 mismatch: the manifest was changed" in run(capsys, bundle)


@pytest.mark.parametrize("version", [3, 99, 0, -1, "2", None, 1.5])
def test_a_newer_or_impossible_schema(version: Any, bundle: Path, capsys: Capture) -> None:
    change_manifest(bundle, lambda data: data.update(schema_version=version, spec="changed"))
    message = run(capsys, bundle)
    assert f"newer version (schema {version}, this program reads up to 2)" in message
    assert "upgrade mobilevlm-edge" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("files"), "key 'files' is missing"),
        (lambda data: data["spec"]["decoder"].update(head_dim="16"), ".decoder.head_dim: expected"),
        (lambda data: data["files"].update({"a": {"size": 1}}), "key 'sha256' is missing"),
        (lambda data: data.update(artifacts={}), ".artifacts: expected a list"),
        (
            lambda data: data["artifacts"].pop(),
            "engine onnx lacks the ONNX artifact of the decoder stage",
        ),
        (
            lambda data: data["artifacts"][0].update(format="tflite"),
            "expected one of 'onnx'",
        ),
    ],
    ids=["files", "head_dim", "sha256", "stage", "no stage", "format"],
)
def test_a_manifest_with_a_wrong_value(
    change: Callable[[dict[str, Any]], object], message: str, bundle: Path, capsys: Capture
) -> None:
    change_manifest(bundle, change)
    found = refusal(capsys, "run", bundle, "--prompt", "Who?")
    assert message in found and str(bundle) in found


@pytest.mark.parametrize("name", ["../outside", "onnx/../../outside", "/etc/hostname"])
def test_a_manifest_that_lists_a_file_outside(name: str, bundle: Path, capsys: Capture) -> None:
    (bundle.parent / "outside").write_text("secret")
    entry = {"size": 6, "sha256": file_sha256(bundle.parent / "outside")}
    change_manifest(bundle, lambda data: data["files"].update({name: entry}))
    assert f"the manifest names {name!r}, which leaves the bundle" in run(capsys, bundle)


@pytest.mark.parametrize("place", ["artifact", "data", "embeddings", "system_prompt"])
def test_an_artifact_that_the_list_of_files_does_not_have(
    place: str, bundle: Path, capsys: Capture
) -> None:
    """Else a file that nothing vouches for would be opened, wherever it is."""

    def point_outside(data: dict[str, Any]) -> None:
        artifact = data["artifacts"][-1]
        if place == "artifact":
            artifact["path"] = "../outside"
        elif place == "data":
            artifact["data"] = ["../outside"]
        else:
            data[place]["path"] = "../outside"

    change_manifest(bundle, point_outside)
    assert "no size and digest for '../outside'" in run(capsys, bundle)


def sign(bundle: Path, name: str) -> None:
    """Makes the manifest vouch for a file as it is now."""
    path = bundle / name
    entry = {"size": path.stat().st_size, "sha256": file_sha256(path)}
    change_manifest(bundle, lambda data: data["files"].update({name: entry}))


@pytest.mark.parametrize("content", [b"", b"{}", b"not json", b'{"model": 3}'], ids=repr)
def test_a_damaged_tokenizer_with_the_right_digest(
    content: bytes, bundle: Path, capsys: Capture
) -> None:
    (bundle / "tokenizer.json").write_bytes(content)
    sign(bundle, "tokenizer.json")
    message = refusal(capsys, "run", bundle, "--prompt", "Who?")
    assert f"{bundle / 'tokenizer.json'}: damaged tokenizer" in message


@pytest.mark.parametrize("stage", ["vision_encoder_int8", "decoder_model_merged_q4"])
@pytest.mark.parametrize("content", [b"", b"not a graph"], ids=repr)
def test_a_damaged_graph_with_the_right_digest(
    stage: str, content: bytes, bundle: Path, capsys: Capture
) -> None:
    name = f"onnx/{stage}.onnx"
    (bundle / name).write_bytes(content)
    sign(bundle, name)
    assert f"{bundle / name}: damaged or no ONNX file" in run(capsys, bundle)


# Folders that are something else


def test_a_checkpoint_in_place_of_a_bundle(capsys: Capture) -> None:
    checkpoint = fixture_named("llava_v1").checkpoint
    message = refusal(capsys, "run", checkpoint, "--prompt", "Who?")
    assert f"{checkpoint}: a checkpoint, not a bundle: run 'mobilevlm export" in message


def test_an_empty_folder(tmp_path: Path, capsys: Capture) -> None:
    assert f"{tmp_path}: not a bundle (manifest.json is missing)" in run(capsys, tmp_path)


def test_no_folder_and_a_file(tmp_path: Path, capsys: Capture) -> None:
    assert f"{tmp_path / 'none'}: not a bundle (no such folder)" in run(capsys, tmp_path / "none")
    (tmp_path / "file").write_text("")
    assert f"{tmp_path / 'file'}: not a bundle" in run(capsys, tmp_path / "file")

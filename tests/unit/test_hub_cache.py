"""Models of the Hugging Face hub by their ids, in its local cache."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import Fixture, refusal

from mobilevlm.cli import program
from mobilevlm.errors import CheckpointError
from mobilevlm.families import open_checkpoint
from mobilevlm.hub_cache import cached_models, find_snapshot, hub_cache, is_hub_id
from mobilevlm.model import OpenOptions

REVISION = "0123456789abcdef0123456789abcdef01234567"
TOWER = "openai/clip-vit-large-patch14"
"""Name in the checkpoint's config.json"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put(cache: Path, identity: str, folder: Path, ref: str | None = REVISION) -> Path:
    """A model in the cache, its files as links to blobs."""
    home = cache / f"models--{identity.replace('/', '--')}"
    snapshot = home / "snapshots" / REVISION
    (home / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        if path.is_file():
            (home / "blobs" / f"{number}").write_bytes(path.read_bytes())
            (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number}")
    if ref is not None:
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text(ref, encoding="utf-8")
    return snapshot


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HUGGINGFACE_HUB_CACHE": "/c", "HF_HOME": "/b"}, "/c"),
        ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/d"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/d"}, "/d/huggingface/hub"),
        ({"HOME": "/e"}, "/e/.cache/huggingface/hub"),
    ],
)
def test_the_cache_is_where_the_hub_s_tools_have_it(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert hub_cache() == Path(expected)


def test_a_checkpoint_and_its_tower_are_found_by_their_ids(cache: Path, llava_v1: Fixture) -> None:
    expected = open_checkpoint(llava_v1.checkpoint, OpenOptions(llava_v1.tower))
    put(cache, "org/tiny-llava", llava_v1.checkpoint)
    with pytest.raises(CheckpointError, match=f"fetch it with 'hf download {TOWER}'"):
        open_checkpoint(Path("org/tiny-llava"))
    put(cache, TOWER, llava_v1.tower)
    put(cache, "org/tower", llava_v1.tower)
    for options in (OpenOptions(Path("org/tower")), None):
        found = open_checkpoint(Path("org/tiny-llava"), options)
        assert found.spec.inputs == expected.spec.inputs
        assert found.spec.name == "tiny-llava"


@pytest.mark.parametrize("ref", [None, "main", "../../elsewhere", "f" * 40])
def test_a_snapshot_is_the_one_of_main(cache: Path, llava_v1: Fixture, ref: str | None) -> None:
    snapshot = put(cache, "a/b", llava_v1.tower, ref)
    expected = None if ref == "f" * 40 else snapshot
    assert find_snapshot("a/b") == expected


@pytest.mark.parametrize("name", ["a", "a/b/c", "../b", "a/..", "/a/b", "a b/c", "./a/b/.."])
def test_other_names_are_no_ids(name: str) -> None:
    assert not is_hub_id(Path(name))


def test_a_folder_of_that_name_comes_first(
    cache: Path, llava_v1: Fixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(cache, "a/b", llava_v1.checkpoint)
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(Path("a/b"))


def test_a_model_that_is_not_there_is_told_with_the_command(
    cache: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    told = refusal(capsys, "export", "org/name", "-o", tmp_path / "bundle")
    assert f"no such model in {cache}" in told and "'hf download org/name'" in told
    assert "huggingface-cli download org/name" in told and "--download" in told


class Hub(types.ModuleType):
    """In place of huggingface_hub: has one model, and notes what is asked."""

    def __init__(self, cache: Path, folder: Path) -> None:
        super().__init__("huggingface_hub")
        self.cache, self.folder, self.asked = cache, folder, list[Any]()

    def HfApi(self) -> Hub:  # noqa: N802
        return self

    def list_repo_files(self, identity: str) -> list[str]:
        if identity != "org/name":
            raise OSError(f"404 for {identity}\nmore")
        return [path.name for path in self.folder.iterdir()]

    def snapshot_download(self, identity: str, allow_patterns: list[str]) -> str:
        self.asked.append((identity, allow_patterns))
        return str(put(self.cache, identity, self.folder))


def test_a_model_is_downloaded_where_that_is_asked_for(
    cache: Path,
    llava_v1: Fixture,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub = Hub(cache, llava_v1.checkpoint)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    tower = ("--vision-tower", str(llava_v1.tower), "--json")
    for _ in range(2):
        done = CliRunner().invoke(program, ["inspect", "org/name", "--download", *tower])
        assert done.exit_code == 0, done.output
    weights = "*.safetensors" if list(llava_v1.checkpoint.glob("*.safetensors")) else "*.bin"
    assert hub.asked == [("org/name", ["*.json", "*.jinja", "*.txt", "*.model", weights])]
    told = refusal(capsys, "inspect", "org/none", "--download")
    assert "org/none: cannot be downloaded: 404 for org/none" in told
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'mobilevlm-edge[hub]'" in refusal(
        capsys, "inspect", "org/none", "--download"
    )


def test_models_on_this_machine_are_listed(cache: Path, llava_v1: Fixture, tmp_path: Path) -> None:
    put(cache, "org/name", llava_v1.checkpoint)
    put(cache, "org/tower", llava_v1.tower)
    assert [identity for identity, _ in cached_models()] == ["org/name", "org/tower"]
    damaged = tmp_path / "bundles" / "damaged"
    damaged.mkdir(parents=True)
    (damaged / "manifest.json").write_text("{", encoding="utf-8")
    done = CliRunner().invoke(program, ["list", "--json", str(tmp_path / "bundles")])
    found = {one["name"]: one for one in json.loads(done.output)["models"]}
    assert found.keys() == {"nano", "nano-moe", "org/name", str(damaged)}
    assert found["org/name"]["kind"] == "cached checkpoint" and found["org/name"]["megabytes"] > 0
    assert found["nano"]["kind"] == "built-in" and "manifest.json" in found[str(damaged)]["detail"]
    assert "org/name" in CliRunner().invoke(program, ["list"]).output

"""Files of others that lie where an export works, and what killed exports leave: nothing that is
not ours is removed, nothing of ours is left or mixed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import BundleOf, refusal, tree_of

import mobilevlm
from mobilevlm.bundle import open_bundle, read_manifest
from mobilevlm.errors import BundleError
from mobilevlm.export import pipeline
from mobilevlm.export.workspace import work_folder, workspace
from mobilevlm.export.workspace.exchange import exchange
from mobilevlm.export.workspace.workspace import open_workspace
from mobilevlm.runtime.tuning.plan_file import PLAN
from mobilevlm.synth.checkpoints import write_checkpoint
from mobilevlm.whole_file import written_whole

Capture = pytest.CaptureFixture[str]

PLAN_TEXT = '{"schema_version": 1, "processors": {}}'


@pytest.fixture
def target(bundle_of: BundleOf, tmp_path: Path) -> Path:
    """An int4 bundle of the tiny checkpoint, alone in its folder."""
    return Path(shutil.copytree(bundle_of("tiny", "int4"), tmp_path / "bundle"))


def everything(folder: Path) -> dict[str, Any]:
    """Content of every file, and the end of every link, below a folder."""
    return {
        path.relative_to(folder).as_posix(): (
            str(path.readlink())
            if path.is_symlink()
            else path.read_bytes()
            if path.is_file()
            else None
        )
        for path in sorted(folder.rglob("*"))
    }


def interrupted(patch: pytest.MonkeyPatch, place: str, export: Callable[[], object]) -> None:
    """Runs an export that ends as if it was killed when it calls ``place``."""

    class Killed(BaseException):
        pass

    def kill(*_: Any, **__: Any) -> None:
        raise Killed

    with patch.context() as inner:
        inner.setattr(place, kill)
        inner.setattr("mobilevlm.export.workspace.workspace.discard", lambda home: None)
        with pytest.raises(Killed):
            export()


# Files of others


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("notes.txt", "mine"),
        ("onnx/own.onnx", "mine"),
        ("mine/deep/photo.png", "mine"),
        (".DS_Store", ""),
        (PLAN, '{"plan": "my holiday"}'),
        (PLAN, '{"schema_version": 1, "processors": {}, "own": 1}'),
        ("manifest.json.bak", "{}"),
    ],
)
def test_own_files_in_a_bundle_stop_the_export_and_stay(
    name: str, content: str, target: Path, tiny_checkpoint: Path, capsys: Capture
) -> None:
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    (target / name).write_text(content)
    before = everything(target.parent)
    message = refusal(capsys, "export", tiny_checkpoint, "-o", target)
    assert name.split("/")[0] in message and "not part of it" in message
    assert everything(target.parent) == before


def test_an_own_folder_and_links_in_a_bundle_stop_the_export(
    target: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    tokenizer = target / "tokenizer.json"
    shutil.copy(tokenizer, tmp_path / "copy.json")
    tokenizer.unlink()
    tokenizer.symlink_to(tmp_path / "copy.json")
    (target / "empty").mkdir()
    before = everything(tmp_path)
    message = refusal(capsys, "export", tiny_checkpoint, "-o", target)
    assert "'empty', 'tokenizer.json' are not part of it" in message
    assert everything(tmp_path) == before


def test_a_file_of_the_bundle_that_was_changed_stops_the_export(
    target: Path, tiny_checkpoint: Path, capsys: Capture
) -> None:
    """It may be someone's work: a graph that another tool optimized in place."""
    changed = target / "onnx/decoder_model_merged_q4.onnx_data"
    content = bytearray(changed.read_bytes())
    content[100] ^= 1
    changed.write_bytes(content)
    before = everything(target.parent)
    message = refusal(capsys, "export", tiny_checkpoint, "-o", target)
    assert "'onnx/decoder_model_merged_q4.onnx_data' is not as its manifest says" in message
    assert everything(target.parent) == before


@pytest.mark.parametrize(
    "content",
    [
        '{"schema_version": 1, "name": "app"}',
        '{"schema_version": 1, "sha256": "", "files": {}}',
        "",
    ],
)
def test_a_manifest_of_another_program_does_not_make_a_bundle(
    content: str, tiny_checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "manifest.json").write_text(content)
    (folder / "app.js").write_text("mine")
    before = everything(tmp_path)
    message = refusal(capsys, "export", tiny_checkpoint, "-o", folder)
    assert "not a bundle" in message and "manifest.json" in message
    assert everything(tmp_path) == before


def test_a_manifest_that_was_damaged_vouches_for_nothing(
    target: Path, tiny_checkpoint: Path, capsys: Capture
) -> None:
    manifest = target / "manifest.json"
    manifest.write_text(manifest.read_text()[:-20])
    before = everything(target.parent)
    assert "nothing says whose" in refusal(capsys, "export", tiny_checkpoint, "-o", target)
    assert everything(target.parent) == before


@pytest.mark.parametrize("kind", ["folder", "file", "link", "token"])
def test_what_has_the_name_of_a_work_folder_is_not_touched(
    kind: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Neither the names of earlier versions nor those of this one decide; nor does a token that was
    copied from another folder."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    names = ("bundle.partial", "bundle.partial.old", "bundle.partial-abcdefgh")
    for name in names:
        place = tmp_path / name
        if kind == "link":
            place.symlink_to(other, target_is_directory=True)
        elif kind == "file":
            place.write_text("mine")
        else:
            shutil.copytree(other, place)
            if kind == "token":
                with open_workspace(tmp_path / "bundle") as work:
                    (work.folder.parent / "finished/x.json").write_text("{}")
                    shutil.copy(work.home.path / work_folder.TOKEN, place)
    before = everything(tmp_path)
    mobilevlm.export(tiny_checkpoint, tmp_path / "bundle", measure=False)
    after = everything(tmp_path)
    assert {name: after.get(name) for name in before if ".partial-" not in name} == {
        name: content for name, content in before.items() if ".partial-" not in name
    }
    assert {name for name in after if "thesis" in name} == {n for n in before if "thesis" in n}
    open_bundle(tmp_path / "bundle")


def test_a_link_of_another_user_is_not_followed(
    target: Path, tiny_checkpoint: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = target.with_name("link")
    link.symlink_to(target)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    os.lchown(link, 4321, 4321)
    assert "a link of another user" in refusal(capsys, "export", tiny_checkpoint, "-o", link)


def test_the_root_folder_is_refused(tiny_checkpoint: Path, capsys: Capture) -> None:
    assert "the root folder cannot" in refusal(capsys, "export", tiny_checkpoint, "-o", "/")


def test_a_mount_point_is_refused_before_the_work(tiny_checkpoint: Path, capsys: Capture) -> None:
    message = refusal(capsys, "export", tiny_checkpoint, "-o", "/proc")
    assert "another file system is mounted there" in message


def test_a_bundle_that_may_not_be_changed_is_named_before_the_work(
    target: Path, tiny_checkpoint: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may, so the system's answer is given here."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != target / "onnx")
    message = refusal(capsys, "export", tiny_checkpoint, "-o", target)
    assert f"{target / 'onnx'}: the folder cannot be written to" in message


def test_a_file_that_appears_during_the_export_is_not_lost(
    target: Path,
    tiny_checkpoint: Path,
    bundle_of: BundleOf,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the last check, or between that and the exchange."""
    before = tree_of(target)

    def late(first: Path, second: Path) -> bool:
        if not (target / "late.txt").exists():
            (target / "late.txt").write_text("mine")
        return exchange(first, second)

    with monkeypatch.context() as patch:
        patch.setattr(workspace, "exchange", late)
        arguments = ("export", tiny_checkpoint, "-o", target, "--no-measure", "--recipe", "int8")
        message = refusal(capsys, *arguments, "--quiet")
    assert "'late.txt' is not part of it" in message
    assert tree_of(target) == {**before, "late.txt": b"mine"}
    (target / "late.txt").unlink()
    mobilevlm.export(tiny_checkpoint, target, recipe="int8", measure=False)
    assert tree_of(target) == tree_of(bundle_of("tiny", "int8"))
    assert list(target.parent.iterdir()) == [target]


def test_other_verbs_leave_what_has_the_names_of_their_drafts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["tiny.partial/thesis.txt", "page.html.partial"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    write_checkpoint("tiny", tmp_path / "tiny")
    with written_whole(tmp_path / "page.html") as draft:
        draft.write_text("page")
    with pytest.raises(OSError), written_whole(tmp_path / "page.html") as draft:
        draft.write_text("half")
        raise OSError
    assert (tmp_path / "page.html").read_text() == "page"
    assert [(tmp_path / name).read_text() for name in names] == ["mine", "mine"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "page.html",
        "page.html.partial",
        "tiny",
        "tiny.partial",
    ]


# plan.json


def test_a_plan_is_kept_with_the_same_bundle_and_dropped_with_another(
    target: Path, tiny_checkpoint: Path, capsys: Capture
) -> None:
    (target / PLAN).write_text(PLAN_TEXT)
    mobilevlm.export(tiny_checkpoint, target, measure=False)
    assert (target / PLAN).read_text() == PLAN_TEXT
    capsys.readouterr()
    mobilevlm.export(tiny_checkpoint, target, recipe="int8", measure=False)
    assert not (target / PLAN).exists()


# What killed exports leave


def test_a_byte_that_flips_in_the_work_folder_is_found(
    tiny_checkpoint: Path,
    bundle_of: BundleOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    target = tmp_path / "bundle"

    def export() -> object:
        return mobilevlm.export(tiny_checkpoint, target, measure=False)

    interrupted(monkeypatch, "mobilevlm.export.pipeline.write_manifest", export)
    [weights] = tmp_path.glob("*/bundle/onnx/decoder_model_merged_q4.onnx_data")
    content = bytearray(weights.read_bytes())
    content[1000] ^= 4
    weights.write_bytes(content)
    export()
    assert tree_of(target) == tree_of(bundle_of("tiny", "int4"))
    assert list(tmp_path.iterdir()) == [target]


def test_weights_of_another_recipe_are_not_adopted(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two recipes whose decoders have the same file name: the first is finished, the second killed
    while it writes, then the first is asked for again."""
    recipes = []
    for name, block in (("first", 32), ("second", 16)):
        layers = f'{{ precision = "q4", block_size = {block} }}'
        recipes.append(tmp_path / f"{name}.toml")
        recipes[-1].write_text(
            f'tower = "int8"\nprojector = "int8"\nembeddings = "fp16"\n'
            f"decoder = {layers}\nlm_head = {layers}\n"
            "limits = { vision_relative_error = 0.2, decoder_kl = 1.0 }\n"
        )
    folder = tmp_path / "folder"
    folder.mkdir()

    def export(recipe: Path, to: Path = folder / "bundle") -> object:
        return mobilevlm.export(tiny_checkpoint, to, recipe=str(recipe), measure=False)

    interrupted(monkeypatch, "mobilevlm.export.pipeline.write_manifest", lambda: export(recipes[0]))
    interrupted(
        monkeypatch,
        "mobilevlm.export.pipeline.note_finished",
        lambda: export(recipes[1]),
    )
    export(recipes[0])
    export(recipes[0], tmp_path / "undisturbed")
    assert tree_of(folder / "bundle") == tree_of(tmp_path / "undisturbed")
    assert list(folder.iterdir()) == [folder / "bundle"]


def test_a_file_that_changes_between_its_record_and_the_manifest_is_not_signed(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flip(work: workspace.Workspace, names: list[str]) -> None:
        workspace.keep_only(work, names)
        with work.path("onnx/embed_tokens_fp16.onnx_data").open("r+b") as file:
            file.write(b"\x77")

    monkeypatch.setattr(pipeline, "keep_only", flip)
    with pytest.raises(BundleError, match="was changed during the export"):
        mobilevlm.export(tiny_checkpoint, tmp_path / "bundle", measure=False)


@pytest.mark.parametrize(
    ("place", "one_step"),
    [
        ("before", True),
        ("exchanged", True),
        ("half removed", True),
        ("aside", False),
        ("exchanged", False),
        ("half removed", False),
    ],
)
def test_an_export_killed_while_it_replaces_a_bundle(
    place: str,
    one_step: bool,
    target: Path,
    tiny_checkpoint: Path,
    bundle_of: BundleOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not one_step:
        monkeypatch.setattr(workspace, "exchange", lambda first, second: False)

    def export() -> object:
        return mobilevlm.export(tiny_checkpoint, target, recipe="int8", measure=False)

    rename, calls = Path.rename, []

    def second_fails(self: Path, to: Path) -> Path:
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(self, to)

    if place == "aside":
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", second_fails)
            with pytest.raises(KeyboardInterrupt):
                export()
        assert not target.exists()
        with pytest.raises(mobilevlm.MobileVLMError):
            mobilevlm.export(target.parent / "none", target)
        assert tree_of(target) == tree_of(bundle_of("tiny", "int4"))
    else:
        function = {"before": "exchange", "exchanged": "remove_owned"}.get(place, "")
        if place == "half removed":

            def half(folder: Path, owned: Any) -> None:
                (folder / "tokenizer.json").unlink()
                raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                patch.setattr(workspace, "remove_owned", half)
                with pytest.raises(KeyboardInterrupt):
                    export()
        else:
            interrupted(monkeypatch, f"mobilevlm.export.workspace.workspace.{function}", export)
    export()
    assert tree_of(target) == tree_of(bundle_of("tiny", "int8"))
    assert list(target.parent.iterdir()) == [target]


def test_folders_that_were_only_just_made_are_removed(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    for index, content in enumerate([None, b""]):
        folder = tmp_path / f"bundle.partial-abcdefg{index}"
        folder.mkdir(mode=0o700)
        if content is not None:
            (folder / work_folder.TOKEN).write_bytes(content)
    mobilevlm.export(tiny_checkpoint, tmp_path / "bundle", measure=False)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_an_export_that_fails_before_anything_is_finished_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError

    monkeypatch.setattr(pipeline, "note_finished", fail)
    with pytest.raises(OSError):
        mobilevlm.export(tiny_checkpoint, tmp_path / "bundle", measure=False)
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_of_a_version_whose_manifest_is_no_longer_read_is_replaced(
    target: Path, tiny_checkpoint: Path
) -> None:
    from mobilevlm import bundle

    path = target / "manifest.json"
    data = json.loads(path.read_text())
    del data["sha256"], data["quality"]
    path.write_text(json.dumps({**data, "sha256": bundle._digest(data)}))
    with pytest.raises(BundleError):
        read_manifest(target)
    mobilevlm.export(tiny_checkpoint, target, measure=False)
    open_bundle(target)

"""Exports that are killed, run out of disk, meet something in their way, or miss their limits; and
questions that cannot be answered."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import (
    RANDOM_WEIGHTS,
    BundleOf,
    Fixture,
    fixture_named,
    refusal,
    run_program,
    tree_of,
)
from PIL import Image

import mobilevlm
from mobilevlm.bundle import open_bundle, read_manifest
from mobilevlm.cli import main
from mobilevlm.export.graph.weight_file import WeightFile
from mobilevlm.export.workspace.workspace import open_workspace
from mobilevlm.synth.checkpoints import write_checkpoint

Capture = pytest.CaptureFixture[str]

TAKEN_OVER = "unchanged, reused"

HANGS = """\
import sys, time
from mobilevlm.export.graph.weight_file import WeightFile
read = WeightFile.read
def hang(self, name, *shape):
    if name.startswith("decoder.layers.1."):
        print("in the middle", flush=True)
        time.sleep(600)
    return read(self, name, *shape)
WeightFile.read = hang
from mobilevlm.cli import main
main(sys.argv[1:])
"""
"""The program, which stops in the middle of the decoder stage and waits to be killed."""


def kill_midway(*arguments: object) -> None:
    """Runs an export and kills it (SIGKILL) while it writes the decoder."""
    command = [sys.executable, "-c", HANGS, "export", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.kill()
        assert line == "in the middle\n"
        assert process.wait() == -signal.SIGKILL


def work_folder(target: Path) -> Path:
    """The work folder that an interrupted export left."""
    [found] = target.parent.glob(f"{target.name}.partial-*")
    return found


def checked(folder: Path) -> dict[str, bytes]:
    """Every byte of a bundle that is whole."""
    open_bundle(folder)
    return tree_of(folder)


# Interruptions


def test_a_killed_export_leaves_no_bundle_and_the_next_one_goes_on(
    tiny_checkpoint: Path, bundle_of: BundleOf, tmp_path: Path
) -> None:
    target = tmp_path / "bundle"
    expected = checked(bundle_of("tiny", "int4"))  # keeps the answers that it is calibrated with
    kill_midway(tiny_checkpoint, "-o", target, "--no-measure")
    assert not target.exists()
    again = run_program("export", tiny_checkpoint, "-o", target, "--no-measure")
    assert again.returncode == 0, again.stderr
    taken = [line.split()[0] for line in again.stderr.splitlines() if TAKEN_OVER in line]
    assert taken == ["vision", "embeddings"]
    assert checked(target) == expected
    assert list(tmp_path.iterdir()) == [target]


def test_a_killed_export_leaves_the_older_bundle_as_it_was(
    tiny_checkpoint: Path, bundle_of: BundleOf, tmp_path: Path
) -> None:
    target = Path(shutil.copytree(bundle_of("tiny", "int8"), tmp_path / "bundle"))
    before = checked(target)
    kill_midway(tiny_checkpoint, "-o", target, "--no-measure", "--recipe", "fp32")
    assert checked(target) == before
    mobilevlm.export(tiny_checkpoint, target, recipe="fp32", measure=False)
    assert checked(target) == checked(bundle_of("tiny", "fp32"))
    assert list(tmp_path.iterdir()) == [target]


def test_what_an_interrupted_export_took_from_the_older_bundle_is_not_written_through(
    tiny_checkpoint: Path,
    bundle_of: BundleOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stages are reused as hard links: another checkpoint must not be written into them."""
    target = Path(shutil.copytree(bundle_of("tiny", "int4"), tmp_path / "bundle"))
    before = checked(target)
    other = tmp_path / "other"
    write_checkpoint("tiny", other, seed=1)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mobilevlm.export.pipeline.write_manifest", interrupt)
        patch.setattr(
            "mobilevlm.export.workspace.workspace.discard", lambda home: None
        )  # as if killed
        with pytest.raises(KeyboardInterrupt):
            mobilevlm.export(tiny_checkpoint, target, measure=False)
    work = work_folder(target) / "bundle"
    assert (work / "onnx/vision_encoder_int8.onnx_data").stat().st_nlink == 2
    with monkeypatch.context() as patch:
        patch.setattr(WeightFile, "close", interrupt)
        with pytest.raises(KeyboardInterrupt):
            mobilevlm.export(other, target, measure=False)
    assert checked(target) == before


def test_a_leftover_of_a_stage_with_the_wrong_size_is_made_anew(
    tiny_checkpoint: Path, bundle_of: BundleOf, tmp_path: Path, capsys: Capture
) -> None:
    expected = checked(bundle_of("tiny", "int4"))  # keeps the answers that it is calibrated with
    kill_midway(tiny_checkpoint, "-o", tmp_path / "bundle", "--no-measure")
    work = work_folder(tmp_path / "bundle") / "bundle"
    leftover = work / "onnx/vision_encoder_int8.onnx_data"
    os.truncate(leftover, leftover.stat().st_size - 1)
    main(["export", str(tiny_checkpoint), "-o", str(tmp_path / "bundle"), "--no-measure"])
    taken = [x.split()[0] for x in capsys.readouterr().err.splitlines() if TAKEN_OVER in x]
    assert taken == ["embeddings"]
    assert checked(tmp_path / "bundle") == expected


# Same input, same bytes


def test_two_exports_give_the_same_bytes(mobilevlm_v2: Fixture, tmp_path: Path) -> None:
    for name in ("first", "second"):
        mobilevlm.export(
            mobilevlm_v2.checkpoint,
            tmp_path / name,
            vision_tower=mobilevlm_v2.tower,
            limits=RANDOM_WEIGHTS,
        )
    first, second = checked(tmp_path / "first"), checked(tmp_path / "second")
    assert read_manifest(tmp_path / "first")[0].quality.measured
    assert list(first) == list(second)
    assert [name for name in first if first[name] != second[name]] == []


def test_an_unchanged_checkpoint_takes_every_stage_over(
    tiny_checkpoint: Path, bundle_of: BundleOf, tmp_path: Path, capsys: Capture
) -> None:
    target = Path(shutil.copytree(bundle_of("tiny", "int4"), tmp_path / "bundle"))
    before = checked(target)
    main(["export", str(tiny_checkpoint), "-o", str(target), "--no-measure"])
    taken = [x.split()[0] for x in capsys.readouterr().err.splitlines() if TAKEN_OVER in x]
    assert taken == ["vision", "embeddings", "decoder"]
    assert checked(target) == before


def test_another_recipe_takes_over_what_it_shares_and_a_changed_weight_nothing(
    tiny_checkpoint: Path, bundle_of: BundleOf, tmp_path: Path, capsys: Capture
) -> None:
    target = Path(shutil.copytree(bundle_of("tiny", "int4"), tmp_path / "bundle"))
    export = ["export", "-o", str(target), "--no-measure"]
    main([*export, str(tiny_checkpoint), "--recipe", "int8"])
    taken = [x.split()[0] for x in capsys.readouterr().err.splitlines() if TAKEN_OVER in x]
    assert taken == ["vision", "embeddings"]
    assert checked(target) == checked(bundle_of("tiny", "int8"))
    other = Path(shutil.copytree(tiny_checkpoint, tmp_path / "other"))
    for weights in other.rglob("*.safetensors"):
        content = bytearray(weights.read_bytes())
        content[-2] ^= 1  # the last bit of the last float16
        weights.write_bytes(content)
    main([*export, str(other), "--recipe", "int8"])
    assert TAKEN_OVER not in capsys.readouterr().err


def test_a_stage_that_the_older_bundle_lacks_is_made_anew(
    tiny_checkpoint: Path, bundle_of: BundleOf, tmp_path: Path, capsys: Capture
) -> None:
    target = Path(shutil.copytree(bundle_of("tiny", "int4"), tmp_path / "bundle"))
    (target / "onnx/decoder_model_merged_q4.onnx_data").unlink()
    main(["export", str(tiny_checkpoint), "-o", str(target), "--no-measure"])
    taken = [x.split()[0] for x in capsys.readouterr().err.splitlines() if TAKEN_OVER in x]
    assert taken == ["vision", "embeddings"]
    assert checked(target) == checked(bundle_of("tiny", "int4"))


# Something in the way


def test_a_file_as_target_is_refused_and_stays(
    tiny_checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    target = tmp_path / "bundle"
    target.write_text("mine")
    message = refusal(capsys, "export", tiny_checkpoint, "-o", target)
    assert f"{target}: a file is in the way" in message
    assert tree_of(tmp_path) == {"bundle": b"mine"}


@pytest.mark.parametrize("name", ["notes.txt", "manifest.json"])
def test_a_folder_of_something_else_is_refused_and_stays(
    name: str, tiny_checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Web pages and browser extensions have a manifest.json too."""
    target = tmp_path / "folder"
    target.mkdir()
    (target / name).write_text('{"manifest_version": 3}')
    message = refusal(capsys, "export", tiny_checkpoint, "-o", target)
    assert f"{target}: the folder is not empty and not a bundle" in message
    assert tree_of(tmp_path) == {f"folder/{name}": b'{"manifest_version": 3}'}


def test_the_checkpoint_itself_is_not_overwritten(tmp_path: Path, capsys: Capture) -> None:
    write_checkpoint("tiny", tmp_path / "checkpoint")
    before = tree_of(tmp_path)
    refusal(capsys, "export", tmp_path / "checkpoint", "-o", tmp_path / "checkpoint")
    assert tree_of(tmp_path) == before


def test_a_target_below_a_file_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "file").write_text("")
    message = refusal(capsys, "export", tiny_checkpoint, "-o", tmp_path / "file" / "bundle")
    assert str(tmp_path / "file") in message


def test_an_empty_folder_is_replaced(
    tiny_checkpoint: Path, bundle_of: BundleOf, tmp_path: Path
) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    mobilevlm.export(tiny_checkpoint, target, measure=False)
    assert checked(target) == checked(bundle_of("tiny", "int4"))
    assert list(tmp_path.iterdir()) == [target]


def test_a_link_to_a_folder_stays_a_link(
    tiny_checkpoint: Path, bundle_of: BundleOf, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    real = Path(shutil.copytree(bundle_of("tiny", "int8"), tmp_path / "disk" / "bundle"))
    link = tmp_path / "bundle"
    link.symlink_to(real)
    mobilevlm.export(tiny_checkpoint, link, measure=False)
    assert link.is_symlink() and link.samefile(real)
    assert checked(link) == checked(bundle_of("tiny", "int4"))
    assert list((tmp_path / "disk").iterdir()) == [real]


# Disk full


@pytest.mark.parametrize(
    "place",
    [
        "mobilevlm.export.graph.weight_file.WeightFile.parameter",
        "mobilevlm.export.graph.author.ir.save",
        "mobilevlm.export.pipeline.note_finished",
        "mobilevlm.export.pipeline.write_manifest",
        "mobilevlm.export.pipeline.replace_target",
    ],
)
def test_a_full_disk_leaves_no_bundle_and_the_export_can_go_on(
    place: str,
    tiny_checkpoint: Path,
    bundle_of: BundleOf,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = tmp_path / "bundle"
    arguments = ("export", tiny_checkpoint, "-o", target, "--no-measure", "--quiet")
    with monkeypatch.context() as patch:
        patch.setattr(place, full)
        message = refusal(capsys, *arguments)
    assert "no space left on the disk: free some and run the same command again" in message
    assert not target.exists()
    main([str(argument) for argument in arguments])
    assert checked(target) == checked(bundle_of("tiny", "int4"))


def test_a_write_that_the_system_cuts_short_leaves_no_bundle(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """A real failing write: files may not grow beyond 64 KiB, the decoder takes 280."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))

    target = tmp_path / "bundle"
    arguments = ["export", str(tiny_checkpoint), "-o", str(target), "--no-measure", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-m", "mobilevlm", *arguments],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("mobilevlm: error: ") and done.stderr.count("\n") == 1
    assert "File too large" in done.stderr
    assert not target.exists()


# Limits


@pytest.mark.parametrize(
    ("limits", "stage", "figure"),
    [
        ("vision_relative_error = 1e-6\ndecoder_kl = 9", "vision", "relative_error"),
        ("vision_relative_error = 9\ndecoder_kl = 1e-6", "decoder", "kl"),
        ("vision_relative_error = 9\ndecoder_kl = nan", "decoder", "kl"),
    ],
)
def test_a_missed_limit_names_stage_figure_and_limit_and_leaves_no_bundle(
    limits: str, stage: str, figure: str, tiny_checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    recipe = tmp_path / "strict.toml"
    recipe.write_text(
        'tower = "int8"\nprojector = "int8"\ndecoder = "q4"\nlm_head = "q4"\nembeddings = "fp16"\n'
        f"[limits]\n{limits}"
    )
    target = tmp_path / "bundle"
    message = refusal(
        capsys, "export", tiny_checkpoint, "-o", target, "--recipe", recipe, "--quiet", code=1
    )
    allowed = "nan" if "nan" in limits else "1e-06"
    assert f"quality of recipe 'strict': {stage} {figure} is " in message
    assert f"the limit is {allowed}:" in message
    assert not target.exists()


def test_a_missed_limit_keeps_the_older_bundle(
    tiny_checkpoint: Path, bundle_of: BundleOf, tmp_path: Path, capsys: Capture
) -> None:
    target = Path(shutil.copytree(bundle_of("tiny", "int8"), tmp_path / "bundle"))
    before = checked(target)
    recipe = tmp_path / "strict.toml"
    recipe.write_text(
        'tower = "int8"\nprojector = "int8"\ndecoder = "q4"\nlm_head = "q4"\nembeddings = "fp16"\n'
        "limits = {vision_relative_error = 9, decoder_kl = 0}"
    )
    refusal(capsys, "export", tiny_checkpoint, "-o", target, "--recipe", recipe, "--quiet", code=1)
    assert checked(target) == before


# Without torch


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str]:
    """An environment in which torch cannot be imported."""
    return without_package("torch", tmp_path)


def without_package(package: str, tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / f"no_{package}"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] == {package!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
    )
    return {"PYTHONPATH": str(folder)}


def test_verify_without_torch_says_what_to_install(without_torch: dict[str, str]) -> None:
    done = run_program("verify", "nano", "nano", environment=without_torch)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "pip install 'mobilevlm-edge[reference]'" in done.stderr


def test_a_safetensors_checkpoint_exports_without_torch(
    llava_v1: Fixture, without_torch: dict[str, str], tmp_path: Path
) -> None:
    said, recipe = {}, tmp_path / "random.toml"
    recipe.write_text(f'extends = "int4"\n[limits]\ndecoder_kl = {RANDOM_WEIGHTS["decoder_kl"]}')
    for name, environment in (("without", without_torch), ("with", {})):
        done = run_program(
            "export", llava_v1.checkpoint, "-o", tmp_path / name, "--recipe", recipe,
            "--vision-tower", llava_v1.tower, environment=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said[name] = done.stderr
    assert "not measured (torch is not installed" in said["without"]
    assert "not measured" not in said["with"]
    without, complete = (read_manifest(tmp_path / name)[0] for name in said)
    assert not without.quality.measured and "torch is not installed" in without.quality.note
    assert complete.quality.measured
    assert without.files == complete.files


@pytest.mark.parametrize(
    "options", [("imatrix",), ("export", "--format", "gguf", "--gguf-type", "q4_0")]
)
@pytest.mark.parametrize("package", ["onnxscript", "gguf"])
def test_an_importance_matrix_without_what_collects_it_says_what_to_install(
    options: tuple[str, ...], package: str, tmp_path: Path
) -> None:
    command, *rest = options
    done = run_program(
        command, "nano", "-o", tmp_path / "made.gguf", "--calibration", "scenes", *rest,
        environment=without_package(package, tmp_path),
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"needs the package {package!r}: pip install 'mobilevlm-edge[export]'" in done.stderr
    assert "this command" not in done.stderr  # as in Python, where the command line adds nothing


def test_a_calibrated_decoder_and_an_importance_matrix_need_no_torch(
    without_torch: dict[str, str], tmp_path: Path
) -> None:
    recipe = tmp_path / "gptq.toml"
    recipe.write_text(
        'extends = "int4"\ncalibration = "scenes"\nlm_head = "q8"\n'
        'decoder = { precision = "q4", quantizer = "gptq", scaling = "rotation" }\n'
    )
    bundle, matrix = tmp_path / "bundle", tmp_path / "matrix.gguf"
    for given in (
        ("export", "nano", "-o", bundle, "--recipe", recipe),
        ("imatrix", "nano", "-o", matrix, "--calibration", "scenes"),
    ):
        done = run_program(*given, environment=without_torch)
        assert done.returncode == 0, done.stderr
    assert open_bundle(bundle).manifest.recipe.decoder.quantizer == "gptq" and matrix.exists()


def test_a_pickled_checkpoint_says_that_it_needs_torch(
    mobilevlm_v2: Fixture, without_torch: dict[str, str], tmp_path: Path
) -> None:
    done = run_program(
        "export", mobilevlm_v2.checkpoint, "-o", tmp_path / "bundle",
        "--vision-tower", mobilevlm_v2.tower, environment=without_torch,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "needs the package 'torch': pip install 'mobilevlm-edge[reference]'" in done.stderr
    assert not (tmp_path / "bundle").exists()


# Wrong options


def test_an_unknown_recipe_is_named(tiny_checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    message = refusal(capsys, "export", tiny_checkpoint, "-o", tmp_path / "b", "--recipe", "int3")
    assert "recipe 'int3' is not known" in message
    assert list(tmp_path.iterdir()) == []


def test_no_checkpoint_there(tmp_path: Path, capsys: Capture) -> None:
    message = refusal(capsys, "export", tmp_path / "none", "-o", tmp_path / "b")
    assert f"{tmp_path / 'none'}: no such checkpoint folder" in message
    assert list(tmp_path.iterdir()) == []


# Questions that cannot be answered


@pytest.fixture
def bundle(bundle_of: BundleOf) -> Path:
    return bundle_of("tiny", "int4")


PICTURE = fixture_named("llava_v1").image


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "the prompt is empty: ask a question"),
        (["--prompt", " \n"], "the prompt is empty"),
        (["--prompt", "", "--image", PICTURE], "the prompt is empty"),
        (["--prompt", "a" + " a" * 2048], "the context holds 2048 with the answer: shorten it"),
        (["--prompt", "<image>" * 15, *["--image", PICTURE] * 15], "144 for each image"),
        (["--prompt", "<image>?"], "has 1 <image> mark, but no image was given"),
        (
            ["--prompt", "<image><image>", "--image", PICTURE],
            "has 2 <image> marks, but one image was",
        ),
        (
            ["--prompt", "<image>", *["--image", PICTURE] * 2],
            "has 1 <image> mark, but 2 images were",
        ),
        (["--prompt", "a", "--raw", "--image", PICTURE], "has 0 <image> marks, but one image was"),
        (["--prompt", "a", "--image", "none.png"], "none.png: no such image file"),
        (["--prompt", "a", "--image", "."], ".: not a regular file"),
        (["--prompt", "a", "--image", ""], "not a regular file"),
        (["--prompt", "a", "--image", __file__], "not an image in a format that is read"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1.0, expected 0 or more"),
        (["--prompt", "a", "--top-p", "0"], "top_p is 0.0, expected above 0, at most 1"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens is 0, expected 1 or more"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
def test_a_question_that_cannot_be_answered_gets_one_line(
    arguments: list[object], message: str, form: list[str], bundle: Path, capsys: Capture
) -> None:
    assert message in refusal(capsys, "run", bundle, *arguments, *form)


def test_a_corrupt_picture_is_named(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    picture = tmp_path / "cut.png"
    picture.write_bytes(PICTURE.read_bytes()[:2000])
    message = refusal(capsys, "run", bundle, "--prompt", "a", "--image", picture)
    assert f"{picture}: damaged PNG image" in message


@pytest.mark.parametrize("size", [(1, 1), (8000, 6000), (1, 3000)], ids=str)
def test_pictures_of_any_size_are_answered(
    size: tuple[int, int], bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    Image.new("L", size, 200).save(tmp_path / "picture.png")
    picture = str(tmp_path / "picture.png")
    main(["run", str(bundle), "--prompt", "a", "--image", picture, "--max-new-tokens", "2"])
    assert "prefill" in capsys.readouterr().err


def test_bytes_in_the_prompt_that_are_no_text_are_named(bundle: Path) -> None:
    command = [sys.executable, "-m", "mobilevlm", "run", str(bundle), "--prompt"]
    done = subprocess.run([*command, b"a\xff"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("mobilevlm: error: the prompt has '\\udcff' at character ")
    assert done.stderr.count("\n") == 1


def test_with_debug_the_traceback_is_shown_too(bundle: Path, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--debug", "run", str(bundle), "--prompt", ""])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback (most recent call last):")
    assert printed.endswith("mobilevlm: error: the prompt is empty: ask a question\n")


def test_a_bug_of_ours_stays_loud(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobilevlm.runtime.sequence.prompts.render", lambda *_: np.zeros(3)[7])
    with pytest.raises(IndexError):
        main(["run", str(bundle), "--prompt", "a"])


def test_two_exports_to_one_target_do_not_mix(tiny_checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with (
        open_workspace(target),
        pytest.raises(mobilevlm.MobileVLMError, match="another export is working here"),
    ):
        mobilevlm.export(tiny_checkpoint, target, measure=False)
    mobilevlm.export(tiny_checkpoint, target, measure=False)
    assert checked(target)

"""Names that are not UTF-8, standard streams that are closed or close early, folders that cannot be
written: every verb does its work, or says why in one line."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from os import PathLike
from pathlib import Path

import pytest
from conftest import BundleOf, fixture_named, refusal, run_program

import mobilevlm
from mobilevlm.runtime.machine import installed_extras

FIXTURE = fixture_named("llava_v1")
QUESTION = ("--prompt", "Who?", "--max-new-tokens", "2")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="names are UTF-8 elsewhere")


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose name is not UTF-8, with a checkpoint, a bundle of it and an image."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path_factory.mktemp("odd")) + b"/\xff\xfe"))
    shutil.copytree(FIXTURE.checkpoint, folder / "checkpoint")
    shutil.copytree(FIXTURE.tower, folder / "tower")
    shutil.copy(FIXTURE.image, folder / os.fsdecode(b"image\xff.png"))
    done = program(
        "export", folder / "checkpoint", "--vision-tower", folder / "tower", "-o",
        folder / "bundle", "--recipe", "int8", "--no-measure", "--quiet", "--format", "all",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return folder


def program(
    *arguments: str | bytes | PathLike[str], shell: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run the program, by a shell where ``shell`` says what goes behind its arguments."""
    command: list[str | bytes] = [sys.executable, "-m", "mobilevlm"]
    command += [part if isinstance(part, str) else os.fsencode(part) for part in arguments]
    if shell:
        line = f"{shlex.join(os.fsdecode(part) for part in command)} {shell}"
        command = ["bash", "-c", os.fsencode(line)]
    done = subprocess.run(command, capture_output=True, timeout=200, stdin=subprocess.DEVNULL)
    return subprocess.CompletedProcess(
        command, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


ENGINES = ["onnx", *([] if installed_extras()["gguf"] else ["gguf", "hybrid", "ggml"])]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_bundle_and_an_image_with_names_that_are_not_utf8_run(engine: str, odd: Path) -> None:
    image = odd / os.fsdecode(b"image\xff.png")
    done = program("run", odd / "bundle", "--engine", engine, *QUESTION, "--image", image)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    with mobilevlm.load(odd / "bundle", engine) as vlm:
        found = vlm.generate("Who?", [image], max_new_tokens=2)
    assert done.stdout.strip() == found.text.strip()


@pytest.mark.parametrize(
    "verb",
    [
        ("inspect", "bundle"),
        ("inspect", "bundle", "--json"),
        ("inspect", "checkpoint", "--vision-tower", "tower"),
        ("chat", "bundle"),
        ("bench", "bundle", "--runs", "1", "--new-tokens", "2", "--engine", "onnx"),
        ("tune", "bundle", "--budget", "1s", "--engine", "onnx"),
        ("synth", "tiny", "-o", "new"),
    ],
    ids=lambda verb: " ".join(verb[:3]),
)
def test_every_verb_takes_names_that_are_not_utf8(verb: tuple[str, ...], odd: Path) -> None:
    paths = ("bundle", "checkpoint", "tower", "new")
    done = program(*(odd / word if word in paths else word for word in verb))
    assert done.returncode == 0, done.stderr
    done.stdout.encode()


# Streams


@pytest.fixture(scope="module")
def bundle(bundle_of: BundleOf) -> Path:
    return bundle_of("llava_v1", "fp32")


CLOSED = ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"]


@pytest.mark.parametrize("closed", CLOSED)
@pytest.mark.parametrize(
    "verb",
    [
        ("run", "BUNDLE", *QUESTION),
        ("chat", "BUNDLE"),
        ("inspect", "BUNDLE"),
        ("bench", "BUNDLE", "--runs", "1", "--new-tokens", "2"),
        ("doctor",),
        ("targets",),
        ("--help",),
    ],
    ids=lambda verb: verb[0],
)
def test_a_closed_stream_stops_no_verb(verb: tuple[str, ...], closed: str, bundle: Path) -> None:
    done = program(*(bundle if word == "BUNDLE" else word for word in verb), shell=closed)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert bool(done.stdout) == (">&-" not in closed.replace("2>&-", "") and verb[0] != "chat")


def test_an_export_writes_the_same_files_with_all_streams_closed(tmp_path: Path) -> None:
    arguments = (
        "export", FIXTURE.checkpoint, "--vision-tower", FIXTURE.tower, "--recipe", "fp32",
        "--no-measure",
    )  # fmt: skip
    for name, closed in (("open", ""), ("closed", "<&- >&- 2>&-")):
        assert program(*arguments, "-o", tmp_path / name, shell=closed).returncode == 0
    assert [(tmp_path / name / "manifest.json").read_bytes() for name in ("open", "closed")] == [
        (tmp_path / "open" / "manifest.json").read_bytes()
    ] * 2


def test_an_image_from_a_closed_stdin_is_refused_in_one_line(bundle: Path) -> None:
    done = program("run", bundle, *QUESTION, "--image", "-", shell="<&-")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mobilevlm: error: --image -: standard input is empty")
    assert done.stderr.count("\n") == 1


def test_an_error_with_stderr_closed_does_not_go_to_stdout(tmp_path: Path) -> None:
    for arguments in (("run", tmp_path, *QUESTION), ("run",)):
        done = program(*arguments, shell="2>&-")
        assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize("pipe", ["| true", "2>&1 | true"])
@pytest.mark.parametrize("verb", ["run", "inspect", "doctor", "targets"])
def test_a_reader_that_goes_away_is_no_error(verb: str, pipe: str, bundle: Path) -> None:
    rest = {"run": (bundle, *QUESTION), "inspect": (bundle, "--json")}.get(verb, ())
    done = program(verb, *rest, shell=f"{pipe}; exit ${{PIPESTATUS[0]}}")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


def test_text_in_utf8_is_read_where_the_locale_is_another(bundle: Path) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    asked = ("--prompt", "Größe?", "--stop", "日", "--max-new-tokens", "2")
    usual, found = (run_program("run", bundle, *asked, environment=names) for names in ({}, plain))
    assert (found.returncode, found.stdout) == (0, usual.stdout.encode("ascii", "replace").decode())
    talk = run_program(
        "chat", bundle, "--max-new-tokens", 2, stdin="Größe?\n".encode(), environment=plain
    )
    assert talk.returncode == 0 and "error" not in talk.stderr
    odd = ("--prompt", os.fsdecode(b"\xff"))
    assert "UTF-8" in run_program("run", bundle, *odd, environment=plain).stderr


# Folders


def test_tune_says_that_a_bundle_is_read_only_before_it_measures(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(
        "mobilevlm.runtime.tuning.tune.tune", lambda *_, **__: pytest.fail("measures")
    )
    said = refusal(capsys, "tune", bundle)
    assert "plan.json cannot be written there (Read-only file system): tune a copy" in said


def test_a_read_only_file_system_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path))

    monkeypatch.setattr(os, "mkdir", refuse)
    said = refusal(capsys, "synth", "tiny", "-o", tmp_path / "new")
    assert "on a read-only file system: give a place that can be written" in said


@pytest.mark.parametrize("cache", ["/proc/none", "/dev/null", ""])
def test_a_bundle_runs_without_home_and_without_a_cache_folder(
    cache: str, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    monkeypatch.setenv("HOME", "/proc/none")
    done = program("run", bundle, *QUESTION)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr

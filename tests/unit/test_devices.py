"""Addresses of devices, and the conversation with one: a shell of this machine."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import pytest
from adb_server import adb_server
from conftest import BundleOf, refusal, tree_of
from devices import LocalDevice

from mobilevlm.cli.bench import command as bench_command
from mobilevlm.errors import DeviceError
from mobilevlm.runtime.bench.devices import agent, measuring, open_device, quote_command
from mobilevlm.runtime.bench.devices import conversation as session
from mobilevlm.runtime.bench.devices.adb import AdbDevice, server_address
from mobilevlm.runtime.bench.devices.conversation import DeviceSession, SentFile, sent_file
from mobilevlm.runtime.bench.devices.ssh import SshDevice, parse_address

# Addresses


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ssh://pi", ("pi", None, None)),
        ("ssh://pi/", ("pi", None, None)),
        ("ssh://me@board-1.local:2222", ("board-1.local", "me", 2222)),
        ("ssh://a.b-c+d@10.0.0.7", ("10.0.0.7", "a.b-c+d", None)),
        ("ssh://[fe80::1%eth0]:22", ("fe80::1%eth0", None, 22)),
    ],
)
def test_an_address_has_host_user_and_port(
    text: str, expected: tuple[str, str | None, int | None]
) -> None:
    device = parse_address(text)
    assert (device.host, device.user, device.port) == expected
    assert device.folders == ("~/.cache/mobilevlm/device",) and device.name == text


def test_an_address_may_end_with_a_folder() -> None:
    assert parse_address("ssh://pi:22/data/my%20files/").folders == ("/data/my files",)


@pytest.mark.parametrize(
    "text",
    ["ssh://", "ssh://-oProxyCommand=touch%20x", "ssh://-l", "ssh://me@-v", "ssh://-l@pi",
     "ssh://pi:0", "ssh://pi:70000", "ssh://pi:2a", "ssh://pi:", "ssh://p i", "ssh://pi\n-v",
     "ssh://@pi", "ssh://a@b@pi", "ssh://pi?x", "ssh://pi#x", "ssh://$(id)", "ssh://pi;id",
     "ssh://fe80::1", "http://pi", "pi", "adbx", "ssh:pi"],
)  # fmt: skip
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(DeviceError, match="expected"):
        open_device(text)


def test_a_password_is_neither_taken_nor_shown() -> None:
    with pytest.raises(DeviceError, match="no passwords here") as error:
        open_device("ssh://me:secret@pi")
    assert "secret" not in str(error.value)


def test_the_client_gets_the_host_behind_a_double_dash_and_never_loose_host_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MOBILEVLM_SSH", raising=False)
    client = SshDevice("x", "pi", "me", 2222).client
    assert client[0] == "ssh" and client[-6:] == ["-p", "2222", "-l", "me", "--", "pi"]
    assert {"BatchMode=yes", "StrictHostKeyChecking=yes", "ForwardAgent=no"} <= set(client)
    monkeypatch.setenv("MOBILEVLM_SSH", "ssh -F '/a b/config'")
    assert SshDevice("x", "pi").client[:3] == ["ssh", "-F", "/a b/config"]


def test_a_python_command_is_quoted_for_the_shell() -> None:
    assert quote_command("taskset -c 4-7 '/my python3'", "o") == "taskset -c 4-7 '/my python3'"
    assert quote_command("python3;id", "o") == "'python3;id'"
    assert quote_command("~/v env/python", "o") == "~/v env/python"
    assert quote_command("'~/v env/python'", "o") == "~/'v env/python'"
    for text in ("", "'a"):
        with pytest.raises(DeviceError, match="--device-python"):
            quote_command(text, "--device-python")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("ADB_SERVER_SOCKET", "tcp:5038", ("127.0.0.1", 5038)),
        ("ADB_SERVER_SOCKET", "tcp:localhost:5039", ("localhost", 5039)),
        ("ADB_SERVER_SOCKET", "localfilesystem:/run/adb", "/run/adb"),
        ("ANDROID_ADB_SERVER_PORT", "5040", ("127.0.0.1", 5040)),
        ("ANDROID_ADB_SERVER_ADDRESS", "127.0.0.2", ("127.0.0.2", 5037)),
        ("UNRELATED", "x", ("127.0.0.1", 5037)),
    ],
)
def test_the_adb_server_is_found_as_adb_finds_it(
    name: str, value: str, expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    for known in ("ADB_SERVER_SOCKET", "ANDROID_ADB_SERVER_PORT", "ANDROID_ADB_SERVER_ADDRESS"):
        monkeypatch.delenv(known, raising=False)
    monkeypatch.setenv(name, value)
    assert server_address()[1] == expected


def test_an_adb_device_is_chosen_by_its_serial_number_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = {"emulator-5554": "device", "10.0.0.7:5555": "device", "R58": "unauthorized"}
    with adb_server(tmp_path, **states) as server:
        monkeypatch.setenv("ADB_SERVER_SOCKET", f"tcp:127.0.0.1:{server.port}")
        assert open_device("adb:10.0.0.7:5555") == AdbDevice("adb:10.0.0.7:5555", "10.0.0.7:5555")
        known = re.escape("emulator-5554 (device), 10.0.0.7:5555 (device), R58 (unauthorized)")
        for name, problem in (("adb", "which one"), ("adb:", "which one"), ("adb:R5", "no such")):
            with pytest.raises(DeviceError, match=f"{problem}.*{known}"):
                open_device(name)
        with pytest.raises(DeviceError, match="R58 is unauthorized: unlock it"):
            open_device("adb:R58")
        server.states = {"emulator-5554": "device"}
        assert open_device("adb") == AdbDevice("adb:emulator-5554", "emulator-5554")
        server.features = "cmd"
        with pytest.raises(DeviceError, match="Android is too old"):
            open_device("adb").start("true")
        server.states = {}
        with pytest.raises(DeviceError, match="no device is connected"):
            open_device("adb")
        assert set(server.requests) == {"host:devices", "host-serial:emulator-5554:features"}


# What is copied


def test_what_is_copied_runs_bundles_and_nothing_else() -> None:
    names = dict(measuring.runtime_files())
    assert {"mobilevlm/__init__.py", "mobilevlm/cli/bench.py", "mobilevlm/runtime/vlm.py",
            "mobilevlm/runtime/engines/onnx/engine.py"} <= names.keys()  # fmt: skip
    folders = {tuple(name.split("/")[:2]) for name in names}
    assert not folders & {("mobilevlm", part) for part in ("export", "reference", "nano", "synth")}
    assert not any(name.startswith("mobilevlm/runtime/suites/") for name in names)
    assert sum(file.size for file in names.values()) < 2e6


def test_requirements_are_those_of_the_base_install() -> None:
    found = measuring.requirements()
    assert found.keys() == {
        "click", "jinja2", "numpy", "onnxruntime", "pillow", "rich", "tokenizers",
    }  # fmt: skip
    assert found["pillow"] == ("PIL", "11.0")
    stated = importlib.metadata.requires("mobilevlm-edge") or []
    assert f"numpy>={found['numpy'][1]}" in stated


def test_every_option_of_bench_reaches_the_device_or_stays_here_on_purpose() -> None:
    """The command passes on each by name: a new one must be added there and here."""
    passed = {"engine", "text_tokens", "new_tokens", "draft_tokens", "codes", "runs", "threads",
              "plan", "max_resident_mb", "max_memory_mb", "no_image", "bundle", "mmproj",
              "image", "max_tiles", "no_tiles", "max_image_tokens", "image_tokens"}  # fmt: skip
    here = {"form", "as_json", "show_plan_only", "device", "device_python", "device_folder"}
    assert {parameter.name for parameter in bench_command.params} == passed | here


def test_the_options_arrive_as_they_were_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []

    def record(name: str, model: Path, options: Sequence[str], **more: object) -> None:
        seen.extend(options)
        raise DeviceError("seen")

    monkeypatch.setattr(measuring, "bench_on_device", record)
    given = ["--engine=ggml", "--text-tokens=9", "--new-tokens=5", "--draft-tokens=2", "--runs=3",
             "--threads=1", "--max-resident=1.5GB", "--no-plan", "--no-image",
             "--max-tiles=3", "--max-image-tokens=64", "--image-tokens=9"]  # fmt: skip
    refusal(capsys, "bench", tmp_path, "--device", "ssh://pi", *given)
    again = bench_command.make_context("bench", [str(tmp_path), *seen]).params
    assert again == bench_command.make_context("bench", [str(tmp_path), *given]).params
    assert isinstance(bench_command, click.Command) and again["max_resident_mb"] == 1500


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device-folder", "/tmp"], "belong to --device"),
        (["--device-python", "python3"], "belong to --device"),
        (["--device", "ssh://pi", "--plan"], "--plan shows"),
        (["--device", "ssh://-x"], "expected ssh://"),
        (["--device", "ssh://pi", "--device-folder", "here"], "begins with / or ~"),
        (["--device", "ssh://pi", "--device-python", "'"], "--device-python"),
    ],
)
def test_wrong_usage_gives_one_line_and_no_connection(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setenv("MOBILEVLM_SSH", "/bin/false")
    assert message in refusal(capsys, "bench", "nano", *options)


# The conversation


def file_of(path: Path, content: bytes) -> SentFile:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return sent_file(path)


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """The folder on the device."""
    return tmp_path / "on the device"


@pytest.fixture
def connected(there: Path) -> Iterator[DeviceSession]:
    with DeviceSession(LocalDevice((str(there),)), {}) as found:
        yield found


def content(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree_of(folder).items() if name != agent.RECEIVED}


def test_only_what_changed_is_copied(connected: DeviceSession, there: Path, tmp_path: Path) -> None:
    files = {
        name: file_of(tmp_path / "mine" / name, text)
        for name, text in (("a", b"1" * 3_000_000), ("sub dir/b ü'\"", b"2"), ("empty", b""))
    }
    assert connected.missing("x", files) == list(files)
    connected.send(list(files.values()))
    assert content(there / "x") == content(tmp_path / "mine")
    before = (there / "x" / "a").stat()
    files["empty"] = file_of(tmp_path / "mine" / "empty", b"now")
    assert connected.missing("x", files) == ["empty"]
    connected.send([files["empty"]])
    assert content(there / "x") == content(tmp_path / "mine")
    assert (there / "x" / "a").stat() == before
    assert connected.missing("x", files) == []
    connected.send([])


def test_a_file_that_was_changed_there_is_copied_again(
    connected: DeviceSession, there: Path, tmp_path: Path
) -> None:
    files = {"a": file_of(tmp_path / "a", b"right")}
    connected.missing("x", files)
    connected.send(list(files.values()))
    os.utime(there / "x" / "a", (1, 1))  # touched only: it is hashed, and stays
    assert connected.missing("x", files) == []
    connected.send([])
    (there / "x" / "a").write_bytes(b"wrong")  # of the same size
    assert connected.missing("x", files) == ["a"]
    connected.send(list(files.values()))
    assert (there / "x" / "a").read_bytes() == b"right"


def test_files_that_are_no_longer_listed_go_but_only_those_that_came_from_here(
    connected: DeviceSession, there: Path, tmp_path: Path
) -> None:
    (there / "x").mkdir()
    (there / "x" / "own").write_bytes(b"of the device")
    files = {name: file_of(tmp_path / name, name.encode()) for name in ("a", "b")}
    connected.missing("x", files)
    connected.send(list(files.values()))
    assert connected.missing("x", {"b": files["b"]}) == []
    connected.send([])
    assert content(there / "x") == {"b": b"b", "own": b"of the device"}


@pytest.mark.parametrize("name", ["../a", "/tmp/a", "b/../../a"])
def test_a_name_that_leaves_the_folder_is_refused(
    connected: DeviceSession, name: str, tmp_path: Path
) -> None:
    with pytest.raises(DeviceError, match=r"here: .*leaves the folder"):
        connected.missing("x", {name: file_of(tmp_path / "mine", b"1")})


def test_a_file_that_changes_while_it_is_copied_is_refused(
    connected: DeviceSession, there: Path, tmp_path: Path
) -> None:
    file = file_of(tmp_path / "a", b"before")
    connected.missing("x", {"a": file})
    (tmp_path / "a").write_bytes(b"behind")
    with pytest.raises(DeviceError, match="sha256 mismatch"):
        connected.send([file])
    assert content(there / "x") == {}


def test_an_interrupted_copy_leaves_nothing_that_looks_whole(there: Path, tmp_path: Path) -> None:
    files = {"a": file_of(tmp_path / "a", b"done"), "b": file_of(tmp_path / "b", b"x" * 4_000_000)}
    with DeviceSession(LocalDevice((str(there),)), {}) as first:
        first.missing("x", files)
        first._command.send(b"done" + b"x" * 1_500_000)
    deadline = time.monotonic() + 20
    while content(there / "x") != {"a": b"done"} and time.monotonic() < deadline:
        time.sleep(0.05)
    assert content(there / "x") == {"a": b"done"}
    (there / "x" / ".b.part").write_bytes(b"left by a lost power supply")
    with DeviceSession(LocalDevice((str(there),)), {}) as second:
        assert second.missing("x", files) == ["b"]
        second.send([files["b"]])
    assert content(there / "x") == {"a": b"done", "b": b"x" * 4_000_000}


def test_two_sessions_at_a_time_are_refused(connected: DeviceSession, there: Path) -> None:
    with pytest.raises(DeviceError, match="another measurement runs there"):
        DeviceSession(LocalDevice((str(there),)), {})


def test_more_than_fits_is_refused_before_it_is_sent(
    connected: DeviceSession, tmp_path: Path
) -> None:
    huge = SentFile(tmp_path / "never read", 1 << 60, "0" * 64)
    with pytest.raises(DeviceError, match=r"MB to copy, \d+ MB free: free some space there"):
        connected.missing("x", {"a": huge})


def test_the_first_folder_that_can_be_written_to_is_taken(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    bad, good = str(tmp_path / "file" / "x"), str(tmp_path / "good")
    with DeviceSession(LocalDevice((bad, good)), {}) as found:
        assert found.base == good
    with pytest.raises(DeviceError, match=r"no folder to write to \(.*file/x: Not a directory"):
        DeviceSession(LocalDevice((bad,)), {})
    with DeviceSession(LocalDevice((bad,)), {}, folders=[good]) as found:
        assert found.base == good


def test_missing_and_old_packages_are_named_with_the_remedy(there: Path) -> None:
    packages = {"numpy": ("numpy", "1.0"), "rich": ("rich", "99"), "pillow": ("no_such", "1")}
    with pytest.raises(DeviceError) as error:
        DeviceSession(LocalDevice((str(there),)), packages)
    assert str(error.value).endswith(f"{sys.executable} -m pip install 'rich>=99' 'pillow>=1'")


@pytest.mark.parametrize(
    ("version", "least", "older"),
    [("1.26.4", "1.26", False), ("1.26", "1.26.0", False), ("1.9", "1.26", True),
     ("2.0.0rc1", "2", False), ("13.9", "13", False), ("3.0+local.9", "3.1", True)],
)  # fmt: skip
def test_versions_are_compared_by_their_numbers(version: str, least: str, older: bool) -> None:
    assert agent._is_older(version, least) is older


def test_noise_of_the_login_shell_does_not_disturb(there: Path) -> None:
    device = LocalDevice((str(there),), before="echo Welcome; echo 'mobile'; printf '\\377\\n> ';")
    with DeviceSession(device, {}) as found:
        assert found.base == str(there)


def test_pythons_are_tried_in_turn(there: Path) -> None:
    device = LocalDevice((str(there),), pythons=("/no/python3", sys.executable))
    with DeviceSession(device, {}) as found:
        assert found.base == str(there)
    with pytest.raises(DeviceError, match=r"tried /no/python3, no-python\): .*--device-python"):
        DeviceSession(device, {}, pythons=["/no/python3", "no-python"])


def test_an_old_python_is_named(there: Path, tmp_path: Path) -> None:
    old = tmp_path / "python"
    pretended = "import sys; sys.version_info = (3, 9); sys.version = '3.9.2 (x)'"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{pretended}; $2"\n')
    old.chmod(0o755)
    with pytest.raises(DeviceError, match=r"Python 3.11 or newer is needed, not 3.9.2"):
        DeviceSession(LocalDevice((str(there),), pythons=(str(old),)), {})


def test_a_device_that_falls_silent_is_given_up(
    there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "SILENCE_SECONDS", 0.3)
    device = LocalDevice((str(there),), before="exec sleep 60;")
    start = time.monotonic()
    with pytest.raises(DeviceError, match="no sign of life"):
        DeviceSession(device, {})
    assert time.monotonic() - start < 10


def test_slow_work_is_not_taken_for_silence(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card takes 3 seconds, the host's patience is 1, signs of life come every 0.1."""
    monkeypatch.setattr(session, "SILENCE_SECONDS", 1)
    patches = (
        "import os, threading, time; wait = threading.Event.wait; "
        "threading.Event.wait = lambda self, s=None: wait(self, s and s / 50); "
        "os.fsync = lambda number: time.sleep(3)"
    )
    slow = tmp_path / "python"
    slow.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{patches}; $2"\n')
    slow.chmod(0o755)
    files = {"a": file_of(tmp_path / "a", b"1")}
    with DeviceSession(LocalDevice((str(there),), (str(slow),)), {}) as found:
        found.missing("x", files)
        start = time.monotonic()
        found.send(list(files.values()))
        assert time.monotonic() - start > 2
    assert content(there / "x") == {"a": b"1"}


def test_the_program_runs_there_and_its_output_comes_back(
    connected: DeviceSession, there: Path, tmp_path: Path
) -> None:
    program = b"import sys, os\nprint(sys.argv[1:], os.getcwd())\nprint('oh', file=sys.stderr)\n"
    program += b"print(os.environ['XDG_CACHE_HOME'])\nsys.exit(7)\n"
    source = tmp_path / "source"
    files = {
        "mobilevlm/__init__.py": file_of(source / "i", b""),
        "mobilevlm/__main__.py": file_of(source / "m", program),
    }
    connected.missing("runtime", files)
    connected.send(list(files.values()))
    output = connected.run(["a b", "'"], "runtime")
    assert output.code == 7 and output.stderr == "oh\n"
    assert output.stdout == f"['a b', \"'\"] {there / 'runtime'}\n{there / 'cache'}\n"


def test_what_runs_there_ends_with_the_session(
    connected: DeviceSession, there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "SILENCE_SECONDS", 2)
    program = b"import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(60)\n"
    files = {
        "mobilevlm/__init__.py": file_of(tmp_path / "i", b""),
        "mobilevlm/__main__.py": file_of(tmp_path / "m", program),
    }
    connected.missing("runtime", files)
    connected.send(list(files.values()))
    with pytest.raises(DeviceError, match="no sign of life"):  # it says so every 5 seconds only
        connected.run([], "runtime")
    pid = int((there / "runtime" / "pid").read_text())
    os.kill(pid, 0)  # it runs
    connected._command.stop()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and Path(f"/proc/{pid}").exists():
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


def test_the_agent_imports_nothing_but_the_standard_library() -> None:
    """A device has no more before the first copy."""
    source = Path(agent.__file__).read_text()
    code = f"import sys; source = {source!r}; exec(compile(source, 'agent', 'exec'))"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], input=b"", capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.lstrip().startswith(agent.MARK.encode())


def test_a_bundles_files_come_with_its_plan_and_end_with_its_manifest(
    bundle_of: BundleOf, tmp_path: Path
) -> None:
    bundle = shutil.copytree(bundle_of("tiny", "int4"), tmp_path / "bundle")
    (bundle / "plan.json").write_text("{}")
    (bundle / "notes.txt").write_text("not the bundle's")
    files = measuring.bundle_files(bundle)
    assert list(files)[-2:] == ["plan.json", "manifest.json"]
    assert files.keys() == tree_of(bundle).keys() - {"notes.txt"}
    for name, file in files.items():
        data = (bundle / name).read_bytes()
        assert (file.size, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())

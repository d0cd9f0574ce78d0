"""What goes wrong with devices: each is one line and exit code 2; nothing keeps running there."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from adb_server import AdbServer, adb_server
from conftest import BundleOf, run_program
from devices import LocalDevice, device_python
from sshd import SshServer, free_port, make_key, ssh_server, write_known_hosts

from mobilevlm.errors import DeviceError
from mobilevlm.runtime.devices.session import DeviceSession, sent_file

AUDITED = """\
import json, sys
seen = []
def hook(event, arguments):
    if event == "socket.connect":
        seen.append(["connect", list(arguments[1])])
    elif event == "subprocess.Popen":
        seen.append(["start", list(map(str, arguments[1]))])
    elif event in ("socket.sendto", "socket.bind", "os.system", "os.exec", "os.posix_spawn"):
        seen.append([event, []])
sys.addaudithook(hook)
from mobilevlm.cli import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    assert not stop.code, stop.code
print(json.dumps(seen), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return device_python(tmp_path_factory.mktemp("python"))


@pytest.fixture(scope="module")
def bundle(bundle_of: BundleOf) -> Path:
    return bundle_of("tiny", "int4")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[SshServer]:
    folder = tmp_path / "ssh"
    folder.mkdir()
    with ssh_server(folder) as running:
        yield running


@pytest.fixture
def phone(tmp_path: Path) -> Iterator[AdbServer]:
    with adb_server(tmp_path, R58="device", other="device") as running:
        yield running


def refused(device: str, *options: object, **environment: str) -> str:
    """The one line about it."""
    done = run_program("bench", *options, "--device", device, **environment)
    assert done.returncode == 2 and done.stdout == "", (done.returncode, done.stderr)
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"mobilevlm: error: {device}: "), done.stderr
    assert "Traceback" not in done.stderr and len(line) < 600
    return line


def over_ssh(server: SshServer, *options: object) -> str:
    return refused(server.address, *options, MOBILEVLM_SSH=server.client)


# Out of reach


def test_nobody_listens(bundle: Path) -> None:
    line = refused(f"ssh://127.0.0.1:{free_port()}", bundle)
    assert "Connection refused: try 'ssh -p " in line


def test_somebody_listens_and_says_nothing(bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"ssh://127.0.0.1:{mute.getsockname()[1]}"
        start = time.monotonic()
        line = refused(address, bundle, MOBILEVLM_SSH="ssh -F none -o ConnectTimeout=1")
        assert "timed out" in line and time.monotonic() - start < 30


def test_an_unknown_host_key_is_not_accepted(server: SshServer, bundle: Path) -> None:
    write_known_hosts(server, "")
    line = over_ssh(server, bundle)
    assert "its host key is not known: connect once with 'ssh -p" in line
    assert (server.folder / "known_hosts").read_text() == ""


def test_another_host_key_is_not_accepted(server: SshServer, bundle: Path) -> None:
    write_known_hosts(server, make_key(server.folder / "another"))
    assert "its host key is not the one that was known" in over_ssh(server, bundle)


def test_a_key_that_is_not_authorized(server: SshServer, bundle: Path) -> None:
    (server.folder / "authorized_keys").write_text("")
    line = over_ssh(server, bundle)
    assert "it takes none of your keys" in line and "publickey" in line


def test_no_ssh_client_here(bundle: Path) -> None:
    assert "no program '/no/ssh' here" in refused("ssh://pi", bundle, MOBILEVLM_SSH="/no/ssh")


def test_no_adb_server_here(bundle: Path) -> None:
    address = f"tcp:127.0.0.1:{free_port()}"
    line = refused("adb", bundle, ADB_SERVER_SOCKET=address)
    assert f"no adb server at {address[4:]} (Connection refused)" in line
    assert "adb start-server" in refused("adb", bundle, ADB_SERVER_SOCKET="localfilesystem:/no/x")
    line = run_program("bench", bundle, "--device", "adb", ADB_SERVER_SOCKET="vsock:1").stderr
    assert "expected tcp:PORT" in line and line.count("\n") == 1


def test_something_else_than_an_adb_server(server: SshServer, bundle: Path) -> None:
    line = refused("adb", bundle, ADB_SERVER_SOCKET=f"tcp:127.0.0.1:{server.port}")
    assert "does not answer 'host' requests as it should" in line


# Not what is needed


def test_no_python_there(server: SshServer, bundle: Path) -> None:
    line = over_ssh(server, bundle, "--device-python", "/no/python3")
    assert "no Python to start there (tried /no/python3)" in line and "--device-python" in line


def test_a_command_that_is_no_python(server: SshServer, bundle: Path) -> None:
    line = over_ssh(server, bundle, "--device-python", "false")
    assert "the command ended with code 1" in line


def test_missing_packages_are_named(server: SshServer, bundle: Path, tmp_path: Path) -> None:
    lacking = device_python(tmp_path / "python", without=["rich", "onnxruntime"])
    line = over_ssh(
        server, bundle, "--device-python", lacking, "--device-folder", tmp_path / "there"
    )
    assert "lacks packages: install them there: " in line
    assert f"{lacking} -m pip install 'onnxruntime>=" in line and "'rich>=" in line
    assert not (tmp_path / "there" / "runtime").exists()


def test_no_bundle_here_is_told_before_anything_is_connected(tmp_path: Path) -> None:
    done = run_program("bench", tmp_path / "x", "--device", "ssh://pi", MOBILEVLM_SSH="/bin/false")
    assert done.returncode == 2 and "no such folder" in done.stderr
    (tmp_path / "x.gguf").write_bytes(b"")
    done = run_program("bench", tmp_path / "x.gguf", "--device", "ssh://pi", MOBILEVLM_SSH="false")
    assert done.returncode == 2 and "--mmproj FILE" in done.stderr


def test_a_disk_that_is_full_while_files_are_copied(tmp_path: Path) -> None:
    full = tmp_path / "python"
    code = "import os\\ndef full(number): raise OSError(28, 'No space')\\nos.fsync = full"
    full.write_text(f'#!/bin/sh\nexec {sys.executable} -c "$(printf "{code}\\n%s" "$2")"\n')
    full.chmod(0o755)
    there = tmp_path / "there"
    (tmp_path / "big").write_bytes(bytes(5_000_000))
    files = {"a": sent_file(tmp_path / "big"), "b": sent_file(tmp_path / "big")}
    with DeviceSession(LocalDevice((str(there),), (str(full),)), {}) as session:
        session.missing("x", files)
        with pytest.raises(DeviceError, match=r"here: .*No space: free some space there"):
            session.send(list(files.values()))
    assert {path.name for path in (there / "x").iterdir()} == {".received.json"}


# Interrupted


def processes(folder: Path) -> list[int]:
    """Benches that run with files of this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"bench" in words and any(word.startswith(bytes(folder) + b"/bund") for word in words):
            found.append(int(path.parent.name))
    return found


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def start_long_bench(
    arguments: Sequence[object], there: Path, **environment: str
) -> subprocess.Popen[str]:
    """Returns when it runs there; it would for hours."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mobilevlm", "bench", *map(str, arguments), "--runs", "100000",
         "--device-folder", there],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    try:
        wait_for(lambda: processes(there) or process.poll() is not None)
        assert process.poll() is None, process.communicate()
    except BaseException:
        process.kill()
        raise
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_what_runs_there_ends_when_the_program_here_is_interrupted(
    number: signal.Signals, server: SshServer, python: Path, bundle: Path, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    arguments = (bundle, "--device", server.address, "--device-python", python)
    process = start_long_bench(arguments, there, MOBILEVLM_SSH=server.client)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert out == "" and "Traceback" not in err
    wait_for(lambda: not processes(there), 20)


def test_what_runs_over_adb_ends_too(
    phone: AdbServer, python: Path, bundle: Path, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    address = f"tcp:127.0.0.1:{phone.port}"
    arguments = (bundle, "--device", "adb:R58", "--device-python", python)
    process = start_long_bench(arguments, there, ADB_SERVER_SOCKET=address)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    wait_for(lambda: not processes(there), 20)


def test_a_bench_that_is_killed_there_is_told_with_its_exit_code(
    server: SshServer, python: Path, bundle: Path, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    arguments = (bundle, "--device", server.address, "--device-python", python)
    process = start_long_bench(arguments, there, MOBILEVLM_SSH=server.client)
    for number in processes(there):
        os.kill(number, signal.SIGKILL)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + 9 and out == ""
    assert "the bench was ended by signal 9 (as the system does" in err.splitlines()[-1]


def test_a_cable_that_is_pulled_while_files_are_copied(
    phone: AdbServer, python: Path, bundle: Path, tmp_path: Path
) -> None:
    phone.cut_after = 200_000
    address = f"tcp:127.0.0.1:{phone.port}"
    where = ("--device-python", python, "--device-folder", tmp_path / "there")
    line = refused("adb:R58", bundle, *where, ADB_SERVER_SOCKET=address)
    assert "the connection ended: the device went away: check the cable" in line
    phone.cut_after = None
    options = ("--runs", 1, "--new-tokens", 2, "--device", "adb:R58")
    done = run_program("bench", bundle, *options, *where, ADB_SERVER_SOCKET=address)
    assert done.returncode == 0, done.stderr


# Nobody else hears of it


def audited(*arguments: object, **environment: str) -> list[list[object]]:
    """Every connection that the program made, and every program that it started."""
    done = subprocess.run(
        [sys.executable, "-c", AUDITED, *map(str, arguments)],
        capture_output=True, text=True, env={**os.environ, **environment}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: list[list[object]] = json.loads(done.stderr.splitlines()[-1])
    return found


def test_over_ssh_the_client_is_started_once_for_that_host_and_nothing_else_is_connected_to(
    server: SshServer, python: Path, bundle: Path, tmp_path: Path
) -> None:
    options = ("bench", bundle, "--runs", 1, "--new-tokens", 2, "--device-python", python)
    where = ("--device", server.address, "--device-folder", tmp_path / "there")
    [[kind, words]] = audited(*options, *where, MOBILEVLM_SSH=server.client)
    assert kind == "start" and isinstance(words, list)
    assert words[:3] == ["ssh", "-F", f"{server.folder}/client"]
    assert words[-5:-1] == ["-p", str(server.port), "--", "127.0.0.1"]


def test_over_adb_only_the_server_is_connected_to_and_every_request_names_the_device(
    phone: AdbServer, python: Path, bundle: Path, tmp_path: Path
) -> None:
    options = ("bench", bundle, "--runs", 1, "--new-tokens", 2, "--device-python", python)
    where = ("--device", "adb:R58", "--device-folder", tmp_path / "there")
    seen = audited(*options, *where, ADB_SERVER_SOCKET=f"tcp:127.0.0.1:{phone.port}")
    assert seen == [["connect", ["127.0.0.1", phone.port]]] * 3
    assert phone.requests[:3] == [
        "host:devices", "host-serial:R58:features", "host:transport:R58",
    ]  # fmt: skip
    assert len(phone.requests) == 4 and {serial for serial, _ in phone.commands} == {"R58"}

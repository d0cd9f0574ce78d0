"""Failures of devices: each is one line and exit code 2; nothing keeps running there."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import pytest
from adb_server import AdbServer, adb_server
from conftest import BundleOf, refusal, run_program
from devices import LocalDevice, device_python
from sshd import SshServer, free_port, make_key, ssh_server, write_known_hosts

from mobilevlm.errors import DeviceError
from mobilevlm.runtime.bench.devices.conversation import DeviceSession, sent_file


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


class Refused(Protocol):
    def __call__(self, device: str, *options: object, **environment: str) -> str: ...


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Runs a bench that must fail: the one line about it."""

    def run(device: str, *options: object, **environment: str) -> str:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        line = refusal(capsys, "bench", *options, "--device", device)
        assert line.startswith(f"mobilevlm: error: {device}: ")
        return line

    return run


@pytest.fixture
def over_ssh(refused: Refused, server: SshServer) -> Callable[..., str]:
    """The same on the SSH server."""
    return lambda *options: refused(server.address, *options, MOBILEVLM_SSH=server.client)


# Out of reach


def test_nobody_listens(refused: Refused, bundle: Path) -> None:
    line = refused(f"ssh://127.0.0.1:{free_port()}", bundle)
    assert "Connection refused: try 'ssh -p " in line


def test_somebody_listens_and_says_nothing(refused: Refused, bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"ssh://127.0.0.1:{mute.getsockname()[1]}"
        start = time.monotonic()
        line = refused(address, bundle, MOBILEVLM_SSH="ssh -F none -o ConnectTimeout=1")
        assert "timed out" in line and time.monotonic() - start < 30


def test_an_unknown_host_key_is_not_accepted(
    over_ssh: Callable[..., str], server: SshServer, bundle: Path
) -> None:
    write_known_hosts(server, "")
    line = over_ssh(bundle)
    assert "its host key is not known: connect once with 'ssh -p" in line
    assert (server.folder / "known_hosts").read_text() == ""


def test_another_host_key_is_not_accepted(
    over_ssh: Callable[..., str], server: SshServer, bundle: Path
) -> None:
    write_known_hosts(server, make_key(server.folder / "another"))
    assert "its host key is not the one that was known" in over_ssh(bundle)


def test_a_key_that_is_not_authorized(
    over_ssh: Callable[..., str], server: SshServer, bundle: Path
) -> None:
    (server.folder / "authorized_keys").write_text("")
    line = over_ssh(bundle)
    assert "it takes none of your keys" in line and "publickey" in line


def test_no_ssh_client_here(refused: Refused, bundle: Path) -> None:
    assert "no program '/no/ssh' here" in refused("ssh://pi", bundle, MOBILEVLM_SSH="/no/ssh")


def test_no_adb_server_here(refused: Refused, bundle: Path) -> None:
    address = f"tcp:127.0.0.1:{free_port()}"
    line = refused("adb", bundle, ADB_SERVER_SOCKET=address)
    assert f"no adb server at {address[4:]} (Connection refused)" in line
    assert "adb start-server" in refused("adb", bundle, ADB_SERVER_SOCKET="localfilesystem:/no/x")


def test_an_address_of_the_adb_server_that_is_none(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADB_SERVER_SOCKET", "vsock:1")
    assert "expected tcp:PORT" in refusal(capsys, "bench", bundle, "--device", "adb")


def test_something_else_than_an_adb_server(
    refused: Refused, server: SshServer, bundle: Path
) -> None:
    line = refused("adb", bundle, ADB_SERVER_SOCKET=f"tcp:127.0.0.1:{server.port}")
    assert "does not answer 'host' requests as it should" in line


# Not what is needed


def test_no_python_there(over_ssh: Callable[..., str], bundle: Path) -> None:
    line = over_ssh(bundle, "--device-python", "/no/python3")
    assert "no Python to start there (tried /no/python3)" in line and "--device-python" in line


def test_a_command_that_is_no_python(over_ssh: Callable[..., str], bundle: Path) -> None:
    line = over_ssh(bundle, "--device-python", "false")
    assert "the command ended with code 1" in line


def test_missing_packages_are_named(
    over_ssh: Callable[..., str], bundle: Path, tmp_path: Path
) -> None:
    lacking = device_python(tmp_path / "python", without=["rich", "onnxruntime"])
    line = over_ssh(bundle, "--device-python", lacking, "--device-folder", tmp_path / "there")
    assert "lacks packages: install them there: " in line
    assert f"{lacking} -m pip install 'onnxruntime>=" in line and "'rich>=" in line
    assert not (tmp_path / "there" / "runtime").exists()


def test_no_bundle_here_is_told_before_anything_is_connected_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOBILEVLM_SSH", "/bin/false")
    there = ("--device", "ssh://pi")
    assert "no such folder" in refusal(capsys, "bench", tmp_path / "x", *there)
    (tmp_path / "x.gguf").write_bytes(b"")
    assert "--mmproj FILE" in refusal(capsys, "bench", tmp_path / "x.gguf", *there)


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


def test_what_runs_there_ends_when_the_program_here_is_interrupted(
    server: SshServer, python: Path, bundle: Path, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    arguments = (bundle, "--device", server.address, "--device-python", python)
    process = start_long_bench(arguments, there, MOBILEVLM_SSH=server.client)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and out == "" and "Traceback" not in err
    wait_for(lambda: not processes(there), 20)


def test_what_runs_there_ends_when_the_program_here_is_killed(
    phone: AdbServer, python: Path, bundle: Path, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    address = f"tcp:127.0.0.1:{phone.port}"
    arguments = (bundle, "--device", "adb:R58", "--device-python", python)
    process = start_long_bench(arguments, there, ADB_SERVER_SOCKET=address)
    process.kill()
    process.communicate(timeout=30)
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
    done = run_program(
        "bench", bundle, *where, "--device", "adb:R58",
        environment={"ADB_SERVER_SOCKET": address},
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    line = done.stderr.splitlines()[-1]
    assert "the connection ended: the device went away: check the cable" in line

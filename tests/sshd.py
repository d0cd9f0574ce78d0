"""An SSH server of our own on the loopback interface, with keys and configuration of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class SshServer:
    """A running one. ``client``: what MOBILEVLM_SSH must be to reach it."""

    folder: Path
    port: int

    @property
    def client(self) -> str:
        return f"ssh -F {self.folder / 'client'}"

    @property
    def address(self) -> str:
        return f"ssh://127.0.0.1:{self.port}"


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def make_key(path: Path) -> str:
    """A key pair without a passphrase; the public one."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return path.with_name(f"{path.name}.pub").read_text()


def write_known_hosts(server: SshServer, public_key: str) -> None:
    """Write the server's key that the client knows; with nothing, it knows none."""
    line = f"[127.0.0.1]:{server.port} {public_key}" if public_key else ""
    (server.folder / "known_hosts").write_text(line)


@contextmanager
def ssh_server(folder: Path) -> Iterator[SshServer]:
    """Runs while the block does."""
    if os.environ.get("MOBILEVLM_WITHOUT_SSHD") == "1":
        pytest.skip("asked to go without an SSH server")
    # Debian's path of the server is not on every person's PATH; it must be started by its full one.
    program = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    assert program, (
        "no sshd: sudo apt-get install openssh-server (MOBILEVLM_WITHOUT_SSHD=1 goes without)"
    )
    if os.getuid() == 0:  # made by the service's start script, which did not run
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    folder.chmod(0o700)
    server = SshServer(folder, free_port())
    host_key, own_key = make_key(folder / "host_key"), make_key(folder / "key")
    write_known_hosts(server, host_key)
    (folder / "authorized_keys").write_text(own_key)
    (folder / "server").write_text(
        f"Port {server.port}\nListenAddress 127.0.0.1\nHostKey {folder}/host_key\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nUsePAM no\n"
        f"PasswordAuthentication no\nKbdInteractiveAuthentication no\nPidFile none\n"
        f"AllowTcpForwarding no\nLogLevel ERROR\n"
    )
    (folder / "client").write_text(
        f"Host *\n  IdentityFile {folder}/key\n  IdentitiesOnly yes\n  IdentityAgent none\n"
        f"  UserKnownHostsFile {folder}/known_hosts\n  GlobalKnownHostsFile none\n"
    )
    process = subprocess.Popen(
        [program, "-D", "-e", "-f", folder / "server"], stderr=subprocess.PIPE, text=True
    )
    try:
        _wait_for(server.port, process)
        yield server
    finally:
        process.terminate()
        process.wait(10)


def _wait_for(port: int, process: subprocess.Popen[str]) -> None:
    for _ in range(100):
        assert process.poll() is None, process.communicate()[1]
        with closing(socket.socket()) as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("sshd does not listen")

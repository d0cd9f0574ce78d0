"""Devices behind SSH, through the system's own client: its configuration, keys and known hosts."""

from __future__ import annotations

import os
import re
import select
import shlex
import subprocess
import threading
import urllib.parse
from dataclasses import dataclass

from mobilevlm.errors import DeviceError
from mobilevlm.runtime.bench.devices.contracts import CONNECT_SECONDS, Ended

OPTIONS = (
    "BatchMode=yes",  # asks nothing
    "StrictHostKeyChecking=yes",
    f"ConnectTimeout={CONNECT_SECONDS}",
    "ServerAliveInterval=15",
    "ServerAliveCountMax=4",
    "ClearAllForwardings=yes",
    "ForwardAgent=no",
    "ForwardX11=no",
    "PermitLocalCommand=no",
    "ControlMaster=no",  # one that stays behind would keep its end of our pipes
    "RemoteCommand=none",
    "RequestTTY=no",
    "LogLevel=ERROR",
)
FAILED = 255
"""The client's exit code for its own failures."""

# No name may begin with '-': it would be an option.
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*|\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9_.-]+)?\]")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")


@dataclass(frozen=True)
class SshDevice:
    """A host that ``ssh`` reaches."""

    name: str
    host: str
    user: str | None = None
    port: int | None = None
    folders: tuple[str, ...] = ("~/.cache/mobilevlm/device",)
    pythons: tuple[str, ...] = ("python3",)

    @property
    def client(self) -> list[str]:
        """The client's command line as far as the host. ``MOBILEVLM_SSH`` is another client or
        configuration: ``ssh -F FILE``."""
        options = [word for option in OPTIONS for word in ("-o", option)]
        port = [] if self.port is None else ["-p", str(self.port)]
        user = [] if self.user is None else ["-l", self.user]
        program = shlex.split(os.environ.get("MOBILEVLM_SSH") or "ssh")
        return [*program, *options, *port, *user, "--", self.host]

    def start(self, command: str) -> SshCommand:
        """See :class:`mobilevlm.runtime.bench.devices.contracts.Device`."""
        try:
            return SshCommand([*self.client, command])
        except FileNotFoundError as error:
            raise DeviceError(
                f"{self.name}: no program {error.filename!r} here: install an SSH client "
                f"(Debian: openssh-client)"
            ) from None

    def explain(self, ended: Ended) -> str:
        """See :class:`mobilevlm.runtime.bench.devices.contracts.Device`."""
        if ended.code != FAILED:
            return last_line(ended.stderr) or f"the command ended with code {ended.code}"
        login = shlex.join(
            ["ssh", *(["-p", str(self.port)] if self.port else []), f"{self._user}{self.host}"]
        )
        if "IDENTIFICATION HAS CHANGED" in ended.stderr:
            return (
                f"its host key is not the one that was known: someone may be in between; if it was "
                f"set up anew, remove the old one with 'ssh-keygen -R' and connect with '{login}'"
            )
        if "host key is known" in ended.stderr or "Host key verification" in ended.stderr:
            return f"its host key is not known: connect once with '{login}' and compare it"
        if "Permission denied" in ended.stderr:
            return (
                f"it takes none of your keys ({last_line(ended.stderr)}): nothing is asked here, "
                f"so '{login} true' must work without a password (ssh-copy-id)"
            )
        reason = last_line(ended.stderr).removeprefix("ssh: ") or "the connection broke"
        return f"{reason}: try '{login} true'"

    @property
    def _user(self) -> str:
        return f"{self.user}@" if self.user else ""


class SshCommand:
    """See :class:`mobilevlm.runtime.bench.devices.contracts.Command`."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        self._complaints = b""
        self._reader = threading.Thread(target=self._read_complaints, daemon=True)
        self._reader.start()

    def send(self, data: bytes) -> None:
        """See :class:`mobilevlm.runtime.bench.devices.contracts.Command`."""
        assert self._process.stdin is not None
        view = memoryview(data)
        while view:
            view = view[self._process.stdin.write(view) or 0 :]

    def receive(self, seconds: float) -> bytes:
        """See :class:`mobilevlm.runtime.bench.devices.contracts.Command`."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        if not ready:
            raise TimeoutError
        return os.read(self._process.stdout.fileno(), 1 << 16)

    def end(self) -> Ended:
        """See :class:`mobilevlm.runtime.bench.devices.contracts.Command`."""
        self._close_input()
        try:
            self._process.wait(CONNECT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
        code = self._process.wait()
        self._reader.join(CONNECT_SECONDS)
        return Ended(code, self._complaints.decode(errors="replace"))

    def stop(self) -> None:
        """See :class:`mobilevlm.runtime.bench.devices.contracts.Command`."""
        self._close_input()
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait()
        self._reader.join(CONNECT_SECONDS)
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()

    def _close_input(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()

    def _read_complaints(self) -> None:
        assert self._process.stderr is not None
        while data := self._process.stderr.read(1 << 12):
            self._complaints = (self._complaints + data)[-(1 << 16) :]


def parse_address(name: str) -> SshDevice:
    """``ssh://[user@]host[:port][/folder]``, nothing else.

    Raises:
        DeviceError: it is not of that form.
    """
    wrong = DeviceError(f"{name!r}: expected ssh://[user@]host[:port][/folder]")
    if not name.isprintable() or set("?#") & set(name):
        raise wrong
    authority, slash, folder = name.removeprefix("ssh://").partition("/")
    user, at, place = authority.rpartition("@")
    if ":" in user:
        raise DeviceError(
            f"{name.replace(user, user.partition(':')[0] + ':…')!r}: no passwords here: use a key "
            f"(ssh-copy-id)"
        )
    match = re.fullmatch(rf"({_HOST.pattern})(?::(\d{{1,5}}))?", place)
    if match is None or (at and not _USER.fullmatch(user)):
        raise wrong
    port = None if match[2] is None else int(match[2])
    if port is not None and not 0 < port < 1 << 16:
        raise DeviceError(f"{name!r}: port {port}: expected 1 to 65535")
    path = urllib.parse.unquote(slash + folder).rstrip("/")
    device = SshDevice(name, match[1].strip("[]"), user or None, port)
    return device if not path else SshDevice(name, device.host, device.user, port, (path,))


def last_line(text: str) -> str:
    """The last one that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""

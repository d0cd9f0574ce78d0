"""Android devices, through the server of the Android Debug Bridge on this machine.

The server's protocol (adb's OVERVIEW.TXT, SERVICES.TXT) is spoken here, without the ``adb``
program: that one replaces a server of another version, and its exit codes do not tell whose failure
it was.
Every request that is for a device names its serial number.
"""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass

from mobilevlm.errors import DeviceError
from mobilevlm.runtime.bench.devices.contracts import CONNECT_SECONDS, SILENCE_SECONDS, Ended
from mobilevlm.runtime.bench.devices.ssh import last_line

TERMUX_PYTHON = "/data/data/com.termux/files/usr/bin/python3"
PIECE = 1 << 15
STDIN, STDOUT, STDERR, EXIT, CLOSE_STDIN = range(5)
"""Packets of the shell protocol: one byte of these, four of length (little endian), the data
(adb's shell_protocol.h)."""


@dataclass(frozen=True)
class AdbDevice:
    """A device that the server knows."""

    name: str
    serial: str
    folders: tuple[str, ...] = ("/data/local/tmp/mobilevlm", "~/.cache/mobilevlm/device")
    pythons: tuple[str, ...] = ("python3", TERMUX_PYTHON)

    def start(self, command: str) -> AdbCommand:
        """See :class:`mobilevlm.runtime.bench.devices.contracts.Device`."""
        features = _query(self.name, f"host-serial:{self.serial}:features").split(",")
        if "shell_v2" not in features:
            raise DeviceError(f"{self.name}: its Android is too old: version 7 or newer is needed")
        connection = _connect(self.name)
        try:
            _request(self.name, connection, f"host:transport:{self.serial}")
            _request(self.name, connection, f"shell,v2,raw:{command}")
        except BaseException:
            connection.close()
            raise
        return AdbCommand(connection)

    def explain(self, ended: Ended) -> str:
        """See :class:`mobilevlm.runtime.bench.devices.contracts.Device`."""
        return last_line(ended.stderr) or (
            "the device went away: check the cable"
            if ended.code < 0
            else f"the command ended with code {ended.code}"
        )


class AdbCommand:
    """See :class:`mobilevlm.runtime.bench.devices.contracts.Command`."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._complaints = b""
        self._code: int | None = None
        self._pending = b""

    def send(self, data: bytes) -> None:
        """See :class:`mobilevlm.runtime.bench.devices.contracts.Command`."""
        self._connection.settimeout(SILENCE_SECONDS)
        view = memoryview(data)
        for start in range(0, len(view), PIECE):
            piece = view[start : start + PIECE]
            self._connection.sendall(struct.pack("<BI", STDIN, len(piece)) + piece)

    def receive(self, seconds: float) -> bytes:
        """See :class:`mobilevlm.runtime.bench.devices.contracts.Command`."""
        while self._code is None:
            try:
                kind, data = self._packet(seconds)
            except (EOFError, ConnectionError):
                return b""
            if kind == STDOUT and data:
                return data
            if kind == STDERR:
                self._complaints = (self._complaints + data)[-(1 << 16) :]
            elif kind == EXIT:
                self._code = data[0]
        return b""

    def end(self) -> Ended:
        """See :class:`mobilevlm.runtime.bench.devices.contracts.Command`."""
        try:
            self._connection.settimeout(SILENCE_SECONDS)
            self._connection.sendall(struct.pack("<BI", CLOSE_STDIN, 0))
            while self.receive(CONNECT_SECONDS):
                pass
        except OSError:  # TimeoutError too
            pass
        self._connection.close()
        code = -1 if self._code is None else self._code
        return Ended(code, self._complaints.decode(errors="replace"))

    def stop(self) -> None:
        """See :class:`mobilevlm.runtime.bench.devices.contracts.Command`."""
        self._connection.close()

    def _packet(self, seconds: float) -> tuple[int, bytes]:
        self._connection.settimeout(seconds)
        while len(self._pending) < 5 or len(self._pending) < 5 + self._length():
            data = self._connection.recv(1 << 16)
            if not data:
                raise EOFError
            self._pending += data
        kind, length = self._pending[0], self._length()
        packet = self._pending[5 : 5 + length]
        self._pending = self._pending[5 + length :]
        return kind, packet

    def _length(self) -> int:
        length: int = struct.unpack_from("<I", self._pending, 1)[0]
        return length


def find_device(name: str) -> AdbDevice:
    """``adb:SERIAL``, or ``adb`` where one device is connected.

    Raises:
        DeviceError: no server, no such device, or several to choose from.
    """
    wanted = name.partition(":")[2]
    lines = [line.split("\t") for line in _query(name, "host:devices").splitlines()]
    states = {words[0]: words[1] for words in lines if len(words) == 2}
    known = ", ".join(f"{serial} ({state})" for serial, state in states.items())
    if not states:
        raise DeviceError(
            f"{name}: no device is connected: allow USB debugging on it, and see 'adb devices'"
        )
    if wanted and wanted not in states:
        raise DeviceError(f"{name}: no such device: connected are {known}")
    if not wanted and len(states) > 1:
        raise DeviceError(f"{name}: which one? Say adb:SERIAL: connected are {known}")
    serial = wanted or next(iter(states))
    if states[serial] != "device":
        raise DeviceError(
            f"{name}: {serial} is {states[serial]}: unlock it, accept the question on its screen, "
            f"and see 'adb devices'"
        )
    return AdbDevice(f"adb:{serial}", serial)


def server_address() -> tuple[socket.AddressFamily, str | tuple[str, int]]:
    """Return the server's address, found as adb does: ADB_SERVER_SOCKET, else
    ANDROID_ADB_SERVER_ADDRESS and ANDROID_ADB_SERVER_PORT, else port 5037 of this machine.

    Raises:
        DeviceError: the environment's value is none of the known ones.
    """
    text = os.environ.get("ADB_SERVER_SOCKET")
    if not text:
        host = os.environ.get("ANDROID_ADB_SERVER_ADDRESS") or "127.0.0.1"
        text = f"tcp:{host}:{os.environ.get('ANDROID_ADB_SERVER_PORT') or 5037}"
    kind, _, rest = text.partition(":")
    if kind == "localfilesystem" and rest:
        return socket.AF_UNIX, rest
    host, _, port = rest.rpartition(":")
    if kind != "tcp" or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise DeviceError(
            f"ADB_SERVER_SOCKET {text!r}: expected tcp:PORT, tcp:HOST:PORT or localfilesystem:PATH"
        )
    return socket.AF_INET, (host or "127.0.0.1", int(port))


def _connect(name: str) -> socket.socket:
    family, address = server_address()
    connection = socket.socket(family)
    connection.settimeout(CONNECT_SECONDS)
    try:
        connection.connect(address)
        return connection
    except OSError as error:
        connection.close()
        place = address if isinstance(address, str) else "{}:{}".format(*address)
        reason = error.strerror or str(error)
        raise DeviceError(
            f"{name}: no adb server at {place} ({reason}): start it with 'adb start-server'"
        ) from None


def _query(name: str, request: str) -> str:
    """A question to the server itself."""
    with _connect(name) as connection:
        _request(name, connection, request)
        try:
            return _read(connection, int(_read(connection, 4), 16))
        except (EOFError, OSError, ValueError):
            raise _unclear(name, request) from None


def _request(name: str, connection: socket.socket, request: str) -> None:
    data = request.encode()
    try:
        connection.sendall(b"%04x" % len(data) + data)
        status = _read(connection, 4)
        if status == "OKAY":
            return
        reason = _read(connection, int(_read(connection, 4), 16))
    except (EOFError, OSError, ValueError):
        raise _unclear(name, request) from None
    if status != "FAIL":
        raise _unclear(name, request)
    raise DeviceError(f"{name}: {' '.join(reason.split())}: see 'adb devices'")


def _read(connection: socket.socket, length: int) -> str:
    data = b""
    while len(data) < length:
        piece = connection.recv(length - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data.decode(errors="replace")


def _unclear(name: str, request: str) -> DeviceError:
    return DeviceError(
        f"{name}: the adb server does not answer {request.partition(':')[0]!r} requests as it "
        f"should: restart it with 'adb kill-server' and 'adb start-server'"
    )

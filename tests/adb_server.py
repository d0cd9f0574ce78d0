"""A server that speaks the Android Debug Bridge's protocol as adb's own does; its devices are
shells on this machine."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_TO_DEVICES = {"host:transport:": b"", "host:tport:serial:": struct.pack("<Q", 1)}
"""How a connection goes on to a device; the second one is that of the ``adb`` program, which this
server was tried with."""
STDIN, STDOUT, STDERR, EXIT, CLOSE_STDIN = range(5)


@dataclass
class AdbServer:
    """A running one, and what it was asked."""

    port: int
    home: Path
    """Home folder of the devices' shells."""
    states: dict[str, str]
    features: str = "cmd,shell_v2,stat_v2"
    requests: list[str] = field(default_factory=list)
    commands: list[tuple[str, str]] = field(default_factory=list)
    """Serial numbers, and what was run on those devices."""
    cut_after: int | None = None
    """Bytes to a device's input after which the connection is lost, as by a pulled cable."""


@contextmanager
def adb_server(home: Path, **states: str) -> Iterator[AdbServer]:
    """Runs while the block does. ``states``: by serial number, ``device`` or what keeps it away."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(ConnectionError, EOFError):
                _serve(self.request, state)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        state = AdbServer(server.server_address[1], home, dict(states))
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()


def _serve(connection: socket.socket, server: AdbServer) -> None:
    serial = None
    while True:
        request = _exactly(connection, int(_exactly(connection, 4), 16)).decode()
        server.requests.append(request)
        if serial is not None:
            service, _, command = request.partition(":")
            if service not in ("shell,v2,raw", "shell,v2,TERM=xterm,raw"):
                _fail(connection, f"unknown service {service!r}")
                return
            connection.sendall(b"OKAY")
            server.commands.append((serial, command))
            _shell(connection, command, server)
            return
        verb, _, rest = request.partition(":")
        if request == "host:version":
            _answer(connection, "0029")
            return
        if request == "host:devices":
            _answer(connection, "".join(f"{s}\t{state}\n" for s, state in server.states.items()))
            return
        if verb == "host-serial" and rest.endswith(":features"):
            if server.states.get(rest.removesuffix(":features")) != "device":
                _fail(connection, "device not found")
            else:
                _answer(connection, server.features)
            return
        for prefix, reply in _TO_DEVICES.items():
            if request.startswith(prefix):
                serial = request.removeprefix(prefix)
                if server.states.get(serial) != "device":
                    _fail(connection, f"device '{serial}' not found")
                    return
                connection.sendall(b"OKAY" + reply)
        if serial is not None:
            continue
        _fail(connection, f"unknown host service {request!r}")
        return


def _shell(connection: socket.socket, command: str, server: AdbServer) -> None:
    """adb's shell protocol around a local shell."""
    process = subprocess.Popen(
        ["/bin/sh", "-c", command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        cwd=server.home,
        env={"HOME": str(server.home), "PATH": "/usr/bin:/bin"},
    )
    assert process.stdin and process.stdout and process.stderr
    lock = threading.Lock()

    def pass_on(kind: int) -> None:
        stream = process.stdout if kind == STDOUT else process.stderr
        assert stream is not None
        with contextlib.suppress(OSError):
            while data := stream.read(1 << 12):
                with lock:
                    connection.sendall(struct.pack("<BI", kind, len(data)) + data)

    def take_in() -> None:
        received = 0
        assert process.stdin is not None
        with contextlib.suppress(OSError, EOFError):
            while True:
                kind, length = struct.unpack("<BI", _exactly(connection, 5))
                data = _exactly(connection, length)
                received += length
                if server.cut_after is not None and received > server.cut_after:
                    connection.shutdown(socket.SHUT_RDWR)
                    break
                if kind == STDIN:
                    process.stdin.write(data)
                elif kind == CLOSE_STDIN:
                    break
        process.stdin.close()

    readers = [threading.Thread(target=pass_on, args=(kind,)) for kind in (STDOUT, STDERR)]
    for thread in (*readers, threading.Thread(target=take_in, daemon=True)):
        thread.start()
    code = process.wait()
    for thread in readers:
        thread.join()
    with contextlib.suppress(OSError):
        connection.sendall(struct.pack("<BIB", EXIT, 1, code & 0xFF))


def _exactly(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        piece = connection.recv(length - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def _answer(connection: socket.socket, text: str) -> None:
    data = text.encode()
    connection.sendall(b"OKAY%04x" % len(data) + data)


def _fail(connection: socket.socket, text: str) -> None:
    data = text.encode()
    connection.sendall(b"FAIL%04x" % len(data) + data)

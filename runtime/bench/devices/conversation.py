"""The end of the conversation with a device that is here (agent.py is the other one)."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobilevlm.console.progress import Advance, ignore
from mobilevlm.errors import DeviceError
from mobilevlm.runtime.bench.devices.agent import MARK
from mobilevlm.runtime.bench.devices.contracts import SILENCE_SECONDS, Command, Device
from mobilevlm.whole_file import file_sha256

NO_SUCH_PROGRAM = (126, 127)
"""Exit codes of shells that cannot start a command."""
BOOTSTRAP = (
    "import sys;"
    'sys.version_info<(3,11)and sys.exit("Python 3.11 or newer is needed, not "+sys.version[:6]);'
    "sys.path=[place for place in sys.path if place];"  # its working folder may hold any names
    "exec(sys.stdin.buffer.read({length}))"
)
"""Program for ``python -c``. No character in it means anything to a shell between ``'``."""
PIECE = 1 << 20


@dataclass(frozen=True)
class SentFile:
    """A file for a device."""

    path: Path
    size: int
    sha256: str


@dataclass(frozen=True)
class Output:
    """Exit code and output of the program on the device."""

    code: int
    stdout: str
    stderr: str


def sent_file(path: Path) -> SentFile:
    """A file whose digest nobody knows yet."""
    return SentFile(path, path.stat().st_size, file_sha256(path))


class DeviceSession:
    """A connection to a device; a context manager, whose end also ends what runs there.

    Its methods raise DeviceError: one line that begins with the device's name.
    """

    def __init__(
        self,
        device: Device,
        packages: Mapping[str, tuple[str, str]],
        *,
        pythons: Sequence[str] = (),
        folders: Sequence[str] = (),
    ) -> None:
        """``packages``: what must be installed there, by distribution its module and least version.
        ``pythons`` (commands of the device's shell) and ``folders`` replace the device's own."""
        self._device = device
        self._pending = b""
        self._command = self._start(pythons or device.pythons)
        try:
            facts = self._ask(
                {"folders": list(folders or device.folders), "packages": dict(packages)}
            )
        except BaseException:
            self._command.stop()
            raise
        self.base = str(facts["base"])
        """The folder on the device."""
        if facts["lacking"]:
            self._command.stop()
            names = " ".join(f"'{name}'" for name in facts["lacking"])
            raise self._error(
                f"its Python ({facts['python']}) lacks packages: install them there: "
                f"{facts['python']} -m pip install {names}"
            )

    def __enter__(self) -> DeviceSession:
        return self

    def __exit__(self, *reason: object) -> None:
        self._command.stop()

    def missing(self, folder: str, files: Mapping[str, SentFile]) -> list[str]:
        """Begins to make a folder on the device hold these files: the names of those to send."""
        listed = {name: [file.size, file.sha256] for name, file in files.items()}
        missing: list[str] = self._ask({"mirror": folder, "files": listed})["missing"]
        return missing

    def send(self, files: Sequence[SentFile], advance: Advance = ignore) -> None:
        """Sends what ``missing`` told, in its order, and waits until it is in place."""
        for file in files:
            self._send_file(file, advance)
        self._answer()

    def run(self, arguments: Sequence[str], python_path: str) -> Output:
        """Runs the program of a folder on the device."""
        found = self._ask({"run": list(arguments), "python_path": python_path})
        return Output(int(found["code"]), str(found["stdout"]), str(found["stderr"]))

    def _start(self, pythons: Sequence[str]) -> Command:
        """Sends the agent to the first Python that starts."""
        source = Path(__file__).with_name("agent.py").read_bytes()
        code = BOOTSTRAP.format(length=len(source))
        for python in pythons:
            self._pending = b""
            command = self._device.start(f"{python} -c '{code}'")
            try:
                with contextlib.suppress(OSError):  # it ended; why, its end tells
                    command.send(source)
                if self._read_answer(command) is not None:
                    return command
                ended = command.end()
            except BaseException:
                command.stop()
                raise
            if ended.code not in NO_SUCH_PROGRAM:
                raise self._error(self._device.explain(ended))
        raise self._error(
            f"no Python to start there (tried {', '.join(pythons)}): install Python 3.11 or newer "
            f"there, or say where it is with --device-python"
        )

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        with contextlib.suppress(OSError):  # it ended; why, its answer tells
            self._command.send(json.dumps(request).encode() + b"\n")
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        """The next one that is more than a sign of life."""
        while True:
            found = self._read_answer(self._command)
            if found is None:
                ended = self._command.end()
                raise self._error(f"the connection ended: {self._device.explain(ended)}")
            if "refused" in found:
                raise self._error(found["refused"])
            if "alive" not in found:
                return found

    def _read_answer(self, command: Command) -> dict[str, Any] | None:
        """The next line that is one. None at the end of the output."""
        while True:
            line, newline, rest = self._pending.partition(b"\n")
            if newline:
                self._pending = rest
                if line.startswith(MARK.encode()):
                    found: dict[str, Any] = json.loads(line[len(MARK) :])
                    return found
                continue
            try:
                data = command.receive(SILENCE_SECONDS)
            except TimeoutError:
                raise self._error(
                    f"no sign of life for {SILENCE_SECONDS:.0f} s: check the device and the "
                    f"connection"
                ) from None
            if not data:
                return None
            self._pending += data

    def _send_file(self, file: SentFile, advance: Advance) -> None:
        left = file.size
        with file.path.open("rb") as source:
            while left:
                data = source.read(min(left, PIECE))
                if not data:
                    raise self._error(f"{file.path} became shorter while it was copied: try again")
                left -= len(data)
                try:
                    self._command.send(data)
                except OSError:  # why, its answer tells
                    self._answer()
                    raise
                advance(len(data))

    def _error(self, text: str) -> DeviceError:
        return DeviceError(f"{self._device.name}: {' '.join(text.split())}")

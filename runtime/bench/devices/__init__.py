"""Other machines to measure on: each is reached by one command that runs there, whose standard
input and output are binary. Files travel through them too (agent.py), so a device needs no more.

One file per way there: ssh.py, adb.py. docs/devices.md says what a device needs.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Protocol

from mobilevlm.errors import DeviceError

CONNECT_SECONDS = 10
"""To reach a device."""
SILENCE_SECONDS = 120.0
"""Without a word from a device that should say one every few seconds, it counts as gone."""


@dataclass(frozen=True)
class Ended:
    """How a command on a device ended."""

    code: int
    stderr: str


class Command(Protocol):
    """A command that runs on a device."""

    def send(self, data: bytes) -> None:
        """To its standard input.

        Raises:
            OSError: it does not listen any more.
        """

    def receive(self, seconds: float) -> bytes:
        """What it wrote to its standard output; nothing at its end.

        Raises:
            TimeoutError: nothing came for so long.
        """

    def end(self) -> Ended:
        """Closes its standard input and waits for it to end."""

    def stop(self) -> None:
        """Breaks the connection. Does nothing after the end."""


class Device(Protocol):
    """A machine that a person has named."""

    @property
    def name(self) -> str:
        """As a person names it: ``ssh://pi``."""

    @property
    def pythons(self) -> tuple[str, ...]:
        """Commands that may start Python there, the likeliest first."""

    @property
    def folders(self) -> tuple[str, ...]:
        """Where to put files there: the first that can be written to."""

    def start(self, command: str) -> Command:
        """Starts a command line of the device's shell.

        Raises:
            DeviceError: the device cannot be reached.
        """

    def explain(self, ended: Ended) -> str:
        """Why a command did not even start, and what to do."""


def open_device(name: str) -> Device:
    """The device that ``ssh://…`` or ``adb[:serial]`` names.

    Raises:
        DeviceError: it names none, or several.
    """
    if name.startswith("ssh://"):
        from mobilevlm.runtime.bench.devices.ssh import parse_address

        return parse_address(name)
    if name == "adb" or name.startswith("adb:"):
        from mobilevlm.runtime.bench.devices.adb import find_device

        return find_device(name)
    raise DeviceError(f"{name}: not a device: expected ssh://[user@]host[:port] or adb[:serial]")


def quote_command(text: str, option: str) -> str:
    """A command line as a person wrote it, its words quoted for the device's shell (a ``~/`` at its
    beginning stays what it means there).

    Raises:
        DeviceError: it has no words, or a quote is open.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise DeviceError(f"{option} {text!r}: {error}") from None
    if not words:
        raise DeviceError(f"{option} is empty: expected a path, as in /usr/bin/python3")
    home, rest = ("~/", words[0][2:]) if words[0].startswith("~/") else ("", words[0])
    return home + shlex.join([rest, *words[1:]])

"""Contracts of devices: how a machine is reached, and a command that runs on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

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
        """Return what it wrote to its standard output; nothing at its end.

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
        """Folders for files on the device, in order of preference; the first writable one is
        used."""

    def start(self, command: str) -> Command:
        """Starts a command line of the device's shell.

        Raises:
            DeviceError: the device cannot be reached.
        """

    def explain(self, ended: Ended) -> str:
        """Why a command did not even start, and what to do."""

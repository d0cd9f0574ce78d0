"""Other machines to measure on: each is reached by one command that runs there, whose standard
input and output are binary. Files travel through them too (agent.py), so a device needs no more.

One file per way there: ssh.py, adb.py. docs/how-to/devices.md says what a device needs.
"""

from __future__ import annotations

import shlex

from mobilevlm.errors import DeviceError
from mobilevlm.runtime.bench.devices.adb import find_device
from mobilevlm.runtime.bench.devices.contracts import Device
from mobilevlm.runtime.bench.devices.ssh import parse_address


def open_device(name: str) -> Device:
    """The device that ``ssh://…`` or ``adb[:serial]`` names.

    Raises:
        DeviceError: it names none, or several.
    """
    if name.startswith("ssh://"):
        return parse_address(name)
    if name == "adb" or name.startswith("adb:"):
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

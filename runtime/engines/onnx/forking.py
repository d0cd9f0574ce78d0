"""Native objects in a forked child: left alone for good.

A fork copies memory, but no threads. The destructor of an ONNX Runtime session waits in a child for
threads that are not there (a hang), or ends the process; GNU OpenMP waits likewise at the next
computation. So in a child nothing of the parent is freed, and its memory goes with the process.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable

from mobilevlm.errors import SessionError

_kept: weakref.WeakSet[object] = weakref.WeakSet()
_computed: dict[str, int] = {}
"""Process that has computed last with a library whose threads cannot be started anew in a child."""


def keep_in_children(native: object) -> None:
    """Have no forked child run the destructor of an object, not even when the child ends."""
    _kept.add(native)


def free_with(owner: object, free: Callable[..., object], *arguments: object) -> None:
    """Call ``free(*arguments)`` when the owner goes, or the process ends; in a forked child never.
    ``arguments`` live as long."""
    weakref.finalize(owner, _free, os.getpid(), free, *arguments)


def note_threads(library: str) -> None:
    """Remember that a library has started threads in this process."""
    _computed[library] = os.getpid()


def check_threads(library: str) -> None:
    """Refuse a library that has started threads in a process that this one was forked from.

    Raises:
        SessionError: it would wait for them for ever.
    """
    if _computed.get(library, os.getpid()) != os.getpid():
        raise SessionError(
            f"{library} computed before this process was forked, and cannot start threads again: "
            f"start processes with multiprocessing's 'spawn', or use --engine onnx"
        )


def _free(process: int, free: Callable[..., object], *arguments: object) -> None:
    if os.getpid() == process:
        free(*arguments)


def _keep() -> None:
    for native in list(_kept):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(native))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep)

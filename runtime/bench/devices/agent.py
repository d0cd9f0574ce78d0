"""The end on the device: receives files and runs the program on them.

The host starts it as ``python3 -c`` with its source on standard input, so that nothing need be
there before; what follows on standard input are requests, a JSON object a line:

    {"folders": […], "packages": {…}}
        opens the first folder that can be written to, and takes its lock; answers with facts
    {"mirror": FOLDER, "files": {NAME: [SIZE, SHA256]}}
        answers with the names of those that are not here; then their bytes follow, in that order;
        answers again when they are in place, and what the list does not have is gone
    {"run": [ARGUMENT, …], "python_path": FOLDER}
        runs ``python -m mobilevlm``; answers with its output

Each answer is a JSON object on a line that begins with MARK: a login shell may write what it likes
before. The first one comes without a request; a refusal is the last one. The agent ends, and ends
what it runs, when its standard input does. It needs nothing but Python's standard library.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path, PurePosixPath
from typing import Any

MARK = "mobilevlm-agent:"
RECEIVED = ".received.json"
"""Names of the files that came from a host; with each its digest, and the size, times and inode
that it had when it was found right."""
ALIVE_SECONDS = 5.0
"""Between signs of life, whatever takes long."""
PIECE = 1 << 20
SYNC = 1 << 25
"""Bytes of a file after which they are on the disk."""
_output = threading.Lock()


class RefusedError(Exception):
    """One line for the person at the host."""


def main() -> None:
    """Answers requests until there are no more."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    base, lock = None, None
    print()  # what a login shell wrote may not have ended its line
    answer({"hello": sys.version})
    threading.Thread(target=_say_alive, daemon=True).start()
    try:
        while line := sys.stdin.buffer.readline():
            request = json.loads(line)
            if "folders" in request:
                base, lock = open_folder(request["folders"])
                answer(opened(base, request["packages"]))
            elif "mirror" in request:
                assert base is not None
                mirror(base / request["mirror"], request["files"])
            else:
                assert base is not None
                run(base, request["run"], base / request["python_path"])
    except RefusedError as refusal:
        answer({"refused": str(refusal)})
        sys.exit(1)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = ": free some space there, or give another --device-folder" if full else ""
        answer({"refused": f"{error.filename or base}: {error.strerror}{remedy}"})
        sys.exit(1)
    finally:
        if lock is not None:
            os.close(lock)


def answer(content: dict[str, Any]) -> None:
    """One line, in one piece."""
    with _output:
        print(MARK + json.dumps(content), flush=True)


def open_folder(candidates: list[str]) -> tuple[Path, int]:
    """The folder, and its lock: two measurements at a time would disturb each other.

    Raises:
        RefusedError: none can be written to, or another one runs here.
    """
    import fcntl

    reasons = []
    for candidate in candidates:
        folder = Path(candidate)
        try:
            folder = Path.cwd() / folder.expanduser()
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home folder
            reasons.append(f"{folder}: {getattr(error, 'strerror', error)}")
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RefusedError(
                "another measurement runs there: wait for it, since two would disturb each other"
            ) from None
        return folder, lock
    raise RefusedError(
        f"no folder to write to ({'; '.join(reasons)}): give another --device-folder"
    )


def opened(base: Path, packages: dict[str, list[str]]) -> dict[str, Any]:
    """Facts. ``packages``: by distribution its module and the least version."""
    lacking = []
    for name, (module, least) in packages.items():
        found = importlib.util.find_spec(module) is not None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found = found and not _is_older(importlib.metadata.version(name), least)
        if not found:
            lacking.append(f"{name}>={least}")
    return {
        "base": str(base),
        "python": sys.executable,
        "lacking": lacking,
    }


def mirror(folder: Path, files: dict[str, tuple[int, str]]) -> None:
    """Makes ``folder`` hold these files. Only files that came from a host before are removed.

    Raises:
        RefusedError: a name leaves the folder, or what came was not what was announced.
    """
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise RefusedError(f"{name!r} leaves the folder")
    folder.mkdir(parents=True, exist_ok=True)
    received = _read_received(folder)
    for name in received.keys() - files.keys():
        (folder / name).unlink(missing_ok=True)
        del received[name]
    missing = [name for name, (size, digest) in files.items()
               if not _is_here(folder, name, size, digest, received)]  # fmt: skip
    _write_received(folder, received)
    for name in missing:  # what an interrupted copy left
        _part(folder / name).unlink(missing_ok=True)
    free = room = shutil.disk_usage(folder).free
    for name in missing:  # a file that is replaced goes when its successor is complete
        path, size = folder / name, files[name][0]
        if size > room:
            needed = sum(files[name][0] for name in missing)
            raise RefusedError(
                f"{folder}: {needed / 1e6:.0f} MB to copy, {free / 1e6:.0f} MB free: free some "
                f"space there, or give another --device-folder"
            )
        room += (path.stat().st_size if path.is_file() else 0) - size
    answer({"missing": missing})
    for name in missing:
        _receive(folder / name, *files[name])
        received[name] = {"sha256": files[name][1], "stamp": _stamp(folder / name)}
        _write_received(folder, received)
    answer({"complete": len(missing)})


def run(base: Path, arguments: list[str], python_path: Path) -> None:
    """Runs the program and answers with its output. Ends it when the host goes away."""
    theirs = os.environ.get("PYTHONPATH")
    environment = {
        **os.environ,
        "PYTHONPATH": f"{python_path}{os.pathsep}{theirs}" if theirs else str(python_path),
        "XDG_CACHE_HOME": str(base / "cache"),
        "COLUMNS": "200",
    }
    with tempfile.TemporaryFile(dir=base) as out, tempfile.TemporaryFile(dir=base) as err:
        child = subprocess.Popen(
            [sys.executable, "-m", "mobilevlm", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=python_path,
            env=environment,
            start_new_session=True,
        )
        try:
            while child.poll() is None:
                ready, _, _ = select.select([sys.stdin], [], [], 0.2)
                if ready:  # nothing is sent meanwhile: the host went away
                    sys.exit(1)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    answer({"code": child.returncode, "stdout": texts[0], "stderr": texts[1]})


def _receive(path: Path, size: int, digest: str) -> None:
    """A file under another name, then renamed: an interrupted copy leaves nothing that looks
    whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found, written = hashlib.sha256(), 0
    try:
        with _part(path).open("wb") as file:
            while size:
                data = sys.stdin.buffer.read(min(size, PIECE))
                if not data:
                    raise RefusedError(f"{path}: the copy was interrupted")
                size -= len(data)
                found.update(data)
                file.write(data)
                written += len(data)
                if written >= SYNC or not size:  # else a slow card would stand still at the end
                    file.flush()
                    os.fsync(file.fileno())
                    written = 0
        if found.hexdigest() != digest:
            raise RefusedError(f"{path}: sha256 mismatch: the file changed while it was copied")
        _part(path).replace(path)
    finally:
        _part(path).unlink(missing_ok=True)


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _is_here(folder: Path, name: str, size: int, digest: str, received: dict[str, Any]) -> bool:
    """Return whether a file has this content; it is hashed only if it changed since the last
    check."""
    path = folder / name
    if not path.is_file() or path.stat().st_size != size:
        return False
    known = {"sha256": digest, "stamp": _stamp(path)}
    if received.get(name) == known:
        return True
    found = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(PIECE):
            found.update(data)
    if found.hexdigest() != digest:
        return False
    received[name] = known
    return True


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _read_received(folder: Path) -> dict[str, Any]:
    try:
        data = json.loads((folder / RECEIVED).read_text())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _write_received(folder: Path, received: dict[str, Any]) -> None:
    part = _part(folder / RECEIVED)
    part.write_text(json.dumps(received))
    part.replace(folder / RECEIVED)


def _is_older(version: str, least: str) -> bool:
    """By the numbers that both begin with."""
    found, wanted = (
        [int(number) for number in re.findall(r"\d+", text.partition("+")[0])]
        for text in (version, least)
    )
    return (found + [0] * len(wanted))[: len(wanted)] < wanted


def _say_alive() -> None:
    while not threading.Event().wait(ALIVE_SECONDS):
        with contextlib.suppress(OSError):
            answer({"alive": True})


def _leave(number: int, frame: object) -> None:
    sys.exit(1)


if __name__ == "__main__":
    main()

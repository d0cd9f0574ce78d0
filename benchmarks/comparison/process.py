"""The parent's side of a worker process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from comparison.work import NotSupportedError
from mobilevlm.errors import MobileVLMError

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("worker.py")


class WorkerError(MobileVLMError):
    """A worker that failed or ended; the message is the peer's own."""


def one_line(error: Exception) -> str:
    """Its message in at most 200 characters."""
    return f"{' '.join(str(error).split()):.200}"


class Worker:
    """A running worker. ``python``: its interpreter. ``close`` ends it."""

    def __init__(self, python: str | None = None) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [python or sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    def ask(self, action: str, *arguments: Any, **fields: Any) -> Any:
        """Sends a request and waits for the answer.

        Raises:
            NotSupportedError: the peer has no such stage.
            WorkerError: it failed.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(
                json.dumps({"do": action, "arguments": arguments, **fields}),
                file=self._process.stdin,
                flush=True,
            )
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"the process ended ({self._process.wait()}): {self._last_words()}")
        answer = json.loads(line)
        if "not_supported" in answer:
            raise NotSupportedError(answer["not_supported"])
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["value"]

    def close(self) -> None:
        """Ends the process and waits for it."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()
        self._log.close()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

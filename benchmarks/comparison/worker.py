"""A process that loads one peer and does what its parent asks for, one JSON line after another.

    {"do": "open", "peer": "llama_cpp", "shapes": {…}, "threads": 2, "options": {…}}
    {"do": "encode", "arguments": [7]}  →  {"value": 0.81}

Between requests it waits in a read, so it takes no processor time from the peer that is measured.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, by any interpreter

from comparison.work import NotSupportedError, Peer, Shapes


def main() -> None:
    """Serves until its input ends. Whatever the libraries print goes to stderr."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the group: the parent decides
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    model: Peer | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "open":
                model, value = open_peer(request)
            elif request["do"] == "memory":
                value = memory()
            else:
                value = getattr(model, request["do"])(*request["arguments"])
            answer: dict[str, object] = {"value": value}
        except NotSupportedError as error:
            answer = {"not_supported": str(error)}
        except Exception as error:  # whatever a peer raises is told, with its row left empty
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


def open_peer(request: dict[str, Any]) -> tuple[Peer, dict[str, float]]:
    """Imports the peer's packages, then loads the model: seconds of each."""
    start = time.perf_counter()
    module = importlib.import_module(f"comparison.peers.{request['peer']}")
    imported = time.perf_counter()
    model = module.load(Shapes(**request["shapes"]), request["threads"], request["options"])
    done = time.perf_counter()
    return model, {"import": imported - start, "load": done - imported}


def memory() -> dict[str, float]:
    """Megabytes: the most that was ever resident, and what of it now is this process's own (pages
    of mapped files are shared by all processes that map them, and can be dropped)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return {
        name: int(fields[key].split()[0]) * 1024 / 1e6
        for name, key in (("peak", "VmHWM"), ("own", "RssAnon"))
    }


if __name__ == "__main__":
    main()

"""The process in which cases run: ``python -m fuzz.worker NAME SEED FIRST LAST FOLDER``.

Prints ``ready``, then one outcome a line; everything that the product or its libraries print goes
to /dev/null.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from random import Random

from fuzz.harness import Fuzzer, case_random, find_fuzzer
from mobilevlm.errors import MobileVLMError


def main(name: str, seed: int, first: int, last: int, folder: Path) -> None:
    """Run the cases of a span."""
    report = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8", errors="replace")
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    fuzzer = find_fuzzer(name)
    if fuzzer.warm is not None:
        fuzzer.warm(folder / "base")
    print("ready", file=report)
    for number in range(first, last):
        scratch = folder / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        os.ftruncate(2, 0)
        print(run_case(fuzzer, folder / "base", case_random(seed, number), scratch), file=report)


def run_case(fuzzer: Fuzzer, base: Path, random: Random, scratch: Path) -> str:
    """Make one case and return what became of it in one line."""
    try:
        case = fuzzer.mutate(base, random, scratch)
    except Exception as error:  # the fuzzer's own fault: not a signal, which it would look like
        return "raw no case was made: " + _line(error)
    return outcome_of(fuzzer, case)


def outcome_of(fuzzer: Fuzzer, case: object) -> str:
    """Give one case to the product and return what became of it in one line."""
    before = _reset_peak()
    try:
        fuzzer.attempt(case)
        outcome = "accepted"
    except MobileVLMError as error:
        lines = str(error).splitlines()
        outcome = "refused" if len(lines) == 1 else f"raw message of {len(lines)} lines: {lines}"
    except MemoryError:
        outcome = "raw MemoryError"
    except BaseException as error:
        outcome = "raw " + _line(error)
    added = _status("VmHWM") - before
    return f"memory {added}" if added > fuzzer.memory else outcome


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _reset_peak() -> int:
    """Forget the peak of resident memory; return what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))

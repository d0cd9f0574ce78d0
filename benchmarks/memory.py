"""Peak memory of bundles against its estimate, each in a process of its own.

    python benchmarks/memory.py nano-int4 synth-int4 synth-int4::compact "synth-int4::in turn"
    python benchmarks/memory.py synth-all:gguf synth-all:hybrid --text-tokens 500
    python benchmarks/memory.py synth-int4 --limit 512MB

A candidate is a bundle, an engine and a setting of memory (mobilevlm/plan.py); both may be left
out. Each process loads its bundle on one core and answers one question about a grey image; its
peak is the VmHWM of /proc/self/status (Linux). With --limit a control group really bounds the
process, which chooses its setting itself; one that the system ends is reported as killed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

from mobilevlm.bundle import read_manifest
from mobilevlm.plan import MemorySetting, Plan
from mobilevlm.runtime.machine import describe_machine
from mobilevlm.runtime.memory.estimate import estimate

NEW_TOKENS = 16
GROUPS = Path("/sys/fs/cgroup")


def answer(path: str, engine: str, memory: str, text_tokens: int) -> dict[str, Any]:
    """Loads a bundle in this process and answers one question."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import numpy as np

    from mobilevlm.runtime import load
    from mobilevlm.runtime.bench.bench import prompt_of_length
    from mobilevlm.runtime.machine import peak_memory_mb

    plan: Plan | Literal["none"] = "none"
    if memory != "auto":
        plan = Plan(engine or "auto", memory=cast(MemorySetting, memory))
    with load(path, engine or "auto", plan=plan) as vlm:
        size = vlm.spec.image.square.size
        grey = np.full((size, size, 3), 128, np.uint8)
        prompt = prompt_of_length(vlm, text_tokens, 1)
        found = vlm.generate(prompt, [grey], max_new_tokens=NEW_TOKENS, ignore_eos=True, raw=True)
        return {
            "engine": vlm.engine,
            "memory": vlm.plan.memory,
            "positions": found.prompt_tokens + len(found.token_ids),
            "peak_mb": peak_memory_mb(),
            "token_ids": found.token_ids,
            "seconds": found.timings.load + found.timings.ttft,
        }


@contextmanager
def control_group(megabytes: float) -> Iterator[Path]:
    """A group below this process's own, whose memory is bounded; its file of processes."""
    place: Path | None = None
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if "memory" in controllers.split(","):
            place, limit = GROUPS / "memory" / group.lstrip("/"), "memory.limit_in_bytes"
            break
        if not controllers and "memory" in _controllers(GROUPS / group.lstrip("/")):
            place, limit = GROUPS / group.lstrip("/"), "memory.max"
    if place is None:
        sys.exit("no control group of memory that could be divided here")
    made = place / f"mobilevlm-{os.getpid()}"
    made.mkdir()
    try:
        (made / limit).write_text(str(int(megabytes * 1e6)))
        yield made / "cgroup.procs"
    finally:
        made.rmdir()


def _controllers(group: Path) -> list[str]:
    path = group / "cgroup.subtree_control"
    return path.read_text().split() if path.is_file() else []


def measure(candidate: str, text_tokens: int, limit_mb: float | None) -> dict[str, Any] | str:
    """Return the result of :func:`answer` in a process of its own, or the reason why there is
    none."""
    path, engine, memory = [*candidate.split(":"), "", ""][:3]
    memory = "auto" if limit_mb is not None else memory or "fast"
    command = [sys.executable, __file__, "--answer", path, engine, memory, str(text_tokens)]
    if limit_mb is None:
        done = subprocess.run(command, capture_output=True, text=True)
    else:
        with control_group(limit_mb) as processes:
            inside = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(processes), *command]
            done = subprocess.run(inside, capture_output=True, text=True)
    if done.returncode < 0:
        return "killed"
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def row(candidate: str, found: dict[str, Any]) -> str:
    """Return a row of the table: estimate and measurement."""
    path = candidate.split(":")[0]
    manifest, _ = read_manifest(Path(path))
    plan = Plan(found["engine"], 1, 1, memory=found["memory"])
    told = estimate(manifest, plan, found["positions"])
    ratio = told.peak / 1e6 / found["peak_mb"]
    return (
        f"| {Path(path).name} | {found['engine']} | {found['memory']} | {found['positions']} | "
        f"{told.own / 1e6:.0f} | {told.peak / 1e6:.0f} | {found['peak_mb']:.0f} | {ratio:.2f} |"
    )


def main() -> None:
    """Prints the table."""
    if sys.argv[1:2] == ["--answer"]:
        path, engine, memory, text_tokens = sys.argv[2:]
        try:
            print(json.dumps(answer(path, engine, memory, int(text_tokens))))
        except Exception as error:  # for the parent: one line
            sys.exit(str(error))
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("candidates", nargs="+", metavar="BUNDLE[:ENGINE[:MEMORY]]")
    parser.add_argument("--text-tokens", type=int, default=56)
    parser.add_argument("--limit", metavar="512MB")
    arguments = parser.parse_args()
    limit = None
    if arguments.limit:
        number = re.fullmatch(r"(\d+)MB", arguments.limit)
        if number is None:
            parser.error("--limit: expected a size, as in 512MB")
        limit = float(number[1])
    print("| bundle | engine | memory | positions | own MB | estimate MB | measured MB | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for candidate in arguments.candidates:
        found = measure(candidate, arguments.text_tokens, limit)
        if isinstance(found, str):
            print(f"| {Path(candidate.split(':')[0]).name} | {found} |", flush=True)
        else:
            print(row(candidate, found), flush=True)
    machine = describe_machine()
    print(f"\n{machine['processor']}, {', '.join(machine['features'])}, one core")


if __name__ == "__main__":
    main()

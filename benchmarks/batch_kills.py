"""``mobilevlm batch`` on drawn scenes: killed at random moments and resumed, its speed beside a
loop of ``VLM.generate``, and the memory of its processes.

    python benchmarks/batch_kills.py --rows 2000 --kills 5
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mobilevlm
from mobilevlm.nano.drawing import render
from mobilevlm.nano.scenes import sample_scene

QUESTION = "Is there a {thing} in the image?"
THINGS = ("star", "circle", "triangle", "blue square")
TOKENS = 4


def make_rows(folder: Path, rows: int) -> Path:
    """Write scenes, and a table with a question about each."""
    lines = []
    for number in range(rows):
        render(sample_scene(number)).save(folder / f"{number:05}.png")
        lines.append(json.dumps({"image": f"{number:05}.png", "thing": THINGS[number % 4]}))
    table = folder / "rows.jsonl"
    table.write_text("\n".join(lines))
    return table


def start(table: Path, output: Path, *options: str) -> subprocess.Popen[bytes]:
    """Start a run; every call with the same output goes on with it."""
    command = ["batch", "nano", str(table), "-o", str(output), "-p", QUESTION, *options]
    return subprocess.Popen(
        [sys.executable, "-m", "mobilevlm", *command, "-n", str(TOKENS), "--no-plan"],
        stderr=subprocess.DEVNULL,
    )


def done_rows(output: Path) -> int:
    """Return how many rows an unfinished run has done."""
    journal = Path(f"{output}.journal")
    return max(journal.read_bytes().count(b"\n") - 1, 0) if journal.exists() else 0


def killed_run(table: Path, output: Path, rows: int, kills: int) -> list[int]:
    """Kill a run at random moments, go on each time; return the rows that each kill left done."""
    found = []
    for place in sorted(random.sample(range(1, rows), kills)):
        process = start(table, output)
        while done_rows(output) < place and process.poll() is None:
            time.sleep(random.uniform(0, 0.01))
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            raise SystemExit(f"it ended by itself: {process.returncode}")
        found.append(done_rows(output))
    if start(table, output).wait():
        raise SystemExit("the last run failed")
    return found


def answers(output: Path) -> list[tuple[Any, ...]]:
    """Return what is the same in every run: all but the times."""
    rows = map(json.loads, output.read_text().splitlines())
    return [(row["index"], row["answer"], row["error"]) for row in rows]


def loop_speed(table: Path, rows: int) -> float:
    """Return rows/s of a loop in one process with one thread."""
    lines = [json.loads(line) for line in table.read_text().splitlines()[:rows]]
    with mobilevlm.load("nano", threads=1, plan="none") as vlm:
        began = time.perf_counter()
        for row in lines:
            prompt = QUESTION.format(**row)
            vlm.generate(prompt, [table.parent / row["image"]], max_new_tokens=TOKENS)
        return rows / (time.perf_counter() - began)


def memory_of(table: Path, folder: Path, processes: int) -> int:
    """Return bytes of proportional memory of a run with so many processes while it answers."""
    output = folder / f"memory{processes}.jsonl"
    process = start(table, output, "--processes", str(processes))
    while done_rows(output) < 30:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    total = sum(_pss(int(number)) for number in [str(process.pid), *children])
    process.kill()
    process.wait()
    return total


def _pss(process: int) -> int:
    text = Path(f"/proc/{process}/smaps_rollup").read_text()
    found = re.search(r"^Pss: +(\d+) kB", text, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4)))
    options = parser.parse_args()
    random.seed(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = make_rows(folder, options.rows)
        for processes in (1, 2, 4):
            size = memory_of(table, folder, processes) / 1e6
            print(f"{processes} processes: {size:.0f} MB (PSS)", flush=True)
        began, used = time.perf_counter(), os.times()
        if start(table, folder / "whole.jsonl").wait():
            raise SystemExit("the undisturbed run failed")
        wall, now = time.perf_counter() - began, os.times()
        spent = now.children_user + now.children_system
        spent -= used.children_user + used.children_system
        print(f"batch: {options.rows / wall:.1f} rows/s, {1e3 * spent / options.rows:.1f} ms of "
              f"CPU a row", flush=True)  # fmt: skip
        few, cpu = min(options.rows, 200), time.process_time()
        speed = loop_speed(table, few)
        cpu = time.process_time() - cpu
        print(f"loop: {speed:.1f} rows/s, {1e3 * cpu / few:.1f} ms of CPU a row", flush=True)
        left = killed_run(table, folder / "killed.jsonl", options.rows, options.kills)
        same = answers(folder / "killed.jsonl") == answers(folder / "whole.jsonl")
        once = [index for index, *_ in answers(folder / "killed.jsonl")]
        print(f"seed {options.seed}: killed with {left} rows done: each row once: "
              f"{once == list(range(options.rows))}, same answers: {same}")  # fmt: skip


if __name__ == "__main__":
    main()

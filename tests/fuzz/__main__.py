"""``python -m fuzz [NAME …] [--count N | --minutes M] [--seed S] [--only N] [--json FILE]``."""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from fuzz.harness import NAMES, case_random, find_fuzzer, run
from fuzz.worker import outcome_of


def main() -> int:
    """Run fuzzers; exit with 1 where one found something."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {', '.join(NAMES)}")
    parser.add_argument("--count", type=int, default=1_000_000_000, help="cases of each")
    parser.add_argument("--minutes", type=float, help="time for all of them together")
    parser.add_argument("--seed", type=int, help="default: another each time")
    parser.add_argument("--only", type=int, help="run this one case here, errors in full")
    parser.add_argument("--keep", type=Path, help="folder for the files of --only")
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args()
    names = given.names or list(NAMES)
    for name in names:
        if name not in NAMES:
            parser.error(f"no fuzzer {name!r}: expected {', '.join(NAMES)}")
    seed = random.SystemRandom().randrange(1 << 31) if given.seed is None else given.seed
    if given.only is not None:
        return _run_one(names[0], seed, given.only, given.keep)
    if given.minutes is None and given.count == parser.get_default("count"):
        parser.error("give --count or --minutes")
    share = None if given.minutes is None else given.minutes / len(names)
    results = []
    for name in names:
        figures = run(name, given.count, seed, share)
        print(figures.line() + f" (seed {seed})", flush=True)
        for failure in figures.failures[:20]:
            print(f"    {failure}", flush=True)
        results.append(figures)
    if given.json:
        given.json.write_text(json.dumps([asdict(figures) for figures in results], indent=1))
    return int(any(figures.failures for figures in results))


def _run_one(name: str, seed: int, number: int, keep: Path | None) -> int:
    fuzzer = find_fuzzer(name)
    with tempfile.TemporaryDirectory() as folder:
        base, scratch = Path(folder) / "base", keep or Path(folder) / "scratch"
        base.mkdir()
        scratch.mkdir(parents=True, exist_ok=True)
        fuzzer.prepare(base)
        case = fuzzer.mutate(base, case_random(seed, number), scratch)
        print(repr(case)[:2000])
        outcome = outcome_of(fuzzer, case)
        print(outcome)
        if outcome.startswith("raw"):
            fuzzer.attempt(case)
    return 0


if __name__ == "__main__":
    sys.exit(main())

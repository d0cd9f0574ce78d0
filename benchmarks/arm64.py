"""Asks a model the same questions on this machine and on emulated 64-bit Arm processors.

    python benchmarks/arm64.py nano --questions 24
    python benchmarks/arm64.py --prepare           # only makes the arm64 root

Every token of the greedy answers is compared (docs/how-to/arm64.md). Needs a Debian or Ubuntu
system with qemu-user-static; the root is made once, in the cache.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from emulation.answers import __file__ as program
from emulation.answers import answers
from emulation.processors import PROCESSORS, Processor, machine
from emulation.root import make_root, root_folder
from numpy.typing import NDArray

import mobilevlm
from mobilevlm.builtin import BUILT_IN, WEIGHTS
from mobilevlm.console import progress
from mobilevlm.errors import MobileVLMError
from mobilevlm.runtime.machine import describe_machine, int8_weight_bits

HEAD = (
    "| model | processor | as in | same answers | same tokens | right | right here "
    "| visual tokens | logits |\n|---|---|---|---|---|---|---|---|---|"
)


def fair_target() -> str:
    """Return a target that both processors compute with the same integers.

    Arm adds products of 8-bit weights exactly. So does x86 with VNNI; without, sums of two products
    saturate, and weights of 7 bits are what can be compared.
    """
    return "cpu-arm64" if int8_weight_bits() == 8 else "cpu-x86-avx2"


def installed_package(folder: Path) -> Path:
    """A copy of the installed package, for a Python elsewhere. It has no compiled code."""
    for name in ("mobilevlm", "mobilevlm.export", "mobilevlm.runtime"):
        source = Path(str(importlib.import_module(name).__file__)).parent
        shutil.copytree(
            source,
            folder.joinpath(*name.split(".")),
            ignore=shutil.ignore_patterns("__pycache__"),
            dirs_exist_ok=True,
        )
    return folder


def answers_on(
    processor: Processor, root: Path, package: Path, bundle: Path, questions: int
) -> dict[str, NDArray[Any]]:
    """Return the results of ``emulation.answers.answers`` on that processor."""
    with machine(root, processor, package) as emulated, tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "answers.npz"
        emulated.python(program, bundle, questions, output)
        with np.load(output) as stored:
            return dict(stored)


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Euclidean norm of the difference over that of the expected array."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def row(model: str, processor: Processor, here: dict[str, Any], there: dict[str, Any]) -> str:
    """A line of the table."""
    names = [name for name in here if name.startswith("ids.")]
    same = [np.array_equal(here[name], there[name]) for name in names]
    tokens = sum(map(len, (here[name] for name in names)))
    equal = sum(_common(here[name], there[name]) for name in names)
    errors = [f"{relative_error(there[name], here[name]):.1e}" for name in ("visual", "logits")]
    right = [f"{sum(part['right'])}" for part in (there, here)]
    cells = [f"{sum(same)} of {len(names)}", f"{equal} of {tokens}", *right, *errors]
    return f"| {model} | {processor.name} | {processor.example} | {' | '.join(cells)} |"


def _common(here: Sequence[int], there: Sequence[int]) -> int:
    """Tokens up to the first that differs."""
    different = [index for index, (a, b) in enumerate(zip(here, there, strict=False)) if a != b]
    return different[0] if different else min(len(here), len(there))


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", default=["nano"], choices=BUILT_IN)
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument(
        "--processors", nargs="*", default=list(PROCESSORS), choices=list(PROCESSORS)
    )
    parser.add_argument("--prepare", action="store_true", help="only make the arm64 root")
    given = parser.parse_args()
    progress.enable()
    root = make_root(root_folder())
    if given.prepare:
        return
    target = fair_target()
    about = describe_machine()
    print(f"Here: {about['system']}, {', '.join(about['features'])}; target {target}.\n\n{HEAD}")
    with tempfile.TemporaryDirectory() as folder:
        package = installed_package(Path(folder) / "package")
        for model in given.models:
            bundle = Path(folder) / model
            mobilevlm.export(WEIGHTS / model, bundle, target=target, measure=False)
            here = answers(bundle, given.questions)
            for name in given.processors:
                processor = PROCESSORS[name]
                there = answers_on(processor, root, package, bundle, given.questions)
                print(row(model, processor, here, there), flush=True)


if __name__ == "__main__":
    try:
        main()
    except MobileVLMError as error:
        sys.exit(f"arm64: {error}")

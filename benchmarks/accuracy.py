"""Accuracy of a trained checkpoint in every precision and engine, as a Markdown table.

    python benchmarks/accuracy.py nano --questions 2000
    python benchmarks/accuracy.py nano-moe --recipes fp32 int4 --types f32 q4_0 --questions 600

Needs the [export] extra, and [gguf] for GGUF types.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import mobilevlm
from mobilevlm.bundle import open_bundle
from mobilevlm.nano.evaluate import SuiteResult, evaluate_vlm
from mobilevlm.nano.suite import Example, evaluation_set
from mobilevlm.plan import engine_files

RECIPES = ("fp32", "int8", "int4")
TYPES = ("f32", "f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0")


def score(bundle: Path, engine: str, examples: Sequence[Example]) -> SuiteResult:
    """Accuracy of a bundle in one engine."""
    with mobilevlm.load(bundle, engine) as vlm:
        return evaluate_vlm(vlm, examples, blind=False)[0]


def gguf_engines(bundle: Path) -> tuple[str, ...]:
    """Return the engines that run the GGUF decoder of a bundle: llama.cpp, for experts our own
    graph."""
    sparse = open_bundle(bundle).manifest.spec.decoder.experts is not None
    return ("ggml",) if sparse else ("gguf", "hybrid")


def row(cells: Sequence[object]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    """Prints the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--recipes", nargs="*", default=RECIPES)
    parser.add_argument("--types", nargs="*", default=TYPES)
    parser.add_argument("--questions", type=int, default=2000)
    arguments = parser.parse_args()
    examples = evaluation_set(arguments.questions)
    print(row(("precision", "engine", "MB", "right", "95% interval")))
    print(row(["---"] * 5), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for recipe in arguments.recipes:
            bundle = Path(folder) / recipe
            mobilevlm.export(arguments.checkpoint, bundle, recipe=recipe, measure=False)
            show(recipe, bundle, ("onnx",), examples)
        for kind in arguments.types:
            bundle = Path(folder) / kind
            mobilevlm.export(
                arguments.checkpoint,
                bundle,
                recipe="fp32",
                formats=("onnx", "gguf"),
                gguf_type=kind,
                measure=False,
            )
            show(kind, bundle, gguf_engines(bundle), examples)


def show(precision: str, bundle: Path, engines: Sequence[str], examples: Sequence[Example]) -> None:
    """Prints a line of the table per engine."""
    for engine in engines:
        result = score(bundle, engine, examples).overall
        with mobilevlm.load(bundle, engine) as vlm:
            size = sum(
                vlm.bundle.path(name).stat().st_size for name in engine_files(vlm.bundle, engine)
            )
        interval = f"{result.low:.1%} – {result.high:.1%}"
        print(row((precision, engine, f"{size / 1e6:.1f}", f"{result.accuracy:.1%}", interval)))
        sys.stdout.flush()


if __name__ == "__main__":
    main()

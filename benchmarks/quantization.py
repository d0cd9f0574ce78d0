"""All quantization methods on one checkpoint: size, divergence and accuracy, as a Markdown table.

    python benchmarks/quantization.py nano results.jsonl
    python benchmarks/quantization.py nano results.jsonl --only q4 --questions 480

Every row is the decoder's ONNX file, run as on a device: its tokens are compared with the float32
reference's where the reference answers, given the reference's visual tokens. The image encoder
stays float32, except in rows of int8, which are whole models; accuracy is that of the bundle.
Results are kept in the file and not measured again. Needs the [reference] extra.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accuracy import row, score

import mobilevlm
from mobilevlm.bundle import open_bundle
from mobilevlm.export.calibration import (
    held_out_samples,
    measuring_samples,
    sample_ids,
    scene_samples,
)
from mobilevlm.export.figures import Float32, compare_logits, token_figures
from mobilevlm.export.recipe_file import recipe_text
from mobilevlm.export.recipes import Limits, LinearFormat, Recipe
from mobilevlm.export.search import Data, Goal, candidates, search
from mobilevlm.export.sensitivity import answer_positions
from mobilevlm.families import Model, open_checkpoint
from mobilevlm.image import open_image, preprocess
from mobilevlm.nano.suite import evaluation_set
from mobilevlm.reference import load_reference

METHODS = {
    "rtn": ("rtn", "none"),
    "hqq": ("hqq", "none"),
    "gptq": ("gptq", "none"),
    "awq + rtn": ("rtn", "awq"),
    "awq + hqq": ("hqq", "awq"),
    "awq + gptq": ("gptq", "awq"),
}
MIXED = (3.0, 3.5)
"""Bits per weight that the search is to meet."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: a recipe, or a search for one."""

    label: tuple[str, ...]
    """Method, bits, block, zero points"""
    formats: LinearFormat | None
    goal: Goal | None = None
    scored: bool = False
    """Whether its accuracy is worth the time"""


def cases() -> Iterator[Case]:
    """All rows of the table."""
    yield Case(("float32", "32", "", ""), LinearFormat("fp32"), scored=True)
    for quantizer in ("rtn", "hqq", "gptq"):
        for scaling in ("none", "smoothquant"):
            name = quantizer if scaling == "none" else f"smoothquant + {quantizer}"
            formats = LinearFormat("int8", quantizer, scaling)  # type: ignore[arg-type]
            yield Case((name, "int8", "row", "no"), formats, scored=quantizer != "hqq")
    for precision in ("q4", "q2", "q8"):
        for size in (16, 32, 64, 128):
            for symmetric in (True, False):
                for name, (quantizer, scaling) in METHODS.items():
                    if precision == "q8" and (name not in ("rtn", "gptq") or not symmetric):
                        continue
                    formats = LinearFormat(precision, quantizer, scaling, size, symmetric)  # type: ignore[arg-type]
                    zeros = "no" if symmetric else "yes"
                    scored = size == 32 or (precision == "q4" and size == 128 and not symmetric)
                    yield Case((name, precision[1], str(size), zeros), formats, scored=scored)
    for bits in MIXED:
        for quantizer in ("rtn", "hqq", "gptq"):
            yield Case((quantizer, f"mixed {bits}", "", ""), None, Goal(bits), scored=True)


class Bench:
    """The float32 answers, and a bundle folder that is used again and again."""

    def __init__(self, model: Model, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.embeds: list[Float32] = []
        self.tails: list[int] = []
        exact = []
        reference = load_reference(model)
        with torch.no_grad():
            for sample in held_out_samples("scenes"):
                pixels = [preprocess(open_image(item), model.spec.image) for item in sample.images]
                tokens = [reference.visual_tokens(item) for item in pixels]
                embeds = reference.embed(sample_ids(model, sample), tokens)
                self.tails.append(answer_positions(model, sample))
                self.embeds.append(embeds.numpy())
                exact.append(reference.logits(embeds).numpy()[-self.tails[-1] :])
        self.exact = exact

    def recipe(self, case: Case) -> Recipe:
        """The case's decoder, and float32 or int8 for the rest."""
        limits, layers = Limits(1e9, 1e9), case.formats
        if layers is None:
            layers = LinearFormat("q4")
        rest = layers if layers.precision == "int8" else LinearFormat("fp32")
        plain = dataclasses.replace(rest, scaling="none")
        recipe = Recipe("case", rest, plain, layers, layers, "fp16", limits)
        if case.goal is None:
            return recipe
        data = Data(scene_samples(), measuring_samples("scenes"))
        found = search(self.model, case.goal, candidates(case.label[0]), data)  # type: ignore[arg-type]
        return dataclasses.replace(recipe, layers=found.layers)

    def run(self, case: Case, checkpoint: str, questions: int) -> dict[str, Any]:
        """Exports and measures a case."""
        path = self.folder / "case.toml"
        path.write_text(recipe_text(self.recipe(case), self.folder))
        bundle = self.folder / "bundle"
        manifest = mobilevlm.export(checkpoint, bundle, recipe=str(path), measure=False)
        artifact = open_bundle(bundle).artifact("decoder", "onnx")
        with mobilevlm.load(bundle) as vlm:
            pairs = zip(self.embeds, self.tails, strict=True)
            found = [vlm.embeds_logits(embeds)[-tail:] for embeds, tail in pairs]
        compared = map(compare_logits, found, self.exact)
        result: dict[str, Any] = {
            "label": case.label,
            "bytes": sum(manifest.files[name].size for name in artifact.files),
            "bits": artifact.bits_per_weight,
            **token_figures(list(compared)),
            "questions": questions if case.scored else 0,
        }
        if result["questions"]:
            overall = score(bundle, "onnx", evaluation_set(questions)).overall
            result |= {"accuracy": overall.accuracy, "low": overall.low, "high": overall.high}
        return result


def show(results: Sequence[dict[str, Any]]) -> None:
    """The table."""
    names = ("method", "bits", "block", "zero points", "MB", "bits/weight", "KL", "top-1", "right")
    print(row(names))
    print(row(["---"] * len(names)))
    for result in results:
        right = f"{result['accuracy']:.1%}" if result["questions"] else ""
        cells = f"{result['bytes'] / 1e6:.2f}", f"{result['bits']:.2f}", f"{result['kl']:.4f}"
        print(row((*result["label"], *cells, f"{result['top1_agreement']:.1%}", right)))


def main() -> None:
    """Measures what the file does not hold yet, then prints all of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("results", type=Path)
    parser.add_argument("--only", default="", help="rows with this in method and bits")
    parser.add_argument("--questions", type=int, default=480)
    arguments = parser.parse_args()
    wanted = [case for case in cases() if arguments.only in " ".join(case.label)]
    text = arguments.results.read_text() if arguments.results.exists() else ""
    kept = {tuple(item["label"]): item for item in map(json.loads, text.splitlines())}
    missing = [
        case
        for case in wanted
        if case.label not in kept
        or (case.scored and kept[case.label]["questions"] < arguments.questions)
    ]
    if missing:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(open_checkpoint(Path(arguments.checkpoint)), Path(folder))
            for case in missing:
                result = bench.run(case, arguments.checkpoint, arguments.questions)
                kept[case.label] = result
                with arguments.results.open("a") as file:
                    file.write(json.dumps(result) + "\n")
    show([kept[case.label] for case in wanted])


if __name__ == "__main__":
    main()

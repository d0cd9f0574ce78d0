"""All quantization methods on one checkpoint: size, divergence and accuracy, as a Markdown table.

    python benchmarks/quantization.py nano results.jsonl
    python benchmarks/quantization.py nano results.jsonl --only '^rtn 4 (32|128)' --questions 240

Every row is the decoder's ONNX file, run as on a device: its tokens are compared with the float32
reference's where the reference answers, given the reference's visual tokens. The image encoder
stays float32, except in rows of int8, which are whole models; accuracy is that of the bundle. All
rows answer the same questions, so beside their shares of right answers the table has which of
float32's were lost and won. A float32 encoder sees each image once for all rows. Results are kept
in the file and not measured again. Needs the [reference] extra.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from accuracy import row
from PIL import Image
from tokenizers import Tokenizer

import mobilevlm
from mobilevlm.bundle import TOKENIZER, Bundle, open_bundle
from mobilevlm.export.calibration.samples import (
    held_out_samples,
    measuring_samples,
    sample_arrays,
    sample_pieces,
    scene_samples,
)
from mobilevlm.export.quality.metrics import Float32, compare_logits, token_figures
from mobilevlm.export.quality.sensitivity import answer_positions
from mobilevlm.export.recipes.file import recipe_text
from mobilevlm.export.search.search import Data, Goal, Sensitivity, candidates, choose, measure
from mobilevlm.families import open_checkpoint
from mobilevlm.model import Model
from mobilevlm.nano.evaluate import LONGEST_ANSWER, is_right
from mobilevlm.nano.questions import Question
from mobilevlm.nano.suite import evaluation_set, images_of
from mobilevlm.plan import Plan
from mobilevlm.prompt import Arrays, Rows
from mobilevlm.recipe import Limits, LinearFormat, QuantizerName, Recipe, ScalingName
from mobilevlm.reference import load_reference
from mobilevlm.runtime.engines import EncoderEngine
from mobilevlm.runtime.engines.opening import open_engines, stored_system_prompt
from mobilevlm.runtime.sequence.cache import DEFAULT_CACHE_MB, PromptCache
from mobilevlm.runtime.vlm import VLM

METHODS: dict[str, tuple[QuantizerName, ScalingName]] = {
    "rtn": ("rtn", "none"),
    "hqq": ("hqq", "none"),
    "gptq": ("gptq", "none"),
    "awq + rtn": ("rtn", "awq"),
    "awq + hqq": ("hqq", "awq"),
    "awq + gptq": ("gptq", "awq"),
}
MIXED = (3.0, 3.5)
"""Bits per weight that the search is to meet."""
FLOAT32 = ("float32", "32", "", "")


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: a recipe, or a search for one."""

    label: tuple[str, ...]
    """Method, bits, block, zero points"""
    formats: LinearFormat | None
    goal: Goal | None = None


def cases() -> Iterator[Case]:
    """All rows of the table."""
    yield Case(FLOAT32, LinearFormat("fp32"))
    for quantizer in ("rtn", "hqq", "gptq"):
        for scaling in ("none", "smoothquant"):
            name = quantizer if scaling == "none" else f"smoothquant + {quantizer}"
            formats = LinearFormat("int8", quantizer, scaling)
            yield Case((name, "int8", "row", "no"), formats)
    for precision in ("q4", "q2", "q8"):
        for size in (16, 32, 64, 128):
            for symmetric in (True, False):
                for name, (quantizer, scaling) in METHODS.items():
                    if precision == "q8" and (name not in ("rtn", "gptq") or not symmetric):
                        continue
                    formats = LinearFormat(precision, quantizer, scaling, size, symmetric)
                    zeros = "no" if symmetric else "yes"
                    yield Case((name, precision[1], str(size), zeros), formats)
    for bits in MIXED:
        for quantizer in ("rtn", "hqq", "gptq"):
            yield Case((quantizer, f"mixed {bits}", "", ""), None, Goal(bits))


class Suite:
    """Questions about images that are drawn once."""

    def __init__(self, count: int) -> None:
        self.asked: list[tuple[Question, list[Image.Image]]] = [
            (example.question, images_of(example)) for example in evaluation_set(count)
        ]

    def wrong(self, vlm: VLM) -> list[int]:
        """Numbers of the questions that are not answered right."""
        said = (
            vlm.generate(question.text, images, max_new_tokens=LONGEST_ANSWER).text
            for question, images in self.asked
        )
        pairs = enumerate(zip(self.asked, said, strict=True))
        return [number for number, ((asked, _), text) in pairs if not is_right(asked, text)]


class Remembering:
    """An image encoder that encodes no image that is known."""

    def __init__(self, engine: EncoderEngine, known: dict[bytes, Rows]) -> None:
        self._engine, self._known = engine, known
        self.features, self.close = engine.features, engine.close

    def encode(self, arrays: Arrays) -> Rows:
        """Named arrays to visual tokens."""
        key = b"".join(array.tobytes() for array in arrays.values())
        if key not in self._known:
            self._known[key] = self._engine.encode(arrays)
        return self._known[key]


def open_remembering(bundle: Bundle, known: dict[bytes, Rows]) -> VLM:
    """A bundle with such an encoder, on one thread: ratios of speed are not asked for here."""
    plan, system = Plan("onnx", 1, 1, spinning=False), bundle.manifest.system_prompt
    vision, decoder = open_engines(bundle, plan)
    stored = () if system is None else (system.ids, stored_system_prompt(bundle))
    cache = PromptCache(DEFAULT_CACHE_MB, *stored)
    tokenizer = Tokenizer.from_file(str(bundle.path(TOKENIZER)))
    return VLM(bundle, tokenizer, Remembering(vision, known), decoder, cache, plan, 0)


class Bench:
    """The float32 answers, and a bundle folder that is used again and again."""

    def __init__(self, model: Model, folder: Path, questions: int) -> None:
        self.model, self.folder = model, folder
        self.data = Data(scene_samples(), measuring_samples("scenes"))
        self.suite = Suite(questions) if questions else None
        self.seen: dict[bytes, Rows] = {}
        """Visual tokens of the float32 encoder"""
        self.embeds: list[Float32] = []
        self.tails: list[int] = []
        exact = []
        reference = load_reference(model)
        with torch.no_grad():
            for sample in held_out_samples("scenes"):
                tokens = [
                    reference.visual_tokens(**item) for item in sample_arrays(model, [sample])
                ]
                embeds = reference.embed(sample_pieces(model, sample), tokens)
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
        found = choose(self.model, case.goal, self.sensitivity, self.data).layers
        quantizer = cast(QuantizerName, case.label[0])
        rounded = {
            name: dataclasses.replace(layers, quantizer=quantizer) for name, layers in found.items()
        }
        recipe = dataclasses.replace(recipe, layers=rounded)
        if self.model.spec.decoder.experts:
            recipe = dataclasses.replace(recipe, experts="plain")  # each has its own bits
        return recipe

    @cached_property
    def sensitivity(self) -> Sensitivity:
        """Measure the decoder, rounded by GPTQ; the other quantizers get the same plan."""
        return measure(self.model, candidates("gptq"), self.data)

    def run(self, case: Case, checkpoint: str, questions: int) -> dict[str, Any]:
        """Exports and measures a case."""
        recipe = self.recipe(case)
        path = self.folder / "case.toml"
        path.write_text(recipe_text(recipe, self.folder))
        manifest = mobilevlm.export(
            checkpoint, self.folder / "bundle", recipe=str(path), measure=False
        )
        bundle = open_bundle(self.folder / "bundle")
        artifact = bundle.artifact("decoder", "onnx")
        seen = self.seen if recipe.tower.precision == "fp32" else {}
        with open_remembering(bundle, seen) as vlm:
            pairs = zip(self.embeds, self.tails, strict=True)
            found = [vlm.embeds_logits(embeds, count=tail) for embeds, tail in pairs]
            wrong = self.suite.wrong(vlm) if self.suite else []
        compared = map(compare_logits, found, self.exact)
        return {
            "label": case.label,
            "bytes": sum(manifest.files[name].size for name in artifact.files),
            "bits": artifact.bits_per_weight,
            **token_figures(list(compared)),
            "questions": questions,
            "wrong": wrong,
        }


def show(results: Sequence[dict[str, Any]], exact: dict[str, Any] | None) -> None:
    """The table; ``exact``: float32's result."""
    names = ("method", "bits", "block", "zero points", "MB", "bits/weight", "KL", "top-1")
    print(row((*names, "right", "lost", "won")))
    print(row(["---"] * (len(names) + 3)))
    for result in results:
        cells = [f"{result['bytes'] / 1e6:.2f}", f"{result['bits']:.2f}", f"{result['kl']:.2g}"]
        cells += [f"{result['top1_agreement']:.1%}", "", "", ""]
        if asked := result["questions"]:
            wrong = set(result["wrong"])
            cells[-3] = f"{1 - len(wrong) / asked:.1%}"
            if exact and exact["questions"] == asked:
                theirs = set(exact["wrong"])
                cells[-2:] = str(len(wrong - theirs)), str(len(theirs - wrong))
        print(row((*result["label"], *cells)))


def main() -> None:
    """Measures what the file does not hold yet, then prints all of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("results", type=Path)
    parser.add_argument(
        "--only",
        nargs="*",
        default=[""],
        help="rows where one of these regular expressions is in 'method bits block', in this order",
    )
    parser.add_argument("--questions", type=int, default=480)
    parser.add_argument("--show", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    wanted = list(
        dict.fromkeys(
            case
            for pattern in arguments.only
            for case in cases()
            if re.search(pattern, " ".join(case.label))
        )
    )
    text = arguments.results.read_text() if arguments.results.exists() else ""
    kept = {tuple(item["label"]): item for item in map(json.loads, text.splitlines())}
    missing = [
        case
        for case in wanted
        if case.label not in kept or kept[case.label]["questions"] < arguments.questions
    ]
    if missing and not arguments.show:
        with tempfile.TemporaryDirectory() as folder:
            model = open_checkpoint(Path(arguments.checkpoint))
            bench = Bench(model, Path(folder), arguments.questions)
            for case in missing:
                result = bench.run(case, arguments.checkpoint, arguments.questions)
                kept[case.label] = result
                with arguments.results.open("a") as file:
                    file.write(json.dumps(result) + "\n")
    show([kept[case.label] for case in wanted if case.label in kept], kept.get(FLOAT32))


if __name__ == "__main__":
    main()

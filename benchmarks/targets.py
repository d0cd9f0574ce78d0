"""Exports the built-in models to every target and writes what came of it as a table.

    python benchmarks/targets.py --output docs/targets.md --questions 240

For each target and stage: artifact, size, coverage by the target's compiler, how far its emulator
is from ONNX Runtime on the same graph, and how many questions are answered right.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import mobilevlm
from mobilevlm import progress
from mobilevlm.builtin import BUILT_IN, WEIGHTS
from mobilevlm.bundle import Artifact, Bundle, Compiled, open_bundle
from mobilevlm.export.calibration import held_out_samples
from mobilevlm.export.htp import Chip, compile_graphs, emulate
from mobilevlm.export.targets import Target, find_target, target_names
from mobilevlm.image import open_image, preprocess
from mobilevlm.nano.evaluate import evaluate_vlm
from mobilevlm.nano.suite import evaluation_set
from mobilevlm.runtime.engines.npu import FIXED_POINT, causal_mask, signed_tables
from mobilevlm.runtime.engines.onnx import open_session

HEAD = """\
# Targets

    mobilevlm targets
    mobilevlm export CHECKPOINT -o BUNDLE --target android-qnn-sm8650

A target (export/targets/NAME.toml) settles recipe, kinds of artifacts, shapes and weight bits of
an export, and what its result is checked against: the memory that it takes, and for an NPU that the
vendor's compiler takes every operator. An export that fails a check leaves no bundle and ends with
exit code 1 and one line. Memory is what a process has in use while it answers about one picture, in
the setting that [`load` would choose](runtime.md#memory), without pages of the model's files.
[npu.md](npu.md) tells about the NPU's graphs.

"""

TABLE = """\
## What the exports gave

Written by `python benchmarks/targets.py --output docs/targets.md`. Coverage: operators
(QuantizeLinear and DequantizeLinear included) that the compiler took of those in the graphs.
Emulator: relative error of its outputs against ONNX Runtime on the same graph, on a scene that
calibration has not seen; of the decoder, the logits after the first chunk of {chunk} positions and
of one token more. Accuracy: share of {questions} questions about drawn scenes that are answered
right on this machine's processor (of the NPU targets, by the same fixed-point graphs), and in
float32. A dash: the export proves the memory only.

| model | target | stage | artifact | MB | coverage | compiled in | emulator | accuracy | float32 |
|---|---|---|---|---|---|---|---|---|---|
"""


ASKED = """\
Accuracy: share of {questions} questions about drawn scenes that are answered
right on this machine's processor (of the NPU targets, by the same fixed-point graphs), and in
float32. A dash: the export proves the memory only.
"""
UNASKED = """\
Accuracy was not measured (`--questions 0`). Other dashes: the export proves the memory only.
"""


def main() -> None:
    """Exports, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=240, help="0: no accuracy")
    parser.add_argument("--targets", nargs="*", default=target_names())
    parser.add_argument("--models", nargs="*", default=list(BUILT_IN))
    given = parser.parse_args()
    lines: list[str] = []
    progress.enable()
    with tempfile.TemporaryDirectory() as folder:
        for model in given.models:
            lines += _model_lines(model, given.targets, Path(folder), given.questions)
    text = (TABLE if given.questions else TABLE.replace(ASKED, UNASKED)).format(
        chunk=find_target(given.targets[0]).chunk_length, questions=given.questions
    )
    about = f"\nMachine: {platform.system()} {platform.machine()}.\n"
    given.output.write_text(HEAD + text + "\n".join(lines) + "\n" + about, encoding="utf-8")


def _model_lines(model: str, targets: list[str], folder: Path, questions: int) -> Iterator[str]:
    exact = folder / f"{model}-float"
    mobilevlm.export(WEIGHTS / model, exact, recipe="fp32", measure=False)
    best, found = _accuracy(exact, questions), dict[str, str]()
    for name in targets:
        target = find_target(name)
        alike = f"{target.recipe}-{target.weight_bits}-{target.layer_norm}"
        place = folder / f"{model}-{alike}"  # the next export takes the same graphs over
        mobilevlm.export(WEIGHTS / model, place, target=name, measure=False)
        bundle = open_bundle(place)
        if alike not in found:
            found[alike] = _accuracy(place, questions)
        for artifact in bundle.manifest.artifacts:
            if artifact.stage != "embeddings":
                cells = " | ".join(_cells(bundle, artifact, target))
                yield f"| {model} | {name} | {artifact.stage} | {cells} | {found[alike]} | {best} |"


def _accuracy(folder: Path, questions: int) -> str:
    if not questions:
        return "–"
    with mobilevlm.load(folder) as vlm:
        result, _ = evaluate_vlm(vlm, evaluation_set(questions), False, lambda *_: None)
    return f"{result.overall.accuracy:.1%}"


def _cells(bundle: Bundle, artifact: Artifact, target: Target) -> list[str]:
    """Artifact, size, coverage, emulator."""
    parts = [part for part in bundle.manifest.compiled if part.stage == artifact.stage]
    files = parts[0].files if parts else artifact.files
    size = sum(bundle.manifest.files[name].size for name in files) / 1e6
    shown = files[0] if parts else artifact.path
    if not parts or target.htp is None:
        return [f"`{shown}`", f"{size:.1f}", "–", "–", "–"]
    errors = (_vision_error if artifact.stage == "vision" else _decoder_errors)(
        bundle, artifact, parts[0], target.htp
    )
    cells = ", ".join(f"{error:.2%}" for error in errors)
    graphs = [bundle.path(name) for name in artifact.files if name.endswith(".onnx")]
    with tempfile.TemporaryDirectory() as folder:
        again = compile_graphs(graphs, Path(folder), target.htp)
    nodes, seconds = parts[0].nodes, sum(part.seconds for part in again)
    return [f"`{shown}`", f"{size:.1f}", f"{nodes} of {nodes}", f"{seconds:.1f} s", cells]


def _vision_error(
    bundle: Bundle, artifact: Artifact, compiled: Compiled, chip: Chip
) -> list[float]:
    pixels = {"pixels": _pixels(bundle)}
    session = open_session(bundle.path(artifact.path), 2, entries=FIXED_POINT)
    (expected,) = session.run(["visual_tokens"], pixels)
    (found,) = emulate(bundle.path(compiled.files[0]), chip, pixels, ["visual_tokens"])
    return [_error(found, expected)]


def _decoder_errors(
    bundle: Bundle, artifact: Artifact, compiled: Compiled, chip: Chip
) -> list[float]:
    """Of the chunk graph, and of the graph for a token after that chunk."""
    spec = bundle.manifest.spec.decoder
    with mobilevlm.load(bundle.folder) as vlm:
        image = held_out_samples("scenes")[0].images[0]
        rows = vlm.encode_image(image)
    cos, sin = signed_tables(spec)
    errors, start = [], 0
    buffers: dict[str, NDArray[np.uint8]] = {}
    graphs = [name for name in artifact.files if name.endswith(".onnx")]
    for graph, ready in zip(graphs, compiled.files, strict=False):
        session = open_session(bundle.path(graph), 2, entries=FIXED_POINT)
        shapes = {value.name: value.shape for value in session.get_inputs()}
        states = [name for name in shapes if name.startswith("past_key_values")]
        buffers = buffers or {name: np.zeros(shapes[name], np.uint8) for name in states}
        length, window = shapes["inputs_embeds"][1], shapes[states[0]][2]
        here = np.arange(start, start + length)
        inputs = {
            "inputs_embeds": rows[None, here],
            "attention_mask": causal_mask(length, window, start),
            "rotary_cos": cos[None, here, None],
            "rotary_sin": sin[None, here, None],
            "logits_position": np.array([length - 1], np.int32),
            **buffers,
        }
        presents = [name.replace("past_key_values", "present") for name in states]
        expected, *made = session.run(["logits", *presents], inputs)
        (found,) = emulate(bundle.path(ready), chip, inputs, ["logits"])
        errors.append(_error(found, expected))
        for name, present in zip(states, made, strict=True):
            buffers[name][:, :, start : start + length] = present
        start += length
    return errors


def _pixels(bundle: Bundle) -> NDArray[np.uint8]:
    image = held_out_samples("scenes")[0].images[0]
    return preprocess(open_image(image), bundle.manifest.spec.image)[None]


def _error(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


if __name__ == "__main__":
    main()

"""Exports the built-in models to every target and writes what came of it as a table.

    python benchmarks/targets.py --output docs/reference/targets.md --questions 240

For each target and stage: artifact, size, coverage by the target's compiler or accelerator, how far
its emulator is from ONNX Runtime on the same graph, and how many questions are answered right.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import mobilevlm
from mobilevlm.builtin import BUILT_IN, WEIGHTS
from mobilevlm.bundle import Artifact, Bundle, Compiled, Coverage, open_bundle
from mobilevlm.console import progress
from mobilevlm.export.calibration.samples import held_out_samples
from mobilevlm.export.targets import Target, find_target, target_names
from mobilevlm.export.targets.htp import Chip, compile_graphs, emulate
from mobilevlm.nano.evaluate import evaluate_vlm
from mobilevlm.nano.suite import evaluation_set
from mobilevlm.preparation import prepare
from mobilevlm.runtime.engines.onnx.engine import open_session
from mobilevlm.runtime.engines.onnx.npu import FIXED_POINT, causal_mask, signed_tables

HEAD = """\
# Targets

    mobilevlm targets
    mobilevlm export CHECKPOINT -o BUNDLE --target android-qnn-sm8650

A target (export/targets/NAME.toml) settles recipe, kinds of artifacts, shapes and weight bits of
an export, and what its result is checked against: the memory that it takes, for an NPU that the
vendor's compiler takes every operator, and for an accelerator behind ONNX Runtime that it takes the
share of them that the target asks for. An export that fails a check leaves no bundle and ends with
exit code 1 and one line. Memory is what a process has in use while it answers about one image, in
the setting that [`load` would choose](../explanation/runtime.md#memory), without pages of the
model's files. [npu.md](../explanation/npu.md) tells about the NPU's graphs,
[mobile.md](../how-to/mobile.md) about Core ML, XNNPACK and .ort files.

"""

COLUMNS = (
    "model", "target", "stage", "artifact", "MB", "coverage", "left to the CPU", "compiled in",
    "emulator", "accuracy", "float32",
)  # fmt: skip
TABLE = """\
## What the exports gave

Written by `python benchmarks/targets.py --output docs/reference/targets.md`. Coverage: operators
(QuantizeLinear and DequantizeLinear included) that the compiler took of those in the graphs; for
Core ML and XNNPACK those that the accelerator takes by our table of its operators, in how
many parts (of the decoder in each of its two graphs), and its share of the multiplications.
Emulator: relative error of its outputs against ONNX Runtime on the same graph, on a scene that
calibration has not seen; of the decoder, the logits after the first chunk of {chunk} positions and
of one token more. Accuracy: share of {questions} questions about drawn scenes that are answered
right on this machine's processor (of the NPU targets, by the same fixed-point graphs), and in
float32. A dash: the export proves the memory only.

{columns}
"""

PHONES = """
## For phones

Files in ONNX Runtime's own format, the operators that a reduced build of it has to have for them,
and the size that such a library is expected to have (arm64, without accelerators: estimated from
published sizes of other builds, [mobile.md](../how-to/mobile.md); none was built here).

| model | target | .ort MB | operators | reduced build | Core ML package |
|---|---|---|---|---|---|
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
    phones: list[str] = []
    progress.enable()
    with tempfile.TemporaryDirectory() as folder:
        for model in given.models:
            lines += _model_lines(model, given.targets, Path(folder), given.questions, phones)
    text = (TABLE if given.questions else TABLE.replace(ASKED, UNASKED)).format(
        chunk=find_target(given.targets[0]).chunk_length,
        questions=given.questions,
        columns=f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}",
    )
    about = f"\nMachine: {platform.system()} {platform.machine()}.\n"
    if phones:
        about = PHONES + "\n".join(phones) + "\n" + about
    parts = HEAD, _verified(given.targets), text, "\n".join(lines), "\n", about
    given.output.write_text("".join(parts), encoding="utf-8")


def _verified(names: list[str]) -> str:
    """How each target is verified, as ``mobilevlm targets`` says it."""
    lines = ["## How each is verified", "", "| target | device | verified |", "|---|---|---|"]
    for target in map(find_target, names):
        lines.append(f"| {target.name} | {target.description} | {target.verified} |")
    return "\n".join([*lines, "", ""])


def _model_lines(
    model: str, targets: list[str], folder: Path, questions: int, phones: list[str]
) -> Iterator[str]:
    """Rows of the first table; adds those of the second."""
    exact = folder / f"{model}-float"
    mobilevlm.export(WEIGHTS / model, exact, recipe="fp32", measure=False)
    best, found = _accuracy(exact, questions), dict[str, str]()
    for name in targets:
        target = find_target(name)
        alike = "-".join(map(str, _settings(target)))
        place = folder / f"{model}-{alike}"  # the next export takes the same graphs over
        mobilevlm.export(WEIGHTS / model, place, target=name, measure=False)
        bundle = open_bundle(place)
        if alike not in found:
            found[alike] = _accuracy(place, questions)
        if bundle.manifest.reduced_build is not None:
            phones.append(f"| {model} | {name} | {' | '.join(_phone_cells(bundle))} |")
        for artifact in bundle.manifest.artifacts:
            if artifact.stage != "embeddings" and artifact.format != "ort":
                cells = " | ".join(_cells(bundle, artifact, target))
                yield f"| {model} | {name} | {artifact.stage} | {cells} | {found[alike]} | {best} |"


def _settings(target: Target) -> tuple[str | int | None, ...]:
    """Return the settings that the answers depend on."""
    precisions = target.recipe, target.vision, target.weight_bits
    return (*precisions, target.layer_norm, target.operators, target.experts)


def _accuracy(folder: Path, questions: int) -> str:
    if not questions:
        return "–"
    with mobilevlm.load(folder) as vlm:
        result, _ = evaluate_vlm(vlm, evaluation_set(questions), False, lambda *_: None)
    return f"{result.overall.accuracy:.1%}"


def _cells(bundle: Bundle, artifact: Artifact, target: Target) -> list[str]:
    """Artifact, size, coverage, what is left to the processor, compile time, emulator."""
    if target.provider is not None:
        return _provider_cells(bundle, artifact)
    parts = [part for part in bundle.manifest.compiled if part.stage == artifact.stage]
    files = parts[0].files if parts else artifact.files
    size = sum(bundle.manifest.files[name].size for name in files) / 1e6
    shown = files[0] if parts else artifact.path
    if not parts or target.htp is None:
        return [f"`{shown}`", f"{size:.1f}", "–", "–", "–", "–"]
    errors = (_vision_error if artifact.stage == "vision" else _decoder_errors)(
        bundle, artifact, parts[0], target.htp
    )
    cells = ", ".join(f"{error:.2%}" for error in errors)
    graphs = [bundle.path(name) for name in artifact.files if name.endswith(".onnx")]
    with tempfile.TemporaryDirectory() as folder:
        again = compile_graphs(graphs, Path(folder), target.htp)
    nodes, seconds = parts[0].nodes, sum(part.seconds for part in again)
    return [f"`{shown}`", f"{size:.1f}", f"{nodes} of {nodes}", "–", f"{seconds:.1f} s", cells]


def _provider_cells(bundle: Bundle, artifact: Artifact) -> list[str]:
    """The same of a stage that ONNX Runtime gives to an accelerator, or to none."""
    ready = bundle.artifact(artifact.stage, "ort")
    size = sum(bundle.manifest.files[name].size for name in ready.files) / 1e6
    taken = [part for part in bundle.manifest.coverage if part.stage == artifact.stage]
    return [f"`{ready.path}`", f"{size:.1f}", _coverage(taken), _left(taken), "–", "–"]


def _coverage(parts: list[Coverage]) -> str:
    if not parts:
        return "– (for the CPU)"
    taken, nodes = (sum(getattr(part, name) for part in parts) for name in ("taken", "nodes"))
    pieces = " + ".join(str(part.parts) for part in parts)
    plural, work = "" if pieces == "1" else "s", min(part.multiplications for part in parts)
    return f"{taken} of {nodes} in {pieces} part{plural}, {work:.0%}"


def _left(parts: list[Coverage]) -> str:
    found: Counter[str] = Counter()
    for part in parts:
        found.update(part.left)
    return ", ".join(f"{count} {reason}" for reason, count in found.items()) or "–"


def _phone_cells(bundle: Bundle) -> list[str]:
    """Size of .ort files, operators of a reduced build, its size, Core ML package."""
    manifest = bundle.manifest
    build = manifest.reduced_build
    assert build is not None
    names = [name for part in manifest.artifacts if part.format == "ort" for name in part.files]
    size = sum(manifest.files[name].size for name in names) / 1e6
    packages = []
    for package in manifest.packages:
        weight = sum(manifest.files[name].size for name in package.files) / 1e6
        count = sum(package.operators.values())
        packages.append(
            f"`{package.path}`, {weight:.1f} MB, {count} operators, {package.precision}"
        )
    reduced = f"about {build.estimated_mb:.1f} MB"
    return [f"{size:.1f}", str(build.operators), reduced, "; ".join(packages) or "–"]


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
    """Return the errors of the chunk graph, and of the graph for a token after that chunk."""
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
        inputs: dict[str, NDArray[Any]] = {
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
    return prepare(image, bundle.manifest.spec.image).arrays[0]["pixels"][None]


def _error(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


if __name__ == "__main__":
    main()

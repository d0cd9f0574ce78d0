"""Bundles from strangers: manifests, graphs and files changed and signed anew.

A bundle that is accepted is loaded by one of its engines, answers a question about an image, and
is shown by ``inspect``.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

import mobilevlm
from fuzz.harness import Fuzzer
from fuzz.mutations import NUMBERS, mutate_bytes, mutate_json
from mobilevlm.bundle import MANIFEST, _digest
from mobilevlm.errors import PlanWarning, PrecisionWarning
from mobilevlm.plan import Plan
from mobilevlm.whole_file import file_sha256

CHECKPOINT = Path(__file__).parents[1] / "data" / "llava_v1"
RUNS = {
    "onnx": (Plan("onnx"), Plan("onnx", memory="compact"), Plan("onnx", memory="in turn")),
    "npu": (Plan("npu"), Plan("ort")),
}
"""By the bundles of ``prepare``."""


@dataclass(frozen=True)
class Case:
    """A bundle and how it is run."""

    folder: Path
    image: Path
    plan: Plan


def prepare(folder: Path) -> None:
    """Export a bundle for processors, with a prefill graph, and one for accelerators."""
    checkpoint, tower = CHECKPOINT / "checkpoint", CHECKPOINT / "vision_tower"
    for name, recipe, target in (("onnx", "fast", None), ("npu", None, "ios-coreml")):
        mobilevlm.export(
            checkpoint,
            folder / name,
            vision_tower=tower,
            recipe=recipe,
            target=target,
            measure=False,
        )
    shutil.copyfile(CHECKPOINT / "image.png", folder / "image.png")


def mutate(base: Path, random: random.Random, scratch: Path) -> Case:
    """Link a bundle's files into the scratch folder and change one or a few things."""
    kind = random.choice(sorted(RUNS))
    folder = scratch / "bundle"
    for path in sorted((base / kind).rglob("*")):
        if path.is_file():
            copy = folder / path.relative_to(base / kind)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy) if path.name == MANIFEST else _link(path, copy)
    data = json.loads((folder / MANIFEST).read_text())
    plan = random.choice(RUNS[kind])
    change = random.choices(
        (_change_spec, _change_manifest, _change_graph, _change_file, _change_place),
        (8, 4, 8, 2, 1),
    )[0]
    data = change(random, data, folder)
    if isinstance(data, dict):
        data["sha256"] = _digest(data)
    (folder / MANIFEST).write_text(json.dumps(data))
    return Case(folder, base / "image.png", plan)


def attempt(case: Case) -> None:
    """Load the bundle, ask a question, and inspect it; any warning must be ours."""
    from mobilevlm.cli.inspect import _show_bundle

    os.environ["XDG_CACHE_HOME"] = str(case.image.parent / "cache")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", PlanWarning)
        warnings.simplefilter("ignore", PrecisionWarning)
        _show_bundle(case.folder, as_json=True)
        _show_bundle(case.folder, as_json=False)
        with mobilevlm.load(case.folder, case.plan.engine, threads=1, plan=case.plan) as vlm:
            vlm.generate("What is it?", [case.image], max_new_tokens=2)


def _link(path: Path, copy: Path) -> None:
    try:
        os.link(path, copy)
    except OSError:  # another file system
        shutil.copyfile(path, copy)


def _change_spec(random: random.Random, data: Any, folder: Path) -> Any:
    """Change numbers and words of the spec, more often than not one that sizes follow from."""
    spec = data["spec"]
    if random.random() < 0.3:
        data["spec"] = mutate_json(random, spec)
        return data
    for _ in range(random.choice((1, 1, 2))):
        image = spec["inputs"]["image"]
        parts = (*image.values(), spec["decoder"], spec["conversation"])
        part = random.choice(parts)
        key = random.choice(sorted(part))
        old = part[key]
        if isinstance(old, bool):
            part[key] = not old
        elif isinstance(old, int | float):
            near = (old + 1, old - 1, old * 2, old // 2, -old, old * 1000)
            value = random.choice((*near, *(n for n in NUMBERS if n == n // 1)))
            part[key] = value if isinstance(old, float) else int(value)
        else:
            part.update(mutate_json(random, {key: old}, 1))
    return data


def _change_manifest(random: random.Random, data: Any, folder: Path) -> Any:
    """Change anything, or one of the parts that say what lies where."""
    if random.random() < 0.5:
        return mutate_json(random, data)
    key = random.choice(("artifacts", "embeddings", "system_prompt", "files", "recipe"))
    data[key] = mutate_json(random, data[key])
    return data


def _change_graph(random: random.Random, data: Any, folder: Path) -> Any:
    """Change a graph: what goes in and out, where weights lie, nodes; or bytes of its file."""
    path = random.choice(sorted([*folder.rglob("*.onnx"), *folder.rglob("*.ort")]))
    content = path.read_bytes()
    if path.suffix == ".ort" or random.random() < 0.1:
        _replace(path, mutate_bytes(random, content), data, folder)
        return data
    model = onnx.load_model_from_string(content)
    for _ in range(random.choice((1, 1, 2))):
        random.choice((_change_values, _change_values, _change_weights, _change_nodes))(
            random, model.graph
        )
    _replace(path, model.SerializeToString(), data, folder)
    return data


def _change_values(random: random.Random, graph: onnx.GraphProto) -> None:
    """Change a shape, type or name of an input or output."""
    values = [*graph.input, *graph.output]
    value = random.choice(values)
    tensor = value.type.tensor_type
    kind = random.randrange(5)
    if kind == 0:
        tensor.elem_type = random.choice(range(1, 17))
    elif kind == 1:
        value.name = random.choice((value.name + "x", random.choice(values).name, ""))
    elif kind == 2 and tensor.shape.dim:
        del tensor.shape.dim[random.randrange(len(tensor.shape.dim))]
    elif kind == 3:
        tensor.ClearField("shape")
    elif tensor.shape.dim:
        dim = random.choice(tensor.shape.dim)
        if random.random() < 0.2:
            dim.dim_param = random.choice(("n", "length", "capacity"))
        else:
            dim.dim_value = random.choice((0, 1, 2, 3, 7, dim.dim_value + 1, 10**6, 2**40, -1))


def _change_weights(random: random.Random, graph: onnx.GraphProto) -> None:
    """Change an initializer: its place in a file, its type or shape."""
    if not graph.initializer:
        return
    tensor = random.choice(graph.initializer)
    kind = random.randrange(4)
    if kind == 0 and tensor.dims:
        at = random.randrange(len(tensor.dims))
        old = tensor.dims[at]
        tensor.dims[at] = random.choice((0, 1, old + 1, old * 2, old // 2, 10**6, 2**40, -1))
    elif kind == 1:
        tensor.data_type = random.choice(range(1, 17))
    elif kind == 2 and tensor.name:
        tensor.name += "x"
    else:
        if tensor.data_location != TensorProto.EXTERNAL:
            tensor.data_location = TensorProto.EXTERNAL
            tensor.ClearField("raw_data")
        if not tensor.external_data:
            for key, text in (("location", "/etc/passwd"), ("offset", "0"), ("length", "64")):
                tensor.external_data.add(key=key, value=text)
        entry = random.choice(tensor.external_data)
        outside = ("/etc/passwd", "../manifest.json", "../../../base/image.png", "nothing")
        numbers = ("", "-1", "1", "x", str(2**40), str(2**63), "1e3", "0")
        entry.value = random.choice(outside if entry.key == "location" else numbers)
        if random.random() < 0.1:
            tensor.external_data.remove(entry)


def _change_nodes(random: random.Random, graph: onnx.GraphProto) -> None:
    """Remove a node, rename it or an edge, or change one of its numbers."""
    if not graph.node:
        return
    node = random.choice(graph.node)
    kind = random.randrange(5)
    if kind == 0:
        graph.node.remove(node)
    elif kind == 1:
        node.op_type = random.choice(("Add", "MatMul", "Identity", "Nothing", "Softmax"))
    elif kind == 2 and node.input:
        other = random.choice(graph.node)
        node.input[random.randrange(len(node.input))] = random.choice((*other.output, "", "x"))
    elif kind == 3 and node.attribute:
        attribute = random.choice(node.attribute)
        if attribute.type == onnx.AttributeProto.INT:
            attribute.i = random.choice((0, 1, -1, 2, 7, attribute.i + 1, 2**31, 2**62))
        elif attribute.type == onnx.AttributeProto.FLOAT:
            attribute.f = random.choice((0.0, -1.0, float("nan"), 1e38))
        else:
            node.attribute.remove(attribute)
    else:
        node.domain = random.choice(("", "com.microsoft", "nowhere"))


def _change_file(random: random.Random, data: Any, folder: Path) -> Any:
    """Change the bytes or the length of any file."""
    path = random.choice(_files(folder))
    _replace(path, mutate_bytes(random, path.read_bytes()), data, folder)
    return data


def _change_place(random: random.Random, data: Any, folder: Path) -> Any:
    """Put something that is no regular file where a file was, or point elsewhere."""
    path = random.choice(_files(folder))
    name = path.relative_to(folder).as_posix()
    path.unlink()
    kind = random.randrange(5)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.symlink_to(random.choice(("/dev/zero", "/dev/null", "/etc/passwd", "/proc/self/mem")))
        if path.is_file() and path.stat().st_size:
            data["files"][name] = _entry(Path("/etc/passwd"))
    elif kind == 2:
        path.mkdir()
    elif kind == 3:
        path.symlink_to(path.name)
    else:
        outside = folder.parent / "outside"
        outside.write_bytes(b"0" * data["files"][name]["size"])
        path.symlink_to(outside)
        data["files"][name] = _entry(outside)
    return data


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _replace(path: Path, content: bytes, data: Any, folder: Path) -> None:
    """Give a file another content, and the manifest its digest."""
    path.unlink()
    path.write_bytes(content)
    data["files"][path.relative_to(folder).as_posix()] = _entry(path)


def _entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": file_sha256(path)}


FUZZER = Fuzzer(prepare, mutate, attempt, seconds=20.0)

"""The Core ML package of a vision stage computes what the reference does: its program is run
operator by operator in float32, as Apple documents each (coremltools' MIL operators), with the
weights of 16 bits that are in it. Core ML itself runs on Apple's systems only."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import fixture_named, relative_error
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from mobilevlm.builtin import WEIGHTS
from mobilevlm.export.calibration.samples import held_out_samples
from mobilevlm.families import open_checkpoint
from mobilevlm.image import open_image
from mobilevlm.model import OpenOptions
from mobilevlm.preparation import prepare
from mobilevlm.reference import load_reference

if os.environ.get("MOBILEVLM_WITHOUT_COREML") == "1":
    pytest.skip("asked to go without coremltools", allow_module_level=True)
pytest.importorskip("coremltools", reason="Apple's converter: pip install '.[coreml]'")

Inputs = dict[str, Any]
_FIELDS = {"floats", "ints", "bools", "strings", "longInts", "doubles"}


def sizes(value: Any) -> list[int]:
    return [int(size) for size in value]


def convolved(i: Inputs) -> Tensor:
    assert i["pad_type"] in ("valid", "custom") and sizes(i["dilations"]) == [1, 1]
    top, bottom, left, right = sizes(i["pad"]) if i["pad_type"] == "custom" else (0, 0, 0, 0)
    x = functional.pad(i["x"], (left, right, top, bottom))
    groups = int(i["groups"])
    return functional.conv2d(x, i["weight"], i.get("bias"), sizes(i["strides"]), groups=groups)


def pooled(i: Inputs) -> Tensor:
    assert i["pad_type"] == "valid" or not any(sizes(i["pad"]))
    return functional.avg_pool2d(i["x"], sizes(i["kernel_sizes"]), sizes(i["strides"]))


def sliced(i: Inputs) -> Tensor:
    whole = i.get("end_mask", np.zeros(len(i["begin"]), bool))
    found: Tensor = i["x"][
        tuple(
            slice(begin, None if to_end else end)
            for begin, end, to_end in zip(sizes(i["begin"]), sizes(i["end"]), whole, strict=True)
        )
    ]
    return found


def multiplied(i: Inputs) -> Tensor:
    x, y = (
        i[name].transpose(-1, -2) if bool(i.get(f"transpose_{name}", False)) else i[name]
        for name in "xy"
    )
    return torch.matmul(x, y)


def normed(i: Inputs) -> Tensor:
    shape = [i["x"].shape[axis] for axis in sizes(i["axes"])]
    epsilon = float(i["epsilon"])
    return functional.layer_norm(i["x"], shape, i["gamma"], i["beta"], epsilon)


def gelu(i: Inputs) -> Tensor:
    assert i["mode"] == "EXACT"
    return functional.gelu(i["x"])


OPERATORS: dict[str, Callable[[Inputs], Tensor]] = {
    "add": lambda i: i["x"] + i["y"],
    "avg_pool": pooled,
    "cast": lambda i: i["x"],
    "concat": lambda i: torch.cat(i["values"], int(i["axis"])),
    "conv": convolved,
    "gelu": gelu,
    "layer_norm": normed,
    "linear": lambda i: functional.linear(i["x"], i["weight"], i.get("bias")),
    "matmul": multiplied,
    "mul": lambda i: i["x"] * i["y"],
    "reshape": lambda i: i["x"].reshape(sizes(i["shape"])),
    "sigmoid": lambda i: torch.sigmoid(i["x"]),
    "slice_by_index": sliced,
    "softmax": lambda i: torch.softmax(i["x"], int(i["axis"])),
    "sub": lambda i: i["x"] - i["y"],
    "transpose": lambda i: i["x"].permute(sizes(i["perm"])),
}


def immediate(value: Any) -> Any:
    """A small constant as text, number or array."""
    tensor = value.immediateValue.tensor
    field = tensor.WhichOneof("value")
    if field == "bytes":  # of 16 bits
        found = np.frombuffer(tensor.bytes.values, np.float16).astype(np.float32)
    else:
        assert field in _FIELDS
        found = np.array(getattr(tensor, field).values)
    if field == "strings":
        return str(found[0])
    shape = [size.constant.size for size in value.type.tensorType.dimensions]
    found = found.reshape(shape) if shape else found[0]
    return torch.as_tensor(found) if np.asarray(found).dtype == np.float32 else found


def run(package: Path, large: dict[str, NDArray[Any]], pixels: Tensor) -> Tensor:
    import coremltools as ct

    function = ct.utils.load_spec(str(package)).mlProgram.functions["main"]
    (block,) = function.block_specializations.values()
    values: dict[str, Any] = {"pixels": pixels}
    for operation in block.operations:
        name = operation.outputs[0].name
        if operation.type == "const":
            if name in large:
                values[name] = torch.from_numpy(large[name].astype(np.float32))
            else:
                values[name] = immediate(operation.attributes["val"])
            continue
        inputs = {
            key: [values[item.name] for item in value.arguments]
            for key, value in operation.inputs.items()
        }
        single = {key: found if key == "values" else found[0] for key, found in inputs.items()}
        values[name] = OPERATORS[operation.type](single)
    result: Tensor = values[block.outputs[0]]
    return result


# Measured: 1.4e-4; weights of 16 bits are up to 5e-4 off.
def test_the_program_of_a_package_gives_the_visual_tokens_of_the_reference(tmp_path: Path) -> None:
    from mobilevlm.export.targets.coreml_package import read_package, write_package

    model = open_checkpoint(WEIGHTS / "nano", OpenOptions())
    package = tmp_path / "vision.mlpackage"
    operators = write_package(model, package)
    found_operators, large = read_package(package)
    assert operators == found_operators and set(operators) <= set(OPERATORS)
    [image] = held_out_samples("scenes")[0].images
    assert isinstance(image, Image.Image)
    picture = open_image(image)
    pixels = prepare(picture, model.spec.image).arrays[0]["pixels"]
    with torch.no_grad():
        expected = load_reference(model).visual_tokens(pixels)
        given = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]
        found = run(package, large, given)[0]
    assert relative_error(found.numpy(), expected.numpy()) < 1e-3


@pytest.mark.parametrize("name", ["mobilevlm_v1", "fast_vlm"])
def test_norms_and_products_over_channels_are_converted(name: str, tmp_path: Path) -> None:
    from mobilevlm.export.targets.coreml_package import write_package

    assert write_package(fixture_named(name).model, tmp_path / "vision.mlpackage")["conv"] > 2

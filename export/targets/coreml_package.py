"""The vision stage as a Core ML package (ML Program), converted by coremltools from the torch
reference (extra ``[coreml]``). It goes without ONNX Runtime, on the Neural Engine where there is
one. Converting runs anywhere; predictions need macOS or iOS, so that here the package's structure
and its weights are checked, not its answers."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import json
import logging
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import numpy as np
from numpy.typing import NDArray

from mobilevlm.bundle import Manifest, Package
from mobilevlm.console import progress
from mobilevlm.errors import MobileVLMError
from mobilevlm.export.workspace.workspace import Workspace
from mobilevlm.model import Model

PATH = "coreml/vision_encoder.mlpackage"
MOST_ERROR = 2e-3
"""Largest error of a stored weight in 16 bits, relative to the tensor's largest value; rounding
makes 5e-4."""


def package_vision(work: Workspace, draft: Manifest, model: Model) -> Manifest:
    """Adds the package, where the extra is installed; says so where it is not."""
    lacking = [name for name in ("coremltools", "torch") if find_spec(name) is None]
    if lacking:
        progress.say(
            f"coreml      no package: {lacking[0]} is not installed: pip install "
            f"'mobilevlm-edge[coreml]'"
        )
        return draft
    start = time.perf_counter()
    with progress.track("coreml", 1) as advance:
        operators = write_package(model, work.path(PATH))
        advance(1)
    files = tuple(
        path.relative_to(work.folder).as_posix()
        for path in sorted(work.path(PATH).rglob("*"))
        if path.is_file()
    )
    size = sum(work.path(name).stat().st_size for name in files)
    progress.say(
        f"coreml      {PATH}  {size / 1e6:.1f} MB, {sum(operators.values())} operators, "
        f"{time.perf_counter() - start:.1f} s"
    )
    package = Package("vision", PATH, files, operators, "fp16")
    tools = {name: importlib.metadata.version(name) for name in ("coremltools", "torch")}
    packages = (*draft.packages, package)
    return dataclasses.replace(draft, packages=packages, tools={**draft.tools, **tools})


def write_package(model: Model, path: Path) -> dict[str, int]:
    """Writes the vision stage: an RGB image of the tower's size, named ``pixels``, to
    ``visual_tokens`` float32 ``(1, num_tokens, hidden_size)``; weights and arithmetic have 16 bits.
    Returns the program's operators.

    Raises:
        MobileVLMError: coremltools does not convert it, or not all weights are in the package.
    """
    with _silent():
        import coremltools as ct
        import torch

        from mobilevlm.reference import load_reference

        reference = load_reference(model).eval()
        size = model.spec.image.square.size
        stage = _stage(reference, model)
        try:
            with torch.no_grad():
                trace: Any = torch.jit.trace
                traced = trace(stage, torch.zeros(1, 3, size, size))
            package = ct.convert(
                traced,
                convert_to="mlprogram",
                inputs=[
                    ct.ImageType("pixels", (1, 3, size, size), color_layout=ct.colorlayout.RGB)
                ],
                outputs=[ct.TensorType("visual_tokens", dtype=np.float32)],
                minimum_deployment_target=ct.target.iOS16,
                compute_precision=ct.precision.FLOAT16,
                skip_model_load=True,
            )
        except Exception as error:  # coremltools raises many kinds
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise MobileVLMError(f"coremltools: {reason[-1]:.200}") from None
        shutil.rmtree(path, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        package.save(str(path))
        _settle_names(path)
        operators, constants = read_package(path)
    _check_weights(stage, list(constants.values()))
    return operators


def read_package(path: Path) -> tuple[dict[str, int], dict[str, NDArray[Any]]]:
    """Operators of a package's program, and its large constants by their names."""
    import coremltools as ct
    from coremltools.libmilstoragepython import _BlobStorageReader as Blobs

    program = ct.utils.load_spec(str(path)).mlProgram
    weights = Blobs(str(path / "Data/com.apple.CoreML/weights/weight.bin"))
    (block,) = program.functions["main"].block_specializations.values()
    found: dict[str, NDArray[Any]] = {}
    for operation in block.operations:
        value = operation.attributes["val"] if operation.type == "const" else None
        if value is None or not value.HasField("blobFileValue"):
            continue
        shape = [size.constant.size for size in value.type.tensorType.dimensions]
        bits = np.asarray(weights.read_fp16_data(value.blobFileValue.offset), np.uint16)
        found[operation.outputs[0].name] = bits.view(np.float16).reshape(shape)
    kinds = Counter(operation.type for operation in block.operations)
    del kinds["const"]
    return dict(sorted(kinds.items())), found


def _stage(reference: Any, model: Model) -> Any:
    import torch

    mean = torch.tensor(model.spec.image.square.mean).view(1, 3, 1, 1)
    std = torch.tensor(model.spec.image.square.std).view(1, 3, 1, 1)

    class Vision(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision, self.projector = reference.vision, reference.projector

        def forward(self, pixels: Any) -> Any:
            return self.projector(self.vision((pixels / 255 - mean) / std))

    return Vision().eval()


def _check_weights(stage: Any, constants: list[NDArray[Any]]) -> None:
    """Every matrix of the stage is in the package, rounded to 16 bits and no more."""
    stored: dict[int, list[NDArray[Any]]] = {}
    for array in constants:
        stored.setdefault(array.size, []).append(array.astype(np.float32).ravel())
    for name, tensor in stage.named_parameters():
        exact = tensor.detach().numpy()
        if exact.ndim < 2 or "position" in name:  # vectors may be folded into others
            continue
        limit = MOST_ERROR * float(np.abs(exact).max())
        near = (np.abs(array - exact.ravel()).max() for array in stored.get(exact.size, []))
        if not any(error <= limit for error in near):
            raise MobileVLMError(f"coremltools: {name} is not in the package as it is in the model")


def _settle_names(path: Path) -> None:
    """The package's parts have random identifiers, which become the same every time."""
    manifest = path / "Manifest.json"
    data = json.loads(manifest.read_text("utf-8"))
    entries = data["itemInfoEntries"]
    new = {old: str(uuid5(NAMESPACE_URL, entry["path"])).upper() for old, entry in entries.items()}
    data["itemInfoEntries"] = {
        new[old]: entries[old] for old in sorted(entries, key=new.__getitem__)
    }
    data["rootModelIdentifier"] = new[data["rootModelIdentifier"]]
    manifest.write_text(json.dumps(data, indent=4) + "\n", "utf-8")


@contextmanager
def _silent() -> Iterator[None]:
    """coremltools warns of versions of torch that it was not tried with and of libraries of macOS,
    and has progress bars of its own."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

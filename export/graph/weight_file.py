"""The external data of one ONNX file, written while the graph is authored.

A tensor is read from the checkpoint, converted, written and forgotten before the next one, so that
memory holds one tensor at a time. The file order is the order of use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from mobilevlm.checkpoint import Weights
from mobilevlm.export.quantize import q4_0
from mobilevlm.export.quantize.blocks import Quantized
from mobilevlm.export.quantize.gptq import HessianOf, no_hessian
from mobilevlm.export.recipes import Recipe
from mobilevlm.progress import Advance, ignore

_ALIGNMENT = 4096
"""Large tensors begin on a page, so that they can be mapped alone."""
_INLINE_BYTES = 1024
"""Smaller tensors are kept inside the .onnx file."""


class WeightFile:
    """Parameters of a graph under construction. Open until :meth:`close`.

    ``source`` gives the canonical tensors, ``recipe`` their formats, ``hessian`` what
    GPTQ needs; ``errors`` collects the relative error that quantization made in each.
    """

    def __init__(
        self,
        source: Weights,
        path: Path,
        recipe: Recipe,
        advance: Advance = ignore,
        hessian: HessianOf = no_hessian,
    ) -> None:
        self.source, self.recipe, self.hessian = source, recipe, hessian
        self._advance = advance
        self.path = path
        self.errors: dict[str, float] = {}
        self._file: BinaryIO = path.open("wb")

    def parameter(self, array: np.ndarray[Any, Any], name: str | None = None) -> nn.Parameter:
        """A graph parameter with the array's values. ``name`` as in :class:`onnxscript.nn.Module`:
        the attribute name when not given."""
        array = np.ascontiguousarray(array)
        if array.nbytes < _INLINE_BYTES:
            return nn.Parameter(array.shape, name=name, data=ir.tensor(array))
        padding = -self._file.tell() % _ALIGNMENT
        self._file.write(b"\0" * padding)
        offset = self._file.tell()
        self._file.write(array.data.cast("B"))
        tensor = ir.ExternalTensor(
            self.path.name,
            offset,
            array.nbytes,
            ir.DataType.from_numpy(array.dtype),
            shape=ir.Shape(array.shape),
            name=name or "",
            base_dir=str(self.path.parent),
        )
        return nn.Parameter(array.shape, name=name, data=tensor)

    def read(self, name: str, *shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The canonical tensor ``name`` as float32."""
        self._advance(math.prod(shape))
        return self.source.read(name, shape)

    def q4_0(self, names: Sequence[str]) -> Quantized | None:
        """Layers stacked as they are stored in llama.cpp's Q4_0, nothing rounded again; none where
        one is stored in another type."""
        parts = [self.source.q4_0(f"{name}.weight") for name in names]
        rows = [part for part in parts if part is not None]
        return q4_0.unpack(np.concatenate(rows)) if len(rows) == len(parts) else None

    def close(self) -> None:
        self._file.close()

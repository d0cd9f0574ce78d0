"""The external data of one ONNX file, written while the graph is authored.

A tensor is read from the checkpoint, converted, written and forgotten before the next one, so that
memory holds one tensor at a time. The file order is the order of use.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from mobilevlm.bundle import PAGE
from mobilevlm.checkpoint import Weights
from mobilevlm.console.progress import Advance, ignore
from mobilevlm.export.graph.dialects import CPU, Dialect
from mobilevlm.export.quantize import q4_0
from mobilevlm.export.quantize.blocks import Quantized
from mobilevlm.export.quantize.gptq import HessianOf, no_hessian
from mobilevlm.recipe import Recipe

_TABLE_PART = 1 << 24
"""Numbers of a large table that are read at a time."""
INLINE_BYTES = 1024
"""Smaller tensors are kept inside the .onnx file."""


class WeightFile:
    """Parameters of a graph under construction. Open until :meth:`close`.

    ``source`` gives the canonical tensors, ``recipe`` their formats, ``hessian`` what GPTQ needs,
    ``dialect`` the operators of the graph; ``errors`` collects the relative error that quantization
    made in each, and ``bytes_per_token`` what a decoding step reads.
    """

    def __init__(
        self,
        source: Weights,
        path: Path,
        recipe: Recipe,
        advance: Advance = ignore,
        hessian: HessianOf = no_hessian,
        dialect: Dialect = CPU,
    ) -> None:
        self.source, self.recipe, self.hessian = source, recipe, hessian
        self.dialect = dialect
        self._advance = advance
        self.path = path
        self.errors: dict[str, float] = {}
        self.bytes_per_token = 0.0
        self._share = 1.0
        self._file: BinaryIO = path.open("wb")

    def parameter(self, array: np.ndarray[Any, Any], name: str | None = None) -> nn.Parameter:
        """A graph parameter with the array's values. ``name`` as in :class:`onnxscript.nn.Module`:
        the attribute name when not given."""
        array = np.ascontiguousarray(array)
        if array.nbytes < INLINE_BYTES:
            self.bytes_per_token += array.nbytes * self._share
            return nn.Parameter(array.shape, name=name, data=ir.tensor(array))
        return self._external([array], array.shape, array.dtype, name)

    def stacked(self, parts: Iterator[np.ndarray[Any, Any]], count: int) -> nn.Parameter:
        """A parameter ``(count, …)`` of parts that are made one by one: memory holds one."""
        first = next(parts)
        return self._external(chain([first], parts), (count, *first.shape), first.dtype, None)

    def table(self, name: str, rows: int, columns: int, dtype: type) -> nn.Parameter:
        """A parameter of the canonical tensor ``name``, read in parts: memory holds one."""
        step = max(1, _TABLE_PART // columns)

        def parts() -> Iterator[np.ndarray[Any, Any]]:
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                self._advance((stop - start) * columns)
                yield self.source.read_rows(name, (rows, columns), start, stop).astype(dtype)

        return self._external(parts(), (rows, columns), np.dtype(dtype), None)

    def _external(
        self,
        parts: Iterable[np.ndarray[Any, Any]],
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        name: str | None,
    ) -> nn.Parameter:
        self._file.write(b"\0" * (-self._file.tell() % PAGE))
        offset = self._file.tell()
        for part in parts:
            self._file.write(np.ascontiguousarray(part).data.cast("B"))
        length = self._file.tell() - offset
        self.bytes_per_token += length * self._share
        tensor = ir.ExternalTensor(
            self.path.name,
            offset,
            length,
            ir.DataType.from_numpy(dtype),
            shape=ir.Shape(shape),
            name=name or "",
            base_dir=str(self.path.parent),
        )
        return nn.Parameter(shape, name=name, data=tensor)

    @contextmanager
    def read_in_part(self, share: float) -> Iterator[None]:
        """Set the share of the parameters made inside that one token uses."""
        self._share = share
        try:
            yield
        finally:
            self._share = 1.0

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

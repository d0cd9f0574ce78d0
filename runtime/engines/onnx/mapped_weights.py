"""The weights of an ONNX file, mapped by us and lent to a session.

onnxruntime would map each tensor by itself, and keep what its kernels have copied in their own
order until all is copied: a second copy of the model, for a moment. Of a mapping of our own the
pages can be given back at any time, since whoever reads them again gets them from the system's
cache. Several sessions and processes share them.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from mobilevlm.bundle import data_path
from mobilevlm.errors import BundleError
from mobilevlm.protobuf import fields, text, varints
from mobilevlm.runtime.engines.onnx.forking import keep_in_children
from mobilevlm.runtime.engines.onnx.mapped_pages import check_whole, drop_pages, keep_apart

INTERVAL = 0.03
"""Seconds between two times that pages are given back while weights are copied: some 50 MB."""
_TYPES = {1: "<f4", 2: "u1", 3: "i1", 6: "<i4", 7: "<i8", 10: "<f2"}
"""Element types of a TensorProto that are lent; the rest onnxruntime reads by itself."""
_EXTERNAL = 1
"""A TensorProto's data_location where its data lies in another file"""


@dataclass(frozen=True)
class Tensor:
    """An initializer of a graph whose data lies in another file."""

    name: str
    type: int
    shape: tuple[int, ...]
    location: str
    offset: int
    length: int
    """Bytes of it"""


class MappedWeights:
    """Initializers of an ONNX file that are whole in the data file beside it, mapped."""

    def __init__(self, path: Path) -> None:
        self._mapped: np.memmap | None = None
        self._lent: dict[str, ort.OrtValue] = {}
        self._borders: list[int] = []
        data = data_path(path)
        tensors = [tensor for tensor in external_tensors(path) if tensor.location == data.name]
        if not tensors or not data.is_file() or data.stat().st_size == 0:
            return
        self._mapped = np.memmap(data, np.uint8, "r")
        for tensor in tensors:
            if _is_whole(tensor, len(self._mapped)):
                span = self._mapped[tensor.offset : tensor.offset + tensor.length]
                array = span.view(_TYPES[tensor.type]).reshape(tensor.shape)
                self._lent[tensor.name] = ort.OrtValue.ortvalue_from_numpy(array)
                self._borders += (tensor.offset, tensor.offset + tensor.length)

    def lend(self, options: ort.SessionOptions) -> None:
        """Has sessions with these options use the weights where they lie. They must be kept as
        long as such a session."""
        for name, value in self._lent.items():
            options.add_initializer(name, value)

    def check(self) -> None:
        """Check that the file still has them all.

        Raises:
            BundleError: it became shorter.
        """
        if self._mapped is not None:
            check_whole(self._mapped)

    def give_back(self) -> None:
        """Takes the pages out of this process; the next access brings them back."""
        if self._mapped is not None:
            drop_pages(self._mapped)

    @contextmanager
    def read_once(self) -> Iterator[None]:
        """While weights are copied: pages are given back as they were read. Of what a kernel does
        not copy, some scales, only its own pages come back."""
        over = threading.Event()

        def go_on() -> None:
            while not over.wait(INTERVAL):
                self.give_back()

        beside = threading.Thread(target=go_on, daemon=True)
        beside.start()
        try:
            yield
        finally:
            over.set()
            beside.join()
            self.give_back()
            if self._mapped is not None:
                keep_apart(self._mapped, self._borders)


class Session(ort.InferenceSession):  # type: ignore[misc, unused-ignore]
    """A session and the mapping that its weights lie in."""

    def __init__(self, path: Path, options: ort.SessionOptions, weights: MappedWeights) -> None:
        with _utf8_name(path) as name:
            super().__init__(name, options, providers=["CPUExecutionProvider"])
        self.weights, self.path = weights, path
        keep_in_children(self)

    def run(self, *arguments: Any) -> Any:
        """Run the graph, after a check that its weights are there.

        Raises:
            BundleError: an operator refuses what the graph gives it.
        """
        self.weights.check()
        try:
            return super().run(*arguments)
        except Exception as error:  # onnxruntime raises many kinds, none of them public
            raise _refused(self.path, error) from None

    def run_with_iobinding(self, *arguments: Any) -> None:
        """Run the graph on bound arrays; errors as of :meth:`run`."""
        self.weights.check()
        try:
            super().run_with_iobinding(*arguments)
        except Exception as error:
            raise _refused(self.path, error) from None


def _refused(path: Path, error: Exception) -> BundleError:
    reason = " ".join(str(error).split())
    return BundleError(f"{path}: onnxruntime cannot run it: {reason:.300}: export the bundle again")


@contextmanager
def _utf8_name(path: Path) -> Iterator[str]:
    """Name a file by UTF-8, which onnxruntime asks for, whatever its folder is called."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            yield f"/proc/self/fd/{folder}/{path.name}"
        finally:
            os.close(folder)
    else:
        yield str(path)


def _is_whole(tensor: Tensor, size: int) -> bool:
    """Return whether a file of ``size`` bytes has all of a tensor, as its shape says."""
    if tensor.type not in _TYPES or tensor.length <= 0 or tensor.offset < 0:
        return False
    item = np.dtype(_TYPES[tensor.type]).itemsize
    return (
        tensor.offset % item == 0
        and tensor.length == item * math.prod(tensor.shape)
        and tensor.offset + tensor.length <= size
    )


def external_tensors(path: Path) -> list[Tensor]:
    """The initializers of an ONNX file that lie in another file. What is no ONNX file has none:
    onnxruntime says what is wrong with it. Field numbers are those of onnx.proto."""
    found: list[Tensor] = []
    try:
        for field, graph in fields(memoryview(path.read_bytes())):
            if field != 7 or isinstance(graph, int):  # ModelProto.graph
                continue
            for part, value in fields(graph):
                if part == 5 and not isinstance(value, int):  # GraphProto.initializer
                    found += _external(value)
    except (ValueError, IndexError):
        return []
    return found


def _external(encoded: memoryview) -> list[Tensor]:
    name, kind, location, shape = "", 0, 0, []
    entries: dict[str, str] = {}
    for field, value in fields(encoded):
        if isinstance(value, int):
            if field == 1:
                shape.append(value)
            elif field == 2:
                kind = value
            elif field == 14:
                location = value
        elif field == 1:  # all dimensions in one piece
            shape += varints(value)
        elif field == 8:
            name = text(value)
        elif field == 13:
            pair = {key: text(part) for key, part in fields(value)}
            entries[pair.get(1, "")] = pair.get(2, "")
    if location != _EXTERNAL:
        return []
    offset, length = int(entries.get("offset") or 0), int(entries.get("length") or 0)
    return [Tensor(name, kind, tuple(shape), entries.get("location", ""), offset, length)]

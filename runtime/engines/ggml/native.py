"""ggml's C interface (ggml.h, ggml-backend.h, ggml-alloc.h), which the libraries inside
llama-cpp-python export: the functions that a decoder needs, and who frees what.

Everything goes through functions; the layout of a struct is known here for one alone, the arguments
of ``ggml_init``.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mobilevlm.errors import MobileVLMError
from mobilevlm.gguf.file import TENSOR_TYPES, GgufFile
from mobilevlm.runtime.engines.llama.native import LLAMA, catch_log, llama_library
from mobilevlm.runtime.engines.onnx.forking import check_threads, free_with, note_threads

TensorPointer: TypeAlias = int
"""A ``struct ggml_tensor *``. In comments on shapes the outermost dimension stands first, as in
numpy; ggml counts them the other way round."""

TYPE_IDS = {label: number for number, (label, _, _) in TENSOR_TYPES.items()}
"""``enum ggml_type`` by name."""


class _InitParams(ctypes.Structure):
    """``struct ggml_init_params``."""

    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


_pointer, _size, _wide = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
_int, _float = ctypes.c_int, ctypes.c_float

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    # contexts and tensors: result, arguments
    "init": (_pointer, _InitParams),
    "free": (None, _pointer),
    "tensor_overhead": (_size,),
    "new_tensor": (_pointer, _pointer, _int, _int, _pointer),
    "get_data": (_pointer, _pointer),
    "row_size": (_size, _int, _wide),
    "set_input": (None, _pointer),
    "set_output": (None, _pointer),
    # operations: context, operands, parameters
    "add": (_pointer, _pointer, _pointer, _pointer),
    "mul": (_pointer, _pointer, _pointer, _pointer),
    "div": (_pointer, _pointer, _pointer, _pointer),
    "sqr": (_pointer, _pointer, _pointer),
    "scale": (_pointer, _pointer, _pointer, _float),
    "scale_bias": (_pointer, _pointer, _pointer, _float, _float),
    "sum_rows": (_pointer, _pointer, _pointer),
    "mul_mat": (_pointer, _pointer, _pointer, _pointer),
    "mul_mat_id": (_pointer, _pointer, _pointer, _pointer, _pointer),
    "add_id": (_pointer, _pointer, _pointer, _pointer, _pointer),
    "get_rows": (_pointer, _pointer, _pointer, _pointer),
    "argsort_top_k": (_pointer, _pointer, _pointer, _int),
    "soft_max": (_pointer, _pointer, _pointer),
    "norm": (_pointer, _pointer, _pointer, _float),
    "rms_norm": (_pointer, _pointer, _pointer, _float),
    "silu": (_pointer, _pointer, _pointer),
    "relu": (_pointer, _pointer, _pointer),
    "tanh": (_pointer, _pointer, _pointer),
    "swiglu_split": (_pointer, _pointer, _pointer, _pointer),
    "rope_ext": (_pointer, *[_pointer] * 4, _int, _int, _int, *[_float] * 6),
    "set_rows": (_pointer, _pointer, _pointer, _pointer, _pointer),
    "flash_attn_ext": (_pointer, *[_pointer] * 5, _float, _float, _float),
    "permute": (_pointer, _pointer, _pointer, _int, _int, _int, _int),
    "reshape_2d": (_pointer, _pointer, _pointer, _wide, _wide),
    "reshape_3d": (_pointer, _pointer, _pointer, _wide, _wide, _wide),
    "view_2d": (_pointer, _pointer, _pointer, _wide, _wide, _size, _size),
    "view_3d": (_pointer, _pointer, _pointer, _wide, _wide, _wide, _size, _size, _size),
    "map_custom1_inplace": (_pointer, _pointer, _pointer, _pointer, _int, _pointer),
    # graphs
    "graph_overhead_custom": (_size, _size, ctypes.c_bool),
    "new_graph_custom": (_pointer, _pointer, _size, ctypes.c_bool),
    "build_forward_expand": (None, _pointer, _pointer),
    "gallocr_new": (_pointer, _pointer),
    "gallocr_free": (None, _pointer),
    "gallocr_alloc_graph": (ctypes.c_bool, _pointer, _pointer),
    # the processor as a backend
    "backend_cpu_init": (_pointer,),
    "backend_cpu_set_n_threads": (None, _pointer, _int),
    "backend_free": (None, _pointer),
    "backend_graph_compute": (_int, _pointer, _pointer),
    "backend_cpu_buffer_type": (_pointer,),
    "backend_cpu_buffer_from_ptr": (_pointer, _pointer, _size),
    "backend_buffer_free": (None, _pointer),
    "backend_tensor_alloc": (_int, _pointer, _pointer, _pointer),
}  # fmt: skip


@cache
def ggml() -> Any:
    """The functions, without ``ggml_`` before their names.

    Raises:
        MissingExtraError: llama-cpp-python is not installed, or does not load.
        MobileVLMError: its libraries export another ggml than is needed.
    """
    llama_library()
    from llama_cpp._ggml import libggml

    catch_log()
    found = SimpleNamespace()
    for name, (result, *arguments) in _SIGNATURES.items():
        try:
            function = ctypes.CFUNCTYPE(result, *arguments)((f"ggml_{name}", libggml))
        except AttributeError:
            raise MobileVLMError(
                f"the installed llama-cpp-python exports no ggml_{name}: the engine ggml needs a "
                f"later one, with its CPU backend linked: pip install -U llama-cpp-python"
            ) from None
        setattr(found, name, function)
    return found


_Shown = ctypes.CFUNCTYPE(None, _pointer, _pointer, _int, _int, _pointer)
"""``ggml_custom1_op_t``: result, operand, number of this thread, threads, nothing of ours"""


class Context:
    """A ggml_context: descriptions of tensors and graphs; what they hold lies elsewhere."""

    def __init__(self, tensors: int, graph_nodes: int = 0) -> None:
        """``tensors``: how many it has room for; ``graph_nodes``: of one graph, 0: none."""
        native = ggml()
        size = tensors * native.tensor_overhead()
        size += native.graph_overhead_custom(graph_nodes, False) if graph_nodes else 0
        self.pointer = native.init(_InitParams(size, None, True))
        self._callbacks: list[Any] = []
        if not self.pointer:
            raise out_of_memory("a graph")
        free_with(self, native.free, self.pointer)

    def tensor(self, kind: str, *shape: int) -> TensorPointer:
        """A tensor to be; ``shape``: outermost first."""
        sizes = (ctypes.c_int64 * len(shape))(*reversed(shape))
        return self.apply("new_tensor", TYPE_IDS[kind], len(shape), sizes)

    def apply(self, operation: str, *operands: Any) -> TensorPointer:
        """The result to be of an operation, named without ``ggml_``."""
        result: TensorPointer = getattr(ggml(), operation)(self.pointer, *operands)
        return result

    def shown(self, tensor: TensorPointer, show: Callable[[int], None]) -> TensorPointer:
        """The tensor itself; once it is computed, and before anything is made of the result,
        ``show`` is given the address of its values."""

        def call(_: int, operand: TensorPointer, thread: int, *__: Any) -> None:
            if thread == 0:  # all call, whatever number of tasks is asked for
                show(ggml().get_data(operand))

        callback = _Shown(call)
        self._callbacks.append(callback)
        return self.apply("map_custom1_inplace", tensor, ctypes.cast(callback, _pointer), 1, None)


class Memory:
    """Mapped memory in which tensors can be placed: a file, or empty pages that become resident as
    they are written."""

    def __init__(self, content: mmap.mmap) -> None:
        native = ggml()
        self.content: NDArray[np.uint8] = np.frombuffer(content, np.uint8)
        self._address = self.content.ctypes.data
        self._buffer = native.backend_cpu_buffer_from_ptr(self._address, self.content.size)
        if not self._buffer:
            raise out_of_memory("a buffer")
        free_with(self, native.backend_buffer_free, self._buffer)

    def place(self, tensor: TensorPointer, offset: int) -> None:
        """The tensor's values lie ``offset`` bytes from the beginning."""
        ggml().backend_tensor_alloc(self._buffer, tensor, self._address + offset)


class MappedTensors:
    """The tensors of a GGUF file where they lie in the mapped file, or in its mapped parts: nothing
    is read or copied."""

    def __init__(self, header: GgufFile) -> None:
        """``header``: checked; sizes that do not fit each other end the process later on."""
        self.contents: dict[Path, mmap.mmap] = {}
        for path in header.parts:
            with path.open("rb") as file:
                self.contents[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._memories = {path: Memory(content) for path, content in self.contents.items()}
        self._context = Context(len(header.tensors))
        self.pointers: dict[str, TensorPointer] = {}
        for tensor in header.tensors.values():
            pointer = self._context.tensor(tensor.type, *tensor.shape)
            self._memories[tensor.path].place(pointer, tensor.offset)
            self.pointers[tensor.name] = pointer


class Processor:
    """A CPU backend: threads and scratch memory of one thread of the program."""

    def __init__(self, threads: int) -> None:
        native = ggml()
        check_threads(LLAMA)
        self._pointer = native.backend_cpu_init()
        if not self._pointer:
            raise out_of_memory("a backend")
        free_with(self, native.backend_free, self._pointer)
        native.backend_cpu_set_n_threads(self._pointer, threads)

    def compute(self, graph: int) -> None:
        """Runs a graph whose tensors have their places.

        Raises:
            MobileVLMError: ggml failed.
        """
        note_threads(LLAMA)
        status = ggml().backend_graph_compute(self._pointer, graph)
        if status:
            raise MobileVLMError(f"ggml failed (status {status}): most likely too little memory")


class Workspace:
    """Places for the intermediate results of one graph."""

    def __init__(self, graph: int) -> None:
        native = ggml()
        self._pointer = native.gallocr_new(native.backend_cpu_buffer_type())
        free_with(self, native.gallocr_free, self._pointer)
        if not native.gallocr_alloc_graph(self._pointer, graph):
            raise out_of_memory("intermediate results")

    def values(self, tensor: TensorPointer, dtype: Any, *shape: int) -> NDArray[Any]:
        """Return the content of an input or output of the graph, as an array that keeps the
        workspace."""
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        content = (ctypes.c_uint8 * count).from_address(ggml().get_data(tensor))
        content.kept = self
        return np.frombuffer(content, dtype).reshape(shape)


def out_of_memory(what: str) -> MobileVLMError:
    """Return the error for an allocation that failed in ggml."""
    return MobileVLMError(f"ggml could not allocate {what}: there is too little memory")

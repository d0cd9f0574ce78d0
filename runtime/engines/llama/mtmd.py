"""The vision stage in llama.cpp's multimodal library, from an mmproj GGUF file."""

from __future__ import annotations

import ctypes
import math
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm.errors import MobileVLMError
from mobilevlm.gguf.file import GgufFile, read_gguf
from mobilevlm.gguf.mmproj import EXACT, projector_name
from mobilevlm.gguf.names import NEWLINE
from mobilevlm.input_spec import DynamicImage, DynamicTiles, Tiles
from mobilevlm.prompt import Arrays, Rows
from mobilevlm.runtime.engines import Float32, still_open
from mobilevlm.runtime.engines.llama.clip_order import class_token_order
from mobilevlm.runtime.engines.llama.embedding_rows import EmbeddingRows
from mobilevlm.runtime.engines.llama.gguf_check import check_mmproj
from mobilevlm.runtime.engines.llama.native import (
    LLAMA,
    NativeModel,
    address,
    catch_log,
    load_error,
)
from mobilevlm.runtime.engines.onnx.feature_layer import with_feature_layer, without_splitting
from mobilevlm.runtime.engines.onnx.forking import free_with, note_threads
from mobilevlm.spec import ModelSpec

MOST_TOKENS = 4096
"""Visual tokens of an image of any size, at most: llama.cpp's own limit for Qwen-VL, whose masks
grow with the square of this."""


class MtmdVision:
    """See :class:`mobilevlm.runtime.engines.EncoderEngine`.

    mtmd checks the image encoder against the language model, so it is given that too.
    """

    def __init__(self, path: Path, spec: ModelSpec, model: NativeModel, threads: int) -> None:
        header = read_gguf(path)
        check_mmproj(header, spec)
        catch_log()
        from llama_cpp import mtmd_cpp

        self._mtmd = mtmd_cpp
        self._image, self._width = spec.image, spec.decoder.hidden_size
        options = mtmd_cpp.mtmd_context_params_default()
        options.use_gpu = False
        options.print_timings = False
        options.warmup = False
        options.n_threads = threads
        options.cb_eval = order = class_token_order()
        preparation = spec.image.preparation
        self._is_tile = isinstance(preparation, Tiles)
        if isinstance(preparation, DynamicImage | DynamicTiles):  # sizes are ours
            options.image_min_tokens, options.image_max_tokens = 1, MOST_TOKENS
        copied: AbstractContextManager[Path] = nullcontext(path)
        if isinstance(preparation, Tiles):
            copied = without_splitting(header, preparation.size)
        elif projector_name(spec.image) not in EXACT:
            copied = with_feature_layer(header, spec.image.transformer.num_hidden_layers)
        with copied as opened:
            pointer = mtmd_cpp.mtmd_init_from_file(os.fsencode(opened), model.pointer, options)
        if not pointer:
            raise load_error(path)
        self._newline = _newline(header) if spec.image.connector.newline else None
        self._context: MtmdContext | None = MtmdContext(mtmd_cpp, pointer, (model, order))

    def encode(self, arrays: Arrays) -> Rows:
        """See :class:`mobilevlm.runtime.engines.EncoderEngine`. One image at a time: mtmd keeps the
        result inside.

        Raises:
            MobileVLMError: llama.cpp fails, or this is a step of a clip or too large.
        """
        context, pixels = still_open(self._context), np.ascontiguousarray(arrays["pixels"])
        if pixels.shape[2] != 3:
            raise MobileVLMError(
                "engine gguf encodes images, not clips: use --engine hybrid or onnx"
            )
        if (count := self._num_tokens(pixels)) > MOST_TOKENS:
            raise MobileVLMError(
                f"an image of {count} visual tokens, engine gguf takes {MOST_TOKENS}: use "
                f"--max-image-tokens {MOST_TOKENS}, or --engine hybrid or onnx"
            )
        with context.lock:
            rows = self._encode(context, pixels)
        tokens, *deep = np.split(rows, rows.shape[1] // self._width, axis=1)
        if self._newline is not None:
            tokens = np.concatenate([tokens, self._newline])
        return Rows(tokens, tuple(deep))

    def _num_tokens(self, pixels: NDArray[np.uint8]) -> int:
        """Return how many visual tokens pixels become."""
        match self._image.preparation:
            case DynamicImage(factor=edge) | DynamicTiles(whole=DynamicImage(factor=edge)):
                return math.prod(size // edge for size in pixels.shape[:2])
        return self._image.connector.num_tokens

    def features(self, arrays: Arrays) -> Float32:
        """Not to be had: mtmd runs tower and projector in one."""
        raise MobileVLMError(
            "the gguf engine gives no tower features, only visual tokens: use --engine onnx"
        )

    def close(self) -> None:
        """See :class:`mobilevlm.runtime.engines.EncoderEngine`."""
        self._context = None

    def _encode(self, context: MtmdContext, pixels: NDArray[np.uint8]) -> Float32:
        mtmd = self._mtmd
        with image_chunks(mtmd, context, pixels, special=False) as (chunks, code):
            images = [chunk for chunk in chunks if is_image(mtmd, chunk)]
            if self._is_tile:  # it is its own small image, too
                images = images[:1]
            counts = [mtmd.mtmd_input_chunk_get_n_tokens(image) for image in images]
            expected = self._num_tokens(pixels)
            if counts != [expected]:
                raise MobileVLMError(
                    f"llama.cpp makes {counts} visual tokens of an image (code {code}), "
                    f"expected {expected}"
                )
            note_threads(LLAMA)
            width = self._width * (1 + self._image.connector.deep)
            return encoded_chunk(mtmd, context, images[0], (expected, width))


def _newline(header: GgufFile) -> Float32:
    """Return the row that llama.cpp does not add ``(1, hidden_size)``."""
    tensor = header.tensors[NEWLINE]
    flat = replace(tensor, shape=(1, *tensor.shape))
    return EmbeddingRows(flat).read([0])


class MtmdContext:
    """An mtmd_context, used by one thread at a time; freed before what it refers to."""

    def __init__(self, mtmd: Any, pointer: int, refers_to: object) -> None:
        self.pointer = pointer
        self.lock = threading.Lock()
        free_with(self, _free_context, mtmd, pointer, refers_to)


def _free_context(mtmd: Any, pointer: int, refers_to: object) -> None:
    mtmd.mtmd_free(pointer)


@contextmanager
def image_chunks(
    mtmd: Any, context: MtmdContext, pixels: NDArray[np.uint8], special: bool
) -> Iterator[tuple[list[Any], int]]:
    """Yield what mtmd puts in the place of an image, and its code: 0, or else it has put nothing.
    ``special``: marks around the image become tokens."""
    height, width, _ = pixels.shape
    bitmap = mtmd.mtmd_bitmap_init(width, height, address(pixels, ctypes.c_uint8))
    chunks = mtmd.mtmd_input_chunks_init()
    try:
        marker = mtmd.mtmd_default_marker()
        text = mtmd.mtmd_input_text(marker, len(marker), False, special)
        bitmaps = (ctypes.c_void_p * 1)(bitmap)
        code = mtmd.mtmd_tokenize(context.pointer, chunks, ctypes.byref(text), bitmaps, 1)
        count = 0 if code else mtmd.mtmd_input_chunks_size(chunks)
        yield [mtmd.mtmd_input_chunks_get(chunks, index) for index in range(count)], code
    finally:
        mtmd.mtmd_input_chunks_free(chunks)
        mtmd.mtmd_bitmap_free(bitmap)


def is_image(mtmd: Any, chunk: Any) -> bool:
    """Return whether a chunk is a run of rows of an image."""
    return bool(mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE)


def encoded_chunk(mtmd: Any, context: MtmdContext, chunk: Any, shape: tuple[int, int]) -> Float32:
    """Return the rows of a chunk of an image in this shape.

    Raises:
        MobileVLMError: llama.cpp fails.
    """
    code = mtmd.mtmd_encode_chunk(context.pointer, chunk)
    if code:
        raise MobileVLMError(f"llama.cpp failed on an image (code {code})")
    result = mtmd.mtmd_get_output_embd(context.pointer)
    return np.ctypeslib.as_array(result, shape).copy()

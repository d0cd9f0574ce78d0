"""llama.cpp through llama-cpp-python's own bindings, without this runtime: mtmd for the image,
flash attention on, batches as its command-line tools make them."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import mtmd_cpp

from comparison.work import NotSupportedError, Shapes, drawn_image, questions, timed, token_ids

BATCH = 512
"""n_batch and n_ubatch: llama.cpp's default of the second."""


def load(shapes: Shapes, threads: int, options: dict[str, Any]) -> LlamaCpp:
    """``options``: ``model`` and ``mmproj``, GGUF files."""
    return LlamaCpp(shapes, threads, options["model"], options.get("mmproj"))


class LlamaCpp:
    """See :class:`comparison.work.Peer`."""

    def __init__(self, shapes: Shapes, threads: int, model: str, mmproj: str | None) -> None:
        self._shapes = shapes
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        self._model = _loaded(
            llama_cpp.llama_model_load_from_file(os.fsencode(model), settings), model
        )
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = shapes.context_length
        context.n_batch = context.n_ubatch = BATCH
        context.n_threads = context.n_threads_batch = threads
        context.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._context = _loaded(llama_cpp.llama_init_from_model(self._model, context), model)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vision = None
        if mmproj is not None:
            vision = mtmd_cpp.mtmd_context_params_default()
            vision.use_gpu = vision.print_timings = vision.warmup = False
            vision.n_threads = threads
            vision.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
            self._vision = _loaded(
                mtmd_cpp.mtmd_init_from_file(os.fsencode(mmproj), self._model, vision), mmproj
            )

    def encode(self, variation: int) -> float:
        chunks = self._image_chunks(variation)
        seconds, code = timed(mtmd_cpp.mtmd_encode_chunk, self._vision, _image(chunks))
        mtmd_cpp.mtmd_input_chunks_free(chunks)
        _check(code)
        return seconds

    def generate(self, length: int, count: int, variation: int) -> tuple[float, float]:
        ids = token_ids(length, self._shapes.vocab_size, variation)
        self._rewind(0)
        prefill, token = timed(self._next, ids)

        def decode(token: int) -> None:
            for _ in range(count):
                token = self._next([token])

        return prefill, timed(decode, token)[0]

    def ask(self, variation: int) -> tuple[float, float]:
        first, second = questions(self._shapes.vocab_size, variation)
        self._rewind(0)
        chunks = self._image_chunks(variation)

        def about_image() -> int:
            self._append_image(_image(chunks))
            return self._next(first)

        seconds = timed(about_image)[0]
        mtmd_cpp.mtmd_input_chunks_free(chunks)

        def again() -> int:
            self._rewind(self._shapes.visual_tokens)
            return self._next(second)

        return seconds, timed(again)[0]

    def _image_chunks(self, variation: int) -> Any:
        """The image prepared for the encoder; not part of any measured time."""
        if self._vision is None:
            raise NotSupportedError("no image encoder in this combination")
        size = self._shapes.image_size
        pixels = drawn_image(size, variation)
        bitmap = mtmd_cpp.mtmd_bitmap_init(
            size, size, pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        )
        chunks = mtmd_cpp.mtmd_input_chunks_init()
        marker = mtmd_cpp.mtmd_default_marker()
        text = mtmd_cpp.mtmd_input_text(marker, len(marker), False, False)
        _check(
            mtmd_cpp.mtmd_tokenize(
                self._vision, chunks, ctypes.byref(text), (ctypes.c_void_p * 1)(bitmap), 1
            )
        )
        mtmd_cpp.mtmd_bitmap_free(bitmap)
        assert mtmd_cpp.mtmd_input_chunk_get_n_tokens(_image(chunks)) == self._shapes.visual_tokens
        return chunks

    def _append_image(self, chunk: Any) -> None:
        """Encodes the image and puts its tokens into the sequence."""
        length = ctypes.c_int32()
        _check(
            mtmd_cpp.mtmd_helper_eval_chunk_single(
                self._vision, self._context, chunk, 0, 0, BATCH, False, ctypes.byref(length)
            )
        )
        assert length.value == self._shapes.visual_tokens

    def _next(self, ids: list[int]) -> int:
        """Appends tokens; the greedy choice after them."""
        for start in range(0, len(ids), BATCH):
            tokens = np.array(ids[start : start + BATCH], np.int32)
            pointer = tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
            _check(
                llama_cpp.llama_decode(
                    self._context, llama_cpp.llama_batch_get_one(pointer, len(tokens))
                )
            )
        logits = llama_cpp.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self._shapes.vocab_size,)).argmax())

    def _rewind(self, length: int) -> None:
        assert llama_cpp.llama_memory_seq_rm(self._memory, 0, length, -1)


def _image(chunks: Any) -> Any:
    """The only image among chunks."""
    return next(
        chunk
        for index in range(mtmd_cpp.mtmd_input_chunks_size(chunks))
        if mtmd_cpp.mtmd_input_chunk_get_type(
            chunk := mtmd_cpp.mtmd_input_chunks_get(chunks, index)
        )
        == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_IMAGE
    )


def _loaded(pointer: Any, path: str) -> Any:
    if not pointer:
        raise RuntimeError(f"llama.cpp cannot load {path}")
    return pointer


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"llama.cpp failed (code {code})")

"""llama.cpp through llama-cpp-python's own bindings, without this runtime: mtmd for the photo,
its tiles in batches, flash attention on, batches of tokens as its command-line tools make them."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import mtmd_cpp

from comparison.work import NotSupportedError, Shapes, photo, questions, timed, token_ids

NO_CALLBACK = mtmd_cpp.mtmd_helper_post_decode_callback()
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
        chunks = self._photo_chunks(variation)
        seconds, encoded = timed(self._encode, chunks)
        self._free(encoded)
        mtmd_cpp.mtmd_input_chunks_free(chunks)
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
        chunks = self._photo_chunks(variation)

        def about_photo() -> tuple[int, list[Any]]:
            encoded = self._encode(chunks)
            end = self._append(chunks, encoded)
            self._next(first)
            return end, encoded

        seconds, (end, encoded) = timed(about_photo)
        self._free(encoded)
        mtmd_cpp.mtmd_input_chunks_free(chunks)

        def again() -> int:
            self._rewind(end)
            return self._next(second)

        return seconds, timed(again)[0]

    def _photo_chunks(self, variation: int) -> Any:
        """The photo prepared for the encoder; not part of any measured time."""
        if self._vision is None:
            raise NotSupportedError("no image encoder in this combination")
        width, height = self._shapes.photo
        pixels = photo(self._shapes.photo, variation)
        bitmap = mtmd_cpp.mtmd_bitmap_init(
            width, height, pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
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
        found = sum(mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk) for chunk in _each(chunks))
        if found != self._shapes.visual_tokens:
            raise NotSupportedError(
                f"takes {found} positions for the photo, the official code "
                f"{self._shapes.visual_tokens}"
            )
        return chunks

    def _encode(self, chunks: Any) -> list[Any]:
        """Batches that hold the visual tokens of all tiles, each of as many as llama.cpp takes into
        one."""
        batches: list[Any] = []
        for chunk in (each for each in _each(chunks) if _is_image(each)):
            if batches and mtmd_cpp.mtmd_batch_add_chunk(batches[-1], chunk) == 0:
                continue
            if batches:
                _check(mtmd_cpp.mtmd_batch_encode(batches[-1]))
            batches.append(mtmd_cpp.mtmd_batch_init(self._vision))
            _check(mtmd_cpp.mtmd_batch_add_chunk(batches[-1], chunk))
        _check(mtmd_cpp.mtmd_batch_encode(batches[-1]))
        return batches

    def _append(self, chunks: Any, encoded: list[Any]) -> int:
        """Put the photo into the sequence, its visual tokens and the marks between them; return the
        position behind it."""
        end = ctypes.c_int32(0)
        for chunk in _each(chunks):
            target = self._vision, self._context, chunk
            start = end.value
            if _is_image(chunk):
                found = (mtmd_cpp.mtmd_batch_get_output_embd(batch, chunk) for batch in encoded)
                rows = next(filter(None, found))
                code = mtmd_cpp.mtmd_helper_decode_image_chunk(
                    *target, rows, start, 0, BATCH, ctypes.byref(end), NO_CALLBACK, None
                )
            else:
                code = mtmd_cpp.mtmd_helper_eval_chunk_single(
                    *target, start, 0, BATCH, False, ctypes.byref(end)
                )
            _check(code)
        return end.value

    def _free(self, encoded: list[Any]) -> None:
        for batch in encoded:
            mtmd_cpp.mtmd_batch_free(batch)

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


def _each(chunks: Any) -> list[Any]:
    count = mtmd_cpp.mtmd_input_chunks_size(chunks)
    return [mtmd_cpp.mtmd_input_chunks_get(chunks, index) for index in range(count)]


def _is_image(chunk: Any) -> bool:
    kind = mtmd_cpp.mtmd_input_chunk_get_type(chunk)
    return bool(kind == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_IMAGE)


def _loaded(pointer: Any, path: str) -> Any:
    if not pointer:
        raise RuntimeError(f"llama.cpp cannot load {path}")
    return pointer


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"llama.cpp failed (code {code})")

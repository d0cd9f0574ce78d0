"""llama.cpp through its low-level interface alone, as a second opinion on the GGUF files."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

if os.environ.get("MOBILEVLM_WITHOUT_LLAMA") == "1":
    pytest.skip("asked to go without llama.cpp", allow_module_level=True)

from conftest import Fixture
from llama_cpp import llama_cpp
from llama_cpp import mtmd_cpp as mtmd

import mobilevlm
from mobilevlm.families import open_checkpoint
from mobilevlm.model import Model
from mobilevlm.synth.checkpoints import CONFIGURATIONS, Configuration, Tower, write_checkpoint

__all__ = ["llama_cpp", "mtmd"]  # for tests that need more of it
THREADS = 2
Float32 = NDArray[np.float32]


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _silent(level: int, text: bytes, data: object) -> None:
    pass


def wide_model(folder: Path, layers: int = 2) -> Model:
    """Random weights in rows of 256 and 512: the K-quants' blocks have 256 weights, and rows of the
    reference models only 64."""
    tower = Tower(64, 128, 3, 4)
    names = ("mobilevlm", "MobileLlamaForCausalLM", "ldpnetv2")
    shape = Configuration(*names, 512, 256, 512, layers, 4, 512, 1e-6, tower)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGURATIONS, "wide", shape)
        write_checkpoint("wide", folder)
    return open_checkpoint(folder)


def onnx_and_gguf(fixture: Fixture, folder: Path) -> Path:
    """Export a reference checkpoint in float32 as ONNX and GGUF; return the bundle."""
    bundle = folder / "bundle"
    formats = ["onnx", "gguf"]
    mobilevlm.export(fixture.checkpoint, bundle, recipe="fp32", formats=formats, measure=False)
    return bundle


def decoder_path(bundle: Path) -> Path:
    """Return the language model of a bundle with GGUF files."""
    [path] = [path for path in (bundle / "gguf").iterdir() if "mmproj" not in path.name]
    return path


@contextmanager
def opened(path: Path, length: int = 1024) -> Iterator[Decoder]:
    """A decoder file with a context of so many positions."""
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
    model = llama_cpp.llama_model_load_from_file(
        bytes(path), llama_cpp.llama_model_default_params()
    )
    assert model, f"llama.cpp does not load {path.name}"
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = length
    params.n_threads = params.n_threads_batch = THREADS
    params.type_k = params.type_v = 0  # float32
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, params)
    try:
        yield Decoder(model, context)
    finally:
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)


class Decoder:
    """One sequence in an open decoder file."""

    def __init__(self, model: Any, context: Any) -> None:
        self.model, self.context = model, context
        self.vocab = llama_cpp.llama_model_get_vocab(model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(self.vocab)

    def logits(self, embeds: Float32) -> Float32:
        """Logits after every position of ``(length, hidden_size)``."""
        length, hidden = embeds.shape
        batch = llama_cpp.llama_batch_init(length, hidden, 1)
        embeds = np.ascontiguousarray(embeds)
        ctypes.memmove(batch.embd, embeds.ctypes.data, embeds.nbytes)
        self._place(batch, 0, length)
        assert llama_cpp.llama_decode(self.context, batch) == 0
        rows = llama_cpp.llama_get_logits(self.context)
        found = np.ctypeslib.as_array(rows, (length, self.vocab_size)).copy()
        llama_cpp.llama_batch_free(batch)
        return found

    def greedy(self, logits: Float32, position: int, count: int) -> tuple[list[int], Float32]:
        """So many tokens after the logits of the last position, and the logits of each."""
        tokens, rows = [], []
        for index in range(count):
            rows.append(logits)
            tokens.append(int(logits.argmax()))
            logits = self.step(tokens[-1], position + index)
        return tokens, np.stack(rows)

    def step(self, token: int, position: int) -> Float32:
        """Logits after a token."""
        batch = llama_cpp.llama_batch_init(1, 0, 1)
        batch.token[0] = token
        self._place(batch, position, 1)
        assert llama_cpp.llama_decode(self.context, batch) == 0
        last = llama_cpp.llama_get_logits_ith(self.context, -1)
        llama_cpp.llama_batch_free(batch)
        return np.ctypeslib.as_array(last, (self.vocab_size,)).copy()

    def tokenize(self, text: str, add_special: bool) -> list[int]:
        data = text.encode()
        ids = (llama_cpp.llama_token * (len(data) + 8))()
        count = llama_cpp.llama_tokenize(
            self.vocab, data, len(data), ids, len(ids), add_special, False
        )
        assert count >= 0
        return list(ids[:count])

    def encode_image(
        self, mmproj: Path, pixels: NDArray[np.uint8], callback: Any = None
    ) -> Float32:
        """mtmd's embedding ``(tokens, hidden_size)`` of uint8 ``(height, width, 3)``."""
        mtmd.mtmd_log_set(_silent, ctypes.c_void_p(0))
        mtmd.mtmd_helper_log_set(_silent, ctypes.c_void_p(0))
        params = mtmd.mtmd_context_params_default()
        params.use_gpu = params.print_timings = params.warmup = False
        params.n_threads = THREADS
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if callback is not None:
            params.cb_eval = callback
        context = mtmd.mtmd_init_from_file(bytes(mmproj), self.model, params)
        assert context, f"llama.cpp does not load {mmproj.name}"
        height, width, _ = pixels.shape
        data = (ctypes.c_uint8 * pixels.size).from_buffer_copy(pixels.tobytes())
        bitmap = mtmd.mtmd_bitmap_init(width, height, data)
        chunks = mtmd.mtmd_input_chunks_init()
        marker = mtmd.mtmd_default_marker()
        text = mtmd.mtmd_input_text(marker, len(marker), False, True)
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        assert mtmd.mtmd_tokenize(context, chunks, ctypes.byref(text), bitmaps, 1) == 0
        try:
            for index in range(mtmd.mtmd_input_chunks_size(chunks)):
                chunk = mtmd.mtmd_input_chunks_get(chunks, index)
                if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                    assert mtmd.mtmd_encode_chunk(context, chunk) == 0
                    tokens = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
                    hidden = llama_cpp.llama_model_n_embd(self.model)
                    values = mtmd.mtmd_get_output_embd(context)
                    return np.ctypeslib.as_array(values, (tokens, hidden)).copy()
            raise AssertionError("mtmd made no image chunk")
        finally:
            mtmd.mtmd_input_chunks_free(chunks)
            mtmd.mtmd_bitmap_free(bitmap)
            mtmd.mtmd_free(context)

    def _place(self, batch: Any, start: int, length: int) -> None:
        batch.n_tokens = length
        for index in range(length):
            batch.pos[index] = start + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = True


def by_llama_cpp(
    pair: tuple[Path, Path], prompt: str, images: Sequence[NDArray[np.uint8]]
) -> Float32:
    """Logits after a prompt, from llama.cpp's own loop. ``prompt``: with its marker."""
    with prompted(pair, prompt, images) as (_, logits, _):
        return logits


@contextmanager
def prompted(
    pair: tuple[Path, Path], prompt: str, images: Sequence[NDArray[np.uint8]], fewest: int = -1
) -> Iterator[tuple[Decoder, Float32, int]]:
    """A decoder after such a prompt, its logits, and the next position. ``fewest``: visual tokens
    of an image."""
    with opened(pair[0], 2048) as decoder:
        params = mtmd.mtmd_context_params_default()
        params.use_gpu = params.print_timings = params.warmup = False
        params.n_threads, params.image_min_tokens = THREADS, fewest
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = mtmd.mtmd_init_from_file(bytes(pair[1]), decoder.model, params)
        assert context, f"llama.cpp does not load {pair[1].name}"
        chunks, text = mtmd.mtmd_input_chunks_init(), prompt.encode()
        bitmaps = []
        for pixels in images:
            data = (ctypes.c_uint8 * pixels.size).from_buffer_copy(pixels.tobytes())
            bitmaps.append(mtmd.mtmd_bitmap_init(pixels.shape[1], pixels.shape[0], data))
        given = mtmd.mtmd_input_text(text, len(text), True, True)
        listed = (mtmd.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
        tokenize = mtmd.mtmd_tokenize
        assert tokenize(context, chunks, ctypes.byref(given), listed, len(bitmaps)) == 0
        past = ctypes.c_int32(0)
        code = mtmd.mtmd_helper_eval_chunks(
            context, decoder.context, chunks, 0, 0, 2048, True, ctypes.byref(past)
        )
        assert code == 0
        last = llama_cpp.llama_get_logits_ith(decoder.context, -1)
        found = np.ctypeslib.as_array(last, (decoder.vocab_size,)).copy()
        mtmd.mtmd_input_chunks_free(chunks)
        for bitmap in bitmaps:
            mtmd.mtmd_bitmap_free(bitmap)
        mtmd.mtmd_free(context)
        yield decoder, found, past.value

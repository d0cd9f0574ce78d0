"""Images of a pair of GGUF files of any family: mtmd, llama.cpp's multimodal library, prepares
them, says how many positions they take and which marks stand around them, and encodes them."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevlm.errors import BundleError, ImageError, MobileVLMError
from mobilevlm.gguf.file import GgufFile
from mobilevlm.gguf.pair import CLIP_PROJECTORS, projector_name
from mobilevlm.image import ImageInput, RoomFor, open_image
from mobilevlm.prompt import Arrays, Piece, Prepared, Rows, Run
from mobilevlm.runtime.engines import Float32, still_open
from mobilevlm.runtime.engines.llama.clip_order import class_token_order
from mobilevlm.runtime.engines.llama.mtmd import (
    MtmdContext,
    encoded_chunk,
    image_chunks,
    is_image,
)
from mobilevlm.runtime.engines.llama.native import (
    LLAMA,
    NativeModel,
    catch_log,
    llama_library,
    load_error,
)
from mobilevlm.runtime.engines.onnx.feature_layer import with_feature_layer
from mobilevlm.runtime.engines.onnx.forking import note_threads

LEAST_EDGE, LONGEST_SHAPE = 2, 200
"""Pixels of the shorter edge, and longer edge over the shorter one: at less, or more, llama.cpp's
resizing ends the process, or makes nothing."""
_COPIES = 4
"""Copies of the pixels that mtmd makes: the bitmap, its own image, and what it resizes to."""
_AXES = 4
"""Numbers of a position: time, row, column and one more."""


class PairImages:
    """See :class:`mobilevlm.runtime.engines.EncoderEngine`. It prepares images, too."""

    def __init__(self, header: GgufFile, model: NativeModel, threads: int, exact: bool) -> None:
        """``header``: of the file, checked; ``exact``: attention is computed in float32.

        Raises:
            BundleError: llama.cpp cannot load it, or not beside this language model.
        """
        path = header.path
        catch_log()
        from llama_cpp import mtmd_cpp

        self._mtmd, self._path = mtmd_cpp, path
        self._projector = projector_name(header)
        options = mtmd_cpp.mtmd_context_params_default()
        options.use_gpu = options.print_timings = options.warmup = False
        options.n_threads = threads
        order, opened = None, header.path
        if exact:
            options.flash_attn_type = llama_library().LLAMA_FLASH_ATTN_TYPE_DISABLED
        if self._projector in CLIP_PROJECTORS:
            options.cb_eval = order = class_token_order()
            layers = int(header.metadata.get("clip.vision.block_count", 0))
            with with_feature_layer(header, layers) as opened:
                pointer = mtmd_cpp.mtmd_init_from_file(os.fsencode(opened), model.pointer, options)
        else:
            pointer = mtmd_cpp.mtmd_init_from_file(os.fsencode(opened), model.pointer, options)
        if not pointer:
            raise load_error(path)
        self._context: MtmdContext | None = MtmdContext(mtmd_cpp, pointer, (model, order))
        if not mtmd_cpp.mtmd_support_vision(pointer):
            raise BundleError(f"{path}: an encoder of sound alone: give one of images (mmproj)")
        library = llama_library()
        self.width = library.llama_model_n_embd_inp(model.pointer)
        """Numbers in a row"""
        self._vocab_size = library.llama_vocab_n_tokens(
            library.llama_model_get_vocab(model.pointer)
        )
        self.has_axes = bool(mtmd_cpp.mtmd_decode_use_mrope(pointer))
        """True if positions have several axes (M-RoPE)"""
        self.blocks = bool(mtmd_cpp.mtmd_decode_use_non_causal(pointer, None))
        """True if rows of an image may see each other"""

    def prepare(self, source: ImageInput, room_for: RoomFor | None = None) -> Prepared:
        """Return an image as the model takes it: ``pixels``; ``positions`` of all rows in runs that
        begin at 0, and whether each moves with its run's beginning, ``moves`` (rows, 4) both; and
        of each run how many positions it takes and whether its rows see each other, ``runs``
        (runs, 2).

        Raises:
            ImageError: prepared for another model, missing, damaged, not an image, or of a size
                that llama.cpp does not take.
        """
        if isinstance(source, Prepared):
            if source.kind != self._kind:
                raise ImageError(
                    "an image that was prepared for another model: prepare it with this one"
                )
            return source
        image = open_image(source, room_for)
        _check_size(image.size)
        needed = float(_COPIES * image.width * image.height * 3)
        if room_for is not None and needed > (room := room_for(needed)).size:
            raise ImageError(
                f"image of {image.width} × {image.height} pixels: llama.cpp's own resizing takes "
                f"{needed / 1e6:.0f} MB, there is room for {max(room.size, 0) / 1e6:.0f} MB "
                f"({room.where}): scale it down first"
            )
        pixels = np.asarray(image, np.uint8)
        context = still_open(self._context)
        pieces: list[Piece] = []
        positions, moves = [np.empty((0, _AXES), np.int32)], [np.empty((0, _AXES), np.int32)]
        runs: list[tuple[int, bool]] = []
        with context.lock, self._chunks(context, pixels) as chunks:
            for chunk in chunks:
                if self._is_image(chunk):
                    placed = self._placed(chunk, 0)
                    pieces.append(Run(len(placed)))
                    positions.append(placed)
                    moves.append(self._placed(chunk, 1) - placed)
                    runs.append(self._run(context, chunk))
                else:
                    pieces += self._marks(chunk)
        arrays: dict[str, NDArray[Any]] = {
            "pixels": pixels,
            "positions": np.concatenate(positions),
            "moves": np.concatenate(moves),
            "runs": np.array(runs, np.int32).reshape(-1, 2),
        }
        return Prepared(self._kind, (arrays,), tuple(pieces))

    def encode(self, arrays: Arrays) -> Rows:
        """See :class:`mobilevlm.runtime.engines.EncoderEngine`. One image at a time: mtmd keeps the
        result inside."""
        return self.encode_runs(arrays, None)

    def encode_runs(self, arrays: Arrays, most: int | None) -> Rows:
        """Return the rows of the first ``most`` runs of an image, or of all."""
        context, rows = still_open(self._context), [np.empty((0, self.width), np.float32)]
        pixels = np.ascontiguousarray(arrays["pixels"])
        note_threads(LLAMA)
        with context.lock, self._chunks(context, pixels) as chunks:
            for chunk in islice(filter(self._is_image, chunks), most):
                shape = self._mtmd.mtmd_input_chunk_get_n_tokens(chunk), self.width
                rows.append(encoded_chunk(self._mtmd, context, chunk, shape))
        return Rows(np.concatenate(rows))

    def features(self, arrays: Arrays) -> Float32:
        """Not to be had: mtmd runs tower and projector in one."""
        raise MobileVLMError("llama.cpp gives no tower features, only visual tokens")

    def close(self) -> None:
        """See :class:`mobilevlm.runtime.engines.EncoderEngine`."""
        self._context = None

    @property
    def _kind(self) -> str:
        return f"llama.cpp {self._projector} {self.width}"

    @contextmanager
    def _chunks(self, context: MtmdContext, pixels: NDArray[np.uint8]) -> Iterator[list[Any]]:
        """Yield what mtmd puts in the place of an image."""
        with image_chunks(self._mtmd, context, pixels, special=True) as (chunks, code):
            if code:
                height, width, _ = pixels.shape
                raise ImageError(
                    f"image of {width} × {height} pixels: llama.cpp cannot prepare it (code "
                    f"{code}): try another size or shape"
                )
            yield chunks

    def _is_image(self, chunk: Any) -> bool:
        return is_image(self._mtmd, chunk)

    def _marks(self, chunk: Any) -> list[int]:
        """Return the ids of a chunk of text."""
        count = ctypes.c_size_t()
        ids = self._mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
        found = [int(ids[index]) for index in range(count.value)]
        if any(not 0 <= index < self._vocab_size for index in found):
            raise BundleError(
                f"{self._path}: the marks that {self._projector!r:.60} has around images are not "
                f"in the vocabulary of the language model: take both files of one model"
            )
        return found

    def _placed(self, chunk: Any, start: int) -> NDArray[np.int32]:
        """Return the position of each row of a run that begins at ``start`` ``(rows, 4)``."""
        tokens = self._mtmd.mtmd_input_chunk_get_tokens_image(chunk)
        count = self._mtmd.mtmd_input_chunk_get_n_tokens(chunk)
        if not self.has_axes:
            return np.tile(np.arange(start, start + count, dtype=np.int32)[:, None], (1, _AXES))
        place = self._mtmd.mtmd_image_tokens_get_decoder_pos
        found = [place(tokens, start, index) for index in range(count)]
        axes = [(at.t, at.y, at.x, at.z) for at in found]
        return np.array(axes, np.int32).reshape(-1, _AXES)

    def _run(self, context: MtmdContext, chunk: Any) -> tuple[int, bool]:
        """Return how many positions a run takes, and whether its rows see each other."""
        steps = self._mtmd.mtmd_input_chunk_get_n_pos(chunk)
        return steps, bool(self._mtmd.mtmd_decode_use_non_causal(context.pointer, chunk))


def _check_size(size: tuple[int, int]) -> None:
    if min(size) < LEAST_EDGE or max(size) > LONGEST_SHAPE * min(size):
        raise ImageError(
            f"image of {size[0]} × {size[1]} pixels: llama.cpp takes images of at least "
            f"{LEAST_EDGE} pixels along each edge that are up to {LONGEST_SHAPE} times as long as "
            f"wide: cut or scale it first"
        )

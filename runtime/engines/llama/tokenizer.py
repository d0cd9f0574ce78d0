"""llama.cpp's own tokenizer of an open model: of every kind that it knows."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from mobilevlm.errors import PromptError
from mobilevlm.runtime.engines.llama.native import NativeModel, address, llama_library
from mobilevlm.tokenizers.library import AddedToken, LibraryTokenizer

_MOST_BYTES = 1 << 30
"""Bytes of a text; llama.cpp counts them in 32 bits."""


class LlamaTokenizer(LibraryTokenizer):
    """Tokenizer of a model; holds it open."""

    def __init__(self, model: NativeModel) -> None:
        library = llama_library()
        self._model = model
        self._vocab = library.llama_model_get_vocab(model.pointer)
        self._leading_space = library.llama_vocab_type(self._vocab) == library.LLAMA_VOCAB_TYPE_SPM
        count = library.llama_vocab_n_tokens(self._vocab)
        tokens = [_text(library, self._vocab, index) for index in range(count)]
        added = {}
        control = library.LLAMA_TOKEN_ATTR_CONTROL
        for index, text in enumerate(tokens):
            kind = library.llama_vocab_get_attr(self._vocab, index)
            if kind & (control | library.LLAMA_TOKEN_ATTR_USER_DEFINED) and text:
                added[index] = AddedToken(text, bool(kind & control))
        begin = library.llama_vocab_bos(self._vocab)
        begins = library.llama_vocab_get_add_bos(self._vocab) and begin >= 0
        super().__init__(tokens, added, begin if begins else None)

    @property
    def ends(self) -> list[int]:
        """Ids that end an answer."""
        library = llama_library()
        every = range(len(self._tokens))
        return [index for index in every if library.llama_vocab_is_eog(self._vocab, index)]

    def _ids(self, text: str, special: bool) -> list[int]:
        data = text.encode()
        if len(data) > _MOST_BYTES:
            raise PromptError(f"the prompt has {len(data)} bytes, at most {_MOST_BYTES} are read")
        tokenize = llama_library().llama_tokenize
        found = np.empty(len(data) + 8, np.int32)
        for _ in range(2):
            ids = address(found, ctypes.c_int32)
            count = tokenize(self._vocab, data, len(data), ids, found.size, False, special)
            if count >= 0:
                return [int(index) for index in found[:count]]
            found = np.empty(max(-count, 1), np.int32)
        raise PromptError("llama.cpp's tokenizer failed on the prompt: shorten it")

    def token_bytes(self, token: int, first: bool) -> bytes:
        """See :class:`LibraryTokenizer`."""
        to_piece = llama_library().llama_token_to_piece
        skipped = int(first and self._leading_space)
        piece = ctypes.create_string_buffer(256)
        size = to_piece(self._vocab, token, piece, len(piece), skipped, False)
        if size < 0:
            piece = ctypes.create_string_buffer(-size)
            size = to_piece(self._vocab, token, piece, len(piece), skipped, False)
        return piece.raw[: max(size, 0)]


def _text(library: Any, vocab: Any, index: int) -> str:
    text: bytes | None = library.llama_vocab_get_text(vocab, index)
    return (text or b"").decode(errors="replace")

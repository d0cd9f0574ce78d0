"""Engines: one file each. What a vision engine and a decoder engine must do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from mobilevlm.errors import MobileVLMError

T = TypeVar("T")
Float32 = NDArray[np.float32]


class VisionEngine(Protocol):
    """Runs the vision stage. May be used by several threads."""

    def encode(self, pixels: NDArray[np.uint8]) -> Float32:
        """``(size, size, 3)`` to visual tokens ``(num_tokens, hidden_size)``."""

    def features(self, pixels: NDArray[np.uint8]) -> Float32:
        """``(size, size, 3)`` to tower features ``(num_patches, vision hidden_size)``."""

    def close(self) -> None:
        """Frees the weights."""


class DecoderState(Protocol):
    """Keys and values of one sequence. Used by one thread at a time."""

    length: int
    """Positions that are filled; lowering it goes back."""


class DecoderEngine(Protocol):
    """Runs the decoder stage. May be used by several threads, each with a state of its own."""

    def new_state(self) -> DecoderState:
        """An empty sequence."""

    def embed(self, ids: Sequence[int]) -> Float32:
        """Token ids to embeddings ``(length, hidden_size)``."""

    def prefill(self, state: DecoderState, embeds: Float32, all_logits: bool = False) -> Float32:
        """Appends ``(length, hidden_size)``; logits of the last position ``(1, vocab_size)``, or of
        all ``(length, vocab_size)``."""

    def step(self, state: DecoderState, token: int) -> Float32:
        """Appends one token; logits ``(vocab_size,)``, valid until the next call."""

    def close(self) -> None:
        """Frees the weights."""


def still_open(part: T | None) -> T:
    """What ``close`` sets to none.

    Raises:
        MobileVLMError: it was closed.
    """
    if part is None:
        raise MobileVLMError("this model was closed: load it again")
    return part

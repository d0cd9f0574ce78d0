"""The work that every peer does, and what a peer must be able to do.

Read by the worker processes too, whose interpreters may have nothing but numpy and their peer's
own package: nothing else is imported here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

TEXT_TOKENS = 56
"""Text tokens beside an image: a short question with a conversation around it."""
PROMPT_TOKENS = 200
NEW_TOKENS = 64
BOS = 1

T = TypeVar("T")


@dataclass(frozen=True)
class Shapes:
    """Sizes of the model that a worker needs."""

    photo: tuple[int, int]
    """Width and height of the photo that is asked about, in pixels."""
    tiles: int
    """Images that the encoder takes for it: 1 where a photo is not split."""
    image_size: int
    """Width and height of one of them."""
    visual_tokens: int
    """Positions of the photo in a prompt, marks between tiles included."""
    hidden_size: int
    vocab_size: int
    context_length: int


class Peer(Protocol):
    """A loaded model. Every method starts from an empty sequence and returns seconds.

    ``variation``: another one asks about another image and other tokens, so that no cache can
    answer what should be computed.
    """

    def encode(self, variation: int) -> float:
        """One photo, as uint8 pixels, to visual tokens: all of its tiles."""

    def generate(self, length: int, count: int, variation: int) -> tuple[float, float]:
        """A prompt of ``length`` tokens up to its first greedy token, then ``count`` more."""

    def ask(self, variation: int) -> tuple[float, float]:
        """An image and ``TEXT_TOKENS`` text tokens up to the first greedy token; then another
        question, as long, about the same image."""


class NotSupportedError(Exception):
    """This peer has no such stage."""


def photo(size: Sequence[int], variation: int) -> NDArray[np.uint8]:
    """Noise ``(height, width, 3)``. ``size``: width and height."""
    width, height = size
    return np.random.default_rng(variation).integers(0, 256, (height, width, 3), np.uint8)


def token_ids(length: int, vocab_size: int, variation: int) -> list[int]:
    """Ordinary tokens (special and byte tokens come first in a vocabulary), BOS before them."""
    random = np.random.default_rng(variation)
    return [BOS, *random.integers(min(300, vocab_size // 2), vocab_size, length - 1).tolist()]


def questions(vocab_size: int, variation: int) -> tuple[list[int], list[int]]:
    """Ids of two questions about one image."""
    first, second = (token_ids(TEXT_TOKENS, vocab_size, 2 * variation + turn) for turn in (0, 1))
    return first, second


def timed(action: Callable[..., T], *arguments: Any) -> tuple[float, T]:
    """Seconds that a call took, and its result."""
    start = time.perf_counter()
    result = action(*arguments)
    return time.perf_counter() - start, result

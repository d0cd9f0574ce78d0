"""One sequence in the decoder: what stands at each position, and how a prompt gets there."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mobilevlm.errors import PromptError
from mobilevlm.runtime.engines import DecoderEngine, Float32, VisionEngine
from mobilevlm.spec import IMAGE_TOKEN_ID, ModelSpec

Pixels: TypeAlias = "NDArray[np.uint8]"
PositionKey: TypeAlias = "int | tuple[bytes, int]"
"""What stands at a position: a token id, or row i of the picture with this digest."""


class Clock:
    """Collects the seconds of each ``with clock:``."""

    def __init__(self) -> None:
        self.samples: list[float] = []

    @property
    def seconds(self) -> float:
        """The sum."""
        return sum(self.samples)

    def __enter__(self) -> Clock:
        self._start = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.samples.append(time.perf_counter() - self._start)


@dataclass(frozen=True)
class Prompt:
    """Input ids with -200 for each picture, and the pictures' pixels ``(size, size, 3)``."""

    ids: list[int]
    pixels: list[Pixels]
    seconds: float
    """What it took to make them."""


class Session:
    """A sequence and its KV state. Used by one thread at a time.

    ``reuse_prefix``: a prompt that begins like the sequence that is there keeps that beginning and
    computes only the rest (the turns of a chat). Dynamic int8 quantization then sees other groups
    of rows than it would in a fresh sequence, so its results may differ in the last digits.
    """

    def __init__(
        self, spec: ModelSpec, vision: VisionEngine, decoder: DecoderEngine, reuse_prefix: bool
    ) -> None:
        self.tokens_per_image = spec.projector.num_tokens
        self._context = spec.decoder.context_length
        self._hidden_size = spec.decoder.hidden_size
        self._vision, self._decoder = vision, decoder
        self._reuse_prefix = reuse_prefix
        self._state = decoder.new_state()
        self._keys: list[PositionKey] = []
        self._seen: dict[bytes, Float32] = {}

    @property
    def length(self) -> int:
        """Positions that are filled."""
        return self._state.length

    @property
    def full(self) -> bool:
        """Whether the context has no room for another token."""
        return self._state.length >= self._context

    def fill(self, prompt: Prompt, vision: Clock, prefill: Clock) -> Float32:
        """Makes the sequence equal to the prompt; logits after it ``(vocab_size,)``.

        Raises:
            PromptError: it does not fit into the context.
        """
        logits: Float32 = self._extend(prompt, vision, prefill, all_logits=False)[-1]
        return logits

    def all_logits(self, prompt: Prompt) -> Float32:
        """Logits after every position of the prompt ``(length, vocab_size)``."""
        self._keys.clear()
        return self._extend(prompt, Clock(), Clock(), all_logits=True)

    def step(self, token: int) -> Float32:
        """Appends a token; logits ``(vocab_size,)``, valid until the next call."""
        logits = self._decoder.step(self._state, token)
        self._keys.append(token)
        return logits

    def _extend(self, prompt: Prompt, vision: Clock, prefill: Clock, all_logits: bool) -> Float32:
        digests = [
            hashlib.blake2b(pixels.tobytes(), digest_size=16).digest() for pixels in prompt.pixels
        ]
        keys = self._position_keys(prompt.ids, digests)
        if len(keys) >= self._context:
            pictures = f", {self.tokens_per_image} for each picture" if digests else ""
            raise PromptError(
                f"the prompt takes {len(keys)} tokens{pictures}, the context holds "
                f"{self._context} with the answer: shorten it"
            )
        kept = self._common_prefix(keys) if self._reuse_prefix else 0
        self._state.length = kept
        self._keys = keys[:kept]
        with vision:
            images = self._visual_tokens(
                keys[kept:], dict(zip(digests, prompt.pixels, strict=True))
            )
        with prefill:
            embeds = self._embed(keys[kept:], images)
            logits = self._decoder.prefill(self._state, embeds, all_logits)
        self._keys = keys
        return logits

    def _position_keys(self, ids: Sequence[int], digests: Sequence[bytes]) -> list[PositionKey]:
        keys: list[PositionKey] = []
        images = iter(digests)
        for token in ids:
            if token == IMAGE_TOKEN_ID:
                digest = next(images)
                keys += [(digest, row) for row in range(self.tokens_per_image)]
            else:
                keys.append(token)
        return keys

    def _common_prefix(self, keys: Sequence[PositionKey]) -> int:
        """How much of the present sequence stays; at least one position is computed."""
        count = 0
        for ours, theirs in zip(self._keys[: self._state.length], keys[:-1], strict=False):
            if ours != theirs:
                break
            count += 1
        return count

    def _visual_tokens(
        self, keys: Sequence[PositionKey], pixels: dict[bytes, Pixels]
    ) -> dict[bytes, Float32]:
        """Visual tokens of the pictures among ``keys``; a chat's pictures are encoded once."""
        for digest in {key[0]: None for key in keys if isinstance(key, tuple)}:
            if digest not in self._seen:
                self._seen[digest] = self._vision.encode(pixels[digest])
        if not self._reuse_prefix:
            seen, self._seen = self._seen, {}
            return seen
        self._seen = {digest: self._seen[digest] for digest in pixels if digest in self._seen}
        return self._seen

    def _embed(self, keys: Sequence[PositionKey], images: dict[bytes, Float32]) -> Float32:
        embeds = np.empty((len(keys), self._hidden_size), np.float32)
        tokens = [index for index, key in enumerate(keys) if isinstance(key, int)]
        if tokens:
            embeds[tokens] = self._decoder.embed([key for key in keys if isinstance(key, int)])
        for index, key in enumerate(keys):
            if isinstance(key, tuple):
                embeds[index] = images[key[0]][key[1]]
        return embeds

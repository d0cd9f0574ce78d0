"""Engines: one file each. Protocols of an encoder and of a decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import BundleError, MobileVLMError
from mobilevlm.plan import PREFILL_CHUNK
from mobilevlm.prompt import Arrays, Rows

T = TypeVar("T")
Float32 = NDArray[np.float32]
Positions = NDArray[np.int64]
"""(axes, length)"""
CacheType: TypeAlias = "type[np.float32] | type[np.int8]"
"""Type of stored keys and values"""
ExpertChoices: TypeAlias = Mapping[int, NDArray[np.integer[Any]]]
"""The experts of each position ``(length, top_k)``, best first, by layer."""


class EncoderEngine(Protocol):
    """Runs an encoder and its connector. May be used by several threads."""

    def encode(self, arrays: Arrays) -> Rows:
        """Named arrays, as a preparation makes them, to rows for the decoder."""

    def features(self, arrays: Arrays) -> Float32:
        """The same arrays to the encoder's features ``(num_features, encoder hidden_size)``, before
        the connector."""

    def close(self) -> None:
        """Frees the weights."""


class NoImages:
    """See :class:`EncoderEngine`. Of a language model without inputs beside text."""

    def encode(self, arrays: Arrays) -> Rows:
        """Not to be had."""
        raise MobileVLMError("this model takes no images: leave them out")

    def features(self, arrays: Arrays) -> Float32:
        """Not to be had."""
        raise MobileVLMError("this model takes no images: leave them out")

    def close(self) -> None:
        """Do nothing."""


class DecoderState(Protocol):
    """Everything that a decoder keeps of one sequence. Used by one thread at a time."""

    @property
    def slots(self) -> int:
        """Rows that are stored."""

    @property
    def position(self) -> int:
        """Position of the next token: ``slots``, unless positions have several axes."""

    def reachable(self, slots: int) -> int:
        """Return the most rows, up to ``slots``, that :meth:`rewind` can go back to."""

    def rewind(self, slots: int) -> None:
        """Go back, exactly, to where the sequence had so many rows.

        Raises:
            SessionError: it has fewer, or does not keep its state of then (:meth:`reachable`).
        """


@dataclass(frozen=True)
class Segment:
    """State of the slots from ``start`` to ``end``, as the engine that made it keeps it. Never
    written to."""

    start: int
    end: int
    data: NDArray[Any]
    """State of each slot"""
    positions: NDArray[np.int64] | None = None
    """Position of the token after each slot, where positions have several axes"""
    fixed: NDArray[np.float32] | None = None
    """State after the last slot whose size does not depend on the number of slots"""
    window: NDArray[Any] | None = None
    """State of the last slots in sliding layers, as far as the next run reads it"""

    @property
    def position(self) -> int:
        """Position of the token after it."""
        return self.end if self.positions is None else int(self.positions[-1])

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        parts = (self.data, self.positions, self.fixed, self.window)
        return sum(part.nbytes for part in parts if part is not None)


class DecoderEngine(Protocol):
    """Runs the decoder stage. May be used by several threads, each with a state of its own."""

    @property
    def brought_in_bytes(self) -> int | None:
        """Bytes of experts read since loading, if there is a limit on what is resident; else
        none."""

    def new_state(self) -> DecoderState:
        """An empty sequence."""

    def embed(self, ids: Sequence[int]) -> Float32:
        """Token ids to embeddings ``(length, hidden_size)``."""

    def prefill(self, state: DecoderState, rows: Rows, count: int | None = 1) -> Float32:
        """Append rows; return the logits of the last ``count`` ``(count, vocab_size)``; none: of
        all."""

    def expert_choices(self, embeds: Float32) -> ExpertChoices:
        """Return the experts that each sparse layer's router chooses for a sequence ``(length,
        hidden_size)``; for verification.

        Raises:
            MobileVLMError: the decoder has no experts, or does not say.
        """

    def extend(self, state: DecoderState, rows: Rows) -> None:
        """Appends rows where no logits are needed."""

    def answer(self, state: DecoderState, rows: Rows, count: int | None = None) -> Float32:
        """Append rows in one run, by the weights that :meth:`step` uses; return the logits of the
        last ``count`` ``(count, vocab_size)``; none: of all."""

    def step(self, state: DecoderState, token: int) -> Float32:
        """Appends one token; logits ``(vocab_size,)``, valid until the next call."""

    def save(self, state: DecoderState, start: int) -> Segment:
        """A copy of the slots from ``start``, or from an earlier one, to the last."""

    def restore(self, state: DecoderState, segment: Segment) -> None:
        """Makes the state end with a segment of this engine; before it stands what stood there."""

    def close(self) -> None:
        """Frees the weights."""


class EncoderDecoderEngine(DecoderEngine, Protocol):
    """Runs the decoder stage of a model with an encoder, and that."""

    def encode(self, state: DecoderState, embeds: Float32) -> None:
        """Makes ``(length, hidden_size)`` the prompt of an empty sequence, which the other methods
        append the answer to."""


def token_rows(decoder: DecoderEngine, ids: Sequence[int]) -> Rows:
    """Return the rows of tokens."""
    return Rows(decoder.embed(ids), ids=np.asarray(ids, np.int64))


def in_chunks(
    append: Callable[[Rows, int], Float32], rows: Rows, count: int | None, size: int = PREFILL_CHUNK
) -> Float32:
    """Append rows in chunks of ``size``, and return the logits of the last ``count`` (none: of
    all); ``append`` does so for one chunk."""
    logits, length = [], len(rows)
    for start, end in chunk_spans(length, rows.blocks, size):
        logits.append(append(rows[start:end], wanted_of(count, (start, end), length)))
    return np.concatenate(logits)


def chunk_spans(
    length: int, blocks: Sequence[tuple[int, int]], size: int
) -> Iterator[tuple[int, int]]:
    """Yield the spans of chunks of ``size`` rows; rows that see each other stay together, in a
    longer one if it must be."""
    start = 0
    while start < length:
        end = min(start + size, length)
        for first, last in blocks:
            if first < end < last:
                end = first if first > start else last
        yield start, end
        start = end


def wanted_of(count: int | None, span: tuple[int, int], length: int) -> int:
    """Return how many of the last ``count`` of ``length`` positions (none: of all) a span has."""
    start, end = span
    first = 0 if count is None else length - count
    return max(end - max(start, first), 0)


def refuse_parts(spec: DecoderSpec, engine: str) -> None:
    """Refuse a decoder with parts that the engine does not run.

    Raises:
        BundleError: names the part.
    """
    for part in spec.rare_parts:
        raise BundleError(f"the {engine} engine runs no decoder with {part}: use --engine onnx")


def no_experts() -> MobileVLMError:
    """Return the error for a dense decoder that is asked for its experts."""
    return MobileVLMError("this decoder has no experts: nothing is routed")


def still_open(part: T | None) -> T:
    """Return ``part``; raise if the model is closed.

    Raises:
        MobileVLMError: it was closed.
    """
    if part is None:
        raise MobileVLMError("this model was closed: load it again")
    return part

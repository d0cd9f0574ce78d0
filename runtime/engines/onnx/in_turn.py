"""ONNX stages one at a time, for devices that cannot hold the weights of both.

Whichever stage is asked for is opened, and the other one closed before. Keys and values, embedding
rows and visual tokens belong to neither, so nothing but time is lost. A first question opens each
stage once, a question about a known picture none; each new picture opens both.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mobilevlm.bundle import EmbeddingTable
from mobilevlm.prompt import Arrays, Rows
from mobilevlm.runtime.engines import (
    CacheType,
    DecoderState,
    ExpertChoices,
    Float32,
    Positions,
    still_open,
)
from mobilevlm.runtime.engines.onnx.buffered import BufferedDecoder
from mobilevlm.runtime.engines.onnx.engine import OnnxDecoder, OnnxVision
from mobilevlm.runtime.engines.onnx.onnx_state import OnnxState
from mobilevlm.spec import DecoderSpec


class _Turns:
    """Which stage is open. One thread computes at a time."""

    def __init__(
        self, open_vision: Callable[[], OnnxVision], open_decoder: Callable[[], OnnxDecoder]
    ) -> None:
        self._openers = open_vision, open_decoder
        self._lock = threading.RLock()
        self._vision: OnnxVision | None = None
        self._decoder: OnnxDecoder | None = None
        self._states: weakref.WeakSet[OnnxState] = weakref.WeakSet()
        self._ended = False

    def add(self, state: OnnxState) -> None:
        """Have a sequence let go of the decoder when that is closed."""
        with self._lock:
            self._states.add(state)

    @contextmanager
    def vision(self) -> Iterator[OnnxVision]:
        """The vision stage, while the decoder is closed."""
        with self._lock:
            if self._vision is None:
                self._free()
                self._vision = self._openers[0]()
            yield self._vision

    @contextmanager
    def decoder(self) -> Iterator[OnnxDecoder]:
        """The decoder, while the vision stage is closed."""
        with self._lock:
            if self._decoder is None:
                self._free()
                self._decoder = self._openers[1]()
            yield self._decoder

    def close(self) -> None:
        """Frees the weights that are there, for good."""
        with self._lock:
            self._ended = True
            self._close_stages()

    def _free(self) -> None:
        """Make room for the other stage.

        Raises:
            MobileVLMError: the model was closed while this thread waited.
        """
        still_open(None if self._ended else self)
        self._close_stages()

    def _close_stages(self) -> None:
        for state in self._states:
            state.unbind()
        for stage in (self._vision, self._decoder):
            if stage is not None:
                stage.close()
        self._vision = self._decoder = None


class VisionInTurn:
    """See :class:`mobilevlm.runtime.engines.EncoderEngine`."""

    def __init__(self, turns: _Turns) -> None:
        self._turns: _Turns | None = turns

    def encode(self, arrays: Arrays) -> Rows:
        """See :class:`mobilevlm.runtime.engines.EncoderEngine`."""
        with still_open(self._turns).vision() as stage:
            return stage.encode(arrays)

    def features(self, arrays: Arrays) -> Float32:
        """See :class:`mobilevlm.runtime.engines.EncoderEngine`."""
        with still_open(self._turns).vision() as stage:
            return stage.features(arrays)

    def close(self) -> None:
        """See :class:`mobilevlm.runtime.engines.EncoderEngine`."""
        if self._turns is not None:
            self._turns.close()
        self._turns = None


class DecoderInTurn(BufferedDecoder):
    """See :class:`mobilevlm.runtime.engines.DecoderEngine`. Embedding, saving and restoring open
    nothing."""

    def __init__(
        self,
        turns: _Turns,
        table: Path,
        embeddings: EmbeddingTable,
        spec: DecoderSpec,
        cache: CacheType,
    ) -> None:
        super().__init__(table, embeddings, spec)
        self._turns: _Turns | None = turns
        self._spec, self._cache = spec, cache

    def new_state(self) -> OnnxState:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`. Opens nothing."""
        state = OnnxState(self._spec, self._cache)
        still_open(self._turns).add(state)
        return state

    def encode(self, state: DecoderState, embeds: Float32) -> None:
        """See :class:`mobilevlm.runtime.engines.EncoderDecoderEngine`."""
        with still_open(self._turns).decoder() as stage:
            stage.encode(state, embeds)

    def prefill(
        self,
        state: DecoderState,
        embeds: Float32,
        all_logits: bool = False,
        positions: Positions | None = None,
        deep: Sequence[Float32] = (),
    ) -> Float32:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        with still_open(self._turns).decoder() as stage:
            return stage.prefill(state, embeds, all_logits, positions, deep)

    def extend(
        self,
        state: DecoderState,
        embeds: Float32,
        positions: Positions | None = None,
        deep: Sequence[Float32] = (),
    ) -> None:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        with still_open(self._turns).decoder() as stage:
            stage.extend(state, embeds, positions, deep)

    def answer(self, state: DecoderState, embeds: Float32) -> Float32:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        with still_open(self._turns).decoder() as stage:
            return stage.answer(state, embeds)

    def step(self, state: DecoderState, token: int) -> Float32:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        with still_open(self._turns).decoder() as stage:
            return stage.step(state, token)

    def expert_choices(self, embeds: Float32) -> ExpertChoices:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        with still_open(self._turns).decoder() as stage:
            return stage.expert_choices(embeds)

    def close(self) -> None:
        """See :class:`mobilevlm.runtime.engines.DecoderEngine`."""
        if self._turns is not None:
            self._turns.close()
        self._turns = self._table = self._mapped = None


def stages_in_turn(
    open_vision: Callable[[], OnnxVision],
    open_decoder: Callable[[], OnnxDecoder],
    table: Path,
    embeddings: EmbeddingTable,
    spec: DecoderSpec,
    cache: CacheType,
) -> tuple[VisionInTurn, DecoderInTurn]:
    """Both stages, neither open yet. ``table``: the file with the embedding rows; ``cache``: what
    keys and values are stored in."""
    turns = _Turns(open_vision, open_decoder)
    return VisionInTurn(turns), DecoderInTurn(turns, table, embeddings, spec, cache)

"""Life of a loaded model: its engines, caches and sequences, from opening to closing."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Self

from tokenizers import Tokenizer

from mobilevlm.bundle import INSTRUCTION_TOKENIZER, Bundle
from mobilevlm.errors import BundleError
from mobilevlm.image import Room, RoomFor
from mobilevlm.plan import Plan
from mobilevlm.runtime.answer.generation import AnswerSettings, Generation, Progress, generate_text
from mobilevlm.runtime.engines import DecoderEngine, EncoderEngine, still_open
from mobilevlm.runtime.engines.onnx.mapped_pages import trim_heap
from mobilevlm.runtime.engines.opening import is_pair
from mobilevlm.runtime.memory.limits import Limit, room_left
from mobilevlm.runtime.sequence.cache import PromptCache
from mobilevlm.runtime.sequence.drafting import Drafting
from mobilevlm.runtime.sequence.prompts import PromptReader
from mobilevlm.runtime.sequence.session import Prompt, Reuse, Session, check_process
from mobilevlm.spec import ModelSpec
from mobilevlm.tokenizers.json_file import open_tokenizer_json

if TYPE_CHECKING:
    from mobilevlm.runtime.answer.grammar import GuideMaker
    from mobilevlm.runtime.engines.onnx.drawing import OnnxDrawing

IDLE_SESSIONS = 2
"""Sequences that are kept when their answers are finished; the others leave their beginnings to the
cache."""


class LoadedModel:
    """Engines, caches and sequences of a bundle; :class:`mobilevlm.VLM` has what to ask of them."""

    def __init__(
        self,
        bundle: Bundle,
        tokenizer: Tokenizer,
        vision: EncoderEngine,
        decoder: DecoderEngine,
        cache: PromptCache,
        plan: Plan,
        load_seconds: float,
        limits: Sequence[Limit] = (),
        image_tokens: int | None = None,
    ) -> None:
        self.bundle = bundle
        self.plan = plan
        self.engine = plan.engine
        self.threads = plan.threads_of("decoder")
        self.spec = bundle.manifest.spec
        self.tokenizer = tokenizer
        self.load_seconds = load_seconds
        self._vision: EncoderEngine | None = vision
        self._decoder: DecoderEngine | None = decoder
        self._cache = cache
        self._limits = limits
        self._room_for: RoomFor = partial(_room_for, limits, cache)
        asked = None
        if self.spec.reads_instructions:
            asked = read_tokenizer(bundle, INSTRUCTION_TOKENIZER)
        prepare = getattr(vision, "prepare", None)  # of an engine that knows images best
        self._prompts = PromptReader(
            self.spec, tokenizer, asked, self._room_for, prepare, image_tokens
        )
        self._drafting = Drafting()
        self._drawing: OnnxDrawing | None = None
        """Opened when the first image is drawn."""
        self._guides: GuideMaker | None = None
        """Made when an answer follows a grammar for the first time."""
        self._idle: list[Session] = []
        """Sessions of finished answers, the one used last at the end."""
        self._lock = threading.Lock()
        self._process = os.getpid()

    def new_session(self, reuse_prefix: bool = True) -> Session:
        """A sequence of its own, which keeps what turns of a chat have in common, answers too.
        Without ``reuse_prefix`` it computes each prompt from its first token."""
        return self._session("everything" if reuse_prefix else "nothing")

    def clear_caches(self) -> None:
        """Forget earlier requests, for measuring. What the bundle brings stays."""
        with self._lock:
            for session in self._idle:
                session.forget()
        self._cache.clear()

    @property
    def brought_in_bytes(self) -> int | None:
        """Bytes of experts read since loading, if ``max_resident_mb`` limits what is in memory;
        else none."""
        _, decoder = self._engines()
        return decoder.brought_in_bytes

    def room_for(self, needed: float) -> Room:
        """Return the memory that is left; what earlier requests left goes first."""
        return self._room_for(needed)

    def go_on_in_child(self) -> None:
        """Let a forked child answer with a model that its parent has loaded and never asked; both
        have the same pages of its weights.

        Raises:
            SessionError: the model has threads, which a fork does not copy.
        """
        alone = self.engine == "onnx" and self.plan.threads_of("vision") == self.threads == 1
        if not alone or self._idle:
            check_process(self._process)
        self._process = os.getpid()

    def close(self) -> None:
        """Free weights and buffers. The object cannot be used after: a stream that another thread
        reads ends with an error at its next token."""
        if os.getpid() != self._process:  # locks and threads of the parent are in no known state
            self._vision = self._decoder = self._drawing = None
            return
        with self._lock:
            engines = (self._vision, self._decoder, self._drawing)
            self._vision = self._decoder = self._drawing = None
            self._idle.clear()
        for engine in engines:
            if engine is not None:
                engine.close()
        self._cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()

    def _engines(self) -> tuple[EncoderEngine, DecoderEngine]:
        check_process(self._process)
        return still_open(self._vision), still_open(self._decoder)

    def _session(self, reuse: Reuse, cache: PromptCache | None = None) -> Session:
        if cache is None:
            nothing = PromptCache(0, self._cache.system)
            cache = nothing if reuse == "nothing" else self._cache
        return _session_kind(self.spec)(
            self.spec, *self._engines(), cache, reuse, self.plan.parallel_tiles
        )

    def _answer(
        self,
        prompt: Prompt,
        settings: AnswerSettings,
        session: Session | None,
        progress: Progress,
    ) -> Generator[str, None, Generation]:
        """Pieces of an answer, in a session of one's own or in one that is free."""
        ours = session or self._take_session(prompt)
        try:
            with ours.turns.answer():
                return (
                    yield from generate_text(
                        ours,
                        self.tokenizer,
                        prompt,
                        settings,
                        self.load_seconds,
                        self._drafting,
                        progress,
                    )
                )
        finally:
            if session is None:
                self._give_back(ours)

    def _take_session(self, prompt: Prompt) -> Session:
        """The free session that has most of the prompt; of equals the one not used for longest."""
        with self._lock:
            if self._idle:
                best = max(self._idle, key=lambda session: session.shared(prompt))
                self._idle.remove(best)
                return best
        return self._session("pieces" if self._cache.enabled else "nothing", self._cache)

    def _give_back(self, session: Session) -> None:
        if session.turns.broken or os.getpid() != self._process:
            return
        with self._lock:
            if self._decoder is None:
                return
            self._idle.append(session)
            is_surplus = len(self._idle) > IDLE_SESSIONS or not self._cache.make_room(0)
            surplus = self._idle.pop(0) if is_surplus else None
        if surplus is not None:
            surplus.save()


def _room_for(limits: Sequence[Limit], cache: PromptCache, needed: float) -> Room:
    room = room_left(limits)
    if room.size < needed:
        cache.clear()
        trim_heap()
        room = room_left(limits)
    return room


def read_tokenizer(bundle: Bundle, name: str) -> Tokenizer:
    """Return a bundle's tokenizer.

    Raises:
        BundleError: it cannot be read.
    """
    path = bundle.path(name)
    return open_tokenizer_json(path, str(path), BundleError)


def _session_kind(spec: ModelSpec) -> type[Session]:
    """Return the class of a model's sequences; those that few models have are imported here."""
    if is_pair(spec):
        from mobilevlm.runtime.sequence.pair_session import PairSession

        return PairSession
    if spec.decoder.encoder_layers:
        from mobilevlm.runtime.sequence.encoded_session import EncodedSession

        return EncodedSession
    return Session

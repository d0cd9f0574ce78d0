"""A loaded bundle that answers questions about pictures."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import TypeAlias

import numpy as np
from tokenizers import Tokenizer

from mobilevlm.bundle import INSTRUCTION_TOKENIZER, TOKENIZER, Bundle
from mobilevlm.bundle_identity import unchanged
from mobilevlm.conversation import (
    official_ids,
    read_text,
    render,
    system_ids,
    user_message,
)
from mobilevlm.errors import BundleError, PromptError
from mobilevlm.image import ImageInput, Room
from mobilevlm.instruction import with_instruction
from mobilevlm.messages import Message, check_continued, check_images, read_messages
from mobilevlm.plan import DRAFTING_ENGINES, Plan
from mobilevlm.preparation import fewest_pieces, prepare
from mobilevlm.prompt import Mark, Prepared, Token, count_positions, count_rows, expand, joined
from mobilevlm.runtime.answer.generation import Generation, StopRules, TextStream, generate_text
from mobilevlm.runtime.answer.sampling import SamplingOptions
from mobilevlm.runtime.engines import DecoderEngine, EncoderEngine, Float32, still_open
from mobilevlm.runtime.engines.onnx.mapped_pages import trim_heap
from mobilevlm.runtime.engines.opening import open_engines, stored_system_prompt
from mobilevlm.runtime.memory.estimate import estimate
from mobilevlm.runtime.memory.fitting import fit_plan
from mobilevlm.runtime.memory.limits import Limit, memory_limits, room_left
from mobilevlm.runtime.sequence.cache import DEFAULT_CACHE_MB, PromptCache
from mobilevlm.runtime.sequence.drafting import Drafting, check_draft_tokens
from mobilevlm.runtime.sequence.encoded_session import EncodedSession
from mobilevlm.runtime.sequence.session import (
    Prompt,
    PromptChoices,
    Reuse,
    Session,
    check_length,
    check_process,
    check_session,
)
from mobilevlm.runtime.settings import stop_strings
from mobilevlm.runtime.tuning.plan_file import PlanChoice, settle_plans
from mobilevlm.templates.plain_text import check_text, protect
from mobilevlm.tokenizers.json_file import open_tokenizer_json

DEFAULT_MAX_NEW_TOKENS = 256
IDLE_SESSIONS = 2
"""Sequences that are kept when their answers are finished; the others leave their beginnings to the
cache."""

SHORT_TOKEN = 8
"""Characters. A prompt whose tokens are no longer is tokenized without a closer look."""


Images: TypeAlias = "Sequence[ImageInput]"


def open_model(
    bundle: Bundle,
    engine: str = "auto",
    threads: int | None = None,
    cache_mb: float = DEFAULT_CACHE_MB,
    start: float | None = None,
    tokenizer: Tokenizer | None = None,
    max_resident_mb: float | None = None,
    plan: Plan | PlanChoice = "none",
    max_memory_mb: float | None = None,
) -> VLM:
    """Opens a bundle that is already checked. ``start``: when loading began (``perf_counter``);
    ``tokenizer``: instead of the bundle's; ``plan`` and ``max_memory_mb`` as in :func:`load`."""
    start = time.perf_counter() if start is None else start
    with unchanged(bundle.folder, bundle.identity):
        first, *others = settle_plans(bundle, engine, threads, plan, max_resident_mb)
        limits = memory_limits(asked_mb=max_memory_mb)
        settled = fit_plan(bundle, first, limits, others)
        vision, decoder = open_engines(bundle, settled.engine, settled)
        # After the engines: memory is scarcest while they pack weights.
        tokenizer = tokenizer or _read_tokenizer(bundle, TOKENIZER)
        memory = estimate(bundle.manifest, settled)
        turns = memory.weights if settled.memory == "in turn" else 0.0  # of the other stage
        answer = memory.working + memory.states + turns

        def room() -> float:
            return room_left(limits).size - answer

        cache = _open_cache(bundle, tokenizer, settled, cache_mb, room)
        seconds = time.perf_counter() - start
        return VLM(bundle, tokenizer, vision, decoder, cache, settled, seconds, limits)


class VLM:
    """A vision-language model, ready to run.

    Weights and caches are shared by all threads and each answer has a sequence of its own, so one
    object may be used from several threads. What a prompt has in common with earlier ones is not
    computed again; the answers are the same. ``close`` (or leaving a ``with`` block) frees the
    memory.
    """

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
    ) -> None:
        self.bundle = bundle
        self.plan = plan
        self.engine = plan.engine
        self.threads = plan.threads_of("decoder")
        self.spec = bundle.manifest.spec
        self.tokenizer = tokenizer
        self._instruction_tokenizer: Tokenizer | None = None
        if self.spec.image.connector.reads_text:
            self._instruction_tokenizer = _read_tokenizer(bundle, INSTRUCTION_TOKENIZER)
        self.load_seconds = load_seconds
        self._vision: EncoderEngine | None = vision
        self._decoder: DecoderEngine | None = decoder
        self._cache = cache
        self._limits = limits
        self._drafting = Drafting()
        self._idle: list[Session] = []
        """Sessions of finished answers, the one used last at the end."""
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._longest_token: int | None = None
        """Characters; found when a prompt is long."""

    def stream(
        self,
        prompt: str | Sequence[Message],
        images: Images = (),
        *,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        raw: bool = False,
        special_tokens: bool = True,
        draft_tokens: int | None = None,
        session: Session | None = None,
    ) -> TextStream:
        """Answers piece by piece.

        ``prompt``: the user's text, or the messages of a chat; ``raw``: the text is the whole
        prompt, no template around it. ``images`` go where ``<image>`` stands, else before the text;
        with messages they are those of image parts that bring none (mobilevlm/messages.py).
        ``special_tokens``: what the text has of special tokens (``</s>``) and ``<image>`` counts as
        such, as in the official code; without, it is ordinary text.
        ``stop``: further strings that end the answer. ``ignore_eos``: go on where the model would
        end (for measuring). ``draft_tokens``: tokens to guess and check at a time (see
        runtime/sequence/drafting.py; the answer is the same), 0 for none; by default where the
        engine can. ``session``: of :meth:`new_session`; it takes one stream and one thread at a
        time. It keeps what was computed, not what was said: messages that leave out earlier turns
        are refused.

        Raises:
            PromptError, ImageError, MobileVLMError: before the first piece, if the input is wrong;
                a prompt too long for the context with the first piece.
            SessionError: with the first piece, if another stream or thread has the session.
        """
        _, decoder = self._engines()
        if session is not None:
            check_session(session, decoder)
        sampling = SamplingOptions(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        if draft_tokens is None and temperature == 0:
            draft_tokens = self.plan.draft_tokens
        if draft_tokens is None and self.engine not in DRAFTING_ENGINES:
            draft_tokens = 0
        draft_tokens = check_draft_tokens(draft_tokens, temperature)
        stops = stop_strings(stop)
        conversation = self.spec.conversation
        rules = StopRules(
            max_new_tokens,
            frozenset() if ignore_eos else frozenset(conversation.eos_token_ids),
            (*(() if ignore_eos else conversation.stop_strings), *stops),
        )
        ready, said = self._prepare_said(prompt, images, raw, special_tokens)
        if session is None:
            return TextStream(self._answer(ready, sampling, rules, draft_tokens, None))
        if isinstance(prompt, str):
            said = []
        else:
            check_continued(session.told, said)
        pieces = self._answer(ready, sampling, rules, draft_tokens, session)
        return TextStream(_noted(session, said, pieces))

    def generate(
        self,
        prompt: str | Sequence[Message],
        images: Images = (),
        *,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        raw: bool = False,
        special_tokens: bool = True,
        draft_tokens: int | None = None,
        session: Session | None = None,
    ) -> Generation:
        """The whole answer; arguments as in :meth:`stream`."""
        return self.stream(
            prompt,
            images,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            ignore_eos=ignore_eos,
            raw=raw,
            special_tokens=special_tokens,
            draft_tokens=draft_tokens,
            session=session,
        ).finish()

    def new_session(self, reuse_prefix: bool = True) -> Session:
        """A sequence of its own, which keeps what turns of a chat have in common, answers too.
        Without ``reuse_prefix`` it computes each prompt from its first token."""
        return self._session("everything" if reuse_prefix else "nothing")

    def clear_caches(self) -> None:
        """Forgets earlier requests, for measuring. What the bundle brings stays."""
        with self._lock:
            for session in self._idle:
                session.forget()
        self._cache.clear()

    def prepare_image(self, image: ImageInput) -> Prepared:
        """Return an image as this model takes it, which may be given in its place: an image that is
        used again, or the frames of a video, need not stay in memory.

        Raises:
            ImageError: as of :func:`mobilevlm.preparation.prepare`.
        """
        return prepare(image, self.spec.image, self.room_for)

    def encode_image(self, image: ImageInput, prompt: str = "") -> Float32:
        """Visual tokens ``(num_tokens, hidden_size)``: the projector's output. ``prompt``: what is
        asked about the image, where a Q-Former reads it (InstructBLIP)."""
        vision, _ = self._engines()
        arrays = self._asked_image(image, prompt).arrays
        return joined([vision.encode(given) for given in arrays]).embeds

    def image_features(self, image: ImageInput) -> Float32:
        """The tower's features ``(num_features, vision hidden_size)``; for verification."""
        vision, _ = self._engines()
        arrays = self._asked_image(image, "").arrays
        return np.concatenate([vision.features(given) for given in arrays])

    def _asked_image(self, image: ImageInput, prompt: str) -> Prepared:
        """Return an image with all that its encoder reads when ``prompt`` is asked about it."""
        prepared = self.prepare_image(image)
        if self._instruction_tokenizer is None:
            return prepared
        parts = [{"type": "text", "text": prompt}]
        text = render(self.spec.conversation, [{"role": "user", "content": parts}])
        return with_instruction(prepared, self._instruction_tokenizer, text, self.spec)

    def prompt_ids(
        self,
        prompt: str | Sequence[Message],
        images: int = 0,
        raw: bool = False,
        special_tokens: bool = True,
    ) -> list[int]:
        """Input ids as the official code has them: where an image goes its mark, which is -200 in
        most. ``special_tokens`` as in :meth:`stream`."""
        tokens = self._tokens(prompt, images, raw, special_tokens)
        return official_ids(tokens, self.spec.image.layout)

    def count_text_tokens(
        self, prompt: str | Sequence[Message], images: int = 0, raw: bool = False
    ) -> int:
        """Positions that a prompt takes beside the visual tokens of its images."""
        tokens = self._tokens(prompt, images, raw)
        pieces = expand(tokens, [fewest_pieces(self.spec.image)] * images)
        return count_positions(pieces) - count_rows(pieces)

    def prompt_logits(
        self,
        prompt: str | Sequence[Message],
        images: Images = (),
        raw: bool = False,
        answer_tokens: int = 0,
    ) -> Float32:
        """Logits after every position, pictures expanded ``(length, vocab_size)``; for
        verification. ``answer_tokens``: so many at the end are computed as those of an answer."""
        prepared = self._prepare(prompt, images, raw)
        return self._session("nothing").all_logits(prepared, answer_tokens)

    def embeds_logits(self, embeds: Float32, as_prompt: bool = False) -> Float32:
        """Logits after every position of ``(length, hidden_size)``; for verification of the decoder
        alone. ``as_prompt``: by the graph for prompts, if there is one."""
        _, decoder = self._engines()
        if as_prompt:
            return decoder.prefill(decoder.new_state(), embeds, all_logits=True)
        return decoder.answer(decoder.new_state(), embeds)

    def expert_choices(
        self, prompt: str | Sequence[Message], images: Images = (), raw: bool = False
    ) -> PromptChoices:
        """Which experts each position is sent to, by layer; for verification.

        Raises:
            MobileVLMError: the decoder has no experts, or does not say.
        """
        return self._session("nothing").expert_choices(self._prepare(prompt, images, raw))

    @property
    def brought_in_bytes(self) -> int | None:
        """Of experts, since loading, where ``max_resident_mb`` limits what is in memory."""
        _, decoder = self._engines()
        return decoder.brought_in_bytes

    def answer_logits(self, embeds: Float32, answer: Sequence[int]) -> Float32:
        """Logits ``(len(answer) + 1, vocab_size)`` that the tokens of an answer, and the next, are
        taken from, given a prompt's embeddings; for verification of the decoder alone."""
        session = self._session("nothing")
        if isinstance(session, EncodedSession):
            return session.answer_logits(embeds, answer)
        _, decoder = self._engines()
        whole = np.concatenate([embeds, decoder.embed(answer)])
        return self.embeds_logits(whole)[len(embeds) - 1 :]

    def close(self) -> None:
        """Frees weights and buffers. The object cannot be used after: a stream that another thread
        reads ends with an error at its next token."""
        if os.getpid() != self._process:  # locks and threads of the parent are in no known state
            self._vision = self._decoder = None
            return
        with self._lock:
            engines, self._vision, self._decoder = (self._vision, self._decoder), None, None
            self._idle.clear()
        for engine in engines:
            if engine is not None:
                engine.close()
        self._cache.close()

    def __enter__(self) -> VLM:
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()

    def _tokens(
        self,
        prompt: str | Sequence[Message],
        images: int,
        raw: bool,
        special_tokens: bool = True,
    ) -> list[Token]:
        text, shown, _ = self._read(prompt, [b""] * images, raw, special_tokens)
        return self._read_text(text, len(shown))

    def _read(
        self, prompt: str | Sequence[Message], images: Images, raw: bool, special_tokens: bool
    ) -> tuple[str, Images, list[Message]]:
        """The prompt in its template, its images, and what was said."""
        check_images(images)
        if raw:
            if not isinstance(prompt, str) or not special_tokens:
                wrong = "messages" if special_tokens else "special_tokens=False"
                raise PromptError(f"raw: the text is the whole prompt, {wrong} does not go with it")
            check_text(prompt)
            self._check_length(len(prompt))
            return prompt, images, []
        if isinstance(prompt, str):
            prompt = [user_message(prompt, len(images), special_tokens)]
        said = read_messages(prompt, images, special_tokens)
        self._check_length(said.characters)
        messages = protect(said.messages, self.tokenizer, special_tokens)
        return render(self.spec.conversation, messages), said.images, said.messages

    def _check_length(self, characters: int) -> None:
        """Refuse text that cannot fit into the context, before anything is done with it."""
        context = self.spec.decoder.context_length
        if characters <= context * SHORT_TOKEN:
            return
        if self._longest_token is None:
            self._longest_token = max(map(len, self.tokenizer.get_vocab()), default=1)
        most = context * self._longest_token
        if characters > most:
            raise PromptError(
                f"the prompt has {characters} characters, the context of {context} tokens holds "
                f"{most} at the very most: shorten it"
            )

    def _read_text(self, text: str, images: int) -> list[Token]:
        conversation, vocab_size = self.spec.conversation, self.spec.decoder.vocab_size
        return read_text(self.tokenizer, conversation, text, images, vocab_size)

    def _engines(self) -> tuple[EncoderEngine, DecoderEngine]:
        check_process(self._process)
        return still_open(self._vision), still_open(self._decoder)

    def _session(self, reuse: Reuse) -> Session:
        nothing = PromptCache(0, self._cache.system)
        cache = nothing if reuse == "nothing" else self._cache
        kind = EncodedSession if self.spec.decoder.encoder_layers else Session
        return kind(self.spec, *self._engines(), cache, reuse)

    def _answer(
        self,
        prompt: Prompt,
        sampling: SamplingOptions,
        rules: StopRules,
        draft_tokens: int,
        session: Session | None,
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
                        sampling,
                        rules,
                        self.load_seconds,
                        self._drafting,
                        draft_tokens,
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
        return self._session("pieces" if self._cache.enabled else "nothing")

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

    def check_fits(
        self,
        prompt: str | Sequence[Message],
        images: int,
        raw: bool = False,
        special_tokens: bool = True,
    ) -> None:
        """Raise if a prompt with so many images has no room, before these are there.

        Raises:
            PromptError: it does not fit; the message says how many images would.
        """
        self._check_fits(self._tokens(prompt, images, raw, special_tokens))

    def _check_fits(self, tokens: Sequence[Token]) -> None:
        images = [fewest_pieces(self.spec.image)] * tokens.count(Mark())
        length = count_positions(expand(tokens, images))
        rows = [count_rows(pieces) for pieces in images]
        check_length(length, rows, self.spec.decoder.context_length)

    def room_for(self, needed: float) -> Room:
        """Return the memory that is left; what earlier requests left goes first."""
        room = room_left(self._limits)
        if room.size < needed:
            self._cache.clear()
            trim_heap()
            room = room_left(self._limits)
        return room

    def _prepare(self, prompt: str | Sequence[Message], images: Images, raw: bool) -> Prompt:
        return self._prepare_said(prompt, images, raw, True)[0]

    def _prepare_said(
        self, prompt: str | Sequence[Message], images: Images, raw: bool, special_tokens: bool
    ) -> tuple[Prompt, list[Message]]:
        """A prompt that is ready to run, and its messages."""
        start = time.perf_counter()
        text, shown, said = self._read(prompt, images, raw, special_tokens)
        tokens = self._read_text(text, len(shown))
        self._check_fits(tokens)
        prepared = [
            with_instruction(
                self.prepare_image(source), self._instruction_tokenizer, text, self.spec
            )
            for source in shown
        ]
        pieces = expand(tokens, [image.pieces for image in prepared])
        return Prompt(pieces, prepared, time.perf_counter() - start), said


def _noted(
    session: Session, said: list[Message], pieces: Generator[str, None, Generation]
) -> Generator[str, None, Generation]:
    """Yields the pieces; from the first on the session knows what was said."""
    try:
        piece = next(pieces)
        session.told = said
        yield piece
        return (yield from pieces)
    except StopIteration as stop:
        session.told = said
        generation: Generation = stop.value
        return generation
    finally:
        pieces.close()


def _open_cache(
    bundle: Bundle,
    tokenizer: Tokenizer,
    plan: Plan,
    megabytes: float,
    room: Callable[[], float],
) -> PromptCache:
    system = bundle.manifest.system_prompt
    if plan.engine == "onnx" and system is not None:
        stored = stored_system_prompt(bundle)
        if not plan.computes_prompt_like(Plan(), len(system.ids)):
            stored = None  # what this plan computes has other bits
        return PromptCache(megabytes, system.ids, stored, room)
    try:
        ids = system_ids(tokenizer, bundle.manifest.spec.conversation)
    except PromptError:  # questions will say so; raw prompts can do without a template
        ids = []
    return PromptCache(megabytes, ids, room=room)


def _read_tokenizer(bundle: Bundle, name: str) -> Tokenizer:
    path = bundle.path(name)
    return open_tokenizer_json(path, str(path), BundleError)

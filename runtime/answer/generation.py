"""The answer: its text as it comes, and what was measured on the way."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from tokenizers import Tokenizer

from mobilevlm.errors import MobileVLMError, SessionError
from mobilevlm.prompt import count_rows
from mobilevlm.runtime.answer.sampling import Sampler, SamplingOptions
from mobilevlm.runtime.answer.text import Detokenizer, StopRules, StopStrings
from mobilevlm.runtime.engines import Float32
from mobilevlm.runtime.sequence.drafting import Drafting, Drafts, Lookup, drafted_tokens
from mobilevlm.runtime.sequence.session import Clock, Fill, FillCancelled, Prompt, Session

if TYPE_CHECKING:
    from mobilevlm.runtime.answer.grammar import Guide
    from mobilevlm.runtime.answer.logprobs import TokenLogprob
    from mobilevlm.runtime.answer.tool_calls import ToolCall, ToolUse


@dataclass(frozen=True)
class Timings:
    """Seconds, except for ``tokens_per_second``."""

    load: float
    """Opening the bundle, once per process."""
    preprocess: float
    """Images to pixels, prompt to ids."""
    vision: float
    prefill: float
    ttft: float
    """Time to first token: preprocess, vision, prefill and the first choice."""
    decode: float
    """All tokens after the first; time that the caller takes between pieces is not counted."""
    tokens_per_second: float
    """Rate of the tokens after the first; 0 when there is none."""


@dataclass(frozen=True)
class Reused:
    """Part of the prompt that was there already, from earlier ones or from the bundle."""

    tokens: int = 0
    """Positions that were not computed, images expanded."""
    images: int = 0
    """Images that were not encoded."""


FinishReason: TypeAlias = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Generation:
    """A finished answer."""

    text: str
    token_ids: list[int]
    """Without the end-of-text token."""
    finish_reason: FinishReason
    """``stop``: end-of-text token or stop string; ``length``: max_new_tokens or context full;
    ``cancelled``: :meth:`TextStream.cancel`."""
    prompt_tokens: int
    """Positions of the prompt, images expanded."""
    visual_tokens: int
    timings: Timings
    token_seconds: list[float]
    """Time of each token after the first; a drafted one takes next to nothing after the one
    before."""
    reused: Reused
    drafts: Drafts
    logprobs: list[TokenLogprob] | None = None
    """Log probabilities of each token, if they were asked for."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Calls of tools, which are no part of the text."""


@dataclass
class Progress:
    """State of an answer while it is made, which its reader sees."""

    logprobs: list[TokenLogprob] = field(default_factory=list)
    tool_calls: list[ToolCall] = field(default_factory=list)
    cancelled: bool = False


class TextStream(Iterator[str]):
    """Pieces of an answer as they are made. After the last, :attr:`generation` tells the rest. One
    thread reads at a time."""

    def __init__(self, pieces: Generator[str, None, Generation], progress: Progress) -> None:
        self._pieces = pieces
        self.progress = progress
        self._generation: Generation | None = None
        self._reader: dict[str, int] = {}
        """The thread that is at a piece; set in one step, so that no interrupt leaves it behind."""

    def __next__(self) -> str:
        """Return the next piece.

        Raises:
            SessionError: another thread is reading.
        """
        me = threading.get_ident()
        try:
            if self._reader.setdefault("thread", me) != me:
                raise SessionError(
                    "another thread is reading this stream: read it in one, or open one for each"
                )
            return next(self._pieces)
        except StopIteration as stop:
            if stop.value is not None:
                self._generation = stop.value
            raise StopIteration from None
        finally:
            self._leave(me)

    @property
    def generation(self) -> Generation:
        """The finished answer.

        Raises:
            MobileVLMError: the stream was not read to its end.
        """
        if self._generation is None:
            raise MobileVLMError("the answer is not finished: read the stream to its end first")
        return self._generation

    def finish(self) -> Generation:
        """Read the remaining pieces and return the finished answer."""
        for _ in self:
            pass
        return self.generation

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """Log probabilities of the tokens so far, where they were asked for."""
        return self.progress.logprobs

    @property
    def tool_calls(self) -> list[ToolCall]:
        """Calls of tools so far."""
        return self.progress.tool_calls

    def cancel(self) -> None:
        """Let the answer end at its next token, from any thread and without waiting: the reader
        gets no more pieces, and a generation with what there is."""
        self.progress.cancelled = True

    def close(self) -> None:
        """Stop the work; wait for the token that another thread is at."""
        self.cancel()
        me = threading.get_ident()
        try:
            while self._reader.setdefault("thread", me) != me:
                time.sleep(0.001)
            self._pieces.close()
        finally:
            self._leave(me)

    def _leave(self, thread: int) -> None:
        if self._reader.get("thread") == thread:
            self._reader.clear()


@dataclass(frozen=True)
class AnswerSettings:
    """How an answer is made."""

    sampling: SamplingOptions
    rules: StopRules
    draft_tokens: int = 0
    """Guessed at a time."""
    top_logprobs: int | None = None
    """Likeliest tokens whose log probabilities go with each token's; none: no log probabilities."""
    guide: Guide | None = None
    """The grammar that the answer follows."""
    tool_use: ToolUse | None = None
    """Tools that the answer may call."""


def generate_text(
    session: Session,
    tokenizer: Tokenizer,
    prompt: Prompt,
    settings: AnswerSettings,
    load_seconds: float,
    drafting: Drafting,
    progress: Progress,
) -> Generator[str, None, Generation]:
    """Yield pieces of text; its return value is the finished answer."""
    fill, decode, drafts = Fill(cancelled=lambda: progress.cancelled), Clock(), Drafts()
    rules, count = settings.rules, settings.draft_tokens
    sampler, detokenizer, stops = (
        Sampler(settings.sampling, guide := settings.guide),
        Detokenizer(tokenizer, keeps_space=guide is not None),
        StopStrings(rules.strings),
    )
    reader = None
    if settings.top_logprobs is not None:
        from mobilevlm.runtime.answer.logprobs import LogprobReader

        reader = LogprobReader(tokenizer, settings.top_logprobs)
    calls = None
    if settings.tool_use is not None:
        from mobilevlm.runtime.answer.tool_calls import CallReader

        calls = CallReader(settings.tool_use, progress.tool_calls)
    tokens: list[int] = []
    shown: list[str] = []
    finish: FinishReason = "length"
    prompt_tokens, stopped = len(prompt.keys), False
    source = no_tokens()
    with suppress(FillCancelled):
        fill.check()
        logits = session.fill(prompt, fill)
        prompt_tokens = session.prompt_tokens
        source = single_tokens(session, logits, sampler, tokens)
        if count:
            lookup, limit = Lookup(prompt.pieces), rules.max_new_tokens
            source = drafted_tokens(
                session, logits, sampler, tokens, lookup, count, limit, drafting, drafts
            )
    with fill.prefill:
        token = next(source, None)
    while token is not None and not progress.cancelled:
        if token in rules.eos_token_ids:
            finish = "stop"
            break
        tokens.append(token)
        if reader is not None:
            progress.logprobs.append(reader(sampler.logits, token))
        piece, stopped = stops.add(detokenizer.add(token))
        if calls is not None:
            piece = calls.add(piece)
        if piece:
            shown.append(piece)
            yield piece
        if stopped or (guide is not None and guide.complete):
            finish = "stop"
            break
        if len(tokens) == rules.max_new_tokens:
            break
        with decode:
            token = next(source, None)
    source.close()
    if progress.cancelled and not stopped:
        finish = "cancelled"
    if token is None and decode.samples:
        decode.samples.pop()  # the context is full: nothing came
    piece = ""
    if not stopped:
        piece, stopped = stops.add(detokenizer.finish())
        piece += "" if stopped else stops.finish()
    if calls is not None:
        piece = calls.add(piece) + calls.finish()
    if piece:
        shown.append(piece)
        yield piece
    timings = Timings(
        load=load_seconds,
        preprocess=prompt.seconds,
        vision=fill.vision.seconds,
        prefill=fill.prefill.seconds,
        ttft=prompt.seconds + fill.vision.seconds + fill.prefill.seconds,
        decode=decode.seconds,
        tokens_per_second=len(decode.samples) / decode.seconds if decode.samples else 0.0,
    )
    return Generation(
        "".join(shown),
        tokens,
        finish,
        prompt_tokens,
        count_rows(prompt.pieces),
        timings,
        decode.samples,
        Reused(fill.reused_tokens, fill.reused_images),
        drafts,
        None if reader is None else progress.logprobs,
        tuple(progress.tool_calls),
    )


def no_tokens() -> Generator[int, None, None]:
    """Tokens of an answer that was cancelled before it began."""
    yield from ()


def single_tokens(
    session: Session, logits: Float32, sampler: Sampler, produced: Sequence[int]
) -> Generator[int, None, None]:
    """Tokens one after another until the context is full, from the logits after the prompt on. The
    caller appends each to ``produced``."""
    yield sampler(logits, produced)
    while not session.full:
        yield sampler(session.step(produced[-1]), produced)

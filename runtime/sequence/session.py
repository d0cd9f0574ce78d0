"""One sequence in the decoder: what stands at each position, and how a prompt gets there."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mobilevlm.errors import PromptError, SessionError
from mobilevlm.messages import Message
from mobilevlm.prompt import Piece, Prepared, Rows, count_positions, count_rows, grid_positions
from mobilevlm.runtime.engines import (
    DecoderEngine,
    EncoderEngine,
    ExpertChoices,
    Float32,
    token_rows,
    wanted_of,
)
from mobilevlm.runtime.sequence.cache import Border, PositionKey, PromptCache, borders, pieces
from mobilevlm.runtime.sequence.encoding import encode_image
from mobilevlm.spec import ModelSpec

Reuse: TypeAlias = Literal["nothing", "pieces", "everything"]
"""Parts of a prompt that may be reused from the sequence that is there, and from the cache.
``pieces``: whole pieces, so that its logits are those of a fresh sequence bit for bit
(runtime/sequence/cache.py). ``everything``: answers too (the turns of a chat). Their tokens came
one by one, for which kernels sum in another order than for a prompt, so the last digits may
differ."""


ONE_AT_A_TIME = "one stream at a time per session: give each its own with new_session()"


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

    def __exit__(self, *reason: object) -> None:
        self.samples.append(time.perf_counter() - self._start)


HEARD = 1 << 30
"""Is added to the keys of tokens whose keys and values are others, since the prompt has sound."""


@dataclass(frozen=True)
class Prompt:
    """A prompt that is ready to run: ids and runs, and the images whose rows fill the runs."""

    pieces: list[Piece]
    images: list[Prepared]
    seconds: float
    """Time it took to prepare them."""
    heard: bool = False
    """It has sound, and the decoder products that act then."""

    @cached_property
    def keys(self) -> list[PositionKey]:
        """Contents of each position."""
        rows = (
            (image.digest, left)
            for image in self.images
            for left in reversed(range(count_rows(image.pieces)))
        )
        mark = HEARD if self.heard else 0
        return [
            key
            for piece in self.pieces
            for key in (
                [piece | mark] if isinstance(piece, int) else itertools.islice(rows, piece.rows)
            )
        ]


class FillCancelled(Exception):  # noqa: N818
    """A prompt that nobody waits for any more; never seen outside of an answer."""


@dataclass
class Fill:
    """Cost of making a sequence equal to a prompt."""

    vision: Clock = field(default_factory=Clock)
    prefill: Clock = field(default_factory=Clock)
    reused_tokens: int = 0
    """Positions whose keys and values were there."""
    reused_images: int = 0
    """Images of the prompt that were not encoded."""
    cancelled: Callable[[], bool] = bool
    """Return True once the prompt is wanted no more; by default it is wanted."""

    def check(self) -> None:
        """Raise FillCancelled if the prompt is wanted no more."""
        if self.cancelled():
            raise FillCancelled


@dataclass(frozen=True)
class PromptChoices:
    """Experts that the routers of a sparse decoder chose for a prompt, images expanded."""

    layers: ExpertChoices
    is_visual: NDArray[np.bool_]
    """True at the positions of images ``(length,)``"""


class Turns:
    """Who uses a sequence: one thread at a time, and one answer at a time.

    Each of the two is an entry of a dict, set in one step, so that Ctrl-C between two steps leaves
    at worst an entry of the same thread, which does not stop that.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._taken: dict[str, object] = {}
        self.broken = False
        """True if a change was begun and not finished: the sequence is of no use any more."""
        self.was_broken = False
        """Value of ``broken`` when the change under way began."""

    def __enter__(self) -> None:
        """Begin a change.

        Raises:
            SessionError: another thread is at it, or this process was forked from the session's.
        """
        check_process(self._process)
        me = threading.get_ident()
        if self._taken.setdefault("thread", me) != me:
            raise SessionError(f"another thread is using this session: {ONE_AT_A_TIME}")
        self.was_broken, self.broken = self.broken, True

    def __exit__(self, kind: object, *reason: object) -> None:
        self.broken = kind is not None
        self._taken.pop("thread", None)

    @contextmanager
    def answer(self) -> Iterator[None]:
        """Keep other answers out of the sequence.

        Raises:
            SessionError: it has an answer that is not finished.
        """
        check_process(self._process)
        mine = object()
        try:
            if self._taken.setdefault("answer", mine) is not mine:
                raise SessionError(
                    f"this session has an answer that is not finished (read its stream to the end, "
                    f"or close it): {ONE_AT_A_TIME}"
                )
            yield
        finally:
            if self._taken.get("answer") is mine:
                del self._taken["answer"]


def check_process(process: int) -> None:
    """Refuse what was loaded in another process, whose threads a fork does not copy.

    Raises:
        SessionError: this is not the process with the id ``process``.
    """
    if os.getpid() != process:
        raise SessionError(
            "this process was forked after the model was loaded, and threads are not copied by a "
            "fork: call load() in this process"
        )


def check_session(session: object, decoder: DecoderEngine) -> None:
    """Refuse what is no session of a model with this decoder.

    Raises:
        SessionError: something else, or a session of another model.
    """
    if not isinstance(session, Session):
        kind = type(session).__name__
        raise SessionError(f"session is of type {kind}, expected one that new_session() made")
    if not session.belongs_to(decoder):
        raise SessionError("the session is of another model: make one with new_session() of this")


def check_length(length: int, images: Sequence[int], context: int) -> None:
    """Raise if a prompt has no room. ``length``: positions of all, those of its images among them;
    ``images``: of each image, the marks around it among them.

    Raises:
        PromptError: it does not fit; the message says how many images would.
    """
    if length < context:
        return
    told, remedy = "", "shorten it"
    if images:
        same = len(set(images)) == 1
        told = f", {images[0]} for each image" if same else f", {sum(images)} for the images"
    room = context - 1 - (length - sum(images))
    fitting = sum(taken <= room for taken in itertools.accumulate(images))
    if fitting:
        remedy = f"{fitting} of the {len(images)} images or frames would fit (--frames of a video)"
    elif images:
        remedy = "shorten it, or give smaller images or fewer frames of a video"
    raise PromptError(
        f"the prompt takes {length} tokens{told}, the context holds {context} with the answer: "
        f"{remedy}"
    )


RunSpan: TypeAlias = Callable[[int, int, int, bool], Float32]
"""Appends a span of a prompt from its begin to its end; logits of its last so many positions. The
last argument tells that these are the positions of an answer."""


class Session:
    """A sequence and its KV state.

    One thread and one answer at a time: a second one gets a :class:`SessionError`. A run that ended
    in an exception leaves nothing behind: the next prompt begins with an empty sequence.
    """

    def __init__(
        self,
        spec: ModelSpec,
        vision: EncoderEngine,
        decoder: DecoderEngine,
        cache: PromptCache,
        reuse: Reuse,
        tiles_at_once: int = 1,
    ) -> None:
        self._context = spec.decoder.context_length
        self._hidden_size = spec.decoder.hidden_size
        self._axes, self._deep = spec.decoder.position_axes, len(spec.decoder.deep_layers)
        self._start = spec.decoder.start_token_id
        self._sees_images = spec.decoder.image_blocks
        self._vision, self._decoder, self._at_once = vision, decoder, tiles_at_once
        self._cache, self._reuse = cache, reuse
        self._state = decoder.new_state()
        self._keys: list[PositionKey] = []
        self._borders: list[Border] = []
        """Borders of the sequence, as far as it was computed in whole pieces."""
        self.turns = Turns()
        self.told: list[Message] = []
        """Messages of the last prompt, where it had any."""
        self.prompt_tokens = 0
        """Positions of the last prompt, images expanded."""

    def belongs_to(self, decoder: DecoderEngine) -> bool:
        """Return whether the sequence is one of this engine."""
        return self._decoder is decoder

    @property
    def length(self) -> int:
        """Positions that are filled."""
        return self._state.slots

    @property
    def room(self) -> int:
        """Tokens that the context has room for."""
        return self._context - self._state.slots

    @property
    def can_draft(self) -> bool:
        """True if the sequence can go back after guesses that are wrong."""
        return self._can_go_back_to(max(self.length - 1, 0))

    @property
    def full(self) -> bool:
        """True if the context has no room for another token."""
        return self.room <= 0

    def fill(self, prompt: Prompt, note: Fill) -> Float32:
        """Makes the sequence equal to the prompt; logits after it ``(vocab_size,)``.

        Raises:
            PromptError: it does not fit into the context.
        """
        keys = self._checked_keys(prompt)
        with self._changing():
            return self._fill(keys, prompt, note)

    def _fill(self, keys: list[PositionKey], prompt: Prompt, note: Fill) -> Float32:
        self.prompt_tokens = len(keys)
        ends = borders(keys, self._cache.system)
        with note.prefill:
            whole = self._take_over(keys, ends)
            start = note.reused_tokens = self.length
        run = self._runner(prompt, note, start)
        with note.prefill:
            for here, there in pieces(start, ends, len(keys)):
                note.check()
                logits = run(here, there, int(there == len(keys)), False)
        self._keys = keys
        if whole:
            self._borders = ends
        last: Float32 = logits[-1]
        return last

    def _runner(self, prompt: Prompt, note: Fill, start: int = 0) -> RunSpan:
        """Return what runs a span of a prompt whose first ``start`` positions are there; its images
        are encoded first."""
        rows = self._rows(prompt, note, start)

        def run(here: int, there: int, wanted: int, answer: bool) -> Float32:
            part = rows[here - start : there - start]
            if answer:
                return self._decoder.answer(self._state, part, wanted)
            if wanted:
                return self._decoder.prefill(self._state, part, wanted)
            self._decoder.extend(self._state, part)
            return np.empty((0, 0), np.float32)

        return run

    def prompt_logits(self, prompt: Prompt, answer: int = 0, count: int | None = None) -> Float32:
        """Return the logits after the last ``count`` positions of the prompt ``(count,
        vocab_size)`` (none: after all), in a fresh sequence and in the same pieces. Its last
        ``answer`` positions are those of an answer."""
        keys = self._checked_keys(prompt)
        asked = len(keys) - answer
        spans = pieces(0, borders(keys[:asked], self._cache.system), asked)
        with self._changing():
            self._shorten(0)
            run, logits = self._runner(prompt, Fill()), []
            for here, there in [*spans, *([(asked, len(keys))] if answer else [])]:
                wanted = wanted_of(count, (here, there), len(keys))
                found = run(here, there, wanted, here >= asked)
                logits += [found] if wanted else []
            self._shorten(0)
        return np.concatenate(logits)

    def answer_logits(self, embeds: Float32, answer: Sequence[int]) -> Float32:
        """Return the logits ``(len(answer) + 1, vocab_size)`` that the tokens of an answer, and the
        next, are taken from, in a sequence of their own. ``embeds``: of the prompt."""
        whole = np.concatenate([embeds, self._decoder.embed(answer)])
        return self._decoder.answer(self._decoder.new_state(), Rows(whole), len(answer) + 1)

    def expert_choices(self, prompt: Prompt) -> PromptChoices:
        """Return the experts chosen for each position of the prompt, in a fresh sequence."""
        keys = self._checked_keys(prompt)
        embeds = self._rows(prompt, Fill()).embeds
        is_visual = np.array([isinstance(key, tuple) for key in keys])
        return PromptChoices(self._decoder.expert_choices(embeds), is_visual)

    def step(self, token: int) -> Float32:
        """Appends a token; logits ``(vocab_size,)``, valid until the next call."""
        with self._going_on():
            logits = self._decoder.step(self._state, token)
            self._keys.append(token)
        return logits

    def extend(self, tokens: Sequence[int]) -> Float32:
        """Appends tokens of an answer in one run; logits after each ``(len(tokens),
        vocab_size)``."""
        with self._going_on():
            return self._extend(tokens)

    def _extend(self, tokens: Sequence[int]) -> Float32:
        logits = self._decoder.answer(self._state, token_rows(self._decoder, tokens))
        self._keys += tokens
        return logits

    def rewind(self, length: int) -> None:
        """Goes back to where the sequence had this length."""
        with self._changing():
            self._shorten(length)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Let one thread change the sequence, which is empty if the change before broke off."""
        with self.turns:
            if self.turns.was_broken:
                self._clear()
            yield

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        """Let one thread append to the sequence.

        Raises:
            SessionError: besides, where the change before broke off.
        """
        with self.turns:
            if self.turns.was_broken:
                raise SessionError("this session's last run broke off: give it a prompt first")
            yield

    def forget(self) -> None:
        """Empty the sequence."""
        with self._changing():
            self._clear()

    def _clear(self) -> None:
        self._shorten(0)

    def _shorten(self, length: int) -> None:
        self._state.rewind(min(length, self._state.slots))
        del self._keys[length:]
        self._borders = [border for border in self._borders if border.position <= length]

    def shared(self, prompt: Prompt) -> int:
        """How many positions of a prompt are here already."""
        return self._common_prefix(prompt.keys)

    def save(self, kept: int = 0) -> None:
        """Leaves to the cache what it has not yet of the pieces behind position ``kept``; the
        sequence may end there then."""
        with self._changing():
            self._save(kept)

    def _save(self, kept: int) -> None:
        start, missing = 0, []
        for border in self._borders:
            if not self._cache.wants(border):
                start = border.position
            elif border.position > kept and self._can_go_back_to(border.position):
                missing.append((border, start))
                start = border.position
        for border, start in reversed(missing):
            self._shorten(border.position)
            self._cache.keep(border, self._decoder.save(self._state, start))

    def _take_over(self, keys: Sequence[PositionKey], ends: Sequence[Border]) -> bool:
        """Shortens the sequence to what it has in common with ``keys``, and lengthens it from the
        cache. Whether it consists of whole pieces then."""
        common = 0 if self._reuse == "nothing" else self._common_prefix(keys)
        ours = [0, *(border.position for border in self._borders if border.position <= common)]
        kept = common if self._reuse == "everything" else ours[-1]
        kept = self._state.reachable(self._whole_images(keys, kept))
        chain = self._cache.find(ends, kept)
        self._save(kept)
        self._shorten(kept)
        for segment in chain:
            self._decoder.restore(self._state, segment)
        self._keys = list(keys[: self.length])
        whole = (chain[0].start if chain else kept) in ours
        if whole:
            self._borders = [border for border in ends if border.position <= self.length]
        return whole

    def _whole_images(self, keys: Sequence[PositionKey], kept: int) -> int:
        """Return where the image begins that position ``kept`` lies in, where its rows see each
        other; else the position."""
        if self._sees_images:
            while kept and isinstance(keys[kept - 1], tuple) and keys[kept - 1][1]:  # type: ignore[index]
                kept -= 1
        return kept

    def _checked_keys(self, prompt: Prompt) -> list[PositionKey]:
        taken = [count_positions(image.pieces) for image in prompt.images]
        check_length(len(prompt.keys), taken, self._context)
        return list(prompt.keys)

    def _common_prefix(self, keys: Sequence[PositionKey]) -> int:
        """How much of the present sequence may stay; at least one position is computed."""
        count = 0
        for ours, theirs in zip(self._keys[: self.length], keys[:-1], strict=False):
            if ours != theirs:
                break
            count += 1
        return count

    def _can_go_back_to(self, length: int) -> bool:
        return self._state.reachable(length) == length

    def _encode(self, keys: Sequence[PositionKey], prompt: Prompt, note: Fill) -> dict[bytes, Rows]:
        """Return the rows of the images among ``keys`` by their digests."""
        with note.vision:
            prepared = {image.digest: image for image in prompt.images}
            images: dict[bytes, Rows] = {}
            encoded = set()
            for digest in {key[0]: None for key in keys if isinstance(key, tuple)}:
                known = self._cache.find_image(digest)
                if known is None:
                    image = prepared[digest]
                    known = encode_image(self._vision, image, self._at_once, note.check)
                    assert len(known.embeds) == count_rows(image.pieces), "rows of an encoder"
                    self._cache.keep_image(digest, known)
                    encoded.add(digest)
                images[digest] = known
            note.reused_images = sum(image.digest not in encoded for image in prompt.images)
        return images

    def _rows(self, prompt: Prompt, note: Fill, start: int = 0) -> Rows:
        """Return the rows of a prompt from slot ``start`` on."""
        keys = prompt.keys[start:]
        images = self._encode(keys, prompt, note)
        with note.prefill:
            embeds = np.empty((len(keys), self._hidden_size), np.float32)
            ids = np.array([key & ~HEARD if isinstance(key, int) else -1 for key in keys], np.int64)
            is_text = ids >= 0
            if is_text.any():
                embeds[is_text] = self._decoder.embed(ids[is_text].tolist())
            for index, key in enumerate(keys):
                if isinstance(key, tuple):
                    embeds[index] = images[key[0]].embeds[-1 - key[1]]
            deep = [np.zeros_like(embeds) for _ in range(self._deep if images else 0)]
            for layer, added in enumerate(deep):
                for index, key in enumerate(keys):
                    if isinstance(key, tuple):
                        added[index] = images[key[0]].deep[layer][-1 - key[1]]
            placed = None
            if self._axes > 1:
                placed = grid_positions(prompt.pieces, self._axes)[:, start:]
        blocks = _blocks(keys) if self._sees_images else ()
        return Rows(embeds, tuple(deep), placed, blocks, prompt.heard, ids)


def _blocks(keys: Sequence[PositionKey]) -> tuple[tuple[int, int], ...]:
    """Return the spans of images."""
    spans, start = [], 0
    for index, key in enumerate(keys):
        if isinstance(key, int):
            start = index + 1
        elif key[1] == 0:
            spans.append((start, index + 1))
            start = index + 1
    return tuple(spans)

"""Prompt cache: visual tokens of images, keys and values of prompts, kept for later requests.

A prompt is computed in pieces whose borders follow from what stands before them (behind the system
prompt, behind each image), and only whole pieces are reused. So the same arithmetic runs whether a
piece is computed or found here, and the logits are the same bit for bit.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeAlias, TypeVar

from mobilevlm.errors import MobileVLMError
from mobilevlm.prompt import Rows
from mobilevlm.runtime.engines import Segment
from mobilevlm.runtime.engines.onnx.mapped_pages import trim_heap

if TYPE_CHECKING:
    from mobilevlm.runtime.sequence.token_folder import TokenFolder

DEFAULT_CACHE_MB = 256
"""Four images of MobileVLM V2 1.7B with their questions' prefix."""
IMAGE_SHARE = 1 / 8
"""Share of the memory for visual tokens: they take a fortieth of what their keys and values do."""

T = TypeVar("T")
PositionKey: TypeAlias = "int | tuple[bytes, int]"
"""A token id, or the digest of an image and how many of its rows follow: 0 at its last."""


@dataclass(frozen=True)
class Border:
    """The end of a piece."""

    position: int
    digest: bytes
    """Digest of all that stands before it."""


def borders(keys: Sequence[PositionKey], system: Sequence[int]) -> list[Border]:
    """Return the ends of a prompt's pieces, without the last one. ``system``: ids that it may begin
    with. A border depends on nothing that stands behind it."""
    ends = {len(system)} if system and list(keys[: len(system)]) == list(system) else set()
    for position in range(1, len(keys)):
        before = keys[position - 1]
        if isinstance(before, tuple) and before[1] == 0:
            ends.add(position)
    hasher, found = hashlib.blake2b(digest_size=16), []
    for position, key in enumerate(keys):
        if position in ends:
            found.append(Border(position, hasher.copy().digest()))
        kind, number = (b"token", key) if isinstance(key, int) else key
        hasher.update(kind + number.to_bytes(4, "little"))
    return found


class SizedLRU(Generic[T]):
    """Values by digest, of so many bytes together; the one not used for longest goes first. May be
    used by several threads."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: OrderedDict[bytes, tuple[T, int]] = OrderedDict()
        self._lock = threading.Lock()
        self.nbytes = 0
        """Bytes that are held."""

    def get(self, key: bytes) -> T | None:
        """The value, which counts as used now."""
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def put(self, key: bytes, value: T, nbytes: int) -> None:
        """Keeps a value if it fits at all."""
        with self._lock:
            if key in self._entries or nbytes > self._limit:
                return
            while self.nbytes + nbytes > self._limit:
                _, (_, freed) = self._entries.popitem(last=False)
                self.nbytes -= freed
            self._entries[key] = value, nbytes
            self.nbytes += nbytes

    def shrink(self, nbytes: float) -> None:
        """Free this many bytes, or everything; what was not used for longest first."""
        with self._lock:
            goal = self.nbytes - nbytes
            while self._entries and self.nbytes > goal:
                _, (_, freed) = self._entries.popitem(last=False)
                self.nbytes -= freed

    def clear(self) -> None:
        """Frees everything."""
        with self._lock:
            self._entries.clear()
            self.nbytes = 0

    def close(self) -> None:
        """Frees everything and keeps nothing from now on."""
        self._limit = -1
        self.clear()


class PromptCache:
    """Cache that the sessions of one model share.

    ``megabytes``: for everything that is kept; 0 keeps nothing. ``system``: ids that prompts begin
    with, and, where the bundle has them, their keys and values (mapped, and not counted).
    ``room``: bytes that may be taken now; where that is little, less is kept, down to nothing.
    ``folder``: where visual tokens are looked for besides, and left to later processes.
    """

    def __init__(
        self,
        megabytes: float,
        system: Sequence[int] = (),
        stored: Segment | None = None,
        room: Callable[[], float] | None = None,
        folder: TokenFolder | None = None,
    ) -> None:
        if not 0 <= megabytes < float("inf"):
            raise MobileVLMError(f"cache_mb is {megabytes}, expected 0 or more")
        limit = int(megabytes * 1e6)
        self.system = list(system)
        self.enabled = limit > 0
        self._room, self._folder = room, folder
        self.images: SizedLRU[Rows] = SizedLRU(int(limit * IMAGE_SHARE))
        """Visual tokens by the digest of the prepared image."""
        self.segments: SizedLRU[Segment] = SizedLRU(limit - int(limit * IMAGE_SHARE))
        """Keys and values by the digest of the border that they reach to."""
        self._stored: dict[bytes, Segment] = {}
        if stored is not None:
            [border] = borders([*self.system, 0], self.system)
            self._stored[border.digest] = stored

    def find(self, ends: Sequence[Border], kept: int) -> list[Segment]:
        """Segments, one behind the other, from position ``kept`` or before it to the furthest
        border that can be reached."""
        by_position = {border.position: border.digest for border in ends}
        for border in reversed(ends):
            chain: list[Segment] = []
            at = border.position
            while at > kept:
                segment = self._segment(by_position.get(at))
                if segment is None:
                    break
                chain.append(segment)
                at = segment.start
            else:
                return chain[::-1]
        return []

    def wants(self, border: Border) -> bool:
        """Return whether the segment that reaches to a border would be kept, and is not here
        yet."""
        return self.enabled and self._segment(border.digest) is None

    def keep(self, border: Border, segment: Segment) -> None:
        """Keeps a segment that reaches to a border."""
        if self.make_room(segment.nbytes):
            self.segments.put(border.digest, segment, segment.nbytes)

    def find_image(self, digest: bytes) -> Rows | None:
        """Return the visual tokens of an image, from memory or the folder; none if neither has
        them."""
        known = self.images.get(digest)
        if known is None and self._folder is not None:
            known = self._folder.get(digest)
            if known is not None:
                self._remember(digest, known)
        return known

    def keep_image(self, digest: bytes, rows: Rows) -> None:
        """Keep the visual tokens of an image."""
        self._remember(digest, rows)
        if self._folder is not None:
            self._folder.put(digest, rows)

    def _remember(self, digest: bytes, rows: Rows) -> None:
        if self.enabled and self.make_room(rows.nbytes):
            self.images.put(digest, rows, rows.nbytes)

    def make_room(self, nbytes: float) -> bool:
        """Free what the memory that is left demands; return whether so much may be taken then."""
        if self._room is None:
            return True
        for kept in (self.segments, self.images):
            missing = nbytes - self._room()
            if missing <= 0:
                return True
            kept.shrink(missing)
            trim_heap()
        return self._room() >= nbytes

    def clear(self) -> None:
        """Frees all but what the bundle and the folder have."""
        self.images.clear()
        self.segments.clear()

    def close(self) -> None:
        """Frees everything and keeps nothing from now on, whoever still computes."""
        self._stored.clear()
        self.images.close()
        self.segments.close()

    def _segment(self, digest: bytes | None) -> Segment | None:
        if digest is None or not self.enabled:
            return None
        return self._stored.get(digest) or self.segments.get(digest)


def pieces(start: int, ends: Sequence[Border], length: int) -> Iterator[tuple[int, int]]:
    """The spans from ``start`` to ``length`` between borders."""
    for border in ends:
        if border.position > start:
            yield start, border.position
            start = border.position
    yield start, length

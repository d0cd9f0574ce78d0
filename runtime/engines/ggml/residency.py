"""A limit on how much of a mapped file's experts is resident.

Weights stay in the file, so an expert's pages can be given up at any time, and come back when a
token chooses it. Which one is given up: the one least used of late. Not the one whose last use is
longest ago: layers take turns, so where the experts of one token do not fit that would always be
the one that is needed next.
"""

from __future__ import annotations

import mmap
import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import MobileVLMError
from mobilevlm.gguf.file import GgufFile
from mobilevlm.gguf.names import decoder_entries

_MEMORY = 0.95
"""Factor of the earlier usage at each token: an average over about twenty."""


@dataclass(frozen=True)
class _Span:
    """Whole pages of the file."""

    start: int
    size: int


class ExpertResidency:
    """Counts which experts are resident, and gives some up before others come. Used by several
    threads."""

    def __init__(self, header: GgufFile, content: mmap.mmap, spec: DecoderSpec, limit: int) -> None:
        """``content``: the mapped file; ``limit``: bytes.

        Raises:
            MobileVLMError: there are no experts, the limit is too low, or the system cannot do it.
        """
        self._content, self._limit = content, limit
        self._spans = _expert_spans(header, spec)
        if not self._spans:
            raise MobileVLMError("--max-resident: this decoder has no experts: leave it out")
        if not hasattr(mmap, "MADV_DONTNEED"):
            raise MobileVLMError("--max-resident: this system cannot give pages up: leave it out")
        layers = {layer for layer, _ in self._spans}
        least = max(
            sum(self._size((layer, expert)) for expert in range(spec.num_experts(layer)))
            for layer in layers
        )
        if limit < least:
            raise MobileVLMError(
                f"--max-resident {limit / 1e6:.0f}MB: a prompt needs all experts of a layer at "
                f"once: allow {least / 1e6 + 1:.0f}MB at least"
            )
        self._usage = {layer: np.zeros(spec.num_experts(layer)) for layer in layers}
        self._resident: set[tuple[int, int]] = set()
        self._held = 0
        self._lock = threading.Lock()
        self.brought_in = 0
        """Bytes of experts that were brought in so far."""

    def use(self, layer: int, chosen: NDArray[np.int32]) -> None:
        """Makes room for the experts that a pass chose ``(length, top_k)``, and asks for them."""
        counts = np.bincount(chosen.ravel(), minlength=len(self._usage[layer]))
        kept = _MEMORY ** len(chosen)
        with self._lock:
            self._usage[layer] *= kept
            self._usage[layer] += (1 - kept) * counts / len(chosen)
            needed = {(layer, int(expert)) for expert in counts.nonzero()[0]}
            missing = needed - self._resident
            room = self._limit - sum(map(self._size, missing))
            while self._held > room:
                idle = self._resident - needed
                victim = min(idle, key=lambda expert: self._usage[expert[0]][expert[1]])
                self._advise(victim, mmap.MADV_DONTNEED)
                self._resident.remove(victim)
                self._held -= self._size(victim)
            for expert in missing:
                self._advise(expert, mmap.MADV_WILLNEED)
                self._resident.add(expert)
                self._held += self._size(expert)
                self.brought_in += self._size(expert)

    def _size(self, expert: tuple[int, int]) -> int:
        return sum(span.size for span in self._spans[expert])

    def _advise(self, expert: tuple[int, int], advice: int) -> None:
        for span in self._spans[expert]:
            self._content.madvise(advice, span.start, span.size)


def _expert_spans(header: GgufFile, spec: DecoderSpec) -> dict[tuple[int, int], list[_Span]]:
    """By layer and expert the pages that nothing else lies in. What shares a page with a neighbour
    stays."""
    spans: dict[tuple[int, int], list[_Span]] = {}
    for entry in decoder_entries(spec):
        if not entry.stack:
            continue
        tensor, layer = header.tensors[entry.theirs], int(entry.theirs.split(".")[1])
        size = tensor.size // entry.stack
        for expert in range(entry.stack):
            start = tensor.offset + expert * size
            first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
            last = (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
            pages = spans.setdefault((layer, expert), [])
            if last > first:
                pages.append(_Span(first, last - first))
    return spans

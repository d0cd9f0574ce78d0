"""Times of prefill and decode: our runtime on recipes, llama.cpp itself on GGUF files, in turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import comparison.candidates as peers
from comparison.measure import open_in
from comparison.process import Worker
from comparison.work import NEW_TOKENS, PROMPT_TOKENS, Shapes

from mobilevlm.console import progress
from real.candidates import Candidate

CONTEXT = 1024


@dataclass
class Times:
    """Seconds, one for each round."""

    prefill: list[float] = field(default_factory=list)
    """Prompt of ``PROMPT_TOKENS`` tokens up to the first greedy token."""
    decode: list[float] = field(default_factory=list)
    """One token, mean over ``NEW_TOKENS``."""


def measure(
    candidates: Sequence[Candidate], rounds: int, threads: int
) -> Iterator[dict[str, Times]]:
    """Yield the times of all candidates after each round. Candidates alternate, each in a process
    of its own, which runs both stages once before that counts."""
    found = {candidate.name: Times() for candidate in candidates}
    with progress.track("times", rounds * len(candidates)) as advance:
        for round_ in range(rounds):
            for candidate in candidates:
                prefill, decode = _measure_once(candidate, round_ + 1, threads)
                found[candidate.name].prefill.append(prefill)
                found[candidate.name].decode.append(decode / NEW_TOKENS)
                advance(1)
            yield found


def _measure_once(candidate: Candidate, variation: int, threads: int) -> tuple[float, float]:
    spec = candidate.bundle.manifest.spec
    shapes = Shapes((0, 0), 0, 0, 0, spec.decoder.hidden_size, spec.decoder.vocab_size, CONTEXT)
    with closing(Worker()) as worker:
        open_in(worker, _peer(candidate), shapes, threads)
        worker.ask("generate", PROMPT_TOKENS, 2, 0)
        prefill, decode = worker.ask("generate", PROMPT_TOKENS, NEW_TOKENS, variation)
    return float(prefill), float(decode)


def _peer(candidate: Candidate) -> peers.Candidate:
    """Return what compare.py's worker runs of a candidate."""
    bundle = candidate.bundle
    path = bundle.path(bundle.artifact("decoder", candidate.engine).path)
    if candidate.engine == "gguf":
        module, options = peers.PACKAGES[peers.LLAMA].module, {"model": str(path)}
        return peers.Candidate(candidate.name, peers.LLAMA, module, options, (path,))
    options = {"bundle": str(bundle.folder), "engine": "onnx"}
    return peers.Candidate(candidate.name, peers.OURS, "ours", options, (path,))

"""Questions of ``tune``: settings to try for a bundle on this machine, their order, and the choice.
Measuring itself is in runtime/tuning/probe.py.

One question after the other, each from the best settings so far. A setting is only changed for one
that is clearly faster, so that noise leaves the defaults alone. When the budget is spent, the
questions that are left keep their defaults.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from types import MappingProxyType
from typing import Protocol

from mobilevlm.plan import DRAFTING_ENGINES, PREFILL_CHUNK, PREFILL_FROM, MemorySetting, Plan
from mobilevlm.runtime.sequence.drafting import DEFAULT_DRAFT_TOKENS
from mobilevlm.runtime.tuning.plan_file import Candidate, TunedPlan

DEFAULT_BUDGET = 60.0
"""Seconds."""
ANSWER_TOKENS = 64
"""Length of the answer that engines are compared by; the question is an image and 56 tokens of
text."""
MARGIN = 0.03
"""A setting replaces the default if it takes less by this share."""
HOPELESS = 1.5
"""Engines that take so many times as long as the fastest are not looked at further."""
ROUNDS = 2
"""Visits to each candidate that needs the engine opened anew, in turns."""
LENGTHS = (8, 16, PREFILL_FROM, 32, 48, 96)
"""Lengths of the pieces by which the prefill graph is compared with the decoder's."""
CHUNKS = (PREFILL_CHUNK, 256, 128)
TILES = (1, 2, 4)
"""Tiles of an image at the same time."""
DRAFTS = (0, 2, DEFAULT_DRAFT_TOKENS, 8)
GUESSES_RIGHT = 0.6
"""Share of guessed tokens that are right where the text repeats itself; elsewhere drafts pause."""


@dataclass(frozen=True)
class StageTimes:
    """Seconds: an image, the prompt of a question, a token of the answer."""

    vision: float
    prefill: float
    step: float

    @property
    def decoder(self) -> float:
        """Seconds of the decoder's share of a question."""
        return self.prefill + ANSWER_TOKENS * self.step

    @property
    def question(self) -> float:
        """Seconds of the whole question."""
        return self.vision + self.decoder


class Probe(Protocol):
    """Measurements that questions are decided by. All in seconds, each a median."""

    def stages(self, plan: Plan) -> StageTimes:
        """The engine opened by the plan."""

    def pieces(self, plan: Plan, lengths: Sequence[int]) -> dict[int, tuple[float, float]]:
        """Time pieces of a prompt by the decoder's graph, and by the prefill graph."""

    def chunks(self, plan: Plan, sizes: Sequence[int]) -> dict[int, float]:
        """A long prompt in chunks; of sizes beyond what fits into the context none."""

    def tiles(self, plan: Plan, counts: Sequence[int]) -> dict[int, float]:
        """As many tiles as the largest count, so many of them at the same time."""

    def drafts(self, plan: Plan, counts: Sequence[int]) -> dict[int, float]:
        """A run over a token and so many guesses; nothing where wrong ones cannot be taken back."""


@dataclass
class Budget:
    """``clock``: seconds."""

    seconds: float
    clock: Callable[[], float] = time.perf_counter
    advance: Callable[[float, str], None] = lambda share, what: None
    """Hears which share is spent, and what comes next."""

    def __post_init__(self) -> None:
        self._start = self.clock()

    @property
    def spent(self) -> float:
        return self.clock() - self._start

    def allows(self, what: str) -> bool:
        """Return whether something more may begin; ``what``: its name for the progress line."""
        self.advance(min(self.spent / self.seconds, 1.0), what)
        return self.spent < self.seconds


@dataclass
class _Tuning:
    """Results so far."""

    probe: Probe
    budget: Budget
    candidates: list[Candidate] = field(default_factory=list)
    complete: bool = True

    def note(self, question: str, times: Mapping[str, Sequence[float]], chosen: str | None) -> None:
        self.candidates += [
            Candidate(question, label, median(seconds), len(seconds), label == chosen)
            for label, seconds in times.items()
        ]

    def may(self, question: str) -> bool:
        """Return whether the budget allows another question."""
        allowed = self.budget.allows(question)
        self.complete &= allowed
        return allowed


def tune(
    probe: Probe,
    budget: Budget,
    digest: str,
    engines: Sequence[str],
    threads: int,
    *,
    prompts: Sequence[str] = (),
    packing: bool = False,
    memory: Mapping[str, MemorySetting] = MappingProxyType({}),
    tiles: Mapping[str, Sequence[int]] = MappingProxyType({}),
) -> TunedPlan:
    """Measure the engines and choose. ``digest``: of the bundle's manifest; ``threads``: that this
    process may use; ``prompts``: engines that have a prefill graph; ``packing``: whether memory
    suffices to copy weights that may stay in their file; ``memory``: setting of each engine,
    where it is not ``fast``; ``tiles``: for engines that may encode several tiles of an image at
    the same time, how many memory allows. At least one engine is measured, whatever the budget."""
    state = _Tuning(probe, budget)
    plans = {engine: Plan(engine, memory=memory.get(engine, "fast")) for engine in engines}
    first: dict[str, StageTimes] = {}
    for engine in engines:
        if state.may(f"engine {engine}") or not first:
            first[engine] = probe.stages(plans[engine])
    ranked = sorted(first, key=lambda engine: first[engine].question)
    best = first[ranked[0]].question
    scores = {engine: first[engine].question for engine in ranked}
    for engine in ranked:
        start = plans[engine]
        if scores[engine] > HOPELESS * best:
            continue
        found = _threads(state, start, threads, first[engine])
        if engine == "onnx":
            found = _spinning(state, found)
            if packing:
                found = _vision_weights(state, found)
        if engine in tiles:
            most = found.vision_threads or threads
            found = _tiles(state, found, [count for count in tiles[engine] if count <= most])
        if engine in prompts and start.memory != "in turn":
            found = _prompt_graph(state, found, packing)
        if engine == "onnx" and start.memory == "fast":
            found = _chunk(state, found)
        if engine in DRAFTING_ENGINES:
            found = _drafts(state, found)
        plans[engine] = found
        if found != start and state.may(f"engine {engine} as chosen"):
            scores[engine] = probe.stages(found).question
    ranked.sort(key=scores.__getitem__)
    state.note("engine", {name: [scores[name]] for name in ranked}, ranked[0])
    return TunedPlan(
        digest,
        tuple(plans[engine] for engine in ranked),
        tuple(state.candidates),
        budget.seconds,
        round(budget.spent, 2),
        state.complete,
    )


def thread_counts(most: int) -> list[int]:
    """Those worth a try: all, three quarters, a half; of few processors every number."""
    if most <= 2:
        return list(range(most, 0, -1))
    return sorted({most, -(-3 * most // 4), -(-most // 2)}, reverse=True)


def fastest(times: Mapping[str, Sequence[float]]) -> str:
    """The first, unless another takes clearly less."""
    medians = {label: median(seconds) for label, seconds in times.items()}
    default = next(iter(medians))
    best = min(medians, key=medians.__getitem__)
    return best if medians[best] < (1 - MARGIN) * medians[default] else default


def prefill_from(times: Mapping[int, tuple[float, float]]) -> int:
    """Return the least measured length at and above which the prefill graph is always faster; more
    than the longest if it never is."""
    found = 1 << 20
    for length in sorted(times, reverse=True):
        by_decoder, by_prompts = times[length]
        if by_prompts >= by_decoder:
            break
        found = length
    return found


def draft_cost(count: int, seconds: float) -> float:
    """Seconds per token of a run over ``count`` guesses."""
    return seconds / sum(GUESSES_RIGHT**right for right in range(count + 1))


def _rounds(
    state: _Tuning, question: str, plans: Mapping[str, Plan]
) -> Iterator[tuple[str, StageTimes]]:
    """Times of the plans in turns, as long as the budget allows."""
    for _ in range(ROUNDS):
        for label, plan in plans.items():
            if not state.budget.allows(question):
                return
            yield label, state.probe.stages(plan)


def _threads(state: _Tuning, plan: Plan, most: int, first: StageTimes) -> Plan:
    """Choose the threads of each stage; both stages are measured at once."""
    question = f"{plan.engine}: threads"
    labels = {f"{count}": count for count in thread_counts(most)}
    if len(labels) == 1 or not state.may(question):
        return plan
    plans = {
        label: replace(plan, vision_threads=count, decoder_threads=count)
        for label, count in labels.items()
    }
    times: dict[str, list[StageTimes]] = {f"{most}": [first]}
    for label, found in _rounds(state, question, plans):
        times.setdefault(label, []).append(found)
    state.complete &= len(times) == len(labels)
    chosen = {}
    for stage in ("vision", "decoder"):
        seconds = {label: [getattr(item, stage) for item in times[label]] for label in times}
        best = fastest(seconds)
        state.note(f"{plan.engine}: {stage} threads", seconds, best)
        chosen[stage] = labels[best] if labels[best] != most else 0
    return replace(plan, vision_threads=chosen["vision"], decoder_threads=chosen["decoder"])


def _spinning(state: _Tuning, plan: Plan) -> Plan:
    return _whole(state, "spinning", {"on": plan, "off": replace(plan, spinning=False)})


def _vision_weights(state: _Tuning, plan: Plan) -> Plan:
    packed = replace(plan, vision_weights="packed")
    return _whole(state, "weights of the image encoder", {"mapped": plan, "packed": packed})


def _prompt_graph(state: _Tuning, plan: Plan, packing: bool) -> Plan:
    if packing:
        packed = replace(plan, prefill_weights="packed")
        plan = _whole(state, "weights of the prefill graph", {"mapped": plan, "packed": packed})
    question = f"{plan.engine}: least positions for the prefill graph"
    if not state.may(question):
        return plan
    times = state.probe.pieces(plan, LENGTHS)
    chosen = prefill_from(times)
    for length, (by_decoder, by_prompts) in times.items():
        seconds = {"decoder's graph": [by_decoder], "prefill graph": [by_prompts]}
        faster = "prefill graph" if length >= chosen else "decoder's graph"
        state.note(f"{plan.engine}: {length} positions", seconds, faster)
    return replace(plan, prefill_from=chosen)


def _chunk(state: _Tuning, plan: Plan) -> Plan:
    question = f"{plan.engine}: positions per run of a long prompt"
    if not state.may(question):
        return plan
    times = state.probe.chunks(plan, CHUNKS)
    if not times:
        return plan
    seconds = {f"{size}": [value] for size, value in times.items()}
    best = fastest(seconds)
    state.note(question, seconds, best)
    return replace(plan, prefill_chunk=int(best))


def _tiles(state: _Tuning, plan: Plan, counts: Sequence[int]) -> Plan:
    question = f"{plan.engine}: tiles of an image at the same time"
    if len(counts) < 2 or not state.may(question):
        return plan
    times = state.probe.tiles(plan, counts)
    seconds = {f"{count}": [value] for count, value in times.items()}
    best = fastest(seconds)
    state.note(question, seconds, best)
    return replace(plan, tiles_at_once=int(best))


def _drafts(state: _Tuning, plan: Plan) -> Plan:
    question = f"{plan.engine}: guessed tokens (a token's time where text repeats)"
    if not state.may(question):
        return plan
    times = state.probe.drafts(plan, DRAFTS)
    if not times:
        return replace(plan, draft_tokens=0)
    seconds = {f"{count}": [draft_cost(count, value)] for count, value in times.items()}
    best = fastest(seconds)
    state.note(question, seconds, best)
    return replace(plan, draft_tokens=int(best))


def _whole(state: _Tuning, question: str, plans: Mapping[str, Plan]) -> Plan:
    """The plan, the first being what there is, that answers a question fastest."""
    default = next(iter(plans.values()))
    question = f"{default.engine}: {question}"
    if not state.may(question):
        return default
    times: dict[str, list[float]] = {}
    for label, found in _rounds(state, question, plans):
        times.setdefault(label, []).append(found.question)
    if len(times) < len(plans):
        state.complete = False
        return default
    best = fastest(times)
    state.note(question, times, best)
    return plans[best]

"""Times of a bundle's stages under given settings, for tuning."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

import numpy as np

from mobilevlm.bundle import Bundle
from mobilevlm.plan import Plan
from mobilevlm.preparation import prepare
from mobilevlm.prompt import Prepared, Rows, Sound, count_rows
from mobilevlm.runtime.engines import DecoderEngine, EncoderEngine, token_rows
from mobilevlm.runtime.engines.onnx.engine import OnnxDecoder
from mobilevlm.runtime.engines.opening import open_engines
from mobilevlm.runtime.sequence.encoding import encode_runs
from mobilevlm.runtime.tuning.questions import StageTimes
from mobilevlm.spec import ModelSpec

TEXT_TOKENS = 56
STEPS = 12
SOUND_SECONDS = 4
LONG_PROMPT = 512
ENOUGH, MOST_RUNS = 0.5, 7
"""Seconds, and runs, after which a median is taken."""
LONG = 3.0
"""Seconds of a first run that is not repeated."""
NEVER = 1 << 20


class EngineProbe:
    """See :class:`mobilevlm.runtime.tuning.questions.Probe`. Holds one pair of engines open."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._plan: Plan | None = None
        self._engines: tuple[EncoderEngine, DecoderEngine] | None = None

    def stages(self, plan: Plan) -> StageTimes:
        """See :class:`mobilevlm.runtime.tuning.questions.Probe`."""
        vision, decoder = self._open(plan)
        spec = self._bundle.manifest.spec
        image = _usual(spec)
        state = decoder.new_state()
        room = spec.decoder.context_length - STEPS - 2
        prompt = self._rows(decoder, min(count_rows(image.pieces) + TEXT_TOKENS, room))

        def prefill() -> None:
            state.rewind(0)
            decoder.prefill(state, prompt)

        def steps() -> None:
            if state.reachable(len(prompt)) == len(prompt):
                state.rewind(len(prompt))
            elif state.slots + STEPS > spec.decoder.context_length:
                state.rewind(0)
            for _ in range(STEPS):
                decoder.step(state, 1)

        encoding = _seconds(lambda: list(encode_runs(vision, image.arrays, plan.parallel_tiles)))
        return StageTimes(encoding, _seconds(prefill), _seconds(steps) / STEPS)

    def pieces(self, plan: Plan, lengths: Sequence[int]) -> dict[int, tuple[float, float]]:
        """See :class:`mobilevlm.runtime.tuning.questions.Probe`."""
        decoder = self._decoder(plan)
        graphs = [decoder.planned(replace(plan, prefill_from=start)) for start in (NEVER, 1)]
        found = {}
        for length in lengths:
            prompt = self._rows(decoder, length)
            by_decoder, by_prompts = _in_turns([_filling(graph, prompt) for graph in graphs])
            found[length] = (by_decoder, by_prompts)
        return found

    def chunks(self, plan: Plan, sizes: Sequence[int]) -> dict[int, float]:
        """See :class:`mobilevlm.runtime.tuning.questions.Probe`."""
        decoder = self._decoder(plan)
        length = min(LONG_PROMPT, self._bundle.manifest.spec.decoder.context_length - 1)
        prompt = self._rows(decoder, length)
        useful = [size for size in sizes if size <= length]
        if len(useful) < 2:
            return {}
        runs = [
            _filling(decoder.planned(replace(plan, prefill_chunk=size)), prompt) for size in useful
        ]
        return dict(zip(useful, _in_turns(runs), strict=True))

    def tiles(self, plan: Plan, counts: Sequence[int]) -> dict[int, float]:
        """See :class:`mobilevlm.runtime.tuning.questions.Probe`."""
        vision, _ = self._open(plan)
        size = self._bundle.manifest.spec.image.usual_edge
        runs = [{"pixels": np.full((size, size, 3), 128, np.uint8)}] * max(counts)

        def run(count: int) -> Callable[[], object]:
            return lambda: list(encode_runs(vision, runs, count))

        timed = [run(count) for count in counts]
        return dict(zip(counts, _in_turns(timed), strict=True))

    def drafts(self, plan: Plan, counts: Sequence[int]) -> dict[int, float]:
        """See :class:`mobilevlm.runtime.tuning.questions.Probe`."""
        _, decoder = self._open(plan)
        state, start = decoder.new_state(), TEXT_TOKENS
        decoder.extend(state, self._rows(decoder, start))
        if state.reachable(start - 1) != start - 1:
            return {}

        def run(count: int) -> Callable[[], None]:
            tokens = token_rows(decoder, [1] * (count + 1))

            def once() -> None:
                state.rewind(start)
                if count:
                    decoder.answer(state, tokens)
                else:
                    decoder.step(state, 1)

            return once

        return dict(zip(counts, _in_turns([run(count) for count in counts]), strict=True))

    def close(self) -> None:
        """Frees the weights."""
        for engine in self._engines or ():
            engine.close()
        self._engines = self._plan = None

    def _open(self, plan: Plan) -> tuple[EncoderEngine, DecoderEngine]:
        """The engines of a plan; those that are open, if they differ in nothing that must be known
        when weights are read."""
        settings = replace(
            plan, prefill_chunk=1, prefill_from=1, draft_tokens=None, tiles_at_once=1
        )
        if self._engines is None or settings != self._plan:
            self.close()
            self._engines, self._plan = open_engines(self._bundle, plan), settings
        vision, decoder = self._engines
        return vision, decoder.planned(plan) if isinstance(decoder, OnnxDecoder) else decoder

    def _decoder(self, plan: Plan) -> OnnxDecoder:
        _, decoder = self._open(plan)
        assert isinstance(decoder, OnnxDecoder)
        return decoder

    def _rows(self, decoder: DecoderEngine, length: int) -> Rows:
        """Return rows of any tokens: the work is the same."""
        return token_rows(decoder, [index % 7 + 1 for index in range(length)])


def _usual(spec: ModelSpec) -> Prepared:
    """Return an image, or a sound of some seconds."""
    if spec.has_sound:
        rate = spec.audio.mel.sampling_rate
        return prepare(Sound((np.zeros(SOUND_SECONDS * rate, np.int16), rate)), spec.audio)
    return prepare(np.full((64, 64, 3), 128, np.uint8), spec.image)


def _filling(decoder: DecoderEngine, prompt: Rows) -> Callable[[], None]:
    """Computes a piece of a prompt from the beginning of one sequence."""
    state = decoder.new_state()

    def run() -> None:
        state.rewind(0)
        decoder.extend(state, prompt)

    return run


def _seconds(run: Callable[[], object]) -> float:
    return _in_turns([run])[0]


def _in_turns(runs: Sequence[Callable[[], object]]) -> list[float]:
    """Medians of runs one after the other. The first of each, which touches new memory, is left
    out, unless all of them took long."""
    samples: list[list[float]] = [[] for _ in runs]
    for turn in range(MOST_RUNS + 1):
        for run, seconds in zip(runs, samples, strict=True):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        if not turn and min(map(sum, samples)) < LONG:
            samples = [[] for _ in runs]
        elif sum(map(sum, samples)) > ENOUGH * len(runs):
            break
    return [median(seconds) for seconds in samples]

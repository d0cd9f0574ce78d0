"""Distance of a bundle's language model from the float32 one, on windows of text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mobilevlm.console import progress
from mobilevlm.export.quality.metrics import (
    Float32,
    compare_logits,
    greedy_figures,
    greedy_match,
    perplexity_figures,
    text_figures,
    token_figures,
)
from mobilevlm.plan import Plan
from mobilevlm.prompt import Rows
from mobilevlm.runtime.engines import DecoderEngine
from mobilevlm.runtime.engines.opening import open_engines
from real.candidates import Candidate
from real.text import Windows

PROMPT_TOKENS, CONTINUED_TOKENS = 64, 64
"""Beginning of each window that is continued, and how far."""


@dataclass(frozen=True)
class Reference:
    """The float32 model on the windows."""

    logits: Sequence[Float32]
    """After every position of each window ``(length, vocab_size)``."""
    continuations: Sequence[Sequence[int]]
    """Greedy continuation of the beginning of each window."""


@dataclass(frozen=True)
class Quality:
    """Figures of one graph; a prefill graph has no greedy ones."""

    figures: dict[str, float]
    """``perplexity``, ``perplexity_ratio``, ``kl``, ``kl_p99``, ``kl_max``, ``top1_agreement``,
    ``top5_agreement``, ``greedy_match``, ``greedy_exact``."""
    kl_by_window: tuple[float, ...]


def reference(candidate: Candidate, windows: Windows, threads: int, kept: Path) -> Reference:
    """Return the float32 model's logits and continuations, kept in a folder for later runs."""
    key = candidate.bundle.artifact("decoder", "onnx").key
    folder = kept / f"reference-{windows.digest}-{key[:12]}"
    answers = folder / "continuations.json"
    if not answers.is_file():
        progress.say("reference   float32 on the windows")
        folder.mkdir(parents=True, exist_ok=True)
        with opened(candidate, threads) as decoder:
            for number, window in enumerate(windows.ids):
                np.save(folder / f"{number}.npy", window_logits(decoder, window, False))
            continued = [continue_greedily(decoder, window) for window in windows.ids]
        answers.write_text(json.dumps(continued), "utf-8")
    logits = [np.load(folder / f"{i}.npy", mmap_mode="r") for i in range(len(windows.ids))]
    return Reference(logits, json.loads(answers.read_text("utf-8")))


def measure(
    candidate: Candidate, windows: Windows, exact: Reference, threads: int
) -> dict[str, Quality]:
    """Return the figures of the decoder, and of a prefill graph under ``NAME:prefill``."""
    found = {}
    with opened(candidate, threads) as decoder:
        found[candidate.name] = compare(decoder, windows, exact, False)
        if candidate.has_prefill_graph:
            found[f"{candidate.name}:prefill"] = compare(decoder, windows, exact, True)
    return found


def compare(decoder: DecoderEngine, windows: Windows, exact: Reference, as_prompt: bool) -> Quality:
    """Return the figures of a decoder, or of its prefill graph."""
    tokens, texts, kls = [], [], []
    for window, logits in zip(windows.ids, exact.logits, strict=True):
        found = window_logits(decoder, window, as_prompt)
        tokens.append(compare_logits(found, logits))
        texts.append(text_figures(found[:-1], logits[:-1], window[1:]))
        kls.append(float(tokens[-1].kl.mean()))
    figures = token_figures(tokens) | perplexity_figures(texts)
    if not as_prompt:
        matches = [
            continued_match(decoder, window, expected)
            for window, expected in zip(windows.ids, exact.continuations, strict=True)
        ]
        figures |= greedy_figures(matches)
    return Quality(figures, tuple(kls))


@contextmanager
def opened(candidate: Candidate, threads: int) -> Iterator[DecoderEngine]:
    """Open a candidate's decoder."""
    plan = Plan(candidate.engine, threads, threads, spinning=False)
    vision, decoder = open_engines(candidate.bundle, plan)
    with closing(vision), closing(decoder):
        yield decoder


def window_logits(decoder: DecoderEngine, window: Sequence[int], as_prompt: bool) -> Float32:
    """Return the logits after every token of a window. ``as_prompt``: by the prefill graph."""
    embeds = decoder.embed(window)
    if as_prompt:
        return decoder.prefill(decoder.new_state(), Rows(embeds), count=None)
    return decoder.answer(decoder.new_state(), embeds)


def continue_greedily(decoder: DecoderEngine, window: Sequence[int]) -> list[int]:
    """Return the greedy continuation of the beginning of a window."""
    state = decoder.new_state()
    logits = decoder.prefill(state, Rows(decoder.embed(window[:PROMPT_TOKENS])))[-1]
    found = [int(logits.argmax())]
    while len(found) < CONTINUED_TOKENS:
        found.append(int(decoder.step(state, found[-1]).argmax()))
    return found


def continued_match(
    decoder: DecoderEngine, window: Sequence[int], expected: Sequence[int]
) -> float:
    """Return the share of the expected continuation before the first token that this decoder would
    choose otherwise. It reads the expected tokens, which are its own until then."""
    state = decoder.new_state()
    first = decoder.prefill(state, Rows(decoder.embed(window[:PROMPT_TOKENS])))
    rest = decoder.answer(state, decoder.embed(expected[:-1]))
    return greedy_match(expected, np.concatenate([first, rest]).argmax(-1).tolist())

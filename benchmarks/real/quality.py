"""Distance of a bundle's language model from the float32 one, on windows of text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import mobilevlm
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

QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about the sea.",
    "List three ways to save energy at home.",
    "How do I reverse a list in Python?",
    "Summarize the story of Romeo and Juliet.",
    "What is the difference between a virus and a bacterium?",
    "Give me a recipe for pancakes.",
    "Who was Marie Curie?",
    "What is 17 plus 25, and how do you find it?",
    "Name some animals that live in the desert and say how they find water.",
    "Write an email to a colleague that moves a meeting to Friday.",
)
"""Prompts whose greedy answers are compared."""
ANSWER_TOKENS = 64


@dataclass(frozen=True)
class Answer:
    """A question in the model's template, and the float32 model's greedy answer."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Reference:
    """The float32 model on the windows and the questions."""

    logits: Sequence[Float32]
    """After every position of each window ``(length, vocab_size)``."""
    answers: Sequence[Answer]


@dataclass(frozen=True)
class Quality:
    """Figures of one graph; a prefill graph has no greedy ones."""

    figures: dict[str, float]
    """``perplexity``, ``perplexity_ratio``, ``kl``, ``kl_p99``, ``kl_max``, ``top1_agreement``,
    ``top5_agreement``, ``greedy_match``, ``greedy_exact``."""
    kl_by_window: tuple[float, ...]


def reference(candidate: Candidate, windows: Windows, threads: int, kept: Path) -> Reference:
    """Return the float32 model's logits and answers, kept in a folder for later runs."""
    made_of = (
        windows.ids,
        QUESTIONS,
        ANSWER_TOKENS,
        candidate.bundle.artifact("decoder", "onnx").key,
    )
    digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    folder = kept / f"reference-{digest[:16]}"
    answers = folder / "answers.json"
    if not answers.is_file():
        progress.say("reference   float32 on the windows and questions")
        folder.mkdir(parents=True, exist_ok=True)
        with opened(candidate, threads) as decoder:
            for number, window in enumerate(windows.ids):
                np.save(folder / f"{number}.npy", window_logits(decoder, window, False))
        found = list(greedy_answers(candidate, threads))
        answers.write_text(json.dumps(found), "utf-8")  # last: it says that all are there
    logits = [np.load(folder / f"{i}.npy", mmap_mode="r") for i in range(len(windows.ids))]
    stored = json.loads(answers.read_text("utf-8"))
    return Reference(logits, [Answer(tuple(ids), tuple(tokens)) for ids, tokens in stored])


def greedy_answers(candidate: Candidate, threads: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the ids of each question and of its greedy answer."""
    with mobilevlm.load(candidate.bundle.folder, candidate.engine, threads) as vlm:
        for question in QUESTIONS:
            answer = vlm.generate(question, max_new_tokens=ANSWER_TOKENS)
            yield vlm.prompt_ids(question), list(answer.token_ids)


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
        figures |= greedy_figures([answer_match(decoder, answer) for answer in exact.answers])
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
    return decoder.answer(decoder.new_state(), Rows(embeds))


def answer_match(decoder: DecoderEngine, answer: Answer) -> float:
    """Return the share of an answer before the first token that this decoder would choose
    otherwise. It reads the answer's tokens, which are its own until then."""
    state = decoder.new_state()
    first = decoder.prefill(state, Rows(decoder.embed(answer.prompt)))
    if len(answer.tokens) > 1:
        rest = decoder.answer(state, Rows(decoder.embed(answer.tokens[:-1])))
        first = np.concatenate([first, rest])
    return greedy_match(answer.tokens, first.argmax(-1).tolist())

"""One session in several threads, streams or processes, runs that break off, models closed at work:
one error, never a wrong answer, and nothing wrong in the cache that sessions share."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Fixture, fixture_named

import mobilevlm
from mobilevlm.errors import MobileVLMError, SessionError
from mobilevlm.plan import LLAMA_ENGINES, Plan
from mobilevlm.prompt import Rows
from mobilevlm.runtime import VLM, Session
from mobilevlm.runtime.machine import installed_extras
from mobilevlm.runtime.sequence.session import Fill, Prompt

ROUNDS, THREADS = 4, 4
QUESTIONS = ("What is it?", "Who are they?", "Where is <image>?", "How many, and of which colour?")
WITHOUT_LLAMA = bool(installed_extras()["gguf"])


@dataclass(frozen=True)
class Case:
    """A model and how it is run."""

    checkpoint: str
    plan: Plan

    def __str__(self) -> str:
        return f"{self.checkpoint}-{self.plan.engine}-{self.plan.memory.replace(' ', '-')}"

    @property
    def fixture(self) -> Fixture:
        return fixture_named(self.checkpoint)


CASES = [
    Case("llava_v1", Plan("onnx")),
    Case("llava_v1", Plan("onnx", memory="in turn")),
    Case("blip2_t5", Plan("onnx")),  # an encoder reads its prompts
    *(
        Case("llava_v1", Plan(engine))
        for engine in ("gguf", "hybrid", "ggml")
        if not WITHOUT_LLAMA or engine not in LLAMA_ENGINES
    ),
]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    made: dict[str, Path] = {}

    def bundle(case: Case) -> Path:
        if case.checkpoint not in made:
            made[case.checkpoint] = folder = tmp_path_factory.mktemp("shared") / case.checkpoint
            fixture = case.fixture
            only_onnx = WITHOUT_LLAMA or case.checkpoint == "blip2_t5"
            mobilevlm.export(
                fixture.checkpoint,
                folder,
                recipe="fp32",
                vision_tower=fixture.options.vision_tower,
                formats=("onnx",) if only_onnx else ("onnx", "gguf"),
                measure=False,
            )
        return made[case.checkpoint]

    return bundle


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@pytest.fixture(scope="module")
def open_model(case: Case, bundles: Callable[[Case], Path]) -> Callable[[], VLM]:
    return partial(mobilevlm.load, bundles(case), plan=case.plan)


@pytest.fixture
def vlm(open_model: Callable[[], VLM]) -> Iterator[VLM]:
    with open_model() as model:
        yield model


def ask(vlm: VLM, fixture: Fixture, question: str, session: Session | None = None) -> list[int]:
    answer = vlm.generate(
        question, [fixture.image], max_new_tokens=8, ignore_eos=True, session=session
    )
    return answer.token_ids


@pytest.fixture(scope="module")
def expected(case: Case, open_model: Callable[[], VLM]) -> dict[str, list[int]]:
    """Answers of a model that nobody shares."""
    with open_model() as alone:
        return {question: ask(alone, case.fixture, question) for question in QUESTIONS}


def outcomes(work: Callable[[int], Any]) -> list[Any]:
    """Return the result or SessionError of each thread; all begin at once."""
    together = threading.Barrier(THREADS)

    def attempt(index: int) -> Any:
        together.wait()
        try:
            return work(index)
        except SessionError as error:
            return error

    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(attempt, range(THREADS)))


def test_threads_that_share_a_session_get_a_right_answer_or_one_error(
    case: Case, vlm: VLM, expected: dict[str, list[int]]
) -> None:
    session, refused = vlm.new_session(), 0
    for _ in range(ROUNDS):
        found = outcomes(lambda index: ask(vlm, case.fixture, QUESTIONS[index], session))
        for question, outcome in zip(QUESTIONS, found, strict=True):
            if isinstance(outcome, SessionError):
                assert "one stream at a time per session" in str(outcome)
                assert "new_session()" in str(outcome)
                refused += 1
            else:
                assert outcome == expected[question]
    assert 0 < refused <= ROUNDS * (THREADS - 1)
    for question in QUESTIONS:  # of other sessions, which share the cache, and of this one
        assert ask(vlm, case.fixture, question) == expected[question]
        assert ask(vlm, case.fixture, question, session) == expected[question]


def test_threads_that_fill_one_session_get_right_logits_or_one_error(vlm: VLM, case: Case) -> None:
    def prompt(index: int) -> Prompt:
        return vlm._prepare(QUESTIONS[index], [case.fixture.image], False)

    alone = [vlm.new_session(False).fill(prompt(index), Fill()) for index in range(THREADS)]
    session = vlm.new_session(False)
    for _ in range(ROUNDS):
        found = outcomes(lambda index: session.fill(prompt(index), Fill()).copy())
        for logits, outcome in zip(alone, found, strict=True):
            if isinstance(outcome, SessionError):
                assert "another thread is using this session" in str(outcome)
            else:
                assert np.array_equal(outcome, logits)


def test_a_second_stream_is_refused_while_the_first_one_is_not_finished(
    case: Case, vlm: VLM, expected: dict[str, list[int]]
) -> None:
    session, images = vlm.new_session(), [case.fixture.image]
    first = vlm.stream(QUESTIONS[0], images, max_new_tokens=8, ignore_eos=True, session=session)
    next(first)
    with pytest.raises(SessionError, match=r"an answer that is not finished .* new_session"):
        vlm.generate(QUESTIONS[1], images, session=session)
    assert first.finish().token_ids == expected[QUESTIONS[0]]
    assert ask(vlm, case.fixture, QUESTIONS[1], session) == expected[QUESTIONS[1]]


@pytest.mark.parametrize("drop", ["close", "forget"])
def test_a_stream_that_is_left_in_the_middle_frees_its_session(
    drop: str, case: Case, vlm: VLM, expected: dict[str, list[int]]
) -> None:
    session = vlm.new_session()
    stream = vlm.stream(QUESTIONS[0], [case.fixture.image], ignore_eos=True, session=session)
    next(stream)
    if drop == "close":
        stream.close()
    del stream
    assert ask(vlm, case.fixture, QUESTIONS[1], session) == expected[QUESTIONS[1]]


class Breaking:
    """A decoder whose calls begin and then break off, with a sequence that nobody can use."""

    def __init__(self, decoder: Any) -> None:
        self._decoder, self.good_calls = decoder, 1 << 30

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._decoder, name)
        if name not in ("prefill", "extend", "answer", "step", "restore", "encode", "save"):
            return found

        def call(state: Any, *given: Any) -> Any:
            self.good_calls -= 1
            if self.good_calls >= 0:
                return found(state, *given)
            if name != "encode":
                self._decoder.extend(state, Rows(self._decoder.embed([5, 6, 7])))
            raise KeyboardInterrupt

        return call


@pytest.mark.parametrize("reuse", [True, False])
def test_what_a_broken_run_wrote_is_used_by_nobody(
    reuse: bool, case: Case, vlm: VLM, expected: dict[str, list[int]]
) -> None:
    breaking = Breaking(vlm._decoder)
    vlm._decoder = breaking
    session = vlm.new_session() if reuse else None
    for calls in range(6):
        for question in QUESTIONS[::2]:
            breaking.good_calls = calls
            with pytest.raises(KeyboardInterrupt):
                ask(vlm, case.fixture, question, session)
            breaking.good_calls = 1 << 30
            assert ask(vlm, case.fixture, question, session) == expected[question], calls
            assert ask(vlm, case.fixture, question) == expected[question], calls


def test_a_sequence_that_broke_off_does_not_go_on(case: Case, vlm: VLM) -> None:
    breaking = Breaking(vlm._decoder)
    vlm._decoder = breaking
    session = vlm.new_session()
    session.fill(vlm._prepare(QUESTIONS[0], [case.fixture.image], False), Fill())
    breaking.good_calls = 0
    with pytest.raises(KeyboardInterrupt):
        session.step(5)
    breaking.good_calls = 1 << 30
    with pytest.raises(SessionError, match="last run broke off: give it a prompt first"):
        session.step(5)
    session.fill(vlm._prepare(QUESTIONS[0], [case.fixture.image], False), Fill())
    session.step(5)


def test_a_model_may_be_closed_while_another_thread_reads_a_stream(
    case: Case, open_model: Callable[[], VLM], expected: dict[str, list[int]]
) -> None:
    for pieces in (1, 2, 4):
        vlm, begun, ended = open_model(), threading.Semaphore(0), list[str]()

        def read(vlm: VLM, begun: threading.Semaphore, ended: list[str]) -> None:
            session = vlm.new_session()
            try:
                for turn in range(200):
                    for _ in vlm.stream(QUESTIONS[turn % 4], [case.fixture.image], session=session):
                        begun.release()
            except MobileVLMError as error:
                ended.append(str(error))

        thread = threading.Thread(target=read, args=(vlm, begun, ended))
        thread.start()
        for _ in range(pieces):
            begun.acquire()
        vlm.close()
        thread.join(60)
        assert not thread.is_alive()
        assert ended == ["this model was closed: load it again"]
        assert vlm._cache.images.nbytes == vlm._cache.segments.nbytes == 0


def test_a_stream_may_be_closed_by_another_thread_and_has_one_reader(case: Case, vlm: VLM) -> None:
    images = [case.fixture.image]
    stream = vlm.stream(QUESTIONS[0], images, max_new_tokens=20, ignore_eos=True)
    found = outcomes(lambda _: [*stream])
    assert sum(isinstance(outcome, list) for outcome in found) >= 1
    assert {str(outcome)[:38] for outcome in found if isinstance(outcome, SessionError)} <= {
        "another thread is reading this stream:"
    }
    again = vlm.stream(QUESTIONS[0], images, ignore_eos=True)
    next(again)
    reading = threading.Thread(target=lambda: list(again))
    reading.start()
    again.close()
    reading.join(60)
    assert not reading.is_alive() and list(again) == []


# Forks

FORKS = """
import os, sys, time
import mobilevlm
from mobilevlm.plan import Plan

bundle, image, engine, memory = sys.argv[1:]
plan = Plan(engine, memory=memory)
vlm = mobilevlm.load(bundle, plan=plan)
session = vlm.new_session()
expected = vlm.generate("What?", [image], max_new_tokens=4, session=session).token_ids
stream = vlm.stream("What?", [image], ignore_eos=True)
next(stream)

def ask():
    for asked in (lambda: vlm.generate("What?"), lambda: next(stream), lambda: session.step(1)):
        try:
            asked()
        except mobilevlm.MobileVLMError as error:
            assert "forked after the model was loaded" in str(error), error
            assert "call load() in this process" in str(error), error
        else:
            raise AssertionError("answered")

def close():
    stream.close()
    vlm.close()

def leave_block():
    with vlm:
        pass

def load():
    try:
        with mobilevlm.load(bundle, plan=plan) as own:
            found = own.generate("What?", [image], max_new_tokens=4).token_ids
    except mobilevlm.MobileVLMError as error:
        assert engine != "onnx" and "start processes with multiprocessing's 'spawn'" in str(error)
    else:
        assert found == expected, (found, expected)

for work in (ask, close, leave_block, load, lambda: None):
    child = os.fork()
    if not child:
        work()
        sys.exit(0)
    end = time.monotonic() + 60
    done = 0
    while not done and time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.02)
    assert done, (work, "hangs")
    assert status == 0, (work, status)
assert vlm.generate("What?", [image], max_new_tokens=4).token_ids == expected
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_may_close_and_leave_and_is_told_to_load(
    case: Case, bundles: Callable[[Case], Path]
) -> None:
    arguments = [bundles(case), case.fixture.image, case.plan.engine, case.plan.memory]
    done = subprocess.run(
        [sys.executable, "-c", FORKS, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]

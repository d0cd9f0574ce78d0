"""The engines of GGUF files against the official arrays, and through the same front as onnx.

What was measured (relative error of all prompt logits, the worst of the four checkpoints): hybrid
and ggml f32 5e-6 (the ONNX vision stage's), f16 1e-3; gguf f32 9e-4, f16 1.5e-3. llama.cpp
convolves patches and applies GELU in float16 even for a float32 mmproj, hence gguf's distance.
"""

from __future__ import annotations

import gc
import itertools
import os
import platform
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from conftest import DATA, Fixture, fixture_named, relative_error, run_program

import mobilevlm
from mobilevlm.errors import MobileVLMError, PromptError
from mobilevlm.prompt import Rows
from mobilevlm.runtime import VLM
from mobilevlm.runtime.answer.chat import Chat
from mobilevlm.runtime.sequence.drafting import INEXACT, Drafting, Drafts
from mobilevlm.runtime.sequence.session import Fill

pytestmark = pytest.mark.skipif(
    os.environ.get("MOBILEVLM_WITHOUT_LLAMA") == "1", reason="asked to go without llama.cpp"
)

CHECKPOINTS = ("mobilevlm_v2", "mobilevlm_v1", "llava_v15", "llava_v1")
NEW_TOKENS = 24
VISUAL = 2e-3
"""Limit for visual tokens of mtmd; the largest error measured is 8e-4."""

ExportAll = Callable[[str, str], Path]


@dataclass(frozen=True)
class Case:
    """A checkpoint in a recipe and engine, and how far logits may lie from the official ones."""

    checkpoint: str
    recipe: str
    engine: str
    limit: float

    def __str__(self) -> str:
        return f"{self.checkpoint}-{self.recipe}-{self.engine}"


CASES = [
    Case(checkpoint, recipe, engine, limit)
    for checkpoint in CHECKPOINTS
    for recipe, engine, limit in (
        ("fp32", "hybrid", 1e-5),
        ("fp32", "ggml", 1e-5),
        ("fp32", "gguf", 5e-3),
        ("fp16-weights", "hybrid", 1e-2),
        ("fp16-weights", "ggml", 1e-2),
        ("fp16-weights", "gguf", 1e-2),
    )
]


@pytest.fixture(scope="module")
def export_all(tmp_path_factory: pytest.TempPathFactory) -> ExportAll:
    """Exports a reference checkpoint in both formats, each once."""
    made: dict[tuple[str, str], Path] = {}
    base = tmp_path_factory.mktemp("engines")

    def export(checkpoint: str, recipe: str) -> Path:
        key = checkpoint, recipe
        if key not in made:
            folder = base / "-".join(key)
            mobilevlm.export(
                DATA / checkpoint / "checkpoint",
                folder,
                recipe=recipe,
                vision_tower=DATA / checkpoint / "vision_tower",
                formats=("onnx", "gguf"),
                measure=False,
            )
            made[key] = folder
        return made[key]

    return export


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@pytest.fixture(scope="module")
def official(case: Case) -> Fixture:
    return fixture_named(case.checkpoint)


@pytest.fixture(scope="module")
def model(case: Case, export_all: ExportAll) -> Iterator[VLM]:
    with mobilevlm.load(export_all(case.checkpoint, case.recipe), case.engine) as vlm:
        yield vlm


@pytest.fixture(scope="module", params=["gguf", "hybrid", "ggml"])
def vlm(request: pytest.FixtureRequest, export_all: ExportAll) -> Iterator[VLM]:
    """One model in both engines, for what is the same for all."""
    with mobilevlm.load(export_all("mobilevlm_v2", "fp32"), request.param) as opened:
        yield opened


IMAGE = fixture_named("mobilevlm_v2").image
OTHER = fixture_named("llava_v1").image


def test_prompt_logits_are_the_official_ones(case: Case, official: Fixture, model: VLM) -> None:
    found = model.prompt_logits(official.expected["user_prompt"], [official.image])
    assert relative_error(found, official.arrays["logits"][0]) <= case.limit


def test_greedy_tokens_and_text_are_the_official_ones(official: Fixture, model: VLM) -> None:
    stream = model.stream(
        official.expected["user_prompt"],
        [official.image],
        max_new_tokens=NEW_TOKENS,
        ignore_eos=True,
    )
    pieces = list(stream)
    answer = stream.generation
    assert answer.token_ids == official.arrays["generated_ids"].tolist()
    assert "".join(pieces) == answer.text == official.expected["decoded_text"]
    assert answer.prompt_tokens == official.expected["prompt_length_embeds"]


def test_visual_tokens_are_the_official_ones(official: Fixture, model: VLM) -> None:
    found = model.encode_image(official.image)
    assert found.dtype == np.float32
    assert relative_error(found, official.arrays["projector_output"][0]) <= VISUAL


def test_auto_takes_onnx_where_it_is_there(export_all: ExportAll) -> None:
    with mobilevlm.load(export_all("mobilevlm_v2", "fp32")) as model:
        assert model.engine == "onnx"


def test_a_bundle_of_gguf_files_alone_runs_where_llama_cpp_sees_the_picture(tmp_path: Path) -> None:
    data = fixture_named("llava_v1")
    mobilevlm.export(
        data.checkpoint,
        tmp_path / "b",
        recipe="fp32",
        vision_tower=data.tower,
        formats=("gguf",),
        measure=False,
    )
    for engine, meant in (("auto", "gguf"), ("ggml", "ggml")):
        with mobilevlm.load(tmp_path / "b", engine) as model:
            assert model.engine == meant
            answer = model.generate(
                data.expected["user_prompt"],
                [data.image],
                max_new_tokens=NEW_TOKENS,
                ignore_eos=True,
            )
            assert answer.token_ids == data.arrays["generated_ids"].tolist()
    for engine, stage in (("onnx", "vision"), ("hybrid", "vision")):
        with pytest.raises(MobileVLMError, match=rf"ONNX artifact of the {stage} .* --format all"):
            mobilevlm.load(tmp_path / "b", engine)


def test_mtmd_gives_no_features_and_says_so(vlm: VLM) -> None:
    if vlm.engine != "gguf":
        assert vlm.image_features(IMAGE).shape == (576, 64)
        return
    with pytest.raises(MobileVLMError, match=r"gives no tower features, .*: use --engine onnx"):
        vlm.image_features(IMAGE)


def test_turns_that_keep_their_beginning_answer_like_fresh_ones(vlm: VLM) -> None:
    chat = Chat(vlm, [IMAGE])
    for question in ("What is it?", "And the colours?", "Where?"):
        kept = chat.ask(question, max_new_tokens=12, ignore_eos=True).finish()
        *before, _ = chat.messages
        fresh = vlm.generate(before, [IMAGE], max_new_tokens=12, ignore_eos=True)
        assert kept.token_ids == fresh.token_ids


def test_the_last_logits_are_the_end_of_all_logits(vlm: VLM) -> None:
    embeds = np.random.default_rng(0).standard_normal((700, 64), np.float32)  # two chunks
    whole = vlm.embeds_logits(embeds)
    for count in (1, 40, 600):  # 600 begin in the first chunk
        for as_prompt in (False, True):
            last = vlm.embeds_logits(embeds, as_prompt, count)
            assert last.shape == (count, vlm.spec.decoder.vocab_size)
            assert relative_error(last, whole[-count:]) <= 1e-5
    prompt = vlm.prompt_logits("What is it? A cat.", [IMAGE], answer_tokens=3)
    for count in (2, 5):  # within the answer, and before it
        last = vlm.prompt_logits("What is it? A cat.", [IMAGE], answer_tokens=3, count=count)
        assert len(last) == count
        assert relative_error(last, prompt[-count:]) <= 1e-5


def test_going_back_and_on_gives_the_same_logits(vlm: VLM) -> None:
    _, decoder = vlm._engines()
    embeds = np.random.default_rng(0).standard_normal((700, 64), np.float32)  # two chunks
    state = decoder.new_state()
    whole = decoder.prefill(state, Rows(embeds), count=None)
    last = decoder.prefill(decoder.new_state(), Rows(embeds))
    assert whole.shape == (700, vlm.spec.decoder.vocab_size)
    assert relative_error(last[0], whole[-1]) <= 1e-5
    state.rewind(300)
    assert state.slots == 300
    assert relative_error(decoder.prefill(state, Rows(embeds[300:])), last) <= 1e-5
    state.rewind(699)
    token = 5
    one = decoder.prefill(state, Rows(decoder.embed([token])))[0]
    state.rewind(699)
    assert relative_error(decoder.step(state, token), one) <= 1e-5
    assert state.slots == 700


def test_two_pictures_stand_where_they_are_marked(vlm: VLM, export_all: ExportAll) -> None:
    with mobilevlm.load(export_all("mobilevlm_v2", "fp32"), "onnx") as reference:
        prompt = "Is <image> like <image>?"
        expected, found = (m.prompt_logits(prompt, [IMAGE, OTHER]) for m in (reference, vlm))
    assert relative_error(found, expected) <= 5e-3
    swapped = vlm.prompt_logits(prompt, [OTHER, IMAGE])
    assert relative_error(swapped, expected) > 0.05


def test_sampling_with_a_seed_is_repeatable(vlm: VLM) -> None:
    def drawn(seed: int) -> list[int]:
        answer = vlm.generate(
            "Tell me", max_new_tokens=16, temperature=1.0, seed=seed, ignore_eos=True
        )
        return answer.token_ids

    assert drawn(1) == drawn(1) != drawn(2)


def test_a_prompt_longer_than_the_context_is_refused_and_the_next_one_works(vlm: VLM) -> None:
    with pytest.raises(PromptError, match="the context holds 2048"):
        vlm.generate("a " * 4000, [IMAGE])
    assert vlm.generate("Who?", max_new_tokens=3, ignore_eos=True).token_ids


def test_an_answer_ends_where_the_context_is_full(vlm: VLM) -> None:
    prompt = "a" + " a" * 1950
    length = len(vlm.prompt_ids(prompt, raw=True))
    answer = vlm.generate(prompt, raw=True, max_new_tokens=4000, ignore_eos=True)
    assert answer.finish_reason == "length"
    assert length + len(answer.token_ids) == 2048 + 1  # the last token needs no position


def test_a_failure_leaves_the_sequence_as_it_was(vlm: VLM) -> None:
    _, decoder = vlm._engines()
    state = decoder.new_state()
    embeds = np.zeros((2040, 64), np.float32)
    decoder.prefill(state, Rows(embeds))
    with pytest.raises(MobileVLMError, match=r"failed after 2040 .*the context is full"):
        decoder.prefill(state, Rows(embeds[:20]))
    assert state.slots == 2040
    decoder.step(state, 5)


def test_two_threads_answer_as_one_after_another(vlm: VLM) -> None:
    questions = ("What is it?", "Who are they, and where?")

    def ask(question: str) -> list[int]:
        answer = vlm.generate(question, [IMAGE], max_new_tokens=20, ignore_eos=True)
        return answer.token_ids

    alone = [ask(question) for question in questions]
    assert alone[0] != alone[1]
    together = threading.Barrier(2)

    def run(question: str) -> list[list[int]]:
        together.wait()
        return [ask(question) for _ in range(4)]

    with ThreadPoolExecutor(2) as threads:
        for expected, answers in zip(alone, threads.map(run, questions), strict=True):
            assert answers == [expected] * 4


QUESTIONS = (("Who?", IMAGE), ("What is it?", IMAGE), ("Who?", OTHER), ("Where?", IMAGE))


@pytest.mark.parametrize("recipe", ["int4", "fp32"])
@pytest.mark.parametrize("engine", ["hybrid", "ggml"])
def test_what_is_kept_of_prompts_leaves_their_logits_as_they_are_bit_for_bit(
    engine: str, recipe: str, export_all: ExportAll
) -> None:
    """One sequence in turn with two images: from itself, and from what the engine saved."""
    with mobilevlm.load(export_all("mobilevlm_v2", recipe), engine, threads=1) as vlm:
        kept = vlm._session("pieces")
        reused = []
        for question, image in QUESTIONS:
            prompt, note = vlm._prepare(question, [image], False), Fill()
            fresh = vlm._session("nothing")
            assert np.array_equal(kept.fill(prompt, note), fresh.fill(prompt, Fill()))
            assert np.array_equal(kept.step(300), fresh.step(300))
            reused.append(note.reused_tokens)
        system, picture = len(vlm._cache.system), vlm.spec.image.connector.num_tokens
        ahead = vlm.prompt_ids("Who?", 1).index(-200)
        assert reused == [0, ahead + picture, system, ahead + picture]


@pytest.mark.parametrize("recipe", ["fp32", "fp16-weights", "int8", "int4"])
@pytest.mark.parametrize("engine", ["onnx", "gguf"])
def test_drafts_leave_the_answer_as_it_is(engine: str, recipe: str, export_all: ExportAll) -> None:
    """A penalty below 1 makes a random model repeat itself, so there is much to guess."""
    with mobilevlm.load(export_all("mobilevlm_v2", recipe), engine, threads=1) as vlm:
        clock = itertools.cycle((0, 1, 6))  # a run over five positions takes as long as a step
        vlm._drafting = Drafting(lambda: next(clock))
        drafts = []
        for prompt, penalty in (("Who?", 1.0), ("What is it?", 0.3), ("Who are they?", 1.1)):
            plain, drafted = (
                vlm.generate(
                    prompt,
                    max_new_tokens=100,
                    ignore_eos=True,
                    repetition_penalty=penalty,
                    draft_tokens=count,
                )
                for count in (0, 4)
            )
            assert drafted.token_ids == plain.token_ids
            assert plain.drafts == Drafts()
            drafts.append(drafted.drafts)
        assert any(found.accepted or found.note == INEXACT for found in drafts), drafts
        # Integer kernels with a scale for each row; of float ones nothing is promised.
        if engine == "gguf" and recipe in ("int8", "int4") and platform.machine() == "x86_64":
            assert sum(found.accepted for found in drafts) > 0


@pytest.mark.parametrize("engine", ["gguf", "hybrid", "ggml"])
def test_closing_frees_model_and_contexts_and_later_use_says_so(
    engine: str, export_all: ExportAll
) -> None:
    vlm = mobilevlm.load(export_all("mobilevlm_v2", "fp32"), engine)
    vlm.generate("Who?", [IMAGE], max_new_tokens=2)
    vision, decoder = cast(tuple[Any, Any], vlm._engines())
    held: list[Any] = [vlm._idle[0]._state]
    held += [decoder._weights if engine == "ggml" else decoder.model]
    held += [vision._context] if engine == "gguf" else []
    watched = [weakref.ref(part) for part in held]
    del held
    vlm.close()
    gc.collect()
    assert [reference() for reference in watched] == [None] * len(watched)
    for action in (
        lambda: vlm.generate("Who?"),
        lambda: vision.encode({"pixels": np.zeros((336, 336, 3), np.uint8)}),
        lambda: decoder.embed([1]),
        decoder.new_state,
    ):
        with pytest.raises(MobileVLMError, match="this model was closed: load it again"):
            action()


def test_llama_cpp_is_quiet_unless_its_log_is_asked_for(export_all: ExportAll) -> None:
    arguments: tuple[object, ...] = (
        "run", export_all("mobilevlm_v2", "fp32"), "--engine", "gguf", "--image", IMAGE,
        "--prompt", "Who?", "--max-new-tokens", "3",
    )  # fmt: skip
    quiet = run_program(*arguments)
    assert quiet.returncode == 0 and quiet.stderr.count("\n") == 1, quiet.stderr
    loud = run_program(*arguments, environment={"MOBILEVLM_LLAMA_LOG": "1"})
    assert loud.returncode == 0 and "llama" in loud.stderr and loud.stdout == quiet.stdout

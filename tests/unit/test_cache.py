"""State that requests keep for later ones; answers do not change."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BundleOf
from numpy.typing import NDArray
from test_session import counted, picture

import mobilevlm
from mobilevlm.bundle import read_manifest, write_manifest
from mobilevlm.errors import BundleError, MobileVLMError
from mobilevlm.prompt import Rows
from mobilevlm.runtime import VLM
from mobilevlm.runtime.engines import Segment
from mobilevlm.runtime.sequence.cache import (
    Border,
    PositionKey,
    PromptCache,
    SizedLRU,
    borders,
    pieces,
)
from mobilevlm.templates.chat_template import _compiled

A, B = b"A" * 16, b"B" * 16


def rows(digest: bytes, count: int = 3) -> list[tuple[bytes, int]]:
    return [(digest, left) for left in reversed(range(count))]


# Borders


def test_borders_stand_behind_the_system_prompt_and_each_picture() -> None:
    keys: list[PositionKey] = [1, 2, *rows(A), *rows(A), 5, *rows(B), 6]
    assert [border.position for border in borders(keys, [1, 2])] == [2, 5, 8, 12]
    assert [border.position for border in borders(keys, [1, 3])] == [5, 8, 12]
    assert list(pieces(5, borders(keys, [1, 2]), len(keys))) == [(5, 8), (8, 12), (12, 13)]


def test_a_prompt_that_ends_at_a_border_has_none_there() -> None:
    assert borders([1, 2], [1, 2]) == []
    assert borders(rows(A), []) == []


def test_a_border_depends_on_all_that_stands_before_it_and_on_nothing_behind() -> None:
    def last(*keys: int | tuple[bytes, int]) -> bytes:
        return borders(keys, [])[-1].digest

    same = {last(1, 2, *rows(A), 7), last(1, 2, *rows(A), 8, 9), last(1, 2, *rows(A), *rows(B))}
    assert len(same) == 1
    others = {last(1, 3, *rows(A), 7), last(1, 2, *rows(B), 7), last(2, *rows(A), 7)}
    assert len(same | others) == 4


# Memory


def test_the_value_not_used_for_longest_makes_room() -> None:
    cache: SizedLRU[str] = SizedLRU(100)
    for name in ("a", "b", "c"):
        cache.put(name.encode(), name, 30)
    assert cache.get(b"a") == "a"
    cache.put(b"d", "d", 35)
    assert [cache.get(name) for name in (b"a", b"b", b"c", b"d")] == ["a", None, "c", "d"]
    assert cache.nbytes == 95
    cache.put(b"e", "e", 101)
    assert cache.get(b"e") is None and cache.nbytes == 95
    cache.clear()
    assert cache.get(b"a") is None and cache.nbytes == 0


def test_a_size_that_is_none_is_refused() -> None:
    for size in (-1, float("nan"), float("inf")):
        with pytest.raises(MobileVLMError, match="expected 0 or more"):
            PromptCache(size)


def test_a_chain_with_a_gap_is_not_taken() -> None:
    keys: list[PositionKey] = [1, *rows(A), *rows(B), 2]
    first, second = borders(keys, [])
    cache, data = PromptCache(1), np.zeros(4, np.float32)
    cache.keep(second, Segment(first.position, second.position, data))
    assert cache.find([first, second], 0) == []
    # What is missing may stand in the sequence itself.
    assert [part.end for part in cache.find([first, second], first.position)] == [second.position]
    cache.keep(first, Segment(0, first.position, data))
    assert [part.end for part in cache.find([first, second], 0)] == [first.position, 7]
    assert cache.find([first, second], second.position) == []


def test_the_cache_shrinks_to_what_memory_is_left_and_to_nothing() -> None:
    data = np.zeros(25_000, np.float32)  # 0.1 MB
    left = 0.35e6

    def room() -> float:
        return left - cache.segments.nbytes - cache.images.nbytes

    cache = PromptCache(1, room=room)
    digests = [bytes([number]) * 16 for number in range(6)]
    for digest in digests:
        cache.keep(Border(1, digest), Segment(0, 1, data))
    assert [cache.segments.get(digest) is not None for digest in digests] == [False] * 3 + [
        True
    ] * 3
    cache.keep_image(A, Rows(data[:1000]))
    assert cache.images.get(A) is not None
    left = 0.15e6
    assert cache.make_room(0) and cache.segments.nbytes == 0.1e6
    left = 0.0
    cache.keep_image(B, Rows(data[:1000]))
    assert cache.segments.nbytes == cache.images.nbytes == 0
    left = -1.0
    assert not cache.make_room(0)


# Answers


@pytest.fixture(scope="module", params=["fp32", "int8", "int4", "fast", "fast, int8 keys"])
def bundle(request: pytest.FixtureRequest, bundle_of: BundleOf) -> Path:
    recipe, _, keys = request.param.partition(", ")
    return bundle_of("tiny", recipe, kv_cache="int8" if keys else "fp32")


@pytest.fixture(scope="module")
def plain(bundle: Path) -> Iterator[VLM]:
    """Computes everything from the first token."""
    with mobilevlm.load(bundle, cache_mb=0) as vlm:
        yield vlm


QUESTIONS = (("What is it?", 1), ("Who are they?", 1), ("Where is it?", 2), ("Who are they?", 1))


def test_logits_are_the_same_bits_with_and_without_what_was_kept(plain: VLM) -> None:
    """In every way that a prompt can be met: by the sequence, by the cache, by parts of both."""
    pictures = {seed: picture(seed, plain) for seed in (1, 2)}
    cache = PromptCache(64, plain._cache.system)
    runs = [counted(plain, "pieces", cache) for _ in range(2)]
    order = [(0, 1), (0, 1), (0, 2), (0, 1), (1, 1), (1, 2), (0, 2), (1, 1), (0, 0)]
    reused = []
    for turn, (session, seed) in enumerate(order):
        pixels = [pictures[seed]] if seed else []
        prompt = plain._prepare(f"Question {turn}?", pixels, raw=False)
        run, fresh = runs[session], counted(plain, "nothing", PromptCache(0, cache.system))
        assert np.array_equal(run.fill(prompt), fresh.fill(prompt)), turn
        for token in (300, 301):
            assert np.array_equal(run.session.step(token), fresh.session.step(token)), turn
        reused.append(run.note.reused_tokens)
    system = len(cache.system)
    assert system > 16
    whole = plain.prompt_ids("Q", 1).index(-200) + plain.spec.image.connector.num_tokens
    # Nothing; the sequence; its system prompt; then all from the cache, and the sequence again.
    assert reused == [0, whole, system, whole, whole, whole, whole, whole, system]


def test_answers_are_the_same_with_and_without_caches(bundle: Path, plain: VLM) -> None:
    pictures = [picture(seed, plain) for seed in (1, 2, 3)]
    with mobilevlm.load(bundle, cache_mb=8) as vlm:
        for turn in range(8):
            question, count = QUESTIONS[turn % len(QUESTIONS)]
            images = (pictures * 2)[turn % 3 :][:count]
            expected = plain.generate(question, images, max_new_tokens=12, ignore_eos=True)
            found = vlm.generate(question, images, max_new_tokens=12, ignore_eos=True)
            assert found.token_ids == expected.token_ids, turn
            assert expected.reused.tokens == expected.reused.images == 0
        assert vlm._cache.segments.nbytes > 0


def test_a_second_question_computes_neither_picture_nor_system_prompt(bundle: Path) -> None:
    with mobilevlm.load(bundle) as vlm:
        image = picture(1, vlm)
        first = vlm.generate("What is it?", [image], max_new_tokens=2)
        assert first.reused.images == 0
        second = vlm.generate("Who is it then?", [image], max_new_tokens=2)
        assert second.reused.images == 1
        assert second.reused.tokens > vlm.spec.image.connector.num_tokens
        vlm.clear_caches()
        again = vlm.generate("Who is it then?", [image], max_new_tokens=2)
        assert again.reused.images == 0
        assert again.token_ids == second.token_ids


def test_memory_stays_bounded_whatever_is_asked(vlm: VLM, bundle_of: BundleOf) -> None:
    with mobilevlm.load(bundle_of("tiny", "fp32"), cache_mb=0.5) as small:
        for seed in range(12):
            small.generate("What is it?", [picture(seed, small)], max_new_tokens=1)
        cache = small._cache
        assert 0 < cache.images.nbytes + cache.segments.nbytes <= 500_000


def test_streams_side_by_side_do_not_disturb_each_other(vlm: VLM) -> None:
    def pieces_of(question: str) -> list[str]:
        return list(vlm.stream(question, max_new_tokens=20, ignore_eos=True))

    questions = ["What is it?", "Who are they?", "Where?"]
    alone = [pieces_of(question) for question in questions]
    streams = [vlm.stream(text, max_new_tokens=20, ignore_eos=True) for text in questions]
    together: list[list[str]] = [[] for _ in streams]
    for _ in range(20):
        for stream, said in zip(streams, together, strict=True):
            said += [piece for piece in [next(stream, None)] if piece is not None]
    for stream, said in zip(streams, together, strict=True):
        said += list(stream)
    assert together == alone
    assert len(vlm._idle) <= 2


# The system prompt in the bundle


def test_a_bundle_brings_the_system_prompt(bundle: Path, plain: VLM) -> None:
    system = plain.bundle.manifest.system_prompt
    assert system is not None and f"onnx/{Path(system.path).name}" in plain.bundle.manifest.files
    with mobilevlm.load(bundle) as vlm:
        found = vlm.generate("What is it?", max_new_tokens=8, ignore_eos=True)
        assert found.reused.tokens == len(system.ids)
        assert vlm._cache.segments.nbytes == 0  # it is mapped, not copied
    expected = plain.generate("What is it?", max_new_tokens=8, ignore_eos=True)
    assert found.token_ids == expected.token_ids


def test_loading_compiles_the_chat_template_where_a_bundle_brings_it_too(bundle: Path) -> None:
    _compiled.cache_clear()
    with mobilevlm.load(bundle) as vlm:
        assert _compiled.cache_info().misses == 1
        vlm.count_text_tokens("What is it?", images=1)
    assert _compiled.cache_info().misses == 1


def stored(bundle: Path) -> NDArray[Any]:
    manifest, _ = read_manifest(bundle)
    assert manifest.system_prompt is not None
    kind = {"fp32": np.float32, "int8": np.int8}[manifest.recipe.kv_cache]
    return np.fromfile(bundle / manifest.system_prompt.path, kind)


def test_what_is_stored_is_what_the_decoder_computes(bundle: Path, plain: VLM) -> None:
    _, decoder = plain._engines()
    state = decoder.new_state()
    decoder.extend(state, Rows(decoder.embed(plain._cache.system)))
    assert np.array_equal(decoder.save(state, 0).data.ravel(), stored(bundle))


def test_a_bundle_without_it_runs(bundle: Path, plain: VLM, tmp_path: Path) -> None:
    old = shutil.copytree(bundle, tmp_path / "old")
    manifest, _ = read_manifest(old)
    assert manifest.system_prompt is not None
    (old / manifest.system_prompt.path).unlink()
    files = {
        name: entry for name, entry in manifest.files.items() if name != manifest.system_prompt.path
    }
    write_manifest(old, dataclasses.replace(manifest, files=files, system_prompt=None))
    with mobilevlm.load(old) as vlm:
        answers = [vlm.generate("What is it?", max_new_tokens=8, ignore_eos=True) for _ in range(2)]
    expected = plain.generate("What is it?", max_new_tokens=8, ignore_eos=True)
    assert [answer.token_ids for answer in answers] == [expected.token_ids] * 2
    assert answers[0].reused.tokens == 0
    assert answers[1].reused.tokens == len(manifest.system_prompt.ids)


def test_a_stored_system_prompt_of_another_size_is_refused(bundle: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(bundle, tmp_path / "broken")
    manifest, _ = read_manifest(broken)
    assert manifest.system_prompt is not None
    shorter = dataclasses.replace(manifest.system_prompt, ids=manifest.system_prompt.ids[1:])
    write_manifest(broken, dataclasses.replace(manifest, system_prompt=shorter))
    with pytest.raises(BundleError, match=r"system_prompt\.bin: \d+ bytes, \d+ tokens of this"):
        mobilevlm.load(broken)

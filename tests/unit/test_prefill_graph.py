"""Recipe ``fast``: one graph computes prompts, another the answers, on the same keys and values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MOE_FIXTURES, BundleOf, relative_error
from numpy.typing import NDArray

import mobilevlm
from mobilevlm.bundle import open_bundle
from mobilevlm.export.recipes.file import recipe_text
from mobilevlm.export.recipes.named import RECIPES
from mobilevlm.plan import PREFILL_FROM, Plan, engine_files
from mobilevlm.prompt import Rows
from mobilevlm.runtime.engines.onnx.engine import OnnxDecoder
from mobilevlm.runtime.engines.opening import onnx_decoder
from mobilevlm.runtime.sequence.session import Fill

LONG = PREFILL_FROM + 16


@pytest.fixture(scope="module")
def fast(bundle_of: BundleOf) -> Path:
    return bundle_of("tiny", "fast")


@pytest.fixture(scope="module")
def alone(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One graph, as that for prompts in ``fast``."""
    folder = tmp_path_factory.mktemp("alone")
    recipe = folder / "alone.toml"
    recipe.write_text(recipe_text(RECIPES["fast"].for_prefill(), folder))
    mobilevlm.export(tiny_checkpoint, folder / "bundle", recipe=str(recipe), measure=False)
    return folder / "bundle"


def decoder_of(folder: Path, plan: Plan = Plan()) -> OnnxDecoder:  # noqa: B008
    bundle = open_bundle(folder)
    opened = onnx_decoder(bundle, bundle.path(bundle.artifact("decoder", "onnx").path), plan)
    assert isinstance(opened, OnnxDecoder)
    return opened


def embeds(length: int) -> NDArray[np.float32]:
    return np.random.default_rng(length).standard_normal((length, 64), np.float32)


def test_answers_are_computed_by_the_graph_of_int4(fast: Path, bundle_of: BundleOf) -> None:
    ours, plain = open_bundle(fast), open_bundle(bundle_of("tiny", "int4"))
    for stage in ("vision", "embeddings", "decoder"):
        files = ours.artifact(stage, "onnx").files
        assert files == plain.artifact(stage, "onnx").files
        for name in files:
            assert ours.path(name).read_bytes() == plain.path(name).read_bytes(), name
    extra = set(engine_files(ours, "onnx")) - set(engine_files(plain, "onnx"))
    assert extra == set(ours.artifact("prefill", "onnx").files)


def test_the_length_of_a_piece_alone_says_which_graph_computes_it(
    fast: Path, alone: Path, bundle_of: BundleOf
) -> None:
    decoder, int4, prompts = (
        decoder_of(bundle) for bundle in (fast, bundle_of("tiny", "int4"), alone)
    )
    for length, before in ((1, 0), (PREFILL_FROM - 1, 0), (PREFILL_FROM, 0), (LONG, 3)):
        found = {}
        for name, engine in (("fast", decoder), ("int4", int4), ("alone", prompts)):
            state = engine.new_state()
            if before:
                engine.extend(state, Rows(embeds(before)))
            found[name] = engine.prefill(state, Rows(embeds(length)), count=None)
        short = length < PREFILL_FROM
        assert np.array_equal(found["fast"], found["int4"]) == short, length
        if not before:
            assert np.array_equal(found["fast"], found["alone"]) == (not short), length


def test_an_answer_never_meets_the_graph_for_prompts(fast: Path, bundle_of: BundleOf) -> None:
    decoder, int4 = decoder_of(fast), decoder_of(bundle_of("tiny", "int4"))
    found, expected = (
        engine.answer(engine.new_state(), Rows(embeds(LONG))) for engine in (decoder, int4)
    )
    assert np.array_equal(found, expected)
    state = decoder.new_state()
    decoder.extend(state, Rows(embeds(LONG)))
    copied = int4.new_state()
    int4.restore(copied, decoder.save(state, 0))
    assert np.array_equal(decoder.step(state, 7), int4.step(copied, 7))


@pytest.mark.parametrize("weights", ["packed", "released"])
def test_wherever_the_weights_lie_the_bits_are_the_same(fast: Path, weights: Any) -> None:
    mapped, other = decoder_of(fast), decoder_of(fast, Plan(prefill_weights=weights))
    for _ in range(2):  # the second time what was given back comes again
        found, expected = (
            decoder.prefill(decoder.new_state(), Rows(embeds(LONG)), count=None)
            for decoder in (other, mapped)
        )
        assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    "plan", [Plan(prefill_from=400), Plan(prefill_from=1), Plan(prefill_chunk=16)], ids=str
)
def test_no_plan_makes_answers_depend_on_caches(fast: Path, plan: Plan) -> None:
    """The system prompt in the bundle was computed without one."""
    picture = np.zeros((336, 336, 3), np.uint8)
    found = []
    for megabytes in (0, 64):
        with mobilevlm.load(fast, cache_mb=megabytes, plan=plan) as vlm:
            assert vlm.bundle.manifest.system_prompt is not None
            session = vlm._session("pieces" if megabytes else "nothing")
            for question in ("Who?", "What is it?"):
                prompt = vlm._prepare(question, [picture], raw=False)
                found.append(session.fill(prompt, Fill()).copy())
    assert np.array_equal(found[0], found[2]) and np.array_equal(found[1], found[3])


@pytest.mark.parametrize("name", ["mobilevlm_v2", "llava_v1", *MOE_FIXTURES])
def test_every_decoder_has_a_graph_for_prompts_that_is_measured(
    name: str, bundle_of: BundleOf
) -> None:
    """The decoder's own 4 bits lose more than twice as much as its prefill graph."""
    pytest.importorskip("torch")
    quality = open_bundle(bundle_of(name, "fast", True)).manifest.quality
    prefill, decoder = (quality.stages[name].figures["kl"] for name in ("prefill", "decoder"))
    assert prefill < 0.03 and decoder > 2 * prefill


def test_logits_of_a_prompt_are_those_of_its_graph(
    fast: Path, alone: Path, bundle_of: BundleOf
) -> None:
    text, found = "What is it, who are they, where are they and why do they stay there?", []
    for bundle in (fast, alone, bundle_of("tiny", "int4")):
        with mobilevlm.load(bundle) as vlm:
            found.append(vlm.prompt_logits(text, raw=True))
    assert len(found[0]) >= PREFILL_FROM
    assert relative_error(found[0], found[1]) < 1e-6 < relative_error(found[2], found[1])

"""GGUF decoders of Gemma 3, Qwen2.5-VL and Qwen3-VL in stock llama.cpp, beside the ONNX tower
(engine ``hybrid``): images whose rows see each other, positions of three axes, DeepStack."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import llama
import numpy as np
import pytest
from clips import clip_of, video_text
from conftest import Fixture, fixture_named, refusal, relative_error
from PIL import Image

import mobilevlm
from mobilevlm.errors import BundleError, MobileVLMError
from mobilevlm.gguf.file import read_gguf
from mobilevlm.gguf.spec import decoder_spec
from mobilevlm.prompt import Rows
from mobilevlm.runtime import VLM
from mobilevlm.runtime.engines.llama.engine import LlamaDecoder
from mobilevlm.runtime.engines.llama.gguf_check import check_decoder
from mobilevlm.runtime.sequence.session import Fill

pytestmark = pytest.mark.filterwarnings("ignore:GGUF. ")
LIMITS = {"gemma3": 1e-3, "qwen3_vl": 1e-5, "qwen2_5_vl": 1e-2}
"""Relative error of the logits. Gemma's GELU is a table in float16; this llama.cpp takes 0 for the
epsilon of Qwen2.5-VL's norms, which is 2.7e-3 of these small weights' logits and 1e-6 without."""
ARCHITECTURES = {"gemma3": "gemma3", "qwen3_vl": "qwen3vl", "qwen2_5_vl": "qwen2vl"}
TWO = "<image>What is in it? And here?<image>Say which has a house."


@pytest.fixture(scope="module", params=LIMITS)
def fixture(request: pytest.FixtureRequest) -> Fixture:
    return fixture_named(request.param)


@pytest.fixture(scope="module")
def bundle(fixture: Fixture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama.onnx_and_gguf(fixture, tmp_path_factory.mktemp(fixture.name))


@pytest.fixture(scope="module")
def hybrid(bundle: Path) -> Iterator[VLM]:
    with mobilevlm.load(bundle, engine="hybrid") as vlm:
        yield vlm


@pytest.fixture(scope="module")
def onnx(bundle: Path) -> Iterator[VLM]:
    with mobilevlm.load(bundle, engine="onnx") as vlm:
        yield vlm


def two_images(fixture: Fixture) -> list[Image.Image]:
    first = Image.open(fixture.image).convert("RGB")
    return [first, first.transpose(Image.Transpose.ROTATE_90).resize((96, 160))]


def test_a_file_says_what_the_checkpoint_says(fixture: Fixture, bundle: Path) -> None:
    header = read_gguf(llama.decoder_path(bundle))
    assert header.architecture == ARCHITECTURES[fixture.name]
    expected = fixture.model.spec.decoder
    epsilon = float(np.float32(expected.norm_eps))
    found = decoder_spec(header)
    assert found == replace(
        expected, norm_eps=epsilon, image_blocks=False, attention_scale=found.attention_scale
    )
    assert found.score_scale == pytest.approx(expected.score_scale)
    check_decoder(header, expected)
    if expected.rope_sections:
        with pytest.raises(BundleError, match=r"rope_sections is \(\d, \d, \d\), expected \(1"):
            check_decoder(header, replace(expected, rope_sections=(1, 1, 14)))


def test_stock_llama_cpp_tokenizes_alike(fixture: Fixture, bundle: Path) -> None:
    texts = (
        "What is unusual\n\nabout this image?",
        fixture.templated_prompt.replace("<image>", ""),
    )
    with llama.opened(llama.decoder_path(bundle)) as decoder:
        for text in texts:
            data, found = text.encode(), (ctypes.c_int32 * 999)()
            count = llama.llama_cpp.llama_tokenize(
                decoder.vocab, data, len(data), found, 999, False, True
            )
            ids = fixture.model.tokenizer.encode(text, add_special_tokens=False).ids
            assert list(found[:count]) == ids


def test_stock_llama_cpp_gives_the_answer_to_a_text(
    fixture: Fixture, bundle: Path, onnx: VLM
) -> None:
    prompt = "What is unusual about this? Say why."
    answer = onnx.generate(prompt, raw=True, max_new_tokens=12, ignore_eos=True)
    with llama.opened(llama.decoder_path(bundle)) as decoder:
        for position, token in enumerate(onnx.prompt_ids(prompt, raw=True)):
            logits = decoder.step(token, position)
        tokens, _ = decoder.greedy(logits, position + 1, 12)
    assert tokens == answer.token_ids


def test_llama_cpp_gives_the_official_logits_and_answer(fixture: Fixture, hybrid: VLM) -> None:
    prompt, images = fixture.templated_prompt, [fixture.image]
    found = hybrid.prompt_logits(prompt, images, raw=True)
    assert relative_error(found, fixture.logits) <= LIMITS[fixture.name]
    assert (found.argmax(-1) == fixture.logits.argmax(-1)).all()
    answer = hybrid.generate(prompt, images, raw=True, max_new_tokens=24, ignore_eos=True)
    assert answer.token_ids == fixture.generated_ids


def test_two_images_of_different_sizes_give_the_logits_of_the_onnx_decoder(
    fixture: Fixture, hybrid: VLM, onnx: VLM
) -> None:
    images = two_images(fixture)
    found, expected = (vlm.prompt_logits(TWO, images) for vlm in (hybrid, onnx))
    assert relative_error(found, expected) <= LIMITS[fixture.name]
    turned = hybrid.prompt_logits(TWO, images[::-1])
    assert turned.shape != found.shape or relative_error(turned, expected) > 0.05


def test_a_sequence_goes_back_before_an_image_and_behind_it(fixture: Fixture, hybrid: VLM) -> None:
    images = two_images(fixture)
    session, fresh = hybrid.new_session(), hybrid.new_session(reuse_prefix=False)
    reused = []
    for text in (TWO, TWO.replace("house", "tree"), "<image>Who?", TWO):
        prompt = hybrid._prepare(text, images[: text.count("<image>")], raw=False)
        note = Fill()
        assert np.array_equal(session.fill(prompt, note), fresh.fill(prompt, Fill())), text
        reused.append(note.reused_tokens)
        session.step(5)
    assert reused[1] > reused[2] > 0 == reused[0]
    assert session.can_draft


def test_no_sequence_ends_inside_an_image_with_positions_of_several_axes(
    fixture: Fixture, bundle: Path
) -> None:
    spec = replace(fixture.model.spec.decoder, context_length=64)
    if not spec.rope_sections:
        spec = replace(spec, rope_sections=())
    decoder = LlamaDecoder(llama.decoder_path(bundle), spec, 1)
    state = decoder.new_state()
    ids = decoder.embed([5, 6, 7, 8, 9, 10, 11, 12, 13, 14])
    grid = np.array([[0, 1, 2, 2, 2, 2, 2, 4, 5, 6], [0, 1, 2, 2, 2, 3, 3, 4, 5, 6],
                     [0, 1, 2, 3, 4, 2, 3, 4, 5, 6]])  # fmt: skip
    decoder.extend(state, Rows(ids, positions=grid if spec.rope_sections else None))
    reached = [state.reachable(slots) for slots in range(11)]
    inside = [2, 2, 2, 2, 2] if spec.rope_sections else [2, 3, 4, 5, 6]
    assert reached == [0, 1, *inside, 7, 8, 9, 10]
    assert state.position == (7 if spec.rope_sections else 10)
    decoder.close()


def test_engine_ggml_runs_gemma_3_and_refuses_axes_in_one_line(
    fixture: Fixture, bundle: Path, onnx: VLM, capsys: pytest.CaptureFixture[str]
) -> None:
    if fixture.name != "gemma3":
        asked = ("--image", fixture.image, "--prompt", "What?", "--engine", "ggml")
        told = refusal(capsys, "run", bundle, *asked)
        assert "positions of several axes" in told and "--engine" in told
        return
    prompt, images = fixture.templated_prompt, [fixture.image]
    with mobilevlm.load(bundle, engine="ggml") as vlm:
        found = vlm.prompt_logits(prompt, images, raw=True)
        assert relative_error(found, fixture.logits) <= 1e-5
        answer = vlm.generate(prompt, images, raw=True, max_new_tokens=24, ignore_eos=True)
        assert answer.token_ids == fixture.generated_ids
        two = two_images(fixture)
        expected = onnx.prompt_logits(TWO, two)
        assert relative_error(vlm.prompt_logits(TWO, two), expected) <= 1e-5


@pytest.fixture(scope="module")
def video() -> Fixture:
    return replace(fixture_named("qwen2_5_vl"), suffix="_video")


@pytest.mark.parametrize("fixture", ["qwen2_5_vl"], indirect=True)
def test_a_clip_gives_the_official_answer(video: Fixture, hybrid: VLM) -> None:
    clip = clip_of(video)
    found = hybrid.prompt_logits(video_text(video), [clip], raw=True)
    assert relative_error(found, video.logits) <= LIMITS["qwen2_5_vl"]
    text = video_text(video)
    answer = hybrid.generate(text, [clip], raw=True, max_new_tokens=24, ignore_eos=True)
    assert answer.token_ids == video.generated_ids


@pytest.mark.parametrize("fixture", ["qwen2_5_vl"], indirect=True)
def test_a_clip_longer_than_the_text_behind_it_begins_is_one_line(
    video: Fixture, hybrid: VLM
) -> None:
    clip = clip_of(video)
    [run] = [piece for piece in clip.pieces if not isinstance(piece, int)]
    late = replace(run, times=(0, 60))
    longer = replace(clip, pieces=tuple(late if piece == run else piece for piece in clip.pieces))
    with pytest.raises(MobileVLMError, match="--engine onnx, or fewer frames"):
        hybrid.prompt_logits(video_text(video), [longer], raw=True)


@pytest.mark.parametrize("fixture", ["gemma3"], indirect=True)
def test_more_rows_that_see_each_other_than_a_run_takes_are_one_line(
    fixture: Fixture, bundle: Path
) -> None:
    spec = replace(fixture.model.spec.decoder, context_length=2048)
    decoder = LlamaDecoder(llama.decoder_path(bundle), spec, 1)
    rows = Rows(np.zeros((700, spec.hidden_size), np.float32), blocks=((1, 600),))
    with pytest.raises(MobileVLMError, match=r"599 rows of an image .* at most 512"):
        decoder.extend(decoder.new_state(), rows)
    decoder.close()


@pytest.mark.parametrize("fixture", ["qwen3_vl", "qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rope.dimension_sections", [2, 3, 3], "expected three numbers whose sum is"),
        ("rope.dimension_sections", [2, 3, 2, 1], "expected three numbers whose sum is"),
        ("rope.dimension_sections", [-2, 7, 11, 0], "expected three numbers whose sum is"),
        ("rope.dimension_sections", None, "expected three numbers whose sum is"),
        ("n_deepstack_layers", 9, "expected a number up to 4|a model of another kind"),
        ("n_deepstack_layers", -1, "expected a number up to 4|a model of another kind"),
    ],
)
def test_damaged_keys_are_one_line(key: str, value: object, message: str, bundle: Path) -> None:
    header = read_gguf(llama.decoder_path(bundle))
    name = f"{header.architecture}.{key}"
    changed = replace(
        header,
        metadata={**header.metadata, name: value},
        kinds={"qwen2vl.n_deepstack_layers": "u32", **header.kinds},
    )
    with pytest.raises(BundleError, match=message):
        decoder_spec(changed)

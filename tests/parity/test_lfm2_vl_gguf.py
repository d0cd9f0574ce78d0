"""GGUF decoders of LFM2: for stock llama.cpp, and beside the ONNX tower (engine ``hybrid``)."""

from __future__ import annotations

import ctypes
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Fixture, fixture_named, refusal, relative_error
from llama import decoder_path, onnx_and_gguf
from PIL import Image

import mobilevlm
from mobilevlm.bundle import open_bundle
from mobilevlm.errors import BundleError, SessionError
from mobilevlm.gguf.checks import check_key_values
from mobilevlm.gguf.file import GgufFile, read_gguf
from mobilevlm.gguf.names import decoder_entries
from mobilevlm.gguf.spec import decoder_spec
from mobilevlm.plan import Plan
from mobilevlm.runtime import VLM
from mobilevlm.runtime.engines.llama.gguf_check import check_decoder
from mobilevlm.runtime.engines.llama.native import NativeModel, llama_library
from mobilevlm.runtime.sequence.session import Fill
from mobilevlm.runtime.tuning.probe import EngineProbe
from mobilevlm.runtime.tuning.tune import tune_bundle

pytestmark = pytest.mark.filterwarnings("ignore:GGUF. ")


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return fixture_named("lfm2_vl")


@pytest.fixture(scope="module")
def bundle(fixture: Fixture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return onnx_and_gguf(fixture, tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="module")
def hybrid(bundle: Path) -> Iterator[VLM]:
    with mobilevlm.load(bundle, engine="hybrid") as vlm:
        yield vlm


def test_a_file_says_what_the_checkpoint_says(fixture: Fixture, bundle: Path) -> None:
    header = read_gguf(decoder_path(bundle))
    assert header.architecture == "lfm2"
    expected = fixture.model.spec.decoder
    epsilon = float(np.float32(expected.norm_eps))
    assert decoder_spec(header) == replace(expected, norm_eps=epsilon)
    check_decoder(header, expected)
    for change in ({"conv_layers": (0, 1, 3)}, {"conv_kernel": 4}):
        with pytest.raises(BundleError, match=r"expected \(0, 1, 3\)|expected 4"):
            check_decoder(header, replace(expected, **change))


def test_a_small_file_may_use_the_whole_context_and_no_damaged_one(
    fixture: Fixture, tmp_path: Path
) -> None:
    decoder = replace(  # LFM2-VL-450M
        fixture.model.spec.decoder,
        vocab_size=65536, hidden_size=1024, intermediate_size=4608, num_hidden_layers=16,
        num_attention_heads=16, num_key_value_heads=8, head_dim=64, context_length=128_000,
        conv_layers=(0, 1, 3, 4, 6, 7, 9, 11, 13, 15),
    )  # fmt: skip
    weights = sum(math.prod(entry.shape) for entry in decoder_entries(decoder))
    path = tmp_path / "450M-Q4_0.gguf"
    with path.open("wb") as file:
        file.truncate(weights * 18 // 32)
    header = GgufFile(path, 3, {}, {}, {}, (path,), 0)
    check_key_values(header, decoder)
    for bit in (18, 19, 30):
        with pytest.raises(BundleError, match="more than a model of"):
            check_key_values(header, replace(decoder, context_length=128_000 | 1 << bit))


def test_stock_llama_cpp_runs_it_and_tokenizes_alike(fixture: Fixture, bundle: Path) -> None:
    library, model = llama_library(), NativeModel(decoder_path(bundle))
    vocabulary = library.llama_model_get_vocab(model.pointer)
    for text in ("What is unusual about this image?", "<|im_start|>user\n12345 äß<|im_end|>"):
        data, found = text.encode(), (ctypes.c_int32 * 99)()
        count = library.llama_tokenize(vocabulary, data, len(data), found, 99, True, True)
        assert list(found[:count]) == fixture.model.tokenizer.encode(text).ids


def test_llama_cpp_gives_the_official_logits_and_answer(fixture: Fixture, hybrid: VLM) -> None:
    found = hybrid.prompt_logits(fixture.templated_prompt, [fixture.image], raw=True)
    assert relative_error(found, fixture.logits) <= 1e-2
    assert (found.argmax(-1) == fixture.logits.argmax(-1)).all()
    prompt, images = fixture.templated_prompt, [fixture.image]
    answer = hybrid.generate(prompt, images, raw=True, max_new_tokens=24, ignore_eos=True)
    assert answer.token_ids == fixture.generated_ids


def test_llama_cpp_goes_back_only_to_the_beginning_and_computes_the_rest_again(
    fixture: Fixture, hybrid: VLM
) -> None:
    picture = Image.open(fixture.image).resize((60, 40))
    session, fresh = hybrid.new_session(), hybrid.new_session(reuse_prefix=False)
    for text in ("<image> What is it?", "<image> What is this?", "Who?", "<image> What is it?"):
        prompt = hybrid._prepare(text, [picture] * text.count("<image>"), raw=False)
        assert np.array_equal(session.fill(prompt, Fill()), fresh.fill(prompt, Fill())), text
        session.step(5)
        assert not session.can_draft
        with pytest.raises(SessionError, match="go back to 0"):
            session.rewind(session.length - 1)
    # A conversation that goes on stays where it is.
    prompt = hybrid._prepare("Who?", [], raw=False)
    longer = replace(prompt, pieces=[*prompt.pieces, 40, 41])
    session.fill(prompt, Fill())
    note = Fill()
    session.fill(longer, note)
    assert note.reused_tokens == len(prompt.pieces)


def test_four_bit_files_answer(fixture: Fixture, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    formats = ["onnx", "gguf"]
    mobilevlm.export(fixture.checkpoint, bundle, recipe="int4", formats=formats, measure=False)
    with mobilevlm.load(bundle, engine="hybrid") as vlm:
        answer = vlm.generate("What is this?", [fixture.image], max_new_tokens=4, ignore_eos=True)
    assert len(answer.token_ids) == 4


def test_engine_ggml_refuses_in_one_line(
    bundle: Path, fixture: Fixture, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--image", fixture.image, "--prompt", "What?", "--engine", "ggml")
    told = refusal(capsys, "run", bundle, *asked)
    assert "short convolutions" in told and "--engine" in told


def test_tuning_measures_the_engines_that_run_it(bundle: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    tuned, _ = tune_bundle(copied, budget_seconds=1.0)
    assert {plan.engine for plan in tuned.plans} <= {"onnx", "hybrid", "gguf"}
    probe = EngineProbe(open_bundle(copied))
    assert probe.drafts(Plan("hybrid"), (0, 2)) == {}
    probe.close()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention.head_count_kv", [[0], 2], "expected 0 for layers with"),
        ("attention.head_count_kv", [0, 0, 2, 4, 0, 2], "one number for the others"),
        ("attention.head_count_kv", "2", "expected 0 for layers with"),
        ("attention.head_count_kv", [0, 2], "for each of 6 layers"),
        ("attention.head_count_kv", 2, "for each of 6 layers"),
        ("shortconv.l_cache", 1, "expected 2 or more"),
    ],
)
def test_damaged_keys_are_one_line(key: str, value: object, message: str, bundle: Path) -> None:
    header = read_gguf(decoder_path(bundle))
    changed = replace(header, metadata={**header.metadata, f"lfm2.{key}": value})
    with pytest.raises(BundleError, match=message):
        decoder_spec(changed)

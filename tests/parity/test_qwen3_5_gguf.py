"""GGUF files of Qwen3.5: for stock llama.cpp, and beside the ONNX tower (engine ``hybrid``)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import llama
import numpy as np
import pytest
from conftest import Fixture, fixture_named, refusal, relative_error

import mobilevlm
from mobilevlm.errors import BundleError, MobileVLMError
from mobilevlm.export.gguf.decoder import by_member
from mobilevlm.export.gguf.source import GgufTensors
from mobilevlm.gguf.architectures import gguf_architecture
from mobilevlm.gguf.file import read_gguf
from mobilevlm.gguf.names import Groups, decoder_entries
from mobilevlm.gguf.spec import decoder_spec
from mobilevlm.runtime.engines.llama.gguf_check import check_decoder
from mobilevlm.runtime.sequence.session import Fill

pytestmark = pytest.mark.filterwarnings("ignore:GGUF. ")
LIMITS = {"hybrid": 1e-4, "gguf": 1e-2}
"""Relative error of logits; llama.cpp's tower has tables of GELU in float16."""


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return fixture_named("qwen3_5")


@pytest.fixture(scope="module")
def bundle(fixture: Fixture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama.onnx_and_gguf(fixture, tmp_path_factory.mktemp("gguf"))


def test_a_file_says_what_the_checkpoint_says(fixture: Fixture, bundle: Path) -> None:
    header = read_gguf(llama.decoder_path(bundle))
    expected = fixture.model.spec.decoder
    epsilon = float(np.float32(expected.norm_eps))
    assert decoder_spec(header) == replace(expected, norm_eps=epsilon)
    check_decoder(header, expected)
    assert expected.delta is not None
    with pytest.raises(BundleError, match="delta is DeltaSpec"):
        check_decoder(header, replace(expected, delta=replace(expected.delta, kernel=3)))


def test_a_file_is_read_back_as_the_checkpoint(fixture: Fixture, bundle: Path) -> None:
    """Heads in the order of groups, and logarithms of decays."""
    entries = list(decoder_entries(fixture.model.spec.decoder))
    stored = GgufTensors(read_gguf(llama.decoder_path(bundle)), entries)
    for entry in entries:
        expected = fixture.model.weights.read(entry.ours, entry.shape)
        assert np.allclose(stored.read(entry.ours), expected, rtol=1e-6, atol=1e-7), entry.ours


def test_heads_in_groups_are_put_in_the_order_of_members() -> None:
    rows = np.arange(2 + 2 * 3 * 2)
    turned = by_member(rows, Groups(0, 2, 2, 3))
    assert turned.tolist() == [0, 1, 2, 3, 8, 9, 4, 5, 10, 11, 6, 7, 12, 13]
    assert np.array_equal(by_member(turned, Groups(0, 2, 2, 3), back=True), rows)
    columns = by_member(np.stack([rows, -rows]), Groups(1, 2, 2, 3))
    assert np.array_equal(columns, np.stack([turned, -turned]))


@pytest.mark.parametrize("engine", LIMITS)
def test_llama_cpp_gives_the_official_logits_and_answer(
    engine: str, fixture: Fixture, bundle: Path
) -> None:
    prompt, images = fixture.templated_prompt, [fixture.image]
    with mobilevlm.load(bundle, engine=engine) as vlm:
        found = vlm.prompt_logits(prompt, images, raw=True)
        assert relative_error(found, fixture.logits) <= LIMITS[engine]
        assert (found.argmax(-1) == fixture.logits.argmax(-1)).all()
        answer = vlm.generate(prompt, images, raw=True, max_new_tokens=24, ignore_eos=True)
        assert answer.token_ids == fixture.generated_ids
        session, fresh = vlm.new_session(), vlm.new_session(reuse_prefix=False)
        for text in ("What is it?", "What is this?", "Who?"):
            asked = vlm._prepare(text, [], raw=False)
            assert np.array_equal(session.fill(asked, Fill()), fresh.fill(asked, Fill())), text
            session.step(5)
            assert not session.can_draft


def test_layers_that_llama_cpp_would_place_elsewhere_are_refused(fixture: Fixture) -> None:
    spec = fixture.model.spec.decoder
    assert gguf_architecture(spec) == "qwen35" and spec.delta is not None
    for change in ({"layers": (0, 1, 4)}, {"value_dim": 8}):
        with pytest.raises(MobileVLMError, match="knows no architecture for this decoder"):
            gguf_architecture(replace(spec, delta=replace(spec.delta, **change)))


def test_engine_ggml_refuses_in_one_line(
    bundle: Path, fixture: Fixture, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--image", fixture.image, "--prompt", "What?", "--engine", "ggml")
    assert "positions of several axes" in refusal(capsys, "run", bundle, *asked)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("ssm.inner_size", 60, "60 together"),
        ("ssm.group_count", 3, "4 heads in 3 groups"),
        ("ssm.conv_kernel", 1, "a kernel of 1"),
        ("ssm.state_size", "16", "ssm.state_size"),
        ("full_attention_interval", 9, "attention every 9 of 5 layers"),
        ("full_attention_interval", 1, "attention every 1 of 5 layers"),
        ("rope.dimension_count", 15, "expected an even number up to 64"),
        ("rope.dimension_sections", [3, 3, 3, 0], "sum is 8, half of the rotated channels"),
    ],
)
def test_damaged_keys_are_one_line(key: str, value: object, message: str, bundle: Path) -> None:
    header = read_gguf(llama.decoder_path(bundle))
    changed = replace(header, metadata={**header.metadata, f"qwen35.{key}": value})
    with pytest.raises(BundleError, match=message):
        decoder_spec(changed)

"""tokenizer.json of strangers: what a file asks for beyond a tokenizer is reset or refused."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from conftest import BundleOf, Fixture, fixture_named, refusal

import mobilevlm
from mobilevlm.bundle import TOKENIZER, read_manifest, write_manifest
from mobilevlm.conversation import tokenize
from mobilevlm.errors import CheckpointError, MobileVLMError, PromptError
from mobilevlm.runtime.answer.text import Detokenizer
from mobilevlm.tokenizers.byte_level import _PATTERN
from mobilevlm.tokenizers.json_file import _is_simple, foreign
from mobilevlm.tokenizers.tokenizer import read_tokenizer


def changed(folder: Path, **parts: Any) -> Path:
    """A folder with the tokenizer.json of a fixture, some of its parts replaced."""
    state = json.loads(read_tokenizer(fixture_named("mobilevlm_v2").checkpoint).to_str())
    (folder / "tokenizer.json").write_text(json.dumps({**state, **parts}))
    return folder


def refused(folder: Path) -> str:
    start = time.perf_counter()
    with pytest.raises(MobileVLMError) as caught:
        tokenize(read_tokenizer(folder), "aaaa bbbb " * 20)
    assert time.perf_counter() - start < 5
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


LONGEST = 4
TRUNCATION = {"direction": "Right", "max_length": LONGEST, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 2**40},
    "direction": "Left",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "<pad>",
}


def test_truncation_and_padding_of_the_file_do_not_change_ids(tmp_path: Path) -> None:
    whole = read_tokenizer(changed(tmp_path))
    asked = read_tokenizer(changed(tmp_path, truncation=TRUNCATION, padding=PADDING))
    for text in ("What is in the image?", "a", ""):
        assert tokenize(asked, text) == tokenize(whole, text)


def test_a_checkpoint_with_truncation_and_padding_has_the_official_ids(tmp_path: Path) -> None:
    """BLIP-2's tokenizer.json is read as it is; the official processor sets both anew."""
    fixture: Fixture = fixture_named("blip2")
    shutil.copytree(fixture.checkpoint, tmp_path / "c")
    path = tmp_path / "c" / "tokenizer.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "truncation": TRUNCATION, "padding": {
        **PADDING, "strategy": {"Fixed": 64}}}))  # fmt: skip
    text = fixture.prompt
    found = tokenize(read_tokenizer(tmp_path / "c", ready=True), text)
    assert found == tokenize(read_tokenizer(fixture.checkpoint, ready=True), text)
    assert len(found) > LONGEST


GROWING: list[Any] = [
    [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 30,
    [{"type": "Replace", "pattern": {"String": ""}, "content": "a" * 1000}],
    [{"type": "Replace", "pattern": {"Regex": "."}, "content": "a" * 1000}],
    [{"type": "Prepend", "prepend": "a" * 10_000}],
    [{"type": "ByteLevel"}] * 20,
    [{"type": "Sequence", "normalizers": [{"type": "NFC"}] * 20}] * 2,
]


@pytest.mark.parametrize("steps", GROWING, ids=lambda steps: str(steps)[:60])
def test_a_normalizer_that_makes_texts_explode_is_refused(steps: Any, tmp_path: Path) -> None:
    normalizer = {"type": "Sequence", "normalizers": steps}
    message = refused(changed(tmp_path, normalizer=normalizer))
    assert "tokenizer.json" in message and "normalizer" in message


def test_a_normalizer_that_explodes_while_added_tokens_are_read_is_refused(tmp_path: Path) -> None:
    """The library normalizes added tokens as it opens a file."""
    token = {"id": 1, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": True, "special": True}  # fmt: skip
    step = {"type": "Replace", "pattern": {"String": ""}, "content": "a" * 50}
    normalizer = {"type": "Sequence", "normalizers": [step] * 6}
    refused(changed(tmp_path, added_tokens=[token], normalizer=normalizer))
    content = (tmp_path / "tokenizer.json").read_text()
    hidden = content.replace('"normalizer"', '"\\u006eormalizer"')
    (tmp_path / "tokenizer.json").write_text(hidden)
    assert "normalizer" in refused(tmp_path)


@pytest.mark.parametrize(
    ("part", "state"),
    [
        ("pre_tokenizer", {"type": "FixedLength", "length": 0}),
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated",
                           "invert": False}),
        ("post_processor", {"type": "TemplateProcessing", "single": [{"Sequence": {
            "id": "B", "type_id": 0}}], "pair": [], "special_tokens": {}}),
        ("post_processor", {"type": "TemplateProcessing", "single": [{"Sequence": {
            "id": "A", "type_id": 0}}] * 50, "pair": [], "special_tokens": {}}),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "/////w=="}),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": None}),
        ("normalizer", {"type": "Unknown"}),
        ("normalizer", {"type": "Replace", "pattern": 3, "content": "a"}),
    ],
)  # fmt: skip
def test_what_makes_the_library_panic_is_one_line(part: str, state: Any, tmp_path: Path) -> None:
    assert "tokenizer.json" in refused(changed(tmp_path, **{part: state}))


BPE: dict[str, Any] = {"type": "BPE", "vocab": {"a": 0, "b": 1, "é": 2, "ab": 3, "aé": 4},
                       "merges": [["a", "b"], ["a", "é"]]}  # fmt: skip
WORD_PIECE = {"type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##",
              "max_input_chars_per_word": 100, "vocab": {"a": 0, "##b": 1}}  # fmt: skip
UNIGRAM = {"type": "Unigram", "unk_id": 0, "byte_fallback": False}


@pytest.mark.parametrize("prefix", ["#", "\0", "##", "é"])
def test_merges_that_continue_a_word_by_a_prefix_are_refused(prefix: str, tmp_path: Path) -> None:
    """The library cuts the prefix's bytes off the merge's second half and aborts the process."""
    parts: dict[str, Any] = {"added_tokens": [], "post_processor": None}
    model = {**BPE, "continuing_subword_prefix": prefix}
    assert "continuing_subword_prefix" in refused(changed(tmp_path, model=model, **parts))
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace('"continuing_sub', '"\\u0063ontinuing_sub'))
    assert "continuing_subword_prefix" in refused(tmp_path)
    twice = json.dumps({**BPE, "continuing_subword_prefix": prefix})
    state = json.dumps({**json.loads(path.read_text()), "model": BPE})
    path.write_text(f'{{"model": {twice}, {state[1:]}')
    assert "continuing_subword_prefix" in refused(tmp_path)


@pytest.mark.parametrize("prefix", ["", None])
def test_merges_without_a_prefix_are_read(prefix: str | None, tmp_path: Path) -> None:
    model = {**BPE, "continuing_subword_prefix": prefix}
    parts: dict[str, Any] = {"added_tokens": [], "post_processor": None, "normalizer": None}
    assert tokenize(read_tokenizer(changed(tmp_path, model=model, **parts)), "abaé") == [3, 4]


def test_word_pieces_with_a_prefix_are_read(tmp_path: Path) -> None:
    vocabulary = {"a": 0, "##b": 1, "merges": 2, "continuing_subword_prefix": 3}
    model = {**WORD_PIECE, "vocab": vocabulary}
    parts: dict[str, Any] = {"added_tokens": [], "post_processor": None, "normalizer": None}
    assert tokenize(read_tokenizer(changed(tmp_path, model=model, **parts)), "ab") == [0, 1]


@pytest.mark.parametrize(
    "step",
    [
        {"type": "CTC", "pad_token": "a", "word_delimiter_token": "", "cleanup": True},
        {"type": "BPEDecoder", "suffix": ""},
        {"type": "Replace", "pattern": {"String": ""}, "content": "aaa"},
    ],
    ids=lambda step: str(step["type"]),
)
def test_a_decoder_that_makes_answers_explode_is_refused(step: Any, tmp_path: Path) -> None:
    """A space goes between all characters, once a step."""
    decoder = {"type": "Sequence", "decoders": [step] * 20}
    assert "decoder makes texts more than" in refused(changed(tmp_path, decoder=decoder))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({**WORD_PIECE, "max_input_chars_per_word": 2**40}, "words of more than 400 characters"),
        ({**WORD_PIECE, "continuing_subword_prefix": "#" * 10**6}, "continuing_subword_prefix"),
        ({**BPE, "end_of_word_suffix": "#" * 10**6}, "end_of_word_suffix"),
        ({**UNIGRAM, "vocab": [["a" * length, -1.0] for length in range(1, 500)]},
         "piece of 499 characters"),
    ],
    ids=["long words", "long prefix", "long suffix", "long pieces"],
)  # fmt: skip
def test_a_model_that_splits_long_words_for_minutes_is_refused(
    model: Any, said: str, tmp_path: Path
) -> None:
    folder = changed(tmp_path, model=model, added_tokens=[], post_processor=None)
    assert said in refused(folder)


@pytest.mark.parametrize(
    "model",
    [
        {**WORD_PIECE, "max_input_chars_per_word": 400},
        {**UNIGRAM, "vocab": [["a" * length, -1.0] for length in range(1, 401)]},
    ],
    ids=["words", "pieces"],
)
def test_the_longest_words_that_are_split_take_seconds(model: Any, tmp_path: Path) -> None:
    parts: dict[str, Any] = {"added_tokens": [], "post_processor": None, "normalizer": None}
    pre_tokenizer = {"type": "WhitespaceSplit"}
    folder = changed(tmp_path, model=model, pre_tokenizer=pre_tokenizer, **parts)
    start = time.process_time()
    tokenize(read_tokenizer(folder), ("a" * 400 + " ") * 50)
    assert time.process_time() - start < 5


def test_an_empty_token_of_an_answer_is_no_text(tmp_path: Path) -> None:
    model = {**BPE, "vocab": {**BPE["vocab"], "": 5}}
    parts: dict[str, Any] = {
        "added_tokens": [],
        "post_processor": None,
        "normalizer": None,
        "decoder": None,
    }
    answer = Detokenizer(read_tokenizer(changed(tmp_path, model=model, **parts)))
    assert [answer.add(token) for token in (0, 5, 1)] == ["a", "", "b"]


def test_a_panic_is_one_line_and_an_interrupt_stays_one() -> None:
    class PanicException(BaseException):
        """As pyo3's, which is no Exception."""

    with (
        pytest.raises(PromptError, match=r"^here: out of bounds two lines$"),
        foreign("here"),
    ):
        raise PanicException("out of bounds\ntwo lines")
    with pytest.raises(KeyboardInterrupt), foreign("here"):
        raise KeyboardInterrupt


def test_an_error_of_the_library_on_a_prompt_is_one_line(tmp_path: Path) -> None:
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
             "max_input_chars_per_word": 100, "vocab": {"a": 0}}  # fmt: skip
    folder = changed(tmp_path, model=model, added_tokens=[], post_processor=None)
    assert "tokenizer failed on the prompt" in refused(folder)


def test_a_file_that_is_no_tokenizer_is_one_line(tmp_path: Path) -> None:
    for content in (
        b"",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b'{"normalizer": {',
        b"1" * 100,
        b"[" * 100_000,
    ):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
            read_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["\0", "\u200e\0"])
def test_an_added_token_that_is_empty_once_normalized_is_refused(
    content: str, tmp_path: Path
) -> None:
    """The library would find it in the same place without end."""
    token = {"id": 1, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": True, "special": True}  # fmt: skip
    clean = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
             "strip_accents": None, "lowercase": True}  # fmt: skip
    message = refused(changed(tmp_path, added_tokens=[token], normalizer=clean))
    assert "added token" in message and "is empty" in message


def test_a_huge_file_is_refused_by_its_size(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 40)
    assert "bytes" in refused(tmp_path)


PUBLISHED = [
    _PATTERN,
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}]*[\p{Ll}\p{M}]+(?i:'s|'t|'re)?|\p{N}{1,3}|\s*[\r\n]+|\s+",
    r" ?[^(\s|[.,!?…。，、।۔،])]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}]+[\p{Ll}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}&&[^\p{Han}]]*[\p{Ll}&&[^\p{Han}]]+(?i:'s|'t|'re)?",
    " {2,}",
    r"\s+$",
]


@pytest.mark.parametrize("pattern", PUBLISHED)
def test_regular_expressions_of_published_tokenizers_are_taken(pattern: str) -> None:
    assert _is_simple(pattern)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(a|aa)+$", r"(\s*)*x", "(a*)*b", "(?:(?:a?)*)*c", ".*.*.*x", "((a)+)+", "a{99999}",
     "(a{999}){999}", "a*a*x", "[^x]+[^y]+(?=z)", "a*(?:b|a+)x", "a*a*$", "|".join(["a*x"] * 100),
     "a?" * 20 + "x", "a{0,15}" * 4 + "x", "a{0,999}" * 2 + "x", "(?:a|a)" * 20 + "x",
     r"(?<n>a)\k<n>+", "a++++", "[" * 5000],
)  # fmt: skip
def test_regular_expressions_that_can_take_forever_are_refused(pattern: str) -> None:
    assert not _is_simple(pattern)


def test_a_bundle_with_such_a_tokenizer_is_refused_in_one_line(
    bundle_of: BundleOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(bundle_of("tiny", "fp32"), bundle)
    path = bundle / TOKENIZER
    state = json.loads(path.read_text())
    state["normalizer"] = {"type": "Sequence", "normalizers": GROWING[0]}
    path.write_text(json.dumps(state))
    manifest, _ = read_manifest(bundle)
    entry = replace(
        manifest.files[TOKENIZER],
        size=path.stat().st_size,
        sha256=sha256(path.read_bytes()).hexdigest(),
    )
    write_manifest(bundle, replace(manifest, files={**manifest.files, TOKENIZER: entry}))
    message = refusal(capsys, "run", bundle, "--prompt", "Hi")
    assert "tokenizer.json" in message and "normalizer" in message
    with pytest.raises(MobileVLMError, match="normalizer"):
        mobilevlm.load(bundle)

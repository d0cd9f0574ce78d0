"""Byte-level tokenizers: ids against those of the reference tokenizers (tests/data/tokenizers says
how they were made), text against the bytes, and damaged files."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA, MOE_FIXTURES, Fixture, fixture_named

from mobilevlm.errors import CheckpointError
from mobilevlm.runtime.answer.text import Detokenizer
from mobilevlm.tokenizers.tokenizer import read_tokenizer

pytestmark = pytest.mark.pure

STRINGS = 2000
SNIPPETS = [
    *["the", "The picture", " in", "'s", "'LL", "'\u017f", "\u2019s", "don't", "I'VE", "ing"],
    *["123", "\u0663\u0664", "\u00bd", "abababab", "aaaaaaaaaaa", "def f(a):\n    return a"],
    *[" ", "  ", "     ", "\n", "\r\n", "\t", "\t\t\t", "\n\n \n", "\u0085", "\u2028", "\u3000"],
    *["<|endoftext|>", "<|im_start|>", "<|extra_17|>", "<|extra_1|>", "<filename>", "<|reg3|>"],
    *["<|", "|>", "<image>", "x=1;", "//", "-----", "...", "?!", "_", "\x00", "\x1c", "\x7f"],
    *["\u00e9", "e\u0301", "\u0338", "\uac00", "\u1100\u1161", "\u4f60\u597d", "\ufb01", "\u212b"],
    *["\U0001f642", "\U0001f44d\U0001f3fd", "\u200b", "\u200d", "\u0130", "\u00df", "\U0010ffff"],
    *["\u0928\u092e\u0938\u094d\u0924\u0947", "\u066a", "\u0300a", "A\u030a", "\u01c5", "\xa0"],
]


def seeded_strings() -> Iterator[str]:
    """Corner cases, then random mixtures of snippets, of rare characters, and of ASCII."""
    yield from ["", " ", "  ", "\n", " a", "a ", "<|endoftext|>\u0338", "\x1c a"]
    generator = random.Random(1)
    for index in range(STRINGS):
        if index % 3 == 0:
            pieces = generator.choices(SNIPPETS, k=generator.randrange(1, 12))
            yield generator.choice(["", " "]).join(pieces)
            continue
        ranges = [(32, 127)] if index % 3 == 1 else [(128, 0xD800), (0xE000, 0x30000), (32, 127)]
        letters = [generator.randrange(*generator.choice(ranges)) for _ in range(index % 20 + 1)]
        yield "".join(map(chr, letters))


@pytest.fixture(scope="module", params=MOE_FIXTURES)
def fixture(request: pytest.FixtureRequest) -> Fixture:
    return fixture_named(request.param)


def test_ids_equal_the_reference_tokenizer_on_thousands_of_strings(fixture: Fixture) -> None:
    with np.load(DATA / "tokenizers" / f"{fixture.name}.npz") as arrays:
        expected = np.split(arrays["ids"], np.cumsum(arrays["lengths"])[:-1])
    texts = list(seeded_strings())
    assert len(texts) == len(expected) >= STRINGS
    found = read_tokenizer(fixture.checkpoint).encode_batch(texts)
    for text, mine, ids in zip(texts, found, expected, strict=True):
        assert mine.ids == ids.tolist(), ascii(text)


def test_tokens_one_by_one_give_the_text_of_all(fixture: Fixture) -> None:
    tokenizer = fixture.model.tokenizer
    generator, added = random.Random(2), tokenizer.get_added_tokens_decoder()
    # Special tokens are left out: they end an unfinished character.
    known = sorted(set(tokenizer.get_vocab().values()))
    known = [token for token in known if token not in added or not added[token].special]
    for _ in range(2000):
        ids = generator.choices(known, k=generator.randrange(1, 12))
        detokenizer = Detokenizer(tokenizer)
        text = "".join(detokenizer.add(token) for token in ids) + detokenizer.finish()
        assert text == tokenizer.decode(ids), ids


def test_ids_beyond_the_ranks_are_where_the_official_tokenizers_have_them() -> None:
    for name, ranks, end in (("stablelm", 756, 757), ("qwen", 736, 736), ("phi2", 776, 776)):
        tokenizer = fixture_named(f"moe_llava_{name}").model.tokenizer
        assert tokenizer.token_to_id("<|endoftext|>") == end, name
        assert tokenizer.id_to_token(ranks - 1) is not None


def copy_of(name: str, target: Path) -> Path:
    shutil.copytree(fixture_named(name).checkpoint, target)
    return target


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the ranks are not 0, 1, 2"),
        (b"IQ== 0 1\n", "not a tiktoken vocabulary"),
        (b"I!!! 0\n", "not a tiktoken vocabulary"),
        (b"IQ== x\n", "not a tiktoken vocabulary"),
        (b"IQ== 0\nIg== 2\n", "the ranks are not 0, 1, 2"),
        (b"IQ== 0\nIg== 1\n", "byte 0 has no rank"),
    ],
)
def test_a_damaged_tiktoken_file_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    folder = copy_of("moe_llava_qwen", tmp_path / "checkpoint")
    (folder / "qwen.tiktoken").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_tokenizer(folder)
    assert "qwen.tiktoken" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("vocab.json", "{}", "expected tokens with their ids"),
        ("vocab.json", '{"a": "b"}', "expected tokens with their ids"),
        ("merges.txt", "a b c\n", "damaged tokenizer"),
        ("merges.txt", "neither-is-there x\n", "damaged tokenizer"),
        (
            "tokenizer_config.json",
            json.dumps({"added_tokens_decoder": {"900": {"content": "<new>"}}}),
            "'<new>' has id 900, expected 777",
        ),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "added_tokens_decoder"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "added_tokens_decoder"),
    ],
)
def test_a_damaged_vocabulary_is_named(
    file: str, content: str, message: str, tmp_path: Path
) -> None:
    folder = copy_of("moe_llava_phi2", tmp_path / "checkpoint")
    (folder / file).write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_tokenizer(folder)
    assert file in str(caught.value) and "\n" not in str(caught.value)

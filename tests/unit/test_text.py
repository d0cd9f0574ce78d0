"""Tokens to text piece by piece, and stop strings that fall between pieces."""

from __future__ import annotations

import itertools
import random
import unicodedata

import pytest
from conftest import Fixture, fixture_named, token_id
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, normalizers

from mobilevlm.runtime.answer.text import Detokenizer, StopStrings

TEXTS = [
    "Hello world",
    "  two spaces in front and  between ",
    "line\nbreak\ttab",
    "caf\u00e9 \u4f60\u597d",
    "a \U0001f642\U0001f44d\U0001f3fd b",
    "\U0001f642",
    "e\u0301 zero\u200dwidth",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return fixture_named("mobilevlm_v2").model.tokenizer


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.add(token) for token in ids), detokenizer.finish()]


def byte_ids(tokenizer: Tokenizer, content: bytes) -> list[int]:
    return [token_id(tokenizer, f"<0x{byte:02X}>") for byte in content]


def test_pieces_together_are_the_text(any_fixture: Fixture) -> None:
    tokenizer = any_fixture.model.tokenizer
    # tiktoken's vocabularies compose characters first.
    composed = isinstance(tokenizer.normalizer, normalizers.NFC)
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        whole = "".join(pieces_of(tokenizer, ids))
        assert whole == tokenizer.decode(ids), ascii(text)
        if any_fixture.name == "instructblip":  # its tokenizer.json takes a first space for its own
            text = text.removeprefix(" ")
        expected = unicodedata.normalize("NFC", text) if composed else text
        assert whole == expected, ascii(text)


def test_any_ids_give_the_text_that_sentencepiece_gives(fixture: Fixture) -> None:
    model = SentencePieceProcessor(str(fixture.checkpoint / "tokenizer.model"))
    tokenizer = fixture.model.tokenizer
    source, first_byte = random.Random(0), model.PieceToId("<0x00>")
    for _ in range(2000):
        ids = [
            # A third are bytes, mostly of unfinished and broken characters; <unk> is id 0, which
            # sentencepiece shows and an answer leaves out.
            first_byte + source.randrange(128, 256)
            if source.random() < 0.3
            else source.randrange(1, model.vocab_size())
            for _ in range(source.randrange(1, 10))
        ]
        assert "".join(pieces_of(tokenizer, ids)) == model.Decode(ids), ids


def test_an_emoji_in_byte_tokens_appears_when_its_last_byte_comes(tokenizer: Tokenizer) -> None:
    content = "\U0001f642".encode()
    pieces = pieces_of(tokenizer, byte_ids(tokenizer, content + b"\xc3\xa9"))
    assert pieces == ["", "", "", "\U0001f642", "", "\u00e9", ""]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xff", "\ufffd"),
        (b"\x80A", "\ufffdA"),
        (b"\xf0\x9f\x99", "\ufffd" * 3),
        (b"\xe2\x82A", "\ufffd\ufffdA"),
        (b"\xc0\xaf", "\ufffd\ufffd"),
        (b"\xed\xa0\x80", "\ufffd" * 3),
    ],
    ids=repr,
)
def test_bytes_of_no_character_come_out_as_replacement_characters(
    content: bytes, expected: str, tokenizer: Tokenizer
) -> None:
    assert "".join(pieces_of(tokenizer, byte_ids(tokenizer, content))) == expected


def test_an_unfinished_character_does_not_swallow_the_word_after_it(tokenizer: Tokenizer) -> None:
    word = tokenizer.encode("the", add_special_tokens=False).ids
    start = byte_ids(tokenizer, b"\xf0\x9f")
    assert "".join(pieces_of(tokenizer, [*start, *word])) == "\ufffd\ufffd the"


def test_only_the_first_word_loses_its_leading_space(tokenizer: Tokenizer) -> None:
    word = token_id(tokenizer, "\u2581not")
    assert pieces_of(tokenizer, [word, word]) == ["not", " not", ""]


def test_special_tokens_and_ids_beyond_the_vocabulary_give_no_text(tokenizer: Tokenizer) -> None:
    word = token_id(tokenizer, "\u2581not")
    beyond = tokenizer.get_vocab_size() + 5
    assert pieces_of(tokenizer, [1, beyond, word, 2, 0, word]) == [
        "",
        "",
        "not",
        "",
        "",
        " not",
        "",
    ]


# Stop strings


def cut(text: str, *places: int) -> list[str]:
    edges = [0, *places, len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def shown(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    """All text that is let through, and whether it was stopped."""
    rule, text = StopStrings(stops), ""
    for piece in pieces:
        out, stopped = rule.add(piece)
        text += out
        if stopped:
            return text, True
    return text + rule.finish(), False


def test_a_stop_string_is_found_however_the_text_is_cut() -> None:
    text = "one two</s>three"
    for first, second in itertools.combinations_with_replacement(range(len(text) + 1), 2):
        assert shown(["</s>"], cut(text, first, second)) == ("one two", True)


def test_text_without_a_stop_string_passes_whole_however_it_is_cut() -> None:
    text = "a </s and <//s> b </"
    for first, second in itertools.combinations_with_replacement(range(len(text) + 1), 2):
        assert shown(["</s>"], cut(text, first, second)) == (text, False)


def test_the_first_of_several_stop_strings_counts() -> None:
    for place in range(15):
        assert shown(["END", "###", "\n\n"], cut("text ### more END", place)) == ("text ", True)
    assert shown(["bc", "abcd"], list("xabcd")) == ("xa", True)


def test_text_is_held_back_only_while_it_may_become_a_stop_string() -> None:
    rule = StopStrings(["</s>"])
    assert rule.add("hello <") == ("hello ", False)
    assert rule.add("/") == ("", False)
    assert rule.add("b") == ("</b", False)
    assert rule.add("<<") == ("<", False)
    assert rule.finish() == "<"
    assert rule.finish() == ""


def test_a_stop_string_that_repeats_its_own_beginning_is_found() -> None:
    for place in range(7):
        assert shown(["aab"], cut("xaaab", min(place, 5))) == ("xa", True)


def test_without_stop_strings_nothing_is_held_back() -> None:
    assert StopStrings([]).add("</") == ("</", False)
    assert StopStrings([""]).add("text") == ("text", False)

"""tokenizer.model to tokenizer.json: the ids are sentencepiece's."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
from conftest import Fixture, fixture_named
from sentencepiece import sentencepiece_model_pb2
from strings import STRINGS, seeded_strings
from tokenizers import Tokenizer

from mobilevlm.errors import CheckpointError
from mobilevlm.tokenizers.tokenizer import read_tokenizer

pytestmark = pytest.mark.pure


@pytest.fixture(scope="module")
def tokenizer(fixture: Fixture) -> Tokenizer:
    return read_tokenizer(fixture.checkpoint)


@pytest.fixture(scope="module")
def processor(fixture: Fixture) -> sentencepiece.SentencePieceProcessor:
    return open_processor(fixture.checkpoint)


def open_processor(folder: Path, dummy_prefix: bool = True) -> sentencepiece.SentencePieceProcessor:
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((folder / "tokenizer.model").read_bytes())
    model.normalizer_spec.add_dummy_prefix = dummy_prefix
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


def copy_tokenizer(source: Path, target: Path, **settings: object) -> Path:
    """The tokenizer's files alone, with some keys of tokenizer_config.json changed."""
    target.mkdir(exist_ok=True)
    for name in ("tokenizer.model", "tokenizer_config.json", "added_tokens.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    path = target / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return target


def test_ids_equal_sentencepiece_on_thousands_of_strings(
    fixture: Fixture, tokenizer: Tokenizer, processor: sentencepiece.SentencePieceProcessor
) -> None:
    texts = list(seeded_strings(len(fixture.name)))
    assert len(texts) >= STRINGS
    for text, found in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert found.ids == [1, *processor.EncodeAsIds(text)], repr(text)


def test_scores_decide_what_merges_first_not_ids(mobilevlm_v2: Fixture, tmp_path: Path) -> None:
    """In trained models the two orders are the same; here the scores are dealt out anew."""
    folder = copy_tokenizer(mobilevlm_v2.checkpoint, tmp_path / "t")
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((folder / "tokenizer.model").read_bytes())
    pieces = [piece for piece in model.pieces if piece.type == 1]
    scores = [piece.score for piece in pieces]
    random.Random(0).shuffle(scores)
    for piece, score in zip(pieces, scores, strict=True):
        piece.score = score
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    tokenizer, processor = read_tokenizer(folder), open_processor(folder)
    for text in seeded_strings(5):
        assert tokenizer.encode(text).ids == [1, *processor.EncodeAsIds(text)], repr(text)


def test_decoding_gives_the_text_back(fixture: Fixture, tokenizer: Tokenizer) -> None:
    for text in seeded_strings(7):
        if "\u2581" not in text:  # it stands for a space, so it does not come back
            assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_decoding_ids_gives_what_sentencepiece_gives(
    tokenizer: Tokenizer, processor: sentencepiece.SentencePieceProcessor
) -> None:
    generator = random.Random(3)
    pieces = range(3 + 256, processor.GetPieceSize())
    for _ in range(500):
        ids = generator.choices(pieces, k=8)
        assert tokenizer.decode(ids) == processor.DecodeIds(ids)


@pytest.mark.parametrize("legacy", [True, False])
def test_ids_do_not_depend_on_legacy_without_added_tokens(
    legacy: bool,
    fixture: Fixture,
    processor: sentencepiece.SentencePieceProcessor,
    tmp_path: Path,
) -> None:
    tokenizer = read_tokenizer(copy_tokenizer(fixture.checkpoint, tmp_path / "t", legacy=legacy))
    for text in list(seeded_strings(11))[:500]:
        assert tokenizer.encode(text).ids == [1, *processor.EncodeAsIds(text)], repr(text)


ADDED = [
    ["", "<im_start>", ""],
    ["", "<im_start>", "What"],
    ["Look: ", "<im_start>", "here"],
    ["a", "<im_end>", "\nWho is  it? "],
    ["a ", "<im_start>", " ", "<im_end>", " b"],
    ["", "<im_start>", "", "<im_end>", "b"],
]


@pytest.mark.parametrize("parts", ADDED, ids=repr)
@pytest.mark.parametrize("legacy", [True, False])
def test_text_after_an_added_token_gets_a_space_piece_only_with_legacy(
    legacy: bool, parts: list[str], tmp_path: Path
) -> None:
    """LlamaTokenizer encodes the text between added tokens piece by piece."""
    source = fixture_named("llava_v1_im_start_end").checkpoint
    added = json.loads((source / "added_tokens.json").read_text())
    tokenizer = read_tokenizer(copy_tokenizer(source, tmp_path / "t", legacy=legacy))
    with_prefix, without = open_processor(source), open_processor(source, dummy_prefix=False)
    expected = [1]
    for index, part in enumerate(parts):
        if part in added:
            expected.append(added[part])
        elif part:
            encoder = with_prefix if legacy or index == 0 else without
            expected += encoder.EncodeAsIds(part)
    assert tokenizer.encode("".join(parts)).ids == expected


def test_added_tokens_have_the_ids_of_the_file() -> None:
    folder = fixture_named("llava_v1_im_start_end").checkpoint
    tokenizer = read_tokenizer(folder)
    added = json.loads((folder / "added_tokens.json").read_text())
    assert {name: tokenizer.token_to_id(name) for name in added} == added


def test_no_leading_id_when_the_configuration_says_so(
    mobilevlm_v2: Fixture, tmp_path: Path
) -> None:
    folder = copy_tokenizer(mobilevlm_v2.checkpoint, tmp_path / "t", add_bos_token=False)
    expected = open_processor(folder).EncodeAsIds("the picture")
    assert read_tokenizer(folder).encode("the picture").ids == expected


def test_tokenizer_json_is_used_where_there_is_no_model(
    mobilevlm_v2: Fixture, tmp_path: Path
) -> None:
    tokenizer = read_tokenizer(mobilevlm_v2.checkpoint)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = " the  picture\n🙂"
    assert read_tokenizer(tmp_path).encode(text).ids == tokenizer.encode(text).ids


def test_writing_the_tokenizer_twice_gives_the_same_bytes(mobilevlm_v2: Fixture) -> None:
    first, second = (read_tokenizer(mobilevlm_v2.checkpoint).to_str() for _ in range(2))
    assert first == second


def message_of(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_tokenizer(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


@pytest.mark.parametrize("content", [b"", b"not a model", b"\xff" * 400, b"\x0a\x05ab"])
def test_damaged_model_is_named_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    assert "tokenizer.model" in message_of(tmp_path)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.99])
def test_truncated_model_is_named_in_one_line(
    keep: float, mobilevlm_v2: Fixture, tmp_path: Path
) -> None:
    content = (mobilevlm_v2.checkpoint / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(content[: int(len(content) * keep)])
    assert "tokenizer.model" in message_of(tmp_path)


def test_unigram_model_is_refused(mobilevlm_v2: Fixture, tmp_path: Path) -> None:
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((mobilevlm_v2.checkpoint / "tokenizer.model").read_bytes())
    model.trainer_spec.model_type = 1
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    assert "BPE" in message_of(tmp_path)


def test_missing_tokenizer_says_what_was_expected(tmp_path: Path) -> None:
    assert "tokenizer.model" in message_of(tmp_path)


def test_damaged_tokenizer_json_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"')
    assert "tokenizer.json" in message_of(tmp_path)


@pytest.mark.parametrize(
    "added",
    [{"<x>": 9000}, {"<x>": "700"}, {"<x>": None}, {"<x>": 700, "<y>": "a"}, {"": 700}],
    ids=repr,
)
def test_added_tokens_with_impossible_ids_are_named(
    added: dict[str, object], mobilevlm_v2: Fixture, tmp_path: Path
) -> None:
    folder = copy_tokenizer(mobilevlm_v2.checkpoint, tmp_path / "t")
    (folder / "added_tokens.json").write_text(json.dumps(added))
    assert "added_tokens.json" in message_of(folder)

"""Tokens beside those of tokenizer.model, and the ids around a text, whichever file has them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import fixture_named

from mobilevlm.errors import CheckpointError
from mobilevlm.families import open_checkpoint
from mobilevlm.tokenizers.tokenizer import read_tokenizer

SOURCE = fixture_named("llava_v1_im_start_end")
MARKS = {"<im_patch>": 620, "<im_start>": 621, "<im_end>": 622}
TEXT = "Look: <im_start>here<im_end> at it"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The checkpoint without added_tokens.json."""
    shutil.copytree(SOURCE.checkpoint, tmp_path / "c")
    (tmp_path / "c" / "added_tokens.json").unlink()
    return tmp_path / "c"


def change_settings(folder: Path, **settings: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def decoder(special: bool = False) -> dict[str, Any]:
    base = {"0": "<unk>", "1": "<s>", "2": "</s>"}
    entries = {**base, **{str(index): text for text, index in MARKS.items()}}
    return {
        index: {"content": text, "special": special or index in base}
        for index, text in entries.items()
    }


def expected_ids() -> list[int]:
    ids: list[int] = read_tokenizer(SOURCE.checkpoint).encode(TEXT).ids
    assert 621 in ids and 622 in ids
    return ids


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder, SOURCE.options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


def test_tokens_of_added_tokens_decoder_have_their_ids(folder: Path) -> None:
    change_settings(folder, added_tokens_decoder=decoder())
    assert read_tokenizer(folder).encode(TEXT).ids == expected_ids()


def test_tokens_of_tokenizer_json_have_their_ids(folder: Path) -> None:
    read_tokenizer(SOURCE.checkpoint).save(str(folder / "tokenizer.json"))
    assert read_tokenizer(folder).encode(TEXT).ids == expected_ids()


def test_special_tokens_of_the_settings_are_special(folder: Path) -> None:
    change_settings(folder, added_tokens_decoder=decoder(special=True))
    tokenizer = read_tokenizer(folder)
    assert tokenizer.encode(TEXT).ids == expected_ids()
    assert tokenizer.get_added_tokens_decoder()[621].special


def test_files_that_contradict_each_other_are_named(folder: Path) -> None:
    change_settings(folder, added_tokens_decoder=decoder())
    (folder / "added_tokens.json").write_text(json.dumps({**MARKS, "<im_start>": 622}))
    message = refused(folder)
    assert "tokenizer_config.json" in message and "added_tokens.json" in message


@pytest.mark.parametrize(
    "entries",
    [[], {"621": "<im_start>"}, {"x": {"content": "<im_start>"}}, {"621": {}},
     {"700": {"content": "<im_start>"}}, {"5": {"content": "<s>"}}],
    ids=str,
)  # fmt: skip
def test_a_damaged_added_tokens_decoder_is_named(entries: Any, folder: Path) -> None:
    change_settings(folder, added_tokens_decoder=entries)
    assert ("tokenizer_config.json" in refused(folder)) == bool(entries)


def test_marks_that_the_configuration_needs_must_be_in_the_vocabulary(folder: Path) -> None:
    message = refused(folder)
    assert "mm_use_im_start_end" in message and "<im_start>" in message
    assert "added_tokens.json" in message


def test_add_bos_token_is_heeded_where_tokenizer_json_has_no_post_processor(
    tmp_path: Path,
) -> None:
    state = json.loads(read_tokenizer(fixture_named("llava_v1").checkpoint).to_str())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**state, "post_processor": None}))
    path = tmp_path / "tokenizer_config.json"
    for settings, begins in (
        ({"add_bos_token": True}, True),
        ({"add_bos_token": True, "bos_token": {"content": "<s>"}}, True),
        ({"tokenizer_class": "LlamaTokenizer"}, True),
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, False),
        ({}, False),
    ):
        path.write_text(json.dumps(settings))
        assert (read_tokenizer(tmp_path).encode("the image").ids[0] == 1) == begins, settings


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_add_eos_token_is_refused(name: str, folder: Path) -> None:
    if name == "tokenizer.json":
        read_tokenizer(SOURCE.checkpoint).save(str(folder / "tokenizer.json"))
        (folder / "tokenizer.model").unlink()
    change_settings(folder, add_eos_token=True)
    assert "add_eos_token" in refused(folder)

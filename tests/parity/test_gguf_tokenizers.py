"""Byte-level tokenizers inside GGUF files: tokens, merges and the name of how words are split give
the ids of the checkpoint's tokenizer.json, here and in llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA
from llama import llama_cpp
from pairs import write_vocabulary
from strings import seeded_strings
from tokenizers import Tokenizer

from mobilevlm.errors import BundleError
from mobilevlm.gguf.file import read_gguf
from mobilevlm.gguf.tokenizer import _SAME, WORD_SPLITS, begins_texts, gguf_tokenizer
from mobilevlm.runtime.engines.llama.native import NativeModel
from mobilevlm.runtime.engines.llama.tokenizer import LlamaTokenizer

CHECKPOINTS = ("smolvlm2", "idefics3", "internvl35")
"""Their words are split as ``smollm``, ``dbrx`` and ``qwen2`` say."""
TEXTS = [
    *list(seeded_strings(4))[:300],
    "",
    "  leading, trailing  ",
    "l'été; I'LL don’t 1234567 0.5 ½ ² ١٢٣",
    "a\n\nb\r\n\r\n  c\t\t\td",
    "日本語のテスト 한국어 עברית",
    "🙂👩‍👩‍👧 fin",
]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_ids_are_those_of_the_checkpoint(name: str, tmp_path: Path) -> None:
    checkpoint = DATA / name / "checkpoint"
    path = write_vocabulary(checkpoint, tmp_path / "model.gguf")
    official = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    found = gguf_tokenizer(read_gguf(path))
    for text in TEXTS:
        assert found.encode(text).ids == official.encode(text).ids, text
        ids = official.encode(text).ids
        assert found.decode(ids) == official.decode(ids), text


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_llama_cpp_finds_the_same_ids_and_bytes(name: str, tmp_path: Path) -> None:
    """But for text that is not composed (NFC), which llama.cpp leaves as it is."""
    checkpoint = DATA / name / "checkpoint"
    path = write_vocabulary(checkpoint, tmp_path / "model.gguf")
    official = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    official.normalizer = None
    tokenizer = LlamaTokenizer(NativeModel(path))
    for text in TEXTS:
        ids = official.encode(text).ids
        assert tokenizer.encode(text).ids == ids, text
        plain = b"".join(tokenizer.token_bytes(index, False) for index in ids)
        assert plain.decode(errors="replace") == official.decode(ids), text


@pytest.mark.parametrize("pre", [*WORD_SPLITS, *_SAME])
def test_each_name_of_a_split_is_llama_cpps(pre: str, tmp_path: Path) -> None:
    path = write_vocabulary(
        DATA / "smolvlm2" / "checkpoint", tmp_path / "model.gguf", tokenizer__ggml__pre=pre
    )
    ours, theirs = gguf_tokenizer(read_gguf(path)), LlamaTokenizer(NativeModel(path))
    ours.normalizer = None
    for text in TEXTS[-60:]:
        assert theirs.encode(text).ids == ours.encode(text).ids, text


@pytest.mark.parametrize(("pre", "begins"), [("smollm", False), ("llama-bpe", True)])
def test_a_file_that_does_not_say_so_begins_texts_as_its_kind(
    pre: str, begins: bool, tmp_path: Path
) -> None:
    path = write_vocabulary(
        DATA / "smolvlm2" / "checkpoint",
        tmp_path / "model.gguf",
        tokenizer__ggml__pre=pre,
        tokenizer__ggml__add_bos_token=None,
    )
    file, model = read_gguf(path), NativeModel(path)
    assert begins_texts(file) == begins
    assert bool(gguf_tokenizer(file).encode("").ids) == begins
    assert bool(LlamaTokenizer(model).encode("").ids) == begins
    vocab = llama_cpp.llama_model_get_vocab(model.pointer)
    assert bool(llama_cpp.llama_vocab_get_add_bos(vocab)) == begins


def test_a_split_that_is_not_known_is_named(tmp_path: Path) -> None:
    path = write_vocabulary(
        DATA / "smolvlm2" / "checkpoint", tmp_path / "model.gguf", tokenizer__ggml__pre="tekken"
    )
    with pytest.raises(BundleError, match="'tekken': how it splits text into words is not known"):
        gguf_tokenizer(read_gguf(path))


def test_special_tokens_are_where_the_checkpoint_has_them(tmp_path: Path) -> None:
    checkpoint = DATA / "smolvlm2" / "checkpoint"
    file = read_gguf(write_vocabulary(checkpoint, tmp_path / "model.gguf"))
    added = json.loads((checkpoint / "tokenizer.json").read_text())["added_tokens"]
    found = gguf_tokenizer(file).get_added_tokens_decoder()
    assert {(token["id"], token["content"], token["special"]) for token in added} == {
        (index, token.content, token.special) for index, token in found.items()
    }
    assert np.unique(list(found)).size == len(added)

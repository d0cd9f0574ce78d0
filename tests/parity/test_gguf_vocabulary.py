"""Byte-level vocabularies in GGUF files: text is split into words as llama.cpp does by the name in
the file, and a file without a tokenizer.json gives the same ids."""

from __future__ import annotations

import dataclasses
import json
import unicodedata
from pathlib import Path
from typing import Any

import llama
import pytest
from conftest import fixture_named, memory_weights, token_id
from strings import seeded_strings
from tokenizers import Tokenizer

from mobilevlm.console.progress import ignore
from mobilevlm.errors import BundleError, CheckpointError, FileWarning
from mobilevlm.export.gguf.decoder import write_decoder
from mobilevlm.gguf.conversation import gguf_conversation
from mobilevlm.gguf.file import GgufFile, read_gguf
from mobilevlm.gguf.names import decoder_entries
from mobilevlm.gguf.tokenizer import WORD_SPLITS, WordSplit, gguf_tokenizer
from mobilevlm.model import Model


def tokenizer_of(split: WordSplit) -> Tokenizer:
    """The vocabulary of a reference checkpoint with other words."""
    state: dict[str, Any] = json.loads(fixture_named("moe_llava_phi2").model.tokenizer.to_str())
    state["normalizer"] = {"type": "NFC"} if split.composed else None
    steps = [dict(step) for step in split.steps]
    for step in steps:
        if step["type"] == "ByteLevel":
            step["trim_offsets"] = True
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    state["model"]["ignore_merges"] = split.ignore_merges
    return Tokenizer.from_str(json.dumps(state))


def model_with(tokenizer: Tokenizer, folder: Path) -> Model:
    """A tiny Qwen2 with this tokenizer, two ends of an answer, and rows without a token."""
    model = fixture_named("mobilevlm_v2").model
    size = tokenizer.get_vocab_size() + 3
    decoder = dataclasses.replace(model.spec.decoder, vocab_size=size, qkv_bias=True)
    shapes = {part: entry.shape for entry in decoder_entries(decoder) for part in entry.parts}
    ends = (token_id(tokenizer, "<|endoftext|>"), 7)
    conversation = dataclasses.replace(model.spec.conversation, eos_token_ids=ends)
    spec = dataclasses.replace(model.spec, decoder=decoder, conversation=conversation)
    weights = memory_weights(shapes, folder)
    return dataclasses.replace(model, spec=spec, weights=weights, tokenizer=tokenizer)


def without_tokenizer_json(file: GgufFile) -> GgufFile:
    metadata = dict(file.metadata)
    del metadata["tokenizer.huggingface.json"]
    return dataclasses.replace(file, metadata=metadata)


@pytest.mark.parametrize("name", WORD_SPLITS)
def test_llama_cpp_and_a_file_without_tokenizer_json_give_our_ids(
    name: str, tmp_path: Path
) -> None:
    tokenizer, path = tokenizer_of(WORD_SPLITS[name]), tmp_path / "decoder.gguf"
    write_decoder(model_with(tokenizer, tmp_path / "weights"), "f32", path, ignore)
    file = read_gguf(path)
    assert file.metadata["tokenizer.ggml.pre"] == name
    texts = ["It's 12345 o'clock", "naïve café 北京 2024", "a\n\n  b\t c", *seeded_strings(5)]
    texts = [unicodedata.normalize("NFC", text) for text in texts if "\0" not in text][:600]
    read = gguf_tokenizer(without_tokenizer_json(file))
    wrong = [text for text in texts if read.encode(text).ids != tokenizer.encode(text).ids]
    assert not wrong, f"{len(wrong)} of {len(texts)}, such as {wrong[:3]!r}"
    with llama.opened(path, 64) as decoder:
        wrong = [t for t in texts if t and decoder.tokenize(t, True) != tokenizer.encode(t).ids]
    assert not wrong, f"{len(wrong)} of {len(texts)}, such as {wrong[:3]!r}"


def test_all_ends_of_an_answer_are_in_the_file(tmp_path: Path) -> None:
    model, path = (
        model_with(tokenizer_of(WORD_SPLITS["qwen2"]), tmp_path / "w"),
        tmp_path / "d.gguf",
    )
    write_decoder(model, "f32", path, ignore)
    found = gguf_conversation(read_gguf(path)).eos_token_ids
    assert found == model.spec.conversation.eos_token_ids
    more = dataclasses.replace(model.spec.conversation, eos_token_ids=(*found, 8, 9, 10))
    spec = dataclasses.replace(model.spec, conversation=more)
    with pytest.warns(FileWarning, match="three ends of an answer: other programs .* know 9, 10"):
        write_decoder(dataclasses.replace(model, spec=spec), "f32", path, ignore)
    assert gguf_conversation(read_gguf(path)).eos_token_ids == (*found, 8)


def test_words_that_gguf_has_no_name_for_are_refused(tmp_path: Path) -> None:
    split = WordSplit((*WORD_SPLITS["smollm"].steps[::-1],))
    model = model_with(tokenizer_of(split), tmp_path / "weights")
    with pytest.raises(CheckpointError, match="in a way that has no name in GGUF, none of qwen2"):
        write_decoder(model, "f32", tmp_path / "decoder.gguf", ignore)


def test_a_name_that_is_not_known_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "decoder.gguf"
    model = model_with(tokenizer_of(WORD_SPLITS["qwen2"]), tmp_path / "weights")
    write_decoder(model, "f32", path, ignore)
    file = without_tokenizer_json(read_gguf(path))
    file.metadata["tokenizer.ggml.pre"] = "of-tomorrow"
    with pytest.raises(BundleError, match="'of-tomorrow': how it splits text into words is not"):
        gguf_tokenizer(file)

"""Families that hear or draw: checkpoints in bfloat16 and shards, several clips of Granite Speech,
WAV of all depths, formats without sound."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SOUND_FIXTURES, BundleOf, fixture_named, refusal
from safetensors.torch import load_file, save_file

import mobilevlm
from mobilevlm.audio import prepare_sound
from mobilevlm.conversation import render, tokenize
from mobilevlm.families import open_checkpoint
from mobilevlm.messages import Message
from mobilevlm.prompt import expand
from mobilevlm.reference import load_reference


def rounded(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("name", [*SOUND_FIXTURES, "janus"])
def test_bfloat16_in_shards_is_the_model_of_one_float32_file(name: str, tmp_path: Path) -> None:
    source = fixture_named(name).checkpoint
    whole, shards = (Path(shutil.copytree(source, tmp_path / each)) for each in ("a", "b"))
    for path in sorted(source.glob("*.safetensors")):
        tensors = rounded(load_file(path))
        wide = {name: tensor.float() for name, tensor in tensors.items()}
        (whole / path.name).chmod(0o644)
        save_file(wide, whole / path.name)
        (shards / path.name).chmod(0o644)
        if path.stem != "model":  # an adapter has one file
            save_file(tensors, shards / path.name)
            continue
        (shards / path.name).unlink()
        names, index = sorted(tensors), dict[str, str]()
        for shard in range(3):  # neighbours, such as queries and keys, in different files
            file = f"model-0000{shard + 1}-of-00003.safetensors"
            part = {name: tensors[name] for name in names[shard::3]}
            save_file(part, shards / file)
            index |= dict.fromkeys(part, file)
        listed = json.dumps({"metadata": {}, "weight_map": index})
        (shards / "model.safetensors.index.json").write_text(listed)
    first, second = (load_reference(open_checkpoint(each)).state_dict() for each in (whole, shards))
    assert first.keys() == second.keys() and len(first) > 20
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key


@torch.no_grad()
def test_granite_speech_hears_several_clips_of_a_prompt_in_their_order(bundle_of: BundleOf) -> None:
    """Against the torch reference; rows of a clip do not depend on its neighbour."""
    fixture = fixture_named("granite_speech")
    model, wav = fixture.model, fixture.folder / "audio.wav"
    tones = (np.sin(np.arange(9_000) / 7) * 8_000).astype(np.int16), 16_000
    text: dict[str, Any] = {"type": "text", "text": "What do both say?"}
    parts: list[dict[str, Any]] = [
        {"type": "audio", "audio": wav},
        {"type": "audio", "audio": tones},
        text,
    ]
    messages: list[Message] = [{"role": "user", "content": parts}]
    bare = [{"type": part["type"]} if part is not text else part for part in parts]
    asked: list[Message] = [{"role": "user", "content": bare}]
    sounds = [prepare_sound(source, model.spec.audio) for source in (wav, tones)]
    reference = load_reference(model)
    spoken = model.spec.conversation
    tokens = tokenize(model.tokenizer, render(spoken, asked), spoken)
    pieces = expand(tokens, [sound.pieces for sound in sounds])
    expected = reference.prompt(pieces, [reference.see(sound) for sound in sounds])
    with mobilevlm.load(bundle_of("granite_speech", "fp32")) as vlm:
        answer = vlm.generate(messages, max_new_tokens=16, ignore_eos=True)
        assert answer.token_ids == reference.greedy(expected, 16)
        rows = [len(vlm.encode_audio(source)) for source in (wav, tones)]
        assert answer.visual_tokens == sum(rows) and rows[0] != rows[1]
        messages[0]["content"] = [parts[1], parts[0], text]
        assert vlm.generate(messages, max_new_tokens=16, ignore_eos=True).prompt_tokens == (
            answer.prompt_tokens
        )
        assert not np.allclose(vlm.prompt_logits(messages)[-1], reference.logits(expected)[-1])


@pytest.mark.parametrize(
    ("name", "form", "told"),
    [
        ("voxtral", "gguf", "a GGUF file holds the decoder alone, which hears nothing"),
        ("granite_speech", "all", "no products that act where a prompt has sound"),
        ("voxtral", "npu", "no graphs for NPUs of models that take sound yet"),
    ],
)
def test_formats_without_sound_are_refused_in_one_line(
    name: str, form: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fixture_named(name).checkpoint
    said = ("export", folder, "-o", tmp_path / "b", "--format", form, "--no-measure", "--quiet")
    assert told in refusal(capsys, *said)


@pytest.mark.parametrize("kind", ["24 bits", "float32", "float64"])
def test_the_program_hears_wav_of_24_bits_and_floats_as_of_16(
    bundle_of: BundleOf, kind: str, tmp_path: Path
) -> None:
    wave = (np.sin(np.arange(16_000) / 9) * 8_000).astype("<i2")
    wide = (wave.astype("<i4") << 16).view(np.uint8).reshape(-1, 4)
    data, code, bits = {
        "24 bits": (wide[:, 1:].tobytes(), 1, 24),
        "float32": ((wave / 32768).astype("<f4").tobytes(), 3, 32),
        "float64": ((wave / 32768).astype("<f8").tobytes(), 3, 64),
    }[kind]
    size = bits // 8
    form = struct.pack("<IHHIIHH", 16, code, 1, 16_000, 16_000 * size, size, bits)
    body = b"WAVEfmt " + form + b"data" + struct.pack("<I", len(data)) + data
    path = tmp_path / "a.wav"
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    with mobilevlm.load(bundle_of("qwen2_audio", "fp32")) as vlm:
        assert np.array_equal(vlm.encode_audio(path), vlm.encode_audio((wave, 16_000)))

"""Sounds that are none, too long or for another model; checkpoints of families that hear, damaged;
by the program, in one line."""

from __future__ import annotations

import base64
import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BundleOf, fixture_named, refusal, run_program

import mobilevlm
from mobilevlm.errors import AudioError, CheckpointError, PromptError
from mobilevlm.families import open_checkpoint
from mobilevlm.image import Room
from mobilevlm.prompt import Sound
from mobilevlm.runtime import VLM

pytest.importorskip("starlette")
from mobilevlm.runtime.sequence.prompts import PromptReader
from mobilevlm.runtime.server.answering import _stream
from mobilevlm.runtime.server.errors import ApiError
from mobilevlm.runtime.server.images import take_images
from mobilevlm.runtime.server.requests import read_chat

WAV = fixture_named("voxtral").folder / "audio.wav"


@pytest.fixture(scope="module")
def hearing(bundle_of: BundleOf) -> Path:
    return bundle_of("voxtral", "fp32")


def an_hour(path: Path) -> Path:
    """A WAV file that says, and has, an hour of silence (the file has a hole)."""
    size = 3600 * 16_000 * 2
    form = struct.pack("<HHIIHH", 1, 1, 16_000, 32_000, 2, 16)
    head = b"fmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", size)
    with path.open("wb") as file:
        file.write(b"RIFF" + struct.pack("<I", 4 + len(head) + size) + b"WAVE" + head)
        file.truncate(file.tell() + size)
    return path


def test_the_program_answers_about_a_sound(hearing: Path) -> None:
    question = fixture_named("voxtral").expected["user_prompt"][0]
    done = run_program("run", hearing, "--audio", WAV, "-p", question, "-n", 24)
    assert done.stdout.rstrip("\n") == fixture_named("voxtral").text


def test_an_hour_of_sound_is_refused_with_the_seconds_that_fit(tmp_path: Path) -> None:
    model = fixture_named("voxtral").model
    short = replace(model.spec, decoder=replace(model.spec.decoder, context_length=2000))
    reader = PromptReader(short, model.tokenizer, None, lambda _: Room(1e12, "a test"))
    hour = Sound(an_hour(tmp_path / "hour.wav"))
    told = r"3600.0 s takes 45000 positions, .* room for 19\d\d .*, 156.0 s of it"
    with pytest.raises(AudioError, match=told):
        reader.prompt("What?", [hour], raw=False, special_tokens=True)
    with pytest.raises(AudioError, match=r"room for 19\d\d"):  # a short one before it fits
        reader.prompt("What?", [Sound(WAV), hour], raw=False, special_tokens=True)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "the file is empty"),
        (b"hello", "not a"),
        (WAV.read_bytes()[:1000], "cut short"),
        (WAV.read_bytes()[:44], "cut short"),
    ],
)
def test_a_file_that_is_no_sound_is_one_line(
    hearing: Path, content: bytes, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    line = refusal(capsys, "run", hearing, "--audio", path, "-p", "What?")
    assert told in line and "a.wav" in line


def test_a_missing_file_and_standard_input_without_a_sound_are_one_line(
    hearing: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capsys, "run", hearing, "--audio", "none.wav", "-p", "What?")
    assert "none.wav: no such sound file" in line


def test_a_chat_takes_sounds_and_saves_their_files(hearing: Path, tmp_path: Path) -> None:
    question = fixture_named("voxtral").expected["user_prompt"][0]
    lines = [f"/audio {WAV}", question, "/audio none.wav", f"/save {tmp_path / 'talk.json'}"]
    done = run_program("chat", hearing, "-n", 24, stdin="\n".join(lines).encode())
    assert done.stdout.rstrip("\n") == fixture_named("voxtral").text
    assert "error: none.wav: no such sound file" in done.stderr
    asked, answer = json.loads((tmp_path / "talk.json").read_text())
    assert asked["content"][0] == {"type": "audio", "audio": str(WAV)}
    assert answer["content"] == fixture_named("voxtral").text


def test_a_sound_for_a_model_that_sees_and_an_image_for_one_that_hears_are_one_line(
    hearing: Path, vlm: VLM, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(PromptError, match="takes no sound: leave it out"):
        vlm.generate("What?", audio=[WAV])
    data = base64.b64encode(WAV.read_bytes()).decode()
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    said = [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]
    with pytest.raises(PromptError, match="takes no sound: leave it out"):
        vlm.generate(said)  # type: ignore[arg-type]
    line = refusal(capsys, "run", hearing, "--image", "a.png", "-p", "What?")
    assert "this model takes no images: leave them out" in line


def test_sounds_as_openai_sends_them_are_the_file(hearing: Path) -> None:
    fixture = fixture_named("voxtral")
    data = base64.b64encode(WAV.read_bytes()).decode()
    text = {"type": "text", "text": fixture.expected["user_prompt"][0]}
    with mobilevlm.load(hearing) as model:
        for part in (
            {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}},
            {"type": "audio", "base64": data},
            {"type": "audio", "audio": WAV.read_bytes()},
            {"type": "audio", "audio": model.prepare_audio(WAV)},
        ):
            ids = model.prompt_ids([{"role": "user", "content": [part, text]}])
            assert ids == fixture.arrays["input_ids"][0].tolist()
        with pytest.raises(AudioError, match="expected a list of sounds, found str"):
            model.generate("What?", audio="a.wav")


def test_several_sounds_stand_in_their_order_and_a_chat_keeps_them(hearing: Path) -> None:
    fixture = fixture_named("voxtral")
    other = (np.zeros(16_000 * 5, np.int16), 16_000)  # two windows
    with mobilevlm.load(hearing) as model:
        ids = model.prompt_ids(
            [{"role": "user", "content": [
                {"type": "text", "text": "a"}, {"type": "audio", "audio": WAV},
                {"type": "text", "text": "b"}, {"type": "audio", "audio": other},
            ]}]
        )  # fmt: skip
        audio, begin = fixture.expected["audio_token_id"], fixture.expected["begin_audio_token_id"]
        runs = [ids.index(begin), len(ids) - 1 - ids[::-1].index(begin)]
        assert ids[runs[0] + 1 : runs[0] + 51] == [audio] * 50
        assert ids[runs[1] + 1 : runs[1] + 101] == [audio] * 100 and ids.count(audio) == 150
        chat = model.chat([Sound(WAV)])
        first = chat.ask("What?", max_new_tokens=4, ignore_eos=True).finish()
        assert first.visual_tokens == 50
        second = chat.ask("And?", max_new_tokens=4, ignore_eos=True).finish()
        assert second.visual_tokens == 50 and second.prompt_tokens > first.prompt_tokens


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ({"type": "input_audio"}, "expected data in base64"),
        ({"type": "input_audio", "input_audio": {"data": "AAAA"}}, "expected wav or mp3"),
        ({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, "no sound in it"),
        ({"type": "input_audio", "input_audio": {"data": "?", "format": "wav"}}, "audio/wav"),
        (
            {"type": "input_audio", "input_audio": {"data": "AA", "format": "wav", "rate": 1}},
            "rate: ",
        ),
        ({"type": "audio", "audio": "/etc/passwd"}, "parts of type input_audio"),
    ],
)
def test_the_server_takes_sounds_as_openai_sends_them_and_no_others(
    part: dict[str, Any], told: str
) -> None:
    data = base64.b64encode(WAV.read_bytes()).decode()
    good = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    messages, found = take_images([{"role": "user", "content": [good]}], allow_urls=False)
    assert messages[0]["content"] == [{"type": "audio"}]
    assert [(ref.kind, ref.content) for ref in found] == [("audio", WAV.read_bytes())]
    with pytest.raises(ApiError, match=told):
        take_images([{"role": "user", "content": [part]}], allow_urls=False)


def test_the_server_answers_about_a_sound(hearing: Path, vlm: VLM) -> None:
    fixture = fixture_named("voxtral")
    data = base64.b64encode(WAV.read_bytes()).decode()
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    text = {"type": "text", "text": fixture.expected["user_prompt"][0]}
    body = {"model": "m", "messages": [{"role": "user", "content": [part, text]}]}
    asked = read_chat({**body, "max_tokens": 24}, allow_urls=False)
    with mobilevlm.load(hearing) as model:
        assert _stream(model, asked, list(asked.images)).finish().text == fixture.text
        bad = replace(asked.images[0], content=b"hello")
        with pytest.raises(ApiError, match="not a"):
            _stream(model, asked, [bad])
    with pytest.raises(ApiError, match="this model takes no sound"):
        _stream(vlm, asked, list(asked.images))


Damage = Callable[[Path], None]


def changed(name: str, **keys: Any) -> Damage:
    """Change keys of a JSON file, in a part of it where the name has one."""
    name, _, part = name.partition(":")

    def damage(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        (data[part] if part else data).update(keys)
        (folder / name).write_text(json.dumps(data))

    return damage


def removed(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        ("qwen2_audio", removed("preprocessor_config.json"), "how sound is prepared"),
        ("qwen2_audio", changed("preprocessor_config.json", feature_size=80), "different models"),
        ("qwen2_audio", changed("preprocessor_config.json", chunk_length=30), "3000 frames"),
        ("qwen2_audio", changed("preprocessor_config.json", dither=0.1), "'dither'"),
        ("qwen2_audio", changed("config.json", audio_token_index=9999), "the tokenizer lacks"),
        ("qwen2_audio", changed("config.json:audio_config", encoder_layers=4), "layers.3"),
        ("qwen2_audio", changed("config.json:audio_config", activation_function="relu"), "'relu'"),
        ("qwen2_audio", changed("config.json:audio_config", scale_embedding=True), "scale_embed"),
        ("qwen2_audio", changed("config.json:audio_config", encoder_attention_heads=5), "multiple"),
        ("voxtral", changed("config.json:audio_config", intermediate_size=100), "a multiple of 48"),
        ("voxtral", changed("config.json", projector_hidden_act="relu"), "'relu'"),
        ("voxtral", removed("tekken.json"), "no tokenizer"),
        ("voxtral", changed("tekken.json", vocab=[]), "the ranks are not 0, 1, 2"),
        ("voxtral", changed("tekken.json", vocab=3), "not a tekken vocabulary"),
        ("voxtral", changed("tekken.json:config", pattern="("), "damaged"),
        ("voxtral", changed("tekken.json:config", default_num_special_tokens=2), "not a tekken"),
        ("granite_speech", removed("adapter_model.safetensors"), "no adapter_model.safetensors"),
        ("granite_speech", removed("adapter_config.json"), "the adapter for sound"),
        ("granite_speech", changed("adapter_config.json", r=4), "lora_A"),
        ("granite_speech", changed("adapter_config.json", use_dora=True), "'use_dora'"),
        ("granite_speech", changed("adapter_config.json", target_modules=["k_proj"]), "'k_proj'"),
        ("granite_speech", changed("adapter_config.json", rank_pattern={"a": 1}), "rank_pattern"),
        ("granite_speech", changed("preprocessor_config.json:melspec_kwargs", n_mels=64), "n_mels"),
        ("granite_speech", changed("preprocessor_config.json:melspec_kwargs", power=1), "'power'"),
        ("granite_speech", changed("config.json", window_size=16), "'downsample_rate' 5"),
        ("granite_speech", changed("config.json:encoder_config", context_size=65), "max_pos_emb"),
        ("granite_speech", changed("config.json:encoder_config", num_layers=1), "2 layers or more"),
        ("granite_speech", changed("config.json:projector_config", hidden_act="relu"), "'relu'"),
    ],
)
def test_a_damaged_checkpoint_is_named_in_one_line(
    name: str, damage: Damage, told: str, tmp_path: Path
) -> None:
    folder = tmp_path / name
    shutil.copytree(fixture_named(name).checkpoint, folder)
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_checkpoint_without_a_chat_template_has_the_official_default(tmp_path: Path) -> None:
    from mobilevlm.conversation import render, user_message

    fixture = fixture_named("qwen2_audio")
    folder = tmp_path / "a"
    shutil.copytree(fixture.checkpoint, folder)
    (folder / "chat_template.json").unlink()
    message = user_message(fixture.expected["user_prompt"][0], 1, shows="audio")
    found = render(open_checkpoint(folder).spec.conversation, [message])
    assert found == fixture.expected["chat_template_output"]

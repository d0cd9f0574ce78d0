"""GGUF files made by other programs: what they say is heeded by every engine and by an export, or
refused in one line that names it; and whether the files are damaged, old or new is told apart."""

from __future__ import annotations

import os
import struct
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from fuzz.gguf import (
    ARRAY,
    BOOL,
    F32,
    I32,
    STRING,
    U32,
    File,
    Tensor,
    decoder_file,
    legacy,
    mmproj_file,
)
from numpy.typing import NDArray

import mobilevlm
from mobilevlm.conversation import render, user_message
from mobilevlm.errors import FileWarning, MobileVLMError
from mobilevlm.export.gguf.source import open_gguf
from mobilevlm.gguf.file import read_gguf
from mobilevlm.gguf.keys import DESCRIPTIVE, RULES, Role, rule_name, rule_of
from mobilevlm.model import Model
from mobilevlm.runtime import VLM

needs_llama = pytest.mark.skipif(
    os.environ.get("MOBILEVLM_WITHOUT_LLAMA") == "1", reason="asked to go without llama.cpp"
)
ENGINES = ("gguf", "ggml")
PLAIN, ENCODER = decoder_file(0), mmproj_file("mlp")
IMAGE = np.random.default_rng(0).integers(0, 255, (28, 28, 3)).astype(np.uint8)
Logits = NDArray[np.float32]


def changed(file: File, **keys: Any) -> File:
    """A copy with these keys, ``__`` for dots; ``(kind, value)`` or ``(kind, value, item)``;
    none: without."""
    file = file.copy()
    for name, value in keys.items():
        key = name.replace("__", ".")
        file.keys = [pair for pair in file.keys if pair[0] != key]
        if value is not None:
            file.add(key, *value)
    return file


def with_tensor(file: File, name: str, values: NDArray[np.float32]) -> File:
    file = file.copy()
    file.tensors.append(Tensor(name, list(values.shape), 0, values.tobytes()))
    return file


def written(folder: Path, decoder: File = PLAIN, encoder: File = ENCODER) -> tuple[Path, Path]:
    model, mmproj = folder / "model.gguf", folder / "mmproj.gguf"
    model.write_bytes(decoder.packed())
    mmproj.write_bytes(encoder.packed())
    return model, mmproj


def load(engine: str, files: tuple[Path, Path]) -> VLM:
    return mobilevlm.load(files[0], engine, 1, files[1])


def logits(engine: str, files: tuple[Path, Path]) -> Logits:
    with load(engine, files) as vlm:
        return vlm.prompt_logits("<image>a the he", [IMAGE])


def visual_tokens(engine: str, files: tuple[Path, Path]) -> Logits:
    with load(engine, files) as vlm:
        return vlm.encode_image(IMAGE)


def close(found: Logits, expected: Logits) -> bool:
    """A tower's GELU is read from a table in float16."""
    return float(np.abs(found - expected).max()) < 2e-3 * float(np.abs(expected).max())


def values(model: Model) -> dict[str, Logits]:
    refs = model.weights._refs
    return {n: model.weights.read(n, refs[n].files.shape(refs[n].name)) for n in model.weights}


def refused_everywhere(files: tuple[Path, Path]) -> str:
    """Return the one message of all engines and the export; no library has seen the file."""
    said = set()
    for engine in ENGINES:
        with pytest.raises(MobileVLMError) as refused:
            load(engine, files)
        said.add(str(refused.value))
    with pytest.raises(MobileVLMError) as refused:
        open_gguf(*files)
    said.add(str(refused.value))
    assert len(said) == 1
    [line] = said
    assert "\n" not in line and len(line) < 500
    return line


# The table of keys


def keys_of_the_library(holder: type = gguf.Keys) -> list[str]:
    found = []
    for name, value in vars(holder).items():
        if isinstance(value, type):
            found += keys_of_the_library(value)
        elif isinstance(value, str) and not name.startswith("_"):
            found.append(value)
    return found


def test_every_key_of_gguf_py_is_in_the_table() -> None:
    """A key that is new there must be looked at: is it read, without effect, or refused?"""

    def is_missing(key: str) -> bool:
        role: Role = "encoder" if key.startswith("clip.") else "decoder"
        rule = rule_of(key, role)
        return rule is None or rule.pattern == DESCRIPTIVE

    keys = keys_of_the_library()
    assert len(keys) > 200
    assert [key for key in keys if is_missing(key)] == []


def test_a_refused_key_says_why_and_a_neutral_value_passes_its_own_type() -> None:
    for rule in (rule for part in RULES.values() for rule in part):
        assert (rule.use == "refused") == bool(rule.why), rule.pattern
        assert rule.use == "refused" or not rule.neutral, rule.pattern
    assert rule_name("llama.x", "llama") == "{arch}.x" and rule_name("clip.x", "") == "clip.x"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"llama__rope__scaling__type": (STRING, "yarn")}, "rope scaling 'yarn', expected 'li"),
        ({"llama__rope__scaling__attn_factor": (F32, 1.5)}, "rotary scaling other than linear"),
        ({"llama__attention__sliding_window": (U32, 64)}, "attention over a window"),
        ({"llama__expert_used_count": (U32, 2)}, "experts of this kind, which is not supported"),
        ({"llama__attention__causal": (BOOL, False)}, "attention that is not causal"),
        ({"llama__of_tomorrow": (U32, 1)}, "key 'llama.of_tomorrow' is not known to this version"),
        ({"llama__attention__head_count": (U32, 3)}, "head_count: found 32 and 3"),
        ({"llama__block_count": (U32, 1000)}, "block_count is 1000, the file has tensors of 2 lay"),
        ({"llama__block_count": (U32, 2**31)}, "'llama.block_count' is 2147483648, expected a pos"),
        ({"llama__attention__layer_norm_rms_epsilon": (F32, float("nan"))}, "nan, expected a pos"),
        ({"llama__attention__layer_norm_rms_epsilon": (F32, -1.0)}, "-1.0, expected a positive"),
        ({"llama__rope__freq_base": (F32, float("inf"))}, "'llama.rope.freq_base' is inf"),
        ({"tokenizer__ggml__add_eos_token": (BOOL, True)}, "a token after each text"),
        ({"tokenizer__ggml__eot_token_id": (U32, 9999)}, "eot_token_id is 9999, there are 320 tok"),
        ({"tokenizer__ggml__model": (STRING, "bert")}, "tokenizer 'bert', expected 'llama'"),
        ({"adapter__type": (STRING, "lora")}, "an adapter, not a model: merge it"),
    ],
)  # fmt: skip
def test_a_key_of_the_language_model_is_refused_by_name(
    keys: dict[str, Any], message: str, tmp_path: Path
) -> None:
    said = refused_everywhere(written(tmp_path, changed(PLAIN, **keys)))
    assert message in said


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"clip__use_silu": (BOOL, True)}, "SiLU in the image encoder, which is not supported"),
        ({"clip__vision__feature_layer": (ARRAY, [1, 2], I32)}, "[1, 2], expected one layer from"),
        ({"clip__vision__feature_layer": (ARRAY, [3], I32)}, "[3], expected one layer from 1 to 2"),
        ({"clip__vision__feature_layer": (ARRAY, [0], I32)}, "[0], expected one layer from 1 to 2"),
        ({"clip__vision__mm_patch_merge_type": (STRING, "spatial_unpad")}, "tiles (LLaVA-1.6)"),
        ({"clip__vision__image_aspect_ratio": (STRING, "anyres")}, "tiles): expected 'pad'"),
        ({"clip__minicpmv_version": (I32, 3)}, "'clip.minicpmv_version' is 3: another projector"),
        ({"clip__has_text_encoder": (BOOL, True)}, "a text encoder, which is not supported"),
        ({"clip__vision__image_size": (I32, 28)}, "of type i32, expected u32"),
        ({"clip__vision__attention__head_count": (U32, 5)}, "head_count: found 32 and 5"),
        ({"clip__vision__attention__layer_norm_epsilon": (F32, float("nan"))}, "nan, expected a s"),
        ({"clip__vision__image_std": (ARRAY, [0.0, 1.0, 1.0], F32)}, "numbers from 0.001 to"),
        ({"clip__vision__image_mean": (ARRAY, [1e30, 0.0, 0.0], F32)}, "numbers from 0.0 to 1.0"),
        ({"clip__vision__projection_dim": None}, "projection_dim is None, expected a positive"),
        ({"clip__vision__block_count": (U32, 1)}, "feature_layer is [2], expected one layer from"),
        ({"clip__of_tomorrow": (U32, 1)}, "key 'clip.of_tomorrow' is not known to this version"),
    ],
)  # fmt: skip
def test_a_key_of_the_image_encoder_is_refused_by_name(
    keys: dict[str, Any], message: str, tmp_path: Path
) -> None:
    assert message in refused_everywhere(written(tmp_path, PLAIN, changed(ENCODER, **keys)))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("blk.0.attn_q.bias", (32,), "tensor 'blk.0.attn_q.bias' is not read by"),
        ("blk.1.ffn_down.bias", (32,), "tensor 'blk.1.ffn_down.bias' is not read by"),
        ("rope_freqs.weight", (8,), "'rope_freqs.weight': rotary scaling other than linear"),
        ("output_norm.bias", (32,), "tensor 'output_norm.bias' is not read by"),
        ("blk.2.attn_norm.weight", (32,), "block_count is 2, the file has tensors of 3 layers"),
    ],
)
def test_a_tensor_of_the_language_model_that_is_not_read_is_named(
    name: str, shape: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    decoder = with_tensor(PLAIN, name, np.full(shape, 2, np.float32))
    assert message in refused_everywhere(written(tmp_path, decoder))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.image_newline", "'model.image_newline': images cut into tiles (LLaVA-1.6)"),
        ("v.post_ln.weight", "tensor 'v.post_ln.weight' is not read by"),
        ("mm.4.weight", "tensor 'mm.4.weight' is not read by"),
        ("v.blk.2.ln1.weight", "block_count is 2, the file has tensors of 3 layers"),
    ],
)
def test_a_tensor_of_the_image_encoder_that_is_not_read_is_named(
    name: str, message: str, tmp_path: Path
) -> None:
    encoder = with_tensor(ENCODER, name, np.ones(32, np.float32))
    assert message in refused_everywhere(written(tmp_path, PLAIN, encoder))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({13: "<0x0B>"}, "320 tokens (319 different): '<0x0B>' stands twice"),
        ({300: b"\xff\xfe"}, "entry 300 of tokenizer.ggml.tokens is not UTF-8"),
        ({300: ""}, "token 300 has 0 characters"),
        ({300: "x" * 1000}, "token 300 has 1000 characters"),
        ({13: "newline"}, "token 13, 'newline', should be a byte"),
    ],
)
def test_a_token_that_would_end_the_process_is_named(
    tokens: dict[int, Any], message: str, tmp_path: Path
) -> None:
    decoder = PLAIN.copy()
    listed = next(value for key, value in decoder.keys if key == "tokenizer.ggml.tokens")
    listed.value = list(listed.value)
    for index, token in tokens.items():
        listed.value[index] = token
    assert message in refused_everywhere(written(tmp_path, decoder))


# What is heeded


@needs_llama
@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({"llama__rope__scale_linear": (F32, 4.0)}, 4.0),
        ({"llama__rope__scaling__factor": (F32, 4.0)}, 4.0),
        (
            {"llama__rope__scaling__factor": (F32, 4.0), "llama__rope__scale_linear": (F32, 9.0)},
            4.0,
        ),
        (
            {
                "llama__rope__scaling__type": (STRING, "none"),
                "llama__rope__scaling__factor": (F32, 4.0),
            },
            1.0,
        ),
        ({"llama__rope__scaling__factor": (F32, 0.0)}, 1.0),
    ],
)
def test_rotary_scaling_is_that_of_llama_cpp_in_every_engine(
    keys: dict[str, Any], factor: float, tmp_path: Path
) -> None:
    files = written(tmp_path, changed(PLAIN, **keys))
    assert open_gguf(*files).spec.decoder.rope_scaling == factor
    found = [logits(engine, files) for engine in ENGINES]
    assert close(found[1], found[0])
    plain = logits("gguf", written(tmp_path))
    assert close(found[0], plain) == (factor == 1.0)


@needs_llama
def test_rotary_factors_of_one_change_nothing(tmp_path: Path) -> None:
    files = written(tmp_path, with_tensor(PLAIN, "rope_freqs.weight", np.ones(8, np.float32)))
    assert "rope_freqs.weight" in read_gguf(files[0]).tensors
    assert close(logits("gguf", files), logits("ggml", files))
    assert open_gguf(*files).spec.decoder.rope_scaling == 1.0


@needs_llama
def test_names_of_the_first_converter_and_no_feature_layer_give_the_same_visual_tokens(
    tmp_path: Path,
) -> None:
    """All layers that the file has; mtmd alone would leave out the last."""
    expected, weights = (
        visual_tokens("gguf", written(tmp_path)),
        values(open_gguf(*written(tmp_path))),
    )
    files = written(tmp_path, PLAIN, legacy(ENCODER))
    for engine in ENGINES:
        with pytest.warns(FileWarning, match="all 2 layers are run"):
            found = visual_tokens(engine, files)
        assert np.array_equal(found, expected)
    found_weights = values(open_gguf(*files))
    assert found_weights.keys() == weights.keys()
    assert all(np.array_equal(found_weights[name], weights[name]) for name in weights)


@needs_llama
def test_features_of_an_earlier_layer_are_those_of_a_shorter_file(tmp_path: Path) -> None:
    earlier = changed(ENCODER, clip__vision__feature_layer=(ARRAY, [1], I32))
    shorter = changed(earlier, clip__vision__block_count=(U32, 1))
    shorter.tensors = [t for t in shorter.tensors if not t.name.startswith("v.blk.1.")]
    expected = visual_tokens("gguf", written(tmp_path, PLAIN, shorter))
    files = written(tmp_path, PLAIN, earlier)
    for engine in ENGINES:
        assert np.array_equal(visual_tokens(engine, files), expected)
    assert open_gguf(*files).spec.image.transformer.num_hidden_layers == 1
    assert not close(visual_tokens("gguf", written(tmp_path)), expected)


def test_what_a_file_says_about_itself_and_keys_of_other_programs_change_nothing(
    tmp_path: Path,
) -> None:
    keys = {"general__of_tomorrow": (U32, 1), "quantize__imatrix__file": (STRING, "x")}
    spec = open_gguf(*written(tmp_path, changed(PLAIN, **keys, qwen2__block_count=(U32, 9)))).spec
    assert spec == open_gguf(*written(tmp_path)).spec


def test_every_end_of_an_answer_and_the_first_token_are_heeded(tmp_path: Path) -> None:
    keys = {
        f"tokenizer__ggml__{name}_token_id": (U32, 300 + i) for i, name in enumerate(("eot", "eom"))
    }
    files = written(tmp_path, changed(PLAIN, tokenizer__ggml__add_bos_token=(BOOL, False), **keys))
    model = open_gguf(*files)
    assert model.spec.conversation.eos_token_ids == (2, 300, 301)
    assert model.tokenizer.encode("a").ids[0] != 1
    assert open_gguf(*written(tmp_path)).tokenizer.encode("a").ids[0] == 1


# The chat template

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + eos_token }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PARTS = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == "
    "'image' %}[<image>]{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}:"
)


def prompt_of(template: str | None, folder: Path) -> str:
    value = None if template is None else (STRING, template)
    spec = open_gguf(*written(folder, changed(PLAIN, tokenizer__chat_template=value))).spec
    return render(spec.conversation, [user_message("a the", 1)])


def test_a_template_that_knows_texts_alone_holds_images_before_them(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = prompt_of(CHATML, tmp_path)
    assert found == "<|im_start|>user\n<image>\na the</s><|im_start|>assistant\n"


def test_a_template_with_images_is_used_as_it_is(tmp_path: Path) -> None:
    assert prompt_of(PARTS, tmp_path) == "[<image>]a the:"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ nothing.at.all }}", "undefined"),
        ("{% for message in messages %}", "end of template"),
        ("fixed text", "0 <image> for one image"),
        ("{% for m in messages %}<image><image>{{ m.content }}{% endfor %}", "<image> for one"),
    ],
)
def test_a_template_that_cannot_hold_an_image_is_replaced_with_a_warning(
    template: str, reason: str, tmp_path: Path
) -> None:
    with pytest.warns(
        FileWarning, match="cannot hold an image .*LLaVA's conversation 'v1'"
    ) as told:
        found = prompt_of(template, tmp_path)
    assert reason in str(told[0].message) and "\n" not in str(told[0].message)
    assert found.startswith("A chat between a curious user") and "USER: <image>\na the" in found


def test_a_file_without_a_template_gets_llavas_conversation(tmp_path: Path) -> None:
    assert prompt_of(None, tmp_path).startswith("A chat between a curious user")


# Parts


def split(file: File, count: int, folder: Path, name: str = "model") -> list[Path]:
    """The file in parts, as llama-gguf-split writes them."""
    paths, size = [], -(-len(file.tensors) // count)
    for number in range(count):
        part = file.copy() if number == 0 else File()
        part.tensors = file.tensors[number * size : (number + 1) * size]
        part.add("split.no", 2, number)
        part.add("split.count", 2, count)
        part.add("split.tensors.count", I32, len(file.tensors))
        paths.append(folder / f"{name}-{number + 1:05d}-of-{count:05d}.gguf")
        paths[-1].write_bytes(part.packed())
    return paths


@needs_llama
@pytest.mark.parametrize("engine", ENGINES)
def test_a_split_file_answers_like_the_whole(engine: str, tmp_path: Path) -> None:
    whole = written(tmp_path)
    first, *_ = split(PLAIN, 3, tmp_path)
    assert np.array_equal(logits(engine, (first, whole[1])), logits(engine, whole))


def test_a_split_file_is_exported_like_the_whole(tmp_path: Path) -> None:
    whole = written(tmp_path)
    first, *_ = split(PLAIN, 3, tmp_path)
    found, expected = values(open_gguf(first, whole[1])), values(open_gguf(*whole))
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_parts_that_are_not_the_first_or_not_there_are_told(tmp_path: Path) -> None:
    _, mmproj = written(tmp_path)
    first, second, third = split(PLAIN, 3, tmp_path)
    said = refused_everywhere((second, mmproj))
    assert "part 2 of 3 of a split file: give part 1, " in said and first.name in said
    third.rename(tmp_path / "third.gguf")
    assert f"part 3 is missing: put {third.name} beside it" in refused_everywhere((first, mmproj))
    (tmp_path / "third.gguf").rename(third)
    third.write_bytes(second.read_bytes())
    assert "not part 3 of 3" in refused_everywhere((first, mmproj))
    other = first.rename(tmp_path / "model.gguf")
    assert "must be named NAME-00001-of-00003.gguf" in refused_everywhere((other, mmproj))


def test_a_split_image_encoder_is_refused_with_the_tool_that_joins_it(tmp_path: Path) -> None:
    model, _ = written(tmp_path)
    first, *_ = split(ENCODER, 2, tmp_path, "mmproj")
    said = refused_everywhere((model, first))
    assert "a split file of 2 parts, an image encoder needs one" in said
    assert f"'llama-gguf-split --merge {first.name} WHOLE.gguf'" in said


# Of another time


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (31, "of type 31 (Q4_0_4_4), older than this version reads"),
        (33, "of type 33 (Q4_0_8_8), older than this version reads"),
        (4, "of type 4 (Q4_2), older than this version reads"),
        (40, "of type 40 (NVFP4), newer than this version reads: take the file in another type"),
        (41, "of type 41 (Q1_0), newer"),
        (60, "of type 60, newer"),
        (1 << 20, "has type 1048576, which is not known: copy or export it again"),
    ],
)
def test_a_type_of_another_time_is_not_called_damage(
    kind: int, message: str, tmp_path: Path
) -> None:
    decoder = PLAIN.copy()
    decoder.tensors[3].kind = kind
    said = refused_everywhere(written(tmp_path, decoder))
    assert message in said and ("damaged" in said) == (kind == 1 << 20)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1 (2023), older than 2 and 3"),
        (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), "GGUF version 4, newer than 2 and 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "a big-endian GGUF file"),
        (b"tjgg" + struct.pack("<IQQ", 3, 0, 0), "older than GGUF (format 'ggjt' of 2023)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run 'git lfs pull'"),
    ],
)
def test_a_file_of_another_time_or_a_pointer_is_not_called_damage(
    content: bytes, message: str, tmp_path: Path
) -> None:
    model, mmproj = written(tmp_path)
    model.write_bytes(content)
    said = refused_everywhere((model, mmproj))
    assert message in said and "damaged" not in said

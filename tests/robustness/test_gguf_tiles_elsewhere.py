"""Bad pairs of GGUF files whose images are tiles: one line each from an export; and chat templates
that such files may have or lack."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import refusal
from pairs import Pair, internvl_pair, smolvlm_pair

from mobilevlm.conversation import render, user_message
from mobilevlm.errors import FileWarning
from mobilevlm.export.gguf.source import open_gguf

SMOLVLM, INTERNVL = smolvlm_pair, internvl_pair


@pytest.mark.parametrize(
    ("build", "changes", "said"),
    [
        (SMOLVLM, {"clip__vision__preproc_image_size": None}, "preproc_image_size is None"),
        (SMOLVLM, {"clip__vision__preproc_image_size": 513}, "more than 8 tiles of 64 pixels"),
        (SMOLVLM, {"clip__vision__projector__scale_factor": None}, "scale_factor is None"),
        (SMOLVLM, {"clip__vision__projector__scale_factor": 3}, "scale_factor: found 8 and 3"),
        (SMOLVLM, {"clip__vision__preproc_max_tiles": 4}, "another image encoder or projector"),
        (SMOLVLM, {"clip__vision__image_aspect_ratio": "pad"}, "another preparation of images"),
        (SMOLVLM, {"clip__vision__novelty": 1}, "'clip.vision.novelty' is not known"),
        (SMOLVLM, {"clip__vision__feature_layer": [2]}, "llama.cpp runs all 3 layers"),
        (SMOLVLM, {"clip__vision__image_size": 96}, "v.position_embd.weight is (64, 48)"),
        (SMOLVLM, {"tokenizer__ggml__tokens": "<global-img>"}, "lacks '<global-img>'"),
        (SMOLVLM, {"tokenizer__ggml__tokens": "<image>"}, "lacks '<image>'"),
        (INTERNVL, {"clip__vision__preproc_min_tiles": 7}, "are 7 and 6, expected a range"),
        (INTERNVL, {"clip__vision__preproc_max_tiles": 65}, "expected a range of tiles up to 64"),
        (INTERNVL, {"clip__vision__preproc_image_size": 64}, "another image encoder"),
        (INTERNVL, {"clip__vision__preproc_max_tiles": "6"}, "of type string, expected u32"),
        (INTERNVL, {"tokenizer__ggml__tokens": "<IMG_CONTEXT>"}, "lacks '<IMG_CONTEXT>'"),
        (INTERNVL, {"clip__projector_type": "idefics3"}, "another image encoder or projector"),
        (INTERNVL, {"clip__projector_type": "resampler"}, "idefics3, internvl"),
    ],
)
def test_what_a_file_says_wrongly_is_one_line(
    build: Callable[..., Pair],
    changes: dict[str, Any],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for key, value in changes.items():
        if key == "tokenizer__ggml__tokens":  # this token has another name
            changes = {key: ["?!?" if token == value else token for token in tokens_of(build)]}
    decoder, mmproj = build(tmp_path / "pair", **changes)
    given = ["export", decoder, "--mmproj", mmproj, "-o", tmp_path / "bundle"]
    message = refusal(capsys, *given)
    assert said in message and str(tmp_path) in message


def tokens_of(build: Callable[..., Pair]) -> list[str]:
    from conftest import fixture_named

    model = fixture_named("smolvlm2" if build is SMOLVLM else "internvl35").model
    size = model.spec.decoder.vocab_size
    return [model.tokenizer.id_to_token(index) or f"[PAD{index}]" for index in range(size)]


def test_a_tensor_of_a_larger_tower_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """InternViT of 6B has norms of queries and keys."""
    decoder, mmproj = internvl_pair(tmp_path)
    content = mmproj.read_bytes()
    assert content.count(b"v.blk.1.ls2.weight") == 1
    mmproj.write_bytes(content.replace(b"v.blk.1.ls2.weight", b"v.blk.1.l_k.weight"))
    given = ["export", decoder, "--mmproj", mmproj, "-o", tmp_path / "bundle"]
    assert "tensor 'v.blk.1.ls2.weight' is missing" in refusal(capsys, *given)
    mmproj.write_bytes(content.replace(b"v.blk.1.ls2.weight", b"v.blk.1.ls1.weighu"))
    assert "'v.blk.1.ls2.weight' is missing" in refusal(capsys, *given)


def test_without_numbers_of_tiles_they_are_llama_cpps(tmp_path: Path) -> None:
    none = dict.fromkeys(("clip__vision__preproc_min_tiles", "clip__vision__preproc_max_tiles"))
    preparation: Any = open_gguf(*internvl_pair(tmp_path, **none)).spec.image.preparation
    assert (preparation.min_tiles, preparation.max_tiles) == (1, 12)


TEXTS = "{% for m in messages %}<|im_start|>{{ m['role'] + ': ' + m['content'] }}{% endfor %}"


@pytest.mark.parametrize("template", [TEXTS, None])
def test_a_template_of_texts_gets_images_before_the_text(
    template: str | None, tmp_path: Path
) -> None:
    """ChatML stands in for none."""
    found = open_gguf(*internvl_pair(tmp_path, tokenizer__chat_template=template)).spec
    assert found.conversation.image_mark == "<IMG_CONTEXT>" and found.conversation.parts
    text = render(found.conversation, [user_message("Is it <image> here?", 1)])
    separator = ": " if template else "\n"
    assert f"<|im_start|>user{separator}<IMG_CONTEXT>\nIs it  here?" in text


def test_a_template_without_a_question_gives_way_with_a_warning(tmp_path: Path) -> None:
    files = smolvlm_pair(tmp_path, tokenizer__chat_template="Hello.")
    with pytest.warns(FileWarning, match="cannot hold an image"):
        conversation = open_gguf(*files).spec.conversation
    text = render(conversation, [user_message("Who?", 1)])
    assert text.endswith("USER: <image>\nWho? ASSISTANT:")


def test_quantized_tensors_are_read_beside_layer_scale(tmp_path: Path) -> None:
    """Layer scale multiplies rows of a layer in blocks after they become floats."""
    decoder, mmproj = internvl_pair(tmp_path)
    reader = gguf.GGUFReader(mmproj)
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    model = open_gguf(decoder, mmproj)
    name, shape = "vision.layers.1.mlp.fc2.bias", tensors["v.blk.1.ffn_down.bias"].shape
    expected = tensors["v.blk.1.ffn_down.bias"] * tensors["v.blk.1.ls2.weight"]
    np.testing.assert_allclose(model.weights.read(name, shape), expected, rtol=1e-6)
    assert model.weights.q4_0("vision.layers.1.mlp.fc2.weight") is None

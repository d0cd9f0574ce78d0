"""Pairs of GGUF files that llama.cpp alone knows: whatever is wrong with them, or with an image, is
one line and exit code 2. No signal, no endless load, memory within the limit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DATA, refusal, run_program

import mobilevlm
from mobilevlm.errors import BundleError, FileWarning, ImageError, MobileVLMError
from mobilevlm.runtime import VLM

if os.environ.get("MOBILEVLM_WITHOUT_LLAMA") == "1":
    pytest.skip("asked to go without llama.cpp", allow_module_level=True)

from pairs import Pair, internvl_pair, smolvlm_pair

from mobilevlm.image import Room
from mobilevlm.runtime.engines.llama import pair_probe
from mobilevlm.runtime.engines.llama.pair_images import PairImages

IMAGE = DATA / "smolvlm2" / "image.png"
QUESTION = ("--prompt", "Who?", "--image", str(IMAGE), "--max-new-tokens", "2")


def refused(pair: Pair) -> str:
    with pytest.raises(MobileVLMError) as caught:
        mobilevlm.load(pair[0], mmproj=pair[1]).close()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600, message
    return message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip__projector_type": "idefics9"}, "unknown projector type: idefics9"),
        ({"clip__has_vision_encoder": False}, "no image encoder"),
        ({"clip__vision__image_size": 1 << 30}, "mmproj.gguf: llama.cpp cannot"),
        ({"clip__vision__patch_size": 0}, "mmproj.gguf: llama.cpp cannot"),
        ({"clip__vision__block_count": 9}, "mmproj.gguf: llama.cpp cannot"),
        ({"clip__vision__projector__scale_factor": 3}, "mmproj.gguf: llama.cpp cannot"),
        ({"llama__block_count": 3}, "block_count is 3, the file has tensors of 4 layers"),
        ({"llama__block_count": 1 << 31}, "'llama.block_count' is 2147483648, expected a number"),
        ({"llama__embedding_length": 80}, "expected 80 columns"),
        ({"llama__attention__head_count": 0}, "model.gguf: llama.cpp cannot"),
        ({"llama__attention__head_count_kv": 2}, "model.gguf: llama.cpp cannot"),
        ({"llama__context_length": 16}, "a small image takes"),
        ({"llama__attention__head_count_kv": 1 << 20}, "more than a model of"),
        ({"tokenizer__ggml__tokens": ["a", "b"]}, "2 tokens, the model has embeddings for 624"),
        ({"tokenizer__ggml__tokens": [f"t{i}" for i in range(624)]}, "the marks that 'idefics3'"),
        ({"tokenizer__ggml__tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokenizer__ggml__pre": "of tomorrow"}, "unknown pre-tokenizer type"),
        ({"tokenizer__ggml__model": "of tomorrow"}, "unknown tokenizer"),
        ({"tokenizer__ggml__token_type": [1, 2]}, "another number of token_type"),
    ],
)
def test_files_that_llama_cpp_cannot_run_are_one_line(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    assert message in refused(smolvlm_pair(tmp_path, **changes))


@pytest.mark.parametrize(
    "name",
    ["mm.model.fc.weight", "v.post_ln.bias"],
)  # fmt: skip
def test_a_missing_tensor_of_the_image_encoder_is_one_line(name: str, tmp_path: Path) -> None:
    model, mmproj = smolvlm_pair(tmp_path)
    data = mmproj.read_bytes()
    other = name[:-1] + "X"
    assert data.count(name.encode()) == 1
    mmproj.write_bytes(data.replace(name.encode(), other.encode()))
    try:
        mobilevlm.load(model, mmproj=mmproj).close()  # some are not needed
    except BundleError as error:
        assert "\n" not in str(error) and "mmproj.gguf" in str(error)


def test_two_files_of_different_models_are_one_line(tmp_path: Path) -> None:
    model, _ = internvl_pair(tmp_path / "a")
    _, mmproj = smolvlm_pair(tmp_path / "b")
    assert "mismatch" in refused((model, mmproj))


def test_a_file_that_is_cut_off_is_one_line(tmp_path: Path) -> None:
    model, mmproj = smolvlm_pair(tmp_path)
    mmproj.write_bytes(mmproj.read_bytes()[:-500])
    assert "mmproj.gguf" in refused((model, mmproj))


def test_random_damage_ends_no_process(tmp_path: Path) -> None:
    rng = random.Random(5)
    model, mmproj = smolvlm_pair(tmp_path)
    whole = {path: path.read_bytes() for path in (model, mmproj)}
    image = np.full((80, 80, 3), 99, np.uint8)
    for _ in range(6):
        path = rng.choice([model, mmproj])
        data = bytearray(whole[path])
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(min(len(data), 40_000))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            with mobilevlm.load(model, mmproj=mmproj) as vlm:
                vlm.generate("Who?", [image], max_new_tokens=1)
        except MobileVLMError as error:
            assert "\n" not in str(error)
        path.write_bytes(whole[path])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return smolvlm_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def vlm(pair: Pair) -> VLM:
    return mobilevlm.load(pair[0], mmproj=pair[1])


Change = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(autouse=True)
def untried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let no test know of pairs that others tried."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_pair_is_tried_once_as_long_as_its_files_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, mmproj = smolvlm_pair(tmp_path)
    mobilevlm.load(model, mmproj=mmproj).close()
    [note] = (tmp_path / "cache" / "mobilevlm" / "pairs").iterdir()
    monkeypatch.setattr(pair_probe, "SECONDS", 0.01)
    monkeypatch.setattr(pair_probe, "BYTES_PER_SECOND", 1e12)
    mobilevlm.load(model, mmproj=mmproj).close()
    whole = note.read_text()
    for damaged in ("", "{}", "[1]", whole.replace("72", '"x"'), whole[:-3]):
        note.write_text(damaged)
        assert "did not open it" in refused((model, mmproj))
    note.write_text(whole)
    mobilevlm.load(model, mmproj=mmproj).close()
    os.utime(mmproj)
    assert "did not open it" in refused((model, mmproj))


def test_a_cache_that_cannot_be_written_only_costs_time(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    mobilevlm.load(pair[0], mmproj=pair[1]).close()


def test_a_crash_in_the_process_that_tries_is_one_line(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(command: Any, **options: Any) -> Any:
        return subprocess.CompletedProcess(
            command, -signal.SIGABRT, b"", b"x.cpp:7: GGML_ASSERT(n > 0) failed\n"
        )

    monkeypatch.setattr(subprocess, "run", crash)
    message = refused(pair)
    assert "it ended with SIGABRT" in message and "GGML_ASSERT(n > 0) failed" in message


def test_a_load_without_end_is_one_line(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_probe, "SECONDS", 0.05)
    monkeypatch.setattr(pair_probe, "BYTES_PER_SECOND", 1e12)
    assert "did not open it beside model.gguf within 0 s" in refused(pair)


@pytest.mark.parametrize("engine", ["onnx", "ggml", "hybrid", "ort"])
def test_other_engines_do_not_know_the_model(engine: str, pair: Pair) -> None:
    with pytest.raises(BundleError, match=f"engine {engine} does not know 'llama' with the proj"):
        mobilevlm.load(pair[0], mmproj=pair[1], engine=engine)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (2, 500), (900, 3)])
def test_images_that_resizing_would_end_the_process_at_are_refused(
    shape: tuple[int, int], vlm: VLM
) -> None:
    with pytest.raises(ImageError, match="takes images of at least 2 pixels"):
        vlm.generate("Who?", [np.zeros((*shape, 3), np.uint8)], max_new_tokens=1)


@pytest.mark.parametrize("shape", [(2, 2), (2, 399), (399, 2), (3, 3), (700, 31)])
def test_images_of_odd_shapes_are_answered(shape: tuple[int, int], vlm: VLM) -> None:
    answer = vlm.generate("Who?", [np.full((*shape, 3), 7, np.uint8)], max_new_tokens=1)
    assert len(answer.token_ids) == 1


def test_an_image_of_another_model_is_refused(vlm: VLM, tmp_path: Path) -> None:
    model, mmproj = internvl_pair(tmp_path)
    with mobilevlm.load(model, mmproj=mmproj) as other:
        prepared = other.prepare_image(IMAGE)
    with pytest.raises(ImageError, match="prepared for another model"):
        vlm.generate("Who?", [prepared], max_new_tokens=1)


def test_more_images_than_the_context_holds_are_refused(vlm: VLM) -> None:
    photo = vlm.prepare_image(IMAGE)
    with pytest.raises(MobileVLMError, match="of the 120 images or frames would fit"):
        vlm.generate("Who?", [photo] * 120, max_new_tokens=1)


def test_no_embeddings_go_in_or_out(vlm: VLM) -> None:
    with pytest.raises(BundleError, match="from token ids and images alone"):
        vlm.embeds_logits(np.zeros((2, 72), np.float32))
    with pytest.raises(MobileVLMError, match="no tower features"):
        vlm.image_features(IMAGE)


def test_a_closed_model_says_so(pair: Pair) -> None:
    vlm = mobilevlm.load(pair[0], mmproj=pair[1])
    vlm.close()
    with pytest.raises(MobileVLMError, match="closed"):
        vlm.generate("Who?", [IMAGE], max_new_tokens=1)


def test_a_template_without_images_gets_them_as_llama_cpp_puts_them(tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}>"
    model, mmproj = smolvlm_pair(tmp_path, tokenizer__chat_template=template)
    with mobilevlm.load(model, mmproj=mmproj) as vlm:
        ids = vlm.prompt_ids("Who?", images=1)
        assert vlm.tokenizer.encode("[user] ").ids == ids[: ids.index(-200)]


def test_a_template_that_cannot_hold_an_image_is_told(tmp_path: Path) -> None:
    model, mmproj = smolvlm_pair(tmp_path, tokenizer__chat_template="{{ 1 / 0 }}")
    with pytest.warns(FileWarning, match="cannot hold an image"):
        mobilevlm.load(model, mmproj=mmproj).close()


def test_the_limit_of_memory_is_heeded(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    files = (str(pair[0]), "--mmproj", str(pair[1]))
    said = refusal(capsys, "run", *files, *QUESTION, "--max-memory", "40MB")
    assert "the limit is 40 MB (--max-memory)" in said
    done = run_program("run", *files, *QUESTION, "--max-memory", "400MB")
    assert done.returncode == 0, done.stderr


def test_an_image_that_resizing_would_take_too_much_memory_for_is_refused(vlm: VLM) -> None:
    photo = np.zeros((2000, 3000, 3), np.uint8)
    encoder, _ = vlm._engines()
    assert isinstance(encoder, PairImages)
    with pytest.raises(ImageError, match=r"takes 72 MB, there is room for 50 MB \(a test\)"):
        encoder.prepare(photo, lambda needed: Room(50e6, "a test"))
    assert encoder.prepare(photo, lambda needed: Room(80e6, "a test")).pieces

"""Visual tokens in files: later processes find them, answers stay the same, and nothing that is
wrong with a file is believed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BundleOf, fixture_named, refusal
from safetensors.numpy import load_file
from test_session import picture

import mobilevlm
from mobilevlm.bundle import Bundle, open_bundle
from mobilevlm.cli import main
from mobilevlm.errors import CacheWarning, MobileVLMError
from mobilevlm.plan import Plan
from mobilevlm.prompt import Arrays, Rows
from mobilevlm.runtime import VLM, Generation
from mobilevlm.runtime.engines import Float32
from mobilevlm.runtime.sequence import token_folder
from mobilevlm.runtime.sequence.token_folder import TokenFolder, open_token_folder
from mobilevlm.runtime.server import models, serving

A, B, C, D = (bytes([number]) * 16 for number in range(4))


class NoEncoder:
    """Fails the test that encodes."""

    def encode(self, arrays: Arrays) -> Rows:
        raise AssertionError("encoded again")

    def features(self, arrays: Arrays) -> Float32:
        raise NotImplementedError

    def close(self) -> None: ...


def rows_of(seed: int, count: int = 5, deep: int = 0) -> Rows:
    drawn = np.random.default_rng(seed).standard_normal((1 + deep, count, 8)).astype(np.float32)
    return Rows(drawn[0], tuple(drawn[1:]))


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir())


def ask(vlm: VLM, name: str) -> Generation:
    """An answer to a question of a fixture, or about an image of noise."""
    options: Any = {"max_new_tokens": 3, "logprobs": True, "top_logprobs": 5}
    if name == "tiny":
        return vlm.generate("What is it?", [picture(1, vlm)], **options)
    fixture = fixture_named(name)
    if vlm.spec.has_sound:
        return vlm.generate("What is it?", audio=[fixture.folder / "audio.wav"], **options)
    return vlm.generate(fixture.prompt, fixture.images, **options)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("tiny", "int8"),
        ("qwen3_vl", "fp32"),  # DeepStack
        ("smolvlm2", "fp32"),  # tiles
        ("llava_next", "fp32"),  # rows assembled of tiles
        ("qwen2_audio", "fp32"),
    ],
)
@pytest.mark.filterwarnings("error::mobilevlm.errors.CacheWarning")
def test_a_second_start_encodes_nothing_and_answers_with_the_same_bits(
    name: str, recipe: str, bundle_of: BundleOf, tmp_path: Path
) -> None:
    bundle = bundle_of(name, recipe)
    with mobilevlm.load(bundle) as vlm:
        plain = ask(vlm, name)
    with mobilevlm.load(bundle, cache_dir=tmp_path / "new" / "cache") as vlm:
        first = ask(vlm, name)
    with mobilevlm.load(bundle, cache_dir=tmp_path / "new" / "cache") as vlm:
        vlm._vision = NoEncoder()
        second = ask(vlm, name)
    assert plain.reused.images == first.reused.images == 0 < second.reused.images
    assert plain.logprobs == first.logprobs == second.logprobs
    assert plain.token_ids == first.token_ids == second.token_ids


def test_tokens_on_disk_serve_where_nothing_is_kept_in_memory(
    bundle_of: BundleOf, tmp_path: Path
) -> None:
    bundle = bundle_of("tiny", "int8")
    for _ in range(2):
        with mobilevlm.load(bundle, cache_mb=0, cache_dir=tmp_path) as vlm:
            answer = ask(vlm, "tiny")
    assert (answer.reused.images, answer.reused.tokens) == (1, 0)
    with mobilevlm.load(bundle, cache_dir=tmp_path) as vlm:
        vlm._vision = NoEncoder()
        with pytest.raises(AssertionError, match="encoded again"):  # it is for verification
            vlm.prompt_logits("What is it?", [picture(1, vlm)])


def test_rows_come_back_to_the_bit_and_other_tools_read_the_file(tmp_path: Path) -> None:
    folder, rows = TokenFolder(tmp_path, 10**6, "encoder"), rows_of(0, deep=2)
    rows.embeds[0, :3] = np.nan, -0.0, np.inf
    folder.put(A, rows)
    found = TokenFolder(tmp_path, 10**6, "encoder").get(A)
    assert found is not None and len(found.deep) == 2
    for ours, theirs in zip((rows.embeds, *rows.deep), (found.embeds, *found.deep), strict=True):
        assert ours.tobytes() == theirs.tobytes() and theirs.shape == (5, 8)
    [path] = files_in(tmp_path)
    stored = load_file(path)
    assert sorted(stored) == ["deep.0", "deep.1", "embeds"]
    assert stored["deep.1"].tobytes() == rows.deep[1].tobytes()
    assert path.stat().st_mode & 0o777 == 0o600  # what is in an image is nobody else's
    assert folder.get(B) is None and TokenFolder(tmp_path, 10**6, "other").get(A) is None


def test_no_damaged_byte_is_believed(tmp_path: Path) -> None:
    folder = TokenFolder(tmp_path, 10**6, "encoder")
    folder.put(A, rows_of(0, count=2, deep=1))
    [path] = files_in(tmp_path)
    whole = path.read_bytes()
    damaged = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(len(whole))]
    damaged += [b"", whole[:7], whole[:-1], whole + b"\0", b"\xff" * 8 + whole[8:]]
    for number, content in enumerate(damaged):
        path.write_bytes(content)
        with pytest.warns(CacheWarning, match="damaged: the image is encoded again"):
            assert folder.get(A) is None, number
    path.write_bytes(whole)
    assert folder.get(A) is not None


def test_a_damaged_file_is_encoded_again_and_mended(bundle_of: BundleOf, tmp_path: Path) -> None:
    bundle = bundle_of("tiny", "int8")
    with mobilevlm.load(bundle, cache_dir=tmp_path) as vlm:
        first = ask(vlm, "tiny")
    [path] = files_in(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\x55")
    with (
        mobilevlm.load(bundle, cache_dir=tmp_path) as vlm,
        pytest.warns(CacheWarning, match=re.escape(str(path))),
    ):
        assert ask(vlm, "tiny").logprobs == first.logprobs
    assert path.read_bytes() == whole


def test_what_is_no_file_is_passed_over(tmp_path: Path) -> None:
    folder = TokenFolder(tmp_path, 10**6, "encoder")
    folder.put(A, rows_of(0))
    [path] = files_in(tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.warns(CacheWarning, match="not a regular file"):
        assert folder.get(A) is None
    folder.put(A, rows_of(0))
    assert folder.get(A) is not None


def test_what_was_not_used_for_longest_goes_and_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / "mine.safetensors").write_bytes(b"1" * 5000)
    probe = TokenFolder(tmp_path, 10**6, "encoder")
    probe.put(A, rows_of(0))
    size = files_in(tmp_path)[0].stat().st_size
    folder = TokenFolder(tmp_path, 3 * size, "encoder")
    draft = tmp_path / f".{files_in(tmp_path)[0].name}.x"
    draft.write_bytes(b"killed")
    os.utime(draft, (0, 0))
    for age, digest in ((300, A), (200, B), (100, C)):
        folder.put(digest, rows_of(0))
        os.utime(folder._path(digest), (time.time() - age,) * 2)
    assert folder.get(A) is not None  # used now
    folder.put(D, rows_of(0))
    assert [folder.get(digest) is not None for digest in (A, B, C, D)] == [True, False, True, True]
    folder.put(B, rows_of(0, count=1000))  # larger than all together
    assert folder.get(B) is None and folder.get(A) is not None
    assert not draft.exists() and (tmp_path / "mine.safetensors").exists()


def test_a_folder_that_fails_later_is_said_once_and_ends_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = TokenFolder(tmp_path / "gone", 10**6, "encoder")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        folder.put(A, rows_of(0))
        folder.put(B, rows_of(0))
    assert len(said) == 1 and "cannot be kept there (No such file" in str(said[0].message)


_WRITER = """
import sys
import numpy as np
from pathlib import Path
from mobilevlm.prompt import Rows
from mobilevlm.runtime.sequence.token_folder import TokenFolder
folder = TokenFolder(Path(sys.argv[1]), 40_000, "encoder")
for turn in range(60):
    for number in range(6):
        digest = bytes([number]) * 16
        found = folder.get(digest)
        assert found is None or (found.embeds == number).all()
        folder.put(digest, Rows(np.full((32, 64), number, np.float32)))
"""


def test_processes_share_a_folder_that_is_too_small_for_all(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", _WRITER, str(tmp_path)]
    writers = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(3)]
    said = [writer.communicate()[1].decode() for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 3, said
    assert not [path for path in files_in(tmp_path) if path.name.startswith(".")]


def test_the_key_has_all_that_rows_depend_on(bundle_of: BundleOf, tmp_path: Path) -> None:
    bundle, plan = open_bundle(bundle_of("tiny", "int8")), Plan("onnx", vision_threads=1)
    changes: list[tuple[Bundle, Plan]] = [
        (replace(bundle, digest="1" * 64), plan),
        (bundle, replace(plan, vision_threads=2)),
        (bundle, replace(plan, vision_weights="packed")),
        (bundle, replace(plan, engine="ggml")),
        (replace(bundle, digest=""), plan),
    ]
    keys = [token_folder._encoder_key(*given) for given in [(bundle, plan), *changes]]
    assert len(set(keys)) == len(keys)
    same = replace(plan, decoder_threads=7, tiles_at_once=3, prefill_chunk=9)
    assert token_folder._encoder_key(bundle, same) == keys[0]
    for part in (f"'{bundle.digest}'", "onnxruntime ", mobilevlm.__version__):
        assert part in keys[0]
    open_token_folder(tmp_path, None, bundle, plan).put(A, rows_of(0))
    assert open_token_folder(tmp_path, None, *changes[1]).get(A) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cache_dir": 7}, "cache_dir is 7, expected the path of a folder"),
        ({"cache_dir": ""}, "cache_dir is '', expected the path of a folder"),
        ({"cache_dir_mb": 5}, "cache_dir_mb goes with cache_dir"),
        ({"cache_dir": "here", "cache_dir_mb": 0}, "cache_dir_mb is 0, expected megabytes, more"),
        ({"cache_dir": "/proc/none"}, "cache_dir /proc/none: visual tokens cannot be kept there"),
        ({"cache_dir": __file__}, "cannot be kept there .*: give a folder that can be written to"),
    ],
    ids=str,
)
def test_a_folder_or_size_that_is_none_is_one_line(
    given: dict[str, Any], message: str, bundle_of: BundleOf
) -> None:
    with pytest.raises(MobileVLMError, match=message) as caught:
        mobilevlm.load(bundle_of("tiny", "int8"), **given)
    assert "\n" not in str(caught.value)


def test_run_says_that_an_image_was_not_encoded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = Path(__file__).parents[1] / "data" / "mobilevlm_v2" / "image.png"
    options = ["--image", str(image), "-p", "What is it?", "-n", "3", "--json", "--threads", "1"]
    folder = ["--cache-dir", str(tmp_path), "--cache-dir-size", "5MB"]
    answers = []
    for given in ([], folder, folder):
        main(["run", "nano", *options, *given])
        answers.append(json.loads(capsys.readouterr().out))
    assert [answer["reused"]["images"] for answer in answers] == [0, 0, 1]
    assert len({answer["text"] for answer in answers}) == 1 and len(files_in(tmp_path)) == 1


def test_serve_loads_models_with_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {}

    def load(path: Path, **keywords: Any) -> None:
        given.update(keywords)
        raise MobileVLMError("seen")

    monkeypatch.setattr(models, "load", load)
    monkeypatch.setattr(serving, "serve", lambda settings, served, ready: served._loaded(
        served._entries["nano"], 0.0
    ))  # fmt: skip
    refusal(capsys, "serve", "nano", "--cache-dir", tmp_path, "--cache-dir-size", "2GB")
    assert (given["cache_dir"], given["cache_dir_mb"]) == (tmp_path, 2000)

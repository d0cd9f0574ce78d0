"""``mobilevlm inspect FILE.gguf``: the spec in the metadata, and files that lie about it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from conftest import Fixture, refusal

from mobilevlm.cli import main
from mobilevlm.console.progress import ignore
from mobilevlm.errors import BundleError
from mobilevlm.export.gguf.decoder import write_decoder
from mobilevlm.export.gguf.mmproj import write_mmproj
from mobilevlm.gguf.file import read_gguf
from mobilevlm.gguf.spec import decoder_spec

MUTATIONS = 2000


def written(path: Path, describe: Callable[[gguf.GGUFWriter], None], arch: str = "llama") -> Path:
    """A file of one tensor with these keys."""
    writer = gguf.GGUFWriter(path, arch)
    describe(writer)
    writer.add_tensor("token_embd.weight", np.zeros((8, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_spec_of_our_file_is_the_spec_of_the_checkpoint(
    fixture: Fixture, tmp_path: Path
) -> None:
    write_decoder(fixture.model, "q8_0", tmp_path / "d.gguf", ignore)
    found, expected = decoder_spec(read_gguf(tmp_path / "d.gguf")), fixture.model.spec.decoder
    for name in expected.__dataclass_fields__:
        value = getattr(expected, name)
        same = pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
        assert getattr(found, name) == same, name


@pytest.mark.parametrize("stage", ["decoder", "mmproj"])
def test_both_files_are_shown(
    llava_v1: Fixture, tmp_path: Path, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.gguf"
    write = write_decoder if stage == "decoder" else write_mmproj
    write(llava_v1.model, "f16", path, ignore)
    main(["inspect", str(path)])
    out = capsys.readouterr().out
    assert "general.architecture" in out and "F16" in out
    assert ("hidden_size 64" in out) == (stage == "decoder")
    main(["inspect", str(path), "--json"])
    data = json.loads(capsys.readouterr().out)
    assert data["architecture"] == ("llama" if stage == "decoder" else "clip")
    assert (data["decoder"] is None) == (stage == "mmproj")
    assert len(data["tensors"]) > 30


def test_what_stands_in_the_way_of_running_a_file_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "x.gguf", lambda writer: writer.add_bool("llama.swin_norm", True))
    main(["inspect", str(path)])
    assert "cannot be run or exported: " in capsys.readouterr().out
    main(["inspect", str(path), "--json"])
    data = json.loads(capsys.readouterr().out)
    assert data["decoder"] is None and "swin_norm' is True: a model of anot" in data["obstacle"]


def test_text_that_would_move_the_cursor_is_not_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "x.gguf", lambda writer: writer.add_string("a", "\x1b[2J[bold]x"))
    main(["inspect", str(path)])
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\ufffd[2J[bold]x" in out


def _complete(writer: gguf.GGUFWriter) -> None:
    writer.add_embedding_length(4)
    writer.add_head_count(2)
    writer.add_feed_forward_length(8)
    writer.add_block_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_context_length(16)


def test_missing_keys_have_llama_cpps_defaults(tmp_path: Path) -> None:
    spec = decoder_spec(read_gguf(written(tmp_path / "x.gguf", _complete)))
    assert (spec.num_key_value_heads, spec.head_dim, spec.rope_theta) == (2, 2, 10000.0)
    assert spec.tie_word_embeddings and spec.rope_scaling == 1.0 and spec.vocab_size == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda writer: writer.add_head_count(3), "head_count: found 4 and 3"),
        (lambda writer: writer.add_block_count(0), "'llama.block_count' is 0"),
        (lambda writer: writer.add_expert_count(4), "a decoder with experts"),
        (lambda writer: writer.add_rope_freq_base(-1.0), "'llama.rope.freq_base' is -1.0"),
        (lambda writer: writer.add_string("llama.context_length", "many"), "'many' of type"),
        (lambda writer: writer.add_string("llama.rope.scaling.type", "yarn"), "scaling 'yarn'"),
    ],
)
def test_metadata_that_is_no_spec_is_refused_in_one_line(
    tmp_path: Path, change: Callable[[gguf.GGUFWriter], None], message: str
) -> None:
    def describe(writer: gguf.GGUFWriter) -> None:
        _complete(writer)
        change(writer)

    with pytest.raises(BundleError, match=message) as refused:
        decoder_spec(read_gguf(written(tmp_path / "x.gguf", describe)))
    assert "\n" not in str(refused.value)


def test_another_architecture_has_no_spec(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="architecture 'gpt2', expected 'llama'"):
        decoder_spec(read_gguf(written(tmp_path / "x.gguf", _complete, "gpt2")))


def test_a_file_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such file" in refusal(capsys, "inspect", "/nowhere/x.gguf")


def test_mutated_headers_give_a_spec_or_one_line(llava_v1: Fixture, tmp_path: Path) -> None:
    """2,000 files with a few bytes of the first 1,500 changed."""
    write_decoder(llava_v1.model, "q4_0", tmp_path / "d.gguf", ignore)
    content = (tmp_path / "d.gguf").read_bytes()
    path, generator, refused = tmp_path / "x.gguf", random.Random(0), 0
    for _ in range(MUTATIONS):
        damaged = bytearray(content)
        for _ in range(generator.randrange(1, 4)):
            damaged[generator.randrange(1500)] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            decoder_spec(read_gguf(path))
        except BundleError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 400
    assert refused > MUTATIONS // 4

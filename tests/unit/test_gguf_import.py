"""GGUF files as the source of an export."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from conftest import Fixture, refusal
from strings import seeded_strings
from test_gguf_writer import assert_same_blocks, tensors_of

import mobilevlm
from mobilevlm.console.progress import ignore
from mobilevlm.errors import BundleError, CheckpointError
from mobilevlm.export.gguf.decoder import write_decoder
from mobilevlm.export.gguf.mmproj import write_mmproj
from mobilevlm.export.gguf.source import open_gguf
from mobilevlm.export.graph.author import author_decoder
from mobilevlm.export.recipes.named import RECIPES
from mobilevlm.export.settled import in_stored_blocks
from mobilevlm.model import Model
from mobilevlm.spec import GGUFType


def written(fixture: Fixture, folder: Path, kind: GGUFType, image: GGUFType) -> tuple[Path, Path]:
    """The fixture as a pair of GGUF files."""
    decoder, mmproj = folder / "decoder.gguf", folder / "mmproj.gguf"
    write_decoder(fixture.model, kind, decoder, ignore)
    write_mmproj(fixture.model, image, mmproj, ignore)
    return decoder, mmproj


def tensor(model: Model, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    ref = model.weights._refs[name]
    return model.weights.read(name, ref.files.shape(ref.name))


def test_float32_files_are_the_checkpoint_again(fixture: Fixture, tmp_path: Path) -> None:
    """Convolutions are in float16 in every file; the checkpoints' weights fit into it, but for
    mobilevlm_v1's, which are in bfloat16."""
    model = open_gguf(*written(fixture, tmp_path, "f32", "f32"))
    expected = fixture.model
    ours, theirs = expected.spec.image, model.spec.image
    for part, found_part, expected_part in (
        ("decoder", model.spec.decoder, expected.spec.decoder),
        ("encoder", theirs.encoder, ours.encoder),
        ("connector", theirs.connector, ours.connector),
        ("preparation", theirs.preparation, ours.preparation),
    ):
        found = dataclasses.asdict(found_part)
        for key, value in dataclasses.asdict(expected_part).items():
            if (part, key) not in {("preparation", "aspect"), ("preparation", "shortest_edge")}:
                rounded = isinstance(value, (float, tuple))  # float32 in the file
                same = pytest.approx(value, rel=1e-6) if rounded else value
                assert found[key] == same, f"{part}.{key}"
    assert set(model.weights) == set(expected.weights)
    for name in expected.weights:
        convolution = name.endswith(("depthwise.weight", "peg.weight"))
        tolerance = 1e-3 if convolution else 0.0
        np.testing.assert_allclose(
            tensor(model, name), tensor(expected, name), rtol=tolerance, atol=tolerance * 1e-3
        )
    for text in list(seeded_strings(4))[:300]:
        assert model.tokenizer.encode(text).ids == expected.tokenizer.encode(text).ids


def test_a_bundle_from_gguf_gives_the_official_tokens(fixture: Fixture, tmp_path: Path) -> None:
    decoder, mmproj = written(fixture, tmp_path, "f16", "f16")
    mobilevlm.export(decoder, tmp_path / "bundle", recipe="fp32", mmproj=mmproj, measure=False)
    with mobilevlm.load(tmp_path / "bundle", "onnx") as vlm:
        found = vlm.embeds_logits(fixture.arrays["inputs_embeds"][0])
    exact = fixture.arrays["logits"][0]
    assert np.linalg.norm(found - exact) < 2e-3 * np.linalg.norm(exact)
    assert found[-1].argmax() == fixture.arrays["generated_ids"][0]


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q5_1", "q4_k_m"])
def test_quantized_files_are_read(llava_v1: Fixture, tmp_path: Path, kind: GGUFType) -> None:
    """q4_k_m needs llama.cpp to be written, not to be read."""
    if kind == "q4_k_m":
        pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    model = open_gguf(*written(llava_v1, tmp_path, kind, "q8_0"))
    assert model.spec.image.connector.depth == 1
    for name in ("decoder.layers.1.attn.q_proj.weight", "projector.mlp.0.weight"):
        found, exact = tensor(model, name), tensor(llava_v1.model, name)
        assert np.linalg.norm(found - exact) < 0.1 * np.linalg.norm(exact)


def test_q4_0_becomes_onnx_without_another_rounding(fixture: Fixture, tmp_path: Path) -> None:
    """Also where no weight of a block uses the end of the range, which rounding anew would take for
    a smaller scale: here all integers are drawn from 3 to 12."""
    decoder, mmproj = written(fixture, tmp_path, "q4_0", "f16")
    content = bytearray(decoder.read_bytes())
    random = np.random.default_rng(0)
    for found in tensors_of(decoder).values():
        if found.tensor_type.name == "Q4_0":
            blocks = found.data.reshape(-1, 18).copy()
            blocks[:, 2:] = random.integers(3, 13, (len(blocks), 16)) * 17
            content[found.data_offset : found.data_offset + blocks.size] = blocks.tobytes()
    decoder.write_bytes(content)
    model = open_gguf(decoder, mmproj)
    recipe = in_stored_blocks(RECIPES["int4"], model)
    author_decoder(model.weights, model.spec, recipe, tmp_path / "d.onnx", ignore)
    assert_same_blocks(tmp_path / "d.onnx", decoder, model.spec.decoder)


def test_a_wide_mlp_is_not_taken_for_one_linear(llava_v1: Fixture, tmp_path: Path) -> None:
    decoder, mmproj = written(llava_v1, tmp_path, "f16", "f32")
    content = bytearray(mmproj.read_bytes())
    second = tensors_of(mmproj)["mm.2.weight"]
    content[second.data_offset : second.data_offset + 4] = np.float32(0.5).tobytes()
    mmproj.write_bytes(content)
    model = open_gguf(decoder, mmproj)
    assert model.spec.image.connector.depth == 2
    with pytest.raises(CheckpointError, match=r"has shape \[128, 96\], expected \[64, 96\]"):
        model.weights.read("projector.mlp.0.weight", (64, 96))


def test_a_missing_tensor_is_named(llava_v1: Fixture, tmp_path: Path) -> None:
    decoder, mmproj = written(llava_v1, tmp_path, "f16", "f16")
    mmproj.write_bytes(mmproj.read_bytes().replace(b"v.pre_ln.bias", b"v.pre_ln.xxxx"))
    with pytest.raises(BundleError, match=r"tensor 'v\.pre_ln\.bias' is missing"):
        open_gguf(decoder, mmproj)


def test_wrong_use_gets_one_line(
    llava_v1: Fixture, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("-o", tmp_path / "b")
    alone = refusal(capsys, "export", tmp_path / "x.gguf", *out)
    assert "x.gguf: no such file" in alone
    files = ("export", tmp_path / "x.gguf", "--mmproj", tmp_path / "y.gguf", *out)
    assert "a GGUF file becomes ONNX only" in refusal(capsys, *files, "--format", "gguf")
    assert "no such file" in refusal(capsys, *files)
    folder = ("export", llava_v1.checkpoint, "--mmproj", tmp_path / "y.gguf", *out)
    assert "--mmproj goes with a GGUF file" in refusal(capsys, *folder)

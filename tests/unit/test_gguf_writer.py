"""GGUF files as they are on disk, read back with the gguf library."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx_ir
import pytest
from conftest import Fixture, fixture_named, memory_weights, refusal, tree_of
from numpy.typing import NDArray
from test_imatrix import random_matrix

import mobilevlm
from mobilevlm.bundle import open_bundle
from mobilevlm.checkpoint import Weights
from mobilevlm.cli import main
from mobilevlm.console.progress import ignore
from mobilevlm.decoder_spec import DecoderSpec, ExpertsSpec
from mobilevlm.errors import CheckpointError, MissingExtraError, MobileVLMError
from mobilevlm.export.formats.gguf import gguf_jobs
from mobilevlm.export.gguf.decoder import decoder_tensors, half_split, interleave, write_decoder
from mobilevlm.export.gguf.imatrix import write_imatrix
from mobilevlm.export.gguf.mmproj import write_mmproj
from mobilevlm.export.gguf.support import check_support
from mobilevlm.export.gguf.tensors import TYPES, Tensor, convert, write_file
from mobilevlm.export.graph.author import author_decoder
from mobilevlm.export.recipes.named import RECIPES
from mobilevlm.gguf.names import decoder_entries
from mobilevlm.model import Model
from mobilevlm.recipe import LinearFormat
from mobilevlm.spec import GGUF_TYPES, GGUFType, ModelSpec, with_image

Shapes = dict[str, tuple[int, ...]]


def tensors_of(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def fields_of(path: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def values_of(tensor: gguf.ReaderTensor) -> NDArray[np.float32]:
    """Dequantized, rows first."""
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return values.reshape(tensor.shape[::-1].tolist())


@pytest.fixture(scope="module")
def decoder_file(fixture: Fixture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(fixture.name) / "decoder.gguf"
    write_decoder(fixture.model, "f32", path, ignore)
    return path


def test_float32_tensors_are_the_checkpoint_exactly(fixture: Fixture, decoder_file: Path) -> None:
    spec, weights = fixture.model.spec.decoder, fixture.model.weights
    found = tensors_of(decoder_file)
    hidden, wide, kv = spec.hidden_size, spec.intermediate_size, spec.num_key_value_heads
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_embd": ("embed_tokens", (spec.vocab_size, hidden)),
        "output": ("lm_head", (spec.vocab_size, hidden)),
        "output_norm": ("norm", (hidden,)),
    }
    for index in range(spec.num_hidden_layers):
        ours, theirs = f"layers.{index}", f"blk.{index}"
        shapes |= {
            f"{theirs}.attn_norm": (f"{ours}.input_norm", (hidden,)),
            f"{theirs}.ffn_norm": (f"{ours}.post_attention_norm", (hidden,)),
            f"{theirs}.attn_q": (f"{ours}.attn.q_proj", (hidden, hidden)),
            f"{theirs}.attn_k": (f"{ours}.attn.k_proj", (kv * spec.head_dim, hidden)),
            f"{theirs}.attn_v": (f"{ours}.attn.v_proj", (kv * spec.head_dim, hidden)),
            f"{theirs}.attn_output": (f"{ours}.attn.o_proj", (hidden, hidden)),
            f"{theirs}.ffn_gate": (f"{ours}.mlp.gate_proj", (wide, hidden)),
            f"{theirs}.ffn_up": (f"{ours}.mlp.up_proj", (wide, hidden)),
            f"{theirs}.ffn_down": (f"{ours}.mlp.down_proj", (hidden, wide)),
        }
    assert set(found) == {f"{name}.weight" for name in shapes}
    for name, (ours, shape) in shapes.items():
        values = values_of(found[f"{name}.weight"])
        if name.endswith("attn_q"):
            values = half_split(values, spec.num_attention_heads)
        if name.endswith("attn_k"):
            values = half_split(values, kv)
        np.testing.assert_array_equal(values, weights.read(f"decoder.{ours}.weight", shape))


def test_metadata_says_what_the_spec_says(fixture: Fixture, decoder_file: Path) -> None:
    spec, fields = fixture.model.spec.decoder, fields_of(decoder_file)
    expected = {
        "general.architecture": "llama",
        "general.name": fixture.model.spec.name,
        "general.file_type": 0,
        "general.quantization_version": 2,
        "llama.vocab_size": spec.vocab_size,
        "llama.context_length": spec.context_length,
        "llama.embedding_length": spec.hidden_size,
        "llama.block_count": spec.num_hidden_layers,
        "llama.feed_forward_length": spec.intermediate_size,
        "llama.attention.head_count": spec.num_attention_heads,
        "llama.attention.head_count_kv": spec.num_key_value_heads,
        "llama.rope.dimension_count": spec.head_dim,
        "llama.rope.freq_base": spec.rope_theta,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": fixture.model.spec.conversation.chat_template,
    }
    assert {name: fields[name] for name in expected} == expected
    epsilon = fields["llama.attention.layer_norm_rms_epsilon"]
    assert epsilon == np.float32(spec.norm_eps)
    assert not [name for name in fields if name.startswith("llama.rope.scaling")]
    tokens = fields["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list) and len(tokens) == spec.vocab_size
    vocabulary = fixture.model.tokenizer.get_vocab()
    assert {text: index for index, text in enumerate(tokens)} == vocabulary


def test_added_tokens_are_matched_as_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "decoder.gguf"
    write_decoder(fixture_named("llava_v1_im_start_end").model, "f16", path, ignore)
    fields = fields_of(path)
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list) and isinstance(types, list)
    assert {tokens[i] for i in range(len(tokens)) if types[i] == gguf.TokenType.USER_DEFINED} == {
        "<im_patch>",
        "<im_start>",
        "<im_end>",
    }


def test_embedding_rows_without_a_token_are_padded(llava_v1: Fixture, tmp_path: Path) -> None:
    from mobilevlm.export.gguf.vocabulary import read_vocabulary

    pieces = llava_v1.model.spec.decoder.vocab_size
    vocabulary = read_vocabulary(llava_v1.checkpoint, pieces + 2)
    assert vocabulary.tokens[pieces:] == [f"[PAD{pieces}]", f"[PAD{pieces + 1}]"]
    assert vocabulary.types[pieces:] == [gguf.TokenType.UNUSED] * 2


def test_linear_position_scaling_is_written(llava_v1: Fixture, tmp_path: Path) -> None:
    model = llava_v1.model
    decoder = dataclasses.replace(model.spec.decoder, rope_scaling=2.0)
    path = tmp_path / "decoder.gguf"
    write_decoder(_with_spec(model, decoder=decoder), "f16", path, ignore)
    fields = fields_of(path)
    assert fields["llama.rope.scaling.type"] == "linear"
    assert fields["llama.rope.scaling.factor"] == 2.0


def test_tied_embeddings_are_written_once(llava_v1: Fixture) -> None:
    model = llava_v1.model
    tied = dataclasses.replace(model.spec.decoder, tie_word_embeddings=True)
    names = [tensor.name for tensor in decoder_tensors(model.weights, tied, "f16", ignore)]
    assert "token_embd.weight" in names and "output.weight" not in names


def test_the_mmproj_file_holds_every_kept_layer(fixture: Fixture, tmp_path: Path) -> None:
    path = tmp_path / "mmproj.gguf"
    write_mmproj(fixture.model, "f16", path, ignore)
    vision, projector = fixture.model.spec.image.transformer, fixture.model.spec.image.connector
    fields, tensors = fields_of(path), tensors_of(path)
    assert fields["general.architecture"] == "clip"
    assert fields["clip.projector_type"] == projector.kind
    assert fields["clip.vision.block_count"] == vision.num_hidden_layers
    assert fields["clip.vision.feature_layer"] == [vision.num_hidden_layers]
    assert fields["clip.vision.projection_dim"] == projector.out_size
    layers = {name.split(".")[2] for name in tensors if name.startswith("v.blk.")}
    assert layers == {str(index) for index in range(vision.num_hidden_layers)}
    types = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert types["v.blk.0.ffn_up.weight"] == "F16"
    assert types["v.blk.0.ln1.weight"] == types["v.position_embd.weight"] == "F32"
    up = tensors["v.blk.0.ffn_up.weight"].shape.tolist()
    assert up == [vision.hidden_size, vision.intermediate_size]


def test_the_one_linear_projector_is_its_own_difference_of_gelus(tmp_path: Path) -> None:
    """gelu(z) − gelu(−z) = z, with exact GELU too; in float32 to rounding."""
    model = fixture_named("llava_v1").model
    path = tmp_path / "mmproj.gguf"
    write_mmproj(model, "f32", path, ignore)
    found = {name: values_of(tensor) for name, tensor in tensors_of(path).items()}
    spec = model.spec.image.connector
    weight = model.weights.read("projector.mlp.0.weight", (spec.out_size, spec.in_size))
    bias = model.weights.read("projector.mlp.0.bias", (spec.out_size,))
    features = np.random.default_rng(0).standard_normal((5, spec.in_size), np.float32)
    inner = features @ found["mm.0.weight"].T + found["mm.0.bias"]
    gelu = 0.5 * inner * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
    out = gelu @ found["mm.2.weight"].T + found["mm.2.bias"]
    np.testing.assert_allclose(out, features @ weight.T + bias, atol=1e-5)


def test_q4_onnx_and_q4_0_hold_the_same_integers_and_scales(
    fixture: Fixture, tmp_path: Path
) -> None:
    """One quantization, two containers, where the recipe has blocks of 32 rounded to nearest."""
    model, layers = fixture.model, LinearFormat("q4")
    recipe = dataclasses.replace(RECIPES["int4"], decoder=layers, lm_head=layers, layers={})
    author_decoder(model.weights, model.spec, recipe, tmp_path / "d.onnx", ignore)
    write_decoder(model, "q4_0", tmp_path / "d.gguf", ignore)
    assert_same_blocks(tmp_path / "d.onnx", tmp_path / "d.gguf", model.spec.decoder)


def assert_same_blocks(onnx: Path, path: Path, spec: DecoderSpec) -> None:
    """Integers and scales of every MatMulNBits are those of the Q4_0 file, q and k apart, whose
    rows stand in another order."""
    tensors = tensors_of(path)
    checked = 0
    for node in onnx_ir.load(onnx).graph:
        if node.op_type != "MatMulNBits":
            continue
        packed = node.inputs[1].const_value.numpy()
        scales = node.inputs[2].producer().inputs[0].const_value.numpy()  # behind a Cast
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
        parts = []
        for name in _parts(node.inputs[1].name):
            part_codes, part_scales = _q4_0_parts(tensors[name])
            heads = {"attn_q": spec.num_attention_heads, "attn_k": spec.num_key_value_heads}
            if count := heads.get(name.split(".")[-2]):
                part_codes = half_split(part_codes, count)
                part_scales = half_split(part_scales, count)
            parts.append((part_codes, part_scales))
        np.testing.assert_array_equal(codes, np.concatenate([part[0] for part in parts]))
        np.testing.assert_array_equal(scales, np.concatenate([part[1] for part in parts]))
        checked += len(parts)
    assert checked == 7 * spec.num_hidden_layers + 1


def _parts(name: str) -> list[str]:
    """GGUF tensors that a MatMulNBits weight is made of."""
    if "lm_head" in name:
        return ["output.weight"]
    _, _, layer, *_, linear, _ = name.split(".")
    names = {
        "qkv": ("attn_q", "attn_k", "attn_v"),
        "o_proj": ("attn_output",),
        "gate_up": ("ffn_gate", "ffn_up"),
        "down_proj": ("ffn_down",),
    }[linear]
    return [f"blk.{layer}.{part}.weight" for part in names]


def _q4_0_parts(tensor: gguf.ReaderTensor) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Integers ``(rows, columns)`` and scales ``(rows, blocks)``, as ggml lays them out."""
    blocks = tensor.data.reshape(len(tensor.data), -1, 18)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    nibbles = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], axis=-1)
    return nibbles.reshape(len(blocks), -1), scales


def test_our_q4_0_is_what_the_gguf_library_makes() -> None:
    values = np.random.default_rng(1).standard_normal((40, 96), np.float32)
    ours, error = convert(values, "q4_0")
    theirs = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_0)
    np.testing.assert_array_equal(ours, theirs)
    restored = gguf.quants.dequantize(ours, gguf.GGMLQuantizationType.Q4_0)
    assert error == pytest.approx(np.linalg.norm(restored - values) / np.linalg.norm(values))


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_is_read_back_within_its_precision(kind: GGUFType, tmp_path: Path) -> None:
    values = np.random.default_rng(2).standard_normal((33, 64), np.float32)
    path = tmp_path / "x.gguf"
    tensor = Tensor("x", values.shape, kind, [lambda: values])
    errors = write_file(path, "test", lambda writer: None, [tensor])
    found = values_of(tensors_of(path)["x"])
    error = np.linalg.norm(found - values) / np.linalg.norm(values)
    limits = {"f32": 0, "f16": 3e-4, "bf16": 3e-3, "q8_0": 0.006, "q5_0": 0.05, "q5_1": 0.05}
    assert error <= limits.get(kind, 0.1)
    if kind in errors:
        assert errors[kind] == pytest.approx(error, rel=1e-3)


def test_rows_that_do_not_divide_into_blocks_stay_float16(tmp_path: Path) -> None:
    tensor = Tensor("x", (4, 40), "q4_0", [lambda: np.ones((4, 40), np.float32)])
    write_file(tmp_path / "x.gguf", "test", lambda writer: None, [tensor])
    assert tensors_of(tmp_path / "x.gguf")["x"].tensor_type.name == "F16"


def test_weights_beyond_float16_are_saturated() -> None:
    data, _ = convert(np.array([[1e6, -1e6, 1.0]], np.float32), "f16")
    assert data.tolist() == [[65504.0, -65504.0, 1.0]]


def test_interleaving_pairs_the_halves() -> None:
    rows = np.arange(8, dtype=np.float32)[:, None]
    assert interleave(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert half_split(interleave(rows, 2), 2).tolist() == rows.tolist()


@pytest.mark.parametrize("kind", ["f16", "q4_0", "q8_0"])
def test_the_same_input_gives_the_same_bytes(
    llava_v1: Fixture, tmp_path: Path, kind: GGUFType
) -> None:
    for name in ("a", "b"):
        write_decoder(llava_v1.model, kind, tmp_path / f"{name}.gguf", ignore)
        write_mmproj(llava_v1.model, kind, tmp_path / f"m{name}.gguf", ignore)
    for prefix in ("", "m"):
        first, second = (tmp_path / f"{prefix}{name}.gguf" for name in ("a", "b"))
        assert first.read_bytes() == second.read_bytes()


def test_memory_holds_about_one_tensor(tmp_path: Path) -> None:
    """Eight layers of 1 M weights each; four copies of the largest tensor are allowed."""
    spec = DecoderSpec(512, 256, 1024, 8, 4, 4, 64, 1e-6, 1e4, 1.0, 512, False)
    weights = _decoder_weights(spec, tmp_path)
    tensors = decoder_tensors(weights, spec, "q8_0", ignore)
    tracemalloc.start()
    write_file(tmp_path / "d.gguf", "llama", lambda writer: None, tensors)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    largest = 4 * 1024 * 256
    assert peak < 5 * largest
    assert (tmp_path / "d.gguf").stat().st_size > 6 * largest


def test_memory_holds_what_is_stored_of_a_stack_and_one_expert(tmp_path: Path) -> None:
    """Sixteen experts of 1 MB as a stack in q8_0, a quarter of what all values take; five copies of
    an expert are allowed beside it."""
    plain = DecoderSpec(512, 256, 1024, 1, 4, 4, 64, 1e-6, 1e4, 1.0, 512, False)
    spec = dataclasses.replace(plain, experts=ExpertsSpec((0,), (16,), 2))
    shapes = {name: entry.shape for entry in decoder_entries(spec) for name in entry.parts}
    tensors = decoder_tensors(memory_weights(shapes, tmp_path), spec, "q8_0", ignore)
    tracemalloc.start()
    write_file(tmp_path / "d.gguf", "moe-llava-llama", lambda writer: None, tensors)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    expert = 4 * 1024 * 256
    stack = 16 * 1024 * 256 // 32 * 34
    assert peak < stack + 5 * expert < 10 * expert
    assert (tmp_path / "d.gguf").stat().st_size > 3 * stack


def _decoder_weights(spec: DecoderSpec, folder: Path) -> Weights:
    hidden, wide = spec.hidden_size, spec.intermediate_size
    shapes: Shapes = {
        "decoder.embed_tokens.weight": (spec.vocab_size, hidden),
        "decoder.norm.weight": (hidden,),
        "decoder.lm_head.weight": (spec.vocab_size, hidden),
    }
    for index in range(spec.num_hidden_layers):
        layer = f"decoder.layers.{index}"
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{layer}.attn.{part}.weight"] = (hidden, hidden)
        for part in ("gate_proj", "up_proj"):
            shapes[f"{layer}.mlp.{part}.weight"] = (wide, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, wide)
        for part in ("input_norm", "post_attention_norm"):
            shapes[f"{layer}.{part}.weight"] = (hidden,)
    return memory_weights(shapes, folder)


def _with_spec(model: Model, **parts: Any) -> Model:
    return dataclasses.replace(model, spec=dataclasses.replace(model.spec, **parts))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("connector", {"kind": "mlp", "depth": 3}, "no MLP projector with 3 layers"),
        ("connector", {"kind": "ldpv2", "grid": 16}, "LDPV2 projector takes 24 × 24 patches"),
        ("connector", {"kind": "ldp", "grid": 23}, "LDP projector takes 24 × 24 patches"),
        ("encoder", {"intermediate_size": 64}, "MLP layers apart by their sizes"),
    ],
)
def test_what_llama_cpp_has_no_graph_for_is_refused(
    mobilevlm_v2: Fixture, part: str, change: dict[str, object], message: str
) -> None:
    spec: ModelSpec = mobilevlm_v2.model.spec
    changed = dataclasses.replace(getattr(spec.image, part), **change)
    with pytest.raises(MobileVLMError, match=message):
        check_support(with_image(spec, **{part: changed}))


def test_a_checkpoint_without_scores_is_refused(llava_v1: Fixture, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(llava_v1.checkpoint, folder)
    llava_v1.model.tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer.model").unlink()
    model = dataclasses.replace(llava_v1.model, tokenizer_folder=folder)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: the file is missing"):
        write_decoder(model, "f16", tmp_path / "d.gguf", ignore)


@pytest.fixture
def without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in sys.modules if name.startswith("llama_cpp")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    yield


def test_k_quants_without_llama_cpp_name_the_extra(
    llava_v1: Fixture, without_llama_cpp: None
) -> None:
    recipe = dataclasses.replace(RECIPES["int4"], gguf="q4_k_m")
    with pytest.raises(MissingExtraError, match=r"q4_k_m needs .*llama-cpp-python.*\[gguf\]"):
        gguf_jobs(llava_v1.model, recipe)


def test_importance_without_llama_cpp_names_the_extra(
    llava_v1: Fixture, tmp_path: Path, without_llama_cpp: None
) -> None:
    """Types that use an importance matrix are then rounded by ggml."""
    path = tmp_path / "i.gguf"
    write_imatrix(random_matrix(llava_v1.model.spec.decoder), path)
    recipe = dataclasses.replace(RECIPES["int4"], gguf="q4_0", gguf_imatrix=str(path))
    with pytest.raises(MissingExtraError, match=r"an importance matrix needs .*\[gguf\]"):
        gguf_jobs(llava_v1.model, recipe)


def test_recipes_have_gguf_types_of_their_own(llava_v1: Fixture) -> None:
    types = {
        name: [job.artifact.precision for job in gguf_jobs(llava_v1.model, recipe)]
        for name, recipe in RECIPES.items()
    }
    assert types == {
        "fp32": ["f32", "f32"],
        "fp16-weights": ["f16", "f16"],
        "int8": ["f16", "q8_0"],
        "int8-calibrated": ["f16", "q8_0"],
        "int8-portable": ["f16", "q8_0"],
        "int4": ["f16", "q4_k_m"],
        "fast": ["f16", "q4_k_m"],
        "int4-small": ["f16", "q4_k_m"],
        "a16w8": ["f16", "q8_0"],
        "a8w8": ["f16", "q8_0"],
    }


def test_a_gguf_bundle_has_no_embedding_table_and_opens(
    llava_v1: Fixture, tmp_path: Path, without_llama_cpp: None
) -> None:
    """Exporting needs llama.cpp for the K-quants only."""
    for name in ("a", "b"):
        mobilevlm.export(
            llava_v1.checkpoint,
            tmp_path / name,
            formats=["gguf"],
            gguf_type="q4_0",
            vision_tower=llava_v1.tower,
        )
    manifest = open_bundle(tmp_path / "a").manifest
    assert manifest.embeddings is None
    assert [artifact.path for artifact in manifest.artifacts] == [
        "gguf/mmproj-checkpoint-F16.gguf",
        "gguf/checkpoint-Q4_0.gguf",
    ]
    assert set(manifest.tools) == {"mobilevlm-edge", "gguf"}
    worst = manifest.artifacts[1].largest_weight_error
    assert worst is not None and 0.05 < worst.relative_error < 0.15
    assert not manifest.quality.measured and "[gguf]" in manifest.quality.note
    assert tree_of(tmp_path / "a") == tree_of(tmp_path / "b")


def test_another_format_joins_what_is_there(
    llava_v1: Fixture, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Artifacts of both formats are reused by their keys."""
    bundle = tmp_path / "bundle"
    places = llava_v1.checkpoint, "--vision-tower", llava_v1.tower, "-o", bundle
    arguments = [str(place) for place in places]
    main(["export", *arguments, "--no-measure", "--format", "gguf"])
    main(["export", *arguments, "--no-measure", "--format", "all", "--gguf-type", "q8_0"])
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines if "unchanged, reused" in line] == [
        "gguf/mmproj-checkpoint-F16.gguf"
    ]
    data = json.loads((bundle / "manifest.json").read_text())
    kinds = [(artifact["format"], artifact["precision"]) for artifact in data["artifacts"]]
    assert kinds == [
        ("onnx", "int8"), ("onnx", "fp16"), ("onnx", "q4"), ("gguf", "f16"), ("gguf", "q8_0"),
    ]  # fmt: skip
    assert data["recipe"]["gguf"] == "q8_0"


def test_the_command_line_knows_every_type(capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "export", "x", "-o", "y", "--gguf-type", "q3")
    for kind in GGUF_TYPES:
        assert kind in message

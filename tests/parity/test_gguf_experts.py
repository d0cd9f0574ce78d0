"""Decoders with sparse experts as GGUF files of our own architectures, in the engine ``ggml``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import MOE_FIXTURES, Fixture, fixture_named, memory_weights, relative_error
from numpy.typing import NDArray

import mobilevlm
from mobilevlm.builtin import checkpoint_path
from mobilevlm.bundle import open_bundle
from mobilevlm.console.progress import ignore
from mobilevlm.errors import MobileVLMError
from mobilevlm.export.gguf.decoder import write_decoder
from mobilevlm.export.gguf.mmproj import write_mmproj
from mobilevlm.export.gguf.source import open_gguf
from mobilevlm.families import open_checkpoint
from mobilevlm.gguf.file import read_gguf
from mobilevlm.gguf.model import model_spec
from mobilevlm.gguf.names import decoder_entries
from mobilevlm.gguf.spec import bytes_per_token, decoder_spec
from mobilevlm.gguf.tokenizer import gguf_tokenizer
from mobilevlm.model import Model, OpenOptions
from mobilevlm.prompt import Rows
from mobilevlm.reference import ReferenceModel, load_reference
from mobilevlm.runtime import VLM
from mobilevlm.runtime.engines.ggml.engine import GgmlDecoder
from mobilevlm.spec import GGUFType

pytestmark = pytest.mark.skipif(
    os.environ.get("MOBILEVLM_WITHOUT_LLAMA") == "1", reason="asked to go without llama.cpp"
)

ARCHITECTURES = {
    "moe_llava_stablelm": "moe-llava-stablelm",
    "moe_llava_phi2": "moe-llava-phi2",
    "moe_llava_qwen": "moe-llava-qwen",
}
EXACT = 1e-5
"""Tolerance of logits; another order of summation in float32 makes up to 2e-6."""
NEW_TOKENS = 24

Written = Callable[[GGUFType], Path]


@pytest.fixture(scope="module", params=MOE_FIXTURES)
def sparse(request: pytest.FixtureRequest) -> Fixture:
    return fixture_named(request.param)


@pytest.fixture(scope="module")
def written(sparse: Fixture, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The fixture's decoder in a type, each written once."""
    folder = tmp_path_factory.mktemp(sparse.name)

    def write(kind: GGUFType) -> Path:
        path = folder / f"decoder-{kind}.gguf"
        if not path.exists():
            write_decoder(sparse.model, kind, path, ignore)
        return path

    return write


@pytest.fixture(scope="module")
def bundle(sparse: Fixture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(sparse.name) / "bundle"
    mobilevlm.export(
        sparse.checkpoint,
        folder,
        recipe="fp32",
        vision_tower=sparse.tower,
        formats=("onnx", "gguf"),
        measure=False,
    )
    return folder


@pytest.fixture(scope="module")
def vlm(bundle: Path) -> Iterator[VLM]:
    with mobilevlm.load(bundle, "ggml") as model:
        yield model


def test_f32_prompt_logits_are_the_official_ones(sparse: Fixture, vlm: VLM) -> None:
    found = vlm.prompt_logits(sparse.expected["user_prompt"], [sparse.image])
    assert relative_error(found, sparse.logits) <= EXACT
    assert (found.argmax(-1) == sparse.logits.argmax(-1)).all()


def test_f32_greedy_tokens_and_text_are_the_official_ones(sparse: Fixture, vlm: VLM) -> None:
    prompt = sparse.expected["user_prompt"]
    answer = vlm.generate(prompt, [sparse.image], max_new_tokens=NEW_TOKENS, ignore_eos=True)
    assert answer.token_ids == sparse.generated_ids
    assert answer.text == sparse.model.tokenizer.decode(sparse.generated_ids)


def test_the_files_alone_answer_like_the_official_code(sparse: Fixture, bundle: Path) -> None:
    """Tokenizer, conversation and experts come from the file, visual tokens from mtmd."""
    mmproj = next((bundle / "gguf").glob("mmproj*.gguf"))
    decoder = next(path for path in (bundle / "gguf").iterdir() if path != mmproj)
    with mobilevlm.load(decoder, mmproj=mmproj) as files:
        assert files.engine == "ggml"
        prompt = sparse.expected["user_prompt"]
        assert files.prompt_ids(prompt, 1) == sparse.arrays["input_ids"][0].tolist()
        answer = files.generate(prompt, [sparse.image], max_new_tokens=NEW_TOKENS, ignore_eos=True)
    assert answer.token_ids == sparse.generated_ids


@pytest.mark.parametrize("engine", ["gguf", "hybrid"])
def test_the_engines_of_llama_cpp_are_refused_with_the_reason(bundle: Path, engine: str) -> None:
    with pytest.raises(MobileVLMError, match=r"llama.cpp has no architecture .*--engine ggml"):
        mobilevlm.load(bundle, engine)


def test_going_back_and_on_gives_the_same_logits(sparse: Fixture, written: Written) -> None:
    decoder = GgmlDecoder(written("f32"), sparse.model.spec.decoder, 1)
    hidden = sparse.model.spec.decoder.hidden_size
    embeds = np.random.default_rng(0).standard_normal((520, hidden), np.float32)  # two chunks
    state = decoder.new_state()
    whole = decoder.prefill(state, Rows(embeds), count=None)
    assert relative_error(decoder.prefill(decoder.new_state(), Rows(embeds))[0], whole[-1]) <= EXACT
    state.rewind(300)
    assert relative_error(decoder.prefill(state, Rows(embeds[300:])), whole[-1:]) <= EXACT
    for position in (519, 256, 255, 250):  # on both sides of a new graph
        state.rewind(position)
        one = decoder.prefill(state, Rows(embeds[position : position + 1]))
        assert relative_error(one, whole[position : position + 1]) <= EXACT


def test_the_header_says_what_the_spec_says(sparse: Fixture, written: Written) -> None:
    header = read_gguf(written("f32"))
    assert header.architecture == ARCHITECTURES[sparse.name]
    mmproj = header.path.with_name("mmproj.gguf")
    write_mmproj(sparse.model, "f32", mmproj, ignore)
    found, expected = model_spec(header, read_gguf(mmproj)), sparse.model.spec
    assert found.decoder.norm_eps == pytest.approx(expected.decoder.norm_eps, rel=1e-6)
    for field in ("experts", "norm", "qkv_bias", "o_bias", "mlp", "hidden_act", "mlp_bias",
                  "parallel_residual", "lm_head_bias", "rotary_channels", "head_dim",
                  "rope_theta", "vocab_size", "num_key_value_heads"):  # fmt: skip
        assert getattr(found.decoder, field) == getattr(expected.decoder, field), field
    assert found.conversation == expected.conversation
    assert gguf_tokenizer(header).to_str() == sparse.model.tokenizer.to_str()
    tokens = header.metadata["tokenizer.ggml.tokens"]
    vocabulary = sparse.model.tokenizer.get_vocab()
    assert len(tokens) == expected.decoder.vocab_size
    assert all(tokens[index] == text for text, index in vocabulary.items())


def test_experts_lie_one_behind_the_other_under_the_names_of_llama_cpp(
    sparse: Fixture, written: Written
) -> None:
    spec, weights = sparse.model.spec.decoder, sparse.model.weights
    readers, maker = spec.mlp_linears
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(written("f32")).tensors}
    theirs = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "fc1": "up", "fc2": "down"}
    for linear in (*readers, maker):
        shape = spec.hidden_size, spec.intermediate_size
        shape = shape if linear == maker else shape[::-1]
        for layer in (0, 2):
            name = f"decoder.layers.{layer}.mlp.experts.{{}}.{linear}.weight"
            expected = np.stack([weights.read(name.format(index), shape) for index in range(4)])
            found = tensors[f"blk.{layer}.ffn_{theirs[linear]}_exps.weight"]
            assert np.array_equal(found.data, expected)
        assert f"blk.1.ffn_{theirs[linear]}.weight" in tensors
    router = tensors["blk.0.ffn_gate_inp.weight"]
    assert np.array_equal(router.data, weights.read("decoder.layers.0.mlp.router.weight", (4, 64)))
    assert set(tensors) == {entry.theirs for entry in decoder_entries(spec)}


def test_a_token_reads_two_of_four_experts(sparse: Fixture, written: Written, bundle: Path) -> None:
    spec, header = sparse.model.spec.decoder, read_gguf(written("f32"))
    idle = sum(tensor.size for name, tensor in header.tensors.items() if "_exps" in name) // 2
    table = header.tensors["token_embd.weight"]
    everything = sum(tensor.size for tensor in header.tensors.values())
    needed = everything - idle - table.size + table.row_size
    assert bytes_per_token(header, spec) == needed
    assert open_bundle(bundle).artifact("decoder", "gguf").bytes_per_token == needed


def test_a_dense_mlp_beside_the_experts_equals_the_reference(
    sparse: Fixture, tmp_path: Path
) -> None:
    """DeepSpeed's Residual-MoE, which no fixture has; random weights, MLPs of all three kinds."""
    decoder = sparse.model.spec.decoder
    assert decoder.experts is not None
    experts = replace(decoder.experts, use_residual=True)
    spec = replace(sparse.model.spec, decoder=replace(decoder, experts=experts))
    with torch.device("meta"):
        shapes = {name: tuple(x.shape) for name, x in ReferenceModel(spec).named_parameters()}
    model = replace(sparse.model, spec=spec, weights=memory_weights(shapes, tmp_path / "weights"))
    path = tmp_path / "decoder.gguf"
    write_decoder(model, "f32", path, ignore)
    header = read_gguf(path)
    assert decoder_spec(header).experts == experts
    shared = [name for name in header.tensors if "_shexp" in name and name.startswith("blk.2.")]
    readers, maker = decoder.mlp_linears
    per_linear = 2 if decoder.mlp_bias else 1
    assert len(shared) == 2 + per_linear * len((*readers, maker))
    engine = GgmlDecoder(path, spec.decoder, 1)
    embeds = np.random.default_rng(0).standard_normal((40, decoder.hidden_size), np.float32)
    state = engine.new_state()
    found = engine.prefill(state, Rows(embeds), count=None)
    with torch.no_grad():
        expected = load_reference(model).logits(torch.from_numpy(embeds)).numpy()
    assert relative_error(found, expected) <= EXACT
    state.rewind(39)
    one = engine.prefill(state, Rows(embeds[39:]))
    assert relative_error(one, expected[39:]) <= EXACT


# Relative error of a position's logits to those of the same, dequantized weights in float32: that
# of the best tenth, since rounding makes some tokens choose another expert, which those behind them
# see. ggml rounds activations to the type of the weights, for q8_0 and q4_0 to 8 bits.
ROUNDED: dict[GGUFType, float] = {
    "f16": 2e-3,
    "bf16": 2e-2,
    "q8_0": 5e-2,
    "q4_0": 5e-2,
    "q4_k_m": 5e-2,
}


def rounding_error(model: Model, path: Path, embeds: NDArray[np.float32]) -> float:
    """Return the rounding error of a position's logits."""
    spec = model.spec.decoder

    def logits(path: Path) -> NDArray[np.float32]:
        decoder = GgmlDecoder(path, spec, 1)
        return decoder.prefill(decoder.new_state(), Rows(embeds), count=None)

    mmproj, restored = path.with_name("mmproj.gguf"), path.with_name("restored.gguf")
    write_mmproj(model, "f32", mmproj, ignore)
    stored = open_gguf(path, mmproj).weights
    assert set(stored) == set(model.weights)
    write_decoder(replace(model, weights=stored), "f32", restored, ignore)
    pairs = zip(logits(path), logits(restored), strict=True)
    return float(np.quantile([relative_error(*pair) for pair in pairs], 0.1))


@pytest.mark.parametrize("kind", ROUNDED)
def test_stored_types_compute_what_they_store(
    sparse: Fixture, written: Written, kind: GGUFType
) -> None:
    embeds = sparse.arrays["inputs_embeds"][0]
    assert rounding_error(sparse.model, written(kind), embeds) <= ROUNDED[kind]


@pytest.mark.parametrize("kind", ["q4_k_m", "q5_k_m", "q6_k"])
def test_k_quants_of_experts_compute_what_they_store(kind: GGUFType, tmp_path: Path) -> None:
    """In rows of 256 and 512; those of the reference data have 64 and 96."""
    model = open_checkpoint(checkpoint_path(Path("nano-moe")), OpenOptions())
    path = tmp_path / "decoder.gguf"
    write_decoder(model, kind, path, ignore)
    types = {name: tensor.type for name, tensor in read_gguf(path).tensors.items()}
    assert types["blk.0.ffn_gate_exps.weight"] == f"{kind[:4].upper()}"
    assert types["output.weight"] == "Q6_K"
    embeds = np.random.default_rng(0).standard_normal((48, 256), np.float32)
    assert rounding_error(model, path, embeds) <= ROUNDED["q8_0"]

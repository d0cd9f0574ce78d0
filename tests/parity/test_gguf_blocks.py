"""Blocks of decoders in GGUF files: each in stock llama.cpp where it has an architecture for them,
and in our own graph."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import fixture_named, memory_weights, relative_error
from numpy.typing import NDArray

import mobilevlm
from mobilevlm.console.progress import ignore
from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import BundleError, MobileVLMError
from mobilevlm.export.gguf.decoder import write_decoder
from mobilevlm.export.gguf.mmproj import write_mmproj
from mobilevlm.export.gguf.source import open_gguf
from mobilevlm.gguf.architectures import gguf_architecture
from mobilevlm.gguf.file import read_gguf
from mobilevlm.gguf.model import checked_decoder
from mobilevlm.gguf.names import decoder_entries
from mobilevlm.gguf.spec import decoder_spec
from mobilevlm.model import Model
from mobilevlm.prompt import Rows
from mobilevlm.reference.decoder import Decoder
from mobilevlm.runtime.engines.ggml.engine import GgmlDecoder
from mobilevlm.runtime.engines.llama.engine import LlamaDecoder

needs_llama = pytest.mark.skipif(
    os.environ.get("MOBILEVLM_WITHOUT_LLAMA") == "1", reason="asked to go without llama.cpp"
)
Logits = NDArray[np.float32]

HIDDEN = 64
_GEMMA = {
    "hidden_act": "gelu_new",
    "post_norms": True,
    "embed_scale": math.sqrt(HIDDEN),
    "head_dim": 32,
    "num_hidden_layers": 7,
    "tie_word_embeddings": True,
}
_GEMMA_3 = {**_GEMMA, "qk_norm": True}


@dataclass(frozen=True)
class Case:
    """Changes of a tiny Llama's spec, and the architecture that its file has."""

    architecture: str
    changes: dict[str, Any]


STOCK = {
    "wide heads": Case("llama", {"head_dim": 32}),
    "Qwen2": Case("qwen2", {"qkv_bias": True, "num_key_value_heads": 2}),
    "Qwen3": Case("qwen3", {"qk_norm": True, "head_dim": 32, "num_key_value_heads": 1}),
    "Gemma 2": Case(
        "gemma2",
        {
            **_GEMMA,
            "sliding_window": 5,
            "sliding_layers": (0, 2, 4, 6),
            "attention_softcap": 2.0,
            "logit_softcap": 3.0,
        },
    ),
    "Gemma 3": Case(
        "gemma3",
        {
            **_GEMMA_3,
            "sliding_window": 5,
            "sliding_layers": (0, 1, 2, 3, 4, 6),
            "sliding_rope_theta": 1234.0,
            "rope_scaling": 8.0,
        },
    ),
    "Gemma 3 with other sliding layers": Case(
        "gemma3",
        {
            **_GEMMA_3,
            "sliding_window": 3,
            "sliding_layers": (1, 2),
            "sliding_rope_theta": 1e4,
            "rope_theta": 1e6,
            "logit_softcap": 2.0,
            "tie_word_embeddings": False,
        },
    ),
    "Gemma 3 without a window": Case("gemma3", _GEMMA_3),
    "Gemma 3's largest": Case(
        "gemma3",
        {
            **_GEMMA_3,
            "num_hidden_layers": 62,
            "intermediate_size": 16,
            "attention_scale": (HIDDEN // 4) ** -0.5,
        },
    ),
}

OURS: dict[str, dict[str, Any]] = {
    "biases and query and key norms": {"qkv_bias": True, "qk_norm": True, "o_bias": True},
    "wide heads with biases": {"qkv_bias": True, "head_dim": 32, "num_key_value_heads": 2},
    "sliding layers": {"sliding_window": 4, "sliding_layers": (0, 2)},
    "sliding layers with scaled positions": {
        "sliding_window": 7,
        "sliding_layers": (1,),
        "sliding_rope_theta": 500.0,
        "rope_scaling": 4.0,
    },
    "soft caps": {"attention_softcap": 0.5, "logit_softcap": 0.5},
    "post norms": {"post_norms": True},
    "layer norms": {"norm": "layer", "post_norms": True, "qk_norm": True, "qkv_bias": True},
    "embedding and attention scale": {"embed_scale": 11.3, "attention_scale": 1.0},
    "a plain MLP with ReLU": {"mlp": "plain", "hidden_act": "relu", "mlp_bias": True},
    "a gated MLP with ReLU": {"hidden_act": "relu"},
    "some rotary channels": {"rotary_dim": 8, "qk_norm": True, "lm_head_bias": True},
    "parallel residuals": {"parallel_residual": True, "qk_norm": True},
}
"""Decoders that llama.cpp has no architecture for."""
ALL = STOCK | {name: Case("mobilevlm", changes) for name, changes in OURS.items()}


def tiny(changes: dict[str, Any], folder: Path) -> Model:
    """A decoder with random weights that differs from Llama by these fields."""
    model = fixture_named("mobilevlm_v2").model
    decoder = dataclasses.replace(model.spec.decoder, **changes)
    assert decoder.hidden_size == HIDDEN and decoder.num_attention_heads == 4
    shapes = {part: entry.shape for entry in decoder_entries(decoder) for part in entry.parts}
    spec = dataclasses.replace(model.spec, decoder=decoder)
    return dataclasses.replace(model, spec=spec, weights=memory_weights(shapes, folder))


def written(case: Case, folder: Path) -> tuple[Model, DecoderSpec, Path]:
    model, path = tiny(case.changes, folder / "weights"), folder / "decoder.gguf"
    write_decoder(model, "f32", path, ignore)
    return model, model.spec.decoder, path


def prompt_of(spec: DecoderSpec, length: int = 40) -> list[int]:
    ids: list[int] = np.random.default_rng(0).integers(3, spec.vocab_size, length).tolist()
    return ids


STEPS = (5, 6, 7)


def logits(engine: GgmlDecoder | LlamaDecoder, spec: DecoderSpec) -> Logits:
    """Logits of a prompt, of steps after it, and of its end again after going back."""
    embeds, state = engine.embed(prompt_of(spec)), engine.new_state()
    prompt = engine.prefill(state, Rows(embeds), count=None)
    steps = [engine.step(state, token).copy() for token in STEPS]
    state.rewind(30)
    assert np.array_equal(engine.prefill(state, Rows(embeds[30:]), count=None), prompt[30:])
    return np.concatenate([prompt, steps])


@pytest.mark.parametrize("name", ALL)
def test_a_file_says_what_the_spec_says(name: str, tmp_path: Path) -> None:
    spec, path = written(ALL[name], tmp_path)[1:]
    file = read_gguf(path)
    assert file.architecture == ALL[name].architecture
    found = decoder_spec(file)
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        rounded = isinstance(value, float)  # float32 in the file
        expected = pytest.approx(value, rel=1e-6) if rounded else value
        assert getattr(found, field.name) == expected, field.name


REFERENCE = 1e-5
"""Error of logits; float32 in another order of summation."""
GELU_TABLE = 1e-3
"""llama.cpp reads GELU from a table in float16: 1.4e-4 of the logits, found."""


@needs_llama
@pytest.mark.parametrize("name", ALL)
def test_our_graph_gives_the_logits_of_the_reference(name: str, tmp_path: Path) -> None:
    model, spec, path = written(ALL[name], tmp_path)
    assert relative_error(logits(GgmlDecoder(path, spec, 1), spec), expected(model)) <= REFERENCE


@torch.no_grad()
def expected(model: Model, length: int = 40) -> Logits:
    """The torch reference's logits of the prompt and the steps after it."""
    spec = model.spec.decoder
    decoder = Decoder(spec)
    for name, parameter in decoder.named_parameters():
        values = model.weights.read(f"decoder.{name}", tuple(parameter.shape))
        parameter.copy_(torch.from_numpy(values))
    ids = torch.tensor([[*prompt_of(spec, length), *STEPS]])
    found: Logits = decoder(decoder.embed_tokens(ids))[0].numpy()
    return found


@needs_llama
@pytest.mark.parametrize("name", STOCK)
def test_stock_llama_cpp_gives_the_logits_of_the_reference(name: str, tmp_path: Path) -> None:
    import llama

    model, spec, path = written(STOCK[name], tmp_path)
    limit = GELU_TABLE if spec.hidden_act == "gelu_new" else REFERENCE
    with llama.opened(path, 64) as decoder:
        rows = GgmlDecoder(path, spec, 1).embed(prompt_of(spec))
        given = rows / np.float32(spec.embed_scale) if name == "Gemma 2" else rows
        prompt, count = decoder.logits(given), len(rows)
        steps = [decoder.step(token, count + index) for index, token in enumerate(STEPS)]
    found = np.concatenate([prompt, steps])
    assert relative_error(found, expected(model)) <= limit


@needs_llama
@pytest.mark.parametrize("name", STOCK)
def test_our_graph_gives_the_logits_of_llama_cpp(name: str, tmp_path: Path) -> None:
    _, spec, path = written(STOCK[name], tmp_path)
    found = [logits(engine(path, spec, 1), spec) for engine in (GgmlDecoder, LlamaDecoder)]
    limit = GELU_TABLE if spec.hidden_act == "gelu_new" else 2e-6
    assert relative_error(*found) <= limit


@needs_llama
@pytest.mark.parametrize("name", ["Gemma 2", "Gemma 3", "sliding layers"])
def test_a_prompt_of_several_runs_goes_on_after_going_back_and_being_restored(
    name: str, tmp_path: Path
) -> None:
    """Longer than a run of a prompt, than the step of a graph's size, and than each window."""
    model, spec, path = written(ALL[name], tmp_path)
    length, kept = 600, 530
    whole = expected(model, length)
    limit = GELU_TABLE if spec.hidden_act == "gelu_new" else REFERENCE
    engines = [GgmlDecoder, LlamaDecoder] if name in STOCK else [GgmlDecoder]
    for made in engines:
        engine = made(path, spec, 1)
        embeds, state = engine.embed(prompt_of(spec, length)), engine.new_state()
        assert relative_error(engine.prefill(state, Rows(embeds), count=None), whole[:-3]) <= limit
        state.rewind(kept)
        segment, other = engine.save(state, 0), engine.new_state()
        engine.restore(other, segment)
        ends = [engine.prefill(one, Rows(embeds[kept:]), count=None) for one in (state, other)]
        assert np.array_equal(*ends)
        steps = [engine.step(other, token).copy() for token in STEPS]
        found = np.concatenate([ends[1], steps])
        assert relative_error(found, whole[kept:]) <= limit
        other.rewind(300)  # before what was restored, and far behind each window
        again = engine.prefill(other, Rows(embeds[300:]), count=None)
        assert relative_error(again, whole[300:-3]) <= limit


def test_names_and_keys_are_those_of_llama_cpp_s_converter(tmp_path: Path) -> None:
    path = written(STOCK["Gemma 3"], tmp_path)[-1]
    reader = gguf.GGUFReader(path)
    names = {tensor.name for tensor in reader.tensors if tensor.name.startswith("blk.0.")}
    known = gguf.MODEL_TENSORS[gguf.MODEL_ARCH.GEMMA3]
    expected = {gguf.TENSOR_NAMES[part].format(bid=0) for part in known}
    assert names == {f"{name}.weight" for name in expected if name.startswith("blk.")}
    keys = {key: reader.fields[key].contents() for key in reader.fields if "gemma3." in key}
    assert keys["gemma3.attention.sliding_window"] == 5
    assert keys["gemma3.rope.freq_base_swa"] == 1234.0
    assert keys["gemma3.rope.scaling.factor"] == 8.0
    assert keys["gemma3.attention.key_length"] == keys["gemma3.attention.value_length"] == 32
    assert "gemma3.attention.sliding_window_pattern" not in keys


@pytest.mark.parametrize(
    ("changes", "architecture"),
    [
        ({"qkv_bias": True, "head_dim": 32}, "mobilevlm"),
        ({"qkv_bias": True, "qk_norm": True}, "mobilevlm"),
        ({"sliding_window": 4, "sliding_layers": (0,)}, "mobilevlm"),
        ({"logit_softcap": 30.0}, "mobilevlm"),
        ({"post_norms": True}, "mobilevlm"),
        ({"embed_scale": 8.0}, "mobilevlm"),
        ({"attention_scale": 0.5}, "mobilevlm"),
        ({"attention_scale": 0.25}, "llama"),
        ({"rotary_dim": 16}, "llama"),
        ({"rotary_dim": 8}, "mobilevlm"),
        ({**_GEMMA_3, "embed_scale": 7.0}, "mobilevlm"),
        ({**_GEMMA_3, "attention_scale": 0.5}, "mobilevlm"),
        ({**_GEMMA_3, "hidden_act": "relu"}, "mobilevlm"),
        ({**_GEMMA_3, "attention_softcap": 50.0}, "mobilevlm"),
        (
            {
                **_GEMMA_3,
                "sliding_window": 4,
                "sliding_layers": (0,),
                "rope_scaling": 2.0,
            },
            "mobilevlm",
        ),
        ({**STOCK["Gemma 2"].changes, "tie_word_embeddings": False}, "mobilevlm"),
        ({**STOCK["Gemma 2"].changes, "rope_scaling": 2.0}, "gemma2"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_not_given_its_name(
    changes: dict[str, Any], architecture: str
) -> None:
    decoder = dataclasses.replace(fixture_named("mobilevlm_v2").model.spec.decoder, **changes)
    assert gguf_architecture(decoder) == architecture


def test_a_part_that_no_architecture_has_is_named() -> None:
    decoder = fixture_named("mobilevlm_v2").model.spec.decoder
    with pytest.raises(MobileVLMError, match="none has its learned_positions: use --format onnx"):
        gguf_architecture(dataclasses.replace(decoder, learned_positions=True))


# Files alone: read by both engines and as a model to export


def files_of(case: Case, folder: Path) -> tuple[Model, Path, Path]:
    """A decoder and the image encoder of the checkpoint that its tokenizer is from."""
    model, _, path = written(case, folder)
    mmproj = folder / "mmproj.gguf"
    write_mmproj(fixture_named("mobilevlm_v2").model, "f32", mmproj, ignore)
    return model, path, mmproj


@needs_llama
@pytest.mark.parametrize("name", ["Qwen2", "Qwen3", "Gemma 2", "Gemma 3", "sliding layers"])
def test_a_file_alone_answers_and_is_the_model_again(name: str, tmp_path: Path) -> None:
    model, path, mmproj = files_of(ALL[name], tmp_path)
    found = open_gguf(path, mmproj)
    for tensor in found.weights:
        if tensor.startswith("decoder.") and tensor in model.weights:
            shape = found.weights._refs[tensor].files.shape(tensor)
            assert np.array_equal(
                found.weights.read(tensor, shape), model.weights.read(tensor, shape)
            )
    image = np.random.default_rng(0).integers(0, 255, (28, 28, 3)).astype(np.uint8)
    own = ALL[name].architecture == "mobilevlm"
    rows = []
    for engine in ("ggml", "ggml" if own else "gguf"):
        with mobilevlm.load(path, engine, mmproj=mmproj) as vlm:
            rows.append(vlm.prompt_logits("<image>a the he", [image]))
    assert relative_error(*rows) <= GELU_TABLE
    if own:
        with pytest.raises(BundleError, match="no architecture for this decoder: use --engine g"):
            mobilevlm.load(path, "gguf", mmproj=mmproj)
        with mobilevlm.load(path, mmproj=mmproj) as vlm:
            assert vlm.engine == "ggml"


@needs_llama
@pytest.mark.parametrize("name", ["Qwen3", "Gemma 3"])
def test_a_file_alone_becomes_an_onnx_bundle(name: str, tmp_path: Path) -> None:
    """With the logits of the file, but for the visual tokens, whose GELU llama.cpp rounds."""
    _, path, mmproj = files_of(ALL[name], tmp_path)
    mobilevlm.export(path, tmp_path / "bundle", recipe="fp32", mmproj=mmproj, measure=False)
    image = np.random.default_rng(0).integers(0, 255, (28, 28, 3)).astype(np.uint8)
    rows = []
    for source, engine, vision in ((tmp_path / "bundle", "onnx", None), (path, "ggml", mmproj)):
        with mobilevlm.load(source, engine, mmproj=vision) as vlm:
            rows.append(vlm.prompt_logits("<image>a the he", [image]))
    assert relative_error(*rows) <= GELU_TABLE


@pytest.mark.parametrize(
    ("name", "add", "message"),
    [
        ("Qwen2", ("uint32", "attention.sliding_window", 64), "'qwen2.attention.sliding_window' i"),
        ("Qwen3", ("float32", "final_logit_softcapping", 30.0), "clamped or biased states"),
        ("Gemma 3", ("float32", "attn_logit_softcapping", 50.0), "clamped or biased states"),
        ("Gemma 3", ("uint32", "of_tomorrow", 1), "key 'gemma3.of_tomorrow' is not known to this"),
        ("Gemma 3", ("uint32", "attention.key_length_swa", 8), "a model of another kind"),
        ("Gemma 3", ("array", "attention.sliding_window_pattern", [True]), "for each of 7 layers"),
        (
            "Gemma 3",
            ("string", "attention.sliding_window_pattern", "x"),
            "is 'x', expected a num",
        ),
        ("Gemma 3", ("uint32", "expert_count", 4), "a decoder with experts, expected a dense one"),
        ("Gemma 2", ("float32", "rope.scaling.factor", 4.0), "does not fit what the file says of"),
        ("sliding layers", ("float32", "embedding_scale", -1.0), "-1.0, expected a positive float"),
        ("sliding layers", ("float32", "logit_scale", 2.0), "scaled states, which is not support"),
    ],
)
def test_keys_of_other_parts_are_refused_by_name(
    name: str, add: tuple[str, str, Any], message: str, tmp_path: Path
) -> None:
    path = written(ALL[name], tmp_path)[-1]
    kind, key, value = add
    file = read_gguf(path)
    key = f"{file.architecture}.{key}"
    kinds = {"uint32": "u32", "float32": "f32", "string": "string", "array": "array of bool"}
    changed = dataclasses.replace(
        file, metadata={**file.metadata, key: value}, kinds={**file.kinds, key: kinds[kind]}
    )
    if name == "Gemma 2":
        base = "gemma2.rope.freq_base_swa"
        changed.metadata[base], changed.kinds[base] = 500.0, "f32"
    with pytest.raises(BundleError, match=re.escape(message)) as refused:
        decoder_spec(changed)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


def test_a_number_of_layers_that_no_model_has_takes_no_memory(tmp_path: Path) -> None:
    path = written(ALL["Gemma 3"], tmp_path)[-1]
    file = read_gguf(path)
    file.metadata["gemma3.block_count"] = 2**31 - 1
    tracemalloc.start()
    try:
        with pytest.raises(BundleError, match="block_count is 2147483647, the file has tensors"):
            checked_decoder(file)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()

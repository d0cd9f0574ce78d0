"""Rounding by importance: smaller errors where they count, in files that stock llama.cpp loads."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import llama
import numpy as np
import pytest
from conftest import Fixture, relative_error, tree_of
from numpy.typing import NDArray
from safetensors.numpy import save_file

import mobilevlm
from mobilevlm.checkpoint import TensorFiles, TensorRef, Weights
from mobilevlm.cli import main
from mobilevlm.console.progress import ignore
from mobilevlm.export.calibration.samples import Sample
from mobilevlm.export.gguf import collect as collecting
from mobilevlm.export.gguf.collect import collect
from mobilevlm.export.gguf.decoder import write_decoder
from mobilevlm.export.gguf.imatrix import (
    ImportanceMatrix,
    InputStatistics,
    matrix_columns,
    write_imatrix,
)
from mobilevlm.export.gguf.llama_quantizer import quantize_rows
from mobilevlm.export.gguf.tensors import WEIGHABLE
from mobilevlm.model import Model
from mobilevlm.spec import GGUFType

Float32 = NDArray[np.float32]
K_QUANTS: tuple[GGUFType, ...] = ("q4_k_m", "q5_k_m", "q6_k")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return llama.wide_model(tmp_path_factory.mktemp("wide") / "wide")


def uneven_matrix(model: Model, spread: float = 1.5) -> ImportanceMatrix:
    """Mean squares as uneven as those of trained models: log-normal, a few columns far above."""
    random = np.random.default_rng(0)
    entries = {
        name: InputStatistics(np.exp(spread * random.standard_normal(size)).astype(np.float32), 1)
        for name, size in matrix_columns(model.spec.decoder).items()
        if name != "token_embd.weight"
    }
    return ImportanceMatrix(entries, ("uneven",), 1, 1)


def tensors_of(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def values_of(path: Path) -> dict[str, Float32]:
    """Dequantized, rows first."""
    return {
        name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        for name, tensor in tensors_of(path).items()
    }


@pytest.mark.parametrize("kind", WEIGHABLE)
def test_the_weighted_error_of_every_matrix_shrinks(
    wide: Model, tmp_path: Path, kind: GGUFType
) -> None:
    """By a tenth at least over all matrices: uneven columns leave much to gain."""
    matrix = uneven_matrix(wide)
    exact, plain, weighted = (tmp_path / f"{name}.gguf" for name in ("f32", "plain", "weighted"))
    write_decoder(wide, "f32", exact, ignore)
    write_decoder(wide, kind, plain, ignore)
    write_decoder(wide, kind, weighted, ignore, matrix)
    truth, without, with_it = values_of(exact), values_of(plain), values_of(weighted)
    sums = np.zeros(2)
    for name, entry in matrix.entries.items():
        weight = entry.importance
        errors = [
            float((weight * np.square(found[name] - truth[name])).sum(dtype=np.float64))
            for found in (without, with_it)
        ]
        assert errors[1] <= errors[0], name
        sums += errors
    assert sums[1] < 0.9 * sums[0]
    others = set(truth) - set(matrix.entries)
    assert "token_embd.weight" in others
    for name in others:
        np.testing.assert_array_equal(with_it[name], without[name])


@pytest.mark.parametrize("layers", [1, 2, 9])
@pytest.mark.parametrize("kind", K_QUANTS)
def test_importance_does_not_change_the_mix_of_types(
    tmp_path: Path, kind: GGUFType, layers: int
) -> None:
    """llama.cpp gives some layers a finer type, which ones depends on their number."""
    model = llama.wide_model(tmp_path / "wide", layers)
    plain, weighted = tmp_path / "plain.gguf", tmp_path / "weighted.gguf"
    write_decoder(model, kind, plain, ignore)
    write_decoder(model, kind, weighted, ignore, uneven_matrix(model))
    types = [
        {name: tensor.tensor_type.name for name, tensor in tensors_of(path).items()}
        for path in (plain, weighted)
    ]
    assert types[0] == types[1]


@pytest.mark.parametrize("kind", ["q4_0", "q4_k_m"])
def test_stock_llama_cpp_runs_the_file_and_comes_nearer(
    wide: Model, tmp_path: Path, kind: GGUFType
) -> None:
    """Norms that make the inputs of matrices uneven, as training does, and statistics collected
    from the model itself: its logits are nearer to float32 with them than without."""
    from llama_cpp import Llama

    model = with_uneven_norms(wide, tmp_path / "uneven")
    samples = [Sample(text, "", ()) for text in ("What is in the picture?", "Tell me of the sea.")]
    matrix = collect(model, samples, "texts", ignore)
    exact, plain, weighted = (tmp_path / f"{name}.gguf" for name in ("f32", "plain", "weighted"))
    write_decoder(model, "f32", exact, ignore)
    write_decoder(model, kind, plain, ignore)
    write_decoder(model, kind, weighted, ignore, matrix)
    embeds = np.random.default_rng(0).standard_normal((40, 256), np.float32)
    logits = []
    for path in (exact, plain, weighted):
        with llama.opened(path, 64) as decoder:
            logits.append(decoder.logits(embeds))
    errors = [relative_error(found, logits[0]) for found in logits[1:]]
    assert errors[1] < 0.95 * errors[0]
    stock = Llama(str(weighted), n_ctx=128, verbose=False)
    answer = stock.create_completion("What is this?", max_tokens=4, temperature=0.0)
    assert answer["usage"]["completion_tokens"] > 0
    stock.close()


def with_uneven_norms(model: Model, folder: Path) -> Model:
    """The same decoder with log-normal norm weights."""
    from mobilevlm.reference.model import ReferenceModel

    random = np.random.default_rng(1)
    tensors = {}
    for name, parameter in ReferenceModel(model.spec).named_parameters():
        values = model.weights.read(name, tuple(parameter.shape))
        if name.startswith("decoder") and "norm" in name:
            values = np.exp(random.standard_normal(values.shape)).astype(np.float32)
        tensors[name] = values
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    files = TensorFiles(folder)
    weights = Weights({name: TensorRef(files, name) for name in tensors})
    return dataclasses.replace(model, weights=weights)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"])
def test_columns_that_calibration_never_used_are_still_rounded(kind: str) -> None:
    """Without the least importance ggml's Q4_0 and Q6_K would store zeros for them."""
    number = gguf.GGMLQuantizationType[kind]
    values = np.random.default_rng(0).standard_normal((8, 512), np.float32)
    squares = np.ones(512, np.float32)
    squares[:256] = 0
    data = quantize_rows(values, number, InputStatistics(squares, 1).importance)
    restored = gguf.quants.dequantize(data, number)[:, :256]
    assert relative_error(restored, values[:, :256]) < 0.15


def test_importance_of_another_length_is_refused_before_ggml_reads_it() -> None:
    values = np.zeros((2, 64), np.float32)
    with pytest.raises(ValueError, match=r"importance of shape \(32,\) for 64 columns"):
        quantize_rows(values, gguf.GGMLQuantizationType.Q4_0, np.ones(32, np.float32))


def test_an_export_takes_a_ready_file(llava_v1: Fixture, tmp_path: Path) -> None:
    path = tmp_path / "importance.gguf"
    write_imatrix(uneven_matrix(llava_v1.model), path)
    places = ["--vision-tower", llava_v1.tower, "--no-measure", "--format", "gguf"]
    for name in ("a", "b"):
        arguments = ["export", llava_v1.checkpoint, "-o", tmp_path / name, *places]
        main([str(x) for x in [*arguments, "--gguf-type", "q4_k_m", "--imatrix", path]])
    assert tree_of(tmp_path / "a") == tree_of(tmp_path / "b")
    manifest = json.loads((tmp_path / "a/manifest.json").read_text())
    assert manifest["recipe"]["gguf_imatrix"] == "importance.gguf"
    reader = gguf.GGUFReader(tmp_path / "a/gguf/checkpoint-Q4_K_M.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["quantize.imatrix.dataset"] == "uneven"
    assert fields["quantize.imatrix.entries_count"] == len(uneven_matrix(llava_v1.model).entries)
    assert fields["quantize.imatrix.chunks_count"] == 1


def test_an_export_calibrates_once(
    llava_v1: Fixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file made from the same data is reused; with other data it is made anew."""
    shutil.copy(llava_v1.image, tmp_path / "photo.png")
    data = tmp_path / "mine.jsonl"
    calls = []

    def counted(*arguments: Any) -> ImportanceMatrix:
        calls.append(arguments)
        return collect(*arguments)

    monkeypatch.setattr(collecting, "collect", counted)

    def export(prompt: str) -> bytes:
        data.write_text(json.dumps({"image": "photo.png", "prompt": prompt, "answer": "Art."}))
        mobilevlm.export(
            llava_v1.checkpoint,
            tmp_path / "bundle",
            formats=["gguf"],
            vision_tower=llava_v1.tower,
            gguf_type="q4_0",
            calibration=data,
            measure=False,
        )
        return (tmp_path / "bundle/gguf/checkpoint-Q4_0.gguf").read_bytes()

    first = export("What is this?")
    assert len(calls) == 1
    assert export("What is this?") == first and len(calls) == 1
    assert export("And what is that?") != first and len(calls) == 2

"""Importance matrices: calibration data, the file, and the statistics against numpy alone."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from conftest import Fixture, refusal
from numpy.typing import NDArray
from PIL import Image

from mobilevlm.checkpoint import Weights
from mobilevlm.cli import main
from mobilevlm.console.progress import ignore
from mobilevlm.conversation import official_ids
from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import BundleError, ImageError, MobileVLMError, PromptError
from mobilevlm.export.calibration import statistics
from mobilevlm.export.calibration.samples import (
    NUM_SCENES,
    Sample,
    read_samples,
    sample_tokens,
    samples_digest,
    scene_samples,
)
from mobilevlm.export.gguf.collect import collect
from mobilevlm.export.gguf.imatrix import (
    ImportanceMatrix,
    InputStatistics,
    check_imatrix_target,
    matrix_columns,
    read_imatrix,
    write_imatrix,
)
from mobilevlm.export.recipes.file import find_recipe

Float64 = NDArray[np.float64]


def squared_inputs(weights: Weights, spec: DecoderSpec, embeds: Float64) -> dict[str, Float64]:
    """A Llama decoder in numpy: for every matrix the sum over positions of its squared inputs, and
    under ``logits`` the logits."""
    sums: dict[str, Float64] = {}

    def read(name: str, *shape: int) -> Float64:
        return weights.read(f"decoder.{name}.weight", shape).astype(np.float64)

    def norm(values: Float64, name: str) -> Float64:
        mean: Float64 = np.square(values).mean(axis=-1, keepdims=True)
        return values / np.sqrt(mean + spec.norm_eps) * read(name, spec.hidden_size)

    def product(values: Float64, ours: str, theirs: str, out_size: int) -> Float64:
        sums[f"{theirs}.weight"] = np.square(values).sum(axis=0)
        return values @ read(ours, out_size, values.shape[1]).T

    length, half = len(embeds), spec.head_dim // 2
    heads, shared = spec.num_attention_heads, spec.num_key_value_heads
    angle = np.arange(length)[:, None] / spec.rope_theta ** (np.arange(half) / half)
    turn = np.exp(1j * angle)[:, None]

    def rotated(values: Float64, count: int) -> Float64:
        split = values.reshape(length, count, spec.head_dim)
        turned = (split[..., :half] + 1j * split[..., half:]) * turn
        return np.concatenate([turned.real, turned.imag], axis=-1).swapaxes(0, 1)

    hidden = embeds
    for index in range(spec.num_hidden_layers):
        ours, theirs = f"layers.{index}", f"blk.{index}"
        x = norm(hidden, f"{ours}.input_norm")
        q = product(x, f"{ours}.attn.q_proj", f"{theirs}.attn_q", heads * spec.head_dim)
        k = product(x, f"{ours}.attn.k_proj", f"{theirs}.attn_k", shared * spec.head_dim)
        v = product(x, f"{ours}.attn.v_proj", f"{theirs}.attn_v", shared * spec.head_dim)
        key = rotated(k, shared).repeat(heads // shared, axis=0)
        value = v.reshape(length, shared, -1).swapaxes(0, 1).repeat(heads // shared, axis=0)
        scores = rotated(q, heads) @ key.swapaxes(1, 2) / np.sqrt(spec.head_dim)
        scores[:, ~np.tri(length, dtype=bool)] = -np.inf
        share = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = (share / share.sum(axis=-1, keepdims=True) @ value).swapaxes(0, 1)
        mixed = mixed.reshape(length, -1)
        hidden = hidden + product(
            mixed, f"{ours}.attn.o_proj", f"{theirs}.attn_output", spec.hidden_size
        )
        x = norm(hidden, f"{ours}.post_attention_norm")
        gate = product(x, f"{ours}.mlp.gate_proj", f"{theirs}.ffn_gate", spec.intermediate_size)
        up = product(x, f"{ours}.mlp.up_proj", f"{theirs}.ffn_up", spec.intermediate_size)
        inner = gate / (1 + np.exp(-gate)) * up
        hidden = hidden + product(
            inner, f"{ours}.mlp.down_proj", f"{theirs}.ffn_down", spec.hidden_size
        )
    sums["logits"] = product(norm(hidden, "norm"), "lm_head", "output", spec.vocab_size)
    return sums


def fixture_sample(fixture: Fixture) -> Sample:
    return Sample(fixture.expected["user_prompt"], "", (fixture.image,))


def test_statistics_are_those_of_a_decoder_in_numpy(fixture: Fixture) -> None:
    """Both begin with an image and a prompt; numpy's from the official code's embeddings."""
    model, arrays = fixture.model, fixture.arrays
    sample = fixture_sample(fixture)
    tokens = sample_tokens(model, sample)
    assert official_ids(tokens, model.spec.image.layout) == arrays["input_ids"][0].tolist()
    embeds = arrays["inputs_embeds"][0].astype(np.float64)
    expected = squared_inputs(model.weights, model.spec.decoder, embeds)
    np.testing.assert_allclose(expected.pop("logits"), arrays["logits"][0], atol=1e-3)
    found = collect(model, [sample], "one", ignore)
    assert set(found.entries) == set(expected)
    assert (found.datasets, found.chunk_count, found.chunk_size) == (("one",), 1, len(embeds))
    for name, entry in found.entries.items():
        assert entry.count == len(embeds)
        np.testing.assert_allclose(entry.squares, expected[name], rtol=1e-3, err_msg=name)


def test_groups_change_nothing(llava_v1: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of several lengths, without and with images: together, or each alone."""
    model = llava_v1.model
    samples = [
        Sample("What do you see?", "", (llava_v1.image,)),
        Sample("Hello", "Hello to you, and to all who read this.", ()),
        Sample("<image> or <image>?", "The first.", (llava_v1.image, Image.new("RGB", (40, 60)))),
    ]
    together = collect(model, samples, "x", ignore)
    monkeypatch.setattr(statistics, "MAX_POSITIONS", 1)
    alone = collect(model, samples, "x", ignore)
    parts = [collect(model, [sample], "x", ignore) for sample in samples]
    assert together.chunk_count == 3
    for name, entry in together.entries.items():
        np.testing.assert_allclose(entry.squares, alone.entries[name].squares, rtol=1e-4)
        sums = sum(part.entries[name].squares for part in parts)
        np.testing.assert_allclose(entry.squares, sums, rtol=1e-4)
        assert entry.count == sum(part.entries[name].count for part in parts)


def test_a_sample_beyond_the_context_is_refused(llava_v1: Fixture) -> None:
    sample = Sample("word " * llava_v1.model.spec.decoder.context_length, "", ())
    with pytest.raises(PromptError, match=r"sample 1 takes \d+ tokens, the context holds"):
        collect(llava_v1.model, [sample], "x", ignore)


def test_a_tied_head_counts_for_the_embeddings(llava_v1: Fixture) -> None:
    decoder = dataclasses.replace(llava_v1.model.spec.decoder, tie_word_embeddings=True)
    assert "token_embd.weight" in matrix_columns(decoder)
    assert "output.weight" not in matrix_columns(decoder)


# Calibration data


def test_scenes_are_described_and_asked_about_in_all_ways() -> None:
    samples = scene_samples()
    assert len(samples) == NUM_SCENES
    assert all(sample.prompt and sample.answer for sample in samples)
    assert sum(not sample.images for sample in samples) == 3  # questions without a picture
    assert len({sample.prompt for sample in samples}) > NUM_SCENES // 2
    assert samples_digest(samples) == samples_digest(scene_samples())
    assert samples_digest(samples) != samples_digest(samples[1:])


def written(folder: Path, *lines: object) -> Path:
    path = folder / "samples.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return path


def test_a_jsonl_file_names_its_pictures_from_its_own_folder(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    path = written(
        tmp_path,
        {"image": "a.png", "prompt": "What?", "answer": "That."},
        "",
        {"images": ["a.png", str(tmp_path / "b.png")], "prompt": "Which?"},
        {"prompt": "Hello"},
    )
    assert read_samples(path) == [
        Sample("What?", "That.", (tmp_path / "a.png",)),
        Sample("Which?", "", (tmp_path / "a.png", tmp_path / "b.png")),
        Sample("Hello", "", ()),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": ', "line 2: not JSON"),
        ("[" * 20000, "line 2: not JSON"),
        ("[]", "line 2: expected an object"),
        ({"image": "a.png"}, "line 2: key 'prompt' is missing"),
        ({"prompt": 3}, "line 2.prompt: expected str, found 3"),
        ({"prompt": "What?", "picture": "a.png"}, "line 2: key 'picture' is not known"),
        ({"prompt": "What?", "image": "a.png", "images": ["a.png"]}, "leave one of them out"),
        ({"prompt": "What?", "image": "gone.png"}, "gone.png: no such image file"),
        ({"prompt": "<image> <image>", "image": "a.png"}, "has 2 <image> marks, but one image"),
        ({"prompt": " "}, "the prompt is empty"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: object, message: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(MobileVLMError) as error:
        read_samples(written(tmp_path, {"prompt": "Hello"}, line))
    assert message in str(error.value) and "samples.jsonl, line 2" in str(error.value)


def test_a_file_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MobileVLMError, match="no samples in it"):
        read_samples(written(tmp_path, "", " "))
    with pytest.raises(MobileVLMError, match="no such file: expected 'own', 'scenes' or a"):
        read_samples(tmp_path / "none.jsonl")
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MobileVLMError, match="not a JSONL file in UTF-8"):
        read_samples(tmp_path / "x.jsonl")


# The file


def random_matrix(spec: DecoderSpec, seed: int = 0) -> ImportanceMatrix:
    random = np.random.default_rng(seed)
    entries = {
        name: InputStatistics(random.uniform(1, 99, size).astype(np.float32), 100)
        for name, size in matrix_columns(spec).items()
        if name != "token_embd.weight"
    }
    return ImportanceMatrix(entries, ("scenes",), 4, 25)


def same(one: ImportanceMatrix, other: ImportanceMatrix) -> bool:
    return (
        list(one.entries) == list(other.entries)
        and all(
            entry.count == other.entries[name].count
            and np.array_equal(entry.squares, other.entries[name].squares)
            for name, entry in one.entries.items()
        )
        and (one.datasets, one.chunk_count, one.chunk_size)
        == (other.datasets, other.chunk_count, other.chunk_size)
    )


def test_what_is_written_is_read_again(llava_v1: Fixture, tmp_path: Path) -> None:
    spec, path = llava_v1.model.spec.decoder, tmp_path / "i.gguf"
    matrix = random_matrix(spec)
    write_imatrix(random_matrix(spec, 1), path)
    check_imatrix_target(path)  # one file may take another's place
    write_imatrix(matrix, path)
    assert [file.name for file in tmp_path.iterdir()] == ["i.gguf"]
    assert same(read_imatrix(path, spec), matrix)


def test_the_file_has_the_names_and_shapes_of_llama_cpp(llava_v1: Fixture, tmp_path: Path) -> None:
    spec, path = llava_v1.model.spec.decoder, tmp_path / "i.gguf"
    write_imatrix(random_matrix(spec), path)
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "imatrix"
    assert fields["imatrix.datasets"] == ["scenes"]
    assert (fields["imatrix.chunk_count"], fields["imatrix.chunk_size"]) == (4, 25)
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert shapes["blk.0.ffn_down.weight.in_sum2"] == [spec.intermediate_size]
    assert shapes["blk.0.ffn_down.weight.counts"] == [1]
    assert {tensor.tensor_type for tensor in reader.tensors} == {gguf.GGMLQuantizationType.F32}


Arrays = dict[str, NDArray[np.generic]]


def foreign(path: Path, arrays: Arrays, kind: str = "imatrix") -> Path:
    """A file as another program might write it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(kind)
    for name, values in arrays.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def foreign_arrays(spec: DecoderSpec) -> Arrays:
    """As llama.cpp's tool leaves them: no head, counts in two dimensions, in another order."""
    arrays: Arrays = {}
    for name, size in sorted(matrix_columns(spec).items()):
        if name.startswith("blk."):
            arrays[f"{name}.in_sum2"] = np.full((1, size), 8, np.float32)
            arrays[f"{name}.counts"] = np.full((1, 1), 4, np.float32)
    return arrays


def test_a_file_made_elsewhere_is_read(llava_v1: Fixture, tmp_path: Path) -> None:
    spec = llava_v1.model.spec.decoder
    matrix = read_imatrix(foreign(tmp_path / "i.gguf", foreign_arrays(spec)), spec)
    assert len(matrix.entries) == 7 * spec.num_hidden_layers
    assert all((entry.importance == 2).all() for entry in matrix.entries.values())
    assert (matrix.datasets, matrix.chunk_count) == ((), 0)


FIRST = "blk.0.attn_q.weight"


def change(name: str, value: NDArray[np.generic] | None) -> Callable[[Arrays], None]:
    def edit(arrays: Arrays) -> None:
        arrays.pop(f"{FIRST}.{name}")
        if value is not None:
            arrays[f"{FIRST}.{name}"] = value

    return edit


def another_layer(arrays: Arrays) -> None:
    arrays["blk.99.attn_q.weight.in_sum2"] = np.ones(64, np.float32)


WRONG: list[tuple[Callable[[Arrays], None], str]] = [
    (change("in_sum2", None), f"tensor '{FIRST}.in_sum2' is missing: made for another model?"),
    (change("counts", None), f"tensor '{FIRST}.counts' is missing"),
    (change("in_sum2", np.ones(32, np.float32)), "shape (32,), expected 64 of F32"),
    (change("in_sum2", np.ones(64, np.float16)), "type F16, shape (64,), expected 64 of F32"),
    (change("counts", np.ones(2, np.float32)), "expected 1 of F32"),
    (change("in_sum2", np.full(64, np.nan, np.float32)), "negative, infinite or no numbers"),
    (change("in_sum2", np.full(64, np.inf, np.float32)), "negative, infinite or no numbers"),
    (change("in_sum2", np.full(64, -1, np.float32)), "negative, infinite or no numbers"),
    (change("counts", np.zeros(1, np.float32)), "negative, infinite or no numbers"),
    (change("counts", np.full(1, np.nan, np.float32)), "negative, infinite or no numbers"),
    (another_layer, "made for another model: this one has no 'blk.99.attn_q.weight'"),
]


def export_arguments(fixture: Fixture, folder: Path, *more: object) -> list[object]:
    kind = [] if "--gguf-type" in more else ["--gguf-type", "q4_0"]
    places = ["export", fixture.checkpoint, "--vision-tower", fixture.tower, "-o", folder / "b"]
    return [*places, "--no-measure", "--format", "gguf", *kind, *more]


@pytest.mark.parametrize(("edit", "message"), WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_a_wrong_file_gives_one_line(
    llava_v1: Fixture,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    edit: Callable[[Arrays], None],
    message: str,
) -> None:
    arrays = foreign_arrays(llava_v1.model.spec.decoder)
    edit(arrays)
    path = foreign(tmp_path / "i.gguf", arrays)
    arguments = export_arguments(llava_v1, tmp_path, "--imatrix", path)
    assert message in refusal(capsys, *arguments)
    assert [file.name for file in tmp_path.iterdir()] == ["i.gguf"]


def test_what_is_no_importance_matrix_is_refused(
    llava_v1: Fixture, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "i.gguf"
    arguments = export_arguments(llava_v1, tmp_path, "--imatrix", path)
    assert "i.gguf: no such file" in refusal(capsys, *arguments)
    path.write_bytes(b"\x10\0\0\0old format")
    assert "damaged or not a GGUF file" in refusal(capsys, *arguments)
    whole = foreign(path, foreign_arrays(llava_v1.model.spec.decoder)).read_bytes()
    path.write_bytes(whole[:-100])
    assert "damaged or not a GGUF file" in refusal(capsys, *arguments)
    foreign(path, {"x": np.ones(4, np.float32)}, "model")
    message = refusal(capsys, *arguments)
    assert "its general.type is 'model', expected 'imatrix'" in message


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--format", "onnx", "--recipe", "fp32", "--calibration", "scenes"], "add --format gguf"),
        (["--imatrix", "i.gguf", "--calibration", "scenes"], "leave one of them out"),
        (["--gguf-type", "q8_0", "--imatrix", "i.gguf"], "q8_0 does not use an importance matrix"),
        (["--calibration", "pictures"], "no such file: expected 'own', 'scenes' or a .jsonl file"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    llava_v1: Fixture,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    assert message in refusal(capsys, *export_arguments(llava_v1, tmp_path, *more))


def test_a_column_that_is_never_used_keeps_a_little_importance() -> None:
    squares = np.array([0, 0, 4, 8], np.float32)
    assert InputStatistics(squares, 4).importance.tolist() == pytest.approx([7.5e-5] * 2 + [1, 2])
    assert InputStatistics(np.zeros(3, np.float32), 9).importance.tolist() == [1, 1, 1]


def test_a_recipe_file_names_what_lies_beside_it(tmp_path: Path) -> None:
    text = (
        'tower = "fp16"\nprojector = "fp16"\ndecoder = "q4"\nlm_head = "q4"\nembeddings = "fp16"\n'
    )
    limits = "[limits]\nvision_relative_error = 1\ndecoder_kl = 1\n"
    path = tmp_path / "mine.toml"
    path.write_text(f'{text}gguf_calibration = "mine.jsonl"\n{limits}')
    recipe = find_recipe(str(path))
    assert recipe.gguf_calibration == str(tmp_path / "mine.jsonl")
    assert recipe.for_manifest().gguf_calibration == "mine.jsonl"
    path.write_text(f'{text}gguf_calibration = "scenes"\n{limits}')
    assert find_recipe(str(path)).gguf_calibration == "scenes"
    path.write_text(f'{text}gguf_imatrix = "i.gguf"\n{limits}')
    assert find_recipe(str(path)).gguf_imatrix == str(tmp_path / "i.gguf")


# The verb


def test_the_verb_writes_the_file(
    llava_v1: Fixture, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(llava_v1.image, tmp_path / "photo.png")
    data = written(tmp_path, {"image": "photo.png", "prompt": "What is this?", "answer": "Art."})
    path = tmp_path / "i.gguf"
    arguments = ["imatrix", llava_v1.checkpoint, "--vision-tower", llava_v1.tower, "-o", path]
    main([str(argument) for argument in [*arguments, "--calibration", data]])
    assert "29 matrices, samples: 1, " in capsys.readouterr().err
    matrix = read_imatrix(path, llava_v1.model.spec.decoder)
    assert matrix.datasets == ("samples.jsonl",)
    assert "output.weight" in matrix.entries


def test_the_verb_writes_over_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    foreign(path, {"x": np.ones(4, np.float32)}, "model")
    with pytest.raises(BundleError, match="not an importance matrix, and in the way"):
        check_imatrix_target(path)
    with pytest.raises(BundleError, match="not an importance matrix, and in the way"):
        check_imatrix_target(tmp_path)
    with pytest.raises(BundleError, match="no such folder"):
        check_imatrix_target(tmp_path / "none" / "i.gguf")


def test_a_picture_that_is_none_is_named(llava_v1: Fixture, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    data = written(tmp_path, {"image": "a.png", "prompt": "What?"})
    with pytest.raises(ImageError, match=r"a\.png: not an image"):
        collect(llava_v1.model, read_samples(data), "x", ignore)

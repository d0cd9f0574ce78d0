"""Image encoders of Gemma 3, LFM2-VL, Qwen2.5-VL and Qwen3-VL as ``mmproj`` files: in engine
``gguf`` against the official arrays, and with the decoder in llama.cpp's own loop.

llama.cpp resizes images in other numbers than the official code, so its own loop is given one of
the size that the model takes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clips import clip_of, video_text
from conftest import Fixture, fixture_named, memory_weights, relative_error
from llama import decoder_path, mtmd, onnx_and_gguf, prompted
from numpy.typing import NDArray
from PIL import Image

import mobilevlm
from mobilevlm.bundle import open_bundle
from mobilevlm.console.progress import ignore
from mobilevlm.errors import BundleError, FileWarning, MobileVLMError
from mobilevlm.export.gguf.mmproj import write_mmproj
from mobilevlm.export.gguf.support import obstacle, warn_of_differences
from mobilevlm.export.quality.artifact_weights import artifact_weights
from mobilevlm.gguf.file import GgufFile, read_gguf
from mobilevlm.gguf.mmproj import mmproj_entries
from mobilevlm.input_spec import DynamicTiles
from mobilevlm.preparation import prepare
from mobilevlm.reference import load_reference
from mobilevlm.runtime import VLM
from mobilevlm.runtime.engines.llama.gguf_check import check_mmproj
from mobilevlm.runtime.engines.llama.mtmd import MtmdVision
from mobilevlm.runtime.engines.llama.native import NativeModel
from mobilevlm.spec import ModelSpec, with_image

pytestmark = pytest.mark.filterwarnings("ignore:GGUF. ")
VISUAL, LOGITS = 1e-3, 5e-3
"""Relative errors. Measured: visual tokens 2e-4 to 9e-4, since llama.cpp's GELU is the tanh
approximation in a table of float16; logits 5e-4 to 3.3e-3."""
NAMES = ("gemma3", "qwen3_vl", "qwen2_5_vl", "lfm2_vl")
MARKS = {
    "gemma3": ("<start_of_image>", "\n\n{}\n\n"),
    "lfm2_vl": ("<image>", "{}"),
    "qwen3_vl": ("<|vision_start|><|image_pad|><|vision_end|>", "{}"),
    "qwen2_5_vl": ("<|vision_start|><|image_pad|><|vision_end|>", "{}"),
}
"""Text of an image in a prompt, and in one for llama.cpp, which adds marks of its own."""


@pytest.fixture(scope="module", params=NAMES)
def fixture(request: pytest.FixtureRequest) -> Fixture:
    return fixture_named(request.param)


@pytest.fixture(scope="module")
def bundle(fixture: Fixture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return onnx_and_gguf(fixture, tmp_path_factory.mktemp(fixture.name))


@pytest.fixture(scope="module")
def vlm(bundle: Path) -> Iterator[VLM]:
    with mobilevlm.load(bundle, engine="gguf") as opened:
        yield opened


@pytest.fixture(scope="module")
def onnx(bundle: Path) -> Iterator[VLM]:
    with mobilevlm.load(bundle, engine="onnx") as opened:
        yield opened


def files(bundle: Path) -> tuple[Path, Path]:
    """Language model and image encoder."""
    [vision] = (bundle / "gguf").glob("mmproj-*")
    return decoder_path(bundle), vision


def test_llama_cpp_gives_the_official_visual_tokens_logits_and_answer(
    fixture: Fixture, vlm: VLM
) -> None:
    found = vlm.encode_image(fixture.image)
    expected = fixture.arrays["projector_output"].reshape(found.shape)
    assert relative_error(found, expected) < VISUAL
    prompt, images = fixture.templated_prompt, [fixture.image]
    logits = vlm.prompt_logits(prompt, images, raw=True)
    assert relative_error(logits, fixture.logits) < LOGITS
    best = (
        fixture.logits.max(-1)
        - np.take_along_axis(fixture.logits, logits.argmax(-1)[:, None], axis=-1)[:, 0]
    )
    assert best.max() < LOGITS * np.abs(fixture.logits).max()  # another choice is nearly tied
    answer = vlm.generate(prompt, images, raw=True, max_new_tokens=24, ignore_eos=True)
    assert answer.token_ids == fixture.generated_ids


def test_llama_cpps_own_loop_gives_the_answer_to_an_image_that_needs_no_resizing(
    fixture: Fixture, bundle: Path, onnx: VLM
) -> None:
    pixels = prepare(fixture.image, fixture.model.spec.image).arrays[-1]["pixels"]
    image, (mark, theirs) = Image.fromarray(pixels), MARKS[fixture.name]
    prompt = fixture.templated_prompt
    expected = onnx.prompt_logits(prompt, [image], raw=True)[-1]
    answer = onnx.generate(prompt, [image], raw=True, max_new_tokens=12, ignore_eos=True)
    marked = prompt.replace(mark, theirs.format(mtmd.mtmd_default_marker().decode()))
    bos = next((text for text in ("<bos>", "<|startoftext|>") if marked.startswith(text)), "")
    text = marked.removeprefix(bos)  # llama.cpp adds it
    with prompted(files(bundle), text, [pixels], fewest=1) as (decoder, logits, position):
        assert relative_error(logits, expected) < 2 * LOGITS
        tokens, _ = decoder.greedy(logits, position, 12)
    assert tokens == answer.token_ids


@pytest.mark.parametrize("fixture", ["qwen3_vl"], indirect=True)
def test_rows_for_layers_are_the_official_ones(fixture: Fixture, bundle: Path) -> None:
    spec = fixture.model.spec
    model = NativeModel(files(bundle)[0])
    vision = MtmdVision(files(bundle)[1], spec, model, 2)
    [arrays] = prepare(fixture.image, spec.image).arrays
    found = np.stack(vision.encode(arrays).deep)
    assert relative_error(found, fixture.arrays["deepstack_features"]) < VISUAL
    vision.close()


@pytest.mark.parametrize("fixture", ["qwen2_5_vl"], indirect=True)
def test_the_tower_of_qwen2_vl_gives_the_visual_tokens_of_the_reference(
    fixture: Fixture, bundle: Path, tmp_path: Path
) -> None:
    """Random weights: there is no fixture."""
    traits: dict[str, Any] = {
        "norm": "layer", "mlp": "plain", "hidden_act": "quick_gelu", "window": 0, "full_layers": (),
    }  # fmt: skip
    spec = changed(fixture.model.spec, "encoder", **traits)
    spec = changed(spec, "connector", norm_kind="layer")
    shapes = {name: entry.shape for entry in mmproj_entries(spec.image) for name in entry.parts}
    weights = memory_weights(shapes, tmp_path)
    refs = {name: ref for name, ref in weights._refs.items() if name in shapes}
    model = replace(fixture.model, spec=spec, weights=fixture.model.weights.replaced(refs))
    path = tmp_path / "mmproj.gguf"
    write_mmproj(model, "f32", path, ignore)
    assert read_gguf(path).metadata["clip.projector_type"] == "qwen2vl_merger"
    vision = MtmdVision(path, spec, NativeModel(files(bundle)[0]), 2)
    image = prepare(fixture.image, spec.image)
    with torch.no_grad():
        expected = load_reference(model).see(image).tokens.numpy()
    assert relative_error(vision.encode(image.arrays[0]).embeds, expected) < VISUAL
    vision.close()


@pytest.mark.parametrize("kind", ["q8_0", "f16"])
def test_smaller_types_run(
    fixture: Fixture, kind: Any, tmp_path: Path, bundle: Path, onnx: VLM
) -> None:
    path, spec = tmp_path / "mmproj.gguf", fixture.model.spec
    write_mmproj(fixture.model, kind, path, ignore)
    vision = MtmdVision(path, spec, NativeModel(files(bundle)[0]), 2)
    rows = [vision.encode(arrays).embeds for arrays in prepare(fixture.image, spec.image).arrays]
    expected = onnx.encode_image(fixture.image)
    limit = {"q8_0": 0.05, "f16": 3e-3}[kind]
    assert relative_error(np.concatenate(rows), expected) < limit
    vision.close()


def test_tensors_are_read_back_as_they_were(fixture: Fixture, bundle: Path) -> None:
    stored = artifact_weights(fixture.model, open_bundle(bundle), "gguf")
    seen = set()
    for entry in mmproj_entries(fixture.model.spec.image):
        for name in entry.parts:
            expected = fixture.model.weights.read(name, entry.shape)
            assert np.array_equal(stored.read(name, entry.shape), expected), name
            seen.add(name)
    ours = {name for name in fixture.model.weights if not name.startswith("decoder.")}
    assert seen == ours


@pytest.mark.parametrize("fixture", ["qwen2_5_vl"], indirect=True)
def test_a_clip_is_refused_in_one_line(fixture: Fixture, vlm: VLM) -> None:
    video = replace(fixture, suffix="_video")
    with pytest.raises(MobileVLMError, match="not clips: use --engine hybrid or onnx"):
        vlm.prompt_logits(video_text(video), [clip_of(video)], raw=True)


@pytest.mark.parametrize("fixture", ["qwen2_5_vl"], indirect=True)
def test_an_image_beyond_llama_cpps_limit_is_refused_in_one_line(
    fixture: Fixture, bundle: Path
) -> None:
    decoder, path = files(bundle)
    vision = MtmdVision(path, fixture.model.spec, NativeModel(decoder), 2)
    with pytest.raises(MobileVLMError, match=r"4160 visual tokens, .* --max-image-tokens 4096"):
        vision.encode({"pixels": np.zeros((28 * 64, 28 * 65, 3), np.uint8)})
    vision.close()


def changed(spec: ModelSpec, part: str, **changes: Any) -> ModelSpec:
    return with_image(spec, **{part: replace(getattr(spec.image, part), **changes)})


@pytest.mark.parametrize(
    ("name", "part", "changes", "reason"),
    [
        ("gemma3", "encoder", {"hidden_act": "gelu"}, "SigLIP, this model has another"),
        ("gemma3", "encoder", {"intermediate_size": 32}, "two MLP layers apart"),
        ("gemma3", "connector", {"bias": True}, "one Linear without a bias"),
        ("gemma3", "connector", {"pool_norm_eps": 1e-5}, "one epsilon"),
        ("lfm2_vl", "encoder", {"hidden_act": "gelu"}, "SigLIP 2, this model has another"),
        ("lfm2_vl", "connector", {"bias": False}, "an MLP of two layers"),
        ("qwen3_vl", "encoder", {"merge_size": 4}, "squares of 2 × 2"),
        ("qwen3_vl", "encoder", {"patch_bias": False}, "this is another"),
        ("qwen3_vl", "connector", {"norm_eps": 1e-5}, "this is another"),
        ("qwen2_5_vl", "encoder", {"window": 3}, "windows of 112 pixels"),
        ("qwen2_5_vl", "encoder", {"full_layers": (0, 3)}, "every so-manieth layer"),
        ("qwen2_5_vl", "encoder", {"intermediate_size": 48}, "two MLP layers apart"),
        ("qwen2_5_vl", "encoder", {"norm": "layer"}, "this is another"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_not_written(
    name: str, part: str, changes: dict[str, Any], reason: str
) -> None:
    spec = fixture_named(name).model.spec
    assert reason in obstacle(changed(spec, part, **changes))
    assert not obstacle(spec)


def test_the_export_says_how_stock_programs_prepare_images_otherwise() -> None:
    qwen = fixture_named("qwen3_vl").model.spec
    with pytest.warns(FileWarning, match="--image-min-tokens 4 --image-max-tokens 40: their"):
        warn_of_differences(qwen)
    with pytest.warns(FileWarning, match="takes 0 for the epsilon of this decoder's norms"):
        warn_of_differences(fixture_named("qwen2_5_vl").model.spec)
    lfm2 = fixture_named("lfm2_vl").model.spec
    with pytest.warns(FileWarning, match="2 to 10 tiles of 512 pixels, and 64 to 256"):
        warn_of_differences(lfm2)
    tiles = lfm2.image.preparation
    assert isinstance(tiles, DynamicTiles)
    area = tiles.whole.factor**2
    whole = replace(tiles.whole, min_pixels=64 * area, max_pixels=256 * area)
    published = replace(
        tiles, size=512, min_tiles=2, max_tiles=10, whole=whole, split_pixels=512 * area
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_differences(with_image(lfm2, preparation=published))
        warn_of_differences(fixture_named("gemma3").model.spec)


def damaged(header: GgufFile, key: str, value: Any) -> GgufFile:
    metadata = {**header.metadata, key: value}
    return replace(header, metadata=metadata, kinds={key: "u32", **header.kinds})


def test_a_damaged_file_is_one_line(fixture: Fixture, bundle: Path) -> None:
    spec, header = fixture.model.spec, read_gguf(files(bundle)[1])
    check_mmproj(header, spec)
    for key, value in (
        ("clip.projector_type", "mlp"),
        ("clip.vision.block_count", 2),
        ("clip.vision.embedding_length", 1 << 30),
        ("clip.vision.attention.layer_norm_epsilon", 0.5),
        ("clip.vision.image_mean", [0.5, 0.5]),
        ("clip.vision.window_size", 224),
        ("clip.vision.feature_layer", [1]),
    ):
        with pytest.raises(BundleError, match=key):
            check_mmproj(damaged(header, key, value), spec)
    for name in ("v.patch_embd.weight", "v.blk.1.ln1.weight", "v.post_ln.weight"):
        lacking = {other: tensor for other, tensor in header.tensors.items() if other != name}
        with pytest.raises(BundleError, match=name):
            check_mmproj(replace(header, tensors=lacking), spec)
        tensor = replace(header.tensors[name], shape=(7, 7))
        with pytest.raises(BundleError, match=rf"{name} is \(7, 7\)"):
            check_mmproj(replace(header, tensors={**header.tensors, name: tensor}), spec)
    more = {**header.tensors, "v.blk.0.ls1.weight": header.tensors["v.blk.1.ln1.weight"]}
    with pytest.raises(BundleError, match="is not read by this version"):
        check_mmproj(replace(header, tensors=more), spec)


@pytest.mark.parametrize("fixture", ["gemma3"], indirect=True)
def test_engine_ggml_reads_the_image_encoder_from_gguf_too(
    fixture: Fixture, tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    mobilevlm.export(fixture.checkpoint, folder, recipe="fp32", formats=["gguf"], measure=False)
    with mobilevlm.load(folder, engine="ggml") as opened:
        logits: NDArray[np.float32] = opened.prompt_logits(
            fixture.templated_prompt, [fixture.image], raw=True
        )
    assert relative_error(logits, fixture.logits) < LOGITS

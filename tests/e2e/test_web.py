"""The page of examples/web in a real browser: answers with the tokens of the Python runtime."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL
import pytest
from browser import PAGE, Browser, copy_page, served
from checkpoints import with_windows
from conftest import (
    DATA,
    FAMILY_FIXTURES,
    FIXTURES,
    FLOAT32,
    HUB_FIXTURES,
    MOE_FIXTURES,
    fixture_named,
    relative_error,
)
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import mobilevlm
from mobilevlm.builtin import WEIGHTS
from mobilevlm.bundle import MANIFEST, open_bundle
from mobilevlm.conversation import official_ids, tokenize
from mobilevlm.errors import TargetError
from mobilevlm.export import settled
from mobilevlm.export.targets import find_target
from mobilevlm.image import open_image, preprocess
from mobilevlm.input_spec import FixedImage, LayoutSpec, Mel, Tiles
from mobilevlm.nano.drawing import render
from mobilevlm.nano.questions import SHORT_STYLE
from mobilevlm.nano.scenes import TRAINING_SEEDS, sample_scene
from mobilevlm.plain_types import to_dict
from mobilevlm.preparation import prepare, with_max_tiles
from mobilevlm.runtime import VLM
from mobilevlm.runtime.machine import int8_weight_bits

MAX_NEW_TOKENS = 64
"""As the page has it."""
QUESTIONS = (
    "Describe the picture.",
    f"How many shapes are there?{SHORT_STYLE}",
    "What is in the center?",
    "Is there a red circle in the picture?",
)


HUB = [name for name in HUB_FIXTURES if not fixture_named(name).suffix]
"""Families in the layout of the hub."""
NOT_KNOWN = {
    "lfm2_vl": "images prepared as 'dynamic_tiles'",
    "qwen2_5_vl": "images prepared as 'dynamic_image'",
    "qwen3_5": "images prepared as 'dynamic_image'",
    "gemma3": "'image_margin' in its conversation",
    "gemma4": "images prepared as 'dynamic_image'",
    "janus": "images of aspect 'fit'",
}
"""Those that the page refuses, with what it says. Qwen3-VL is too big for the target already."""


def export_for_web(name: str, bundle: Path) -> None:
    """As the target settles it, but where this processor's own kernels cannot take 8-bit weights
    with 7-bit ones: there the Python runtime would be the one that is wrong."""
    target = find_target("web-wasm")
    with pytest.MonkeyPatch.context() as patch:
        bits = int8_weight_bits() or target.weight_bits
        patch.setattr(settled, "find_target", lambda _: replace(target, weight_bits=bits))
        mobilevlm.export(WEIGHTS / name, bundle, target=target.name, measure=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page with nano's bundle."""
    page = copy_page(tmp_path_factory.mktemp("web") / "page")
    export_for_web("nano", page / "bundle")
    return page


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with served(folder) as found:
        yield found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    window = Browser(tmp_path_factory.mktemp("profile"))
    try:
        yield window
    finally:
        window.driver.quit()


@pytest.fixture(scope="module")
def vlm(folder: Path) -> Iterator[VLM]:
    with mobilevlm.load(folder / "bundle", engine="onnx") as model:
        yield model


def pictures(folder: Path) -> list[Path]:
    """A scene as the model knows it, one that is shrunk and padded, one that is enlarged and
    padded, and a photo."""
    square, wide, tall = (
        render(sample_scene(TRAINING_SEEDS + seed, "evaluation")) for seed in (14, 8, 16)
    )
    paths = [folder / f"{name}.png" for name in ("square", "wide", "tall")]
    square.save(paths[0])
    wide.resize((500, 333), Image.Resampling.BILINEAR).save(paths[1])
    tall.resize((61, 90), Image.Resampling.BILINEAR).save(paths[2])
    return [*paths, PAGE.parent / "cat.jpg"]


def test_the_browser_says_the_tokens_of_the_python_runtime(
    browser: Browser, address: str, vlm: VLM, tmp_path: Path
) -> None:
    """Sums in another order push an activation over a rounding border here and there, which moves
    logits by up to 0.08. In these answers the two likeliest tokens are farther apart."""
    browser.open(address)
    assert "nano is ready" in browser.status
    *scenes, photo = pictures(tmp_path)
    pairs = [(scene, question) for scene in scenes for question in QUESTIONS]
    for path, question in [*pairs, *((photo, question) for question in QUESTIONS[1:])]:
        browser.choose_file(path)
        expected = vlm.generate(question, [path], max_new_tokens=MAX_NEW_TOKENS)
        found = browser.ask(question)
        assert found == (expected.text, expected.token_ids), (path.name, question)
    assert browser.complaints == []


def test_float32_differs_by_the_order_of_sums_alone(
    browser: Browser, address: str, folder: Path, tmp_path: Path
) -> None:
    mobilevlm.export(WEIGHTS / "nano", folder / "float", recipe="fp32", measure=False)
    picture = pictures(tmp_path)[0]
    with mobilevlm.load(folder / "float", engine="onnx") as model:
        pixels = prepare(picture, model.spec.image).arrays[0]["pixels"]
        ids = model.prompt_ids(QUESTIONS[0], images=1)
        visual_tokens = model.encode_image(picture)
        logits = model.prompt_logits(QUESTIONS[0], [picture])[-1]
    browser.driver.get(f"{address}package.json")
    found_tokens, found_logits = browser.run(
        """
        const { readBundle } = await import("/bundle.js");
        const { Decoder, Vision, prepareRuntime } = await import("/engine.js");
        prepareRuntime();
        const bundle = await readBundle(new URL("/float/", location.href).href, () => {});
        const visual = await (await Vision.open(bundle)).encode(Uint8Array.from(arguments[0]));
        const decoder = await Decoder.open(bundle);
        const [before, after] = [arguments[1], arguments[2]].map((ids) => decoder.embed(ids));
        let { past } = await decoder.append(decoder.emptyPast, before);
        ({ past } = await decoder.append(past, visual));
        const { logits } = await decoder.append(past, after);
        return [Array.from(visual), Array.from(logits)];
        """,
        pixels.ravel().tolist(),
        ids[: ids.index(-200)],
        ids[ids.index(-200) + 1 :],
    )
    found = np.array(found_tokens, np.float32).reshape(visual_tokens.shape)
    assert relative_error(found, visual_tokens) < FLOAT32
    assert relative_error(np.array(found_logits, np.float32), logits) < FLOAT32


def test_a_drawn_scene_is_described(browser: Browser, folder: Path) -> None:
    """From any static server, which gives one thread."""
    with served(folder, isolated=False) as address:
        browser.open(address)
        assert "1 thread" in browser.status
        for selector in ("#clear", "label:has([value=star])", "label:has([value=blue])", "#canvas"):
            browser.click(selector)
        text, _ = browser.ask("What is in the center?")
    assert text == "There is a blue star in the center."


def test_sparse_experts_run_too(
    browser: Browser, address: str, folder: Path, tmp_path: Path
) -> None:
    """In the form that the target settles for them; on two threads."""
    export_for_web("nano-moe", folder / "moe")
    path = pictures(tmp_path)[0]
    with mobilevlm.load(folder / "moe", engine="onnx") as model:
        expected = model.generate(QUESTIONS[0], [path], max_new_tokens=MAX_NEW_TOKENS)
    browser.open(f"{address}?bundle=moe&threads=2")
    assert "2 threads" in browser.status
    browser.choose_file(path)
    assert browser.ask(QUESTIONS[0]) == (expected.text, expected.token_ids)


def page_pixels(browser: Browser, pixels: NDArray[np.uint8], spec: dict[str, Any]) -> Any:
    """Return the bytes that the page makes of an image."""
    height, width, _ = pixels.shape
    return browser.run(
        """
        const { preprocess } = await import("/pixels.js");
        const [data, width, height, spec] = arguments;
        return Array.from(preprocess({ data: Uint8Array.from(data), width, height }, spec));
        """,
        pixels.ravel().tolist(),
        width,
        height,
        spec,
    )


@pytest.mark.parametrize("resample", ["bicubic", "bilinear", "lanczos"])
@pytest.mark.parametrize("aspect", ["pad", "crop", "resize"])
def test_pixels_are_those_of_pillow(
    browser: Browser,
    address: str,
    aspect: Literal["pad", "crop", "resize"],
    resample: Literal["bicubic", "bilinear", "lanczos"],
) -> None:
    spec = FixedImage(
        size=48, shortest_edge=48, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28),
        aspect=aspect, resample=resample,
    )  # fmt: skip
    random = np.random.default_rng(0)
    browser.driver.get(f"{address}package.json")
    sizes = [(48, 48), (200, 131), (7, 5), (48, 47), (96, 96), (1, 30)]
    if int(PIL.__version__.split(".")[0]) >= 13:  # earlier ones resize tall pictures' rows first
        sizes += [(31, 70), (60, 200), (1, 90)]
    for width, height in sizes:
        pixels = random.integers(0, 256, (height, width, 3), np.uint8)
        found = page_pixels(browser, pixels, to_dict(spec))
        expected = preprocess(Image.fromarray(pixels), spec).ravel()
        np.testing.assert_array_equal(found, expected, err_msg=f"{width} × {height}")


@pytest.mark.parametrize("name", ["smolvlm2", "internvl3", "llava_onevision"])
def test_one_tile_has_the_pixels_of_pillow(browser: Browser, address: str, name: str) -> None:
    spec = with_max_tiles(fixture_named(name).model.spec.image, 1)
    random = np.random.default_rng(0)
    browser.driver.get(f"{address}package.json")
    sizes = [(64, 64), (200, 131), (7, 5), (63, 64), (640, 480), (1, 30), (31, 7)]
    for width, height in sizes:
        pixels = random.integers(0, 256, (height, width, 3), np.uint8)
        found = page_pixels(browser, pixels, to_dict(spec.preparation))
        (expected,) = prepare(pixels, spec).arrays
        np.testing.assert_array_equal(
            found, expected["pixels"].ravel(), err_msg=f"{width} × {height}"
        )


def export_in_float32(name: str, folder: Path, checkpoint: Path | None = None) -> None:
    """For the page, beside it."""
    target = replace(find_target("web-wasm"), recipe="fp32", weight_bits=None)
    checkpoint = checkpoint or fixture_named(name).checkpoint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settled, "find_target", lambda _: target)
        mobilevlm.export(checkpoint, folder / name, target=target.name, measure=False)


@pytest.mark.parametrize("name", NOT_KNOWN)
def test_families_that_the_page_cannot_prepare_are_refused_by_what_it_lacks(
    browser: Browser, address: str, folder: Path, name: str
) -> None:
    """Before any work by the target, and by the page where a bundle is for something else."""
    checkpoint = fixture_named(name).checkpoint
    with pytest.raises(TargetError, match=r"which the page .* does not compute"):
        mobilevlm.export(checkpoint, folder / name, target="web-wasm", measure=False)
    mobilevlm.export(checkpoint, folder / name, recipe="fp32", measure=False)
    browser.open(f"{address}?bundle={name}", "failed")
    assert f"has {NOT_KNOWN[name]}" in browser.status


def test_sliding_windows_answer_as_in_the_python_runtime(
    browser: Browser, address: str, folder: Path, tmp_path: Path
) -> None:
    fixture = fixture_named("internvl3")
    export_in_float32("sliding", folder, with_windows(fixture.checkpoint, tmp_path / "windows"))
    shutil.copy(fixture.image, folder / "sliding" / "image.png")
    with mobilevlm.load(folder / "sliding", engine="onnx") as model:
        assert model.spec.decoder.sliding_window < 24
        found = model.generate(QUESTIONS[0], [fixture.image], max_new_tokens=24, ignore_eos=True)
    browser.driver.get(f"{address}package.json")
    assert found.token_ids == browser.run(
        """
        const { openModel } = await import("/model.js");
        const folder = new URL("/sliding/", location.href).href;
        const model = await openModel(folder, 1, () => {});
        model.spec.conversation.eos_token_ids = [];
        const source = await (await fetch(`${folder}image.png`)).blob();
        const picture = { source, id: 1 };
        return (await model.answer(picture, arguments[0], 24, () => {}, async () => false)).tokens;
        """,
        QUESTIONS[0],
    )


@pytest.mark.parametrize("name", [name for name in HUB if name not in {*NOT_KNOWN, "qwen3_vl"}])
def test_families_of_the_hub_answer_as_the_python_runtime(
    browser: Browser, address: str, folder: Path, name: str
) -> None:
    """In float32, with the tiling of the target, in and after the question."""
    fixture = fixture_named(name)
    export_in_float32(name, folder)
    shutil.copy(fixture.image, folder / name / "image.png")
    questions = ["What is it?", "Before <image> after, été"]
    with mobilevlm.load(folder / name, engine="onnx") as model:
        ids = [model.prompt_ids(question, [fixture.image]) for question in questions]
        answers = [
            model.generate(question, [fixture.image], max_new_tokens=24, ignore_eos=True)
            for question in questions
        ]
    browser.driver.get(f"{address}package.json")
    found = browser.run(
        """
        const { openModel } = await import("/model.js");
        const folder = new URL(`/${arguments[0]}/`, location.href).href;
        const model = await openModel(folder, 1, () => {});
        model.spec.conversation.eos_token_ids = [];
        const source = await (await fetch(`${folder}image.png`)).blob();
        const found = [];
        for (const question of arguments[1]) {
          const picture = { source, id: 1 };
          const answer = await model.answer(picture, question, 24, () => {}, async () => false);
          found.push([answer.promptTokens, answer.tokens, answer.text]);
        }
        const twice = model.spec.conversation.image_mark.repeat(2);
        try {
          await model.answer({ source, id: 1 }, `${twice} what?`, 1, () => {}, async () => false);
        } catch (error) {
          found.push(error.message);
        }
        return found;
        """,
        name,
        questions,
    )
    expected = [
        [len(known), answer.token_ids, answer.text]
        for known, answer in zip(ids, answers, strict=True)
    ]
    *answered, refused = found
    assert answered == expected
    assert "expected one for the one image" in refused


def test_picture_files_are_decoded_as_by_pillow(
    browser: Browser, address: str, folder: Path
) -> None:
    photo = Image.open(PAGE.parent / "cat.jpg").resize((301, 203))
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: a quarter turn
    transparent = np.random.default_rng(0).integers(0, 256, (50, 60, 4), np.uint8)
    photo.save(folder / "subsampled.jpg", quality=80, subsampling=2, progressive=True)
    photo.save(folder / "turned.jpg", exif=turned)
    photo.convert("L").save(folder / "grey.png")
    photo.convert("P").save(folder / "palette.png")
    photo.save(folder / "lossy.webp", quality=80)
    Image.fromarray(transparent, "RGBA").save(folder / "transparent.png")
    browser.driver.get(f"{address}package.json")
    for path in (path for kind in ("jpg", "png", "webp") for path in folder.glob(f"*.{kind}")):
        data, width, height = browser.run(
            """
            const { decodeImage } = await import("/image.js");
            const file = await (await fetch(arguments[0])).blob();
            const { data, width, height } = await decodeImage(file);
            return [Array.from(data), width, height];
            """,
            f"/{path.name}",
        )
        found = np.array(data, np.uint8).reshape(height, width, 3)
        np.testing.assert_array_equal(found, np.asarray(open_image(path)), err_msg=path.name)


@pytest.mark.parametrize("name", ["nano", *FIXTURES, *MOE_FIXTURES, *FAMILY_FIXTURES, *HUB])
def test_ids_are_those_of_the_python_tokenizer(
    browser: Browser, address: str, vlm: VLM, name: str
) -> None:
    browser.driver.get(f"{address}package.json")
    tokenizer = vlm.tokenizer
    if name != "nano":
        tokenizer = fixture_named(name).model.tokenizer
    texts = [
        *QUESTIONS, "<image>\nWhat is it?", "a <image> b", "  two  spaces ", "tab\tline\n\nend ",
        "été, naïve, Ünïcode", "漢字とか", "🙂👍🏽", "</s> in the text<s>", "1234.5 + 67", "x" * 90,
        "don't", "▁ itself", "ﬁ ligature", "\u00a0no-break",
    ]  # fmt: skip
    found = browser.run(
        """
        const { Tokenizer } = await import("/vendor/tokenizers.min.mjs");
        const { tokenize } = await import("/prompt.js");
        const tokenizer = new Tokenizer(JSON.parse(arguments[0]), {});
        return arguments[1].map((text) => tokenize(tokenizer, text, arguments[2]));
        """,
        tokenizer.to_str(),
        texts,
        {"tokenization": "apart"},
    )
    for text, ids in zip(texts, found, strict=True):
        assert ids == official_ids(tokenize(tokenizer, text), LayoutSpec()), text


def test_8_bit_weights_do_not_saturate(browser: Browser, address: str, tmp_path: Path) -> None:
    """Pairs of products of the largest values leave 16 bits; the sums must be exact. The target
    has 8-bit weights because of this."""
    assert find_target("web-wasm").weight_bits == 8
    node = helper.make_node(
        "DynamicQuantizeMatMul", ["x", "weight", "scale"], ["y"], domain="com.microsoft"
    )
    weight = np.full((64, 16), 127, np.int8)
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 16])],
        [numpy_helper.from_array(weight, "weight"),
         numpy_helper.from_array(np.ones(16, np.float32), "scale")],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    browser.driver.get(f"{address}package.json")
    found = browser.run(
        """
        const ort = await import("/vendor/ort.wasm.bundle.min.mjs");
        const session = await ort.InferenceSession.create(Uint8Array.from(arguments[0]));
        const x = new ort.Tensor("float32", new Float32Array(4 * 64).fill(255), [4, 64]);
        return Array.from((await session.run({ x })).y.data);
        """,
        list(model.SerializeToString()),
    )
    assert found == [255.0 * 127 * 64] * 64


def test_what_is_wrong_is_said(
    browser: Browser, address: str, folder: Path, tmp_path: Path
) -> None:
    browser.open(f"{address}?bundle=nowhere", state="failed")
    assert "no bundle at" in browser.status and "--target web-wasm" in browser.status
    damaged = Path(shutil.copytree(folder / "bundle", folder / "damaged"))
    weights = damaged / open_bundle(folder / "bundle").manifest.artifacts[0].data[0]
    content = bytearray(weights.read_bytes())
    content[1000] ^= 1
    weights.write_bytes(content)
    browser.open(f"{address}?bundle=damaged", state="failed")
    assert f"{weights.name}: damaged" in browser.status
    stored = Path(shutil.copytree(folder / "bundle", folder / "stored")) / MANIFEST
    said = json.loads(stored.read_text())
    said["recipe"]["kv_cache"] = "int8"
    stored.write_text(json.dumps(said))
    browser.open(f"{address}?bundle=stored", state="failed")
    assert "keys and values in int8" in browser.status
    bare = copy_page(tmp_path / "bare")
    shutil.rmtree(bare / "vendor")
    with served(bare) as elsewhere:
        browser.open(elsewhere, state="failed")
        assert "npm run vendor" in browser.status
    browser.open(address)
    text = tmp_path / "text.png"
    text.write_text("no picture")
    browser.choose_file(text)
    assert "text.png: not an image that this browser reads" in browser.warning
    assert browser.ask("What do you see?")[1]  # about the scene, which stayed
    browser.run(
        """
        const data = new DataTransfer();
        data.setData("text/plain", "no file");
        dispatchEvent(new DragEvent("drop", { dataTransfer: data, cancelable: true }));
        """
    )
    assert "no image file in what was dropped" in browser.warning
    browser.choose_file(Path(__file__).parents[2] / "examples" / "cat.jpg")
    assert browser.warning == ""
    browser.click("#random")
    message, tokens = browser.ask("word " * 1200)
    assert "the context holds 1024" in message and tokens == []
    assert browser.ask("What do you see?")[1]


STORED = ("llava_v1", "mobilevlm_v2", "blip2")
"""One image each, and int4, whose products onnxruntime-web has."""


@pytest.mark.parametrize("name", STORED)
def test_a_bundle_of_schema_1_gives_the_stored_answer(
    browser: Browser, address: str, folder: Path, name: str
) -> None:
    unpack_stored(name, folder)
    expected = json.loads((DATA / "schema1" / name / "expected.json").read_text())
    [image], [answer] = expected["images"], expected["answers"][:1]
    shutil.copy(DATA / image, folder / name / "image.png")
    browser.driver.get(f"{address}package.json")
    found = browser.run(
        """
        const { openModel } = await import("/model.js");
        const folder = new URL(`/${arguments[0]}/`, location.href).href;
        const model = await openModel(folder, 1, () => {});
        model.spec.conversation.eos_token_ids = [];
        const source = await (await fetch(`${folder}image.png`)).blob();
        const picture = { source, id: 1 };
        const [, prompt, count] = arguments;
        const answer = await model.answer(picture, prompt, count, () => {}, async () => false);
        return answer.tokens;
        """,
        name,
        expected["prompt"],
        len(answer["token_ids"]),
    )
    assert found == answer["token_ids"]


def test_ids_after_an_image_are_read_from_schema_1(
    browser: Browser, address: str, folder: Path
) -> None:
    """VILA's tokenizer gives three ids for the line that follows an image."""
    unpack_stored("vila", folder)
    browser.driver.get(f"{address}package.json")
    ids = browser.run(
        """
        const { Tokenizer } = await import("/vendor/tokenizers.min.mjs");
        const { readBundle, tokenizerDescription } = await import("/bundle.js");
        const { promptIds } = await import("/prompt.js");
        const bundle = await readBundle(new URL("/vila/", location.href).href, () => {});
        const tokenizer = new Tokenizer(tokenizerDescription(bundle), {});
        return promptIds(tokenizer, bundle.manifest.spec, "What is it?");
        """
    )
    start = ids.index(-200)
    assert ids[start : start + 4] == [-200, 1, 505, 13]


def unpack_stored(name: str, folder: Path) -> None:
    with tarfile.open(DATA / "schema1" / name / "bundle.tar.xz") as tar:
        tar.extractall(folder / name, filter="data")


TILES = to_dict(
    Tiles(size=512, longest_edge=2048, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
)
AUDIO = {"preparation": to_dict(Mel(bins=80))}


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        (("inputs",), {}, "takes no images"),
        (("inputs", "audio"), AUDIO, "takes audio, which"),
        (
            ("inputs", "image", "preparation"),
            {"kind": "dynamic_image"},
            "images prepared as 'dynamic_image'",
        ),
        (
            ("inputs", "image", "preparation"),
            {**TILES, "max_tiles": 1, "resample": "hamming"},
            "images resized by 'hamming'",
        ),
        (
            ("inputs", "image", "preparation"),
            {**TILES, "max_tiles": 1, "overlap": 8},
            "'overlap' in its preparation",
        ),
        (("inputs", "image", "preparation", "sharpen"), 2, "'sharpen' in its preparation"),
        (("inputs", "image", "preparation", "aspect"), "native", "aspect 'native'"),
        (("inputs", "image", "layout", "row_ids"), [5], "'row_ids' in its layout"),
        (("inputs", "image", "connector", "qformer"), {"vocab_size": 9}, "reads the question"),
        (("conversation", "tokenization"), "words", "tokenization 'words'"),
        (("conversation", "prefix_ids"), [5], "'prefix_ids' in its conversation"),
        (("decoder", "rope_sections"), [8, 12, 12], "'rope_sections' in its decoder"),
        (("decoder", "conv_layers"), [0, 2], "'conv_layers' in its decoder"),
        (("decoder", "encoder_layers"), 2, "a text encoder"),
    ],
)
def test_a_model_that_the_page_cannot_prepare_is_refused_by_name(
    browser: Browser,
    address: str,
    folder: Path,
    tmp_path: Path,
    place: tuple[str, ...],
    value: object,
    named: str,
) -> None:
    manifest = json.loads((folder / "bundle" / MANIFEST).read_text())
    set_in(manifest["spec"], place, value)
    message = read_in_page(browser, address, folder / tmp_path.name, manifest)
    assert named in message and message.endswith("choose another model, or use a newer page")


def test_a_model_that_splits_images_is_to_be_exported_for_the_page(
    browser: Browser, address: str, folder: Path
) -> None:
    manifest = json.loads((folder / "bundle" / MANIFEST).read_text())
    set_in(manifest["spec"], ("inputs", "image", "preparation"), TILES)
    message = read_in_page(browser, address, folder / "split", manifest)
    assert "splits images into tiles, and this page makes one of each" in message
    assert message.endswith("--target web-wasm'")


def test_parts_without_a_value_are_not_refused(
    browser: Browser, address: str, folder: Path
) -> None:
    """A part that a later version writes into every spec, with the value that changes nothing."""
    manifest = json.loads((folder / "bundle" / MANIFEST).read_text())
    for name, value in {"a": [], "b": 0, "c": None, "d": False, "e": "", "f": {}}.items():
        set_in(manifest["spec"], ("decoder", name), value)
    shutil.copytree(folder / "bundle", folder / "later")
    assert read_in_page(browser, address, folder / "later", manifest) == ""


def test_a_graph_that_asks_for_more_than_the_page_computes_is_refused(
    browser: Browser, address: str
) -> None:
    browser.driver.get(f"{address}package.json")
    message = browser.run(
        """
        const { checkInputs } = await import("/checks.js");
        checkInputs("decoder", ["inputs_embeds"], ["total_length", "inputs_embeds"]);
        try {
          checkInputs("decoder", ["inputs_embeds", "rotary_cos"], ["inputs_embeds"]);
        } catch (error) {
          return error.message;
        }
        """
    )
    assert message.startswith("the graph of the decoder stage asks for 'rotary_cos'")


def set_in(data: dict[str, Any], place: tuple[str, ...], value: object) -> None:
    """Sets a value inside a manifest's spec."""
    *outer, last = place
    for key in outer:
        data = data.setdefault(key, {})
    data[last] = value


def read_in_page(browser: Browser, address: str, bundle: Path, manifest: dict[str, Any]) -> str:
    """The message by which the page refuses a manifest; empty where it reads the bundle."""
    bundle.mkdir(exist_ok=True)
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    browser.driver.get(f"{address}package.json")
    return str(
        browser.run(
            """
            const { readBundle } = await import("/bundle.js");
            try {
              await readBundle(new URL(`/${arguments[0]}/`, location.href).href, () => {});
            } catch (error) {
              return error.message;
            }
            return "";
            """,
            bundle.name,
        )
    )

"""The bundle of the target onnxruntime-genai, run by its wheel: same greedy tokens as the Python
runtime, with an image and without."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from checkpoints import with_windows
from conftest import DATA, fixture_named, install_or_skip, refusal

import mobilevlm
from mobilevlm.bundle import open_bundle
from mobilevlm.conversation import render, tokenize, user_message
from mobilevlm.export import settled
from mobilevlm.export.targets import find_target
from mobilevlm.preparation import prepare
from mobilevlm.prompt import Run, expand
from mobilevlm.runtime import VLM

SCRIPT = Path(__file__).parents[1] / "genai_answers.py"
SECONDS = 300
COUNT = 24
FAMILIES = ("nano", "llava_hf", "llava_next", "mobilevlm_v2", "moe_llava_qwen", "smolvlm2",
            "internvl3", "vila")  # fmt: skip
TEXTS = ("What is in the image?", "Two spaces,\n a line, and 17 × 3.", "Größe: naïve 日本 🙂")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that onnxruntime-genai is in, beside the onnxruntime that is installed."""
    found = find_spec("onnxruntime_genai")
    if found is not None and found.origin is not None:
        return Path(found.origin).parents[1]
    folder = tmp_path_factory.mktemp("genai")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
               "--no-deps", "--target", str(folder), "onnxruntime-genai"]  # fmt: skip
    install_or_skip("onnxruntime-genai", command, folder)
    return folder


@dataclass(frozen=True)
class Exported:
    """A bundle of the target, its model in the Python runtime, and a question about an image."""

    name: str
    folder: Path
    vlm: VLM
    image: Path
    prompt: str


@pytest.fixture(scope="module", params=FAMILIES)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Exported]:
    yield from export_named(request.param, tmp_path_factory.mktemp("genai") / "bundle")


def export_named(name: str, folder: Path) -> Iterator[Exported]:
    """nano as the target has it; random weights in float32, for in 4 bits they are so near to ties
    that sums in another order decide."""
    checkpoint, image, prompt = "nano", DATA / "llava_hf" / "image.png", "Describe the image."
    tower = None
    if name != "nano":
        fixture = fixture_named(name)
        checkpoint, image, prompt = str(fixture.checkpoint), fixture.image, fixture.prompt
        tower = fixture.options.vision_tower
    target = find_target("onnxruntime-genai")
    with pytest.MonkeyPatch.context() as patch:
        if name != "nano":
            exact = replace(target, recipe="fp32", weight_bits=None)
            patch.setattr(settled, "find_target", lambda _: exact)
        mobilevlm.export(checkpoint, folder, target=target.name, vision_tower=tower, measure=False)
    with mobilevlm.load(folder, engine="onnx") as vlm:
        yield Exported(name, folder, vlm, image, prompt.replace("<image>", "").strip())


def request_of(exported: Exported, image: Path | None) -> dict[str, Any]:
    """Ids with one for each row of the image, and pixels, as an app has to make them."""
    spec = exported.vlm.spec
    images = [] if image is None else [prepare(image, spec.image)]
    text = render(spec.conversation, [user_message(exported.prompt, len(images))])
    tokens = tokenize(exported.vlm.tokenizer, text, spec.conversation)
    config = json.loads((exported.folder / "genai_config.json").read_text())
    ids: list[int] = []
    for piece in expand(tokens, (prepared.pieces for prepared in images)):
        image_id = config["model"]["image_token_id"]
        ids += [image_id] * piece.rows if isinstance(piece, Run) else [piece]
    pixels = [arrays["pixels"].tolist() for prepared in images for arrays in prepared.arrays]
    rows = spec.image.connector.num_rows * len(pixels)
    return {"ids": ids, "pixels": pixels or None, "rows": rows, "count": COUNT, "texts": TEXTS}


def run_wheel(wheel: Path, bundle: Path, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    file = bundle.with_name("requests.json")
    file.write_text(json.dumps(requests))
    command = [sys.executable, str(SCRIPT), str(bundle), str(file)]
    paths = os.pathsep.join([str(wheel), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_wheel_says_the_tokens_of_the_python_runtime(exported: Exported, wheel: Path) -> None:
    vlm, prompt = exported.vlm, exported.prompt
    requests = [request_of(exported, image) for image in (exported.image, None)]
    found = run_wheel(wheel, exported.folder, requests)
    for answer, images in zip(found, ([exported.image], []), strict=True):
        expected = vlm.generate(prompt, images, max_new_tokens=COUNT).token_ids
        ends = set(vlm.spec.conversation.eos_token_ids)
        tokens = [token for token in answer["tokens"] if token not in ends]
        assert tokens == [token for token in expected if token not in ends], images
        assert len(tokens) > 3
        # Its tokenizer leaves the id that begins a text to the app.
        encode = vlm.tokenizer.encode
        assert answer["texts"] == [encode(text, add_special_tokens=False).ids for text in TEXTS]


def test_weights_are_in_the_bundle_once(exported: Exported) -> None:
    manifest = open_bundle(exported.folder).manifest
    assert manifest.other_runtime is not None
    data = [name for name in manifest.files if name.endswith(".onnx_data")]
    assert len(data) == 3
    assert set(manifest.other_runtime.files) <= manifest.files.keys()


def test_the_decoder_has_windows_over_buffers_of_all_positions(tmp_path: Path) -> None:
    checkpoint = with_windows(fixture_named("internvl3").checkpoint, tmp_path / "windows")
    exact = replace(find_target("onnxruntime-genai"), recipe="fp32", weight_bits=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settled, "find_target", lambda _: exact)
        mobilevlm.export(checkpoint, tmp_path / "b", target=exact.name, measure=False)
    with mobilevlm.load(tmp_path / "b", engine="onnx") as vlm:
        decoder = vlm.spec.decoder
        rows = np.random.default_rng(0).standard_normal((40, decoder.hidden_size), np.float32)
        expected = vlm.embeds_logits(rows)
    assert decoder.sliding_layers == (1, 2) and decoder.sliding_window == 12
    session = onnxruntime.InferenceSession(
        tmp_path / "b" / "onnx" / "genai_decoder_model_merged.onnx"
    )
    empty = np.empty((1, decoder.num_key_value_heads, 0, decoder.cache_head_dim), np.float32)
    names = [f"{layer}.{part}" for layer in range(3) for part in ("key", "value")]
    past, found = {f"past_key_values.{name}": empty for name in names}, []
    for start, end in [(0, 25), (25, 39), (39, 40)]:
        given = {
            "inputs_embeds": rows[None, start:end], "attention_mask": np.ones((1, end), np.int64)
        }  # fmt: skip
        logits, *kept = session.run(
            ["logits", *(f"present.{name}" for name in names)], given | past
        )
        past = dict(zip(past, kept, strict=True))
        found.append(logits[0, -1])
    np.testing.assert_allclose(found, expected[[24, 38, 39]], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["blip2_t5", "instructblip", "qwen2_5_vl", "qwen3_vl", "gemma3", "gemma4", "lfm2_vl"]
)
def test_a_model_that_its_pipeline_has_no_place_for_is_refused_before_work(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", fixture_named(name).checkpoint, "-o", tmp_path / "b",
             "--target", "onnxruntime-genai"]  # fmt: skip
    assert "has no place for" in refusal(capsys, *words, code=1)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("exported", ["nano"], indirect=True)
def test_a_c_program_answers_with_the_text_of_the_python_runtime(
    exported: Exported, wheel: Path, tmp_path: Path
) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: the C example is not tested (apt-get install gcc)")
    library = wheel / "onnxruntime_genai"
    runtime = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.1.*"))
    (tmp_path / "libonnxruntime.so").symlink_to(runtime)
    program, root = tmp_path / "ask", Path(__file__).parents[2]
    source = root / "examples" / "c" / "ask.c"
    command = [compiler, "-std=c11", "-Wall", "-Wextra", "-Werror", source,
               "-I", root / "tests" / "genai_c", "-L", library, "-lonnxruntime-genai",
               "-Wl,--allow-shlib-undefined", "-o", program]  # fmt: skip
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    vlm, spec = exported.vlm, exported.vlm.spec
    text = render(spec.conversation, [user_message(exported.prompt, 1)])
    before, after = text.split("<image>")
    pixels = prepare(exported.image, spec.image).arrays[0]["pixels"]
    (tmp_path / "image.rgb").write_bytes(pixels.tobytes())
    config = json.loads((exported.folder / "genai_config.json").read_text())
    begin = vlm.tokenizer.encode("").ids
    arguments = [exported.folder, tmp_path / "image.rgb", spec.image.square.size,
                 spec.image.connector.num_rows, config["model"]["image_token_id"], before, after,
                 *begin]  # fmt: skip
    places = os.pathsep.join([str(library), str(tmp_path)])
    done = subprocess.run(
        [str(program), *map(str, arguments)], capture_output=True, text=True, timeout=SECONDS,
        env={**os.environ, "LD_LIBRARY_PATH": places},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = vlm.generate(exported.prompt, [exported.image], max_new_tokens=64).text
    assert done.stdout.strip() == expected.strip() != ""

"""The bundle of the target transformers-js, run by the npm package in Node and in Chromium: same
ids and greedy tokens as the Python runtime."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import fixture_named, install_or_skip, refusal
from numpy.typing import NDArray
from PIL import Image, ImageOps

import mobilevlm
from mobilevlm.bundle import open_bundle
from mobilevlm.input_spec import Tiles
from mobilevlm.preparation import prepare
from mobilevlm.runtime import VLM

EXAMPLE = Path(__file__).parents[2] / "examples" / "transformers-js"
SCRIPT = Path(__file__).parents[1] / "transformers_js.mjs"
SECONDS = 300
COUNT = 24
MOST = 64
"""Tokens of an answer of the example."""
PROMPTS = ("What is it?", "Describe the image.", "How many are there?", "Is it red?", "Where?")
"""Questions beside a fixture's own, for the answer that is sure for longest."""
NEAR_TIE = 0.05
"""Difference in logarithmic probability that the browser's sums may not keep."""
COLOURS = ((200, 90, 40), (40, 90, 200), (90, 200, 40), (250, 250, 240), (20, 20, 30), (128,) * 3)
FAMILIES = ("llava_hf", "llava_onevision", "smolvlm2", "idefics3")


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example, the npm package and the script."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("npm is not installed: transformers.js is not tested (apt-get install npm)")
    folder = tmp_path_factory.mktemp("npm") / "example"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("node_modules"))
    shutil.copy(SCRIPT, folder)
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock"]
    install_or_skip("transformers.js", command, folder)
    return folder


@dataclass(frozen=True)
class Exported:
    """A bundle of the target, and its model in the Python runtime."""

    name: str
    folder: Path
    vlm: VLM

    @property
    def prompt(self) -> str:
        return str(fixture_named(self.name).expected["user_prompt"])


@pytest.fixture(scope="module", params=FAMILIES)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Exported]:
    folder = tmp_path_factory.mktemp("js") / "bundle"
    checkpoint = fixture_named(request.param).checkpoint
    mobilevlm.export(checkpoint, folder, target="transformers-js", measure=False)
    with mobilevlm.load(folder, engine="onnx") as vlm:
        yield Exported(request.param, folder, vlm)


def run_node(package: Path, bundle: Path, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    file = package / "requests.json"
    file.write_text(json.dumps(requests))
    command = ["node", SCRIPT.name, str(bundle), str(file)]
    done = subprocess.run(command, cwd=package, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def normalised(image: Path, vlm: VLM) -> NDArray[np.float32]:
    """Pixels as transformers.js gives them to the encoder, prepared by the Python runtime."""
    square = vlm.spec.image.square
    pixels = np.stack([arrays["pixels"] for arrays in prepare(image, vlm.spec.image).arrays])
    values = (pixels / 255 - np.array(square.mean)) / np.array(square.std)
    found: NDArray[np.float32] = values.astype(np.float32).transpose(0, 3, 1, 2)
    return found


def unresampled(exported: Exported, folder: Path) -> Path:
    """An image that neither side resizes; of one colour where images become tiles, since the whole
    made small would differ.

    Of several colours, kinds or angles that whose answer is sure for longest: random weights come
    near ties, where the last bit of a sum decides.
    """
    square = exported.vlm.spec.image.square
    if isinstance(square, Tiles):
        size = (square.longest_edge,) * 2
        shown = [Image.new("RGB", size, colour) for colour in COLOURS]
    else:
        with Image.open(fixture_named(exported.name).image) as given:
            photo = given.convert("RGB").resize((square.size,) * 2)
        seen = [photo, ImageOps.mirror(photo), ImageOps.invert(photo), ImageOps.solarize(photo)]
        shown = [one.rotate(angle) for one in seen for angle in range(0, 360, 90)]
    image = max(shown, key=lambda one: len(sure_tokens(exported, one)))
    path = folder / "exact.png"
    image.save(path)
    return path


def sure_tokens(
    exported: Exported, image: Path | Image.Image, prompt: str | None = None
) -> list[int]:
    """The answer up to where the second best token is nearly as likely as the best."""
    answer = exported.vlm.generate(
        prompt or exported.prompt, [image], max_new_tokens=MOST, logprobs=True, top_logprobs=2
    )
    assert answer.logprobs is not None
    best = ([one.logprob for one in token.top] for token in answer.logprobs)
    sure = [first - second > NEAR_TIE for first, second in best]
    return answer.token_ids[: (*sure, False).index(False)]


def test_node_answers_with_the_tokens_of_the_python_runtime(
    exported: Exported, package: Path, tmp_path: Path
) -> None:
    """For a photo with pixels of the Python runtime, for an image that nobody resizes with its own.

    Its image library has other filters than Pillow, so that its own pixels of a photo differ by
    about a level of brightness; LLaVA's bicubic would be 6 to 8 levels off, for it does not smooth.
    """
    vlm, prompt = exported.vlm, exported.prompt
    photo, exact = fixture_named(exported.name).image, unresampled(exported, tmp_path)
    asked = max((prompt, *PROMPTS), key=lambda one: len(sure_tokens(exported, photo, one)))
    shared = {"prompt": prompt, "count": COUNT}
    given, pixels = normalised(photo, vlm), normalised(exact, vlm)
    by_photo, by_exact, by_itself = run_node(
        package,
        exported.folder,
        [
            {
                "prompt": asked,
                "count": COUNT,
                "image": str(photo),
                "pixels": given.ravel().tolist(),
            },
            {**shared, "image": str(exact), "pixels": None},
            {**shared, "image": str(photo), "pixels": None, "count": 1},
        ],
    )
    assert by_photo["ids"] == vlm.prompt_ids(asked, images=[photo])
    for path, question, found in ((photo, asked, by_photo), (exact, prompt, by_exact)):
        answer = vlm.generate(question, [path], max_new_tokens=COUNT)
        sure = sure_tokens(exported, path, question)[: len(answer.token_ids)]
        assert found["tokens"][: len(sure)] == sure, path
        assert len(sure) > 3
    assert np.abs(np.array(by_exact["pixels"]) - pixels.ravel()).max() < 1e-5
    if exported.name != "llava_onevision":  # pads below and on the right, not around
        levels = np.array(vlm.spec.image.square.std).reshape(3, 1, 1) * 255
        difference = np.array(by_itself["pixels"]).reshape(given.shape) - given
        assert np.abs(difference * levels).mean() < 2


@pytest.fixture(scope="module")
def driver(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium and the address of the example's page."""
    from browser import Browser, served

    window = Browser(tmp_path_factory.mktemp("profile"))
    try:
        with served(package, isolated=False) as address:
            yield window, address
    finally:
        window.driver.quit()


def test_the_page_answers_in_chromium(
    exported: Exported, package: Path, driver: Any, tmp_path: Path
) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    window, address = driver
    image = unresampled(exported, tmp_path)

    def wait() -> None:
        state = "return document.body.dataset.state"
        ends = ("ready", "failed")
        WebDriverWait(window.driver, SECONDS, 0.1).until(
            lambda it: it.execute_script(state) in ends
        )

    (package / exported.name).symlink_to(exported.folder)
    window.driver.get(f"{address}index.html?bundle={exported.name}")
    wait()
    window.driver.find_element("id", "file").send_keys(str(image))
    window.run("document.getElementById('question').value = arguments[0]", exported.prompt)
    window.click("#ask")
    wait()
    found = window.run("return document.getElementById('answer').textContent")
    with Image.open(image) as shown:
        sure = sure_tokens(exported, shown)
    assert len(sure) >= 8
    assert found.startswith(exported.vlm.tokenizer.decode(sure).rstrip("\ufffd"))


def test_weights_are_in_the_bundle_once(exported: Exported) -> None:
    manifest = open_bundle(exported.folder).manifest
    assert manifest.other_runtime is not None
    graphs = [name for name in manifest.files if name.endswith(".onnx")]
    data = [name for name in manifest.files if name.endswith(".onnx_data")]
    assert len(graphs) == 5 and len(data) == 3
    assert set(manifest.other_runtime.files) <= manifest.files.keys()


@pytest.mark.parametrize("exported", ["llava_hf"], indirect=True)
def test_the_example_answers_in_node(exported: Exported, package: Path, tmp_path: Path) -> None:
    image = unresampled(exported, tmp_path)
    command = ["node", "ask.mjs", str(exported.folder), str(image), exported.prompt]
    done = subprocess.run(command, cwd=package, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = exported.vlm.generate(exported.prompt, [image], max_new_tokens=MOST)
    with Image.open(image) as shown:
        sure = sure_tokens(exported, shown)
    if sure == expected.token_ids:
        assert done.stdout.strip() == expected.text.strip()
    assert len(sure) >= MOST // 4
    words = exported.vlm.tokenizer.decode(sure).strip().rstrip("\ufffd")
    assert done.stdout.strip().startswith(words)


def test_exporting_again_gives_the_same_bytes(tmp_path: Path) -> None:
    """In place, and where a plain export follows, whose graphs have the usual names."""
    checkpoint, folder = fixture_named("llava_hf").checkpoint, tmp_path / "bundle"
    plain = {"recipe": "int8", "weight_bits": 7, "measure": False}
    found = []
    for _ in range(2):
        mobilevlm.export(checkpoint, folder, target="transformers-js", measure=False)
        found.append((folder / "manifest.json").read_bytes())
    mobilevlm.export(checkpoint, folder, **plain)  # type: ignore[arg-type]
    mobilevlm.export(checkpoint, tmp_path / "plain", **plain)  # type: ignore[arg-type]
    assert found[0] == found[1]
    texts = [(place / "manifest.json").read_bytes() for place in (folder, tmp_path / "plain")]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "name",
    ["llava_next", "internvl3", "fast_vlm", "nano", "gemma3", "gemma4", "qwen3_vl", "lfm2_vl"],
)
def test_a_family_that_it_does_not_have_is_refused_before_work(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = "nano" if name == "nano" else fixture_named(name).checkpoint
    words = ["export", checkpoint, "-o", tmp_path / "b", "--target", "transformers-js"]
    assert "transformers.js has" in refusal(capsys, *words, code=1)
    assert not (tmp_path / "b").exists()

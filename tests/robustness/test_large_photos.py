"""Photos of 20 megapixels stay within what a person allows, where images become tiles."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import BundleOf
from PIL import Image

from mobilevlm.bundle import read_manifest
from mobilevlm.plan import PREFILL_CHUNK, Plan
from mobilevlm.runtime.memory.estimate import estimate

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="Linux only")
MEASURE = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from mobilevlm.errors import ImageError
from mobilevlm.runtime import load
from mobilevlm.runtime.machine import peak_memory_mb
folder, limit, *photos = sys.argv[1:]
with load(folder, max_memory_mb=float(limit)) as vlm:
    for photo in photos:
        try:
            answer = vlm.generate("What is it?", [photo], max_new_tokens=4, ignore_eos=True)
            print(len(answer.token_ids))
        except ImageError as error:
            print(error)
print(peak_memory_mb())
"""
SIZE = 5472, 3648


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A photo of noise in two formats."""
    folder = tmp_path_factory.mktemp("photos")
    rows = np.random.default_rng(0).integers(0, 256, (SIZE[1] // 8, SIZE[0] // 8, 3), np.uint8)
    image = Image.fromarray(rows).resize(SIZE, Image.Resampling.NEAREST)
    made = {kind: folder / f"photo.{kind}" for kind in ("jpg", "png")}
    image.save(made["jpg"], quality=50)
    image.save(made["png"], compress_level=1)
    return made


def least(bundle: Path) -> float:
    """Megabytes of a question by the plan that takes least."""
    manifest, _ = read_manifest(bundle)
    return estimate(manifest, Plan("onnx", memory="in turn")).peak / 1e6


def answers(bundle: Path, limit: float, *photos: Path) -> list[str]:
    """Numbers of tokens of the answers, or refusals. The peak is held to the limit."""
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, bundle, limit, *photos]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *found, peak = done.stdout.splitlines()
    assert float(peak) <= limit, (peak, limit)
    return found


@pytest.mark.parametrize("name", ["smolvlm2", "internvl3", "llava_next"])
def test_photos_are_answered_within_a_limit_that_holds_one_of_them(
    name: str, bundle_of: BundleOf, photos: dict[str, Path]
) -> None:
    bundle = bundle_of(name, "fp32")
    assert answers(bundle, least(bundle) + 130, *photos.values()) == ["4", "4"]


def test_photos_beyond_a_limit_are_made_smaller_or_refused(
    bundle_of: BundleOf, photos: dict[str, Path]
) -> None:
    bundle = bundle_of("smolvlm2", "fp32")
    smaller, refused = answers(bundle, least(bundle) + 40, *photos.values())
    assert smaller == "4"
    assert "decoding 5472 × 3648 pixels takes" in refused and "(--max-memory)" in refused


LONG = """
import sys
from mobilevlm.runtime import load
from mobilevlm.runtime.engines.onnx.engine import OnnxDecoder
from mobilevlm.runtime.machine import peak_memory_mb
folder, photo, words = sys.argv[1:]
chunks, tiles, append = [], [], OnnxDecoder._append_chunk
def noted(self, state, session, rows, *further):
    chunks.append(len(rows))
    return append(self, state, session, rows, *further)
OnnxDecoder._append_chunk = noted
with load(folder, threads=1) as vlm:
    encode = vlm._vision.encode
    vlm._vision.encode = lambda arrays: tiles.append(arrays["pixels"].shape) or encode(arrays)
    answer = vlm.generate("a " * int(words), [photo], max_new_tokens=1)
print(answer.prompt_tokens, max(chunks), len(tiles), *set(tiles), peak_memory_mb(), sep="|")
"""


def test_a_prompt_of_17_tiles_and_8000_tokens_is_computed_in_chunks(
    bundle_of: BundleOf, tmp_path: Path
) -> None:
    """Its attention scores as a whole would take 2.3 GB (9 heads)."""
    Image.fromarray(np.zeros((256, 256, 3), np.uint8)).save(tmp_path / "square.png")
    peaks = []
    for words in (10, 7950):
        command = [sys.executable, "-W", "ignore", "-c", LONG, bundle_of("smolvlm2", "fp32"),
                   tmp_path / "square.png", words]  # fmt: skip
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        tokens, chunk, tiles, shape, peak = done.stdout.split("|")
        assert int(chunk) <= PREFILL_CHUNK and (tiles, shape) == ("17", "(64, 64, 3)")
        peaks.append(float(peak))
    assert int(tokens) > 7900, tokens
    assert peaks[1] - peaks[0] < 500, peaks

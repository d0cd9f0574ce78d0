"""Tiles of an image give the same rows one after the other and at the same time."""

from __future__ import annotations

import shutil
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA, BundleOf
from PIL import Image

import mobilevlm
from mobilevlm.bundle import Bundle, open_bundle
from mobilevlm.errors import BundleError
from mobilevlm.input_spec import Tiles
from mobilevlm.plan import Plan, lighter_plans
from mobilevlm.preparation import most_runs
from mobilevlm.prompt import Arrays, Rows
from mobilevlm.runtime.engines import Float32
from mobilevlm.runtime.memory.estimate import estimate
from mobilevlm.runtime.memory.fitting import fit_plan
from mobilevlm.runtime.memory.limits import Limit
from mobilevlm.runtime.sequence.encoding import encode_runs
from mobilevlm.runtime.tuning import tune as tuning
from mobilevlm.spec import with_image

TWO = Plan("onnx", vision_threads=2, tiles_at_once=2)
ONE = replace(TWO, tiles_at_once=1)


@dataclass
class Encoder:
    """Counts the runs that are under way; each waits until ``wanted`` are, or for a moment."""

    wanted: int
    most: int = 0
    now: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)

    def encode(self, arrays: Arrays) -> Rows:
        with self.changed:
            self.now += 1
            self.most = max(self.most, self.now)
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.most >= self.wanted, timeout=0.05)
        with self.changed:
            self.now -= 1
        if arrays["pixels"] < 0:
            raise BundleError("the encoder failed")
        return Rows(np.full((1, 1), arrays["pixels"], np.float32))

    def features(self, arrays: Arrays) -> Float32:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


@pytest.mark.parametrize(("at_once", "most"), [(1, 1), (2, 2), (9, 5)])
def test_so_many_runs_are_under_way_and_rows_keep_their_order(at_once: int, most: int) -> None:
    encoder, runs = Encoder(most), [{"pixels": np.array(number)} for number in range(5)]
    found = list(encode_runs(encoder, runs, at_once))
    assert [int(rows.embeds[0, 0]) for rows in found] == list(range(5))
    assert encoder.most == most


def test_an_error_of_one_run_is_told_and_no_run_is_left_behind() -> None:
    encoder = Encoder(2)
    runs = [{"pixels": np.array(number)} for number in (0, -1, *range(20))]
    with pytest.raises(BundleError, match="the encoder failed"):
        list(encode_runs(encoder, runs, 2))
    assert encoder.now == 0


@pytest.mark.parametrize("name", ["smolvlm2", "internvl3", "llava_next"])
@pytest.mark.parametrize("recipe", ["fp32", "int8"])
def test_rows_of_tiles_at_the_same_time_are_those_of_one_after_the_other_to_the_bit(
    name: str, recipe: str, bundle_of: BundleOf
) -> None:
    image = np.asarray(Image.open(DATA / name / "image.png").convert("RGB"))
    rows, answers = [], []
    for plan in (ONE, TWO):
        with mobilevlm.load(bundle_of(name, recipe), plan=plan) as vlm:
            assert len(vlm.prepare_image(image).arrays) > 2
            rows.append(vlm.encode_image(image))
            answers.append(vlm.generate("What is it?", [image], max_new_tokens=4).token_ids)
    assert np.array_equal(rows[0], rows[1]) and answers[0] == answers[1]


@pytest.fixture
def large(bundle_of: BundleOf) -> Bundle:
    """SmolVLM's fixture with tiles and a tower of SmolVLM-256M's size."""
    bundle = open_bundle(bundle_of("smolvlm2", "fp32"))
    manifest = bundle.manifest
    image = manifest.spec.image
    assert isinstance(image.preparation, Tiles)
    encoder = replace(
        image.transformer, hidden_size=768, intermediate_size=3072, image_size=512, patch_size=16
    )
    tiles = replace(image.preparation, size=512, longest_edge=2048)
    spec = with_image(manifest.spec, preparation=tiles, encoder=encoder)
    return replace(bundle, manifest=replace(manifest, spec=spec))


def test_the_estimate_counts_tiles_that_are_encoded_at_the_same_time(large: Bundle) -> None:
    image = large.manifest.spec.image
    assert most_runs(image) == 17
    plans = [Plan("onnx", vision_threads=32, tiles_at_once=count) for count in (1, 2, 17, 30)]
    one, two, all_, more = (estimate(large.manifest, plan).working for plan in plans)
    buffers = 4 * 1024 * (4 * 768 + 5 * 3072)
    assert two - one == pytest.approx(buffers) and all_ - one == pytest.approx(16 * buffers)
    assert more == all_
    single = estimate(large.manifest, replace(plans[2], vision_threads=1)).working
    assert single == one  # threads bound it
    scarce = [replace(plan, memory="compact") for plan in plans]
    assert len({estimate(large.manifest, plan).peak for plan in scarce}) == 1


def test_the_estimate_counts_the_pixels_and_rows_of_all_tiles(large: Bundle) -> None:
    image = large.manifest.spec.image
    assert isinstance(image.preparation, Tiles)
    whole = with_image(large.manifest.spec, preparation=replace(image.preparation, max_tiles=1))
    many, one = (
        estimate(replace(large.manifest, spec=spec), Plan("onnx"), positions=8).working
        for spec in (large.manifest.spec, whole)
    )
    rows = image.connector.num_tokens * image.connector.out_size
    assert many - one == pytest.approx((8 * 17 - 3) * 512**2 + 16 * 2 * 4 * rows)


def test_a_limit_makes_a_plan_encode_one_tile_at_a_time_before_it_is_given_up(
    large: Bundle,
) -> None:
    packed = replace(TWO, vision_weights="packed")
    order = lighter_plans(packed)
    assert order[:3] == [packed, replace(packed, tiles_at_once=1), ONE]
    assert all(plan.tiles_at_once == 1 for plan in order[1:])
    assert lighter_plans(Plan("gguf")) == [Plan("gguf")]
    peaks = [estimate(large.manifest, plan).peak for plan in (ONE, TWO)]
    for peak, expected in ((peaks[0], ONE), (peaks[1], TWO)):
        assert fit_plan(large, TWO, [Limit("asked", peak, "--max-memory")]) == expected


def test_tune_tries_as_many_tiles_at_the_same_time_as_the_limit_allows(
    large: Bundle, bundle_of: BundleOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mobilevlm.plan.default_threads", lambda: 4)
    peaks = [
        estimate(large.manifest, Plan("onnx", tiles_at_once=count)).peak for count in (1, 2, 4)
    ]
    for peak, expected in zip(peaks, ([1], [1, 2], [1, 2, 4]), strict=True):
        limits = [Limit("asked", peak, "--max-memory")]
        assert tuning._tiles(large, Plan("onnx"), limits) == expected
    fixed = open_bundle(bundle_of("tiny", "int4"))
    assert tuning._tiles(fixed, Plan("onnx"), []) == [1]


def test_tune_measures_tiles_at_the_same_time_and_leaves_a_plan_that_is_used(
    bundle_of: BundleOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("mobilevlm.plan", "mobilevlm.runtime.tuning.tune"):
        monkeypatch.setattr(f"{place}.default_threads", lambda: 2)
    monkeypatch.setattr("mobilevlm.runtime.tuning.questions.thread_counts", lambda most: [most])
    folder = Path(shutil.copytree(bundle_of("smolvlm2", "fp32"), tmp_path / "bundle"))
    found, _ = tuning.tune_bundle(folder, budget_seconds=1e6, engine="onnx")
    asked = [item for item in found.candidates if "tiles of an image" in item.question]
    assert [item.label for item in asked] == ["1", "2"]
    [chosen] = [int(item.label) for item in asked if item.chosen]
    assert found.plans[0].tiles_at_once == chosen
    with mobilevlm.load(folder) as vlm:
        assert vlm.plan.tiles_at_once == chosen


def test_known_images_are_told_apart_by_their_tiles(bundle_of: BundleOf) -> None:
    """All tiles of a grey image are equal; only the grids differ, which set the order of the rows.
    The same image in fewer tiles is encoded anew, and in as many it is known."""
    wide, tall = (np.full(shape, 127, np.uint8) for shape in ((40, 80, 3), (80, 40, 3)))
    with mobilevlm.load(bundle_of("llava_next", "fp32")) as vlm:
        found = [vlm.prepare_image(image) for image in (wide, tall)]
        tiles = [np.stack([arrays["pixels"] for arrays in image.arrays]) for image in found]
        assert np.array_equal(tiles[0], tiles[1])
        assert found[0].digest != found[1].digest
        few = vlm.prepare_image(wide, max_tiles=1)
        assert few.digest != found[0].digest
        assert vlm.prepare_image(wide).digest == found[0].digest
        reused = [
            vlm.generate("What is it?", [image], max_new_tokens=1).reused.images
            for image in (found[0], few, found[1], found[0])
        ]
    assert reused == [0, 0, 0, 1]

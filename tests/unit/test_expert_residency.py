"""A limit on resident experts: what is given up, that nothing else changes, what is refused."""

from __future__ import annotations

import dataclasses
import mmap
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Fixture, fixture_named, memory_weights, refusal, run_program

import mobilevlm
from mobilevlm.console.progress import ignore
from mobilevlm.errors import MobileVLMError
from mobilevlm.export.gguf.decoder import write_decoder
from mobilevlm.gguf.file import read_gguf
from mobilevlm.prompt import Rows
from mobilevlm.reference import ReferenceModel
from mobilevlm.runtime.engines.ggml.engine import GgmlDecoder
from mobilevlm.runtime.engines.ggml.residency import ExpertResidency

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
LLAMA = pytest.mark.skipif(
    os.environ.get("MOBILEVLM_WITHOUT_LLAMA") == "1", reason="asked to go without llama.cpp"
)

EXPERT = 3 * 64 * 96 * 4
"""Bytes of one of the fixture's 2 × 4 experts in float32."""
LAYER = 4 * EXPERT


@pytest.fixture(scope="module")
def sparse() -> Fixture:
    return fixture_named("moe_llava_stablelm")


@pytest.fixture(scope="module")
def path(sparse: Fixture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("residency") / "decoder.gguf"
    write_decoder(sparse.model, "f32", path, ignore)
    return path


def residency(sparse: Fixture, path: Path, limit: int) -> tuple[ExpertResidency, mmap.mmap]:
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    spec = sparse.model.spec.decoder
    return ExpertResidency(read_gguf(path), content, spec, limit), content


def resident_bytes(path: Path) -> int:
    """Return the resident bytes of a file's mappings in this process, from /proc/self/smaps."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            inside = line.endswith(f" {path}")
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_the_expert_least_used_of_late_is_given_up(sparse: Fixture, path: Path) -> None:
    limit, _ = residency(sparse, path, LAYER)
    for _ in range(3):
        limit.use(0, np.array([[0, 1]], np.int32))
    limit.use(0, np.array([[0, 2]], np.int32))
    limit.use(0, np.array([[0, 3]], np.int32))
    before = limit.brought_in
    limit.use(2, np.array([[0, 1]], np.int32))  # there is no room for all
    assert 0 < limit.brought_in - before <= 2 * EXPERT
    before = limit.brought_in
    limit.use(0, np.array([[0, 1]], np.int32))  # used most, so they stayed
    assert limit.brought_in == before
    limit.use(0, np.array([[2, 3]], np.int32))
    assert limit.brought_in > before


@LLAMA
def test_logits_are_the_same_to_the_last_bit(sparse: Fixture, path: Path) -> None:
    spec, embeds = sparse.model.spec.decoder, sparse.arrays["inputs_embeds"][0]

    def logits(max_resident: int | None) -> list[np.ndarray]:
        decoder = GgmlDecoder(path, spec, 1, max_resident)
        state = decoder.new_state()
        first = decoder.prefill(state, Rows(embeds), count=None)
        return [first, *(decoder.step(state, token).copy() for token in range(12))]

    for free, limited in zip(logits(None), logits(LAYER), strict=True):
        assert np.array_equal(free, limited)


@LLAMA
def test_what_does_not_fit_the_limit_leaves_memory(sparse: Fixture, tmp_path: Path) -> None:
    decoder = dataclasses.replace(
        sparse.model.spec.decoder, intermediate_size=2048, context_length=64
    )
    spec = dataclasses.replace(sparse.model.spec, decoder=decoder)
    with torch.device("meta"):
        shapes = {name: tuple(x.shape) for name, x in ReferenceModel(spec).named_parameters()}
    model = dataclasses.replace(
        sparse.model, spec=spec, weights=memory_weights(shapes, tmp_path / "weights")
    )
    layer = 4 * 3 * decoder.hidden_size * decoder.intermediate_size * 4
    embeds = np.random.default_rng(0).standard_normal((40, decoder.hidden_size), np.float32)
    used = {}
    for label, limit in (("free", None), ("limited", layer)):
        path = tmp_path / f"{label}.gguf"
        write_decoder(model, "f32", path, ignore)
        engine = GgmlDecoder(path, decoder, 1, limit)
        engine.prefill(engine.new_state(), Rows(embeds))
        used[label] = resident_bytes(path)
        assert (engine.brought_in_bytes or 0) > (-1 if limit is None else 1.5 * layer)
    # Two layers have experts and one may stay. What expert and neighbour share stays too, and the
    # system maps up to 64 KB around a page that is asked for.
    assert used["free"] - used["limited"] >= layer / 2


@pytest.mark.parametrize(
    ("fixture_name", "limit", "message"),
    [
        ("moe_llava_stablelm", LAYER // 2, "a prompt needs all experts of a layer at once: allow"),
        ("mobilevlm_v2", LAYER, "has no experts: leave it out"),
    ],
)
def test_limits_that_cannot_be_kept_are_refused(
    fixture_name: str, limit: int, message: str, tmp_path: Path
) -> None:
    fixture = fixture_named(fixture_name)
    write_decoder(fixture.model, "f32", tmp_path / "decoder.gguf", ignore)
    with pytest.raises(MobileVLMError, match=message):
        residency(fixture, tmp_path / "decoder.gguf", limit)


def test_other_engines_are_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["run", "nano-moe", "--prompt", "x", "--max-resident"]
    assert "needs --engine ggml" in refusal(capsys, *asked, "800MB", "--engine", "onnx")
    assert "expected a size, as in 800MB" in refusal(capsys, *asked, "much")


@LLAMA
def test_the_option_answers_like_no_option(sparse: Fixture, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    mobilevlm.export(
        sparse.checkpoint, bundle, recipe="fp32", vision_tower=sparse.tower,
        formats=("onnx", "gguf"), measure=False,
    )  # fmt: skip
    asked = ["run", bundle, "--image", sparse.image, "--prompt", "What is this?",
             "--max-new-tokens", "8"]  # fmt: skip
    free, limited = (
        run_program(*asked, *more) for more in (["--engine", "ggml"], ["--max-resident", "0.4MB"])
    )
    assert limited.returncode == 0, limited.stderr
    assert limited.stdout == free.stdout != ""

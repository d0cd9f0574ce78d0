"""Older versions of onnxruntime: what they lack is not asked for, or named with the version needed.

.ci/oldest runs the oldest one that setup.cfg allows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from conftest import BundleOf

import mobilevlm
from mobilevlm.errors import BundleError
from mobilevlm.prompt import Rows
from mobilevlm.runtime import VLM
from mobilevlm.runtime.engines.onnx import engine as onnx
from mobilevlm.runtime.engines.onnx.onnx_state import OnnxState


@pytest.fixture(scope="module")
def int8(bundle_of: BundleOf) -> Iterator[VLM]:
    with mobilevlm.load(bundle_of("tiny", "int8")) as model:
        yield model


def test_a_prompts_first_piece_is_computed_without_empty_products(
    int8: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before 1.32, DynamicQuantizeMatMul makes no empty output of no rows, and the next operator
    fails. The row that is computed instead changes nothing."""
    _, decoder = int8._engines()
    asked: list[int] = []
    run_of = OnnxState.run_of

    def counted(state: OnnxState, rows: Rows, computed: int, *further: Any) -> Any:
        asked.append(computed)
        return run_of(state, rows, computed, *further)

    monkeypatch.setattr(OnnxState, "run_of", counted)
    found = []
    for version in (onnx._version(), (1, 31), (1, 24)):
        monkeypatch.setattr(onnx, "_version", lambda version=version: version)
        state = decoder.new_state()
        decoder.extend(state, Rows(decoder.embed(range(10, 40))))
        found.append(decoder.prefill(state, Rows(decoder.embed([7]))))
    assert asked[2:] == [1, 1, 1, 1]
    assert found[0].shape == (1, int8.spec.decoder.vocab_size)
    assert all((logits == found[0]).all() for logits in found)


@pytest.mark.parametrize("version", ["1.24.1", "1.30.0"])
def test_sparse_experts_in_4_bits_name_the_version_that_they_need(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = (
        'failed:This is an invalid model. In Node, ("decoder/layers.0/mlp/experts/QMoE_node_1", '
        'QMoE, "com.microsoft", -1) : Unrecognized attribute: accuracy_level for operator QMoE'
    )

    def fail(path: Path) -> None:
        raise RuntimeError(reason)

    monkeypatch.setattr(onnx, "MappedWeights", fail)
    monkeypatch.setattr(onnxruntime, "__version__", version)
    with pytest.raises(BundleError, match=rf"need onnxruntime 1\.31, this is {version}: pip inst"):
        onnx.open_session(tmp_path / "decoder.onnx", 1)
    monkeypatch.setattr(onnxruntime, "__version__", "1.31.1")
    with pytest.raises(BundleError, match="cannot load it"):
        onnx.open_session(tmp_path / "decoder.onnx", 1)


def test_a_version_with_a_suffix_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.33.0.dev20261101+cpu")
    assert onnx._version() == (1, 33)

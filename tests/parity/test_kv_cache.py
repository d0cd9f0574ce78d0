"""Keys and values in 8 bits against the same decoder with float ones.

What was measured of the fixtures in float32 (relative error of all prompt logits): dense decoders
0.007 to 0.016, VILA's 0.035; with sparse experts 0.010, 0.029 and 0.064, where a router of random
weights sends a token elsewhere for a small difference.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from conftest import (
    FIXTURES,
    MOE_FIXTURES,
    BundleOf,
    fixture_named,
    refusal,
    relative_error,
    run_program,
)

import mobilevlm
from mobilevlm.bundle import Bundle, open_bundle
from mobilevlm.errors import BundleError
from mobilevlm.export.calibration.samples import held_out_samples
from mobilevlm.export.finish.kv_cache import HEADROOM, quantize_cache
from mobilevlm.export.finish.system_prompt import PATH
from mobilevlm.plan import Plan
from mobilevlm.prompt import Rows
from mobilevlm.runtime.engines.onnx.engine import OnnxDecoder
from mobilevlm.runtime.engines.onnx.onnx_state import OnnxState
from mobilevlm.runtime.engines.opening import onnx_decoder
from mobilevlm.runtime.memory.estimate import estimate

DENSE, SPARSE = 0.044, 0.08


def decoder_of(bundle: Bundle) -> OnnxDecoder:
    return onnx_decoder(bundle, bundle.path(bundle.artifact("decoder", "onnx").path), Plan("onnx"))


def filled(bundle: Bundle) -> OnnxState:
    """Return the keys and values that a decoder stores for a text."""
    decoder = decoder_of(bundle)
    state = decoder.new_state()
    decoder.extend(state, Rows(decoder.embed(range(10, 40))))
    return state


@pytest.mark.parametrize("checkpoint", ["tiny", *FIXTURES[:2], *MOE_FIXTURES])
def test_stored_integers_are_the_nearest_to_the_float_keys_and_values(
    checkpoint: str, bundle_of: BundleOf
) -> None:
    """Compare the first layer, whose inputs are equal; scales fit the measured samples."""
    exact = open_bundle(bundle_of(checkpoint, "fp32"))
    stored = open_bundle(bundle_of(checkpoint, "fp32", kv_cache="int8"))
    theirs, ours = filled(exact), filled(stored)
    scales = scales_of(stored)
    for name in ("0.key", "0.value"):
        ints, floats = (state.buffers[name][0, :, :30] for state in (ours, theirs))
        assert ints.dtype == np.int8 and floats.dtype == np.float32
        assert ints.nbytes * 4 == floats.nbytes
        wanted = np.clip(floats / scales[name][0], -128, 127)
        assert np.abs(ints - wanted).max() <= 0.5 + 1e-3
        assert np.abs(ints.astype(int)).max() > 127 / HEADROOM / 3  # the scales are no wider


def scales_of(bundle: Bundle) -> dict[str, np.ndarray]:
    """The constants of its decoder's graph."""
    import onnx
    from onnx import numpy_helper

    path = bundle.path(bundle.artifact("decoder", "onnx").path)
    graph = onnx.load(path, load_external_data=False).graph
    found = {item.name: item for item in graph.initializer if item.name.endswith(".scale")}
    return {
        name.removesuffix(".scale"): numpy_helper.to_array(item) for name, item in found.items()
    }


@pytest.mark.parametrize("checkpoint", [*FIXTURES[:3], *MOE_FIXTURES, "vila", "blip2"])
def test_logits_lie_close_to_those_of_float_keys_and_values(
    checkpoint: str, bundle_of: BundleOf
) -> None:
    [picture] = held_out_samples("scenes")[0].images
    found = []
    for kind in ("fp32", "int8"):
        bundle = bundle_of(checkpoint, "fp32", kv_cache=kind)
        with mobilevlm.load(bundle) as vlm:
            found.append(vlm.prompt_logits("What is in the picture?", [picture]))
    error = relative_error(found[1], found[0])
    assert 1e-5 < error < (SPARSE if checkpoint in MOE_FIXTURES else DENSE)


def test_a_fourth_of_the_memory_and_of_the_stored_system_prompt(bundle_of: BundleOf) -> None:
    bundles = [open_bundle(bundle_of("tiny", "fast", kv_cache=kind)) for kind in ("fp32", "int8")]
    sizes = [bundle.manifest.files[PATH].size for bundle in bundles]
    assert sizes[0] == 4 * sizes[1]
    states = [estimate(bundle.manifest, Plan("onnx")).states for bundle in bundles]
    assert states[0] == 4 * states[1] > 0
    buffers = [filled(bundle).buffers.values() for bundle in bundles]
    totals = [sum(buffer.nbytes for buffer in part) for part in buffers]
    assert totals[0] == 4 * totals[1]


def test_an_interrupted_export_goes_on_with_the_scales_of_the_graph_that_is_ready(
    bundle_of: BundleOf, tmp_path: Path
) -> None:
    whole, plain = (
        open_bundle(bundle_of("tiny", "fast", kv_cache=kind)) for kind in ("int8", "fp32")
    )
    folder = tmp_path / "bundle"
    shutil.copytree(whole.folder, folder)
    prompts = whole.artifact("prefill", "onnx").path
    expected = (folder / prompts).read_bytes()
    shutil.copyfile(plain.path(prompts), folder / prompts)
    broken = Bundle(folder, whole.manifest, whole.digest)
    model = fixture_named("mobilevlm_v2").model
    assert quantize_cache(model, broken, "none.jsonl")  # not read: nothing is measured
    assert (folder / prompts).read_bytes() == expected
    assert not quantize_cache(model, broken, "none.jsonl")


def test_the_command_line_writes_it_and_takes_it_over(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    bundle, data = tmp_path / "bundle", tmp_path / "data.jsonl"
    data.write_text('{"prompt": "What is red?", "answer": "Blood is."}\n')
    export = ("export", tiny_checkpoint, "-o", bundle, "--kv-cache", "int8", "--no-measure",
              "--calibration", data, "--recipe", "fast")  # fmt: skip
    done = run_program(*export)
    assert done.returncode == 0, done.stderr
    assert "kv_cache    int8, measured" in done.stderr
    first = {path.name: path.read_bytes() for path in (bundle / "onnx").iterdir()}
    done = run_program(*export)
    assert done.returncode == 0 and "kv_cache" not in done.stderr, done.stderr
    assert {path.name: path.read_bytes() for path in (bundle / "onnx").iterdir()} == first
    assert "keys and values are int8" in run_program("inspect", bundle).stdout
    done = run_program("run", bundle, "--prompt", "What is red?", "--max-new-tokens", "4")
    assert done.returncode == 0, done.stderr


def test_what_it_does_not_go_with_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder, dense = fixture_named("blip2_t5"), fixture_named("mobilevlm_v2")
    bundle = tmp_path / "bundle"
    place = ("-o", bundle, "--quiet")
    message = refusal(capsys, "export", encoder.checkpoint, *place, "--kv-cache", "int8")
    assert "has an encoder" in message
    message = refusal(
        capsys, "export", dense.checkpoint, "-o", bundle, "--kv-cache", "int8", "--format", "gguf"
    )
    assert "leave it out" in message
    assert not bundle.exists()


def test_a_runtime_without_such_attention_says_what_it_needs(
    bundle_of: BundleOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundle_of("tiny", "fast", kv_cache="int8")
    monkeypatch.setattr(onnxruntime, "__version__", "1.26.0")
    with pytest.raises(BundleError, match=r"need onnxruntime 1\.27, this is 1\.26\.0: pip install"):
        mobilevlm.load(bundle)
    mobilevlm.load(bundle_of("tiny", "fast")).close()

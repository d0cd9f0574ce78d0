"""Bundles from strangers: whatever a signed manifest or a graph says, nothing outside the bundle is
opened, nothing is built that the files cannot hold, and a contradiction is one line."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import onnx
import pytest
from conftest import BundleOf, fixture_named
from onnx import TensorProto
from test_damaged_bundle import change_manifest, run

import mobilevlm
from mobilevlm.bundle import open_bundle
from mobilevlm.errors import BundleError
from mobilevlm.plan import Plan
from mobilevlm.regular_file import NotRegularError, read_regular
from mobilevlm.whole_file import file_sha256

Capture = pytest.CaptureFixture[str]
DECODER = "onnx/decoder_model_merged_q4.onnx"
VISION = "onnx/vision_encoder_int8.onnx"


@pytest.fixture
def bundle(bundle_of: BundleOf, tmp_path: Path) -> Path:
    """A copy of a small int4 bundle."""
    return Path(shutil.copytree(bundle_of("llava_v1", "int4"), tmp_path / "bundle"))


@pytest.fixture(scope="module")
def npu_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of graphs with fixed shapes, and of .ort files made of them."""
    folder = tmp_path_factory.mktemp("npu") / "bundle"
    fixture = fixture_named("llava_v1")
    mobilevlm.export(
        fixture.checkpoint,
        folder,
        vision_tower=fixture.tower,
        target="ios-coreml",
        measure=False,
    )
    return folder


def sign(bundle: Path, name: str) -> None:
    """Give the manifest size and digest of a file as it is now."""
    path = bundle / name
    entry = {"size": path.stat().st_size, "sha256": file_sha256(path)}
    change_manifest(bundle, lambda data: data["files"].update({name: entry}))


def change_graph(bundle: Path, name: str, change: Callable[[onnx.GraphProto], object]) -> None:
    model = onnx.load_model(bundle / name, load_external_data=False)
    change(model.graph)
    (bundle / name).write_bytes(model.SerializeToString())
    sign(bundle, name)


def delta(**changes: Any) -> dict[str, Any]:
    sizes = {"layers": [0], "key_heads": 2, "value_heads": 2, "key_dim": 8, "value_dim": 8}
    return {**sizes, "kernel": 4, **changes}


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("inputs.image.connector.out_grid", 10**6),
        ("inputs.image.connector.factor", 0),
        ("inputs.image.connector.grid", 10**6),
        ("inputs.image.connector.depth", 10**9),
        ("inputs.image.connector.out_size", 10**9),
        ("inputs.image.encoder.num_hidden_layers", 10**7),
        ("inputs.image.encoder.hidden_size", 6 * 10**6),
        ("inputs.image.encoder.patch_size", 0),
        ("inputs.image.encoder.num_attention_heads", 0),
        ("inputs.image.preparation.size", 0),
        ("inputs.image.preparation.size", 10**6),
        ("inputs.image.preparation.shortest_edge", 10**6),
        ("inputs.image.preparation.std", [0.0, 1.0, 1.0]),
        ("inputs.image.preparation.mean", [float("nan"), 0.5, 0.5]),
        ("decoder.num_hidden_layers", 10**7),
        ("decoder.num_hidden_layers", 4000),
        ("decoder.vocab_size", 10**9),
        ("decoder.intermediate_size", 2**40),
        ("decoder.num_key_value_heads", 0),
        ("decoder.head_dim", 10**30),
        ("decoder.context_length", 2**40),
        ("decoder.context_length", -1),
        ("decoder.rotary_dim", 10**6),
        ("decoder.rope_theta", float("inf")),
        ("decoder.norm_eps", 0.0),
        ("decoder.start_token_id", 10**6),
        ("decoder.embed_scale", float("nan")),
        ("decoder.logit_softcap", 0.0),
        ("decoder.attention_softcap", -1.0),
        ("decoder.sliding_rope_theta", float("inf")),
        ("decoder.sliding_window", -1),
        ("decoder.sliding_window", 16),
        ("decoder.sliding_layers", [0]),
        ("decoder.rope_sections", [4, 3]),
        ("decoder.rope_sections", [40, -32]),
        ("decoder.rope_sections", [1] * 8),
        ("decoder.conv_layers", [0]),
        ("decoder.conv_kernel", 3),
        ("decoder.deep_layers", [2, 1]),
        ("decoder.deep_layers", [4000]),
        ("decoder.delta", delta(key_dim=60000, value_dim=60000)),
        ("decoder.delta", delta(layers=[0, 1, 2, 3])),
        ("decoder.delta", delta(key_heads=0)),
        ("decoder.delta", delta(value_heads=3)),
        ("decoder.delta", delta(kernel=10**9)),
        ("decoder.shared_kv_layers", 10**6),
        ("decoder.shared_kv_layers", 1),
        ("decoder.global_head_dim", 3),
        ("decoder.turned_pairs", 10**6),
        ("decoder.value_norm", True),
        ("decoder.layer_input_size", 2**40),
        ("decoder.layer_input_size", 8),
        ("decoder.layer_input_id", -1),
        ("decoder.experts", {"layers": [0], "num_experts": [1 << 15], "top_k": 1}),
        ("decoder.experts", {"layers": [0, 1, 2], "num_experts": [65535] * 3, "top_k": 1}),
        ("inputs.image.layout.end_ids", [10**6]),
    ],
)
def test_sizes_that_the_files_cannot_hold_are_refused_before_anything_is_built(
    place: str, value: Any, bundle: Path, capsys: Capture
) -> None:
    *parts, key = place.split(".")
    change_manifest(bundle, lambda data: reduce(getitem, parts, data["spec"]).update({key: value}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = run(capsys, bundle)
    assert "manifest.json: " in message and "expected" in message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # kB


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda data: data["embeddings"].update(rows=10**9), "embeddings.rows and columns"),
        (lambda data: data["embeddings"].update(offset=2), "embeddings.offset"),
        (lambda data: data["embeddings"].update(offset=-2), "embeddings.offset"),
        (lambda data: data["system_prompt"].update(ids=[10**6] * 35), "system_prompt.ids"),
        (lambda data: data["recipe"].pop("name"), "recipe: key 'name' is missing"),
        (lambda data: data["recipe"]["decoder"].update(block_size=0), "recipe.decoder.block_size"),
        (lambda data: data["artifacts"][0].update(path="tokenizer.json"), "artifacts.path"),
        (lambda data: data["artifacts"].append(data["artifacts"][0]), "artifacts.path"),
    ],
)
def test_parts_of_the_manifest_that_contradict_each_other(
    change: Callable[[dict[str, Any]], object], expected: str, bundle: Path, capsys: Capture
) -> None:
    change_manifest(bundle, change)
    assert expected in run(capsys, bundle)


# Files outside


def read_outside(location: str) -> Callable[[onnx.GraphProto], object]:
    """Have the first initializer lie in another file."""

    def change(graph: onnx.GraphProto) -> None:
        tensor = graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.ClearField("external_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, text in (("location", location), ("offset", "0"), ("length", "64")):
            tensor.external_data.add(key=key, value=text)

    return change


def in_a_constant(location: str) -> Callable[[onnx.GraphProto], object]:
    """Have a constant of a graph within the graph lie in another file."""

    def change(graph: onnx.GraphProto) -> None:
        tensor = onnx.TensorProto(data_type=1, dims=[16], name="x")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
        constant = onnx.helper.make_node("Constant", [], ["y"])
        constant.attribute.append(onnx.AttributeProto(name="value", type=4, t=tensor))
        inner = onnx.helper.make_graph([constant], "inner", [], [])
        graph.node.append(onnx.helper.make_node("If", [], ["z"], then_branch=inner))

    return change


@pytest.mark.parametrize("change", [read_outside, in_a_constant])
@pytest.mark.parametrize(
    "location", ["/etc/passwd", "../../secret", "secret", "sub/../secret", "./secret", ""]
)
def test_weights_in_a_file_that_is_not_listed_are_refused_by_us(
    change: Callable[[str], Any], location: str, bundle: Path, capsys: Capture
) -> None:
    for place in (bundle / "onnx" / "secret", bundle.parent / "secret"):
        place.write_bytes(b"x" * 64)
    change_graph(bundle, VISION, change(location))
    message = run(capsys, bundle)
    assert f"{bundle / VISION}: its weights are in {location!r}" in message


def test_a_file_beside_a_graph_that_is_not_listed_is_not_opened(bundle: Path) -> None:
    """The graph holds its weights itself; reading the FIFO would never end."""
    model = onnx.load_model(bundle / DECODER)  # with its weights
    (bundle / DECODER).write_bytes(model.SerializeToString())
    sign(bundle, DECODER)
    unlist = f"{DECODER}_data"

    def change(data: dict[str, Any]) -> None:
        del data["files"][unlist]
        for artifact in data["artifacts"]:
            artifact["data"] = [name for name in artifact["data"] if name != unlist]

    change_manifest(bundle, change)
    (bundle / unlist).unlink()
    os.mkfifo(bundle / unlist)
    with mobilevlm.load(bundle, "onnx") as vlm:
        assert vlm.generate("Who?", max_new_tokens=1).token_ids


@pytest.mark.parametrize("name", ["tokenizer.json", VISION, f"{DECODER}_data"])
def test_a_link_that_leaves_the_bundle_is_refused(name: str, bundle: Path, capsys: Capture) -> None:
    (bundle / name).replace(bundle.parent / "outside")
    (bundle / name).symlink_to(bundle.parent / "outside")
    assert f"{bundle / name}: a link that leaves the bundle" in run(capsys, bundle)


def test_a_folder_that_is_a_link_out_of_the_bundle_is_refused(
    bundle: Path, capsys: Capture
) -> None:
    (bundle / "onnx").replace(bundle.parent / "outside")
    (bundle / "onnx").symlink_to(bundle.parent / "outside")
    assert "a link that leaves the bundle" in run(capsys, bundle)


def test_links_within_a_bundle_and_those_of_the_hub_s_cache_are_followed(
    bundle: Path, tmp_path: Path
) -> None:
    (bundle / "tokenizer.json").replace(bundle / "onnx" / "kept")
    (bundle / "tokenizer.json").symlink_to("onnx/kept")
    assert open_bundle(bundle)
    snapshot = tmp_path / "models--me--it" / "snapshots" / "0123"
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir(parents=True)
    for index, path in enumerate(sorted(bundle.rglob("*"))):
        if path.is_file():
            place = snapshot / path.relative_to(bundle)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, blobs / str(index))
            place.symlink_to(os.path.relpath(blobs / str(index), place.parent))
    assert open_bundle(snapshot)
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to(bundle / "onnx" / "kept")
    with pytest.raises(BundleError, match="a link that leaves the bundle"):
        open_bundle(snapshot)


@pytest.mark.parametrize("kind", ["fifo", "device", "socket"])
@pytest.mark.parametrize("name", ["tokenizer.json", f"{DECODER}_data", "manifest.json"])
def test_only_regular_files_are_opened(
    kind: str, name: str, bundle: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_special_file(kind, bundle / name, monkeypatch)
    message = run(capsys, bundle)
    assert "manifest.json is missing" in message or f"{name}: not a regular file" in message


def put_special_file(kind: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        monkeypatch.chdir(path.parent)  # paths of sockets are short
        socket.socket(socket.AF_UNIX).bind(path.name)


def test_reading_waits_for_no_writer_and_stops_at_a_size(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_bytes(b"12345")
    assert read_regular(tmp_path / "file", 5) == b"12345"
    for name, most in (("fifo", 5), ("file", 4), ("gone", 5)):
        with pytest.raises(OSError):
            read_regular(tmp_path / name, most)
    for path in (tmp_path / "fifo", Path("/dev/zero"), tmp_path):
        with pytest.raises(NotRegularError):
            read_regular(path, 5)


# A spec and its graph


def set_size(values: str, name: str, at: int, size: int) -> Callable[[onnx.GraphProto], object]:
    def change(graph: onnx.GraphProto) -> None:
        [value] = [value for value in getattr(graph, values) if value.name == name]
        value.type.tensor_type.shape.dim[at].dim_value = size

    return change


def set_type(values: str, name: str, kind: int) -> Callable[[onnx.GraphProto], object]:
    def change(graph: onnx.GraphProto) -> None:
        [value] = [value for value in getattr(graph, values) if value.name == name]
        value.type.tensor_type.elem_type = kind

    return change


GRAPHS = [
    (VISION, set_size("input", "pixels", 1, 112)),
    (DECODER, set_size("input", "inputs_embeds", 2, 7)),
    (DECODER, set_size("output", "logits", 1, 10**6)),
    (DECODER, set_size("input", "past_key_values.2.key", 1, 7)),
    (DECODER, set_type("input", "past_key_values.0.value", TensorProto.INT8)),
    (DECODER, set_type("input", "logits_positions", TensorProto.INT32)),
    (DECODER, lambda graph: graph.input.add(name="more", type=graph.input[0].type)),
]


@pytest.mark.parametrize("memory", ["fast", "in turn"])
@pytest.mark.parametrize("number", range(len(GRAPHS)))
def test_a_graph_that_is_not_the_spec_s_is_refused(
    number: int, memory: Any, bundle: Path, tmp_path: Path
) -> None:
    name, change = GRAPHS[number]
    change_graph(bundle, name, change)
    refused_in_one_line(bundle, Plan("onnx", memory=memory))


@pytest.mark.parametrize("memory", ["fast", "in turn"])
def test_another_number_of_visual_tokens_than_the_graph_s_is_refused(
    memory: Any, bundle: Path
) -> None:
    def change(data: dict[str, Any]) -> None:
        data["spec"]["inputs"]["image"]["connector"].update(out_grid=15)

    change_manifest(bundle, change)
    refused_in_one_line(bundle, Plan("onnx", memory=memory))


def refused_in_one_line(bundle: Path, plan: Plan) -> None:
    image = fixture_named("llava_v1").image
    with pytest.raises(BundleError) as refused, mobilevlm.load(bundle, plan=plan) as vlm:
        vlm.generate("Who?", [image], max_new_tokens=2)
    message = str(refused.value)
    assert "\n" not in message and len(message) < 600
    assert ".onnx: " in message or ".ort: " in message


@pytest.mark.parametrize("engine", ["npu", "ort"])
@pytest.mark.parametrize(
    ("key", "value"),
    [("context_length", 512), ("num_key_value_heads", 1), ("num_hidden_layers", 3)],
)
def test_graphs_of_fixed_shapes_that_are_not_the_spec_s_are_refused(
    key: str, value: int, engine: str, npu_bundle: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(npu_bundle, tmp_path / "bundle"))
    change_manifest(copy, lambda data: data["spec"]["decoder"].update({key: value}))
    refused_in_one_line(copy, Plan(engine))


def test_the_unchanged_bundles_answer(bundle: Path, npu_bundle: Path) -> None:
    image = fixture_named("llava_v1").image
    answers = set()
    for folder, plan in (
        (bundle, Plan("onnx", memory="in turn")),
        (npu_bundle, Plan("npu")),
        (npu_bundle, Plan("ort")),
    ):
        with mobilevlm.load(folder, plan=plan) as vlm:
            answers.add(len(vlm.generate("Who?", [image], max_new_tokens=2).token_ids))
    assert answers == {2}

"""Bad GGUF files and a missing llama-cpp-python: one line, exit code 2, and no crash.

Whatever reaches a native library runs in a process of its own, which must end by itself.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import DATA, refusal, refused_mutations, run_program
from fuzz.gguf import decoder_file, mmproj_file

import mobilevlm
from mobilevlm import bundle as bundles
from mobilevlm.bundle import MANIFEST, describe_files
from mobilevlm.errors import BundleError
from mobilevlm.gguf.file import read_gguf
from mobilevlm.plain_types import to_dict

needs_llama = pytest.mark.skipif(
    os.environ.get("MOBILEVLM_WITHOUT_LLAMA") == "1", reason="asked to go without llama.cpp"
)
CHECKPOINT = DATA / "llava_v1"
QUESTION = ("--prompt", "Who?", "--max-new-tokens", "2", "--image", CHECKPOINT / "image.png")
MUTATIONS = 150

Capture = pytest.CaptureFixture[str]
Damage = Callable[[Path], object]
"""Changes a file."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with the artifacts of every engine."""
    folder = tmp_path_factory.mktemp("llama") / "bundle"
    mobilevlm.export(
        CHECKPOINT / "checkpoint",
        folder,
        recipe="fp32",
        vision_tower=CHECKPOINT / "vision_tower",
        formats=("onnx", "gguf"),
        measure=False,
    )
    return folder


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def gguf_file(bundle: Path, stage: str) -> Path:
    artifacts = json.loads((bundle / MANIFEST).read_text())["artifacts"]
    [path] = [
        bundle / artifact["path"]
        for artifact in artifacts
        if (artifact["stage"], artifact["format"]) == (stage, "gguf")
    ]
    return Path(path)


def sign(bundle: Path) -> None:
    """Makes the manifest agree with damaged files, so that only their content tells."""
    data = json.loads((bundle / MANIFEST).read_text())
    del data["sha256"]
    data["files"] = {name: to_dict(entry) for name, entry in describe_files(bundle).items()}
    (bundle / MANIFEST).write_text(json.dumps({**data, "sha256": bundles._digest(data)}))


def refused(bundle: Path, *options: object) -> str:
    """Return the message of ``run --engine gguf``: one line and exit code 2, no signal."""
    done = run_program("run", bundle, "--engine", "gguf", *QUESTION, *options)
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert done.stdout == "" and done.stderr.startswith("mobilevlm: error: "), done.stderr
    assert done.stderr.count("\n") == 1 and len(done.stderr) < 600, done.stderr
    return done.stderr


def cut(share: float) -> Damage:
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def write(offset: int, value: bytes) -> Damage:
    def change(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(value)

    return change


def rename(old: bytes, new: bytes) -> Damage:
    """Another name of the same length in the header."""
    assert len(old) == len(new)

    def change(path: Path) -> None:
        content = path.read_bytes()
        assert old in content
        path.write_bytes(content.replace(old, new))

    return change


DAMAGES: dict[str, tuple[Damage, str]] = {
    "empty": (cut(0), "cannot be read"),
    "header cut": (lambda path: path.write_bytes(path.read_bytes()[:100]), "ends inside its head"),
    "data cut": (cut(0.7), "the file has"),
    "one byte short": (lambda path: path.write_bytes(path.read_bytes()[:-64]), "the file has"),
    "other magic": (write(0, b"GGML"), "does not begin with 'GGUF'"),
    "other version": (write(4, struct.pack("<I", 99)), "GGUF version 99, newer than"),
    "absurd tensor count": (write(8, struct.pack("<Q", 1 << 50)), "it claims 1125899906842624"),
    "absurd key count": (write(16, struct.pack("<Q", 1 << 50)), "and 1125899906842624 keys"),
    "absurd key length": (write(24, struct.pack("<Q", 1 << 50)), "ends inside its header"),
}


@needs_llama
@pytest.mark.parametrize("stage", ["vision", "decoder"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_in_one_line(stage: str, damage: str, bundle: Path) -> None:
    change, message = DAMAGES[damage]
    path = gguf_file(bundle, stage)
    change(path)
    sign(bundle)
    said = refused(bundle)
    assert message in said and path.name in said


@needs_llama
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"blk.1.ffn_up.weight", b"blk.9.ffn_up.weight", "the file has tensors of 10 layers"),
        (b"blk.1.ffn_up.weight", b"blk.1.ffn_uX.weight", "'blk.1.ffn_up.weight' is missing"),
        (b"llama.context_length", b"llama.contexX_length", "'llama.contexX_length' is not known"),
        (b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenX", "tokenX' is not known to"),
    ],
)
def test_a_decoder_without_a_part_is_refused_before_llama_cpp_sees_it(
    old: bytes, new: bytes, message: str, bundle: Path
) -> None:
    path = gguf_file(bundle, "decoder")
    rename(old, new)(path)
    sign(bundle)
    said = refused(bundle)
    assert message in said and path.name in said


@needs_llama
def test_what_llama_cpp_alone_refuses_is_refused_with_its_reason(tmp_path: Path) -> None:
    """It wants tensors without gaps between them."""
    decoder, mmproj = decoder_file(0), mmproj_file("mlp")
    decoder.tensors[-1].offset = sum(len(tensor.data) for tensor in decoder.tensors[:-1]) + 32
    (tmp_path / "d.gguf").write_bytes(decoder.packed() + bytes(32))
    (tmp_path / "m.gguf").write_bytes(mmproj.packed())
    with pytest.raises(BundleError, match=r"llama\.cpp cannot load it: .*MOBILEVLM_LLAMA_LOG=1"):
        mobilevlm.load(tmp_path / "d.gguf", "gguf", mmproj=tmp_path / "m.gguf")


@needs_llama
@pytest.mark.parametrize(
    ("stage", "old", "new", "message"),
    [
        ("decoder", b"token_embd.weight", b"token_embX.weight", "shape of token_embd.weight is No"),
        ("decoder", b"llama.block_count", b"llama.blocX_count", "llama.block_count is None"),
        ("decoder", b"general.architecture", b"general.architecturX", ".block_count is None"),
        (
            "vision",
            b"v.blk.1.attn_q.weight",
            b"v.blk.1.attn_X.weight",
            "'v.blk.1.attn_q.weight' is missing",
        ),
        ("vision", b"v.position_embd.weight", b"v.positiXn_embd.weight", "embd.weight' is missing"),
        ("vision", b"mm.0.weight", b"mm.7.weight", "tensor 'mm.0.weight' is missing"),
        ("vision", b"vision.image_size", b"vision.imagX_size", "image_size is None, expected 224"),
        ("vision", b"mlp", b"ldp", "projector_type is 'ldp', expected 'mlp'"),
    ],
)
def test_a_file_without_a_part_is_refused_before_a_library_crashes_on_it(
    stage: str, old: bytes, new: bytes, message: str, bundle: Path
) -> None:
    path = gguf_file(bundle, stage)
    rename(old, new)(path)
    sign(bundle)
    said = refused(bundle)
    assert message in said and path.name in said


@needs_llama
def test_files_that_changed_places_are_refused(bundle: Path) -> None:
    vision, decoder = gguf_file(bundle, "vision"), gguf_file(bundle, "decoder")
    contents = vision.read_bytes(), decoder.read_bytes()
    decoder.write_bytes(contents[0])
    sign(bundle)
    assert "an image encoder (mmproj), expected a language model" in refused(bundle)
    decoder.write_bytes(contents[1])
    vision.write_bytes(contents[1])
    sign(bundle)
    assert "not an image encoder (mmproj)" in refused(bundle)


@needs_llama
def test_a_decoder_of_another_model_is_refused(bundle: Path, tmp_path: Path) -> None:
    other = DATA / "mobilevlm_v2"
    mobilevlm.export(
        other / "checkpoint",
        tmp_path / "other",
        recipe="fp32",
        vision_tower=other / "vision_tower",
        formats=("gguf",),
        measure=False,
    )
    shutil.copy(gguf_file(tmp_path / "other", "decoder"), gguf_file(bundle, "decoder"))
    sign(bundle)
    assert "llama.block_count is 3, expected 4" in refused(bundle)


FUZZ = """
import sys
from pathlib import Path
import numpy as np
from mobilevlm.bundle import open_bundle
from mobilevlm.errors import MobileVLMError
from mobilevlm.errors import BundleError
from mobilevlm.gguf.file import read_gguf
from mobilevlm.runtime.engines.llama.engine import LlamaDecoder
from mobilevlm.runtime.engines.llama.mtmd import MtmdVision

bundle, stage, path, mutations = (
    open_bundle(Path(sys.argv[1])), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
)
spec = bundle.manifest.spec
pixels = np.zeros((spec.image.square.size, spec.image.square.size, 3), np.uint8)
good = LlamaDecoder(bundle.path(bundle.artifact("decoder", "gguf").path), spec.decoder, 1)
source = bundle.path(bundle.artifact(stage, "gguf").path)
whole = source.read_bytes()
header = read_gguf(source)
length = min(tensor.offset for tensor in header.tensors.values())
random = np.random.default_rng(0)
refused = 0
for index in range(mutations):
    content = bytearray(whole)
    for place in random.integers(0, length, 8):
        content[place] = random.integers(256)
    path.write_bytes(content)
    print(index, flush=True)
    try:
        if stage == "vision":
            MtmdVision(path, spec, good.model, 1).encode({"pixels": pixels})
        else:
            decoder = LlamaDecoder(path, spec.decoder, 1)
            decoder.step(decoder.new_state(), 1)
    except MobileVLMError:
        refused += 1
print("refused", refused)
"""


@needs_llama
@pytest.mark.parametrize("stage", ["vision", "decoder"])
def test_mutated_headers_do_not_end_the_process(stage: str, exported: Path, tmp_path: Path) -> None:
    arguments = [exported, stage, tmp_path / "mutated.gguf", MUTATIONS]
    assert refused_mutations(FUZZ, *arguments) > MUTATIONS / 4


# Without llama-cpp-python. Setting a module to none makes its import fail.


@pytest.mark.parametrize("engine", ["gguf", "hybrid"])
def test_without_llama_cpp_its_engines_say_what_to_install(
    engine: str, exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    said = refusal(capsys, "run", exported, "--engine", engine, *QUESTION)
    assert "pip install 'mobilevlm-edge[gguf]'" in said


@pytest.mark.parametrize("engine", ["auto", "onnx"])
def test_without_llama_cpp_the_onnx_engine_works(
    engine: str, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("llama_cpp", "gguf")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with mobilevlm.load(exported, engine) as vlm:
        assert vlm.engine == "onnx"
        assert vlm.generate("Who?", max_new_tokens=2, ignore_eos=True).token_ids


def test_headers_are_read_without_llama_cpp(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert read_gguf(gguf_file(exported, "decoder")).architecture == "llama"


@pytest.mark.parametrize("engine", ["gguf", "hybrid"])
def test_an_engine_without_its_artifacts_says_how_to_make_them(
    engine: str, exported: Path, tmp_path: Path, capsys: Capture
) -> None:
    bundle = Path(shutil.copytree(exported, tmp_path / "onnx"))
    data = json.loads((bundle / MANIFEST).read_text())
    data["artifacts"] = [entry for entry in data["artifacts"] if entry["format"] == "onnx"]
    (bundle / MANIFEST).write_text(json.dumps(data))
    sign(bundle)
    said = refusal(capsys, "run", bundle, "--engine", engine, *QUESTION)
    assert f"engine {engine} lacks the GGUF artifact of the" in said and "--format all" in said

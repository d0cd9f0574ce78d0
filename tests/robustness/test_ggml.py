"""Bad GGUF files of our own architectures in the engine ``ggml``: one line and no crash.

ggml ends the process where sizes do not fit, so whatever could reach it runs in a process of its
own.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from conftest import fixture_named, refused_mutations

from mobilevlm.console.progress import ignore
from mobilevlm.errors import BundleError, MobileVLMError
from mobilevlm.export.gguf.decoder import write_decoder
from mobilevlm.export.gguf.mmproj import write_mmproj
from mobilevlm.gguf.file import read_gguf
from mobilevlm.gguf.spec import decoder_spec
from mobilevlm.runtime.engines.ggml import native as ggml_native
from mobilevlm.runtime.engines.llama.gguf_check import check_decoder

needs_llama = pytest.mark.skipif(
    os.environ.get("MOBILEVLM_WITHOUT_LLAMA") == "1", reason="asked to go without llama.cpp"
)
MUTATIONS = 200
MODEL = fixture_named("moe_llava_phi2").model
ARCHITECTURE = "moe-llava-phi2"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ggml") / "decoder.gguf"
    write_decoder(MODEL, "f16", path, ignore)
    return path


def changed(whole: Path, folder: Path, change: Callable[[bytes], bytes]) -> Path:
    path = folder / "damaged.gguf"
    path.write_bytes(change(whole.read_bytes()))
    return path


def renamed(old: str, new: str) -> Callable[[bytes], bytes]:
    assert len(old) == len(new)
    return lambda content: content.replace(old.encode(), new.encode())


def told(key: str, value: int) -> Callable[[bytes], bytes]:
    """Another number (of 4 bytes) in the metadata."""
    name = f"{ARCHITECTURE}.{key}".encode()

    def change(content: bytes) -> bytes:
        place = content.index(name) + len(name) + 4
        return content[:place] + struct.pack("<I", value) + content[place + 4 :]

    return change


def check_for_engine(path: Path) -> None:
    """Run the engine's checks that come before ggml sees the file."""
    header = read_gguf(path)
    check_decoder(header, MODEL.spec.decoder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-40], r"ends at byte \d+, the file has"),
        (lambda content: content[: len(content) // 50], "ends inside its header"),
        (renamed("blk.2.ffn_up_exps.bias", "blk.2.ffn_up_expX.bias"), "'blk.2.ffn_up_exps.bias' i"),
        (renamed("blk.0.ffn_gate_inp", "blk.0.ffn_gate_inX"), "'blk.0.ffn_gate_inp.weight' is mis"),
        (renamed(ARCHITECTURE, "moe-llava-qwen2"[:14]), "does not fit what the file says"),
        (renamed("output_norm.bias", "output_norm.biaX"), "'output_norm.bias' is missing"),
        (told("attention.head_count", 2), "head_count is 2, expected 4"),
    ],
)
def test_a_damaged_file_is_refused_before_ggml_sees_it(
    change: Callable[[bytes], bytes], message: str, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match=message):
        check_for_engine(changed(whole, tmp_path, change))


@pytest.mark.parametrize(
    ("name", "shape", "kind", "message"),
    [
        ("blk.0.ffn_up_exps.weight", (3, 96, 64), np.float16, r"is \(3, 96, 64\), expected \(4,"),
        ("blk.1.ffn_up.weight", (64, 96), np.float16, r"is \(64, 96\), expected \(96, 64\)"),
        ("blk.1.attn_q.weight", (64, 64), np.int8, "blk.1.attn_q.weight is of type I8"),
        ("blk.0.ffn_gate_inp.weight", (4, 64), np.float16, "gate_inp.weight is of type F16"),
    ],
)
def test_a_tensor_of_another_shape_or_type_is_refused(
    name: str, shape: tuple[int, ...], kind: type, message: str, whole: Path, tmp_path: Path
) -> None:
    reader = gguf.GGUFReader(whole)
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", ARCHITECTURE)
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            item = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], item)
    for tensor in reader.tensors:
        values = tensor.data if tensor.name != name else np.zeros(shape, kind)
        writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BundleError, match=message):
        check_for_engine(tmp_path / "other.gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (told("expert_used_count", 5), r"expert_counts' is \[4, 0, 4, 0\], expected the number"),
        (told("rope.dimension_count", 7), "count is 7, expected an even number up to 16"),
        (
            told("rope.dimension_count", 18),
            "count is 18, expected an even number up to 16",
        ),
        (told("attention.head_count_kv", 3), "head_count_kv: found 4 and 3"),
        (renamed("expert_counts", "expert_countX"), "expert_countX' is not known to"),
        (renamed("feed_forward.kind", "feed_forward.kinX"), "feed_forward.kinX' is not known to"),
        (renamed("gelu_new", "gelu_old"), "expected one of 'silu', 'gelu_new'"),
        (renamed(ARCHITECTURE, "moe-llava-qwen"), "does not fit what the file says"),
    ],
)
def test_a_file_that_contradicts_itself_has_no_spec(
    change: Callable[[bytes], bytes], message: str, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match=message):
        decoder_spec(read_gguf(changed(whole, tmp_path, change)))


FUZZ = """
import sys
from pathlib import Path
import numpy as np
from mobilevlm.errors import MobileVLMError
from mobilevlm.gguf.file import read_gguf
from mobilevlm.gguf.model import model_spec
from mobilevlm.runtime.engines.ggml.engine import GgmlDecoder

source, mmproj, path, mutations = Path(sys.argv[1]), *map(Path, sys.argv[2:4]), int(sys.argv[4])
whole, vision = source.read_bytes(), read_gguf(mmproj)
header = read_gguf(source)
length = min(tensor.offset for tensor in header.tensors.values())
places = [index for index in range(length) if index < 1600 or index > length - 6000]
random = np.random.default_rng(0)
refused = 0
for index in range(mutations):
    content = bytearray(whole)
    for place in random.choice(places, 3):
        content[place] = random.integers(256)
    path.write_bytes(content)
    print(index, flush=True)
    try:
        spec = model_spec(read_gguf(path), vision).decoder
        decoder = GgmlDecoder(path, spec, 1)
        decoder.step(decoder.new_state(), 1)
    except MobileVLMError:
        refused += 1
print("refused", refused)
"""


@needs_llama
def test_mutated_headers_do_not_end_the_process(whole: Path, tmp_path: Path) -> None:
    mmproj = tmp_path / "mmproj.gguf"
    write_mmproj(MODEL, "f16", mmproj, ignore)
    arguments = [whole, mmproj, tmp_path / "mutated.gguf", MUTATIONS]
    assert MUTATIONS / 4 < refused_mutations(FUZZ, *arguments) < MUTATIONS  # some are harmless


@needs_llama
def test_a_library_without_a_function_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ggml_native._SIGNATURES, "of_another_time", (None,))
    ggml_native.ggml.cache_clear()
    try:
        with pytest.raises(MobileVLMError, match="exports no ggml_of_another_time: the engine"):
            ggml_native.ggml()
    finally:
        ggml_native.ggml.cache_clear()

"""Random-weight checkpoints: published shapes, official format, the same bytes each time."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import numpy as np
import pytest
import sentencepiece
import torch
from click.testing import CliRunner
from safetensors import safe_open

from mobilevlm.cli.synth import command as synth_command
from mobilevlm.errors import MobileVLMError
from mobilevlm.families import open_checkpoint
from mobilevlm.prompt import Run
from mobilevlm.reference import load_reference
from mobilevlm.reference.model import ReferenceModel
from mobilevlm.synth import checkpoints as synth
from mobilevlm.synth import tokenizer
from mobilevlm.synth.checkpoints import (
    CONFIGURATIONS,
    NAMES,
    language_shapes,
    layout_of,
    tower_shapes,
    write_checkpoint,
)
from mobilevlm.synth.tokenizer import MIN_VOCABULARY, chat_tokenizer, tokenizer_model
from mobilevlm.tokenizers.pieces import byte_level_name

BIG = [name for name in NAMES if name != "tiny"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synth") / "tiny"
    write_checkpoint("tiny", folder)
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_tiny_checkpoint_opens_and_gives_finite_logits_near_unit_variance(tiny: Path) -> None:
    model = open_checkpoint(tiny)
    assert model.spec.family == "mobilevlm" and model.spec.image.connector.kind == "ldpv2"
    pixels = np.random.default_rng(0).integers(0, 256, (336, 336, 3), np.uint8)
    with torch.no_grad():
        reference = load_reference(model)
        tokens = reference.visual_tokens(pixels)
        logits = reference.logits(reference.embed([1, 300, Run(144), 400], [tokens]))
    assert tokens.shape == (144, 64) and logits.shape == (147, 512)
    # Neither vanishing nor exploding: within a factor of three of what the draw aims at.
    assert 1 / 3 < float(tokens.std()) < 3
    assert 1 / 3 < float(logits.std()) < 3


def test_same_seed_gives_the_same_bytes_and_another_seed_other_weights(
    tiny: Path, tmp_path: Path
) -> None:
    write_checkpoint("tiny", tmp_path / "again")
    write_checkpoint("tiny", tmp_path / "other", seed=1)
    assert digests(tmp_path / "again") == digests(tiny)
    changed = {name for name, digest in digests(tmp_path / "other").items()
               if digests(tiny)[name] != digest}  # fmt: skip
    assert changed == {"model.safetensors", "vision_tower/model.safetensors"}


def test_safetensors_library_reads_the_shards_and_their_index(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synth, "SHARD_BYTES", 100_000)
    write_checkpoint("tiny", tmp_path / "sharded")
    shards = sorted((tmp_path / "sharded").glob("model-*.safetensors"))
    assert len(shards) > 2
    with safe_open(tiny / "model.safetensors", "numpy") as whole:
        names = set(whole.keys())
        for path in shards:
            assert path.stat().st_size < 100_000 + 4096  # the header comes on top
            with safe_open(path, "numpy") as shard:
                for name in shard.keys():  # noqa: SIM118  (not a dictionary)
                    names.remove(name)
                    assert np.array_equal(shard.get_tensor(name), whole.get_tensor(name)), name
    assert not names
    open_checkpoint(tmp_path / "sharded")


def test_progress_ends_at_the_bytes_of_all_tensors(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    write_checkpoint("tiny", tmp_path / "tiny", progress=lambda *call: calls.append(call))
    tiny = CONFIGURATIONS["tiny"]
    total = 2 * sum(math.prod(s) for f in (language_shapes(tiny), tower_shapes(tiny.tower))
                    for s in f.values())  # fmt: skip
    assert calls[-1] == (total, total)
    assert all(before[0] < after[0] for before, after in pairwise(calls))


def test_unknown_name_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(MobileVLMError, match=r"'llama'.*mobilevlm_v2_1\.7b.*tiny"):
        write_checkpoint("llama", tmp_path / "x")


def test_folder_with_content_is_refused_and_an_empty_one_filled(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("keep")
    with pytest.raises(MobileVLMError, match="not an empty folder"):
        write_checkpoint("tiny", tmp_path / "full")
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "precious"]
    (tmp_path / "empty").mkdir()
    write_checkpoint("tiny", tmp_path / "empty")
    open_checkpoint(tmp_path / "empty")


def test_interrupted_writing_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint("tiny", tmp_path / "tiny", progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_too_small_a_disk_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * 10**9))
    with pytest.raises(MobileVLMError, match=r"takes 14\.1 GB, but 2\.0 GB are free"):
        write_checkpoint("llava_v1.5_7b", tmp_path / "x")
    assert not list(tmp_path.iterdir())


# Parameters as published: LLaMA-7B has 6,738,415,616, the CLIP ViT-L/14@336 vision model
# 303,507,456; MobileLLaMA is called 1.4B and 2.7B.
@pytest.mark.parametrize(
    ("name", "decoder"),
    [
        ("mobilevlm_v2_1.7b", 1_364_297_728),
        ("mobilevlm_v2_3b", 2_701_560_320),
        ("llava_v1.5_7b", 6_738_415_616),
        # StableLM-2 1.6B has 1,644,515,328; three more MLPs of 3 x 2048 x 5632 and a router of
        # 4 x 2048 in each of twelve layers.
        ("moe_llava_stablelm_1.6b_4e", 1_644_515_328 + 12 * (3 * 3 * 2048 * 5632 + 4 * 2048)),
        # What a token uses of that: one more MLP in twelve layers, less the routers and what Llama
        # has not: 3 x 2048 biases of q, k, v and 2 x 2048 of norms in 24 layers, 2048 of the last.
        ("llava_2b", 1_644_515_328 + 12 * 3 * 2048 * 5632 - 24 * 5 * 2048 - 2048),
    ],
)
def test_big_configurations_have_the_published_number_of_parameters(
    name: str, decoder: int
) -> None:
    configuration = CONFIGURATIONS[name]
    shapes = language_shapes(configuration)
    found = sum(math.prod(s) for name, s in shapes.items() if "mm_projector" not in name)
    assert found == decoder
    assert sum(map(math.prod, tower_shapes(configuration.tower).values())) == 303_507_456


# Llama 2.7B as above, SigLIP SO400M/14@384 without its pooling head, VILA's projector; BLIP-2 is
# said to have 3.7 billion. Qwen2-0.5B with a table of 152000 rows and a head of its own, and
# FastViTHD, which is said to have 125 million, 2.4 of them in a head that nobody reads. Qwen3-0.6B
# with a head of its own, InternViT-300M and InternVL's projector. SmolVLM's as its files have it.
# LFM2-350M and 1.2B, SigLIP 2 with 256 positions, the projector through 2560 channels. Gemma 3
# and Qwen-VL as the hub counts the parameters of their files.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("vila_1.5_3b", 2_701_560_320 + 412_987_248 + 18_364_416),
        ("blip2_opt_2.7b", 3_744_761_856),
        ("fastvlm_0.5b", 630_282_112 + 122_749_920 + 3_557_120),
        ("gemma3_4b", 4_300_079_472),
        # E2B, said to have 5.1 billion, without sound and keys and values that are not used.
        ("gemma4_e2b", 4_797_114_083),
        # Janus-Pro-1B without the encoder of images to codes.
        ("janus_pro_1b", 1_652_656_128 + 303_688_704 + 6_295_552 + 84_696_195),
        ("qwen2.5_vl_3b", 3_754_622_976),
        ("qwen3_vl_2b", 2_127_532_032),
        ("lfm2_vl_450m", 354_483_968 + 85_843_200 + 10_495_488),
        ("lfm2_vl_1.6b", 1_170_340_608 + 412_649_712 + 17_053_184),
        ("llava_onevision_0.5b", 494_090_112 + 397_747_744 + 1_837_696),
        ("smolvlm_256m", 256_484_928),
        ("smolvlm_500m", 507_482_304),
        ("internvl3.5_1b", 596_049_920 + 155_582_464 + 304_012_288 + 5_253_120),
    ],
)
def test_other_families_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    shapes = [shape for part in layout_of(name).parts for shape in part.shapes.values()]
    assert sum(map(math.prod, shapes)) == parameters


@pytest.mark.parametrize("name", BIG)
def test_every_tensor_of_a_big_configuration_has_the_shape_that_the_model_expects(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_values = synth._write_values

    def leave_a_hole(
        file: BinaryIO, name: str, shape: tuple[int, ...], seed: str, spread: tuple[float, float]
    ) -> None:
        """Sparse files: full size to the reader, no disk used. Norms of zeros would be deltas."""
        if len(shape) == 1:
            write_values(file, name, shape, seed, spread)
            return
        os.ftruncate(file.fileno(), file.tell() + 2 * math.prod(shape))
        file.seek(0, os.SEEK_END)

    def nameless(count: int) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
        """As many words, which take no time to make up."""
        letters = (byte_level_name(bytes([byte])) for byte in range(256))
        return (*letters, *map(str, range(10**6, 10**6 + count - 256))), ()

    monkeypatch.setattr(tokenizer, "_words_and_merges", nameless)
    monkeypatch.setattr(synth, "_write_values", leave_a_hole)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**12))
    write_checkpoint(name, tmp_path / name)
    model = open_checkpoint(tmp_path / name)
    with torch.device("meta"):
        reference = ReferenceModel(model.spec)
    expected = {
        key: tuple(value.shape) for key, value in reference.named_parameters(remove_duplicate=False)
    }
    decoder, refs = model.spec.decoder, model.weights._refs
    if decoder.layer_input_size:  # of which the reference reads single rows
        sizes = (decoder.vocab_size, decoder.layer_input_width)
        expected["decoder.embed_layers.weight"] = sizes
    assert refs.keys() == expected.keys()
    for key, ref in refs.items():
        assert ref.files.shape(ref.name) == ref.stored_shape(expected[key]), key


def test_words_of_a_byte_level_tokenizer_are_reached_by_their_own_text() -> None:
    found = chat_tokenizer(800, ["<image>"])
    assert found.get_vocab_size() == 801 and found.token_to_id("<image>") == 800
    for index in range(256, 800):
        assert found.encode(found.decode([index])).ids == [index]


@pytest.mark.parametrize("size", [MIN_VOCABULARY, 512, 32000])
def test_tokenizer_has_exactly_the_pieces_asked_for(size: int) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model(size))
    assert processor.GetPieceSize() == size
    assert len({processor.IdToPiece(index) for index in range(size)}) == size
    assert (processor.unk_id(), processor.bos_id(), processor.eos_id()) == (0, 1, 2)


def test_every_piece_of_the_tokenizer_is_reached_by_its_own_text() -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model(32000))
    unreached = []
    for index in range(3 + 256, 32000):
        text = processor.IdToPiece(index)
        # After a line break, which is a byte piece and merges with nothing.
        found = processor.EncodeAsIds("\n" + text.replace("▁", " "))[2:]
        if found != [index]:
            unreached.append((text, [processor.IdToPiece(part) for part in found]))
    assert not unreached[:5]


def test_tokenizer_of_a_synth_checkpoint_agrees_with_sentencepiece(tiny: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tiny / "tokenizer.model"))
    tokenizer = open_checkpoint(tiny).tokenizer
    for text in ["What is in the picture?", "  two\n lines ", "äöü 🙂", "the theother banilo", ""]:
        assert tokenizer.encode(text).ids == [1, *processor.EncodeAsIds(text)]
    text = "A dog and two people stand near the water."
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_help_names_every_configuration() -> None:
    help_text = CliRunner().invoke(synth_command, ["--help"]).output
    assert set(NAMES) <= set(help_text.split())

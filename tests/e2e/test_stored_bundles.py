"""Bundles that the first version wrote, of schema 1, load and answer as they did then.

tests/data/schema1 has one of each family with the prompt ids, the greedy answer and the highest
logits that its own code gave. Prompt ids and tokens are compared exactly, logits cannot be: layers
multiply activations that are rounded to 8 bits while running, and a last digit that another kernel
or number of threads changes can become another integer. Relative error as measured, the worst of
all bundles:

- on the machine that wrote them 5e-7, with one thread 7e-3;
- weights changed by 1e-7 of their value, 40 times each, as other float kernels would: 2e-2;
- a processor without the kernels for 8-bit activations (qemu, Nehalem), where onnxruntime does not
  round them at all: 2e-2.

The prompts were picked so that none of these changes a token of the answers.
"""

from __future__ import annotations

import json
import os
import tarfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import (
    DATA,
    FAMILY_FIXTURES,
    FIXTURES,
    MOE_FIXTURES,
    refusal,
    relative_error,
    tree_of,
)

import mobilevlm
from mobilevlm.cli import main
from mobilevlm.plan import LLAMA_ENGINES

WITHOUT_LLAMA = os.environ.get("MOBILEVLM_WITHOUT_LLAMA") == "1"
STORED = DATA / "schema1"
NAMES = sorted(path.parent.name for path in STORED.glob("*/expected.json"))
LIMIT = 0.05
"""Relative error of the stored logits, two and a half times the worst that was measured."""


@dataclass(frozen=True)
class Stored:
    """One bundle, unpacked, and what it has to give."""

    name: str
    bundle: Path

    @cached_property
    def expected(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((STORED / self.name / "expected.json").read_text())
        return found

    @property
    def prompt(self) -> str:
        return str(self.expected["prompt"])

    @property
    def images(self) -> list[Path]:
        return [DATA / name for name in self.expected["images"]]


def unpacked(name: str, folder: Path) -> Stored:
    with tarfile.open(STORED / name / "bundle.tar.xz") as tar:
        tar.extractall(folder, filter="data")
    return Stored(name, folder)


@pytest.fixture(scope="module", params=NAMES)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """Each in turn."""
    return unpacked(request.param, tmp_path_factory.mktemp(request.param))


def test_every_family_has_a_stored_bundle() -> None:
    assert {*FIXTURES, *MOE_FIXTURES, *FAMILY_FIXTURES, "blip2_t5"} == set(NAMES)


def test_a_stored_bundle_is_of_schema_1(stored: Stored) -> None:
    manifest = json.loads((stored.bundle / "manifest.json").read_text())
    assert manifest["schema_version"] == 1


def test_inspect_finds_no_fault_in_a_stored_bundle(
    stored: Stored, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["inspect", str(stored.bundle), "--json"])
    printed = capsys.readouterr()
    assert isinstance(json.loads(printed.out), dict)
    assert printed.err == ""


def test_a_stored_bundle_finds_its_engine_and_the_stored_prompt_ids(stored: Stored) -> None:
    with mobilevlm.load(stored.bundle) as vlm:
        assert vlm.engine == stored.expected["engine"]
        assert vlm.prompt_ids(stored.prompt, len(stored.images)) == stored.expected["prompt_ids"]


def test_a_stored_bundle_gives_the_stored_answer_in_each_engine(stored: Stored) -> None:
    before = tree_of(stored.bundle)
    for answer in stored.expected["answers"]:
        if answer["engine"] in LLAMA_ENGINES and WITHOUT_LLAMA:
            continue
        with mobilevlm.load(stored.bundle, answer["engine"]) as vlm:
            logits = vlm.prompt_logits(stored.prompt, stored.images)[-1]
            found = vlm.generate(
                stored.prompt,
                stored.images,
                max_new_tokens=len(answer["token_ids"]),
                ignore_eos=True,
            )
        wanted = np.array(answer["top_logits"])
        assert relative_error(logits[answer["top_ids"]], wanted) <= LIMIT, answer["engine"]
        assert found.token_ids == answer["token_ids"], answer["engine"]
        assert found.text == answer["text"]
    assert tree_of(stored.bundle) == before  # bundles are only read


def test_a_stored_bundle_with_one_changed_byte_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = unpacked("blip2", tmp_path).bundle / "onnx" / "decoder_model_merged_q4.onnx_data"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    assert path.name in refusal(capsys, "inspect", tmp_path)

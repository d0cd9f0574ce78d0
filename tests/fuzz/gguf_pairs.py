"""Mutated pairs of GGUF files that llama.cpp alone runs: each answers, or is refused. llama.cpp
tries each in a process of its own, so a case takes seconds."""

from __future__ import annotations

import os
import random
import shutil
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pairs import gemma_pair, hybrid_pair, internvl_pair, qwen_vl_pair, smolvlm_pair

import mobilevlm
from fuzz.harness import Fuzzer
from fuzz.mutations import mutate_bytes
from mobilevlm.errors import MobileVLMError
from mobilevlm.export.gguf.source import open_gguf

BUILDERS = (smolvlm_pair, internvl_pair, gemma_pair, qwen_vl_pair, hybrid_pair)
HEADER = 3000
"""Bytes at the beginning of a file in which most keys stand."""
SECONDS = 60.0
"""Seconds of a case: a process is started, which opens both files."""
os.environ["GGML_NO_BACKTRACE"] = "1"  # an abort would start a debugger, and count as a hang


@dataclass(frozen=True)
class Case:
    model: Path
    mmproj: Path


def prepare(base: Path) -> None:
    """Write a pair of each family."""
    for number, build in enumerate(BUILDERS):
        build(base / str(number))


def mutate(base: Path, random: random.Random, scratch: Path) -> Case:
    """Damage one file of a pair, its header most of the time."""
    folder = base / str(random.randrange(len(BUILDERS)))
    for name in ("model.gguf", "mmproj.gguf"):
        shutil.copy(folder / name, scratch / name)
    path = scratch / random.choice(("model.gguf", "mmproj.gguf"))
    content = path.read_bytes()
    if random.random() < 0.2:
        content = mutate_bytes(random, content)
    else:
        data = bytearray(content)
        for _ in range(random.choice((1, 1, 2, 3))):
            values = (0, 1, 127, 128, 255, random.randrange(256))
            data[random.randrange(HEADER)] = random.choice(values)
        content = bytes(data)
    path.write_bytes(content)
    return Case(scratch / "model.gguf", scratch / "mmproj.gguf")


def attempt(case: Case) -> None:
    """Ask about a small image and a long one."""
    images = [np.full(shape, 99, np.uint8) for shape in ((80, 80, 3), (30, 200, 3))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with suppress(MobileVLMError):  # an export reads files of SmolVLM and InternVL itself
            open_gguf(case.model, case.mmproj)
        with mobilevlm.load(case.model, mmproj=case.mmproj, threads=1) as vlm:
            for image in images:
                vlm.generate("Who?", [image], max_new_tokens=1)


FUZZER = Fuzzer(prepare, mutate, attempt, seconds=SECONDS)

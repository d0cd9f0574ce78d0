"""Wrote the bundles beside it, with the code of commit 7dc2533. Never to be run again: README.md.

python tests/data/schema1/make.py
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import mobilevlm

HERE = Path(__file__).parent
DATA = HERE.parent
NEW_TOKENS = 8
TOP = 8


@dataclass(frozen=True)
class Stored:
    """One bundle: how it was exported, and what it was asked."""

    name: str
    prompt: str
    engines: tuple[str, ...] = ("onnx",)
    images: tuple[str, ...] = ("image.png",)
    checkpoint: str = ""
    """Folder of tests/data; the name, where it is left out."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the export, which is int4 in ONNX by default."""

    @property
    def folder(self) -> Path:
        return DATA / (self.checkpoint or self.name)


BOTH = {"formats": ("onnx", "gguf")}
FIXED = {"formats": ("npu",), "recipe": "a16w8", "variant": "vila1.5"}
PAIR = ("image1.png", "image2.png")
ALL_STORED = (
    Stored("blip2", "Which colour is the taxi?"),
    Stored("blip2_t5", "What is in the image?"),
    Stored("instructblip", "Describe the picture in one sentence."),
    Stored("llava_v1", "Describe the picture in one sentence."),
    Stored("llava_v15", "What is unusual about this image?", options={"kv_cache": "int8"}),
    Stored("llava_v1_im_start_end", "Name three things that you see."),
    Stored("mobilevlm_v1", "What is written on the sign?"),
    Stored("mobilevlm_v2", "Where was this photo taken?", ("onnx", "gguf", "hybrid"), options=BOTH),
    Stored("moe_llava_phi2", "Which colour is the taxi?", options={"recipe": "fast"}),
    Stored("moe_llava_qwen", "Describe the picture in one sentence."),
    Stored("moe_llava_stablelm", "What is in the image?", ("onnx", "ggml"), options=BOTH),
    Stored("vila", "<image> and <image> differ how?", images=PAIR),
    Stored("vila_v15", "Compare <image> with <image>.", ("npu",), PAIR, "vila", FIXED),
)


def answer(stored: Stored, bundle: Path, engine: str) -> dict[str, Any]:
    """Return the ids, tokens and logits of an engine."""
    images = [str(stored.folder / name) for name in stored.images]
    with mobilevlm.load(bundle, engine) as vlm:
        logits = vlm.prompt_logits(stored.prompt, images)[-1]
        top = np.argsort(-logits, kind="stable")[:TOP]
        said = vlm.generate(
            stored.prompt, images, max_new_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True
        )
        return {
            "engine": engine,
            "plan": asdict(vlm.plan),
            "token_ids": said.token_ids,
            "text": said.text,
            "top_ids": top.tolist(),
            "top_logits": [round(float(value), 6) for value in logits[top]],
        }


def make(stored: Stored, bundle: Path) -> dict[str, Any]:
    """Exports, and returns what expected.json says."""
    tower = stored.folder / "vision_tower"
    mobilevlm.export(
        stored.folder / "checkpoint",
        bundle,
        vision_tower=tower if tower.is_dir() else None,
        measure=False,
        **{"recipe": "int4", **stored.options},
    )
    with mobilevlm.load(bundle) as vlm:
        ids = vlm.prompt_ids(stored.prompt, len(stored.images))
        engine = vlm.engine
    return {
        "images": [f"{stored.folder.name}/{name}" for name in stored.images],
        "prompt": stored.prompt,
        "prompt_ids": ids,
        "engine": engine,
        "answers": [answer(stored, bundle, name) for name in stored.engines],
    }


def pack(bundle: Path, archive: Path) -> None:
    """Writes a folder's files in the order of their names, without times and owners."""
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for path in sorted(bundle.rglob("*")):
            if path.is_file():
                entry = tarfile.TarInfo(path.relative_to(bundle).as_posix())
                entry.size = path.stat().st_size
                tar.addfile(entry, io.BytesIO(path.read_bytes()))


def main() -> None:
    """Writes all."""
    with tempfile.TemporaryDirectory() as work:
        for stored in ALL_STORED:
            bundle, folder = Path(work) / stored.name, HERE / stored.name
            expected = make(stored, bundle)
            folder.mkdir(exist_ok=True)
            text = json.dumps(expected, indent=1, ensure_ascii=False)
            (folder / "expected.json").write_text(f"{text}\n", encoding="utf-8")
            pack(bundle, folder / "bundle.tar.xz")
            print(stored.name, (folder / "bundle.tar.xz").stat().st_size)


if __name__ == "__main__":
    main()

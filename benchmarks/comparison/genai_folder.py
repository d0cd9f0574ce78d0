"""A model folder of onnxruntime-genai around a bundle's own graphs, as the target of that name has
it. Weight files are linked, not copied."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tokenizers import Tokenizer

from mobilevlm.bundle import TOKENIZER, Bundle
from mobilevlm.export.targets import genai
from mobilevlm.export.targets.other_runtimes import write_genai_graphs, write_json


def write_genai_folder(bundle: Bundle, folder: Path, threads: int) -> None:
    """Write graphs, links to their weights, tokenizer and ``genai_config.json``."""
    manifest = bundle.manifest
    data = [name for artifact in manifest.artifacts for name in artifact.data]
    for name in (*data, TOKENIZER):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _link(bundle.path(name), folder / name)
    graphs = write_genai_graphs(bundle.folder, folder, manifest)
    tokenizer = Tokenizer.from_file(str(bundle.path(TOKENIZER)))
    write_json(folder, genai.configuration(manifest, tokenizer, graphs, threads))


def _link(source: Path, target: Path) -> None:
    """A hard link (onnxruntime refuses weights outside the model's folder), or a copy where the
    file system has none."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)

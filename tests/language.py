"""Language models alone, made of the reference data of models with images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from conftest import DATA


def write_gemma_text(folder: Path) -> None:
    """Write the language model of the Gemma 3 fixture as Gemma3ForCausalLM saves it."""
    from safetensors.numpy import load_file, save_file

    source = DATA / "gemma3" / "checkpoint"
    folder.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text("utf-8"))
    text = {
        **config["text_config"],
        "architectures": ["Gemma3ForCausalLM"],
        "eos_token_id": config["eos_token_id"],
    }
    (folder / "config.json").write_text(json.dumps(text), "utf-8")
    for path in source.iterdir():
        if "token" in path.name or path.name == "generation_config.json":
            shutil.copy(path, folder)
    inside = "language_model."
    tensors = {
        name.removeprefix(inside): array
        for name, array in load_file(source / "model.safetensors").items()
        if name.startswith(inside)
    }
    save_file(tensors, folder / "model.safetensors")

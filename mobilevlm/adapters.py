"""Adapters: folders that hold a part of a model and need its base.

Three kinds are published: LoRA as PEFT saves it, the projector that LLaVA's pretraining leaves, and
the delta weights of LLaVA-1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from mobilevlm.checkpoint import PICKLE, SAFETENSORS, TensorFiles, read_json
from mobilevlm.errors import CheckpointError

Kind: TypeAlias = Literal["lora", "projector", "delta"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
OTHER_TRAINED = "non_lora_trainables.bin"
"""LLaVA's file of what its LoRA training changed outside the adapter."""
PROJECTOR_WEIGHTS = ("mm_projector.safetensors", "mm_projector.bin")

_WHOLE = tuple(f"{name}{end}" for name in (SAFETENSORS, PICKLE) for end in ("", ".index.json"))
_LAST_NORMS = ("model.norm.weight", "model.final_layernorm.weight", "transformer.ln_f.weight")
_NEAR_ZERO = 0.2
"""Mean magnitude of a last norm below which it is a difference: trained ones lie around one."""


def folder_kind(folder: Path) -> Kind | None:
    """Return the kind of adapter that a checkpoint folder is, or none for all others.

    Raises:
        CheckpointError: it holds a whole model and a LoRA adapter, or a damaged file.
    """
    whole = _present(folder, _WHOLE)
    parts = _present(folder, (ADAPTER_CONFIG, *ADAPTER_WEIGHTS, OTHER_TRAINED))
    if whole and parts:
        raise CheckpointError(
            f"{folder}: {whole[0]} is a whole model and {parts[0]} a part of a LoRA adapter: move "
            f"one of the two to a folder of its own"
        )
    if parts:
        return "lora"
    projector = _present(folder, PROJECTOR_WEIGHTS)
    if not whole:
        return "projector" if projector else None
    files = TensorFiles(folder)
    if projector and not any(".mm_projector." in name for name in files):
        return "projector"
    norm = next((name for name in _LAST_NORMS if name in files), None)
    if norm is not None and float(np.mean(np.abs(files.read(norm)))) < _NEAR_ZERO:
        return "delta"
    return None


def base_missing(folder: Path, kind: Kind) -> CheckpointError:
    """Return the error for an adapter that is opened without its base."""
    if kind == "lora":
        path = folder / ADAPTER_CONFIG
        name = read_json(path).get("base_model_name_or_path") if path.is_file() else None
        trained = f"trained on {name!r:.80}" if name else "not a whole model"
        what = f"a LoRA adapter, {trained}"
    elif kind == "projector":
        where = f"{_present(folder, PROJECTOR_WEIGHTS)[0]}"
        beside = _present(folder, _WHOLE)
        what = f"a projector alone ({where}), not a whole model"
        if beside:
            what = f"{beside[0]} has no projector, it lies beside it in {where}"
            return CheckpointError(f"{folder}: {what}: give the same folder with --base too")
    else:
        what = "delta weights (the last norm is near zero), not a whole model"
    return CheckpointError(f"{folder}: {what}: give the folder of its base with --base")


def _present(folder: Path, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if (folder / name).is_file()]

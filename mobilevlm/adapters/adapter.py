"""Adapters: folders that hold a part of a model and need its base.

Three kinds are published: LoRA as PEFT saves it, the projector that LLaVA's pretraining leaves, and
the delta weights of LLaVA-1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from mobilevlm.adapters.lora import LoraTensors, lora_tensors, model_name, read_lora_config
from mobilevlm.adapters.merging import Addition, MergedFiles, Stored, Sum
from mobilevlm.builtin import checkpoint_path
from mobilevlm.checkpoint import PICKLE, SAFETENSORS, TensorFiles, read_json
from mobilevlm.console import progress
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
_NAMES: dict[Kind, str] = {
    "lora": "LoRA adapter",
    "projector": "projector alone",
    "delta": "set of delta weights",
}
_TABLES = ("embed_tokens", "lm_head")
_NOT_IN_BASE = ("mm_projector.", "vision_tower.", "rotary_emb.inv_freq")
"""Parts of names in delta weights that a language model does not have."""


def folder_kind(folder: Path) -> Kind | None:
    """Return the kind of adapter that a checkpoint folder is, or none for all others.

    Raises:
        CheckpointError: it holds a whole model and a LoRA adapter, or a damaged file.
    """
    whole = _present(folder, _WHOLE)
    parts = _present(folder, (ADAPTER_CONFIG, *ADAPTER_WEIGHTS, OTHER_TRAINED))
    if whole and parts and _acts_with_sound(folder / "config.json"):
        return None
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


def _acts_with_sound(config: Path) -> bool:
    """Return whether the adapter beside a whole model is a part of it (Granite Speech), not to be
    merged."""
    return config.is_file() and read_json(config).get("model_type") == "granite_speech"


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


@dataclass(frozen=True)
class Adapter:
    """A folder that holds a part of a model, merged into its base."""

    folder: Path
    base: Path
    files: MergedFiles
    changed: dict[str, str]
    """The merged model's tensors that the adapter changes, each with the adapter's name of it."""

    def check_used(self, read: set[str]) -> None:
        """Check that every tensor of the adapter is among those that the model reads.

        Raises:
            CheckpointError: it does not read one; those of vision layers after the selected one
                may be left out.
        """
        tower = any("vision_model." in name for name in read)
        unread = [
            name
            for name in self.changed
            if name not in read and not (tower and "vision_model." in name)
        ]
        if unread:
            more = f" (and {len(unread) - 1} more)" if len(unread) > 1 else ""
            raise CheckpointError(
                f"{self.folder}: tensor {self.changed[unread[0]]!r:.120}{more} is not read by the "
                f"model that config.json describes: the adapter is of another model"
            )


def open_adapter(folder: Path, base: Path | None) -> Adapter | None:
    """Merge an adapter into its base; none for a whole checkpoint.

    Raises:
        CheckpointError: an adapter without ``base`` or of another model; a whole checkpoint with
            ``base``; one of the folders is damaged.
    """
    kind = folder_kind(folder)
    if base is None:
        if kind is None:
            return None
        raise base_missing(folder, kind)
    if kind is None:
        raise CheckpointError(f"{folder}: not an adapter but a checkpoint: leave --base {base} out")
    base = checkpoint_path(base)
    if not base.is_dir():
        raise CheckpointError(f"{base}: no such folder: --base is the adapter's whole base model")
    itself = base.resolve() == folder.resolve()
    if (other := None if itself else folder_kind(base)) is not None:
        raise CheckpointError(f"{base}: --base is a {_NAMES[other]} itself: give a whole model")
    files = TensorFiles(base)
    if kind == "delta":
        merged = _merge_delta(folder, base, files)
    else:
        merged = (_merge_lora if kind == "lora" else _merge_projector)(folder, base, files)
    progress.say(f"adapter     {_NAMES[kind]}, {len(merged.changed)} tensors merged into {base}")
    return merged


def _merge_lora(folder: Path, base: Path, files: TensorFiles) -> Adapter:
    present = _present(folder, ADAPTER_WEIGHTS)
    if not present:
        raise CheckpointError(
            f"{folder}: {' or '.join(ADAPTER_WEIGHTS)} is missing: download the adapter again"
        )
    config = read_lora_config(folder / ADAPTER_CONFIG)
    found = lora_tensors(config, TensorFiles(folder, [folder / present[0]]))
    others = _present(folder, (OTHER_TRAINED,))
    replaced = dict(found.replacements)
    for name, stored in _stored(folder, others).items():
        if model_name(name) in replaced:
            raise CheckpointError(
                f"{folder}: tensor {name!r:.120} is in {present[0]} and in {OTHER_TRAINED}"
            )
        replaced[model_name(name)] = stored
    for module in config.modules_to_save:
        if not any(f".{module}." in f".{name}" for name in replaced):
            raise CheckpointError(
                f"{config.path}: 'modules_to_save' names {module!r:.60}, but {present[0]} has no "
                f"tensor of it: download the adapter again"
            )
    return _merged(folder, base, files, LoraTensors(replaced, found.additions))


def _merge_projector(folder: Path, base: Path, files: TensorFiles) -> Adapter:
    stored = _stored(folder, _present(folder, PROJECTOR_WEIGHTS)[:1])
    replaced = {}
    for name, tensor in stored.items():
        name = model_name(name)
        replaced[f"model.{name}" if name.startswith("mm_projector.") else name] = tensor
    return _merged(folder, base, files, LoraTensors(replaced, {}))


def _merged(folder: Path, base: Path, files: TensorFiles, change: LoraTensors) -> Adapter:
    tensors = {name: Stored(files, name) for name in files} | change.replacements
    merged = MergedFiles(folder, base, tensors, change.additions)
    changed = {name: stored.name for name, stored in change.replacements.items()}
    for name, added in change.additions.items():
        changed[name] = added[0].parts[0].name
    return Adapter(folder, base, merged, changed)


def _merge_delta(folder: Path, base: Path, files: TensorFiles) -> Adapter:
    """Merge as apply_delta.py of LLaVA does: what the base lacks (the projector) stays as it is,
    and where vocabularies differ, the base's rows come first."""
    deltas = TensorFiles(folder)
    tensors = {name: Stored(deltas, name) for name in deltas}
    additions: dict[str, tuple[Addition, ...]] = {}
    for name in tensors:
        if name in files:
            table = name.rpartition(".")[0].rpartition(".")[2] in _TABLES
            additions[name] = (Sum(Stored(files, name), may_be_smaller=table),)
        elif not any(part in name for part in _NOT_IN_BASE):
            raise CheckpointError(
                f"{base}: tensor {name!r:.120} is missing, to which {folder} is a difference: it "
                f"was trained on another model"
            )
    merged = MergedFiles(folder, base, tensors, additions)
    return Adapter(folder, base, merged, {})


def _stored(folder: Path, names: list[str]) -> dict[str, Stored]:
    files = TensorFiles(folder, [folder / name for name in names])
    return {name: Stored(files, name) for name in files}


def _present(folder: Path, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if (folder / name).is_file()]

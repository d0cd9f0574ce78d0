"""Families: what turns a checkpoint folder into a ModelSpec and canonically named weights.

One file per family. A family registers itself (registry.py) under the names that its official
checkpoints carry in config.json (``model_type`` and ``mm_projector_type``).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mobilevlm.adapters.adapter import open_adapter
from mobilevlm.builtin import checkpoint_path
from mobilevlm.errors import CheckpointError
from mobilevlm.families import (  # they register themselves
    blip,  # noqa: F401
    fastvlm,  # noqa: F401
    gemma3,  # noqa: F401
    gemma4,  # noqa: F401
    granite_speech,  # noqa: F401
    internvl,  # noqa: F401
    internvl_chat,  # noqa: F401
    janus,  # noqa: F401
    janus_deepseek,  # noqa: F401
    language,  # noqa: F401
    lfm2_vl,  # noqa: F401
    llava,  # noqa: F401
    llava_hub,  # noqa: F401
    mobilevlm,  # noqa: F401
    moe_llava,  # noqa: F401
    nano_any,  # noqa: F401
    qwen2_audio,  # noqa: F401
    qwen_vl,  # noqa: F401
    smolvlm,  # noqa: F401
    vila,  # noqa: F401
    voxtral,  # noqa: F401
)
from mobilevlm.families.config import read_config
from mobilevlm.families.registry import FAMILIES, Family, Source, folder_with
from mobilevlm.hub_cache import absent
from mobilevlm.model import Model, OpenOptions
from mobilevlm.tokenizers.tokenizer import has_tokenizer, read_tokenizer

_INSTRUCTION_TOKENIZER = "qformer_tokenizer"
"""Folder of the tokenizer of a Q-Former that reads text."""


def open_checkpoint(folder: Path, options: OpenOptions | None = None) -> Model:
    """Reads the configuration, tokenizer and tensor names of a checkpoint folder or built-in model.

    Raises:
        CheckpointError: the checkpoint is of no known family, or incomplete or inconsistent.
    """
    folder = checkpoint_path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder{absent(folder)}")
    options = options or OpenOptions()
    if options.vision_tower is not None:
        options = replace(options, vision_tower=checkpoint_path(options.vision_tower))
    adapter = open_adapter(folder, options.base)
    folders = (folder,) if adapter is None else (folder, adapter.base)
    home = folder_with(folders, "config.json")
    config = read_config(home / "config.json", "every checkpoint has one")
    family = _find_family(home, config)
    if options.variant is not None and options.variant not in family.variants:
        known = f"expected {' or '.join(family.variants)}" if family.variants else "leave it out"
        raise CheckpointError(
            f"{folder}: variant {options.variant!r} is not known for {family.name}: {known}"
        )
    words = [each / family.language_model for each in folders]
    place = next((each for each in words if has_tokenizer(each)), words[-1])
    tokenizer = read_tokenizer(place, family.legacy, family.ready_tokenizer)
    spec, weights = family.read(Source(home, config, options, tokenizer, folders, adapter))
    pieces = tokenizer.get_vocab_size(with_added_tokens=False)
    if pieces > spec.decoder.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {pieces} pieces, but 'vocab_size' in config.json is "
            f"{spec.decoder.vocab_size}: these files are of different models"
        )
    sizes = (spec.decoder.vocab_size, spec.decoder.hidden_size)
    weights.check("decoder.embed_tokens.weight", sizes)
    kernel = (spec.decoder.hidden_size, 1, spec.decoder.conv_kernel)
    for layer in spec.decoder.conv_layers:
        weights.check(f"decoder.layers.{layer}.short_conv.conv.weight", kernel)
    if spec.decoder.delta is not None:
        kernel = (spec.decoder.delta.mixed_size, 1, spec.decoder.delta.kernel)
        for layer in spec.decoder.delta.layers:
            weights.check(f"decoder.layers.{layer}.delta.conv.weight", kernel)
    asked = None
    if spec.reads_instructions:
        own = folder_with(folders, _INSTRUCTION_TOKENIZER)
        asked = read_tokenizer(own / _INSTRUCTION_TOKENIZER, ready=True)
    return Model(folder, spec, weights, tokenizer, place, asked)


def family_name(folder: Path) -> str | None:
    """Return the name of a checkpoint's family; none if it is of no known one."""
    try:
        config = read_config(folder / "config.json", "every checkpoint has one")
        return _find_family(folder, config).name
    except CheckpointError:
        return None


def _find_family(folder: Path, config: dict[str, Any]) -> Family:
    path, model_type = folder / "config.json", config.get("model_type")
    for family in FAMILIES.values():
        if family.keys and family.claims(config):
            return family
    for family in FAMILIES.values():
        if not family.keys and family.claims(config):
            return family
    known = sorted({kind for family in FAMILIES.values() for kind in family.model_types})
    if model_type not in known:
        raise CheckpointError(
            f"{path}: model_type is {model_type!r:.60}, expected one of the families "
            f"{', '.join(FAMILIES)} (docs/reference/families.md)"
        )
    kin = [family for family in FAMILIES.values() if model_type in family.model_types]
    keys = sorted({key for family in kin for key in family.keys if key not in config})
    if all(family.keys for family in kin) and keys:
        raise CheckpointError(
            f"{path}: model_type is {model_type!r:.60}, which needs {', '.join(map(repr, keys))}"
        )
    raise CheckpointError(
        f"{path}: mm_projector_type {config.get('mm_projector_type')!r:.60} is not known for "
        f"model_type {model_type!r:.60}: expected linear, mlp2x_gelu (any depth), ldpnet or "
        f"ldpnetv2"
    )

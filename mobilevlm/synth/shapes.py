"""Contents of synthetic checkpoints: shapes of tensors by name, and the files around them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mobilevlm.decoder_spec import DecoderSpec, DeltaSpec
from mobilevlm.families.backbones import DELTA_HEADS, Backbone, modules, stored_name, stored_tensor
from mobilevlm.linear_groups import decoder_groups

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Part:
    """The weights of one folder."""

    folder: str
    """Inside the checkpoint; empty: itself."""
    shapes: Shapes
    depth: int
    """Layers, whose number sets the scale of what adds to a residual stream."""
    seed: str
    """Tells its random numbers from those of the other parts."""
    draws: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Mean and deviation of tensors whose names end like this, in place of the usual ones."""


@dataclass(frozen=True)
class Layout:
    """A checkpoint."""

    parts: tuple[Part, ...]
    write_settings: Callable[[Path, str], None]
    """Everything but the weights; is given the folder and the configuration's name."""


def linear(name: str, in_size: int, out_size: int) -> Shapes:
    """A linear layer with bias."""
    return {f"{name}.weight": (out_size, in_size), f"{name}.bias": (out_size,)}


def norm(name: str, size: int) -> Shapes:
    """A norm with bias."""
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def decoder_shapes(spec: DecoderSpec, backbone: Backbone) -> Shapes:
    """Return the tensors of a language model by their names in a checkpoint."""
    size = spec.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (spec.vocab_size, size)}
    shapes["embed_layers"] = (spec.vocab_size, spec.layer_input_width)
    shapes["layer_inputs.norm"] = (spec.layer_input_size,)
    for group in decoder_groups(spec):
        shapes |= {name.removeprefix("decoder."): item for name, item in group.shapes.items()}
    found: Shapes = {}
    for module, biased in modules(spec):
        name, rows = stored_name(module, spec, backbone)
        part = module.rpartition(".")[2]
        if part == "router":
            shapes[module] = (spec.num_experts(int(module.split(".")[1])), size)
        elif part == "position_embedding" and rows is not None:
            shapes[module] = (rows.total, size)
        elif spec.delta is not None and ".delta." in module:
            shapes |= _delta_shapes(spec.delta, module, size)
        elif part == "conv":
            shapes[module] = (size, 1, spec.conv_kernel)
        elif part in ("q_norm", "k_norm"):
            shapes[module] = (spec.at(int(module.split(".")[1])).head_dim,)
        elif part == "scale":
            shapes[module] = (1,)
        elif part.endswith("norm") and module not in shapes:
            shapes[module] = (size,)
        if module != "lm_head" or not spec.tie_word_embeddings:
            found[stored_tensor(module, name, "weight")] = shapes[module]
            found |= {f"{name}.bias": shapes[module][:1]} if biased else {}
    return found


def _delta_shapes(delta: DeltaSpec, module: str, size: int) -> Shapes:
    """A part of a gated delta layer that is no linear layer with a format."""
    shapes = {
        "conv": (delta.mixed_size, 1, delta.kernel),
        "norm": (delta.value_dim,),
        **dict.fromkeys(DELTA_HEADS, (delta.value_heads,)),
        **dict.fromkeys(("a_proj", "b_proj"), (delta.value_heads, size)),
    }
    part = module.rpartition(".")[2]
    return {module: shapes[part]} if part in shapes else {}


def siglip_shapes(config: dict[str, Any]) -> Shapes:
    """A SigLIP tower without the pooling head, which nobody reads."""
    hidden, patch = config["hidden_size"], config["patch_size"]
    embeddings = "vision_model.embeddings"
    shapes: Shapes = {
        f"{embeddings}.patch_embedding.weight": (hidden, 3, patch, patch),
        f"{embeddings}.patch_embedding.bias": (hidden,),
        f"{embeddings}.position_embedding.weight": ((config["image_size"] // patch) ** 2, hidden),
    }
    for index in range(config["num_hidden_layers"]):
        layer = f"vision_model.encoder.layers.{index}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{layer}.self_attn.{part}", hidden, hidden)
        shapes |= tower_mlp(layer, hidden, config["intermediate_size"])
    return shapes | norm("vision_model.post_layernorm", hidden)


def tower_mlp(layer: str, hidden: int, wide: int) -> Shapes:
    """MLP and norms of a layer of a tower."""
    shapes = linear(f"{layer}.mlp.fc1", hidden, wide) | linear(f"{layer}.mlp.fc2", wide, hidden)
    return shapes | norm(f"{layer}.layer_norm1", hidden) | norm(f"{layer}.layer_norm2", hidden)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """As the checkpoints of the hub have it."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

"""The FastVLM fixture in the layout of Apple's code: other names, and branches that are not fused
yet but whose sum is the fixture's."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from conftest import Fixture
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

Tensors: TypeAlias = dict[str, NDArray[Any]]
TOWER = "model.vision_tower.vision_tower.model"
TIMM = "model.vision_tower.timm_model"
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Qwen2's: contents are strings."""
_NETWORK = {"blocks": (0, 2, 4, 7, 10), "downsample": (0, 1, 3, 5, 8), "pos_emb": (0, 0, 0, 6, 9)}
"""Places of the parts of each stage in Apple's list."""
_NAMES = (
    (r"^model\.language_model\.", "model."),
    (r"^model\.multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"^model\.multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    (re.escape(f"{TIMM}.stem."), f"{TOWER}.patch_embed."),
    (re.escape(f"{TIMM}.final_conv."), f"{TOWER}.conv_exp."),
    (r"\.se\.fc1\.", ".se.reduce."),
    (r"\.se\.fc2\.", ".se.expand."),
    (r"(layer_scale(_\d)?)\.gamma$", r"\1"),
    (r"\.mlp\.(conv|fc)", r".convffn.\1"),
    (r"(downsample\.proj\.0)\.reparam_conv", r"\1.lkb_reparam"),
    (rf"{re.escape(TIMM)}\.stages\.(\d)\.(blocks|downsample|pos_emb)", None),
)


def write_apple(fixture: Fixture, folder: Path, fused: bool = False, **changes: Any) -> Path:
    """Write the fixture's checkpoint in Apple's layout; ``changes``: of config.json, where none
    removes a key."""
    shutil.copytree(fixture.checkpoint, folder)
    for name in ("processor_config.json", "preprocessor_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "config.json").read_text())
    arguments = config["vision_config"]["model_args"]
    arguments.pop("inference_mode")
    config = {
        **config["text_config"],
        "architectures": ["LlavaQwen2ForCausalLM"],
        "image_aspect_ratio": "pad",
        "mm_hidden_size": 256,
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "mobileclip_l_192",
        "model_type": "llava_qwen2",
        "unfreeze_mm_vision_tower": True,
        "vision_config": {"model_args": arguments},
        **changes,
    }
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    tensors = {
        _apple_name(name): value for name, value in load_file(folder / "model.safetensors").items()
    }
    tensors[f"{TOWER}.head.proj"] = np.ones((256, 16), np.float16)
    save_file(tensors if fused else unfused(tensors), folder / "model.safetensors")
    return folder


def _apple_name(name: str) -> str:
    def place(match: re.Match[str]) -> str:
        return f"{TOWER}.network.{_NETWORK[match[2]][int(match[1])]}"

    for pattern, replacement in _NAMES:
        name = re.sub(pattern, place if replacement is None else replacement, name)
    return name


def unfused(tensors: Tensors) -> Tensors:
    """Split each fused convolution into branches with batch norms, as in training."""
    random = np.random.default_rng(0)
    made: Tensors = {}
    for name, weight in tensors.items():
        match = re.fullmatch(r"(.*)\.(reparam_conv|lkb_reparam)\.(weight|bias)", name)
        if match is None:
            made[name] = weight
        elif match[3] == "weight":
            module = match[1]
            kernel = weight.astype(np.float64)
            bias = tensors[name.removesuffix("weight") + "bias"].astype(np.float64)
            if re.search(r"network\.(6|9)$", module):  # a position embedding, with a residual
                made[f"{module}.pe.weight"] = kernel - _identity(kernel.shape)
                made[f"{module}.pe.bias"] = bias
            elif module.endswith("token_mixer"):
                made.update(_mixer(module, kernel, bias, random))
            elif match[2] == "lkb_reparam":
                parts = {"small_conv": (3, 3)}
                made.update(_branches(module, "lkb_origin", kernel, bias, parts, False, random))
            else:
                parts = {"rbr_scale": (1, 1)} if kernel.shape[2] > 1 else {}
                skips = kernel.shape[2] == 1
                made.update(_branches(module, "rbr_conv.0", kernel, bias, parts, skips, random))
    return {name: np.ascontiguousarray(value, np.float32) for name, value in made.items()}


def _identity(shape: tuple[int, ...]) -> NDArray[np.float64]:
    kernel, channels = np.zeros(shape), np.arange(shape[0])
    kernel[channels, channels % shape[1], shape[2] // 2, shape[3] // 2] = 1
    return kernel


def _norm(module: str, count: int, random: np.random.Generator) -> Tensors:
    """A batch norm that does much."""
    return {
        f"{module}.weight": random.uniform(0.5, 2, count),
        f"{module}.bias": random.standard_normal(count),
        f"{module}.running_mean": random.standard_normal(count),
        f"{module}.running_var": random.uniform(0.5, 2, count),
        f"{module}.num_batches_tracked": np.array(7.0),
    }


def _factor(norm: Tensors, module: str) -> NDArray[np.float64]:
    return norm[f"{module}.weight"] / np.sqrt(norm[f"{module}.running_var"] + 1e-5)


def _shift(norm: Tensors, module: str) -> NDArray[np.float64]:
    return norm[f"{module}.bias"] - norm[f"{module}.running_mean"] * _factor(norm, module)


def _branches(
    module: str,
    main: str,
    kernel: NDArray[np.float64],
    bias: NDArray[np.float64],
    parts: dict[str, tuple[int, int]],
    skips: bool,
    random: np.random.Generator,
) -> Tensors:
    """Smaller convolutions of random weights, and one that makes the sum right."""
    out, inputs, size, _ = kernel.shape
    made: Tensors = {}
    left, rest = kernel.copy(), bias.copy()
    for part, edges in parts.items():
        norm = _norm(f"{module}.{part}.bn", out, random)
        small = random.standard_normal((out, inputs, *edges)) * 0.1
        border = (size - edges[0]) // 2
        around = ((0, 0), (0, 0), (border, border), (border, border))
        factor = _factor(norm, f"{module}.{part}.bn")
        left -= np.pad(small, around) * factor[:, None, None, None]
        rest -= _shift(norm, f"{module}.{part}.bn")
        made |= {**norm, f"{module}.{part}.conv.weight": small}
    if skips:
        norm = _norm(f"{module}.rbr_skip", out, random)
        factor = _factor(norm, f"{module}.rbr_skip")
        left -= _identity(kernel.shape) * factor[:, None, None, None]
        rest -= _shift(norm, f"{module}.rbr_skip")
        made |= norm
    norm = _norm(f"{module}.{main}.bn", out, random)
    factor = _factor(norm, f"{module}.{main}.bn")
    norm[f"{module}.{main}.bn.bias"] = rest + norm[f"{module}.{main}.bn.running_mean"] * factor
    made[f"{module}.{main}.conv.weight"] = left / factor[:, None, None, None]
    return {**made, **norm}


def _mixer(
    module: str,
    kernel: NDArray[np.float64],
    bias: NDArray[np.float64],
    random: np.random.Generator,
) -> Tensors:
    """``x + scale · (mixer(x) - norm(x))``"""
    scale = random.uniform(0.5, 1.5, len(kernel))
    norm = _norm(f"{module}.norm.rbr_skip", len(kernel), random)
    factor = _factor(norm, f"{module}.norm.rbr_skip")
    taken = _identity(kernel.shape) * factor[:, None, None, None]
    mixed = (kernel - _identity(kernel.shape)) / scale[:, None, None, None] + taken
    added = bias / scale + _shift(norm, f"{module}.norm.rbr_skip")
    parts = {"rbr_scale": (1, 1)}
    inside = _branches(f"{module}.mixer", "rbr_conv.0", mixed, added, parts, True, random)
    return {**norm, **inside, f"{module}.layer_scale": scale[:, None, None]}

"""FastVLM-0.5B in the hub's layout: published shapes, random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mobilevlm.families.fastvit import TOWERS, TowerNames, timm_names
from mobilevlm.families.qwen_gemma import QWEN2
from mobilevlm.image_encoder import ConvEncoder
from mobilevlm.synth.qwen2 import QWEN2_05B, QWEN2_PIECES, write_qwen2_tokenizer
from mobilevlm.synth.shapes import Layout, Part, Shapes, decoder_shapes, linear, norm, write_json

_ARCHITECTURE = "fastvit_mci3"
_TOWER = TOWERS[_ARCHITECTURE]
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
_QWEN2 = {**QWEN2_05B, "tie_word_embeddings": False}
_TEMPLATE = """\
{%- for message in messages -%}
  {%- if loop.first and message['role'] != 'system' -%}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
  {%- endif -%}
  {{- '<|im_start|>' ~ message['role'] ~ '\\n' -}}
  {%- if message['content'] is string -%}{{- message['content'] -}}
  {%- else -%}
    {%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>' -}}{%- endfor -%}
    {%- for part in message['content'] if part['type'] == 'text' -%}
      {{- '\\n' ~ part['text'] -}}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def fastvlm() -> Layout:
    """Return the files of FastVLM-0.5B."""
    depth, hidden = _QWEN2["num_hidden_layers"], _QWEN2["hidden_size"]
    backbone = replace(QWEN2, root="model.language_model")
    shapes = decoder_shapes(backbone.read(Path("config.json"), _QWEN2), backbone)
    projector = "model.multi_modal_projector"
    shapes |= linear(f"{projector}.linear_1", _TOWER.hidden_size, hidden)
    shapes |= linear(f"{projector}.linear_2", hidden, hidden)
    shapes |= _tower_shapes(_TOWER, timm_names(_TOWER, "model.vision_tower.timm_model."))
    return Layout((Part("", shapes, depth, ""),), _write_settings)


def _tower_shapes(spec: ConvEncoder, names: TowerNames) -> Shapes:
    root, first, last = names.root, spec.widths[0], spec.widths[-1]
    shapes = _convolution(f"{root}{names.stem.format(0)}", 3, first, 3)
    shapes |= _convolution(f"{root}{names.stem.format(1)}", 1, first, 3)
    shapes |= _convolution(f"{root}{names.stem.format(2)}", first, first, 1)
    for stage, width in enumerate(spec.widths):
        if stage:
            proj = f"{root}{names.downsamples[stage]}"
            shapes |= _convolution(proj.format(0), 1, width, 7)
            shapes |= _convolution(proj.format(1), width, width, 1)
        if stage in spec.attention_stages:
            shapes |= _convolution(f"{root}{names.positions[stage]}", 1, width, 7)
        for index in range(spec.depths[stage]):
            block = f"{root}{names.blocks[stage].format(index)}"
            shapes |= _block(spec, stage, block)
    final = f"{root}{names.expansion}"
    shapes |= _convolution(final, 1, last * spec.expansion, 3)
    shapes |= _pointwise(f"{final}.{names.squeeze}", spec.hidden_size, spec.squeeze_size)
    return shapes | _pointwise(f"{final}.{names.excite}", spec.squeeze_size, spec.hidden_size)


def _block(spec: ConvEncoder, stage: int, block: str) -> Shapes:
    width, wide = spec.widths[stage], spec.mlp_size(stage)
    shapes: Shapes = {f"{block}.mlp.conv.conv.weight": (width, 1, 7, 7)}
    for leaf in ("weight", "bias", "running_mean", "running_var"):
        shapes[f"{block}.mlp.conv.bn.{leaf}"] = (width,)
    shapes |= _pointwise(f"{block}.mlp.fc1", width, wide)
    shapes |= _pointwise(f"{block}.mlp.fc2", wide, width)
    if stage not in spec.attention_stages:
        shapes[f"{block}.layer_scale.gamma"] = (width, 1, 1)
        return shapes | _convolution(f"{block}.token_mixer", 1, width, 3)
    shapes |= norm(f"{block}.norm", width)
    shapes[f"{block}.token_mixer.qkv.weight"] = (3 * width, width)
    shapes |= linear(f"{block}.token_mixer.proj", width, width)
    for number in (1, 2):
        shapes[f"{block}.layer_scale_{number}.gamma"] = (width, 1, 1)
    return shapes


def _convolution(module: str, inputs: int, width: int, size: int) -> Shapes:
    """A convolution whose branches are fused."""
    name = f"{module}.reparam_conv"
    return {f"{name}.weight": (width, inputs, size, size), f"{name}.bias": (width,)}


def _pointwise(name: str, in_size: int, out_size: int) -> Shapes:
    return {f"{name}.weight": (out_size, in_size, 1, 1), f"{name}.bias": (out_size,)}


def _write_settings(folder: Path, name: str) -> None:
    edge = _TOWER.image_size
    config = {
        "_name_or_path": f"synth/{name}",
        "architectures": ["FastVlmForConditionalGeneration"],
        "dtype": "float16",
        "image_seq_length": _TOWER.num_features,
        "image_token_index": QWEN2_PIECES + _SPECIAL.index("<image>"),
        "model_type": "fast_vlm",
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "text_config": _QWEN2,
        "tie_word_embeddings": False,
        "vision_config": {
            "architecture": _ARCHITECTURE,
            "hidden_size": _TOWER.hidden_size,
            "model_args": {"inference_mode": True},
            "model_type": "timm_wrapper",
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }
    write_json(folder / "config.json", config)
    processor = {
        "crop_size": {"height": edge, "width": edge},
        "do_center_crop": True,
        "image_mean": [0.0] * 3,
        "image_std": [1.0] * 3,
        "resample": 3,
        "size": {"shortest_edge": edge},
    }
    write_json(folder / "preprocessor_config.json", processor)
    (folder / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8")
    write_qwen2_tokenizer(folder, _SPECIAL)

"""Janus and Janus-Pro in DeepSeek's own layout (``multi_modality``): other keys and names than the
hub's, the same arithmetic, and a conversation that the official code has instead of a template.

Official code: modeling_vlm.py, siglip_vit.py, vq_model.py and processing_vlm.py of Janus.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from mobilevlm.checkpoint import RowRange, TensorRef, Weights, read_json
from mobilevlm.errors import CheckpointError
from mobilevlm.families.config import check_only, config_value
from mobilevlm.families.janus import DEFAULT_SYSTEM, JanusLayout, read_layout
from mobilevlm.families.registry import Source, register
from mobilevlm.spec import ModelSpec
from mobilevlm.tokenizers.tokenizer import token_text, tokenizer_settings

_TOWERS: dict[str, dict[str, Any]] = {
    "siglip_large_patch16_384": {
        "image_size": 384, "patch_size": 16, "width": 1024, "layers": 24, "heads": 16,
        "mlp_ratio": 4},
}  # fmt: skip
"""Sizes of the official towers by name; a configuration may have them itself."""
_DECODERS: dict[str, dict[str, Any]] = {
    "VQ-16": {"ch": 128, "decoder_ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2,
              "z_channels": 256},
}  # fmt: skip
"""Sizes of the official decoders of codes by class; a configuration may have them itself."""
_PROCESSOR = {
    "add_special_token": False, "image_tag": "<image_placeholder>",
    "image_start_tag": "<begin_of_image>", "image_end_tag": "<end_of_image>",
    "pad_tag": "<｜▁pad▁｜>", "sft_format": "deepseek"}  # fmt: skip
"""Values of processor_config.json that are known, all of them defaults."""
_TEMPLATE = """\
{%- for message in messages -%}
  {%- set said = namespace(text='') -%}
  {%- for part in message['content'] -%}
    {%- if part['type'] == 'image' -%}
      {%- set said.text = said.text ~ ('' if loop.first else '\\n') ~ '<image_placeholder>' -%}
      {%- set said.text = said.text ~ ('' if loop.last else '\\n') -%}
    {%- else -%}
      {%- set said.text = said.text ~ part['text'] -%}
    {%- endif -%}
  {%- endfor -%}
  {%- if message['role'] == 'user' -%}
    {{- '<|User|>: ' ~ said.text | trim ~ '\\n\\n' -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- '<|Assistant|>: ' ~ said.text | trim ~ '<｜end▁of▁sentence｜>' -}}
  {%- else -%}
    {{- raise_exception('this model has no place for a message of the ' ~ message['role']) -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|Assistant|>:' -}}{%- endif -%}
"""
_SYSTEM = """\
{%- if messages and messages[0]['role'] == 'system' -%}
  {{- messages[0]['content'][0]['text'] ~ '\\n\\n' -}}{%- set messages = messages[1:] -%}
{%- else -%}
  {{- DEFAULT -}}
{%- endif -%}
"""
_TOWER, _CODES = "vision_model.vision_tower", "gen_vision_model"
_NAMES = [
    (r"vision_model\.embeddings\.patch_embedding", rf"{_TOWER}.patch_embed.proj"),
    (r"vision_model\.embeddings\.position_embedding\.weight", rf"{_TOWER}.pos_embed"),
    (r"vision_model\.post_layernorm", rf"{_TOWER}.norm"),
    (r"vision_model\.encoder\.layers\.(\d+)\.layer_norm", rf"{_TOWER}.blocks.\1.norm"),
    (r"vision_model\.encoder\.layers\.(\d+)\.mlp", rf"{_TOWER}.blocks.\1.mlp"),
    (r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection_layer",
     rf"{_TOWER}.blocks.\1.attn.proj"),
    (r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj",
     rf"{_TOWER}.blocks.\1.attn.qkv"),
    (r"aligner\.fc1", "aligner.layers.0"),
    (r"generation_aligner\.fc1", "gen_aligner.layers.0"),
    (r"generation_embeddings", "gen_embed"),
    (r"generation_head\.proj_out", "gen_head.output_mlp_projector"),
    (r"generation_head\.vision_head", "gen_head.vision_head"),
    (r"vqmodel\.decoder\.up\.(\d+)\.block", rf"{_CODES}.decoder.conv_blocks.\1.res"),
    (r"vqmodel\.decoder\.up", rf"{_CODES}.decoder.conv_blocks"),
    (r"vqmodel\.decoder\.mid\.block_1", rf"{_CODES}.decoder.mid.0"),
    (r"vqmodel\.decoder\.mid\.attn_1", rf"{_CODES}.decoder.mid.1"),
    (r"vqmodel\.decoder\.mid\.block_2", rf"{_CODES}.decoder.mid.2"),
    (r"vqmodel", _CODES),
]  # fmt: skip
"""Beginnings of names in the hub's layout, without ``model.``, and DeepSeek's."""
_LAYERS = re.compile(r"model\.(aligner|generation_aligner)\.hidden_layers\.(\d+)\.(.*)")
_UNREAD = [
    r"vision_model\.vision_tower\.attn_pool\.",
    r"gen_vision_model\.(encoder|quant_conv)\.",
    r"gen_vision_model\.quantize\.codebook_used$",
]
"""Pooling of the tower, and what makes codes of an image."""


@register(
    "janus_deepseek",
    {"multi_modality"},
    keys={"language_config", "vision_config", "aligner_config", "gen_vision_config"},
    ready_tokenizer=True,
)
def read_deepseek(source: Source) -> tuple[ModelSpec, Weights]:
    """Reads a checkpoint of Janus or Janus-Pro in DeepSeek's layout."""
    path = source.folder / "config.json"
    config = _hub_config(path, source)
    _check_processor(source)
    system = _SYSTEM.replace("DEFAULT", json.dumps(DEFAULT_SYSTEM))
    width = config["vision_config"]["hidden_size"]
    layout = JanusLayout(system, _TEMPLATE, lambda ref: _stored(ref, width), tuple(_UNREAD))
    return read_layout(replace(source, config=config), layout)


def _hub_config(path: Path, source: Source) -> dict[str, Any]:
    """Return the configuration with the hub's keys.

    Raises:
        CheckpointError: a value is missing or wrong, or of a kind that is not computed.
    """
    ids = {f"{name}_token_id": _token_id(source, name) for name in ("bos", "eos", "pad")}
    text = {**ids, **config_value(path, source.config, "language_config", dict)}
    tower = _params(path, source, "vision_config", {"cls": "CLIPVisionTower"})
    check_only(path, tower, {"select_layer": -1, "select_feature": "same", "class_token": False})
    tower = {**_sizes(path, tower.get("model_name"), "model_name", _TOWERS), **tower}
    aligner = _params(path, source, "aligner_config", {"cls": "MlpProjector"})
    codes = _params(path, source, "gen_vision_config", {})
    kind = config_value(path, source.config["gen_vision_config"], "cls", str)
    codes = {**_sizes(path, kind, "cls", _DECODERS), **codes}
    rows = _params(path, source, "gen_aligner_config", {"cls": "MlpProjector"})
    head = _params(path, source, "gen_head_config", {"cls": "vision_head"})
    for part in (aligner, rows):
        check_only(path, part, {"projector_type": "mlp_gelu"})
    check_only(path, head, {"image_token_size": codes.get("image_token_size")})
    edge = config_value(path, tower, "image_size", int)
    grid = edge // config_value(path, tower, "patch_size", int)
    vision = {
        "image_size": edge, "patch_size": tower["patch_size"], "num_image_tokens": grid * grid,
        "hidden_size": tower["width"], "num_hidden_layers": tower["layers"],
        "num_attention_heads": tower["heads"], "mlp_ratio": tower["mlp_ratio"],
        "depth": aligner.get("depth", 1)}  # fmt: skip
    drawing = {
        "embed_dim": codes.get("n_embed"), "num_embeddings": codes.get("image_token_size"),
        "latent_channels": codes["z_channels"], "base_channels": codes["ch"],
        "channel_multiplier": codes["decoder_ch_mult"], "num_patches": grid,
        "num_res_blocks": codes["num_res_blocks"], "projection_dim": rows.get("n_embed"),
        "image_token_embed_dim": head.get("image_token_embed"),
        "num_hidden_layers": rows.get("depth", 1)}  # fmt: skip
    mark = source.tokenizer.token_to_id(str(_PROCESSOR["image_tag"]))
    return {
        "image_token_id": mark, "text_config": text, "vision_config": vision, "vq_config": drawing,
        "model_type": "janus"}  # fmt: skip


def _params(path: Path, source: Source, key: str, expected: dict[str, Any]) -> dict[str, Any]:
    part = config_value(path, source.config, key, dict)
    check_only(path, part, expected)
    return config_value(path, part, "params", dict)


def _sizes(path: Path, name: Any, key: str, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if name not in known:
        raise CheckpointError(f"{path}: {key!r} is {name!r:.60}, expected {' or '.join(known)}")
    return known[name]


def _token_id(source: Source, name: str) -> int | None:
    text = token_text(tokenizer_settings(source.folder).get(f"{name}_token"))
    text = text or (str(_PROCESSOR["pad_tag"]) if name == "pad" else None)
    index: int | None = None if text is None else source.tokenizer.token_to_id(text)
    return index


def _check_processor(source: Source) -> None:
    path = source.folder_with("processor_config.json") / "processor_config.json"
    if path.is_file():
        check_only(path, read_json(path), _PROCESSOR)


def _stored(ref: TensorRef, width: int) -> TensorRef:
    """Return a reference of the hub's layout as one of DeepSeek's. ``width``: of the tower."""
    if (found := _LAYERS.fullmatch(ref.name)) is not None:
        part = "gen_aligner" if found[1] == "generation_aligner" else "aligner"
        return replace(ref, name=f"{part}.layers.{2 * int(found[2]) + 2}.{found[3]}")
    for theirs, ours in _NAMES:
        pattern = re.compile(rf"model\.{theirs}")
        if (found := pattern.match(ref.name)) is None:
            continue
        name = found.expand(ours) + ref.name[found.end() :]
        if name.endswith(".pos_embed"):
            return replace(ref, name=name, outer=1)
        if ".attn.qkv." in name:
            at = "qkv".index(found[2]) * width
            return replace(ref, name=name, rows=RowRange(at, at + width, 3 * width))
        return replace(ref, name=name)
    return ref

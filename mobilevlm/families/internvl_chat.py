"""InternVL2.5, 3 and 3.5 in OpenGVLab's own layout: other names and keys than the hub's, the same
arithmetic, and a conversation of its own.

Official code: modeling_internvl_chat.py and conversation.py, which the checkpoints carry; the tiles
are those of ``dynamic_preprocess`` in their README.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mobilevlm.checkpoint import Weights
from mobilevlm.errors import CheckpointError
from mobilevlm.families.config import check_only, config_value
from mobilevlm.families.hub import HubCheckpoint, open_hub
from mobilevlm.families.intern_vit import (
    FACTOR,
    OPENGVLAB,
    intern_vit,
    intern_weights,
)
from mobilevlm.families.internvl import IMAGENET_MEAN, IMAGENET_STD, connector, tile_counts
from mobilevlm.families.registry import Source, register
from mobilevlm.image_encoder import TransformerEncoder
from mobilevlm.input_spec import AspectTiles, InputSpec, LayoutSpec
from mobilevlm.spec import ConversationSpec, ModelSpec

_EXPECTED = {"downsample_ratio": 1 / FACTOR, "pad2square": False, "use_backbone_lora": 0,
             "use_llm_lora": 0}  # fmt: skip
_ORDERS: dict[str, Any] = {"v1": "columns", "v2": "rows"}
"""Order of visual tokens by ``ps_version``."""
_BEGIN, _ROW, _END = "<img>", "<IMG_CONTEXT>", "</img>"
_TURN_END = "<|im_end|>"
_SYSTEM = {
    "internvl2_5": "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位"
    "联合开发的多模态大语言模型。"
}
"""System messages by the names of the official templates."""
_TEMPLATE = """\
{%- macro marked(text) -%}{{ text | replace('<image>', '<IMG_CONTEXT>') }}{%- endmacro -%}
{%- if messages and messages[0]['role'] == 'system' -%}
  {%- set system = messages[0]['content'] -%}{%- set messages = messages[1:] -%}
{%- else -%}
  {%- set system = 'SYSTEM' -%}
{%- endif -%}
{{- '<|im_start|>system\\n' ~ system ~ '<|im_end|>\\n' -}}
{%- for message in messages -%}
  {{- '<|im_start|>' ~ message['role'] ~ '\\n' -}}
  {%- if message['content'] is string -%}
    {{- marked(message['content']) if message['role'] == 'user' else message['content'] -}}
  {%- else -%}
    {%- for part in message['content'] if part['type'] == 'image' -%}
      {{- '<IMG_CONTEXT>\\n' -}}
    {%- endfor -%}
    {%- for part in message['content'] if part['type'] == 'text' -%}
      {{- marked(part['text']) if message['role'] == 'user' else part['text'] -}}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


@register(
    "internvl_chat", {"internvl_chat"}, keys={"llm_config", "vision_config"}, ready_tokenizer=True
)
def read_internvl_chat(source: Source) -> tuple[ModelSpec, Weights]:
    """Reads InternVL in OpenGVLab's layout."""
    outer = {key: value for key, value in source.config.items() if key != "tie_word_embeddings"}
    hub = open_hub(replace(source, config=outer), "llm_config")
    path, config = hub.path, source.config
    check_only(path, config, _EXPECTED)
    vision = intern_vit(path, OPENGVLAB, hub.vision, config, "select_layer")
    version = config_value(path, config, "ps_version", str, "v1")
    if version not in _ORDERS:
        raise CheckpointError(
            f"{path}: 'ps_version' is {version!r:.60}, expected {' or '.join(_ORDERS)}"
        )
    decoder, backbone = hub.decoder()
    begin, row, end = (hub.token_id(text) for text in (_BEGIN, _ROW, _END))
    spec = ModelSpec(
        family="internvl_chat",
        name=source.name,
        inputs={
            "image": InputSpec(
                _preparation(path, config, vision),
                vision,
                replace(connector(vision, decoder.hidden_size), order=_ORDERS[version]),
                LayoutSpec(begin_ids=(begin,), end_ids=(end,), row_id=row),
            )
        },
        decoder=decoder,
        conversation=_conversation(hub),
    )
    return spec, intern_weights(hub, OPENGVLAB, vision, decoder, backbone)


def _preparation(path: Path, config: dict[str, Any], vision: TransformerEncoder) -> AspectTiles:
    """Return the tiles of the README's ``load_image``, with the numbers of config.json."""
    size = config_value(path, config, "force_image_size", int, vision.image_size)
    if size != vision.image_size:
        raise CheckpointError(
            f"{path}: 'force_image_size' is {size}, but the tower has positions for "
            f"{vision.image_size} pixels"
        )
    is_dynamic = config_value(path, config, "dynamic_image_size", bool, False)
    least, most = tile_counts(path, config, "min_dynamic_patch", "max_dynamic_patch", 6)
    return AspectTiles(
        size,
        least if is_dynamic else 1,
        most if is_dynamic else 1,
        IMAGENET_MEAN,
        IMAGENET_STD,
        config_value(path, config, "use_thumbnail", bool, False),
    )


def _conversation(hub: HubCheckpoint) -> ConversationSpec:
    """Return the conversation that ``template`` names, or the one that a person asks for.

    Raises:
        CheckpointError: it is not supported.
    """
    name = hub.source.options.conversation
    name = name or config_value(hub.path, hub.source.config, "template", str)
    if name not in _SYSTEM:
        raise CheckpointError(
            f"{hub.path}: conversation template {name!r:.60} is not supported: expected "
            f"{' or '.join(_SYSTEM)}"
        )
    template = _TEMPLATE.replace("SYSTEM", _SYSTEM[name])
    return ConversationSpec(template, (hub.token_id(_TURN_END),), (), "joined", _ROW)

"""A chat template with tools and what tests say in it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from mobilevlm.builtin import BUNDLES
from mobilevlm.bundle import read_manifest, write_manifest

TEMPLATE = """\
{%- if tools %}{{ '<tools>' }}
{%- for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '</tools>\n' }}{% endif %}
{%- for message in messages -%}
{{ message.role + ': ' }}
{%- if message.content is string %}{{ message.content }}
{%- else %}{% for part in message.content %}
{%- if part.type == 'image' %}{{ '<image>' }}{% else %}{{ part.text }}{% endif %}
{%- endfor %}{% endif %}
{%- for call in message.tool_calls or [] %}{{ '<tool_call>\n{"name": "' + call.function.name }}
{{- '", "arguments": ' }}{{ call.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}
{{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Returns a figure.",
            "parameters": {
                "type": "object",
                "properties": {"place": {"enum": ["here", "there"]}, "count": {"enum": [1, 2]}},
                "required": ["place", "count"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("count_birds", "count_boats")
]


def calling(name: str, arguments: Any, identity: str = "call_1") -> dict[str, Any]:
    """A message with a call."""
    call = {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def result(content: Any, identity: str = "call_1") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": identity, "content": content}


def nano_with_tools(folder: Path) -> Path:
    """Return a copy of the built-in bundle, at this folder, whose template has tools."""
    shutil.copytree(BUNDLES / "nano", folder)
    manifest, _ = read_manifest(folder)
    conversation = replace(manifest.spec.conversation, chat_template=TEMPLATE)
    write_manifest(
        folder, replace(manifest, spec=replace(manifest.spec, conversation=conversation))
    )
    return folder

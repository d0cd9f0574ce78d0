"""Qwen2-Audio: Whisper's encoder, cut to the sound, with pooling behind it, a linear projector, and
Qwen2.

Official code: the classes ``Qwen2AudioForConditionalGeneration`` and ``Qwen2AudioProcessor`` of
transformers.
"""

from __future__ import annotations

from mobilevlm.checkpoint import TensorRef, Weights
from mobilevlm.connector_spec import ConnectorSpec
from mobilevlm.families.backbones import decoder_refs
from mobilevlm.families.hub import open_hub
from mobilevlm.families.registry import Source, register
from mobilevlm.families.sound import PROJECTORS, whisper_encoder, whisper_mel, whisper_refs
from mobilevlm.input_spec import InputSpec, LayoutSpec
from mobilevlm.spec import ModelSpec

_SIZES = {
    "hidden_size": "d_model",
    "intermediate_size": "encoder_ffn_dim",
    "num_hidden_layers": "encoder_layers",
    "num_attention_heads": "encoder_attention_heads",
}
_TEMPLATE = """\
{%- set sounds = namespace(count=0) -%}
{%- if messages[0]['role'] != 'system' -%}
  {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {{- '<|im_start|>' ~ message['role'] ~ '\\n' -}}
  {%- for part in message['content'] -%}
    {%- if part['type'] == 'audio' -%}
      {%- set sounds.count = sounds.count + 1 -%}
      {{- 'Audio ' ~ sounds.count ~ ': <|audio_bos|><|AUDIO|><|audio_eos|>\\n' -}}
    {%- else -%}
      {{- part['text'] -}}
    {%- endif -%}
  {%- endfor -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""Text that the official processor writes for a checkpoint without a chat template."""


@register(
    "qwen2_audio", {"qwen2_audio"}, keys={"text_config", "audio_config"}, ready_tokenizer=True
)
def read_qwen2_audio(source: Source) -> tuple[ModelSpec, Weights]:
    """Reads Qwen2-Audio."""
    hub = open_hub(source)
    encoder = whisper_encoder(hub, _SIZES, pooling=2, cut=True)
    decoder, backbone = hub.decoder()
    connector = ConnectorSpec("stack", encoder.hidden_size, decoder.hidden_size, 1, 0, 0, factor=1)
    row_id, mark = hub.image_token("audio_token_index", "audio_token_id")
    mel = whisper_mel(hub, encoder, windows="first")
    spec = ModelSpec(
        family="qwen2_audio",
        name=source.name,
        inputs={"audio": InputSpec(mel, encoder, connector, LayoutSpec(row_id=row_id))},
        decoder=decoder,
        conversation=hub.conversation(mark, shows="audio", otherwise=_TEMPLATE),
    )
    refs = decoder_refs(hub.files, decoder, backbone) | whisper_refs(hub, encoder)
    place = hub.prefix(PROJECTORS, "linear.weight")
    for part in ("weight", "bias"):
        refs[f"projector.mlp.0.{part}"] = TensorRef(hub.files, f"{place}linear.{part}")
    return spec, hub.weights(refs, decoder, backbone)

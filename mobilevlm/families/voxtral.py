"""Voxtral: Whisper's encoder on windows of half a minute, four neighbouring features joined before
an MLP, and a Llama with Mistral's tokenizer.

Official code: the classes ``VoxtralForConditionalGeneration`` and ``VoxtralProcessor`` of
transformers; the template is that of mistral-common.
"""

from __future__ import annotations

from mobilevlm.checkpoint import TensorRef, Weights
from mobilevlm.connector_spec import ConnectorSpec
from mobilevlm.errors import CheckpointError
from mobilevlm.families.backbones import decoder_refs
from mobilevlm.families.config import check_only, config_value
from mobilevlm.families.hub import open_hub
from mobilevlm.families.registry import Source, register
from mobilevlm.families.sound import PROJECTORS, whisper_encoder, whisper_mel, whisper_refs
from mobilevlm.input_spec import InputSpec, LayoutSpec
from mobilevlm.spec import ModelSpec

_SIZES = {
    name: name
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
}
_BEGIN = "[BEGIN_AUDIO]"
_TEMPLATE = """\
{{- '<s>' -}}
{%- for message in messages -%}
  {%- set marks = {'system': ['[SYSTEM_PROMPT]', '[/SYSTEM_PROMPT]'], 'user': ['[INST]', '[/INST]'],
                   'assistant': ['', '</s>']}[message['role']] -%}
  {{- marks[0] -}}
  {%- for part in message['content'] -%}
    {{- '[BEGIN_AUDIO]MARK' if part['type'] == 'audio' else part['text'] -}}
  {%- endfor -%}
  {{- marks[1] -}}
{%- endfor -%}
"""


@register("voxtral", {"voxtral"}, keys={"text_config", "audio_config"}, ready_tokenizer=True)
def read_voxtral(source: Source) -> tuple[ModelSpec, Weights]:
    """Reads Voxtral Mini and Small."""
    hub = open_hub(source)
    check_only(hub.path, source.config, {"projector_hidden_act": "gelu"})
    encoder = whisper_encoder(hub, _SIZES)
    decoder, backbone = hub.decoder()
    settings = config_value(hub.path, source.config, "audio_config", dict)
    joined = config_value(hub.path, settings, "intermediate_size", int)
    factor = joined // encoder.hidden_size
    if joined % encoder.hidden_size or encoder.positions % factor:
        raise CheckpointError(
            f"{hub.path}: 'intermediate_size' of 'audio_config' is {joined}, expected a multiple "
            f"of {encoder.hidden_size} ('hidden_size') by a divisor of {encoder.positions}"
        )
    connector = ConnectorSpec(
        "stack", encoder.hidden_size, decoder.hidden_size, 2, 0, 0, factor=factor, bias=False
    )
    row_id, mark = hub.image_token("audio_token_id", "audio_token_index")
    hub.token_id(_BEGIN)
    audio = InputSpec(whisper_mel(hub, encoder), encoder, connector, LayoutSpec(row_id=row_id))
    template = _TEMPLATE.replace("MARK", mark)
    spec = ModelSpec(
        family="voxtral",
        name=source.name,
        inputs={"audio": audio},
        decoder=decoder,
        conversation=hub.conversation(mark, shows="audio", otherwise=template),
    )
    refs = decoder_refs(hub.files, decoder, backbone) | whisper_refs(hub, encoder)
    place = hub.prefix(PROJECTORS, "linear_1.weight")
    for index in range(2):
        name = f"{place}linear_{index + 1}.weight"
        refs[f"projector.mlp.{index}.weight"] = TensorRef(hub.files, name)
    return spec, hub.weights(refs, decoder, backbone)

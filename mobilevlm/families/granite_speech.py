"""Granite Speech: a Conformer on pairs of log-mel frames, a Q-Former that reads windows of its
features, and Granite, whose LoRA acts where a prompt has sound.

Official code: the classes ``GraniteSpeechForConditionalGeneration`` and ``GraniteSpeechProcessor``
of transformers. Exact rewrites: a stream divided by ``embedding_multiplier`` gives the same norms
with an epsilon divided by its square, so the multipliers of embeddings and of branches are in the
weights of what adds to the stream. Logits are not divided by ``logits_scaling``, as transformers 5
has it: the order of tokens is the same.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mobilevlm.audio_encoder import ConformerEncoder
from mobilevlm.checkpoint import (
    RowRange,
    TensorFiles,
    TensorRef,
    Weights,
    check_presence,
    read_json,
)
from mobilevlm.connector_spec import ConnectorSpec, QFormerSpec
from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import CheckpointError
from mobilevlm.families.backbones import (
    LLAMA_DEFAULTS,
    LLAMA_PARTS,
    Backbone,
    decoder_refs,
    read_llama,
)
from mobilevlm.families.blip import qformer_refs
from mobilevlm.families.config import check_only, config_value
from mobilevlm.families.hub import BACKBONES, HubCheckpoint, open_hub
from mobilevlm.families.registry import Source, register
from mobilevlm.families.sound import sound_settings
from mobilevlm.input_spec import InputSpec, LayoutSpec, Mel
from mobilevlm.spec import ModelSpec

_MEL = {"sample_rate": 16_000, "n_fft": 512, "win_length": 400, "hop_length": 160, "n_mels": 80}
_JOINED = 2
_ADAPTER = "adapter_model.safetensors"
_LORA = ("base_model.model.", "")
_PLAIN = {"use_dora": False, "use_rslora": False, "bias": "none", "fan_in_fan_out": False}
"""Settings of an adapter that are known here."""
_TEXT = """\
{%- set turns = namespace(found=[]) -%}
{%- for message in messages -%}
  {%- set text -%}
    {%- if message['content'] is string -%}{{- message['content'] -}}
    {%- else -%}
      {%- for part in message['content'] -%}
        {{- 'MARK' if part['type'] == 'audio' else part['text'] -}}
      {%- endfor -%}
    {%- endif -%}
  {%- endset -%}
  {%- set turns.found = turns.found + [{'role': message['role'], 'content': text}] -%}
{%- endfor -%}
{%- set messages = turns.found -%}
"""
"""Goes before the checkpoint's template, which takes contents as strings."""
_HALVES = ("ff1", "ff2")
_CONFORMER = {
    **{f"{half}.norm": f"{half}.pre_norm" for half in _HALVES},
    **{f"{half}.fc1": f"{half}.up_proj" for half in _HALVES},
    **{f"{half}.fc2": f"{half}.down_proj" for half in _HALVES},
    "attn_norm": "attn.pre_norm",
    "attn.out_proj": "attn.to_out",
    "conv.norm": "conv.norm",
    "norm": "post_norm",
}
"""Modules of a block with weight and bias."""
_AROUND = {"input": "input_linear", "guess.head": "out", "guess.back": "out_mid"}


@register(
    "granite_speech", {"granite_speech"}, keys={"text_config", "encoder_config"},
    ready_tokenizer=True,
)  # fmt: skip
def read_granite_speech(source: Source) -> tuple[ModelSpec, Weights]:
    """Reads Granite Speech 3.2 and 3.3."""
    hub = open_hub(source)
    encoder = _encoder(hub)
    decoder, backbone = hub.decoder()
    former = _qformer(hub, encoder)
    connector = ConnectorSpec(
        "qformer", encoder.hidden_size, decoder.hidden_size, 1, 0, 0, qformer=former
    )
    row_id, mark = hub.image_token("audio_token_index", "audio_token_id")
    mel = _mel(hub, encoder)
    refs = decoder_refs(hub.files, decoder, backbone) | _encoder_refs(hub, encoder)
    refs = _scaled(refs, hub)
    decoder, lora = _lora(hub, decoder)
    spec = ModelSpec(
        family="granite_speech",
        name=source.name,
        inputs={"audio": InputSpec(mel, encoder, connector, LayoutSpec(row_id=row_id))},
        decoder=decoder,
        conversation=hub.conversation(
            mark, _TEXT.replace("MARK", mark), shows="audio", parts=False
        ),
    )
    refs |= qformer_refs(hub.files, former, "projector.qformer", "projector.query")
    for part in ("weight", "bias"):
        refs[f"projector.mlp.0.{part}"] = TensorRef(hub.files, f"projector.linear.{part}")
    skipped = [r"encoder\.layers\.\d+\.conv\.batch_norm\.num_batches_tracked$"]
    weights = hub.weights({**refs, **lora}, decoder, backbone, skipped)
    for index in range(decoder.num_hidden_layers if lora else 0):
        down = (decoder.sound_rank, decoder.hidden_size)
        weights.check(f"decoder.layers.{index}.attn.q_down.weight", down)
    return spec, weights


def _encoder(hub: HubCheckpoint) -> ConformerEncoder:
    config = config_value(hub.path, hub.source.config, "encoder_config", dict)
    numbers = {
        key: config_value(hub.path, config, key, int)
        for key in (
            "input_dim", "hidden_dim", "num_layers", "num_heads", "dim_head", "context_size",
            "max_pos_emb", "conv_kernel_size", "conv_expansion_factor", "feedforward_mult",
            "output_dim",
        )
    }  # fmt: skip
    if numbers["num_layers"] < 2 or numbers["context_size"] > numbers["max_pos_emb"]:
        raise CheckpointError(
            f"{hub.path}: 'num_layers' {numbers['num_layers']} and 'context_size' "
            f"{numbers['context_size']} of 'encoder_config': expected 2 layers or more, and at "
            f"most 'max_pos_emb' {numbers['max_pos_emb']} frames"
        )
    size = numbers["hidden_dim"]
    return ConformerEncoder(
        bins=numbers["input_dim"],
        hidden_size=size,
        intermediate_size=size * numbers["feedforward_mult"],
        num_hidden_layers=numbers["num_layers"],
        num_attention_heads=numbers["num_heads"],
        head_dim=numbers["dim_head"],
        block=numbers["context_size"],
        distances=numbers["max_pos_emb"],
        conv_kernel=numbers["conv_kernel_size"],
        conv_size=size * numbers["conv_expansion_factor"],
        guesses=numbers["output_dim"],
    )


def _mel(hub: HubCheckpoint, encoder: ConformerEncoder) -> Mel:
    path, settings = sound_settings(hub)
    given = config_value(path, settings, "melspec_kwargs", dict, {})
    unknown = [key for key in given if key not in _MEL]
    if unknown:
        raise CheckpointError(f"{path}: {unknown[0]!r:.60} in 'melspec_kwargs' is not supported")
    sizes = {key: config_value(path, {**_MEL, **given}, key, int) for key in _MEL}
    bins, fft = sizes["n_mels"], sizes["n_fft"]
    if bins * _JOINED != encoder.bins or sizes["win_length"] > fft:
        raise CheckpointError(
            f"{path}: 'n_mels' {bins} and 'win_length' {sizes['win_length']}: expected half of the "
            f"encoder's 'input_dim' {encoder.bins}, and at most 'n_fft' {fft}"
        )
    return Mel(
        bins,
        sizes["sample_rate"],
        sizes["win_length"],
        sizes["hop_length"],
        fft=fft,
        scale="htk",
        windows="any",
        joined=_JOINED,
    )


def _qformer(hub: HubCheckpoint, encoder: ConformerEncoder) -> QFormerSpec:
    path, config = hub.path, config_value(hub.path, hub.source.config, "projector_config", dict)
    expected = {"hidden_act": "gelu", "use_qformer_text_input": False}
    check_only(path, {**expected, **config}, expected)
    window = config_value(path, hub.source.config, "window_size", int)
    rate = config_value(path, hub.source.config, "downsample_rate", int)
    width = config_value(path, config, "encoder_hidden_size", int)
    if window % rate or width != encoder.hidden_size:
        raise CheckpointError(
            f"{path}: 'window_size' {window} must be a multiple of 'downsample_rate' {rate}, and "
            f"'encoder_hidden_size' {width} must be the encoder's {encoder.hidden_size}"
        )
    size = config_value(path, config, "hidden_size", int)
    heads = config_value(path, config, "num_attention_heads", int)
    if size % heads:
        raise CheckpointError(
            f"{path}: the Q-Former's 'hidden_size' must be a multiple of 'num_attention_heads': "
            f"found {size} and {heads}"
        )
    return QFormerSpec(
        size,
        config_value(path, config, "intermediate_size", int),
        config_value(path, config, "num_hidden_layers", int),
        heads,
        config_value(path, config, "cross_attention_frequency", int),
        window // rate,
        config_value(path, config, "layer_norm_eps", float),
        window=window,
    )


def _encoder_refs(hub: HubCheckpoint, spec: ConformerEncoder) -> dict[str, TensorRef]:
    files = hub.files
    names = {f"audio.{ours}": f"encoder.{theirs}" for ours, theirs in _AROUND.items()}
    refs: dict[str, TensorRef] = {}
    width = spec.num_attention_heads * spec.head_dim
    for index in range(spec.num_hidden_layers):
        ours, theirs = f"audio.layers.{index}", f"encoder.layers.{index}"
        names |= {f"{ours}.{part}": f"{theirs}.{stored}" for part, stored in _CONFORMER.items()}
        refs[f"{ours}.attn.q_proj.weight"] = TensorRef(files, f"{theirs}.attn.to_q.weight")
        for place, part in enumerate("kv"):
            rows = RowRange(place * width, (place + 1) * width, 2 * width)
            stored = f"{theirs}.attn.to_kv.weight"
            refs[f"{ours}.attn.{part}_proj.weight"] = TensorRef(files, stored, rows)
        refs[f"{ours}.attn.distances.weight"] = TensorRef(
            files, f"{theirs}.attn.rel_pos_emb.weight"
        )
        conv = f"{theirs}.conv"
        for part in ("up", "down"):
            weight = TensorRef(files, f"{conv}.{part}_conv.weight", inner=1)
            refs[f"{ours}.conv.{part}.weight"] = weight
            refs[f"{ours}.conv.{part}.bias"] = TensorRef(files, f"{conv}.{part}_conv.bias")
        refs[f"{ours}.conv.depthwise.weight"] = TensorRef(files, f"{conv}.depth_conv.conv.weight")
        for part, stored in (
            ("weight", "weight"), ("bias", "bias"), ("mean", "running_mean"),
            ("variance", "running_var"),
        ):  # fmt: skip
            norm = TensorRef(files, f"{conv}.batch_norm.{stored}")
            refs[f"{ours}.conv.batch_norm.{part}"] = norm
    for ours, theirs in names.items():
        for part in ("weight", "bias"):
            refs[f"{ours}.{part}"] = TensorRef(files, f"{theirs}.{part}")
    return refs


def _scaled(refs: dict[str, TensorRef], hub: HubCheckpoint) -> dict[str, TensorRef]:
    """Return the tensors with the multipliers of Granite in what adds to the stream."""
    share = _multiplier(hub.path, hub.text, "residual_multiplier")
    factor = share / _multiplier(hub.path, hub.text, "embedding_multiplier")
    ends = (".attn.o_proj.weight", ".attn.o_proj.bias", ".mlp.down_proj.weight",
            ".mlp.down_proj.bias")  # fmt: skip
    return {
        name: replace(ref, factor=factor)
        if name.startswith("decoder.layers.") and name.endswith(ends)
        else ref
        for name, ref in refs.items()
    }


def _lora(hub: HubCheckpoint, decoder: DecoderSpec) -> tuple[DecoderSpec, dict[str, TensorRef]]:
    """Return the decoder with its adapter, which acts where a prompt has sound.

    Raises:
        CheckpointError: the adapter is missing, or is of another kind.
    """
    if not config_value(hub.path, hub.source.config, "has_lora_adapter", bool, True):
        return decoder, {}
    folder = hub.source.folder_with("adapter_config.json")
    path = folder / "adapter_config.json"
    settings = read_json(path, required_for="the adapter for sound")
    check_only(path, {**_PLAIN, **settings}, _PLAIN)
    targets: Any = settings.get("target_modules")
    if not isinstance(targets, list) or sorted(map(str, targets)) != ["q_proj", "v_proj"]:
        raise CheckpointError(
            f"{path}: 'target_modules' is {targets!r:.60}, expected 'q_proj' and 'v_proj'"
        )
    if settings.get("rank_pattern") or settings.get("alpha_pattern"):
        raise CheckpointError(f"{path}: ranks of single layers ('rank_pattern') are not supported")
    rank = config_value(path, settings, "r", int)
    scale = config_value(path, settings, "lora_alpha", float) / rank
    if not (folder / _ADAPTER).is_file():
        raise CheckpointError(f"{folder}: no {_ADAPTER}, which acts on prompts with sound")
    files = TensorFiles(folder, [folder / _ADAPTER])
    place = "language_model.model.layers.0.self_attn.q_proj.lora_A.weight"
    root = next((start for start in _LORA if f"{start}{place}" in files), _LORA[0])
    refs: dict[str, TensorRef] = {}
    for index in range(decoder.num_hidden_layers):
        for part in "qv":
            stored = f"{root}language_model.model.layers.{index}.self_attn.{part}_proj.lora_"
            ours = f"decoder.layers.{index}.attn.{part}"
            refs[f"{ours}_down.weight"] = TensorRef(files, f"{stored}A.weight")
            refs[f"{ours}_up.weight"] = TensorRef(files, f"{stored}B.weight", factor=scale)
    check_presence(refs)
    return replace(decoder, sound_rank=rank), refs


def _read_granite(path: Path, config: dict[str, Any]) -> DecoderSpec:
    """``GraniteConfig``. The stream is divided by ``embedding_multiplier``."""
    spec = read_llama(path, config)
    scale = _multiplier(path, config, "attention_multiplier")
    multiplier = _multiplier(path, config, "embedding_multiplier")
    return replace(spec, attention_scale=scale, norm_eps=spec.norm_eps / multiplier**2)


def _multiplier(path: Path, config: dict[str, Any], key: str) -> float:
    return config_value(path, config, key, float, 1.0)


BACKBONES["granite"] = (Backbone(_read_granite, parts=LLAMA_PARTS), LLAMA_DEFAULTS)

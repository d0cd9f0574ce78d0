"""Parts that families which hear share: Whisper's encoder and feature extractor in the hub's
layout."""

from __future__ import annotations

from typing import Any

from mobilevlm.audio_encoder import WhisperEncoder
from mobilevlm.checkpoint import TensorRef, read_json
from mobilevlm.errors import CheckpointError
from mobilevlm.families.config import check_only, config_value
from mobilevlm.families.hub import HubCheckpoint
from mobilevlm.input_spec import Mel

TOWERS = ("audio_tower.", "model.audio_tower.")
PROJECTORS = ("multi_modal_projector.", "model.multi_modal_projector.")
_PROCESSOR = "preprocessor_config.json"
_JOINED = "processor_config.json"
_FOR_SOUND = "how sound is prepared"
_WHISPER: dict[str, Any] = {
    "feature_size": 128, "sampling_rate": 16_000, "hop_length": 160, "chunk_length": 30,
    "n_fft": 400,
}  # fmt: skip
_FIXED = {"dither": 0.0, "padding_value": 0.0, "padding_side": "right", "do_normalize": False}
"""Settings of the feature extractor that are known here."""
_LAYER = {
    "norm1": ("self_attn_layer_norm", ("weight", "bias")),
    "attn.q_proj": ("self_attn.q_proj", ("weight", "bias")),
    "attn.k_proj": ("self_attn.k_proj", ("weight",)),
    "attn.v_proj": ("self_attn.v_proj", ("weight", "bias")),
    "attn.out_proj": ("self_attn.out_proj", ("weight", "bias")),
    "norm2": ("final_layer_norm", ("weight", "bias")),
    "mlp.fc1": ("fc1", ("weight", "bias")),
    "mlp.fc2": ("fc2", ("weight", "bias")),
}
_AROUND = {
    "conv1": ("conv1", ("weight", "bias")),
    "conv2": ("conv2", ("weight", "bias")),
    "position_embedding": ("embed_positions", ("weight",)),
    "post_norm": ("layer_norm", ("weight", "bias")),
}


def sound_settings(hub: HubCheckpoint) -> tuple[Any, dict[str, Any]]:
    """Return the file with the settings of the feature extractor, and these.

    Raises:
        CheckpointError: the checkpoint has none.
    """
    joined = hub.source.folder_with(_JOINED) / _JOINED
    if joined.is_file():
        settings = read_json(joined)
        if isinstance(settings.get("feature_extractor"), dict):
            return joined, settings["feature_extractor"]
    path = hub.source.folder_with(_PROCESSOR) / _PROCESSOR
    return path, read_json(path, required_for=_FOR_SOUND)


def whisper_mel(hub: HubCheckpoint, encoder: WhisperEncoder, **traits: Any) -> Mel:
    """Return how Whisper's feature extractor prepares sound. ``traits``: fields of :class:`Mel`.

    Raises:
        CheckpointError: a setting is wrong, not supported, or does not fit the encoder.
    """
    path, given = sound_settings(hub)
    settings = {**_WHISPER, **{key: value for key, value in given.items() if value is not None}}
    check_only(path, settings, {key: _FIXED[key] for key in _FIXED if key in settings})
    bins, rate, hop, fft, seconds = (
        config_value(path, settings, key, int)
        for key in ("feature_size", "sampling_rate", "hop_length", "n_fft", "chunk_length")
    )
    frames = seconds * rate // hop
    if (bins, frames) != (encoder.bins, encoder.frames):
        raise CheckpointError(
            f"{path}: {frames} frames of {bins} numbers ('chunk_length', 'feature_size'), but the "
            f"encoder takes {encoder.frames} of {encoder.bins} ('max_source_positions', "
            f"'num_mel_bins'): these files are of different models"
        )
    return Mel(bins, rate, fft, hop, frames, fft, **traits)


def whisper_encoder(hub: HubCheckpoint, names: dict[str, str], **traits: Any) -> WhisperEncoder:
    """Return the encoder of ``audio_config``. ``names``: keys of its sizes by the fields of
    :class:`WhisperEncoder`; ``traits``: other fields.

    Raises:
        CheckpointError: a value is missing or wrong.
    """
    config = config_value(hub.path, hub.source.config, "audio_config", dict)
    check_only(
        hub.path, {"activation_function": "gelu", "scale_embedding": False, **config},
        {"activation_function": "gelu", "scale_embedding": False},
    )  # fmt: skip
    sizes: dict[str, Any] = {
        field: config_value(hub.path, config, key, int) for field, key in names.items()
    }
    encoder = WhisperEncoder(
        bins=config_value(hub.path, config, "num_mel_bins", int, 128),
        positions=config_value(hub.path, config, "max_source_positions", int, 1500),
        **sizes,
        **traits,
    )
    if encoder.hidden_size % encoder.num_attention_heads:
        raise CheckpointError(
            f"{hub.path}: the hidden size of 'audio_config' must be a multiple of its heads: found "
            f"{encoder.hidden_size} and {encoder.num_attention_heads}"
        )
    return encoder


def whisper_refs(hub: HubCheckpoint, spec: WhisperEncoder) -> dict[str, TensorRef]:
    """Return the tensors of the encoder, by canonical name."""
    place = hub.prefix(TOWERS, "conv1.weight")
    names = {
        f"audio.{ours}.{part}": f"{theirs}.{part}"
        for ours, (theirs, parts) in _AROUND.items()
        for part in parts
    }
    names |= {
        f"audio.layers.{index}.{ours}.{part}": f"layers.{index}.{theirs}.{part}"
        for index in range(spec.num_hidden_layers)
        for ours, (theirs, parts) in _LAYER.items()
        for part in parts
    }
    return {ours: TensorRef(hub.files, f"{place}{theirs}") for ours, theirs in names.items()}

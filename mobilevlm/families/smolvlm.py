"""SmolVLM, SmolVLM2, and Granite Docling in Idefics3's layout: images as tiles, a SigLIP tower with
its final norm, a pixel shuffle with one Linear, and a Llama.

Official code: the classes ``SmolVLMForConditionalGeneration`` and
``Idefics3ForConditionalGeneration`` of transformers, and their processors.
"""

from __future__ import annotations

from mobilevlm.checkpoint import TensorRef, Weights, read_json
from mobilevlm.connector_spec import ConnectorSpec
from mobilevlm.errors import CheckpointError
from mobilevlm.families.backbones import decoder_refs
from mobilevlm.families.config import config_value
from mobilevlm.families.hub import HubCheckpoint, open_hub
from mobilevlm.families.registry import Source, register
from mobilevlm.families.towers import (
    Tower,
    tiles_spec,
    transformer_spec,
)
from mobilevlm.image_encoder import TransformerEncoder
from mobilevlm.input_spec import InputSpec, LayoutSpec, Tiles
from mobilevlm.media.tiles import marked_layout
from mobilevlm.spec import ModelSpec
from mobilevlm.tokenizers.tokenizer import token_text, tokenizer_settings

_VISION = {"hidden_size": 1152, "intermediate_size": 3072, "num_hidden_layers": 12,
           "num_attention_heads": 16, "image_size": 224, "patch_size": 32,
           "layer_norm_eps": 1e-6}  # fmt: skip
"""Defaults of ``SmolVLMVisionConfig`` and ``Idefics3VisionConfig``."""
_TEXT_ABSENT = ("use_resampler", "qk_layer_norms", "rope_interleaved")
"""Keys of ``text_config`` that would change the model; the official classes know none of them."""
_ROOTS = ("model.", "")
_CONNECTORS = ("model.connector.", "connector.")
_LINEAR = "modality_projection.proj.weight"
_MARKS = {"fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>"}
"""Special tokens around images, by their keys in tokenizer_config.json."""


@register(
    "smolvlm", {"smolvlm", "idefics3"}, keys={"text_config", "vision_config"}, ready_tokenizer=True
)
def read_smolvlm(source: Source) -> tuple[ModelSpec, Weights]:
    """Reads a checkpoint of SmolVLM or in Idefics3's layout."""
    hub = open_hub(source)
    vision = _tower(hub)
    decoder, backbone = hub.decoder()
    for key in _TEXT_ABSENT:
        if hub.text.get(key):
            raise CheckpointError(
                f"{hub.path}: {key!r} in 'text_config' is {hub.text[key]!r:.60}, which is not "
                f"supported: expected false"
            )
    factor = config_value(hub.path, source.config, "scale_factor", int, 2)
    if vision.grid % factor:
        raise CheckpointError(
            f"{hub.path}: the tower's patches per edge ('image_size' over 'patch_size') must be a "
            f"multiple of 'scale_factor': found {vision.grid} and {factor}"
        )
    connector = ConnectorSpec(
        "mlp_downsample",
        vision.hidden_size,
        decoder.hidden_size,
        1,
        vision.grid,
        vision.grid // factor,
        factor=factor,
        norm=False,
        bias=False,
    )
    tower = Tower(str(hub.processor_path), hub.vision, hub.processor, source.folder)
    tiles = tiles_spec(tower, vision)
    row_id, mark = hub.image_token("image_token_id")
    _check_rows(source, connector.num_tokens)
    image = InputSpec(tiles, vision, connector, _layout(hub, tiles, row_id))
    spec = ModelSpec(
        family="smolvlm",
        name=source.name,
        inputs={"image": image},
        decoder=decoder,
        conversation=hub.conversation(mark),
    )
    tower_refs, skipped = hub.tower_refs(vision, _ROOTS)
    refs = decoder_refs(hub.files, decoder, backbone) | tower_refs
    refs["projector.mlp.0.weight"] = TensorRef(
        hub.files, hub.prefix(_CONNECTORS, _LINEAR) + _LINEAR
    )
    return spec, hub.weights(refs, decoder, backbone, skipped)


def _tower(hub: HubCheckpoint) -> TransformerEncoder:
    config = {**_VISION, **{key: value for key, value in hub.vision.items() if value is not None}}
    channels = config_value(hub.path, config, "num_channels", int, 3)
    if channels != 3:
        raise CheckpointError(f"{hub.path}: 'num_channels' is {channels}, expected 3")
    layers = config_value(hub.path, config, "num_hidden_layers", int)
    traits = {"class_token": False, "patch_bias": True, "pre_norm": False, "post_norm": True}
    return transformer_spec(hub.path, config, layers, "gelu_pytorch_tanh", **traits)


def _check_rows(source: Source, tokens: int) -> None:
    """Refuse a processor that writes another number of tokens for a tile than come out."""
    path = source.folder_with("processor_config.json") / "processor_config.json"
    settings = read_json(path) if path.is_file() else {}
    found = config_value(path, settings, "image_seq_len", int, tokens)
    if found != tokens:
        raise CheckpointError(
            f"{path}: 'image_seq_len' is {found}, but tower and connector make {tokens} visual "
            f"tokens of a tile: these files are of different models"
        )


def _layout(hub: HubCheckpoint, tiles: Tiles, row_id: int) -> LayoutSpec:
    """Return the ids around tiles, with the checkpoint's own marks."""
    settings = tokenizer_settings(hub.source.folder)
    around, whole = (token_text(settings.get(key)) or text for key, text in _MARKS.items())
    for text in (around, whole):
        hub.token_id(text)

    def ids(text: str) -> tuple[int, ...]:
        return tuple(hub.source.tokenizer.encode(text, add_special_tokens=False).ids)

    return marked_layout(ids, tiles, around, whole, row_id)

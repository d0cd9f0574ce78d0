"""Random-weight checkpoints in the official on-disk format, for latency without a download.

The shapes are the published ones; the answers mean nothing. Weights are written value by value as
they are drawn, so memory stays small whatever the size of the model.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mobilevlm.errors import MobileVLMError
from mobilevlm.families.backbones import LLAMA, STABLELM
from mobilevlm.synth.families import LAYOUTS
from mobilevlm.synth.shapes import Layout, Part, Shapes, decoder_shapes, linear, norm, write_json
from mobilevlm.synth.tokenizer import tiktoken_ranks, tokenizer_model

Progress = Callable[[int, int], None]
"""Called with ``(done_bytes, total_bytes)``."""

SHARD_BYTES = 512 * 10**6
_CHUNK = 2**21
"""Values drawn at once."""
ARCADE_RANKS = 100256
"""Tokens of StableLM's vocabulary, the special ones aside."""
_HALF = 2
"""Bytes of a float16."""
_EMBEDDINGS = (
    *("embed_tokens.weight", "embed_positions.weight", "query_tokens"),
    *("class_embedding", "position_embedding.weight", "position_embedding"),
    *("cls_token", "position_embeddings", "pos_embed.weight"),
)
_TO_RESIDUAL = (
    *("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight"),
    *("self_attn.projection.weight", "attention.projection_layer.weight", "feed_forward.w2.weight"),
    "attn.proj.weight",
)
"""Endings of the tensors whose products are added to a residual stream."""


@dataclass(frozen=True)
class Tower:
    """Shape of a CLIP vision transformer."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int = 336
    patch_size: int = 14


@dataclass(frozen=True)
class Configuration:
    """Shape of a vision-language model, in the words of its config.json."""

    model_type: str
    architecture: str
    mm_projector_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    rms_norm_eps: float
    tower: Tower
    experts: int = 0
    """Number of experts in every second layer, from the first on; each token uses two."""
    num_key_value_heads: int = 0
    """0: as many as attention heads."""

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads


_CLIP_LARGE = Tower(1024, 4096, 24, 16)
_VIT_BASE = Tower(768, 3072, 12, 12, 384, 16)
_MOBILEVLM = ("mobilevlm", "MobileLlamaForCausalLM", "ldpnetv2")
_MOE_LLAVA = ("moe_llava_stablelm", "MoELLaVAStablelmForCausalLM", "mlp2x_gelu")
_LLAVA = ("llava_llama", "LlavaLlamaForCausalLM", "mlp2x_gelu")

CONFIGURATIONS = {
    "mobilevlm_v2_1.7b": Configuration(
        *_MOBILEVLM, 32000, 2048, 5632, 24, 16, 2048, 1e-6, _CLIP_LARGE
    ),
    "mobilevlm_v2_3b": Configuration(
        *_MOBILEVLM, 32000, 2560, 6912, 32, 32, 2048, 1e-6, _CLIP_LARGE
    ),
    "llava_v1.5_7b": Configuration(*_LLAVA, 32000, 4096, 11008, 32, 32, 4096, 1e-5, _CLIP_LARGE),
    # No published one: half a billion parameters, as SmolVLM 500M has (ViT-B/16 and SmolLM2 360M
    # with its 32 layers and grouped queries), in MobileVLM V2's layout and with MobileLLaMA's
    # proportions. LDPv2 pools the tower's 24 × 24 patches as it does those of ViT-L/14.
    "mobilevlm_v2_0.5b": Configuration(
        *_MOBILEVLM, 32000, 1024, 2816, 32, 16, 2048, 1e-6, _VIT_BASE, num_key_value_heads=4
    ),
    # Sizes of StableLM-2 1.6B and of MoE-LLaVA's experts in it: 2.9 billion parameters, 2 in use.
    "moe_llava_stablelm_1.6b_4e": Configuration(
        *_MOE_LLAVA, 100352, 2048, 5632, 24, 32, 4096, 1e-5, _CLIP_LARGE, 4
    ),
    # Dense, with as many parameters as a token uses there: its MLPs have the mean width of one and
    # of two experts.
    "llava_2b": Configuration(*_LLAVA, 100352, 2048, 8448, 24, 32, 4096, 1e-5, _CLIP_LARGE),
    "tiny": Configuration(*_MOBILEVLM, 512, 64, 160, 3, 4, 2048, 1e-6, Tower(64, 128, 3, 4)),
}


NAMES = (*CONFIGURATIONS, *LAYOUTS)


def write_checkpoint(
    name: str, folder: Path, seed: int = 0, progress: Progress | None = None
) -> None:
    """Writes the checkpoint ``name``, one of :data:`NAMES`, to ``folder``. The same name and seed
    give the same bytes.

    The folder appears when it is complete; until then a work folder beside it is written to, as by
    exports.

    Raises:
        MobileVLMError: unknown name, the folder is not empty, or the disk is too small.
        MissingExtraError: sentencepiece is not installed.
    """
    if name not in CONFIGURATIONS and name not in LAYOUTS:
        raise MobileVLMError(f"configuration {name!r} is not known: expected {', '.join(NAMES)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MobileVLMError(f"{folder}: exists and is not an empty folder: name another one")
    from mobilevlm.export.workspace.work_folder import CONTENT, claim, discard, settle

    layout = layout_of(name)
    total = sum(_size(shape) for part in layout.parts for shape in part.shapes.values())
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < total:
        raise MobileVLMError(
            f"{folder}: {name} takes {total / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free there: "
            f"name a folder on a larger disk"
        )
    with claim(folder.resolve()) as home:
        settle(home, folder.resolve())
        draft = home.path / CONTENT
        shutil.rmtree(draft, ignore_errors=True)  # of one that was killed
        try:
            for part in layout.parts:
                (draft / part.folder).mkdir(parents=True, exist_ok=True)
            layout.write_settings(draft, name)
            count = _Counter(total, progress)
            for part in layout.parts:
                words = f"{name} {seed} {part.seed}".strip()
                _write_weights(draft / part.folder, part, words, count)
            draft.rename(folder.resolve())
        finally:
            discard(home)


def layout_of(name: str) -> Layout:
    """The files of a checkpoint."""
    if name in LAYOUTS:
        return LAYOUTS[name]()
    configuration = CONFIGURATIONS[name]
    tower = configuration.tower
    return Layout(
        (
            Part("", language_shapes(configuration), configuration.num_hidden_layers, ""),
            Part("vision_tower", tower_shapes(tower), tower.num_hidden_layers, "tower"),
        ),
        lambda folder, name: _write_settings(folder, name, configuration),
    )


def language_shapes(configuration: Configuration) -> Shapes:
    """Tensors of the checkpoint itself: decoder and projector."""
    hidden, count = configuration.hidden_size, configuration.experts
    backbone = STABLELM if count else LLAMA
    spec = backbone.read(Path("config.json"), _config(configuration))
    shapes = decoder_shapes(spec, backbone)
    projector = "model.mm_projector.image_spatial_proj" if count else "model.mm_projector"
    pooled = configuration.mm_projector_type == "ldpnetv2"
    mlp = f"{projector}.mlp.mlp" if pooled else projector
    shapes |= linear(f"{mlp}.0", configuration.tower.hidden_size, hidden)
    shapes |= linear(f"{mlp}.2", hidden, hidden)
    if pooled:
        shapes[f"{projector}.peg.peg.0.weight"] = (hidden, 1, 3, 3)
        shapes[f"{projector}.peg.peg.0.bias"] = (hidden,)
    return shapes


def tower_shapes(tower: Tower) -> Shapes:
    """Tensors of a CLIPVisionModel."""
    hidden, patch = tower.hidden_size, tower.patch_size
    embeddings = "vision_model.embeddings"
    shapes: Shapes = {
        f"{embeddings}.class_embedding": (hidden,),
        f"{embeddings}.patch_embedding.weight": (hidden, 3, patch, patch),
        f"{embeddings}.position_embedding.weight": ((tower.image_size // patch) ** 2 + 1, hidden),
        **norm("vision_model.pre_layrnorm", hidden),
    }
    for index in range(tower.num_hidden_layers):
        layer = f"vision_model.encoder.layers.{index}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{layer}.self_attn.{part}", hidden, hidden)
        shapes |= norm(f"{layer}.layer_norm1", hidden)
        shapes |= linear(f"{layer}.mlp.fc1", hidden, tower.intermediate_size)
        shapes |= linear(f"{layer}.mlp.fc2", tower.intermediate_size, hidden)
        shapes |= norm(f"{layer}.layer_norm2", hidden)
    return shapes | norm("vision_model.post_layernorm", hidden)


def _size(shape: tuple[int, ...]) -> int:
    """Bytes of a tensor in float16."""
    return math.prod(shape) * _HALF


class _Counter:
    """Sums up the bytes written and reports them."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def add(self, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(self.done, self.total)


def _write_weights(folder: Path, part: Part, seed: str, count: _Counter) -> None:
    """Safetensors shards of at most :data:`SHARD_BYTES`, with an index when there are several."""
    shards: list[Shapes] = [{}]
    size = 0
    for name, shape in part.shapes.items():
        if size and size + _size(shape) > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += _size(shape)
    if len(shards) == 1:
        _write_shard(folder / "model.safetensors", shards[0], part, seed, count)
        return
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards, 1):
        file = f"model-{index:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / file, shard, part, seed, count)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(_size(shape) for shape in part.shapes.values())
    data = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", data)


def _write_shard(path: Path, shapes: Shapes, part: Part, seed: str, count: _Counter) -> None:
    """One safetensors file, written here since the library only takes whole tensors.

    The format: the header's length as u64, a JSON header padded with spaces, then the tensors
    (github.com/huggingface/safetensors, "Format").
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + _size(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            _write_values(file, name, shape, seed, _distribution(name, shape, part))
            count.add(_size(shape))


def _write_values(
    file: BinaryIO, name: str, shape: tuple[int, ...], seed: str, spread: tuple[float, float]
) -> None:
    """Draw a tensor of this mean and deviation and write it as float16."""
    mean, deviation = spread
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    random = np.random.default_rng(np.frombuffer(digest, np.uint32))
    left = math.prod(shape)
    while left:
        values = random.standard_normal(min(left, _CHUNK), np.float32)
        values *= np.float32(deviation)
        values += np.float32(mean)
        file.write(values.astype("<f2").data)
        left -= len(values)


def _distribution(name: str, shape: tuple[int, ...], part: Part) -> tuple[float, float]:
    """Return the mean and deviation that keep activations near unit variance at every depth.

    A product with ``n`` inputs gets 1 / sqrt(n); what is added to the residual stream is smaller by
    sqrt(2 · layers), as in GPT-2, so that the stream does not grow; embeddings have the variance
    of the visual tokens beside them.
    """
    for end, spread in part.draws.items():
        if name.endswith(end):
            return spread
    if name.endswith(("running_var", "gamma", "lambda_1", "lambda_2")):
        return 1.0, 0.0
    if "norm" in name.lower() or "layrnorm" in name or ".bn." in name or ".ln_q." in name:
        return (1.0, 0.0) if name.endswith("weight") else (0.0, 0.0)
    if name.endswith(_EMBEDDINGS):
        return 0.0, 1.0
    if name.endswith("bias"):
        return 0.0, 0.02
    deviation = 1 / math.sqrt(math.prod(shape[1:]))
    if name.endswith(_TO_RESIDUAL):
        deviation /= math.sqrt(2 * part.depth)
    return 0.0, deviation


def _write_settings(folder: Path, name: str, configuration: Configuration) -> None:
    """Everything but the weights."""
    tower = configuration.tower
    write_json(folder / "config.json", {"_name_or_path": f"synth/{name}", **_config(configuration)})
    if configuration.experts:
        (folder / "arcade100k.tiktoken").write_bytes(tiktoken_ranks(ARCADE_RANKS))
        end = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
        write_json(folder / "special_tokens_map.json", end)
        kind = {"tokenizer_class": "Arcade100kTokenizer"}
        write_json(folder / "tokenizer_config.json", {**end, **kind})
    else:
        _write_llama_tokenizer(folder, configuration)
    write_json(
        folder / "vision_tower" / "config.json",
        {
            "architectures": ["CLIPVisionModel"],
            "hidden_act": "quick_gelu",
            "hidden_size": tower.hidden_size,
            "image_size": tower.image_size,
            "intermediate_size": tower.intermediate_size,
            "layer_norm_eps": 1e-5,
            "model_type": "clip_vision_model",
            "num_attention_heads": tower.num_attention_heads,
            "num_channels": 3,
            "num_hidden_layers": tower.num_hidden_layers,
            "patch_size": tower.patch_size,
            "torch_dtype": "float16",
        },
    )
    write_json(
        folder / "vision_tower" / "preprocessor_config.json",
        {
            "crop_size": tower.image_size,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "resample": 3,
            "size": tower.image_size,
        },
    )


def _config(configuration: Configuration) -> dict[str, Any]:
    """Return the content of config.json, its name aside."""
    tower = configuration.tower
    config = {
        "architectures": [configuration.architecture],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": configuration.hidden_size,
        "image_aspect_ratio": "pad",
        "intermediate_size": configuration.intermediate_size,
        "max_position_embeddings": configuration.max_position_embeddings,
        "mm_hidden_size": tower.hidden_size,
        "mm_projector_type": configuration.mm_projector_type,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "model_type": configuration.model_type,
        "num_attention_heads": configuration.num_attention_heads,
        "num_hidden_layers": configuration.num_hidden_layers,
        "num_key_value_heads": configuration.key_value_heads,
        "pad_token_id": 0,
        "rms_norm_eps": configuration.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_mm_proj": True,
        "vocab_size": configuration.vocab_size,
    }
    return config | _stablelm_settings(configuration) if configuration.experts else config


def _stablelm_settings(configuration: Configuration) -> dict[str, Any]:
    """Return the entries of MoE-LLaVA's config.json that differ for StableLM or are added."""
    layers = list(range(0, configuration.num_hidden_layers, 2))
    return {
        "bos_token_id": ARCADE_RANKS + 1,
        "eos_token_id": ARCADE_RANKS + 1,
        "image_projector_type": configuration.mm_projector_type,
        "mm_image_tower": "openai/clip-vit-large-patch14-336",
        "moe": {
            "capacity_factor": 1.5,
            "ep_size": 1,
            "eval_capacity_factor": 2.0,
            "min_capacity": 0,
            "moe_enable": True,
            "moe_layers_idx": layers,
            "moe_mode": "sparse",
            "num_experts": [configuration.experts] * len(layers),
            "router_aux_loss_coef": 0.01,
            "top_k_experts": 2,
            "use_residual": False,
        },
        "norm_eps": configuration.rms_norm_eps,
        "rope_pct": 0.25,
        "use_qkv_bias": True,
    }


def _write_llama_tokenizer(folder: Path, configuration: Configuration) -> None:
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    write_json(folder / "generation_config.json", ids)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(folder / "special_tokens_map.json", {**special, "pad_token": "<unk>"})
    tokenizer = {
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": True,
        "model_max_length": configuration.max_position_embeddings,
        "tokenizer_class": "LlamaTokenizer",
    }
    write_json(folder / "tokenizer_config.json", {**special, **tokenizer})
    (folder / "tokenizer.model").write_bytes(tokenizer_model(configuration.vocab_size))

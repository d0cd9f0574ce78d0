"""Files of the model that hears, sees and draws, in Janus-Pro's layout."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from mobilevlm.families import open_checkpoint
from mobilevlm.families.backbones import LLAMA
from mobilevlm.model import Model
from mobilevlm.nano import beeps
from mobilevlm.nano.questions import caption_question, questions
from mobilevlm.nano.scenes import COLORS, POSITIONS, SHAPES
from mobilevlm.nano.simple import EDGE, GRID, NUM_CODES, PATCH, simple_caption, simple_scene
from mobilevlm.output_spec import CodeDecoder, ImageOutput
from mobilevlm.reference.model import ReferenceModel
from mobilevlm.synth.janus import drawing_shapes, image_settings
from mobilevlm.synth.shapes import Shapes, decoder_shapes, linear, norm, siglip_shapes, write_json
from mobilevlm.tokenizers.tokenizer import save_tokenizer

UNKNOWN, END, BEGIN, IMAGE, IMAGE_END, MARK = range(6)
"""Ids of special tokens; those of places follow."""
FIRST_PLACE = 6
PLACES = tuple(range(FIRST_PLACE, FIRST_PLACE + GRID * GRID))
SPECIAL = (
    *("<|unknown|>", "<|end|>", "<|begin|>", "<begin_of_image>", "<end_of_image>"),
    "<image_placeholder>",
    *(f"<place_{index}>" for index in range(GRID * GRID)),
)
TEMPLATE = """\
{{- '<|begin|>' -}}
{%- for message in messages -%}
  {%- for part in message['content'] -%}
    {{- '<image_placeholder>' if part['type'] in ('image', 'audio') else part['text'] -}}
  {%- endfor -%}
  {{- '<|end|>' if message['role'] == 'assistant' else '\\n' -}}
{%- endfor -%}
"""
KINDS = ("color", "shape", "what", "where", "exists", "count")
"""Kinds of question about a scene that the model learns."""


@dataclass(frozen=True)
class AnyConfig:
    """Sizes of a model; the defaults are those of the shipped ``nano-any``."""

    vocab_size: int = 544
    hidden_size: int = 128
    intermediate_size: int = 256
    layers: int = 4
    heads: int = 4
    vision_size: int = 96
    vision_layers: int = 3
    vision_heads: int = 4
    image_channels: int = 32
    image_blocks: int = 1
    context: int = 512


def settings(config: AnyConfig) -> dict[str, Any]:
    """Return config.json."""
    return {
        "architectures": ["NanoAnyForConditionalGeneration"],
        "first_place_id": FIRST_PLACE,
        "image_token_id": MARK,
        "model_type": "nano_any",
        "text_config": {
            "bos_token_id": BEGIN,
            "eos_token_id": END,
            "head_dim": config.hidden_size // config.heads,
            "hidden_act": "silu",
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "max_position_embeddings": config.context,
            "model_type": "llama",
            "num_attention_heads": config.heads,
            "num_hidden_layers": config.layers,
            "num_key_value_heads": config.heads,
            "pad_token_id": END,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "vocab_size": config.vocab_size,
        },
        "torch_dtype": "float16",
        "vision_config": {
            "depth": 2,
            "hidden_size": config.vision_size,
            "image_size": EDGE,
            "mlp_ratio": 2.0,
            "model_type": "janus_vision_model",
            "num_attention_heads": config.vision_heads,
            "num_hidden_layers": config.vision_layers,
            "num_image_tokens": GRID * GRID,
            "patch_size": PATCH,
            "projection_dim": config.hidden_size,
        },
        "vq_config": {
            "base_channels": config.image_channels,
            "channel_multiplier": [1, 1, 1, 1],
            "embed_dim": 8,
            "image_token_embed_dim": config.hidden_size,
            "latent_channels": config.image_channels,
            "model_type": "janus_vqgan",
            "num_embeddings": NUM_CODES,
            "num_hidden_layers": 2,
            "num_patches": GRID,
            "num_res_blocks": config.image_blocks,
            "projection_dim": config.hidden_size,
        },
    }


def shapes(config: AnyConfig) -> Shapes:
    """Return the shape of each tensor by its name in the checkpoint."""
    text, hidden, width = settings(config)["text_config"], config.hidden_size, config.vision_size
    backbone = replace(LLAMA, root="model.language_model")
    found = decoder_shapes(backbone.read(Path("config.json"), text), backbone)
    sized = {
        **settings(config)["vision_config"],
        "intermediate_size": 2 * width,
    }
    tower = siglip_shapes(sized) | norm("vision_model.post_layernorm", width)
    found |= {
        f"model.{name.replace('.out_proj.', '.projection_layer.')}": shape
        for name, shape in tower.items()
    }
    found |= linear("model.aligner.fc1", width, hidden)
    found |= linear("model.aligner.hidden_layers.0", hidden, hidden)
    channels = config.image_channels
    decoder = CodeDecoder(channels, (channels,) * 4, config.image_blocks + 1)
    output = ImageOutput(NUM_CODES, 8, GRID, hidden, decoder, "", (), 0, ())
    drawn = drawing_shapes(output, hidden)
    found |= {f"model.{name}": shape for name, shape in drawn.items()}
    return found


def write_settings(folder: Path, config: AnyConfig) -> None:
    """Write all files but the tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", settings(config))
    ids = {"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": END}
    write_json(folder / "generation_config.json", {**ids, "guidance_scale": 1.0})
    write_json(folder / "preprocessor_config.json", image_settings(EDGE))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    named = {
        "boi_token": SPECIAL[IMAGE],
        "bos_token": SPECIAL[BEGIN],
        "eoi_token": SPECIAL[IMAGE_END],
        "eos_token": SPECIAL[END],
        "pad_token": SPECIAL[END],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", named)
    save_tokenizer(train_tokenizer(config.vocab_size), folder / "tokenizer.json")


@functools.cache
def train_tokenizer(vocab_size: int) -> Tokenizer:
    """Return a byte-level tokenizer of the world's words."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(text, normalized=False, special=True) for text in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return tokenizer


def _corpus() -> list[str]:
    lines = [beeps.QUESTION, beeps.SILENCE] * 50
    lines += [f" {word} {word}s" for word in (*COLORS, *SHAPES, *POSITIONS)] * 20
    lines += [" " + " ".join(beeps.LETTERS)] * 50
    for seed in range(600):
        scene = simple_scene(seed)
        lines.append(simple_caption(scene))
        for question in (caption_question(scene), *questions(scene, 4, KINDS)):
            lines += [question.text, question.answer]
    return lines


def write_random(folder: Path, config: AnyConfig, seed: int = 0) -> None:
    """Write a checkpoint of random weights."""
    write_settings(folder, config)
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for name, shape in sorted(shapes(config).items()):
        fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 1
        if len(shape) == 1:
            value = np.full(shape, 0.0 if name.endswith(".bias") else 1.0)
        elif "embed" in name.split(".")[-2] and len(shape) == 2:
            value = 0.3 * rng.standard_normal(shape)
        else:
            value = fan_in**-0.5 * rng.standard_normal(shape)
        tensors[name] = value.astype(np.float16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def save_weights(reference: ReferenceModel, model: Model) -> None:
    """Write the reference's weights over those of the checkpoint that ``model`` is of."""
    tensors = {
        model.weights.stored_name(name): np.ascontiguousarray(
            value.detach().to(torch.float16).numpy()
        )
        for name, value in reference.state_dict().items()
    }
    save_file(tensors, model.folder / "model.safetensors", {"format": "pt"})


def new_model(folder: Path, config: AnyConfig) -> Model:
    """Return the model of a folder, which is given random weights if it has none."""
    if not (folder / "model.safetensors").exists():
        write_random(folder, config)
    return open_checkpoint(folder)

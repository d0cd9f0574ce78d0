"""Checkpoints of official layouts as pairs of GGUF files, with the names that llama.cpp's own
converter gives them: what other programs write, for engine ``gguf`` to run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from conftest import DATA
from numpy.typing import NDArray
from safetensors.torch import load_file
from tokenizers import Tokenizer

from mobilevlm.gguf.tokenizer import word_split_name

Weights = dict[str, NDArray[np.float32]]
Pair = tuple[Path, Path]
"""Language model and image encoder."""


def smolvlm_pair(folder: Path, **changes: Any) -> Pair:
    """SmolVLM2 (tests/data/smolvlm2): idefics3 beside a Llama, both float32. ``changes``: keys of
    either file, ``__`` for dots; none leaves a key out."""
    checkpoint = DATA / "smolvlm2" / "checkpoint"
    config, weights = _read(checkpoint)
    vision, processor = config["vision_config"], _json(checkpoint, "preprocessor_config.json")
    keys = {
        **_tower_keys("idefics3", vision, vision["image_size"], vision["patch_size"], processor),
        "clip.vision.projection_dim": config["text_config"]["hidden_size"],
        "clip.vision.projector.scale_factor": config["scale_factor"],
        "clip.vision.preproc_image_size": processor["size"]["longest_edge"],
        "clip.use_gelu": True,
    }
    tower = "model.vision_model."
    layers = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.out_proj": "attn_out", "layer_norm1": "ln1", "layer_norm2": "ln2",
        "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down",
    }  # fmt: skip
    names = {
        f"{tower}embeddings.patch_embedding": "v.patch_embd",
        f"{tower}embeddings.position_embedding": "v.position_embd",
        f"{tower}post_layernorm": "v.post_ln",
        "model.connector.modality_projection.proj": "mm.model.fc",
    }
    for layer in range(vision["num_hidden_layers"]):
        for ours, theirs in layers.items():
            names[f"{tower}encoder.layers.{layer}.{ours}"] = f"v.blk.{layer}.{theirs}"
    mmproj = folder / "mmproj.gguf"
    _write(mmproj, "clip", {**keys, **_dotted(changes, "clip.")}, _renamed(weights, names))
    model = folder / "model.gguf"
    text = {**config["text_config"], "eos_token_id": config["eos_token_id"]}
    prefix = ("model.text_model.", "lm_head.")
    _write_decoder(model, "llama", checkpoint, text, weights, prefix, changes)
    return model, mmproj


def internvl_pair(folder: Path, **changes: Any) -> Pair:
    """InternVL3.5 (tests/data/internvl35): InternViT beside a Qwen3, both float32, with at most 6
    tiles: of several grids of one shape llama.cpp takes the largest, the official code only where
    the image is large enough. ``class_last``: the class token's position is the last, where
    llama.cpp puts the token."""
    checkpoint = DATA / "internvl35" / "checkpoint"
    config, weights = _read(checkpoint)
    vision, processor = config["vision_config"], _json(checkpoint, "preprocessor_config.json")
    size, patch = vision["image_size"][0], vision["patch_size"][0]
    keys = {
        **_tower_keys("internvl", vision, size, patch, processor),
        "clip.vision.projection_dim": config["text_config"]["hidden_size"],
        "clip.vision.projector.scale_factor": round(1 / config["downsample_ratio"]),
        "clip.vision.preproc_min_tiles": 1,
        "clip.vision.preproc_max_tiles": 6,
        "clip.use_gelu": True,
    }
    tower = "vision_tower."
    layers = {
        "attention.q_proj": "attn_q", "attention.k_proj": "attn_k", "attention.v_proj": "attn_v",
        "attention.projection_layer": "attn_out", "layernorm_before": "ln1",
        "layernorm_after": "ln2", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down",
    }  # fmt: skip
    names = {
        f"{tower}embeddings.patch_embeddings.projection": "v.patch_embd",
        "multi_modal_projector.layer_norm": "mm.model.mlp.0",
        "multi_modal_projector.linear_1": "mm.model.mlp.1",
        "multi_modal_projector.linear_2": "mm.model.mlp.3",
    }
    plain = {
        f"{tower}embeddings.cls_token": "v.class_embd",
        f"{tower}embeddings.position_embeddings": "v.position_embd.weight",
    }
    for layer in range(vision["num_hidden_layers"]):
        for ours, theirs in layers.items():
            names[f"{tower}encoder.layer.{layer}.{ours}"] = f"v.blk.{layer}.{theirs}"
        for number in (1, 2):
            plain[f"{tower}encoder.layer.{layer}.lambda_{number}"] = (
                f"v.blk.{layer}.ls{number}.weight"
            )
    tensors = _renamed(weights, names)
    if changes.pop("class_last", False):
        ours = f"{tower}embeddings.position_embeddings"
        weights[ours] = np.roll(weights[ours], -1, axis=1)
    tensors |= {theirs: weights[ours].reshape(weights[ours].shape[-2:] if "position" in ours
                else -1) for ours, theirs in plain.items()}  # fmt: skip
    mmproj = folder / "mmproj.gguf"
    _write(mmproj, "clip", {**keys, **_dotted(changes, "clip.")}, tensors)
    model = folder / "model.gguf"
    prefix = ("language_model.model.", "language_model.lm_head.")
    _write_decoder(model, "qwen3", checkpoint, config["text_config"], weights, prefix, changes)
    return model, mmproj


def _read(checkpoint: Path) -> tuple[dict[str, Any], Weights]:
    loaded = load_file(checkpoint / "model.safetensors")
    return _json(checkpoint, "config.json"), {k: v.float().numpy() for k, v in loaded.items()}


def _json(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def _tower_keys(
    projector: str, vision: dict[str, Any], size: int, patch: int, processor: dict[str, Any]
) -> dict[str, Any]:
    return {
        "clip.projector_type": projector,
        "clip.has_vision_encoder": True,
        "clip.vision.image_size": size,
        "clip.vision.patch_size": patch,
        "clip.vision.embedding_length": vision["hidden_size"],
        "clip.vision.feed_forward_length": vision["intermediate_size"],
        "clip.vision.block_count": vision["num_hidden_layers"],
        "clip.vision.attention.head_count": vision["num_attention_heads"],
        "clip.vision.attention.layer_norm_epsilon": vision["layer_norm_eps"],
        "clip.vision.image_mean": processor["image_mean"],
        "clip.vision.image_std": processor["image_std"],
    }


def _renamed(weights: Weights, names: dict[str, str]) -> Weights:
    found = {}
    for ours, theirs in names.items():
        for ending in ("weight", "bias"):
            if f"{ours}.{ending}" in weights:
                found[f"{theirs}.{ending}"] = weights[f"{ours}.{ending}"]
    return found


def _write_decoder(
    path: Path,
    architecture: str,
    checkpoint: Path,
    text: dict[str, Any],
    weights: Weights,
    prefix: tuple[str, str],
    changes: dict[str, Any],
) -> None:
    heads, shared = text["num_attention_heads"], text["num_key_value_heads"]
    keys = {
        f"{architecture}.context_length": text["max_position_embeddings"],
        f"{architecture}.embedding_length": text["hidden_size"],
        f"{architecture}.block_count": text["num_hidden_layers"],
        f"{architecture}.feed_forward_length": text["intermediate_size"],
        f"{architecture}.attention.head_count": heads,
        f"{architecture}.attention.head_count_kv": shared,
        f"{architecture}.attention.key_length": text["head_dim"],
        f"{architecture}.attention.value_length": text["head_dim"],
        f"{architecture}.attention.layer_norm_rms_epsilon": text["rms_norm_eps"],
        f"{architecture}.rope.freq_base": float(text["rope_theta"]),
        **_tokenizer_keys(checkpoint, text),
    }
    layers = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    inner, head = prefix
    names = {
        f"{inner}embed_tokens": "token_embd",
        f"{inner}norm": "output_norm",
        head[:-1]: "output",
    }
    for layer in range(text["num_hidden_layers"]):
        for ours, theirs in layers.items():
            names[f"{inner}layers.{layer}.{ours}"] = f"blk.{layer}.{theirs}"
    tensors = _renamed(weights, names)
    if architecture == "llama":
        for name, tensor in tensors.items():
            count = {"attn_q": heads, "attn_k": shared}.get(name.split(".")[-2])
            if count:
                half = tensor.reshape(count, 2, -1, tensor.shape[1])
                tensors[name] = np.ascontiguousarray(half.swapaxes(1, 2)).reshape(tensor.shape)
    changed = {**_dotted(changes, "tokenizer."), **_dotted(changes, f"{architecture}.")}
    _write(path, architecture, {**keys, **changed}, tensors)


def _tokenizer_keys(checkpoint: Path, text: dict[str, Any]) -> dict[str, Any]:
    state = _json(checkpoint, "tokenizer.json")
    vocabulary = {index: token for token, index in state["model"]["vocab"].items()}
    added = {token["id"]: token for token in state["added_tokens"]}
    vocabulary |= {index: token["content"] for index, token in added.items()}
    tokens, types = [], []
    for index in range(text["vocab_size"]):
        kind = gguf.TokenType.NORMAL if index in vocabulary else gguf.TokenType.UNUSED
        if index in added:
            control = added[index]["special"]
            kind = gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED
        tokens.append(vocabulary.get(index, f"[PAD{index}]"))
        types.append(int(kind))
    template = checkpoint / "chat_template.jinja"
    source = (
        template.read_text(encoding="utf-8")
        if template.is_file()
        else _json(checkpoint, "chat_template.json")["chat_template"]
    )
    merges = [m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": word_split_name(state),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": text["bos_token_id"],
        "tokenizer.ggml.eos_token_id": text["eos_token_id"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": source,
    }


def _dotted(changes: dict[str, Any], prefix: str) -> dict[str, Any]:
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in dotted.items() if name.startswith(prefix)}


def _write(path: Path, architecture: str, keys: dict[str, Any], tensors: Weights) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    adders: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in keys.items():
        if value is not None:
            adders[type(value)](key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gemma_pair(folder: Path, **changes: Any) -> Pair:
    """Gemma 3 at random: rows of an image see each other, and attention slides in most layers."""
    rng, hidden, wide = np.random.default_rng(3), 32, 64
    draw = _drawn(rng)
    tower = {
        "v.patch_embd.weight": draw(16, 3, 14, 14), "v.patch_embd.bias": draw(16),
        "v.position_embd.weight": draw(36, 16),
        "v.post_ln.weight": 1 + draw(16), "v.post_ln.bias": draw(16),
        "mm.soft_emb_norm.weight": 1 + draw(16), "mm.input_projection.weight": draw(16, hidden),
        **_siglip_layers(draw, 2, 16, 40),
    }  # fmt: skip
    keys = {
        **_drawn_tower_keys("gemma3", 84, 14, 16, 40, 2, 2, hidden),
        "clip.vision.projector.scale_factor": 3,
        "clip.use_gelu": True,
    }
    mmproj, model = folder / "mmproj.gguf", folder / "model.gguf"
    _write(mmproj, "clip", {**keys, **_dotted(changes, "clip.")}, tower)
    tokenizer = _tokenizer_keys(DATA / "smolvlm2" / "checkpoint", _TEXT)
    tokens = tokenizer["tokenizer.ggml.tokens"]
    tokens[tokens.index("<fake_token_around_image>")] = "<start_of_image>"
    tokens[tokens.index("<global-img>")] = "<end_of_image>"
    template = tokenizer["tokenizer.chat_template"].replace("'<image>'", "'<start_of_image>'")
    decoder = {
        **_drawn_decoder_keys("gemma3", hidden, wide, 7, 4, 2, 8),
        "gemma3.attention.sliding_window": 24,
        **tokenizer,
        "tokenizer.chat_template": template,
    }
    tensors = _drawn_decoder(draw, hidden, wide, 7, 4, 2, 8)
    for layer in range(7):
        for name, size in (("attn_q_norm", 8), ("attn_k_norm", 8), ("post_attention_norm", hidden),
                           ("post_ffw_norm", hidden)):  # fmt: skip
            tensors[f"blk.{layer}.{name}.weight"] = 1 + draw(size)
    changed = {**_dotted(changes, "tokenizer."), **_dotted(changes, "gemma3.")}
    _write(model, "gemma3", {**decoder, **changed}, tensors)
    return model, mmproj


def qwen_vl_pair(folder: Path, **changes: Any) -> Pair:
    """Qwen2-VL at random: images near their own size, positions of several axes."""
    rng, hidden, wide = np.random.default_rng(4), 32, 64
    draw = _drawn(rng)
    tower = {
        "v.patch_embd.weight": draw(16, 3, 14, 14), "v.patch_embd.weight.1": draw(16, 3, 14, 14),
        "v.post_ln.weight": 1 + draw(16), "v.post_ln.bias": draw(16),
        "mm.0.weight": draw(64, 64), "mm.0.bias": draw(64),
        "mm.2.weight": draw(hidden, 64), "mm.2.bias": draw(hidden),
        **_siglip_layers(draw, 2, 16, 40),
    }  # fmt: skip
    keys = {
        **_drawn_tower_keys("qwen2vl_merger", 560, 14, 16, 40, 2, 2, hidden),
        "clip.use_gelu": False,
        "clip.use_silu": False,
    }
    mmproj, model = folder / "mmproj.gguf", folder / "model.gguf"
    _write(mmproj, "clip", {**keys, **_dotted(changes, "clip.")}, tower)
    tokenizer = _tokenizer_keys(DATA / "internvl35" / "checkpoint", _TEXT)
    tokens = tokenizer["tokenizer.ggml.tokens"]
    marks = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
    for old, new in zip(("<img>", "</img>", "<IMG_CONTEXT>"), marks, strict=True):
        if new not in tokens:
            tokens[tokens.index(old)] = new
    start, end, pad = marks
    template = tokenizer["tokenizer.chat_template"]
    template = template.replace("<IMG_CONTEXT>\n", f"{start}{pad}{end}")
    decoder = {
        **_drawn_decoder_keys("qwen2vl", hidden, wide, 2, 4, 2, 8),
        "qwen2vl.rope.dimension_sections": [1, 1, 2, 0],
        **tokenizer,
        "tokenizer.chat_template": template,
    }
    tensors = _drawn_decoder(draw, hidden, wide, 2, 4, 2, 8)
    for layer in range(2):
        for name, size in (("attn_q", 32), ("attn_k", 16), ("attn_v", 16)):
            tensors[f"blk.{layer}.{name}.bias"] = draw(size)
    changed = {**_dotted(changes, "tokenizer."), **_dotted(changes, "qwen2vl.")}
    _write(model, "qwen2vl", {**decoder, **changed}, tensors)
    return model, mmproj


_TEXT = {"vocab_size": 624, "bos_token_id": 1, "eos_token_id": 2}


def _drawn(rng: np.random.Generator) -> Callable[..., NDArray[np.float32]]:
    def draw(*shape: int) -> NDArray[np.float32]:
        scale = 0.05 if len(shape) == 1 else np.prod(shape[1:]) ** -0.5
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    return draw


def _siglip_layers(draw: Callable[..., Any], layers: int, hidden: int, wide: int) -> Weights:
    found: Weights = {}
    for layer in range(layers):
        shapes = {"attn_q": (hidden, hidden), "attn_k": (hidden, hidden),
                  "attn_v": (hidden, hidden), "attn_out": (hidden, hidden),
                  "ffn_up": (wide, hidden), "ffn_down": (hidden, wide)}  # fmt: skip
        for name, shape in shapes.items():
            found[f"v.blk.{layer}.{name}.weight"] = draw(*shape)
            found[f"v.blk.{layer}.{name}.bias"] = draw(shape[0])
        for name in ("ln1", "ln2"):
            found[f"v.blk.{layer}.{name}.weight"] = 1 + draw(hidden)
            found[f"v.blk.{layer}.{name}.bias"] = draw(hidden)
    return found


def _drawn_tower_keys(
    projector: str, size: int, patch: int, hidden: int, wide: int, layers: int, heads: int, out: int
) -> dict[str, Any]:
    vision = {"hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": layers,
              "num_attention_heads": heads, "layer_norm_eps": 1e-6}  # fmt: skip
    processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    keys = _tower_keys(projector, vision, size, patch, processor)
    return {**keys, "clip.vision.projection_dim": out}


def _drawn_decoder_keys(
    architecture: str, hidden: int, wide: int, layers: int, heads: int, shared: int, head: int
) -> dict[str, Any]:
    return {
        f"{architecture}.context_length": 2048,
        f"{architecture}.embedding_length": hidden,
        f"{architecture}.block_count": layers,
        f"{architecture}.feed_forward_length": wide,
        f"{architecture}.attention.head_count": heads,
        f"{architecture}.attention.head_count_kv": shared,
        f"{architecture}.attention.key_length": head,
        f"{architecture}.attention.value_length": head,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-6,
        f"{architecture}.rope.freq_base": 10000.0,
    }


def _drawn_decoder(
    draw: Callable[..., Any], hidden: int, wide: int, layers: int, heads: int, shared: int,
    head: int,
) -> Weights:  # fmt: skip
    found = {
        "token_embd.weight": draw(_TEXT["vocab_size"], hidden),
        "output_norm.weight": 1 + draw(hidden),
    }
    for layer in range(layers):
        shapes = {"attn_q": (heads * head, hidden), "attn_k": (shared * head, hidden),
                  "attn_v": (shared * head, hidden), "attn_output": (hidden, heads * head),
                  "ffn_gate": (wide, hidden), "ffn_up": (wide, hidden),
                  "ffn_down": (hidden, wide)}  # fmt: skip
        for name, shape in shapes.items():
            found[f"blk.{layer}.{name}.weight"] = draw(*shape)
        for name in ("attn_norm", "ffn_norm"):
            found[f"blk.{layer}.{name}.weight"] = 1 + draw(hidden)
    return found


def hybrid_pair(folder: Path, **changes: Any) -> Pair:
    """LFM2's decoder at random behind Idefics3's projector: layers with short convolutions, whose
    state cannot go back."""
    rng, hidden, wide = np.random.default_rng(6), 32, 64
    draw = _drawn(rng)
    tower = {
        "v.patch_embd.weight": draw(16, 3, 14, 14), "v.patch_embd.bias": draw(16),
        "v.position_embd.weight": draw(36, 16),
        "v.post_ln.weight": 1 + draw(16), "v.post_ln.bias": draw(16),
        "mm.model.fc.weight": draw(hidden, 16 * 9),
        **_siglip_layers(draw, 2, 16, 40),
    }  # fmt: skip
    keys = {
        **_drawn_tower_keys("idefics3", 84, 14, 16, 40, 2, 2, hidden),
        "clip.vision.projector.scale_factor": 3,
        "clip.vision.preproc_image_size": 168,
        "clip.use_gelu": True,
    }
    mmproj, model = folder / "mmproj.gguf", folder / "model.gguf"
    _write(mmproj, "clip", {**keys, **_dotted(changes, "clip.")}, tower)
    decoder = {
        **_drawn_decoder_keys("lfm2", hidden, wide, 4, 4, 2, 8),
        "lfm2.attention.head_count_kv": [0, 2, 0, 2],
        "lfm2.shortconv.l_cache": 3,
        **_tokenizer_keys(DATA / "smolvlm2" / "checkpoint", _TEXT),
    }
    tensors = _drawn_decoder(draw, hidden, wide, 4, 4, 2, 8)
    tensors["token_embd_norm.weight"] = tensors.pop("output_norm.weight")
    for layer in range(4):
        block = f"blk.{layer}."
        if layer % 2:
            tensors |= {f"{block}attn_{part}_norm.weight": 1 + draw(8) for part in "qk"}
            continue
        for part in ("q", "k", "v", "output"):
            del tensors[f"{block}attn_{part}.weight"]
        tensors |= {
            f"{block}shortconv.conv.weight": draw(hidden, 3),
            f"{block}shortconv.in_proj.weight": draw(3 * hidden, hidden),
            f"{block}shortconv.out_proj.weight": draw(hidden, hidden),
        }
    changed = {**_dotted(changes, "tokenizer."), **_dotted(changes, "lfm2.")}
    _write(model, "lfm2", {**decoder, **changed}, tensors)
    return model, mmproj


def write_vocabulary(checkpoint: Path, path: Path, **changes: Any) -> Path:
    """Write a language model of one small layer with a checkpoint's byte-level vocabulary."""
    vocabulary = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).get_vocab()
    text = {"vocab_size": max(vocabulary.values()) + 1, "bos_token_id": 1, "eos_token_id": 2}
    draw = _drawn(np.random.default_rng(8))
    keys = _drawn_decoder_keys("llama", 32, 64, 1, 4, 2, 8) | _tokenizer_keys(checkpoint, text)
    tensors = _drawn_decoder(draw, 32, 64, 1, 4, 2, 8)
    tensors["token_embd.weight"] = draw(text["vocab_size"], 32)
    _write(path, "llama", {**keys, **_dotted(changes, "tokenizer.")}, tensors)
    return path

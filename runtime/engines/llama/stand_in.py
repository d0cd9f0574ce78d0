"""A language model that says nothing, where mtmd asks for one only to compare sizes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import gguf
import numpy as np

from mobilevlm.runtime.engines.llama.native import NativeModel

_SPECIAL = ["<unk>", "<s>", "</s>"]


def stand_in(hidden_size: int) -> NativeModel:
    """A model of architecture ``llama`` with this width, one layer and nothing else worth having.

    mtmd wants a language model that llama.cpp can load, and of it only its width and a tokenizer.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.gguf")
        _write(path, hidden_size)
        return NativeModel(path)


def _write(path: Path, hidden_size: int) -> None:
    tokens = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(1)
    writer.add_embedding_length(hidden_size)
    writer.add_block_count(1)
    writer.add_feed_forward_length(1)
    writer.add_head_count(1)
    writer.add_key_length(2)
    writer.add_value_length(2)
    writer.add_rope_dimension_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    control = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    writer.add_token_types([*control, *[gguf.TokenType.BYTE] * 256])
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (len(tokens), hidden_size),
        "output_norm": (hidden_size,),
        "blk.0.attn_norm": (hidden_size,),
        "blk.0.attn_q": (2, hidden_size),
        "blk.0.attn_k": (2, hidden_size),
        "blk.0.attn_v": (2, hidden_size),
        "blk.0.attn_output": (hidden_size, 2),
        "blk.0.ffn_norm": (hidden_size,),
        "blk.0.ffn_gate": (1, hidden_size),
        "blk.0.ffn_up": (1, hidden_size),
        "blk.0.ffn_down": (hidden_size, 1),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

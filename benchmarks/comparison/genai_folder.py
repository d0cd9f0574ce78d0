"""A model folder of onnxruntime-genai around this project's own decoder graph.

onnxruntime-genai gives a decoder ``input_ids``, ``attention_mask`` and KV buffers; three small
operators in front of our graph make of them what it takes: embedding rows, the length so far, and
the last position. Weight files are linked, not copied.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from mobilevlm.bundle import Bundle
from mobilevlm.decoder_spec import DecoderSpec

EMBEDDINGS = "embed_tokens.weight"


def write_genai_folder(bundle: Bundle, folder: Path, threads: int) -> None:
    """Writes ``model.onnx``, links to its weights, ``genai_config.json``; needs onnx."""
    import onnx

    table = bundle.manifest.embeddings
    assert table is not None
    artifact = bundle.artifact("decoder", "onnx")
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*artifact.data, table.path):
        _link(bundle.path(name), folder / Path(name).name)
    model = onnx.load(bundle.path(artifact.path), load_external_data=False)
    graph = model.graph
    inputs = [value for value in graph.input if value.name.startswith("past_key_values.")]
    del graph.input[:]
    graph.input.extend(
        [
            onnx.helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, [1, "length"]),
            onnx.helper.make_tensor_value_info(
                "attention_mask", onnx.TensorProto.INT64, [1, "total"]
            ),
            *inputs,
        ]
    )
    graph.initializer.append(_embedding_table(onnx, table))
    graph.initializer.extend(
        onnx.numpy_helper.from_array(np.array([value], np.int64), name)
        for name, value in (("one", 1), ("zero", 0))
    )
    scale = np.array(bundle.manifest.spec.decoder.embed_scale, np.float32)
    graph.initializer.append(onnx.numpy_helper.from_array(scale, "embed_scale"))
    node = onnx.helper.make_node
    before = [
        node("Gather", [EMBEDDINGS, "input_ids"], ["embedding_rows"]),
        node("Cast", ["embedding_rows"], ["float_rows"], to=onnx.TensorProto.FLOAT),
        node("Mul", ["float_rows", "embed_scale"], ["inputs_embeds"]),
        node("Shape", ["attention_mask"], ["total_long"], start=1, end=2),
        node("Cast", ["total_long"], ["total_length"], to=onnx.TensorProto.INT32),
        node("Shape", ["input_ids"], ["length_long"], start=1, end=2),
        node("Sub", ["length_long", "one"], ["logits_positions"]),
    ]
    nodes = [*before, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save_model(model, folder / "model.onnx")
    config = _config(bundle.manifest.spec.decoder, threads)
    (folder / "genai_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def _embedding_table(onnx: Any, table: Any) -> Any:
    """An initializer that points into the bundle's embedding file."""
    tensor = onnx.TensorProto(
        name=EMBEDDINGS,
        dims=[table.rows, table.columns],
        data_type=getattr(
            onnx.TensorProto, {"float16": "FLOAT16", "float32": "FLOAT"}[table.dtype]
        ),
        data_location=onnx.TensorProto.EXTERNAL,
    )
    length = table.rows * table.columns * np.dtype(table.dtype).itemsize
    for key, value in (
        ("location", Path(table.path).name),
        ("offset", table.offset),
        ("length", length),
    ):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _config(spec: DecoderSpec, threads: int) -> dict[str, Any]:
    return {
        "model": {
            "type": "llama",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "vocab_size": spec.vocab_size,
            "context_length": spec.context_length,
            "decoder": {
                "filename": "model.onnx",
                "hidden_size": spec.hidden_size,
                "head_size": spec.cache_head_dim,
                "num_attention_heads": spec.num_attention_heads,
                "num_key_value_heads": spec.num_key_value_heads,
                "num_hidden_layers": spec.num_hidden_layers,
                "session_options": {"intra_op_num_threads": threads, "provider_options": []},
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": spec.context_length,
            "past_present_share_buffer": True,
        },
    }


def _link(source: Path, target: Path) -> None:
    """A hard link (onnxruntime refuses weights outside the model's folder), or a copy where the
    file system has none."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)

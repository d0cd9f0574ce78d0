"""Answers of onnxruntime-genai to the requests in a file, as JSON on stdout; run by
tests/e2e/test_genai.py where the wheel is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og


def answer(model: Any, tokenizer: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens, and the ids of texts by its tokenizer."""
    settings = og.GeneratorParams(model)
    settings.set_search_options(do_sample=False, max_length=len(request["ids"]) + request["count"])
    generator = og.Generator(model, settings)
    ids = np.array([request["ids"]], np.int32)
    if request["pixels"] is None:
        generator.append_tokens(ids)
    else:
        inputs = og.NamedTensors()
        inputs["input_ids"] = ids
        inputs["pixel_values"] = np.array(request["pixels"], np.uint8)
        inputs["num_image_tokens"] = np.array([request["rows"]], np.int64)
        generator.set_inputs(inputs)
    tokens: list[int] = []
    while not generator.is_done() and len(tokens) < request["count"]:
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    texts = [tokenizer.encode(text).tolist() for text in request["texts"]]
    return {"tokens": tokens, "texts": texts}


def main() -> None:
    """Read the folder and the file that the command line names."""
    folder, file = sys.argv[1:]
    model = og.Model(folder)
    tokenizer = og.Tokenizer(model)
    requests = json.loads(Path(file).read_text())
    print(json.dumps([answer(model, tokenizer, request) for request in requests]))


if __name__ == "__main__":
    main()

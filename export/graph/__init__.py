"""Graph authors: ModelSpec and weights to ONNX graphs, written as modules (onnxscript.nn)."""

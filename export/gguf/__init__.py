"""GGUF files that stock llama.cpp runs: the decoder, and tower and projector as ``mmproj``."""

"""GGUF files: reading them, and what a model is from their metadata."""

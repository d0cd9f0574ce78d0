"""Tokenizers of checkpoints as ``tokenizer.json``, with the same ids."""

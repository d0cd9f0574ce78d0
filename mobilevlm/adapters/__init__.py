"""Adapters: LoRA checkpoints, merged into their base while its weights are read."""

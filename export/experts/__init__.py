"""Usage of experts in sparse models."""

"""Sequences in the decoder: state, prefix reuse, drafts."""

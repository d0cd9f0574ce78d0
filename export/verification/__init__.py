"""Verification of a bundle against its checkpoint, and its report."""

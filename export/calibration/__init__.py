"""Calibration: samples, activations of the reference, and what calibrated methods make of them."""

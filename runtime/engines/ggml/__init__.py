"""Engine on ggml's operators, for architectures of our own."""

"""The same work on this runtime and on its peers, measured side by side (benchmarks/README.md)."""

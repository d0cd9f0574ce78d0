"""Benchmarks of the literature, from local files: questions, official scoring, comparison."""

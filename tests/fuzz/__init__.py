"""Fuzzers: one file for each kind of input that strangers can give us.

Each module with a ``FUZZER`` is one, under the name of its file.
"""

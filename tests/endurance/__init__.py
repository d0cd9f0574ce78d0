"""Long runs with a seed: ``cd tests && python -m endurance kills|replaced|first-use --count N``.

tests/robustness/test_endurance.py runs each briefly. Processes are forked from one that has
imported everything, and that has opened no session of ONNX Runtime itself.
"""

"""Training of the built-in models, run from a checkout: ``python -m mobilevlm.nano.training``."""

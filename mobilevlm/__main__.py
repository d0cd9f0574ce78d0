"""``python -m mobilevlm``."""

from mobilevlm.cli import main

main()

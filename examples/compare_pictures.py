"""Asks about two pictures at once; ``<image>`` says where each one stands in the question.

python examples/compare_pictures.py BUNDLE FIRST SECOND
"""

import sys

import mobilevlm


def main() -> None:
    """Prints the whole answer."""
    bundle, first, second = sys.argv[1:]
    question = "First picture: <image>\nSecond picture: <image>\nWhat is different?"
    with mobilevlm.load(bundle) as vlm:
        print(vlm.generate(question, images=[first, second]).text)


if __name__ == "__main__":
    main()

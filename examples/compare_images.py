"""Ask about two images at once; ``<image>`` says where each one stands in the question.

python examples/compare_images.py BUNDLE FIRST SECOND
"""

import argparse

import mobilevlm


def main() -> None:
    """Print the whole answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("bundle", "first", "second"):
        parser.add_argument(name)
    given = parser.parse_args()
    question = "First picture: <image>\nSecond picture: <image>\nWhat is different?"
    try:
        with mobilevlm.load(given.bundle) as vlm:
            print(vlm.generate(question, images=[given.first, given.second]).text)
    except mobilevlm.MobileVLMError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()

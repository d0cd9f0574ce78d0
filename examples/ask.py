"""Ask a bundle about an image and stream the answer.

python examples/ask.py BUNDLE IMAGE "What is in the picture?"
"""

import argparse

import mobilevlm


def main() -> None:
    """Stream the answer, then print how long each stage took."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("bundle", "image", "question"):
        parser.add_argument(name)
    given = parser.parse_args()
    try:
        with mobilevlm.load(given.bundle) as vlm:
            stream = vlm.stream(given.question, images=[given.image], max_new_tokens=128)
            for piece in stream:
                print(piece, end="", flush=True)
            times = stream.generation.timings
    except mobilevlm.MobileVLMError as error:
        parser.exit(2, f"error: {error}\n")
    print(f"\n[first token after {times.ttft:.2f} s, {times.tokens_per_second:.1f} tokens/s]")


if __name__ == "__main__":
    main()
